//! Project chores: `cargo xtask ci | tidy | emulate | golden | synth | peers`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::Parser;

mod emulate;
mod peers;
mod tidy;

/// Project chores.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
enum Chore {
    /// Everything that CI checks: fmt, clippy, tidy, tests, dependencies.
    Ci,
    /// The house rules that no compiler checks.
    Tidy,
    /// Test the NEON kernels on an emulated machine.
    Emulate(emulate::Args),
    /// Make the fixtures and golden captures anew (needs Python, see fixtures/README.md).
    Golden,
    /// Write a model file of random weights in the shape of a real model.
    #[command(disable_help_flag = true)]
    Synth {
        /// What `synth` takes, see `cargo xtask synth --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Measure this engine and others side by side.
    Peers(peers::Args),
}

fn main() -> ExitCode {
    let result = match Chore::parse() {
        Chore::Ci => ci(),
        Chore::Tidy => tidy::check(&root()),
        Chore::Emulate(args) => emulate::run(&args),
        Chore::Golden => golden(),
        Chore::Peers(args) => peers::run(args),
        Chore::Synth { args } => return synth(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn synth(args: &[OsString]) -> ExitCode {
    match synth_command().args(args).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        // It has said what is wrong.
        Ok(status) => ExitCode::from(status.code().map_or(1, |code| code as u8)),
        Err(error) => {
            eprintln!("xtask: cargo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A program of its own: it needs the workspace's crates, and the other chores must do without.
fn synth_command() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--quiet", "--package", "apr-synth", "--manifest-path"]);
    cargo.arg(root().join("Cargo.toml")).arg("--");
    cargo
}

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root").to_path_buf()
}

fn ci() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])?;
    tidy::check(&root())?;
    if succeeds(Command::new("cargo").args(["deny", "--version"])) {
        cargo(&["deny", "check", "bans", "licenses", "sources"])?;
    } else {
        eprintln!("xtask: skipped `cargo deny`: not installed (cargo install cargo-deny)");
    }
    // The README's own test command.
    cargo(&["test", "--workspace"])?;
    // Planted faults: all of them found, and no control blamed.
    cargo(&["run", "--quiet", "--package", "apr-cli", "--", "faultbench", "--quick"])
}

fn golden() -> Result<()> {
    run(Command::new("python3").arg("fixtures/make.py"))
}

fn cargo(args: &[&str]) -> Result<()> {
    run(Command::new("cargo").args(args))
}

fn run(command: &mut Command) -> Result<()> {
    eprintln!("xtask: {command:?}");
    let status = command.current_dir(root()).status().with_context(|| format!("{command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}
