//! Project chores: `cargo xtask ci | tidy | golden`.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};

mod tidy;

const USAGE: &str = "usage: cargo xtask COMMAND

  ci      everything that CI checks: fmt, clippy, tidy, tests, dependencies
  tidy    the house rules that no compiler checks
  golden  make the fixtures and golden captures anew (needs Python, see fixtures/README.md)
";

fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    let result = match command.as_deref() {
        Some("ci") => ci(),
        Some("tidy") => tidy::check(&root()),
        Some("golden") => golden(),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
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
