//! Text to tokens and back.

mod byt5;
mod spiece;
mod train;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

const PAD_TOKEN: &str = "<pad>";
const EOS_TOKEN: &str = "</s>";
const UNK_TOKEN: &str = "<unk>";
const TOKENIZER_FILE: &str = "tokenizer.json";
const SPIECE_FILE: &str = "spiece.model";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
const BYT5_CLASS: &str = "ByT5Tokenizer";
const FAST_CLASS: &str = "PreTrainedTokenizerFast";

/// Which tokenizer a job asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerSpec {
    /// Bytes; built in.
    ByT5,
    /// Words between white space, collected from the training data.
    WordLevel,
    /// Pieces of words, trained on the training data.
    Unigram,
    /// A tokenizer.json, or a folder in Hugging Face's layout.
    Path(PathBuf),
}

impl TokenizerSpec {
    /// Understands `byt5`, `wordlevel`, `unigram`, and otherwise a path, which is relative to `base`.
    pub fn parse(text: &str, base: &Path) -> Self {
        match text {
            "byt5" => Self::ByT5,
            "wordlevel" => Self::WordLevel,
            "unigram" => Self::Unigram,
            path => Self::Path(base.join(path)),
        }
    }

    /// Whether [`Tokenizer::from_spec`] reads the training texts.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::WordLevel | Self::Unigram)
    }
}

/// Text to token ids and back. Every sequence ends with the end-of-sequence token.
#[derive(Clone, Debug)]
pub struct Tokenizer(Kind);

#[derive(Clone, Debug)]
enum Kind {
    ByT5,
    Fast(Box<Fast>),
}

/// A tokenizer.json.
#[derive(Clone, Debug)]
struct Fast {
    tokenizer: tokenizers::Tokenizer,
    /// The file's content, with our end of sequence and without truncation and padding.
    json: Map<String, Value>,
    /// tokenizer_config.json as it came with it, or as we would write it.
    config: Map<String, Value>,
    pad_id: u32,
    eos_id: u32,
    unk_id: Option<u32>,
    vocab_size: usize,
}

/// What [`Tokenizer::to_json`] writes.
#[derive(Serialize, Deserialize)]
#[serde(tag = "quintet_tokenizer", rename_all = "lowercase", deny_unknown_fields)]
enum Portable {
    ByT5,
    Fast { tokenizer: Map<String, Value>, config: Map<String, Value> },
}

