//! Building the engines, each in a version that is written down here, under `target/peers`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// llama.cpp comes in the sources of its Python package, of which `pip` checks the hash.
const LLAMA_CPP_PYTHON: &str = "llama-cpp-python==0.3.36 \
    --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";
const LLAMA_CPP_SOURCES: &str = "llama_cpp_python-0.3.36";

/// What builds llama.cpp, and what `pip` needs to read the package's metadata.
const BUILD_TOOLS: [&str; 3] = ["cmake", "ninja", "scikit-build-core"];

/// llama.cpp for this very machine, with none of its services.
const CMAKE: [&str; 9] = [
    "-GNinja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
];

const FRINK: &str = "0.50.0";

/// The models that are measured unless others are named.
const SHAPE: &str = "qwen2.5-0.5b";
const RECIPES: [&str; 2] = ["q4_k_m", "q8_0"];

/// Where the engines are built.
#[derive(Debug)]
pub(super) struct Workshop {
    root: PathBuf,
    directory: PathBuf,
}

impl Workshop {
    pub(super) fn new() -> Result<Self> {
        let root = crate::root();
        let directory = root.join("target").join("peers");
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self { root, directory })
    }

    /// A path in the workshop.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The models of random weights that are measured unless others are named.
    pub(super) fn models(&self) -> Result<Vec<PathBuf>> {
        let directory = self.path("models");
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        let model = |recipe: &str| {
            let path = directory.join(format!("{SHAPE}-{recipe}.gguf"));
            if !path.exists() {
                let mut synth = crate::synth_command();
                show(synth.args(["--shape", SHAPE, "--quantize", recipe]).arg(&path))?;
            }
            Ok(path)
        };
        RECIPES.into_iter().map(model).collect()
    }

    /// This workspace's `apr`.
    pub(super) fn apr(&self) -> Result<PathBuf> {
        cargo_build(Command::new("cargo").args(["build", "--release", "-p", "apr-cli"]), &self.root)
    }

    /// Our program that runs candle, and candle's version.
    pub(super) fn candle_bench(&self) -> Result<(PathBuf, String)> {
        let project = self.root.join("xtask").join("peers").join("candle");
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--release", "--locked", "--target-dir"]).arg(self.path("candle"));
        // The same target as the workspace's: whatever this very machine has.
        let program = cargo_build(cargo.env("RUSTFLAGS", "-Ctarget-cpu=native"), &project)?;
        let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
        let version = manifest.lines().find_map(|line| line.strip_prefix("candle-core = \"="));
        let version = version.unwrap_or_default().trim_end_matches('"').to_owned();
        Ok((program, version))
    }

    /// frink's command line, from the registry.
    pub(super) fn frink(&self) -> Result<PathBuf> {
        let root = self.path(&format!("frink-{FRINK}"));
        let program = root.join("bin").join("frink");
        if !program.exists() {
            let mut cargo = Command::new("cargo");
            cargo.args(["install", "frink-cli", "--version", FRINK, "--locked"]);
            cargo.args(["--no-default-features", "--root"]).arg(&root);
            cargo.arg("--target-dir").arg(self.path("frink-build"));
            show(cargo.env("RUSTFLAGS", "-Ctarget-cpu=native"))?;
        }
        Ok(program)
    }

    /// llama.cpp's `llama-bench`.
    pub(super) fn llama_bench(&self) -> Result<PathBuf> {
        let build = self.path(&format!("{LLAMA_CPP_SOURCES}-build"));
        let bench = build.join("bin").join("llama-bench");
        if bench.exists() {
            return Ok(bench);
        }
        let venv = self.path("venv");
        let tool = |name: &str| venv.join("bin").join(name);
        if !tool("ninja").exists() {
            show(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
            show(Command::new(tool("pip")).args(["install", "--quiet"]).args(BUILD_TOOLS))?;
        }
        let sources = self.path(LLAMA_CPP_SOURCES);
        if !sources.exists() {
            self.download(&tool("pip"))?;
        }
        let sources = sources.join("vendor").join("llama.cpp");
        let mut configure = Command::new(tool("cmake"));
        configure.arg("-S").arg(sources).arg("-B").arg(&build).args(CMAKE);
        configure.arg(format!("-DCMAKE_MAKE_PROGRAM={}", tool("ninja").display()));
        show(&mut configure)?;
        let mut make = Command::new(tool("cmake"));
        show(make.arg("--build").arg(&build).args(["--target", "llama-bench"]))?;
        Ok(bench)
    }

    /// Downloads llama.cpp's sources and unpacks them.
    fn download(&self, pip: &Path) -> Result<()> {
        let requirements = self.path("requirements.txt");
        fs::write(&requirements, LLAMA_CPP_PYTHON)?;
        let mut download = Command::new(pip);
        // For this one package alone: its build tools come as they are.
        download.args(["download", "--no-deps", "--no-binary", "llama-cpp-python"]);
        download.args(["--no-build-isolation", "--require-hashes", "-r"]).arg(requirements);
        show(download.arg("-d").arg(&self.directory))?;
        let archive = self.path(&format!("{LLAMA_CPP_SOURCES}.tar.gz"));
        let unpacking = self.path("unpacking");
        fs::create_dir_all(&unpacking)?;
        show(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(&unpacking))?;
        // Under its name it is whole.
        fs::rename(unpacking.join(LLAMA_CPP_SOURCES), self.path(LLAMA_CPP_SOURCES))?;
        Ok(())
    }
}

