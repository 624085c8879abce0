//! Colours of heat maps: each a background with a text that stands out on it, in light and dark surroundings alike.

use std::fmt::Write;

/// A background and the colour of what is written on it.
type Shade = (&'static str, &'static str);

const INK: &str = "#0b0d10";
const PAPER: &str = "#ffffff";

/// From nothing to everything, one step per decade of a relative error: below 1e-8, ..., 1 and more.
const ERRORS: [Shade; 10] = [
    ("#f7fbff", INK),
    ("#e3eef9", INK),
    ("#d0e2f2", INK),
    ("#b4d3e9", INK),
    ("#8fc1de", INK),
    ("#64a9d3", INK),
    ("#3f8fc5", INK),
    ("#2272b5", PAPER),
    ("#0d57a1", PAPER),
    ("#08306b", PAPER),
];

/// What is within its bound, up to the bound, and beyond: up to 10, 100, 10 000 times and more.
const EXCESSES: [Shade; 7] = [
    ("#eef4ee", INK),
    ("#dcebdc", INK),
    ("#c3dfc3", INK),
    ("#fdd49e", INK),
    ("#fc8d59", INK),
    ("#c62a1b", PAPER),
    ("#7f0000", PAPER),
];

/// The same for dark surroundings, where what is large has to be light to stand out.
const EXCESSES_IN_THE_DARK: [Shade; 7] = [
    ("#16261b", PAPER),
    ("#1c3826", PAPER),
    ("#255034", PAPER),
    ("#7a4508", PAPER),
    ("#e07b39", INK),
    ("#ff8f80", INK),
    ("#ffd0c9", INK),
];

/// The class of a relative error.
pub(crate) fn of_error(error: f64) -> String {
    let shade = match error {
        x if x.is_nan() || x >= 1.0 => 9,
        x if x <= 1e-8 => 0,
        x => ((x.log10() + 9.0).floor() as usize).clamp(0, 9),
    };
    format!("e{shade}")
}

/// The class of something in units of its bound.
pub(crate) fn of_excess(excess: f64) -> String {
    const LIMITS: [f64; 6] = [0.1, 0.5, 1.0, 10.0, 100.0, 1e4];
    let shade = LIMITS.iter().position(|&limit| excess <= limit).unwrap_or(6);
    format!("x{shade}")
}

/// The classes of relative errors with what they stand for.
pub(crate) fn errors() -> Vec<(String, String)> {
    (0..ERRORS.len())
        .map(|i| {
            let name = match i {
                0 => "up to 1e-8; = none at all".to_owned(),
                9 => "1 and more".to_owned(),
                i => format!("1e{}", i as i32 - 9),
            };
            (format!("e{i}"), name)
        })
        .collect()
}

/// The classes of excesses with what they stand for.
pub(crate) fn excesses() -> Vec<(String, String)> {
    const NAMES: [&str; 7] = [
        "up to a tenth of the bound",
        "up to half",
        "up to the bound",
        "beyond it",
        "10 times and more",
        "100 times and more",
        "10 000 times and more",
    ];
    NAMES.iter().enumerate().map(|(i, name)| (format!("x{i}"), (*name).to_owned())).collect()
}

/// The classes as a style sheet.
pub(crate) fn css() -> String {
    let mut light = String::new();
    classes(&mut light, 'e', ERRORS.iter());
    classes(&mut light, 'x', EXCESSES.iter());
    let mut dark = String::new();
    classes(&mut dark, 'e', ERRORS.iter().rev());
    classes(&mut dark, 'x', EXCESSES_IN_THE_DARK.iter());
    format!("{light}@media (prefers-color-scheme:dark){{\n{dark}}}\n")
}

fn classes<'a>(out: &mut String, letter: char, shades: impl Iterator<Item = &'a Shade>) {
    for (i, (background, text)) in shades.enumerate() {
        let _ = writeln!(out, ".{letter}{i}{{background:{background};color:{text}}}");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The contrast of two colours `#rrggbb` by the Web Content Accessibility Guidelines: from 1 to 21.
    pub(crate) fn contrast(a: &str, b: &str) -> f64 {
        let luminance = |colour: &str| {
            let channel = |i: usize| {
                let x = f64::from(u8::from_str_radix(&colour[i..i + 2], 16).unwrap()) / 255.0;
                if x <= 0.03928 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
        };
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn text_stands_out_on_every_shade() {
        for (background, text) in ERRORS.iter().chain(&EXCESSES).chain(&EXCESSES_IN_THE_DARK) {
            let contrast = contrast(background, text);
            assert!(contrast >= 4.5, "{text} on {background}: {contrast:.2}");
        }
    }

    #[test]
    fn what_is_large_stands_out_from_the_page_in_light_and_in_dark() {
        let (light, dark) = ("#ffffff", "#14161a");
        for (shades, page) in [(ERRORS, light), (reversed(ERRORS), dark)] {
            let contrasts = shades.map(|(background, _)| contrast(background, page));
            assert!(contrasts.is_sorted() && contrasts[9] > 7.0, "{page}: {contrasts:?}");
        }
        for (shades, page) in [(EXCESSES, light), (EXCESSES_IN_THE_DARK, dark)] {
            let contrasts = shades.map(|(background, _)| contrast(background, page));
            assert!(contrasts[6] > 7.0 && contrasts[0] < 1.5, "{page}: {contrasts:?}");
        }
    }

    fn reversed<const N: usize>(mut shades: [Shade; N]) -> [Shade; N] {
        shades.reverse();
        shades
    }

    #[test]
    fn shades_follow_the_decades_of_an_error_and_the_bound_of_an_excess() {
        let error = |x| of_error(x);
        assert_eq!(
            [0.0, 1e-9, 2e-8, 3e-3, 0.5, 1.0].map(error),
            ["e0", "e0", "e1", "e6", "e8", "e9"]
        );
        assert_eq!([f64::NAN, f64::INFINITY].map(error), ["e9", "e9"]);
        let excess = |x| of_excess(x);
        assert_eq!(
            [0.0, 1.0, 1.01, 1e9, f64::INFINITY, f64::NAN].map(excess),
            ["x0", "x2", "x3", "x6", "x6", "x6"]
        );
    }
}
