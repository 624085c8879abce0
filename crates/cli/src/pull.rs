//! `apr pull`: a model from the Hugging Face hub, into the cache that other tools share.
//!
//! Stdout gets one path, that of what the other commands open; all else goes to stderr. An interrupt needs no handling:
//! what came is in the cache, and the next pull goes on from there.

mod environment;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, bail, ensure};
use apr_hub::{
    Cache, Candidate, Error, Event, Hub, Listing, ModelName, Options, PulledFile, RemoteFile,
    Revision, Selection, Want, choose,
};
use apr_report::bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::output::{self, Exit};
use environment::Environment;

/// Before the first new attempt; then twice as long each time.
const BACKOFF: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// The model as the hub names it; with a label, that one of its GGUF files (such as Q4_K_M).
    #[arg(value_name = "ORG/NAME[:LABEL]")]
    model: String,
    /// A branch, a tag or a commit.
    #[arg(long, value_name = "REVISION", default_value_t)]
    revision: Revision,
    /// Files to pull, instead of those that a model needs; `*` and `?` match. May be given several times.
    #[arg(long = "file", value_name = "PATTERN")]
    files: Vec<String>,
    /// Say what would be pulled, with sizes, and pull nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also read and sum what is in the cache already, and fetch again what is damaged.
    #[arg(long)]
    verify: bool,
    /// Ask no network: find the model in the cache, or fail.
    #[arg(long)]
    offline: bool,
    /// The cache [default: that of the other tools; see below].
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// How often in a row to try again what may pass, such as a cut connection.
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// Print JSON instead of the path.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Prints the path of the model, for the other commands: apr run \"$(apr pull ORG/NAME)\" -p TEXT

Environment, as huggingface_hub has it: HF_TOKEN or the file that `hf auth login` writes; HF_HUB_CACHE, or \
HF_HOME [default: ~/.cache/huggingface]; HF_ENDPOINT for a mirror; HF_HUB_OFFLINE; HTTPS_PROXY.";

pub(crate) fn run(args: Args) -> Result<Exit> {
    let environment = Environment::read(|name| std::env::var_os(name), std::env::home_dir())?;
    let (model, label) = ModelName::with_label(&args.model)?;
    if label.is_some() && !args.files.is_empty() {
        bail!("a label and --file both choose files: give one of them");
    }
    let want = match &label {
        Some(label) => Want::Label(label),
        None if !args.files.is_empty() => Want::Files(&args.files),
        None => Want::Model,
    };
    let cache = Cache::new(args.cache_dir.clone().unwrap_or(environment.cache));
    if args.offline || environment.offline {
        ensure!(!args.verify, "--verify fetches again what is damaged; without the hub it cannot");
        let listing = cache.list(&model, &args.revision)?;
        let selection = chosen(&listing, want)?;
        return report(&args, &cache, &listing, &selection, None);
    }
    let hub = Hub::new(Options {
        endpoint: environment.endpoint,
        token: environment.token,
        cache,
        retries: args.retries,
        backoff: BACKOFF,
    })?;
    let listing = hub.list(&model, &args.revision)?;
    let selection = chosen(&listing, want)?;
    if args.dry_run {
        return report(&args, hub.cache(), &listing, &selection, None);
    }
    note_parts(&selection);
    let mut progress = Progress::new();
    let pulled =
        hub.pull(&listing, &selection.files, args.verify, &mut |event| progress.show(event));
    progress.end();
    report(&args, hub.cache(), &listing, &selection, Some(pulled?.files))
}

/// What was asked for; where it has to be chosen, says first what there is.
fn chosen(listing: &Listing, want: Want<'_>) -> Result<Selection> {
    let selection = choose(listing, want);
    if let Err(Error::Choose { candidates, .. } | Error::NoCandidate { candidates, .. }) =
        &selection
    {
        tell_candidates(candidates);
    }
    Ok(selection?)
}

