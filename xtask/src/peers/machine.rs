//! Who else was using the machine meanwhile.
//!
//! Linux counts the time that its cores have worked, and that a process and its children have. The difference is other
//! processes' work. Where there is no such count, that is said and nothing is assumed.

use std::{
    fmt, fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use serde_json::{Value, json};

/// Cores of other processes' work during a measurement above which a machine is busy: half of that is what an idle
/// system does by itself.
const OTHERS: f64 = 0.2;

/// Load average before all above which a machine is busy, where nothing more exact is known.
const LOAD: f64 = 0.5;

/// What was seen of the machine.
#[derive(Clone, Debug, Default)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    /// Load averages over a minute, before and after.
    pub(super) load: [Option<f64>; 2],
    /// Cores of other processes' work, during the measurement in which that was most.
    pub(super) others: Option<f64>,
    /// Threads that were kept busy on purpose.
    pub(super) busy: usize,
}

impl Machine {
    /// Whether others were at work, as far as that can be known.
    pub(super) fn is_busy(&self) -> bool {
        let by_load = self.load[0].is_some_and(|load| load > LOAD);
        self.others.map_or(by_load, |others| others > OTHERS)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "cpu": self.cpu,
            "cores": self.cores,
            "load_before": self.load[0],
            "load_after": self.load[1],
            "others_cores": self.others,
            "busy_loops": self.busy,
            "busy": self.is_busy(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known =
            |number: Option<f64>| number.map_or("unknown".to_owned(), |n| format!("{n:.2}"));
        let [before, after] = self.load.map(known);
        write!(f, "{}, {} cores; load {before} before, {after} after; ", self.cpu, self.cores)?;
        write!(f, "other processes: at most {} cores", known(self.others))?;
        if self.busy > 0 {
            write!(f, "; beside busy loops: {}", self.busy)?;
        }
        if self.is_busy() {
            write!(
                f,
                "\nbusy machine: others were at work meanwhile, so even ratios are doubtful"
            )?;
        }
        Ok(())
    }
}

/// Watches the machine.
#[derive(Debug)]
pub(super) struct Watch {
    load: Option<f64>,
    others: Option<f64>,
}

impl Watch {
    /// To be started before anything is built.
    pub(super) fn start() -> Self {
        Self { load: load(), others: None }
    }

    /// Does `work`, and watches who else works.
    pub(super) fn during<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let first = Ticks::now();
        let result = work();
        let others = first.zip(Ticks::now()).and_then(|(first, last)| last.others_since(first));
        self.others = [self.others, others].into_iter().flatten().reduce(f64::max);
        result
    }

    /// What was seen, beside `busy` threads of our own.
    pub(super) fn stop(self, busy: usize) -> Machine {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let Self { load: before, others } = self;
        Machine { cpu: cpu(), cores, load: [before, load()], others, busy }
    }
}

/// Time in the kernel's units, since the machine's start.
#[derive(Clone, Copy, Debug)]
struct Ticks {
    /// Of all cores together.
    all: u64,
    /// In which they did nothing.
    idle: u64,
    /// Of this process and the children that have ended.
    own: u64,
    cores: u64,
}

impl Ticks {
    fn now() -> Option<Self> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        Self::of(&stat, &fs::read_to_string("/proc/self/stat").ok()?)
    }

    /// From the texts of `/proc/stat` and `/proc/self/stat`.
    fn of(stat: &str, own: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let times =
            line.split_whitespace().map(|n| n.parse().ok()).collect::<Option<Vec<u64>>>()?;
        // What guests take is in the time of their hosts already.
        let times = times.get(..8)?;
        let is_core = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
        // The name in parentheses may have spaces.
        let own: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let own = own.get(11..15)?.iter().map(|n| n.parse::<u64>().ok()).sum::<Option<u64>>()?;
        let cores = stat.lines().filter(is_core).count() as u64;
        Some(Self { all: times.iter().sum(), idle: times[3] + times[4], own, cores })
    }

    /// Cores of other processes' work since `first`, on average.
    fn others_since(self, first: Self) -> Option<f64> {
        let all = self.all.checked_sub(first.all).filter(|&all| all > 0)?;
        let worked = all.saturating_sub(self.idle.saturating_sub(first.idle));
        let others = worked.saturating_sub(self.own.saturating_sub(first.own));
        Some(others as f64 / all as f64 * self.cores as f64)
    }
}

fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}

/// Threads that keep cores busy; they stop when this is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    pub(super) fn start(threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spin = || {
            let stop = Arc::clone(&stop);
            thread::spawn(move || while !stop.load(Ordering::Relaxed) {})
        };
        let threads = (0..threads).map(|_| spin()).collect();
        Self { stop, threads }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two cores that have worked for `busy` and rested for `idle`, of which this process has worked `own`.
    fn ticks(busy: u64, idle: u64, own: u64) -> Ticks {
        let stat = format!("cpu  {busy} 0 0 {idle} 0 0 0 0 7 0\ncpu0 1 1\ncpu1 1 1\nintr 5\n");
        let half = own / 2;
        let process = format!("12 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 {half} 0 {} 0 20 0", own - half);
        Ticks::of(&stat, &process).unwrap()
    }

    #[test]
    fn what_is_not_ours_is_others() {
        let first = ticks(1000, 5000, 300);
        // 10 s of two cores, 1 tick being 10 ms: one and a half are at work, of which one is ours.
        let last = ticks(2500, 5500, 1300);
        assert_eq!(last.others_since(first), Some(0.5));
        assert_eq!(first.others_since(first), None);
        assert!(Ticks::of("cpu  1 2\n", "1 (x) S").is_none());
    }

    #[test]
    fn a_machine_is_busy_by_others_meanwhile_or_if_that_is_unknown_by_its_load_before() {
        let machine =
            |before, others| Machine { load: [before, Some(9.0)], others, ..Machine::default() };
        assert!(machine(Some(0.1), Some(0.5)).is_busy());
        assert!(!machine(Some(1.0), Some(0.02)).is_busy(), "that was ourselves");
        assert!(machine(Some(1.0), None).is_busy());
        assert!(!machine(Some(0.1), None).is_busy() && !machine(None, None).is_busy());
        assert!(machine(None, Some(0.5)).to_string().contains("busy machine"));
    }

    #[test]
    fn the_most_that_others_did_in_any_measurement_counts() {
        let mut watch = Watch { load: None, others: Some(1.5) };
        assert_eq!(watch.during(|| 7), 7);
        assert!(watch.stop(0).others.is_some_and(|others| others >= 1.5));
    }

    #[test]
    fn busy_threads_work_until_they_are_dropped() {
        let busy = Busy::start(2);
        assert_eq!(busy.threads.len(), 2);
        drop(busy);
    }
}
