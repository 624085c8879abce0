//! How fast a model runs, and how near that is to the machine's limits.

use std::fmt::Write;

use serde::Serialize;

use crate::table::{bytes, lines, number, plural, table};

mod compare;
mod observers;

pub use compare::{Comparison, Pair, Unpaired};
pub use observers::ObserverLine;

/// The report of `apr bench`.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct BenchReport {
    /// `apr-bench/1`.
    pub schema: &'static str,
    pub model: String,
    pub container: String,
    pub architecture: &'static str,
    pub backend: &'static str,
    /// What activations are rounded to before they meet quantised weights: `native` or `f32`.
    pub activations: &'static str,
    /// The type of cached keys and values.
    pub kv: &'static str,
    /// Prompt tokens per step.
    pub chunk: usize,
    pub repetitions: usize,
    /// The fingerprint of the plan that ran.
    pub plan: String,
    pub machine: Machine,
    pub load: Load,
    pub memory: Memory,
    /// `None` if the machine was not probed.
    pub peaks: Option<Peaks>,
    pub results: Vec<ResultLine>,
    /// `None` if it was not asked what looking costs.
    pub observers: Option<Vec<ObserverLine>>,
    /// `None` if there was nothing to compare with.
    pub comparison: Option<Comparison>,
}

/// Where it ran, and what else ran there.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The CPU's own name; `None` where the system does not tell.
    pub cpu: Option<String>,
    /// Threads that it runs at once.
    pub cores: usize,
    /// The instruction set in use.
    pub isa: &'static str,
    /// Processes that wanted to run, averaged over the last minute, before; `None` where the system does not tell.
    pub load_before: Option<f64>,
    /// The same after.
    pub load_after: Option<f64>,
    /// Cores that other processes kept busy meanwhile; `None` where the system does not tell.
    pub others_cores: Option<f64>,
    /// Whether that was enough to disturb the figures.
    pub busy: Option<bool>,
}

/// What happens before the first token of a short prompt, in seconds. Whether the file was in memory already is the system's
/// affair.
#[derive(Clone, Debug, Serialize)]
pub struct Load {
    /// Mapping the file and reading what it says of itself.
    pub open_seconds: f64,
    /// Building the tokenizer; `None` if the model has none that is usable.
    pub tokenizer_seconds: Option<f64>,
    /// Bringing the weights to the backend.
    pub weights_seconds: f64,
    /// Reading the prompt and choosing a token.
    pub first_token_seconds: f64,
    /// All of these together.
    pub start_to_first_token_seconds: f64,
    /// The length of that prompt.
    pub prompt_tokens: usize,
    /// Threads that it ran on.
    pub threads: usize,
}

/// What is kept in memory, and on disk.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// The most that was resident, pages of the mapped file included; `None` where the system does not tell.
    pub peak_resident_bytes: Option<u64>,
    /// All files of the model.
    pub file_bytes: u64,
    /// The tensors in them.
    pub tensor_bytes: u64,
    /// The cache, for as many positions as the longest run has.
    pub cache_bytes: u64,
    /// That number.
    pub cache_positions: usize,
}

/// The machine's limits.
#[derive(Clone, Debug, Serialize)]
pub struct Peaks {
    /// The instruction set that they were measured in.
    pub isa: &'static str,
    /// One entry per number of threads.
    pub by_threads: Vec<PeaksLine>,
}

/// What a number of threads can do at most.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PeaksLine {
    /// Threads that worked at once.
    pub threads: usize,
    /// The fastest that the weights were read between repetitions.
    pub read_bytes_per_second: f64,
    /// Products and sums of 8-bit integers, each counted.
    pub int8_ops_per_second: f64,
    /// The same of 32-bit floats.
    pub f32_ops_per_second: f64,
}

/// One length at one depth on so many threads.
#[derive(Clone, Debug, Serialize)]
pub struct ResultLine {
    /// `prefill` or `decode`.
    pub kind: &'static str,
    /// Tokens read or generated.
    pub tokens: usize,
    /// Positions that the cache held before.
    pub depth: usize,
    /// Threads, the caller's included.
    pub threads: usize,
    /// Tokens per second of each repetition, in order.
    pub samples: Vec<f64>,
    /// The median of them.
    pub median: f64,
    /// The slowest.
    pub min: f64,
    /// The fastest.
    pub max: f64,
    /// What one repetition has to do.
    pub work: Work,
    /// Bytes that must be read, per second of the median repetition.
    pub read_bytes_per_second: f64,
    /// Operations on integers.
    pub int8_ops_per_second: f64,
    /// Operations on floats.
    pub float_ops_per_second: f64,
    /// Bytes per second that the same weights could be read at before the first repetition and after each; `None` if the machine was not probed.
    pub read_peaks: Option<Vec<f64>>,
    /// The time that reading takes at the mean of the two around a repetition, as a share of the time that it took: the median; `None` if the machine
    /// was not probed.
    pub read_share: Option<f64>,
    /// The same of operations, those on integers and floats one after the other.
    pub compute_share: Option<f64>,
}

