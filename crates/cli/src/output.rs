//! Exit codes, stdout, stderr and progress.

use std::{
    fmt::Display,
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use apr_capture::Capture;
use apr_diff::Outcome;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; things compared match.
    Success,
    /// Things compared differ.
    Differs,
    /// Usage or I/O.
    Error,
    /// Nothing, or not everything asked for, was compared.
    Unmeasured,
}

impl Exit {
    /// What a verdict's own exit code stands for.
    pub(crate) fn of_verdict(code: u8) -> Self {
        match code {
            0 => Self::Success,
            1 => Self::Differs,
            _ => Self::Unmeasured,
        }
    }
}

impl From<&Outcome> for Exit {
    fn from(outcome: &Outcome) -> Self {
        Self::of_verdict(outcome.exit_code())
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Success => 0,
            Exit::Differs => 1,
            Exit::Error => 2,
            Exit::Unmeasured => 3,
        })
    }
}

/// Writes to stdout; a closed pipe is an error like any other, to be forgiven in `main`.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

/// Writes pretty JSON and a newline to stdout.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Whether signs on stdout may be coloured. Colour is never the only signal.
pub(crate) fn coloured() -> bool {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && !plain
}

/// Writes a file as a whole: what stands under its name is what was there before, or all of `content`.
pub(crate) fn write_whole(path: &Path, content: &str) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let cannot_write = || format!("cannot write {}", path.display());
    let written = fs::write(&partial, content).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // The error that led here is the one to tell.
        let _ = fs::remove_file(&partial);
    }
    written.with_context(cannot_write)
}

/// Lets Ctrl-C and a request to end remove `partial`, a file or a directory, and then end the process.
pub(crate) fn remove_if_interrupted(partial: PathBuf) -> Result<()> {
    let interrupted = move || {
        // What is not there needs no removing.
        let _ =
            if partial.is_dir() { fs::remove_dir_all(&partial) } else { fs::remove_file(&partial) };
        let _ = writeln!(io::stderr(), "\ninterrupted: nothing was written");
        process::exit(INTERRUPTED)
    };
    ctrlc::set_handler(interrupted).context("signals cannot be handled")
}

/// The exit code of a process that Ctrl-C has ended, as shells have it.
const INTERRUPTED: i32 = 130;

/// Whether a file could be written at `path`, asked before the work that fills it.
pub(crate) fn may_write(path: &Path) -> Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    ensure!(
        directory.is_dir(),
        "cannot write {}: there is no directory {}; make it first",
        path.display(),
        directory.display()
    );
    ensure!(!path.is_dir(), "cannot write {}: it is a directory", path.display());
    Ok(())
}

/// Makes `directory`, unless it is there and empty.
pub(crate) fn fresh_directory(directory: &Path) -> Result<()> {
    let cannot_write = || format!("{} is no directory to write to", directory.display());
    fs::create_dir_all(directory).with_context(cannot_write)?;
    let free = fs::read_dir(directory).with_context(cannot_write)?.next().is_none();
    ensure!(free, "{} is not empty; give another directory", directory.display());
    Ok(())
}

/// Writes a line to stderr. If nobody reads it there is nobody to tell.
pub(crate) fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Says what of a foreign capture was not understood, and so not looked at.
pub(crate) fn tell_unknown(capture: &Capture) {
    const NAMED: usize = 3;
    let unknown = capture.unknown();
    if unknown.is_empty() {
        return;
    }
    let more = match unknown.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    tell(format_args!(
        "note: not everything in {} was understood: {}{more}; --map says what another program calls the stages",
        capture.path().display(),
        unknown[..unknown.len().min(NAMED)].join("; ")
    ));
}

/// `error` and its causes on one line. Some errors name their cause themselves: it is said once.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain() {
        // Parsers draw snippets over several lines.
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if said.is_empty() {
            said = text;
        } else if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
    }
    said
}

/// Whether the reader of our output went away, as `head` does.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Work shorter than this shows no progress.
const SHORT: Duration = Duration::from_secs(1);

/// Progress on stderr with an estimate of the time left, of work that turns out to be long.
#[derive(Clone, Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(length: u64, what: &'static str) -> Self {
        Self::styled(length, what, "{msg} [{wide_bar}] {pos}/{len}, {eta} left")
    }

    /// The same, counting bytes.
    pub(crate) fn of_bytes(length: u64, what: &'static str) -> Self {
        Self::styled(
            length,
            what,
            "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes}, {eta} left",
        )
    }

    fn styled(length: u64, what: &'static str, template: &str) -> Self {
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::hidden());
        Self(bar.with_style(style).with_message(what))
    }

    /// One more done. Where stderr is no terminal, nothing is ever drawn.
    pub(crate) fn advance(&self) {
        if self.0.is_hidden() && self.0.elapsed() > SHORT {
            self.0.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.0.inc(1);
    }

    /// The same for units of which many are done at once.
    pub(crate) fn advance_by(&self, units: u64) {
        self.advance();
        self.0.inc(units.saturating_sub(1));
    }

    /// `done` of `total` are done.
    pub(crate) fn set(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position((done as u64).saturating_sub(1));
        self.advance();
    }

    /// What is being done now.
    pub(crate) fn say(&self, what: &'static str) {
        self.0.set_message(what);
    }

    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn an_error_is_one_line_that_says_every_cause_once() {
        let nested = Err::<(), _>(anyhow!("no such file")).context("a.gguf: no such file");
        assert_eq!(one_line(&nested.unwrap_err()), "a.gguf: no such file");
        let chain = Err::<(), _>(anyhow!("line 1\n  |\n1 | = x")).context("bad map");
        assert_eq!(one_line(&chain.unwrap_err()), "bad map: line 1 | 1 | = x");
    }
}
