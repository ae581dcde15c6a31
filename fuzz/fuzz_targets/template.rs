//! Templates of a job.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quintet_data::Template;

fuzz_target!(|text: &str| {
    if let Ok(template) = Template::parse(text) {
        assert!(template.fields().all(|field| !field.is_empty()));
    }
});
