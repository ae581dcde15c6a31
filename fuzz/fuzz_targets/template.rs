//! What a job writes in languages of its own: templates and filters, over a record.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use quintet_data::{Filter, Record, Template, resolve_sources};
use tempfile::TempDir;

/// Of every kind a field.
const LINE: &str = r#"{"text": "some words", "n": -1.5, "yes": true, "none": null, "list": [1, "x"]}"#;

static RECORD: LazyLock<Record> = LazyLock::new(|| {
    let directory = TempDir::new().expect("a temporary directory");
    std::fs::write(directory.path().join("one.jsonl"), LINE).expect("a temporary file");
    let sources = resolve_sources(&["one.jsonl".to_owned()], directory.path(), "train").expect("the file just written");
    let mut found = None;
    let keep = |_, record| {
        found = Some(record);
        Ok(())
    };
    sources[0].for_each(keep).expect("a valid record");
    found.expect("a record")
});

fuzz_target!(|text: &str| {
    if let Ok(template) = Template::parse(text) {
        assert!(template.fields().all(|field| !field.is_empty()));
        let _ = template.render(&RECORD, &mut String::new());
    }
    if let Ok(filter) = Filter::parse(text) {
        let _ = filter.keeps(&RECORD);
    }
});
