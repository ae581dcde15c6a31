//! The published sizes, for fresh weights and benchmarks.

use crate::{Config, FeedForwardKind, ModelType};

/// Names that [`preset`] knows.
pub const PRESETS: [&str; 20] = [
    "t5-small",
    "t5-base",
    "t5-large",
    "t5-3b",
    "t5-11b",
    "t5-v1_1-small",
    "t5-v1_1-base",
    "t5-v1_1-large",
    "t5-v1_1-xl",
    "t5-v1_1-xxl",
    "byt5-small",
    "byt5-base",
    "byt5-large",
    "byt5-xl",
    "byt5-xxl",
    "mt5-small",
    "mt5-base",
    "mt5-large",
    "mt5-xl",
    "mt5-xxl",
];

/// The configuration of a published model; Flan-T5's are those of `t5-v1_1-…`.
pub fn preset(name: &str) -> Option<Config> {
    let (family, size) = name.rsplit_once('-')?;
    match family {
        "t5" => original(size),
        "t5-v1_1" => gated(size, 32128),
        "mt5" => Some(Config { model_type: ModelType::Mt5, ..gated(size, 250_112)? }),
        "byt5" => byte_level(size),
        _ => None,
    }
}

fn original(size: &str) -> Option<Config> {
    let (d_model, d_ff, num_layers, num_heads, d_kv) = match size {
        "small" => (512, 2048, 6, 8, 64),
        "base" => (768, 3072, 12, 12, 64),
        "large" => (1024, 4096, 24, 16, 64),
        "3b" => (1024, 16384, 24, 32, 128),
        "11b" => (1024, 65536, 24, 128, 128),
        _ => return None,
    };
    Some(Config { d_model, d_ff, num_layers, num_heads, d_kv, ..Config::default() })
}

fn gated(size: &str, vocab_size: usize) -> Option<Config> {
    let (d_model, d_ff, num_layers, num_heads) = match size {
        "small" => (512, 1024, 8, 6),
        "base" => (768, 2048, 12, 12),
        "large" => (1024, 2816, 24, 16),
        "xl" => (2048, 5120, 24, 32),
        "xxl" => (4096, 10240, 24, 64),
        _ => return None,
    };
    Some(Config {
        vocab_size,
        d_model,
        d_ff,
        num_layers,
        num_heads,
        feed_forward_proj: FeedForwardKind::GatedGelu,
        tie_word_embeddings: false,
        ..Config::default()
    })
}

/// ByT5: an encoder three times as deep as the decoder.
fn byte_level(size: &str) -> Option<Config> {
    let (d_model, d_ff, num_layers, num_decoder_layers, num_heads) = match size {
        "small" => (1472, 3584, 12, 4, 6),
        "base" => (1536, 3968, 18, 6, 12),
        "large" => (1536, 3840, 36, 12, 16),
        "xl" => (2560, 6720, 36, 12, 32),
        "xxl" => (4672, 12352, 36, 12, 64),
        _ => return None,
    };
    Some(Config {
        d_model,
        d_ff,
        num_layers,
        num_decoder_layers: Some(num_decoder_layers),
        num_heads,
        ..gated("small", 384)?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Layout;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        for (name, millions) in [
            ("t5-small", 60.5),
            ("t5-base", 222.9),
            ("t5-v1_1-base", 247.6),
            ("byt5-small", 299.6),
            ("mt5-small", 300.2),
        ] {
            let count = Layout::new(&preset(name).unwrap()).parameter_count() as f64 / 1e6;
            assert!((count - millions).abs() < 0.06, "{name}: {count}");
        }
    }

    #[test]
    fn every_name_is_known() {
        for name in PRESETS {
            preset(name).unwrap().validate().unwrap();
        }
        assert_eq!(preset("t5-huge"), None);
        assert_eq!(preset("t5"), None);
    }
}
