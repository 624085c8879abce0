//! `apr pull` from a hub on this machine, up to text from the model that was pulled.

mod common;

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use apr_testkit::hub::{Access, Fault, HubServer};
use common::{Done, Scratch, apr, fixture};

/// A hub with the tiny Qwen2 model in both containers, and nobody's cache.
struct Setup {
    server: HubServer,
    scratch: Scratch,
}

const MODEL: &str = "tiny/Qwen2";
const GGUF: &str = "tiny/Qwen2-GGUF";

impl Setup {
    fn new() -> Self {
        let server = HubServer::start();
        server.add_directory(MODEL, Path::new(&fixture("tiny/qwen2")));
        let gguf = std::fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
        let files: [(&str, &[u8]); 3] =
            [("README.md", b"no"), ("m-F16.gguf", &gguf), ("m-q8_0.gguf", b"GGUF, so to say")];
        server.add(GGUF, Access::Public, &files);
        Self { server, scratch: Scratch::new() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_apr"));
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
            command.env_remove(name);
        }
        for name in ["HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"] {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", self.server.endpoint());
        command.env("HF_HOME", self.scratch.path("home"));
        command.arg("pull").args(args);
        command
    }

    fn pull(&self, args: &[&str]) -> Done {
        done(&mut self.command(args))
    }
}

fn done(command: &mut Command) -> Done {
    let output = command.output().unwrap();
    Done {
        code: output.status.code().expect("apr ends by itself, not by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn path_in(done: &Done) -> &str {
    let path = done.stdout.strip_suffix('\n').unwrap();
    assert!(!path.contains('\n'), "{path}");
    path
}

#[test]
fn what_pull_prints_is_what_run_opens() {
    let setup = Setup::new();
    let text = |model: &str| apr(["run", model, "-p", "def f(", "-n", "8"]).expect(0).stdout;
    let directory = setup.pull(&[MODEL]).expect(0);
    assert_eq!(text(path_in(&directory)), text(&fixture("tiny/qwen2")));
    let file = setup.pull(&[&format!("{GGUF}:f16")]).expect(0);
    assert!(path_in(&file).ends_with("/m-F16.gguf"), "{}", file.stdout);
    assert_eq!(text(path_in(&file)), text(&fixture("tiny/qwen2/qwen2-F16.gguf")));
}

#[test]
fn a_second_pull_fetches_nothing_and_an_offline_one_asks_nobody() {
    let setup = Setup::new();
    let first = setup.pull(&[MODEL]).expect(0);
    assert!(first.stderr.contains("model.safetensors"), "{}", first.stderr);
    setup.server.requests();
    let second = setup.pull(&[MODEL, "--json"]).expect(0).json();
    assert_eq!(second["schema"], "apr-pull/1");
    assert_eq!(second["fetched_bytes"], 0);
    assert_eq!(second["path"], path_in(&first));
    assert!(second["files"].as_array().unwrap().iter().all(|file| file["cached"] == true));
    assert_eq!(setup.server.requests().len(), 1);
    assert_eq!(setup.pull(&[MODEL, "--offline"]).expect(0).stdout, first.stdout);
    let by_variable = done(setup.command(&[MODEL]).env("HF_HUB_OFFLINE", "1")).expect(0);
    assert_eq!(by_variable.stdout, first.stdout);
    let absent = setup.pull(&[GGUF, "--offline"]).expect(2);
    assert!(absent.stderr.contains("not in the cache"), "{}", absent.stderr);
    setup.pull(&[MODEL, "--offline", "--verify"]).expect(2);
    assert!(setup.server.requests().is_empty());
}

#[test]
fn a_pull_that_was_killed_is_taken_up_by_the_next() {
    let setup = Setup::new();
    setup.server.fail("model.safetensors", Fault::Stall(100_000), 1);
    let mut command = setup.command(&[MODEL]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_partial(&setup, &mut child, 100_000);
    child.kill().unwrap();
    child.wait().unwrap();
    setup.server.requests();
    let next = setup.pull(&[MODEL, "--json"]).expect(0);
    assert!(next.stderr.contains("going on after"), "{}", next.stderr);
    let ranges: Vec<_> = setup.server.requests().into_iter().filter_map(|r| r.range).collect();
    assert!(ranges.contains(&"bytes=100000-".to_owned()), "{ranges:?}");
    let files = next.json()["files"].as_array().unwrap().clone();
    let weights = files.iter().find(|file| file["path"] == "model.safetensors").unwrap();
    assert_eq!(weights["resumed"], 100_000);
    let pulled = next.json()["path"].as_str().unwrap().to_owned() + "/model.safetensors";
    let expected = std::fs::read(fixture("tiny/qwen2/model.safetensors")).unwrap();
    assert!(std::fs::read(pulled).unwrap() == expected);
}

/// Waits until so many bytes of some file are in the cache and no more come.
fn wait_for_partial(setup: &Setup, child: &mut Child, bytes: u64) {
    let blobs = setup.scratch.path("home/hub/models--tiny--Qwen2/blobs");
    let partial = || {
        let entries = std::fs::read_dir(&blobs).ok()?.filter_map(Result::ok);
        let mut entries = entries.filter(|entry| {
            entry.path().extension().is_some_and(|extension| extension == "incomplete")
        });
        entries.find(|entry| entry.metadata().is_ok_and(|m| m.len() == bytes))
    };
    let start = Instant::now();
    while partial().is_none() {
        assert!(child.try_wait().unwrap().is_none(), "apr ended before it was killed");
        assert!(start.elapsed() < Duration::from_secs(60), "the bytes never came");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn several_quantisations_and_no_choice_is_an_error_that_lists_them_with_sizes() {
    let setup = Setup::new();
    let error = setup.pull(&[GGUF]).expect(2);
    assert_eq!(error.stdout, "");
    for expected in ["F16", "194.1 KiB", "Q8_0", "15 B", "m-q8_0.gguf", "tiny/Qwen2-GGUF:LABEL"] {
        assert!(error.stderr.contains(expected), "{expected}: {}", error.stderr);
    }
    let error = setup.pull(&[&format!("{GGUF}:Q5_K_M")]).expect(2);
    assert!(error.stderr.contains("no `Q5_K_M`"), "{}", error.stderr);
    let by_pattern = setup.pull(&[GGUF, "--file", "*q8*"]).expect(0);
    assert!(path_in(&by_pattern).ends_with("m-q8_0.gguf"), "{}", by_pattern.stdout);
    setup.pull(&[&format!("{GGUF}:F16"), "--file", "*"]).expect(2);
}

#[test]
fn a_dry_run_says_what_there_is_and_writes_nothing() {
    let setup = Setup::new();
    let plan = setup.pull(&[MODEL, "--dry-run"]).expect(0).stdout;
    for name in ["config.json", "model.safetensors", "tokenizer.json", "to fetch into"] {
        assert!(plan.contains(name), "{name}: {plan}");
    }
    assert!(!plan.contains("gguf"), "{plan}");
    assert!(!Path::new(&setup.scratch.path("home")).exists());
    setup.pull(&[MODEL]).expect(0);
    let json = setup.pull(&[MODEL, "--dry-run", "--json"]).expect(0).json();
    assert_eq!((&json["fetched_bytes"], &json["dry_run"]), (&0.into(), &true.into()));
}

#[test]
fn another_cache_may_be_given() {
    let setup = Setup::new();
    let other = setup.scratch.path("other");
    let pulled = setup.pull(&[MODEL, "--cache-dir", &other]).expect(0);
    assert!(path_in(&pulled).starts_with(&other), "{}", pulled.stdout);
    assert!(!Path::new(&setup.scratch.path("home")).exists());
}

#[test]
fn refusals_are_one_line_that_helps_and_never_show_the_token() {
    let setup = Setup::new();
    setup.server.add("secret/model", Access::Private, &[("model.safetensors", b"x")]);
    setup.server.add("gated/model", Access::Gated, &[("model.safetensors", b"x")]);
    let refused = |args: &[&str], token: Option<&str>| {
        let mut command = setup.command(args);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        let said = done(&mut command).expect(2);
        assert_eq!(said.stdout, "");
        assert!(token.is_none_or(|token| !said.stderr.contains(token)), "{}", said.stderr);
        let error = said.stderr.lines().last().unwrap().to_owned();
        assert!(error.starts_with("error: "), "{error}");
        error
    };
    for (args, token, expected) in [
        (&["secret/model"][..], None, "HF_TOKEN"),
        (&["gated/model"], None, "accept its terms at http"),
        (&["gated/model"], Some("hf_unknown"), "does not accept the token"),
        (&["no/such"], Some(HubServer::TOKEN), "has no model `no/such`"),
        (&[MODEL, "--revision", "v9"], None, "no revision `v9`"),
        (&[MODEL, "--file", "*.bin"], None, "matches `*.bin`"),
        (&["not a name"], None, "expected ORG/NAME"),
    ] {
        let error = refused(args, token);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut allowed = setup.command(&["secret/model"]);
    done(allowed.env("HF_TOKEN", HubServer::TOKEN)).expect(0);
}

#[test]
fn wrong_bytes_are_an_error_and_no_path() {
    let setup = Setup::new();
    setup.server.fail("model.safetensors", Fault::Corrupt, 1);
    let error = setup.pull(&[MODEL]).expect(2);
    assert_eq!(error.stdout, "");
    assert!(error.stderr.contains("checksum"), "{}", error.stderr);
    setup.pull(&[MODEL]).expect(0);
}