impl Tokenizer {
    /// Reads the tokenizer, or trains it on `texts`; other kinds leave `texts` alone. `vocab_size` is the most tokens
    /// that a trained vocabulary has, special ones included; by default all words, or 8000 for `unigram`.
    ///
    /// # Errors
    /// Files that are missing or make no tokenizer for T5, or a vocabulary too small to train.
    pub fn from_spec<'t>(
        spec: &TokenizerSpec,
        texts: impl Iterator<Item = Cow<'t, str>>,
        vocab_size: Option<usize>,
    ) -> Result<Self> {
        match spec {
            TokenizerSpec::ByT5 => Ok(Self(Kind::ByT5)),
            TokenizerSpec::WordLevel => Self::from_trained("wordlevel", train::wordlevel(texts, vocab_size)?),
            TokenizerSpec::Unigram => Self::from_trained("unigram", train::unigram(texts, vocab_size)?),
            TokenizerSpec::Path(path) => Self::open(path),
        }
    }

    fn from_trained(name: &str, json: Map<String, Value>) -> Result<Self> {
        Ok(Self(Kind::Fast(Box::new(Fast::new(name, json, config_of_class(FAST_CLASS))?))))
    }

    /// Reads a tokenizer.json or a folder in Hugging Face's layout.
    ///
    /// # Errors
    /// Files that are missing or make no tokenizer for T5.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        if !path.exists() {
            let message = "no such file or folder; give \"byt5\", \"wordlevel\", \"unigram\", a tokenizer.json, or a \
                           folder that holds one";
            return Err(Error::tokenizer(name, message));
        }
        let (file, folder) = match path.is_dir() {
            true => (path.join(TOKENIZER_FILE), path),
            false => (path.to_owned(), path.parent().unwrap_or(Path::new(""))),
        };
        let config_file = folder.join(CONFIG_FILE);
        let config = if config_file.exists() { Some(read_json::<Map<String, Value>>(&config_file)?) } else { None };
        if !file.exists() {
            let spiece = folder.join(SPIECE_FILE);
            if path.is_dir() && spiece.exists() {
                return Self::open_spiece(&spiece, config);
            }
            if config.as_ref().is_some_and(|config| config.get("tokenizer_class") == Some(&Value::from(BYT5_CLASS))) {
                return Ok(Self(Kind::ByT5));
            }
            let message =
                "holds neither tokenizer.json nor spiece.model; save one there with transformers' save_pretrained";
            return Err(Error::tokenizer(name, message));
        }
        let json = read_json(&file)?;
        Ok(Self(Kind::Fast(Box::new(Fast::new(&name, json, config.unwrap_or_else(|| config_of_class(FAST_CLASS)))?))))
    }

    /// A SentencePiece model, and the tokenizer_config.json beside it.
    fn open_spiece(path: &Path, config: Option<Map<String, Value>>) -> Result<Self> {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
        let json = spiece::to_tokenizer_json(&bytes, config.as_ref())
            .map_err(|problem| Error::tokenizer(name.clone(), problem))?;
        Ok(Self(Kind::Fast(Box::new(Fast::new(&name, json, config.unwrap_or_else(|| config_of_class(FAST_CLASS)))?))))
    }

    /// Reads what [`Tokenizer::to_json`] wrote.
    ///
    /// # Errors
    /// The text is something else.
    pub fn from_json(text: &str) -> Result<Self> {
        let portable = serde_json::from_str(text)
            .map_err(|error| Error::tokenizer("(stored)", format!("not what Quintet stores: {error}")))?;
        match portable {
            Portable::ByT5 => Ok(Self(Kind::ByT5)),
            Portable::Fast { tokenizer, config } => {
                Ok(Self(Kind::Fast(Box::new(Fast::new("(stored)", tokenizer, config)?))))
            }
        }
    }

    /// All of it in one text, from which [`Tokenizer::from_json`] makes an equal one elsewhere.
    pub fn to_json(&self) -> String {
        let portable = match &self.0 {
            Kind::ByT5 => Portable::ByT5,
            Kind::Fast(fast) => Portable::Fast { tokenizer: fast.json.clone(), config: fast.config.clone() },
        };
        serde_json::to_string(&portable).expect("JSON values print")
    }

    /// The tokens of `text` and the end of sequence, at most `max_length` together: what is beyond is cut before the
    /// end of sequence.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    ///
    /// # Panics
    /// When `max_length` is 0.
    pub fn encode(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        assert!(max_length > 0, "no room for the end of sequence");
        let (mut ids, always_ends) = match &self.0 {
            Kind::ByT5 => (byt5::encode(text), false),
            Kind::Fast(fast) => {
                let encoding = fast.tokenizer.encode_fast(text, false).map_err(|error| Error::Tokenize {
                    text: text.chars().take(60).collect(),
                    message: error.to_string(),
                })?;
                (encoding.get_ids().to_vec(), true)
            }
        };
        ids.truncate(max_length - 1);
        // transformers' ByT5Tokenizer does not repeat an end of sequence that the text spells out; its fast ones do.
        if always_ends || ids.last() != Some(&self.eos_id()) {
            ids.push(self.eos_id());
        }
        Ok(ids)
    }

    /// The tokens of `text` alone, however many.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub(crate) fn encode_bare(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, usize::MAX)?;
        ids.pop();
        Ok(ids)
    }

    /// The sentinels `<extra_id_0>`, `<extra_id_1>`, … as far as there are. T5's are the last of the vocabulary, in
    /// descending order; ByT5's are the last too, in ascending order.
    pub fn sentinel_ids(&self) -> Vec<u32> {
        match &self.0 {
            Kind::ByT5 => byt5::sentinels().collect(),
            Kind::Fast(fast) => {
                (0..).map_while(|number| fast.tokenizer.token_to_id(&format!("<extra_id_{number}>"))).collect()
            }
        }
    }

    /// The text of tokens, without special tokens; ids beyond the vocabulary are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.0 {
            Kind::ByT5 => byt5::decode(ids),
            // Its only error is a decoder's that finds a token malformed, which none of the supported ones does.
            Kind::Fast(fast) => fast.tokenizer.decode(ids, true).unwrap_or_default(),
        }
    }

    /// The text of tokens with the sentinels among them, which say what fills which gap of an input that has some.
    pub fn decode_spans(&self, ids: &[u32]) -> String {
        let kept: Vec<u32> = ids.iter().copied().filter(|id| ![self.pad_id(), self.eos_id()].contains(id)).collect();
        self.decode_all(&kept)
    }

    /// The text of tokens with special tokens, for people to see where they are.
    pub(crate) fn decode_all(&self, ids: &[u32]) -> String {
        match &self.0 {
            Kind::ByT5 => byt5::decode_all(ids),
            Kind::Fast(fast) => fast.tokenizer.decode(ids, false).unwrap_or_default(),
        }
    }

    /// One more than the highest id. A model may have more rows than that, but not fewer.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::ByT5 => byt5::VOCAB_SIZE,
            Kind::Fast(fast) => fast.vocab_size,
        }
    }

    /// The padding token, which also starts the decoder.
    pub fn pad_id(&self) -> u32 {
        match &self.0 {
            Kind::ByT5 => byt5::PAD,
            Kind::Fast(fast) => fast.pad_id,
        }
    }

    /// The end of sequence.
    pub fn eos_id(&self) -> u32 {
        match &self.0 {
            Kind::ByT5 => byt5::EOS,
            Kind::Fast(fast) => fast.eos_id,
        }
    }

    /// The unknown token, where there is one.
    pub fn unk_id(&self) -> Option<u32> {
        match &self.0 {
            Kind::ByT5 => Some(byt5::UNK),
            Kind::Fast(fast) => fast.unk_id,
        }
    }

    /// Writes the files that transformers' `AutoTokenizer.from_pretrained(directory)` reads.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<()> {
        let config = match &self.0 {
            Kind::ByT5 => config_of_class(BYT5_CLASS),
            Kind::Fast(fast) => {
                write_json(&directory.join(TOKENIZER_FILE), &fast.json)?;
                fast.config.clone()
            }
        };
        let special_tokens: Map<String, Value> = ["pad_token", "eos_token", "unk_token"]
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), Value::from(token_content(config.get(key)?)?))))
            .collect();
        write_json(&directory.join(CONFIG_FILE), &config)?;
        write_json(&directory.join(SPECIAL_TOKENS_FILE), &special_tokens)
    }
}

