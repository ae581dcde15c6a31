//! A SentencePiece model, spiece.model.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use quintet_data::Tokenizer;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));

fuzz_target!(
    // As for the target `tokenizer`.
    init: std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))),
    |bytes: &[u8]| {
        std::fs::write(DIRECTORY.path().join("spiece.model"), bytes).expect("a temporary file");
        if let Ok(tokenizer) = Tokenizer::open(DIRECTORY.path()) {
            let _ = tokenizer.encode("Two words.", 16);
        }
    }
);
