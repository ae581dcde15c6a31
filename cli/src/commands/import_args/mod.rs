//! `quintet import-args`: a job file from the arguments of a Hugging Face training, as their `to_dict` or `save_pretrained`
//! writes them. What is not as Hugging Face's defaults and has no counterpart is named, never dropped in silence.

mod convert;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::args::ImportArguments;
use crate::commands::print_json;
use crate::error::{Failure, Result, exit};

/// A job under way to be one.
#[derive(Default)]
struct Draft {
    /// Section to key to value.
    sections: toml::Table,
    /// `key = value: why`.
    unconverted: Vec<String>,
    notes: Vec<String>,
}

pub(crate) fn run(arguments: ImportArguments) -> Result<u8> {
    let mut draft = Draft::default();
    for path in &arguments.files {
        convert::file(&mut draft, &read(path)?).map_err(|problem| bad(path, &problem))?;
    }
    let text = draft.to_toml()?;
    if arguments.json {
        print_json(&json!({"job": draft.sections, "not_converted": draft.unconverted, "notes": draft.notes}));
        return Ok(exit::DONE);
    }
    for note in &draft.notes {
        eprintln!("note: {note}");
    }
    for unconverted in &draft.unconverted {
        eprintln!("not converted: {unconverted}");
    }
    print!("{text}");
    Ok(exit::DONE)
}

fn bad(path: &Path, problem: &str) -> Failure {
    Failure::bad_input(format!("{}: {problem}", path.display()))
}

fn read(path: &PathBuf) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|error| bad(path, &format!("cannot read: {error}")))?;
    serde_json::from_str(&text).map_err(|error| bad(path, &format!("no JSON object: {error}")))
}

impl Draft {
    fn set(&mut self, section: &str, key: &str, value: impl Into<toml::Value>) {
        let section = self.sections.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        if let Some(table) = section.as_table_mut() {
            table.insert(key.to_string(), value.into());
        }
    }

    fn refuse(&mut self, key: &str, value: &Value, why: &str) {
        self.unconverted.push(format!("{key} = {value}: {why}"));
    }

    /// A job file with blanks for what no argument says.
    fn to_toml(&self) -> Result<String> {
        let mut sections = self.sections.clone();
        let mut text = String::new();
        if let Some(output_dir) = sections.remove("output_dir") {
            text += &format!("output_dir = {output_dir}\n\n");
        }
        if !sections.contains_key("model") {
            text += "# [model]\n# pretrained = \"…\"\n\n";
        }
        text += "# [data]\n# train = \"…\"\n# validation = \"…\"\n# input = \"…\"\n# target = \"…\"\n\n";
        text += &toml::to_string(&sections).map_err(|error| Failure::failed(error.to_string()))?;
        Ok(text)
    }
}
