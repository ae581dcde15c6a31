//! A Parquet file, all rows and fields of it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use quintet_data::resolve_sources;
use tempfile::TempDir;

const NAME: &str = "rows.parquet";

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));

fuzz_target!(
    // Panics of the library are caught where it is called: only those that get here are findings, and end the program
    // without the hook that ends it at the first.
    init: std::panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| {
        std::fs::write(DIRECTORY.path().join(NAME), bytes).expect("a temporary file");
        let sources = resolve_sources(&[NAME.to_owned()], DIRECTORY.path(), "train").expect("the file just written");
        for source in sources {
            let _ = source.for_each(|_, _| Ok(()));
        }
    }
);
