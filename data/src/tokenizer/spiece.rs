//! A SentencePiece model (`spiece.model`) as a tokenizer.json: T5's first tokenizers came as nothing else.
//!
//! The file is a Protocol Buffers message (`ModelProto` in SentencePiece's sentencepiece_model.proto), of which five fields
//! matter. What it becomes is what transformers' T5Tokenizer makes of it.

use serde_json::{Map, Value, json};

use super::object;

/// T5's sentinels, where tokenizer_config.json says no other number.
const EXTRA_IDS: u64 = 100;
/// Fields of `ModelProto`.
const PIECES: u64 = 1;
const TRAINER_SPEC: u64 = 2;
const NORMALIZER_SPEC: u64 = 3;
/// Fields of `ModelProto.SentencePiece`.
const PIECE: u64 = 1;
const SCORE: u64 = 2;
/// Fields of `TrainerSpec` and their defaults.
const MODEL_TYPE: u64 = 3;
const UNIGRAM: u64 = 1;
const UNK_ID: u64 = 40;
/// Of `NormalizerSpec`.
const PRECOMPILED_CHARSMAP: u64 = 2;

/// A field's value.
enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a message, in their order; an error where it breaks off.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(bytes)
    }

    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Other)?,
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field().ok_or_else(|| "no SentencePiece model, or half of one".to_string());
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

/// What of a model makes the tokenizer.
struct Model<'a> {
    pieces: Vec<(&'a str, f32)>,
    unk_id: u64,
    charsmap: &'a [u8],
}

impl<'a> Model<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let mut model = Model { pieces: Vec::new(), unk_id: 0, charsmap: &[] };
        let mut model_type = UNIGRAM;
        for field in Fields(bytes) {
            match field? {
                (PIECES, Field::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
                (TRAINER_SPEC, Field::Bytes(spec)) => {
                    for field in Fields(spec) {
                        match field? {
                            (MODEL_TYPE, Field::Number(kind)) => model_type = kind,
                            (UNK_ID, Field::Number(id)) => model.unk_id = id,
                            _ => {}
                        }
                    }
                }
                (NORMALIZER_SPEC, Field::Bytes(spec)) => {
                    for field in Fields(spec) {
                        if let (PRECOMPILED_CHARSMAP, Field::Bytes(charsmap)) = field? {
                            model.charsmap = charsmap;
                        }
                    }
                }
                _ => {}
            }
        }
        if model_type != UNIGRAM {
            return Err("a SentencePiece model other than a unigram one, which T5's are".into());
        }
        if model.pieces.is_empty() {
            return Err("a SentencePiece model without pieces".into());
        }
        Ok(model)
    }
}

fn parse_piece(bytes: &[u8]) -> Result<(&str, f32), String> {
    let (mut text, mut score) = ("", 0.0);
    for field in Fields(bytes) {
        match field? {
            (PIECE, Field::Bytes(bytes)) => {
                text = std::str::from_utf8(bytes).map_err(|_| "a piece that is no UTF-8".to_string())?;
            }
            (SCORE, Field::Float(value)) => score = value,
            _ => {}
        }
    }
    Ok((text, score))
}

/// The tokenizer.json of a `spiece.model`. `config` is the tokenizer_config.json beside it, if there is one.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn to_tokenizer_json(
    bytes: &[u8],
    config: Option<&Map<String, Value>>,
) -> Result<Map<String, Value>, String> {
    let model = Model::parse(bytes)?;
    let extra_ids = config.and_then(|config| config.get("extra_ids")?.as_u64()).unwrap_or(EXTRA_IDS);
    let mut vocab: Vec<(String, f64)> =
        model.pieces.iter().map(|&(piece, score)| (piece.to_string(), f64::from(score))).collect();
    vocab.extend((0..extra_ids).rev().map(|number| (format!("<extra_id_{number}>"), 0.0)));
    let is_special = |token: &str| ["<pad>", "</s>", "<unk>"].contains(&token) || token.starts_with("<extra_id_");
    let added = |(id, (token, _)): (usize, &(String, f64))| {
        is_special(token).then(|| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true,
            })
        })
    };
    let added_tokens: Vec<Value> = vocab.iter().enumerate().filter_map(added).collect();
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let normalizer = match model.charsmap {
        [] => Value::Null,
        charsmap => json!({"type": "Precompiled", "precompiled_charsmap": base64(charsmap)}),
    };
    Ok(object([
        ("version", "1.0".into()),
        ("added_tokens", added_tokens.into()),
        ("normalizer", normalizer),
        (
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace.clone()]}),
        ),
        ("post_processor", Value::Null),
        ("decoder", metaspace),
        ("model", json!({"type": "Unigram", "unk_id": model.unk_id, "vocab": vocab, "byte_fallback": false})),
    ]))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let value = bits >> (18 - 6 * digit) & 63;
            text.push(if digit > chunk.len() { '=' } else { char::from(DIGITS[value as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::{SPIECE_FILE, Tokenizer};
    use super::*;

    fn references() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/references/spiece")
    }

    #[test]
    fn base64_is_rfc_4648s() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("\u{7ff}\u{7ff}", "37/fvw=="),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }

    /// `tests/references/spiece.py` made model and ids.
    #[test]
    fn ids_are_those_of_transformers() {
        #[derive(Deserialize)]
        struct Expected {
            vocab_size: usize,
            texts: Vec<(String, Vec<u32>)>,
        }
        let tokenizer = Tokenizer::open(&references()).unwrap();
        let expected: Expected =
            serde_json::from_slice(&std::fs::read(references().join("expected.json")).unwrap()).unwrap();
        assert!(expected.texts.len() >= 300);
        assert_eq!(tokenizer.vocab_size(), expected.vocab_size);
        for (text, ids) in &expected.texts {
            assert_eq!(tokenizer.encode(text, usize::MAX).unwrap(), *ids, "{text:?}");
        }
    }

    #[test]
    fn half_a_model_is_an_error() {
        let whole = std::fs::read(references().join(SPIECE_FILE)).unwrap();
        assert!(to_tokenizer_json(&whole, None).is_ok());
        for length in [0, 1, 9, whole.len() / 2, whole.len() - 1] {
            assert!(to_tokenizer_json(&whole[..length], None).is_err(), "{length} bytes");
        }
        assert!(to_tokenizer_json(b"version https://git-lfs.github.com/spec/v1", None).is_err());
    }
}
