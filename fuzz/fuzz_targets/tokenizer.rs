//! A tokenizer.json as the coordinator hands it to workers, and what it does to a text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quintet_data::Tokenizer;

fuzz_target!(
    // Panics of the library are caught where it is called. Those that get here are findings, and end the program after
    // this hook instead of in libFuzzer's.
    init: std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))),
    |text: &str| {
        let Ok(tokenizer) = Tokenizer::from_json(text) else { return };
        if let Ok(ids) = tokenizer.encode("Two words, and \u{e9}\u{1f600}.", 16) {
            assert!(ids.len() <= 16);
            let _ = tokenizer.decode(&ids);
        }
        let _ = tokenizer.decode(&[0, 1, u32::MAX]);
    }
);
