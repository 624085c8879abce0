//! `apr`: run a model and see every number of its forward pass.
//!
//! Data goes to stdout, progress and notes to stderr. Exit codes: 0 success or match, 1 the things compared differ,
//! 2 usage or I/O error, 3 nothing (or not everything asked for) was compared. Each command is a module.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is the crate that prints")]

mod args;
mod audit;
mod bench;
mod bisect;
mod check;
mod convert;
mod demo;
mod diff;
mod embedded;
mod engine;
mod faultbench;
mod inspect;
mod logits;
mod output;
mod prompt;
mod pull;
mod run;
mod selection;
mod trace;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

use output::Exit;

const EXIT_CODES: &str =
    "Exit codes: 0 success or match, 1 differs, 2 error, 3 nothing (or not everything) compared.";

/// Run large language models and see every number of the forward pass, in the run that produces the text.
#[derive(Debug, Parser)]
#[command(name = "apr", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text, streamed.
    Run(run::Args),
    /// Show or save the values of the forward pass.
    Trace(trace::Args),
    /// Compare two captures, two APRT files or two model files.
    Diff(diff::Args),
    /// Check what must hold of a model and its backend without any reference.
    Check(check::Args),
    /// Judge each stage of a capture by itself, with the model file.
    Audit(audit::Args),
    /// Find the first wrong stage, tensor, key or token, and say why.
    Bisect(bisect::Args),
    /// Measure how fast a model runs, and how near that is to this machine's limits.
    Bench(bench::Args),
    /// Plant faults in real runs and score who finds them.
    Faultbench(faultbench::Args),
    /// Show what a model file holds.
    Inspect(inspect::Args),
    /// Write a model in another container or in other types.
    Convert(convert::Args),
    /// Fetch a model from the Hugging Face hub, and print its path.
    Pull(pull::Args),
    /// Tour on the embedded model: write, trace, compare with Hugging Face, audit, and find a planted bug.
    Demo(demo::Args),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print a manual page, for `man -l -`.
    Man {
        /// The command that it is of, e.g. `trace` [default: apr itself].
        command: Option<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Diff(args) => diff::run(args),
        Command::Check(args) => check::run(args),
        Command::Audit(args) => audit::run(args),
        Command::Bisect(args) => bisect::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Faultbench(args) => faultbench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Completions { shell } => completions(shell),
        Command::Man { command } => man(command.as_deref()),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::tell(format_args!("error: {}", output::one_line(&error)));
            Exit::Error.into()
        }
    }
}

fn completions(shell: clap_complete::Shell) -> Result<Exit> {
    // Into memory first: the generator panics on a pipe that nobody reads.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "apr", &mut script);
    output::print(&String::from_utf8(script)?)?;
    Ok(Exit::Success)
}

fn man(command: Option<&str>) -> Result<Exit> {
    let mut cli = Cli::command();
    // Gives subcommands their full names.
    cli.build();
    let page = match command {
        None => cli,
        Some(name) => {
            let known: Vec<_> = cli.get_subcommands().map(clap::Command::get_name).collect();
            let known = known.join(", ");
            let found = cli.find_subcommand(name).cloned();
            found.with_context(|| format!("no command `{name}`; there are: {known}"))?
        }
    };
    clap_mangen::Man::new(page).render(&mut std::io::stdout())?;
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_definition_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
