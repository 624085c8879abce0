//! What the system says of the machine, of the others on it, and of us. Linux says all of it; other systems leave gaps.

use std::{fs, thread};

use apr_report::bench::Machine;

/// So many cores kept busy by others disturb what we measure.
const BUSY_CORES: f64 = 0.2;

/// Threads that the machine runs at once.
pub(super) fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// The most that was resident of this process so far, in bytes.
pub(super) fn peak_resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = field(&status, "VmHWM:")?.strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    Some(1024 * kilobytes)
}

/// The machine at one moment.
#[derive(Debug)]
pub(super) struct Moment {
    load: Option<f64>,
    time: Option<CpuTime>,
}

/// Time that all cores spent since the system started, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct CpuTime {
    cores: u64,
    all: u64,
    busy: u64,
    /// Ours of the busy ones.
    own: u64,
}

impl Moment {
    pub(super) fn now() -> Self {
        let load = fs::read_to_string("/proc/loadavg").ok();
        let load = load.and_then(|text| text.split_whitespace().next()?.parse().ok());
        let read = |path| fs::read_to_string(path).ok();
        let time = read("/proc/stat").zip(read("/proc/self/stat"));
        Self { load, time: time.and_then(|(all, own)| CpuTime::parse(&all, &own)) }
    }

    /// What is known of the machine and of what went on between this moment and `after`.
    pub(super) fn machine(&self, after: &Self, isa: &'static str) -> Machine {
        let others = self.time.zip(after.time).and_then(|(before, after)| before.others(after));
        Machine {
            cpu: cpu_name(),
            cores: cores(),
            isa,
            load_before: self.load,
            load_after: after.load,
            others_cores: others,
            busy: others.map(|cores| cores > BUSY_CORES),
        }
    }
}

impl CpuTime {
    fn parse(stat: &str, own: &str) -> Option<Self> {
        let cores = stat.lines().filter(|line| is_core(line)).count() as u64;
        // user nice system idle iowait irq softirq steal; what guests use is part of user.
        let ticks = field(stat, "cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = ticks.map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let all = ticks.iter().sum();
        let busy = all - ticks.get(3)? - ticks.get(4)?;
        // The name of the program, in parentheses, may hold anything.
        let own: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let own = own.get(11)?.parse::<u64>().ok()? + own.get(12)?.parse::<u64>().ok()?;
        Some(Self { cores, all, busy, own })
    }

    /// The cores that others kept busy until `after`; `None` if no time passed.
    fn others(self, after: Self) -> Option<f64> {
        let all = after.all.checked_sub(self.all).filter(|&all| all > 0)?;
        let busy = after.busy.saturating_sub(self.busy);
        let others = busy.saturating_sub(after.own.saturating_sub(self.own));
        Some(others as f64 / all as f64 * self.cores as f64)
    }
}

fn is_core(line: &str) -> bool {
    line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn cpu_name() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = field(&info, "model name")?.trim_start_matches([' ', '\t', ':']);
    Some(name.to_owned())
}

/// The rest of the line that begins with `key`.
fn field<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_use_is_what_is_busy_without_us() {
        let stat = |user: u64, idle: u64| {
            format!("cpu  {user} 0 100 {idle} 50 0 0 10 7 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n")
        };
        let own = |ticks: u64| format!("12 (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 5 0 0 20 0");
        let before = CpuTime::parse(&stat(1000, 9000), &own(0)).unwrap();
        assert_eq!(before, CpuTime { cores: 2, all: 10160, busy: 1110, own: 5 });
        let after = CpuTime::parse(&stat(1150, 9050), &own(100)).unwrap();
        // 200 ticks on two cores are 100 ticks of time: we used 100 of them, and others 50.
        assert_eq!(before.others(after), Some(0.5));
        assert_eq!(before.others(before), None, "no time has passed");
        assert_eq!(CpuTime::parse("cpu  1 2", &own(1)), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_says_all_of_it() {
        let now = Moment::now();
        assert!(now.load.is_some() && now.time.is_some(), "{now:?}");
        assert!(peak_resident().is_some_and(|bytes| bytes > 1 << 20));
    }
}
