//! The shape of the house: who depends on whom, and what no file may hold.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines a file may have before it wants to be two.
const LINES_MAX: usize = 900;

/// Each crate, and those of ours that it may use.
const MAY_DEPEND_ON: [(&str, &[&str]); 10] = [
    ("cli", &["worker", "coordinator", "t5", "data", "kernels", "hub", "identity"]),
    ("worker", &["t5", "data", "proto", "identity", "kernels"]),
    ("coordinator", &["data", "proto", "identity"]),
    ("t5", &["kernels"]),
    ("kernels", &[]),
    ("hub", &[]),
    ("data", &[]),
    ("proto", &[]),
    ("identity", &[]),
    ("fuzz", &["worker", "coordinator", "t5", "data", "proto", "kernels", "identity"]),
];

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What cargo knows about our crates.
pub(crate) fn metadata() -> Value {
    let arguments = ["metadata", "--format-version=1", "--no-deps", "--offline"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn short(name: &Value) -> String {
    let name = name.as_str().unwrap();
    name.strip_prefix("quintet-").unwrap_or(name).to_string()
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let names: BTreeSet<String> = packages.iter().map(|package| short(&package["name"])).collect();
    assert_eq!(names, MAY_DEPEND_ON.iter().map(|(name, _)| name.to_string()).collect());
    for package in packages {
        let name = short(&package["name"]);
        let (_, allowed) = MAY_DEPEND_ON.iter().find(|(crate_name, _)| *crate_name == name).unwrap();
        // Those for tests and build scripts too.
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = short(&dependency["name"]);
            let ours = names.contains(&dependency);
            assert!(!ours || allowed.contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
    }
}

/// All Rust files of ours, relative to the repository.
fn rust_files() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = MAY_DEPEND_ON.iter().map(|(name, _)| root().join(name)).collect();
    folders.push(root().join("tests"));
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path.strip_prefix(root()).unwrap().to_path_buf());
            }
        }
    }
    files.sort();
    assert!(files.contains(&PathBuf::from("cli/src/main.rs")) && files.len() > 50);
    files
}

/// The places of a text that no line of these files may hold.
fn lines_with(files: &[PathBuf], forbidden: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        for (number, line) in read(file).lines().enumerate() {
            if forbidden.iter().any(|text| line.contains(text.as_str())) {
                found.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
            }
        }
    }
    found
}

#[test]
fn only_the_program_prints_and_reads_the_environment() {
    let is_library = |file: &&PathBuf| {
        let name = file.to_string_lossy();
        name.contains("/src/") && !name.starts_with("cli/")
    };
    let libraries: Vec<PathBuf> = rust_files().iter().filter(is_library).cloned().collect();
    let forbidden = ["println!(", "print!(", "dbg!(", "env::var", "process::exit"].map(String::from);
    // A test that cannot be made here says so.
    let found = lines_with(&libraries, &forbidden).into_iter().filter(|line| !line.contains("eprintln!(\"SKIPPED: "));
    assert_eq!(found.collect::<Vec<_>>(), [] as [String; 0]);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together, so that this file does not hold them.
    let forbidden = ["todo", "unimplemented"].map(|name| format!("{name}!("));
    let forbidden: Vec<String> = forbidden.into_iter().chain([format!("#[{}", "ignore")]).collect();
    // A test that a script runs says which.
    let found = lines_with(&rust_files(), &forbidden).into_iter().filter(|line| !line.contains("run by tests/"));
    assert_eq!(found.collect::<Vec<_>>(), [] as [String; 0]);
}

#[test]
fn files_are_short() {
    for file in rust_files() {
        let lines = read(&file).lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines; cut it where its subject changes", file.display());
    }
}
