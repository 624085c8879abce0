//! The date for `strftime_now`, in UTC: the same everywhere, and no time zone database.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// A moment of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment {
    year: i64,
    month: u32,
    day: u32,
    day_of_year: u32,
    /// 0 is Sunday.
    weekday: u32,
    second_of_day: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The present moment.
pub(super) fn now() -> Moment {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment::from_unix(since.as_secs())
}

impl Moment {
    /// Walks whole years, then whole months: dates are few and the calendar stays readable.
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let (mut year, mut left) = (1970, days);
        loop {
            let length = if is_leap(year) { 366 } else { 365 };
            if left < length {
                break;
            }
            left -= length;
            year += 1;
        }
        let day_of_year = left as u32 + 1;
        let february = if is_leap(year) { 29 } else { 28 };
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: left as u32 + 1,
            day_of_year,
            weekday: ((days + 4) % 7) as u32, // the epoch was a Thursday
            second_of_day: (seconds % 86_400) as u32,
        }
    }

    /// As Python's `strftime` in the C locale. The error is the directive that is not supported.
    pub(super) fn format(&self, format: &str) -> Result<String, char> {
        let month = MONTHS[self.month as usize - 1];
        let weekday = WEEKDAYS[self.weekday as usize];
        let (hour, minute) = (self.second_of_day / 3600, self.second_of_day / 60 % 60);
        let hour12 = (hour + 11) % 12 + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let directive = chars.next().unwrap_or('%');
            let written = match directive {
                'Y' => write!(out, "{}", self.year),
                'y' => write!(out, "{:02}", self.year % 100),
                'm' => write!(out, "{:02}", self.month),
                'd' => write!(out, "{:02}", self.day),
                'e' => write!(out, "{:2}", self.day),
                'j' => write!(out, "{:03}", self.day_of_year),
                'B' => write!(out, "{month}"),
                'b' | 'h' => write!(out, "{}", &month[..3]),
                'A' => write!(out, "{weekday}"),
                'a' => write!(out, "{}", &weekday[..3]),
                'H' => write!(out, "{hour:02}"),
                'I' => write!(out, "{hour12:02}"),
                'M' => write!(out, "{minute:02}"),
                'S' => write!(out, "{:02}", self.second_of_day % 60),
                'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
                'F' => write!(out, "{}-{:02}-{:02}", self.year, self.month, self.day),
                'T' => write!(out, "{hour:02}:{minute:02}:{:02}", self.second_of_day % 60),
                '%' => write!(out, "%"),
                other => return Err(other),
            };
            debug_assert!(written.is_ok(), "writing to a string does not fail");
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_formatted_as_python_does() {
        let all = "%Y %y %m %d %e %j %B %b %A %a %H %I %M %S %p %F %T %%";
        let cases = [
            (
                0,
                "1970 70 01 01  1 001 January Jan Thursday Thu 00 12 00 00 AM 1970-01-01 00:00:00 %",
            ),
            (
                951_782_399,
                "2000 00 02 28 28 059 February Feb Monday Mon 23 11 59 59 PM 2000-02-28 23:59:59 %",
            ),
            (
                951_782_400,
                "2000 00 02 29 29 060 February Feb Tuesday Tue 00 12 00 00 AM 2000-02-29 00:00:00 %",
            ),
            (
                1_767_225_599,
                "2025 25 12 31 31 365 December Dec Wednesday Wed 23 11 59 59 PM 2025-12-31 23:59:59 %",
            ),
            (
                4_107_542_400,
                "2100 00 03 01  1 060 March Mar Monday Mon 00 12 00 00 AM 2100-03-01 00:00:00 %",
            ),
        ];
        for (seconds, expected) in cases {
            assert_eq!(Moment::from_unix(seconds).format(all).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn an_unknown_directive_is_named() {
        assert_eq!(Moment::from_unix(0).format("%d %Q"), Err('Q'));
    }
}