impl Fast {
    /// `name` is how messages call it.
    fn new(name: &str, json: Map<String, Value>, config: Map<String, Value>) -> Result<Self> {
        // The library takes for granted that parts of a file fit each other, and panics where they do not. After that
        // nothing of it is used again.
        catch_unwind(AssertUnwindSafe(|| Self::checked(name, json, config)))
            .unwrap_or_else(|_| Err(Error::tokenizer(name, "not a tokenizer.json: its parts do not fit each other")))
    }

    fn checked(name: &str, mut json: Map<String, Value>, config: Map<String, Value>) -> Result<Self> {
        let broken = |error: &dyn std::fmt::Display| Error::tokenizer(name, format!("not a tokenizer.json: {error}"));
        // Length and padding are the caller's, whatever the file was saved with.
        json.insert("truncation".to_owned(), Value::Null);
        json.insert("padding".to_owned(), Value::Null);
        let parse = |json: &Map<String, Value>| {
            let text = serde_json::to_string(json).expect("JSON values print");
            tokenizers::Tokenizer::from_str(&text).map_err(|error| broken(&error))
        };
        let mut tokenizer = parse(&json)?;
        let id = |key: &str, default: &str| {
            let token = config.get(key).and_then(token_content).unwrap_or(default);
            (token.to_owned(), tokenizer.token_to_id(token))
        };
        let required = |(token, id): (String, Option<u32>), what: &str| {
            let message = format!("has no {what} token {token:?}, which T5 needs; name it in {CONFIG_FILE}");
            id.map(|id| (token, id)).ok_or_else(|| Error::tokenizer(name, message))
        };
        let (_, pad_id) = required(id("pad_token", PAD_TOKEN), "padding")?;
        let (eos_token, eos_id) = required(id("eos_token", EOS_TOKEN), "end-of-sequence")?;
        let (_, unk_id) = id("unk_token", UNK_TOKEN);
        if !ends_with(&tokenizer, eos_id) {
            json.insert("post_processor".to_owned(), eos_template(&eos_token, eos_id));
            tokenizer = parse(&json)?;
        }
        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { tokenizer, json, config, pad_id, eos_id, unk_id, vocab_size })
    }
}

/// Whether the tokenizer by itself appends `eos_id` and nothing else, so that transformers' tokens equal ours.
fn ends_with(tokenizer: &tokenizers::Tokenizer, eos_id: u32) -> bool {
    let encode = |special| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    matches!((encode(false), encode(true)), (Ok(bare), Ok(ended)) if ended == [&bare[..], &[eos_id]].concat())
}

/// A post-processor that appends the end of sequence.
fn eos_template(token: &str, id: u32) -> Value {
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let eos = json!({"SpecialToken": {"id": token, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [sequence("A"), eos],
        "pair": [sequence("A"), eos, sequence("B"), eos],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}

/// tokenizer_config.json of a tokenizer that came without. No `model_max_length`: T5's positions are relative.
fn config_of_class(class: &str) -> Map<String, Value> {
    object([
        ("tokenizer_class", class.into()),
        ("pad_token", PAD_TOKEN.into()),
        ("eos_token", EOS_TOKEN.into()),
        ("unk_token", UNK_TOKEN.into()),
        ("clean_up_tokenization_spaces", false.into()),
    ])
}

fn object<const N: usize>(entries: [(&str, Value); N]) -> Map<String, Value> {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// A special token as tokenizer_config.json writes it: a string, or an object with its `content`.
fn token_content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::tokenizer(path.display().to_string(), format!("broken JSON: {error}")))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).expect("JSON values print");
    text.push('\n');
    fs::write(path, text).map_err(|error| Error::io(path, error))
}
