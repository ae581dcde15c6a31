//! A directory with a model: config.json up to the first NUL, model.safetensors after it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use quintet_kernels::Device;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));

/// Small enough to be complete in an input.
const CONFIG: &str = r#"{"model_type": "t5", "vocab_size": 3, "d_model": 2, "d_kv": 1, "d_ff": 2, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 1, "feed_forward_proj": "relu"}"#;

fuzz_target!(|bytes: &[u8]| {
    let (config, weights) = match bytes.iter().position(|&byte| byte == 0) {
        // Without a configuration, the weights meet a good one.
        None | Some(0) => (CONFIG.as_bytes(), bytes.strip_prefix(&[0]).unwrap_or(bytes)),
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
    };
    std::fs::write(DIRECTORY.path().join("config.json"), config).expect("a temporary file");
    std::fs::write(DIRECTORY.path().join("model.safetensors"), weights).expect("a temporary file");
    let _ = quintet_t5::load_pretrained(&Device::cpu(), DIRECTORY.path());
});
