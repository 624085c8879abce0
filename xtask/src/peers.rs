//! `cargo xtask peers`: this engine and others beside each other, on the same files, threads and lengths, in turn.
//!
//! Machines differ and are shared, so only what was measured in the same minutes is compared: each round asks every engine
//! once, A B C, A B C, and what is shown is the median over rounds. [`machine`] watches who else was running.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

mod apr;
mod build;
mod candle;
mod frink;
mod llama_cpp;
mod machine;
mod measurement;
mod record;
mod table;

use build::Workshop;
use machine::{Busy, Watch};
use measurement::{Lengths, Measurement, Setting};
use record::{Failure, Record};

const EXAMPLES: &str = "\
Examples:
  cargo xtask peers                                               models of its own in target/peers/models
  cargo xtask peers --models model.gguf --threads 1,2 --rounds 7 --json peers.json
  cargo xtask peers --models model.gguf --peers apr,llama.cpp --llama-bench ~/llama.cpp/build/bin/llama-bench
  cargo xtask peers --models model.gguf --busy 2                  beside two processes that never rest";

/// Measure this engine and others side by side.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// GGUF files [default: Qwen2.5-0.5B of random weights in Q4_K_M and Q8_0, made if need be].
    #[arg(long, num_args = 1.., value_name = "FILE")]
    models: Vec<PathBuf>,
    /// Threads of each engine [default: all cores].
    #[arg(long, value_delimiter = ',', value_name = "N,...", value_parser = at_least_one)]
    threads: Vec<usize>,
    /// Tokens of the prompt that is read; 0 for none.
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt: usize,
    /// Tokens that are generated; 0 for none.
    #[arg(long, default_value_t = 64, value_name = "N")]
    generate: usize,
    /// Positions before the tokens that are generated once more; 0 for no such measurement.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    depth: usize,
    /// How often each engine has its turn.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = at_least_one)]
    rounds: usize,
    /// The engines.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", default_values_t = Name::ALL)]
    peers: Vec<Name>,
    /// This llama-bench, instead of building one.
    #[arg(long, value_name = "PATH")]
    llama_bench: Option<PathBuf>,
    /// This apr, instead of building one.
    #[arg(long, value_name = "PATH")]
    apr: Option<PathBuf>,
    /// Threads that do nothing but keep the machine busy meanwhile.
    #[arg(long, default_value_t = 0, value_name = "N")]
    busy: usize,
    /// Where to write all samples as JSON.
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
}

/// The engines that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Apr,
    #[value(name = "llama.cpp")]
    LlamaCpp,
    Candle,
    Frink,
}

impl Name {
    const ALL: [Self; 4] = [Self::Apr, Self::LlamaCpp, Self::Candle, Self::Frink];
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// An engine that is ready to run.
trait Peer {
    /// Its version, as it says itself.
    fn version(&self) -> &str;

    /// Measures once what `setting` asks for; what the engine cannot measure is left out.
    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>>;
}

pub(crate) fn run(args: Args) -> Result<()> {
    let mut watch = Watch::start();
    let workshop = Workshop::new()?;
    let models = match &args.models[..] {
        [] => workshop.models()?,
        models => models.to_vec(),
    };
    if let Some(missing) = models.iter().find(|model| !model.is_file()) {
        bail!("{}: there is no such file", missing.display());
    }
    let settings = args.settings(&models)?;
    if let Some(path) = &args.json {
        // Asked before the hours, not after.
        std::fs::write(path, "").with_context(|| path.display().to_string())?;
    }
    let mut record = Record::default();
    let mut peers = Vec::new();
    for &name in &args.peers {
        match args.ready(name, &workshop) {
            Ok(peer) => {
                record.peers.push((name.to_string(), peer.version().to_owned()));
                peers.push((name, peer));
            }
            Err(error) => record.fail(Failure::whole(name.to_string(), format!("{error:#}"))),
        }
    }
    let busy = Busy::start(args.busy);
    for round in 1..=args.rounds {
        for setting in &settings {
            for (name, peer) in &peers {
                let name = name.to_string();
                if record.has_failed(&name, setting) {
                    continue;
                }
                eprintln!("xtask: round {round} of {}, {name}: {setting}", args.rounds);
                match watch.during(|| peer.measure(setting)) {
                    Ok(measured) => record.add(&name, setting, measured),
                    Err(error) => record.fail(Failure::of(name, setting, format!("{error:#}"))),
                }
            }
        }
    }
    drop(busy);
    record.machine = watch.stop(args.busy);
    print!("{}", table::text(&record));
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{:#}\n", record.json()))
            .with_context(|| path.display().to_string())?;
    }
    if record.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

impl Args {
    /// All that each engine measures in a round.
    fn settings(&self, models: &[PathBuf]) -> Result<Vec<Setting>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.threads.is_empty() { &[cores][..] } else { &self.threads };
        let shallow = Lengths { prompt: self.prompt, generate: self.generate, depth: 0 };
        let deep = Lengths { prompt: 0, generate: self.generate, depth: self.depth };
        let lengths = [shallow, deep].into_iter().filter(|lengths| {
            lengths.prompt + lengths.generate > 0 && (lengths.depth > 0 || *lengths == shallow)
        });
        let lengths: Vec<_> = lengths.collect();
        if lengths.is_empty() {
            bail!("--prompt 0 and --generate 0 leave nothing to measure");
        }
        let mut settings = Vec::new();
        for model in models {
            for &threads in threads {
                settings.extend(lengths.iter().map(|&lengths| Setting {
                    model: model.clone(),
                    threads,
                    lengths,
                }));
            }
        }
        Ok(settings)
    }

    /// The engine, built if it is not there yet.
    fn ready(&self, name: Name, workshop: &Workshop) -> Result<Box<dyn Peer>> {
        Ok(match name {
            Name::Apr => Box::new(apr::Apr::ready(workshop, self.apr.as_deref())?),
            Name::LlamaCpp => {
                Box::new(llama_cpp::LlamaCpp::ready(workshop, self.llama_bench.as_deref())?)
            }
            Name::Candle => Box::new(candle::Candle::ready(workshop)?),
            Name::Frink => Box::new(frink::Frink::ready(workshop)?),
        })
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Line::try_parse_from([&["peers"], words].concat()).unwrap_or_else(|e| panic!("{e}")).args
    }

    #[test]
    fn every_engine_measures_the_same_and_depth_is_measured_without_a_prompt() {
        let models = ["a.gguf".into(), "b.gguf".into()];
        let settings = args(&["--threads", "1,2"]).settings(&models).unwrap();
        assert_eq!(settings.len(), 2 * 2 * 2);
        assert_eq!(settings[0].lengths, Lengths { prompt: 512, generate: 64, depth: 0 });
        assert_eq!(settings[1].lengths, Lengths { prompt: 0, generate: 64, depth: 2048 });
        let shallow = args(&["--threads", "1", "--depth", "0"]).settings(&models).unwrap();
        assert_eq!(shallow.len(), 2);
        assert!(args(&["--prompt", "0", "--generate", "0"]).settings(&models).is_err());
    }

    #[test]
    fn engines_go_by_their_names() {
        assert_eq!(args(&[]).peers, Name::ALL);
        assert_eq!(args(&["--peers", "apr,llama.cpp"]).peers, [Name::Apr, Name::LlamaCpp]);
        assert!(Line::try_parse_from(["peers", "--peers", "ollama"]).is_err());
        assert!(Line::try_parse_from(["peers", "--rounds", "0"]).is_err());
    }
}