/// What one repetition has to do at least, over all its steps.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Work {
    /// Steps that it is made of.
    pub steps: usize,
    /// Of weights, as the file stores them.
    pub weight_bytes: u64,
    /// Of cached keys and values.
    pub kv_bytes: u64,
    /// Products and sums of integers, each counted.
    pub int8_ops: u64,
    /// The same of floats.
    pub float_ops: u64,
}

impl BenchReport {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut out =
            format!("model    {} ({}, {})\n", self.model, self.container, self.architecture);
        let arithmetic = format!("activations {}, kv {}", self.activations, self.kv);
        let _ = writeln!(out, "backend  {} ({}, {arithmetic})", self.backend, self.machine.isa);
        out += &self.machine.text();
        let repetitions = plural(self.repetitions, "repetition");
        let _ = writeln!(out, "runs     {repetitions}, chunks of {}\n", self.chunk);
        out += &self.results();
        if let Some(peaks) = &self.peaks {
            out += &peaks.text();
        }
        out += &self.load.text();
        out += &self.memory.text();
        if let Some(observers) = &self.observers {
            out += &observers::text(observers);
        }
        if let Some(comparison) = &self.comparison {
            out += &comparison.text();
        }
        out
    }

    fn results(&self) -> String {
        let header = [
            "", "tokens", "depth", "threads", "tokens/s", "min", "max", "GB/s", "of peak", "Gop/s",
            "of peak",
        ];
        let mut t = table(&header);
        for line in &self.results {
            t.add_row([
                line.kind.to_owned(),
                line.tokens.to_string(),
                line.depth.to_string(),
                line.threads.to_string(),
                rate(line.median),
                rate(line.min),
                rate(line.max),
                giga(line.read_bytes_per_second),
                share(line.read_share),
                giga(line.int8_ops_per_second + line.float_ops_per_second),
                share(line.compute_share),
            ]);
        }
        lines(&t)
    }
}

impl Machine {
    fn text(&self) -> String {
        let cpu = self.cpu.as_deref().unwrap_or("CPU unknown");
        let mut out = format!("machine  {cpu}, {}", plural(self.cores, "core"));
        if let (Some(before), Some(after)) = (self.load_before, self.load_after) {
            let _ = write!(out, ", load {before:.2} before, {after:.2} after");
        }
        out += "\n";
        if self.busy == Some(true) {
            let others = self.others_cores.unwrap_or(f64::NAN);
            let _ = writeln!(
                out,
                "BUSY     other processes kept {others:.2} cores busy meanwhile: the figures are too low, and vary"
            );
        }
        out
    }
}

impl Load {
    fn text(&self) -> String {
        let tokenizer = match self.tokenizer_seconds {
            Some(seconds) => format!("tokenizer {}", time(seconds)),
            None => "no tokenizer".to_owned(),
        };
        format!(
            "\nload     file {}, {tokenizer}, weights {}\nfirst    {} from start to first token, of which {} for {} on {}\n",
            time(self.open_seconds),
            time(self.weights_seconds),
            time(self.start_to_first_token_seconds),
            time(self.first_token_seconds),
            plural(self.prompt_tokens, "prompt token"),
            plural(self.threads, "thread"),
        )
    }
}

impl Memory {
    fn text(&self) -> String {
        let peak = match self.peak_resident_bytes {
            Some(peak) => format!("at most {} resident", bytes(peak)),
            None => "resident memory unknown (this system does not tell)".to_owned(),
        };
        let (file, cache) = (bytes(self.file_bytes), bytes(self.cache_bytes));
        format!(
            "memory   {peak}; file {file}; cache {cache} for {} positions\n",
            self.cache_positions
        )
    }
}

impl Peaks {
    /// Those of so many threads.
    pub fn of(&self, threads: usize) -> Option<&PeaksLine> {
        self.by_threads.iter().find(|peaks| peaks.threads == threads)
    }

    fn text(&self) -> String {
        let mut t = table(&["peaks", "threads", "read GB/s", "int8 Gop/s", "f32 Gop/s"]);
        for peak in &self.by_threads {
            t.add_row([
                self.isa.to_owned(),
                peak.threads.to_string(),
                giga(peak.read_bytes_per_second),
                giga(peak.int8_ops_per_second),
                giga(peak.f32_ops_per_second),
            ]);
        }
        format!("\n{}", lines(&t))
    }
}

/// Tokens per second.
fn rate(x: f64) -> String {
    if x < 100.0 { format!("{x:.2}") } else { format!("{x:.0}") }
}

fn giga(x: f64) -> String {
    number(x / 1e9)
}

fn share(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), |x| format!("{:.0} %", 100.0 * x))
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", 1e3 * seconds) } else { format!("{seconds:.2} s") }
}
