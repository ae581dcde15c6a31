//! A tokenizer.json as the coordinator hands it to workers, and what it does to a text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quintet_data::Tokenizer;

fuzz_target!(|text: &str| {
    let Ok(tokenizer) = Tokenizer::from_json(text) else { return };
    if let Ok(ids) = tokenizer.encode("Two words, and \u{e9}\u{1f600}.", 16) {
        assert!(ids.len() <= 16);
        let _ = tokenizer.decode(&ids);
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX]);
});
