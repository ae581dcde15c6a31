//! Files of records, by the format that the first byte chooses: JSON lines, CSV or TSV.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use quintet_data::{Template, resolve_sources};
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));

fuzz_target!(|bytes: &[u8]| {
    let Some((format, content)) = bytes.split_first() else { return };
    let name = ["records.jsonl", "records.csv", "records.tsv"][usize::from(*format) % 3];
    std::fs::write(DIRECTORY.path().join(name), content).expect("a temporary file");
    let sources = resolve_sources(&[name.to_owned()], DIRECTORY.path(), "train").expect("the file just written");
    let template = Template::parse("{a}: {text}").expect("a valid template");
    for source in sources {
        let _ = source.for_each(|_, record| {
            // A record without these fields is an error that ends nothing here.
            let _ = template.render(&record, &mut String::new());
            Ok(())
        });
    }
});
