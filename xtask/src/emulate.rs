//! `cargo xtask emulate`: the tests of the cpu backend on an AArch64 machine that QEMU emulates.
//!
//! The toolchain needs a standard library for that machine, or its source and the right to build it. Debian has the source for
//! its own toolchain, which is looked for where Debian puts it.

use std::{
    env,
    ffi::OsString,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Where `cargo` and `rustc` lie, unless [`BIN`] says.
const DEBIAN_BIN: &str = "/usr/bin";
const BIN: &str = "APR_EMULATE_BIN";

/// The variables by which cargo is told, and what it is told unless they are set. The machine is the one that has most.
const LINKER: (&str, &str) =
    ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
const RUNNER: (&str, &str) = (
    "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
    "qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu",
);

/// What is tested there: a test of the crate fails if the machine lacks one of these, and it has to have run.
const ISAS: (&str, &str) = ("APR_TESTED_ISAS", "neon,neondot");
const WITNESS: &str = "test isa::tests::the_sets_that_are_to_be_tested_are_there ... ok";

const INSTALL: &str = "on Debian: apt-get install --no-install-recommends \
    rustc-web cargo-web rust-web-src gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user";

/// Test the NEON kernels on an emulated machine (needs QEMU and a cross toolchain, see CONTRIBUTING.md).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tests of whole models as well, not only those of kernels (ten minutes more).
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let bin = env::var_os(BIN).map_or_else(|| DEBIAN_BIN.into(), PathBuf::from);
    let (cargo, rustc) = (bin.join("cargo"), bin.join("rustc"));
    let library = Library::of(&rustc)?;
    let (linker, runner) = (told(LINKER), told(RUNNER));
    let emulator = runner.to_string_lossy().split(' ').next().unwrap_or_default().to_owned();
    for program in [cargo.as_os_str(), emulator.as_ref()] {
        said_by(Command::new(program).arg("--version"))?;
    }
    // Says where the file is, or only its name if there is none.
    let start = said_by(Command::new(&linker).arg("-print-file-name=Scrt1.o"))?;
    if !Path::new(start.trim()).is_absolute() {
        bail!("{} has no C library for {TARGET}; {INSTALL}", linker.display());
    }

    let mut command = Command::new(cargo);
    command.args(["test", "--locked", "--package", "apr-cpu", "--lib"]);
    command.args(args.all.then_some("--tests"));
    command.args(["--target", TARGET, "--target-dir", "target/emulate"]);
    command.env("RUSTC", rustc).env(LINKER.0, linker).env(RUNNER.0, runner).env(ISAS.0, ISAS.1);
    // Kernels as they are released, which is what compiles fast, too. Flags may be meant for this machine.
    for unchecked in ["debug-assertions", "overflow-checks"] {
        command.args(["--config", &format!("profile.dev.package.apr-cpu.{unchecked}=false")]);
    }
    command.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_INCREMENTAL", "0");
    command.env_remove("RUSTFLAGS");
    if library == Library::Source {
        // Only toolchains of developers may build it, and those that are told that they are one.
        command.arg("-Zbuild-std=std,panic_unwind,test").env("RUSTC_BOOTSTRAP", "1");
    }
    judge(&mut command)
}

/// What a toolchain has of the standard library for [`TARGET`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Library {
    Built,
    Source,
}

impl Library {
    fn of(rustc: &Path) -> Result<Self> {
        let sysroot = said_by(Command::new(rustc).args(["--print", "sysroot"]))?;
        let rustlib = Path::new(sysroot.trim()).join("lib/rustlib");
        let source = rustlib.join("src/rust/library/Cargo.lock");
        if rustlib.join(TARGET).join("lib").is_dir() {
            Ok(Self::Built)
        } else if source.is_file() {
            Ok(Self::Source)
        } else {
            let rustc = rustc.display();
            bail!(
                "{rustc} has no standard library for {TARGET}, nor its source ({}); {INSTALL}",
                source.display()
            )
        }
    }
}

fn told((name, default): (&str, &str)) -> OsString {
    env::var_os(name).unwrap_or_else(|| default.into())
}

/// What a program says that needs to be there.
fn said_by(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot run {program}; {INSTALL}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| program)
}

/// Runs the tests, and fails unless they passed, and were there.
fn judge(command: &mut Command) -> Result<()> {
    eprintln!("xtask: {command:?}");
    let mut tests = command
        .current_dir(crate::root())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let (mut passed, mut has_witness) = (0, false);
    for line in BufReader::new(tests.stdout.take().expect("is piped")).lines() {
        let line = line?;
        println!("{line}");
        passed += usize::from(line.starts_with("test ") && line.ends_with(" ... ok"));
        has_witness |= line == WITNESS;
    }
    let status = tests.wait()?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    if !has_witness {
        bail!("no test made sure that {} were tested; expected: {WITNESS}", ISAS.1);
    }
    println!("xtask: {passed} tests passed on {TARGET} ({})", ISAS.1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_pass_are_not_enough_without_the_one_that_knows_the_sets() {
        assert!(judge(Command::new("echo").arg(WITNESS)).is_ok());
        assert!(judge(Command::new("echo").arg("test other ... ok")).is_err());
        assert!(
            judge(Command::new("sh").args(["-c", &format!("echo {WITNESS}; exit 1")])).is_err()
        );
    }

    #[test]
    fn what_is_missing_is_named_with_its_package() {
        let error = format!("{:#}", Library::of(Path::new("/nowhere/rustc")).unwrap_err());
        assert!(error.contains("/nowhere/rustc") && error.contains("rust-web-src"), "{error}");
    }
}
