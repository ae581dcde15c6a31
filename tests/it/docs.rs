//! What the README says is so: every key with its default, every flag, the commands to copy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use quintet_coordinator::config::ClusterConfig;
use quintet_data::DataConfig;
use quintet_worker::{EvaluationConfig, TrainingConfig};
use serde_json::{Value, json};

use crate::harness::run;
use crate::structure::{read, root};

/// What `cargo` and other people's programs call their flags.
const FLAGS_OF_OTHERS: [&str; 6] = ["--release", "--workspace", "--path", "--local-dir", "--help", "--time"];

/// The rows of the README's table of keys: key to default, as written.
fn documented_keys() -> BTreeMap<String, String> {
    let readme = read("README.md");
    let (_, section) = readme.split_once("\n## Job file\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    rows.map(|(key, rest)| (key.to_string(), rest.split(" | ").next().unwrap().to_string())).collect()
}

/// The keys of a section (`""` is the top), which the program lists where it is given one that is like none of them.
pub(crate) fn known_keys(section: &str) -> Vec<String> {
    let prefix = if section.is_empty() { String::new() } else { format!("{section}.") };
    let unknown = format!("{prefix}0=1");
    let ended = run(&root(), ["train", "examples/g2p.toml", "--set", &unknown]).expect(2);
    let (_, known) = ended.error().split_once("known here: ").unwrap();
    known.split(", ").map(|key| format!("{prefix}{key}")).collect()
}

#[test]
fn every_key_is_in_the_table_and_every_row_is_a_key() {
    let sections: Vec<String> =
        known_keys("").into_iter().filter(|key| !documented_keys().contains_key(key.as_str())).collect();
    let nested = sections.iter().flat_map(|section| known_keys(section));
    let known: BTreeSet<String> = nested.chain(["output_dir".to_string()]).collect();
    let documented: BTreeSet<String> = documented_keys().into_keys().collect();
    assert_eq!(sections, ["model", "data", "training", "lora", "evaluation", "cluster"]);
    assert_eq!(documented, known);
}

#[test]
fn every_default_is_the_one_in_the_table() {
    let data: DataConfig = serde_json::from_value(json!({"train": "x", "input": "{x}", "target": "{y}"})).unwrap();
    let sections = json!({
        "data": {
            "max_source_length": data.max_source_length,
            "max_target_length": data.max_target_length,
            "shuffle": data.shuffle,
            "source_prefix": data.source_prefix,
            "num_shots": data.num_shots,
            "shot_template": data.shot_template,
            "objective": data.objective,
            "noise_density": data.noise_density,
            "mean_noise_span_length": data.mean_noise_span_length,
            "mode_tokens": data.mode_tokens,
        },
        "training": TrainingConfig::default(),
        "evaluation": EvaluationConfig::default(),
        "cluster": ClusterConfig::default(),
    });
    let documented = documented_keys();
    for (section, keys) in sections.as_object().unwrap() {
        for (key, default) in keys.as_object().unwrap().iter().filter(|(_, default)| !default.is_null()) {
            let cell = &documented[&format!("{section}.{key}")];
            let literal = cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`'));
            let literal = literal.unwrap_or_else(|| panic!("{section}.{key}: {cell:?} is no value; it is {default}"));
            let table: toml::Table = format!("value = {literal}").parse().unwrap();
            assert_eq!(serde_json::to_value(&table["value"]).unwrap(), *default, "{section}.{key}");
        }
    }
}

#[test]
fn the_job_in_the_readme_is_valid() {
    let readme = read("README.md");
    let job = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("reviews.toml"), job).unwrap();
    // The cluster is checked last: whoever complains about it found everything else in order.
    let ended = run(directory.path(), ["train", "reviews.toml", "--set", "cluster.min_workers=0"]).expect(2);
    assert!(ended.error().contains("cluster.min_workers"), "{}", ended.error());
}

#[test]
fn every_flag_in_the_readmes_exists() {
    let commands = [
        "train",
        "coordinator",
        "worker",
        "launch ssh",
        "launch slurm",
        "launch kubernetes",
        "tokens",
        "evaluate",
        "import-args",
        "generate",
        "embed",
        "merge",
        "data inspect",
        "data prepare",
        "data export",
        "bench step",
        "bench allreduce",
        "bench scaling",
        "bench data",
        "selftest",
        "doctor",
    ];
    let help = |command: &&str| run(&root(), command.split(' ').chain(["--help"])).expect(0).stdout;
    let help: String = commands.iter().map(help).collect();
    let flags = |text: &str| -> BTreeSet<String> {
        let is_flag = |c: char| c == '-' || c.is_ascii_alphanumeric();
        let words = text.split(|c| !is_flag(c)).filter(|word| word.starts_with("--") && word.len() > 3);
        words.filter(|word| !word.starts_with("---")).map(str::to_string).collect()
    };
    let known = flags(&help);
    for flag in flags(&(read("README.md") + &read("examples/README.md"))) {
        assert!(known.contains(&flag) || FLAGS_OF_OTHERS.contains(&flag.as_str()), "{flag} is no flag of any command");
    }
}

#[test]
fn the_readmes_two_commands_are_those_that_are_checked() {
    let (readme, checked) = (read("README.md"), read(".ci/run"));
    for command in ["cargo run --release -- train examples/g2p.toml", "cargo test --release --workspace"] {
        assert!(readme.contains(&format!("```sh\n{command}\n```")), "{command} stands alone, to be copied");
        assert!(checked.contains(command), "{command} is not in .ci/run");
    }
}

#[test]
fn every_exit_code_is_in_the_table() {
    use quintet_coordinator::exit_code::{BAD_INPUT, DONE, FAILURE, NUMERIC_GUARD, PREEMPTED, TOO_FEW_WORKERS};
    let readme = read("README.md");
    let (_, table) = readme.split_once("\n| Exit code | |\n| --- | --- |\n").unwrap();
    let rows = table.lines().map_while(|line| line.strip_prefix("| ")?.split(' ').next()?.parse::<u32>().ok());
    assert_eq!(rows.collect::<Vec<_>>(), [DONE, FAILURE, BAD_INPUT, TOO_FEW_WORKERS, NUMERIC_GUARD, PREEMPTED]);
}

#[test]
fn links_lead_somewhere() {
    for file in [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "benchmarks/README.md",
        "docs/from-hugging-face.md",
        "examples/README.md",
    ] {
        let text = read(file);
        let folder = root().join(file).parent().unwrap().to_path_buf();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let is_file = !link.contains("://") && !link.starts_with('#');
            assert!(!is_file || folder.join(link).exists(), "{file}: {link} is not there");
        }
    }
}

#[test]
fn every_file_in_the_architecture_exists() {
    let text = read("ARCHITECTURE.md");
    let code = text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2));
    let rooted = |path: &&str| path.contains('/') && path.split('/').next().is_some_and(is_room);
    for path in code.filter(rooted) {
        // proto/… is also how the contract's own folder begins.
        assert!(root().join(path).exists() || root().join("proto").join(path).exists(), "{path} is not there");
    }
}

fn is_room(name: &str) -> bool {
    let metadata = crate::structure::metadata();
    let folders = metadata["packages"].as_array().unwrap().iter().map(|package| {
        let name = package["name"].as_str().unwrap();
        name.trim_start_matches("quintet-").to_string()
    });
    folders.chain(["tests".to_string(), "benchmarks".to_string()]).any(|room| room == name)
}

#[test]
fn the_version_has_an_entry_in_the_changelog() {
    let metadata = crate::structure::metadata();
    let versions: BTreeSet<&str> =
        metadata["packages"].as_array().unwrap().iter().map(|package| package["version"].as_str().unwrap()).collect();
    assert_eq!(versions.len(), 1, "all crates have one version: {versions:?}");
    assert!(read("CHANGELOG.md").contains(versions.first().unwrap()));
    let ended = run(&root(), ["--version"]).expect(0);
    assert_eq!(Value::from(ended.stdout.trim()), json!(format!("quintet {}", versions.first().unwrap())));
}