/// Runs a `cargo build` in `directory`, and returns the program that it made.
fn cargo_build(cargo: &mut Command, directory: &Path) -> Result<PathBuf> {
    eprintln!("xtask: {cargo:?}");
    cargo.arg("--message-format=json-render-diagnostics").current_dir(directory);
    let result = cargo.stderr(std::process::Stdio::inherit()).output();
    let result = result.with_context(|| format!("{cargo:?}"))?;
    if !result.status.success() {
        bail!("{cargo:?} failed: {}", result.status);
    }
    let messages = String::from_utf8_lossy(&result.stdout);
    let mut programs = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    });
    programs.next_back().with_context(|| format!("{cargo:?} made no program"))
}

/// Runs `command`, with its output on stderr: stdout is for the table.
fn show(command: &mut Command) -> Result<()> {
    eprintln!("xtask: {command:?}");
    let status = command.stdout(std::io::stderr()).status();
    let status = status.with_context(|| format!("{command:?}"))?;
    match status.success() {
        true => Ok(()),
        false => bail!("{command:?} failed: {status}"),
    }
}

/// What `command` prints; if it fails, the end of what it complains of is the error.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let program = name_of(command);
    // The end of a complaint is to be what is wrong, not where in the program.
    let output = command.env("RUST_BACKTRACE", "0").output().with_context(|| program.clone())?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let last = complaint.lines().map(str::trim).rfind(|line| !line.is_empty());
        bail!("{program}: {}: {}", output.status, last.unwrap_or("it says nothing"));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed no UTF-8"))
}

fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}

/// The first line that `command` says, on either stream.
pub(super) fn said(command: &mut Command) -> Result<String> {
    let program = name_of(command);
    let output = command.output().with_context(|| program.clone())?;
    if !output.status.success() {
        bail!("{program}: {}", output.status);
    }
    let all = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&all).lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_named_with_its_last_complaint() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo early >&2; echo no such model >&2; echo >&2; exit 3"]);
        let error = output(&mut command).unwrap_err().to_string();
        assert!(error.starts_with("sh: ") && error.ends_with(": no such model"), "{error}");
        assert_eq!(output(Command::new("sh").args(["-c", "echo x"])).unwrap(), "x\n");
        assert!(output(&mut Command::new("no-such-program-anywhere")).is_err());
        assert_eq!(said(Command::new("sh").args(["-c", "echo 1.2 >&2"])).unwrap(), "1.2");
    }
}
