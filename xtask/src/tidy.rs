//! The house rules that no compiler checks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// Lines that a source file may have before it needs to stand in [`LONG_TABLES`].
const MAX_LINES: usize = 1000;

/// Files that are long because they are tables.
const LONG_TABLES: &[&str] = &[];

/// Largest file that may be committed outside `fixtures/`.
const MAX_BYTES: u64 = 512 * 1024;

/// Where code is compiled for one instruction set.
const KERNELS: [&str; 2] = ["crates/cpu/src/x86_64/", "crates/cpu/src/aarch64/"];

/// Checks every tracked file.
pub(crate) fn check(root: &Path) -> Result<()> {
    let files = tracked(root)?;
    let mut complaints = Vec::new();
    for file in &files {
        let path = root.join(file);
        let name = file.to_string_lossy();
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.len() > MAX_BYTES && !name.starts_with("fixtures/") && name != "Cargo.lock" {
            complaints.push(format!("{name}: {} bytes; at most {MAX_BYTES}", metadata.len()));
        }
        if let Ok(text) = fs::read_to_string(&path) {
            complaints.extend(places(&text).into_iter().map(|c| format!("{name}: {c}")));
        }
        if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).with_context(|| name.to_string())?;
            complaints.extend(source(&name, &text).into_iter().map(|c| format!("{name}: {c}")));
            if is_orphan(root, file) {
                complaints.push(format!("{name}: no module declares this file"));
            }
        }
    }
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    match complaints.len() {
        0 => Ok(()),
        n => bail!("tidy has {n} complaint(s)"),
    }
}

fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git ls-files")?;
    let text = String::from_utf8(output.stdout).context("git ls-files")?;
    Ok(text.lines().map(PathBuf::from).collect())
}

/// What is wrong with one source file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES && !LONG_TABLES.contains(&name) {
        complaints.push(format!("{lines} lines; at most {MAX_LINES}"));
    }
    let is_module = !name.contains("/tests/") && !name.contains("/benches/");
    if is_module && !text.starts_with("//!") && !text.starts_with("#!") {
        complaints.push("does not begin with a `//!` line that says what it is for".to_owned());
    }
    // Spelt in two pieces, so that this file does not complain about itself.
    let banned = [
        (concat!("include", "!("), "textual inclusion of source"),
        (concat!("#[", "ignore"), "an ignored test"),
        (concat!("todo", "!("), "a stub"),
        (concat!("unimplemented", "!("), "a stub"),
        (concat!("#[should", "_panic"), "a test that passes on any panic"),
        (concat!("db", "g!("), "a debugging print"),
    ];
    let is_kernel = KERNELS.iter().any(|folder| name.starts_with(folder));
    for (number, line) in text.lines().enumerate() {
        for (pattern, why) in banned {
            if line.contains(pattern) {
                complaints.push(format!("line {}: {why}", number + 1));
            }
        }
        if is_kernel && has_closure(line) {
            let why = "a closure, which may be compiled without the instruction set of its kernel";
            complaints.push(format!("line {}: {why}", number + 1));
        }
    }
    complaints
}

/// Whether a closure is an argument on this line. What a macro takes may look the same.
fn has_closure(line: &str) -> bool {
    let arguments = ["(|", ", |"].into_iter().flat_map(|start| line.match_indices(start));
    arguments
        .into_iter()
        .any(|(at, start)| !line[..at].ends_with('!') && !line[at + start.len()..].starts_with('$'))
}

/// Paths of somebody's machine: nobody else has them.
fn places(text: &str) -> Vec<String> {
    // Spelt in two pieces, like the patterns below.
    let personal = [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/Us", "ers/")];
    let lines = text.lines().enumerate();
    let found = lines.filter(|(_, line)| personal.iter().any(|place| line.contains(place)));
    found.map(|(number, _)| format!("line {}: a path of one machine", number + 1)).collect()
}

/// Whether `file` is a module's file that its parent does not declare.
fn is_orphan(root: &Path, file: &Path) -> bool {
    let Some(stem) = file.file_stem().and_then(|s| s.to_str()) else { return false };
    let Some(folder) = file.parent() else { return false };
    if !file.components().any(|c| c.as_os_str() == "src") {
        return false;
    }
    let (module, home) = match stem {
        "lib" | "main" => return false,
        "mod" => match (folder.file_name().and_then(|s| s.to_str()), folder.parent()) {
            (Some(module), Some(home)) => (module, home),
            _ => return false,
        },
        module => (module, folder),
    };
    if home.ends_with("bin") {
        return false;
    }
    let beside = home.with_extension("rs");
    let parents = [home.join("lib.rs"), home.join("main.rs"), home.join("mod.rs"), beside];
    let declared = |text: &str| {
        text.lines().any(|line| line.trim_end().ends_with(&format!("mod {module};")))
            || text.lines().any(|line| line.trim_end().ends_with(&format!("mod {module} {{")))
    };
    !parents.iter().any(|p| fs::read_to_string(root.join(p)).is_ok_and(|text| declared(&text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        check(&crate::root()).unwrap();
    }

    #[test]
    fn closures_are_found_where_instruction_sets_are() {
        let text = "//! Doc.\nlet y = x.map(|x| x + 1);\nlet z = both!(|i| x[i]);\n";
        assert_eq!(source("crates/cpu/src/x86_64/avx2.rs", text).len(), 1);
        assert!(source("crates/cpu/src/pool.rs", text).is_empty());
    }

    #[test]
    fn stubs_and_missing_headers_are_found() {
        let text = concat!("fn f() { todo", "!() }\n");
        let complaints = source("crates/x/src/y.rs", text);
        assert_eq!(complaints.len(), 2, "{complaints:?}");
        assert!(source("crates/x/src/y.rs", "//! Fine.\n").is_empty());
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        assert_eq!(places(concat!("fine\nopen /ho", "me/me/model.gguf\n")).len(), 1);
        assert!(places("open /tmp/model.gguf").is_empty());
    }

    #[test]
    fn a_file_that_no_module_declares_is_an_orphan() {
        let root = crate::root();
        assert!(is_orphan(&root, Path::new("xtask/src/nowhere.rs")));
        assert!(!is_orphan(&root, Path::new("xtask/src/tidy.rs")));
    }
}