fn tell_candidates(candidates: &[Candidate]) {
    let width = candidates.iter().map(|c| c.label.len()).max().unwrap_or(0);
    for Candidate { label, files, bytes: size, .. } in candidates {
        let names = match &files[..] {
            [] => "",
            [first, ..] => &first.path,
        };
        let more = match files.len() {
            0 | 1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        output::tell(format_args!("{label:width$}  {:>10}  {names}{more}", bytes(*size)));
    }
}

/// Says, before gigabytes are fetched, what has to be done with them.
fn note_parts(selection: &Selection) {
    if selection.entry.is_some() && selection.files.iter().filter(|f| is_gguf(f)).count() > 1 {
        output::tell(
            "note: this model is in several parts; `llama-gguf-split --merge` makes them the one file that apr reads",
        );
    }
}

fn is_gguf(file: &RemoteFile) -> bool {
    file.path.to_ascii_lowercase().ends_with(".gguf")
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    schema: &'static str,
    model: &'a str,
    revision: &'a str,
    commit: &'a str,
    /// What the other commands open.
    path: PathBuf,
    dry_run: bool,
    fetched_bytes: u64,
    files: Vec<FileLine<'a>>,
}

#[derive(Serialize)]
struct FileLine<'a> {
    path: &'a str,
    bytes: u64,
    checksum: Option<&'a str>,
    cached: bool,
    resumed: u64,
}

impl<'a> FileLine<'a> {
    fn of(PulledFile { file, cached, resumed }: &'a PulledFile) -> Self {
        let RemoteFile { path, size, checksum } = file;
        let checksum = checksum.as_ref().map(apr_hub::Checksum::as_str);
        Self { path, bytes: *size, checksum, cached: *cached, resumed: *resumed }
    }
}

/// Prints what there is now, or would be: `pulled` is none if nothing was fetched.
fn report(
    args: &Args,
    cache: &Cache,
    listing: &Listing,
    selection: &Selection,
    pulled: Option<Vec<PulledFile>>,
) -> Result<Exit> {
    let directory = cache.snapshot(&listing.model, &listing.commit);
    let path = match &selection.entry {
        Some(file) => directory.join(file),
        None => directory,
    };
    let files = pulled.unwrap_or_else(|| {
        let as_is = |file: &RemoteFile| PulledFile {
            file: file.clone(),
            cached: cache.has(listing, file),
            resumed: 0,
        };
        selection.files.iter().map(as_is).collect()
    });
    let fetched = files.iter().filter(|f| !f.cached).map(|f| f.file.size - f.resumed).sum();
    if args.json {
        let files = files.iter().map(FileLine::of).collect();
        output::print_json(&Report {
            schema: "apr-pull/1",
            model: listing.model.as_str(),
            revision: listing.revision.as_str(),
            commit: &listing.commit,
            path,
            dry_run: args.dry_run,
            fetched_bytes: fetched,
            files,
        })?;
    } else if args.dry_run {
        let width = files.iter().map(|f| f.file.path.len()).max().unwrap_or(0);
        let mut text = String::new();
        for PulledFile { file, cached, .. } in &files {
            let there = if *cached { "  in the cache" } else { "" };
            text += &format!("{:width$}  {:>10}{there}\n", file.path, bytes(file.size));
        }
        output::print(&format!("{text}{} to fetch into {}\n", bytes(fetched), path.display()))?;
    } else {
        output::print(&format!("{}\n", path.display()))?;
    }
    Ok(Exit::Success)
}

/// One bar over all files on a terminal; elsewhere, and above it, a line for each that is done.
struct Progress {
    bar: ProgressBar,
    /// The files to be fetched, and those begun.
    files: usize,
    begun: usize,
    /// The bytes of files that are done.
    done: u64,
}

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        bar.set_style(style);
        Self { bar, files: 0, begun: 0, done: 0 }
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Planned { files, bytes } => {
                self.files = files;
                self.bar.set_length(bytes);
            }
            Event::Started { file, resumed } => {
                self.begun += 1;
                let name = file.path.rsplit('/').next().unwrap_or(&file.path);
                self.bar.set_message(format!("{}/{} {name}", self.begun, self.files));
                self.bar.set_position(self.done + resumed);
                // What was there before says nothing of the speed.
                self.bar.reset_eta();
                if resumed > 0 {
                    self.say(format_args!("{}: going on after {}", file.path, bytes(resumed)));
                }
            }
            Event::Received(n) => self.bar.set_position(self.done + n),
            Event::Finished(file) => {
                self.done += file.size;
                self.say(format_args!("{} ({})", file.path, bytes(file.size)));
            }
            Event::Retrying { error, wait } => {
                self.say(format_args!("{error}; trying again in {} s", wait.as_secs()));
            }
            Event::Damaged { file, kept } => {
                let kept = kept.display();
                self.say(format_args!("{} is damaged in the cache; moved to {kept}", file.path));
            }
            Event::Waiting(file) => {
                self.say(format_args!("{}: another program is fetching it; waiting", file.path));
            }
            _ => {}
        }
    }

    fn say(&self, line: impl std::fmt::Display) {
        self.bar.suspend(|| output::tell(line));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
