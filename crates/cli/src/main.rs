//! `apr`: run a model and see every number of its forward pass.
//!
//! Data goes to stdout, progress and notes to stderr. Exit codes: 0 success or match, 1 the things compared differ,
//! 2 usage or I/O error, 3 nothing (or not everything asked for) was compared. Each command is a module.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is the crate that prints")]

mod args;
mod demo;
mod diff;
mod engine;
mod inspect;
mod output;
mod prompt;
mod run;
mod selection;
mod trace;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use output::Exit;

/// Run large language models and see every number of the forward pass, in the run that produces the text.
#[derive(Debug, Parser)]
#[command(name = "apr", version, max_term_width = 100, arg_required_else_help = true)]
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
    /// Show what a model file holds.
    Inspect(inspect::Args),
    /// Trace the embedded model and compare it with the Hugging Face capture that ships beside it.
    Demo(demo::Args),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    #[command(hide = true)]
    Man,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Diff(args) => diff::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "apr", &mut std::io::stdout());
            Ok(Exit::Success)
        }
        Command::Man => man(),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("apr: {error:#}");
            Exit::Error.into()
        }
    }
}

fn man() -> anyhow::Result<Exit> {
    clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?;
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
