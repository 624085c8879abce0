//! The real binary, run on the fixtures.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

/// How the binary ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// The output of a run that must have ended with `code`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Stdout, as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}:\n{}", self.stdout))
    }
}

/// Runs `apr` with these arguments.
pub(crate) fn apr<'a>(args: impl IntoIterator<Item = &'a str>) -> Done {
    apr_reading("", args)
}

/// The same with this on stdin.
pub(crate) fn apr_reading<'a>(
    stdin: impl AsRef<[u8]>,
    args: impl IntoIterator<Item = &'a str>,
) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apr"));
    command.args(args);
    done(command, stdin.as_ref())
}

/// The same with a limit on the size of files, in units of 512 bytes: a full disk that needs no disk.
#[cfg(unix)]
pub(crate) fn apr_with_file_limit(blocks: &str, args: &[&str]) -> Done {
    // The signal has to be ignored for the limit to be an error.
    let script = "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", blocks, env!("CARGO_BIN_EXE_apr")]).args(args);
    done(command, &[])
}

fn done(mut command: Command, stdin: &[u8]) -> Done {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read its stdin may be gone already.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    Done {
        code: output.status.code().expect("apr ends by itself, not by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A file or directory under `fixtures/`, as an argument.
pub(crate) fn fixture(path: &str) -> String {
    text(&apr_testkit::fixture(path))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("paths of tests are UTF-8").to_owned()
}

/// Ids as `--tokens` takes them.
pub(crate) fn ids(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The numbers of a JSON array.
pub(crate) fn numbers(value: &Value) -> Vec<u32> {
    let values = value.as_array().unwrap_or_else(|| panic!("{value} is no array"));
    values.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A directory that is removed with its owner.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A path in it, as an argument.
    pub(crate) fn path(&self, name: &str) -> String {
        text(&self.0.path().join(name))
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.0.path().join(name), content).unwrap();
        self.path(name)
    }

    /// A copy of a directory of files.
    pub(crate) fn copy(&self, from: &str, name: &str) -> String {
        let to = self.0.path().join(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
        text(&to)
    }

    /// Captures every value of a forward pass with `options`.
    #[track_caller]
    pub(crate) fn capture(&self, name: &str, model: &str, options: &[&str]) -> String {
        let output = self.path(name);
        let args = ["trace", model, "--save-tensor", "all", "--output", &output];
        apr(args.into_iter().chain(options.iter().copied())).expect(0);
        output
    }

    /// The tiny Qwen2 model with a tensor changed, which is stored as BF16.
    pub(crate) fn model_with(&self, tensor: &str, change: impl FnOnce(&mut [[u8; 2]])) -> String {
        let model = self.copy(&fixture("tiny/qwen2"), "changed");
        let path = PathBuf::from(&model).join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        assert_eq!(header[tensor]["dtype"], "BF16");
        let offset =
            |i: usize| 8 + length + header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
        change(bytes[offset(0)..offset(1)].as_chunks_mut().0);
        fs::write(&path, bytes).unwrap();
        model
    }

    /// The tiny Qwen2 model with a NaN as the first element of a tensor.
    pub(crate) fn model_with_nan(&self, tensor: &str) -> String {
        self.model_with(tensor, |elements| elements[0] = 0x7FC0u16.to_le_bytes())
    }
}
