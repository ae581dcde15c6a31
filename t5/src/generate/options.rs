//! How to generate, in the keys of Hugging Face's `generation_config.json`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hub_files::GENERATION_FILE;
use crate::{Config, Error, Result};

/// What a file, a job or a command line says about generation; what it leaves open, another may say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationOptions {
    pub max_new_tokens: Option<usize>,
    /// Of the decoder's tokens, the start token included; `max_new_tokens` goes before it.
    pub max_length: Option<usize>,
    pub min_new_tokens: Option<usize>,
    /// As `max_length`.
    pub min_length: Option<usize>,
    pub num_beams: Option<usize>,
    pub num_return_sequences: Option<usize>,
    pub length_penalty: Option<f64>,
    pub early_stopping: Option<EarlyStopping>,
    pub no_repeat_ngram_size: Option<usize>,
    pub repetition_penalty: Option<f32>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub seed: Option<u64>,
    pub eos_token_id: Option<TokenIds>,
}

/// When a beam search ends for a source that has as many finished hypotheses as beams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When the best unfinished one, were it to end here, would be no better than the worst finished one (`false`).
    Heuristic,
    /// At once (`true`).
    Always,
    /// When no unfinished one can become better (`"never"`).
    Never,
}

impl TryFrom<Value> for EarlyStopping {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match value {
            Value::Bool(false) => Ok(EarlyStopping::Heuristic),
            Value::Bool(true) => Ok(EarlyStopping::Always),
            Value::String(text) => text.parse(),
            other => Err(format!("early_stopping = {other} is none of false, true and \"never\"")),
        }
    }
}

impl std::str::FromStr for EarlyStopping {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "false" => Ok(EarlyStopping::Heuristic),
            "true" => Ok(EarlyStopping::Always),
            "never" => Ok(EarlyStopping::Never),
            other => Err(format!("early_stopping = \"{other}\" is none of false, true and \"never\"")),
        }
    }
}

impl Serialize for EarlyStopping {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            EarlyStopping::Heuristic => serializer.serialize_bool(false),
            EarlyStopping::Always => serializer.serialize_bool(true),
            EarlyStopping::Never => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        EarlyStopping::try_from(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// One token or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

/// Keys that change what is generated and are not obeyed, with the values that say nothing.
const UNSUPPORTED: [(&str, &[f64]); 20] = [
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("diversity_penalty", &[0.0]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("min_p", &[0.0]),
    ("num_beam_groups", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("suppress_tokens", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

impl GenerationOptions {
    /// Those of a model directory's `generation_config.json`; none where there is no such file.
    ///
    /// # Errors
    /// A user error where the file is no such configuration, or asks for what is not supported.
    pub fn from_pretrained(directory: &Path) -> Result<Self> {
        let path = directory.join(GENERATION_FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let error = |message: String| Error::File { path: path.clone(), message };
        let text = fs::read_to_string(&path).map_err(|cause| error(format!("cannot read: {cause}")))?;
        let value: Value = serde_json::from_str(&text).map_err(|cause| error(format!("not JSON: {cause}")))?;
        for (key, neutral) in UNSUPPORTED {
            let says_nothing = match &value[key] {
                Value::Null => true,
                Value::Number(number) => number.as_f64().is_some_and(|number| neutral.contains(&number)),
                Value::Array(list) => list.is_empty(),
                _ => false,
            };
            if !says_nothing {
                return Err(error(format!("{key} = {} is not supported; remove it from the file", value[key])));
            }
        }
        serde_json::from_value(value).map_err(|cause| error(format!("not a generation configuration: {cause}")))
    }

    /// These, and `others` where these say nothing.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        // A maximum in either key is a maximum.
        let max_length = if self.max_new_tokens.is_some() { None } else { self.max_length };
        let others_max = if max_length.is_some() { None } else { others.max_new_tokens };
        GenerationOptions {
            max_new_tokens: self.max_new_tokens.or(others_max),
            max_length: max_length.or(others.max_length),
            min_new_tokens: self.min_new_tokens.or(others.min_new_tokens),
            min_length: self.min_length.or(others.min_length),
            num_beams: self.num_beams.or(others.num_beams),
            num_return_sequences: self.num_return_sequences.or(others.num_return_sequences),
            length_penalty: self.length_penalty.or(others.length_penalty),
            early_stopping: self.early_stopping.or(others.early_stopping),
            no_repeat_ngram_size: self.no_repeat_ngram_size.or(others.no_repeat_ngram_size),
            repetition_penalty: self.repetition_penalty.or(others.repetition_penalty),
            do_sample: self.do_sample.or(others.do_sample),
            temperature: self.temperature.or(others.temperature),
            top_k: self.top_k.or(others.top_k),
            top_p: self.top_p.or(others.top_p),
            seed: self.seed.or(others.seed),
            eos_token_id: self.eos_token_id.or(others.eos_token_id),
        }
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// As [`GenerationOptions::resolve`].
    pub fn check_ranges(self) -> Result<()> {
        self.resolve(&Config { vocab_size: usize::MAX >> 16, ..Config::default() }).map(|_| ())
    }

    /// Checks every range and fills in Hugging Face's defaults; but without any maximum there are 64 new tokens at most,
    /// not 19.
    ///
    /// # Errors
    /// A user error that names the option.
    pub fn resolve(self, config: &Config) -> Result<Generation> {
        let max_length = self.max_length.map(|length| length.saturating_sub(1));
        let min_length = self.min_length.map_or(0, |length| length.saturating_sub(1));
        let eos_token_ids = match self.eos_token_id {
            None => vec![config.eos_token_id],
            Some(TokenIds::One(id)) => vec![id],
            Some(TokenIds::Several(ids)) => ids,
        };
        let generation = Generation {
            max_new_tokens: self.max_new_tokens.or(max_length).unwrap_or(64),
            min_new_tokens: self.min_new_tokens.unwrap_or(0).max(min_length),
            num_beams: self.num_beams.unwrap_or(1),
            num_return_sequences: self.num_return_sequences.unwrap_or(1),
            length_penalty: self.length_penalty.unwrap_or(1.0),
            early_stopping: self.early_stopping.unwrap_or(EarlyStopping::Heuristic),
            no_repeat_ngram_size: self.no_repeat_ngram_size.unwrap_or(0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            do_sample: self.do_sample.unwrap_or(false),
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(50),
            top_p: self.top_p.unwrap_or(1.0),
            seed: self.seed.unwrap_or(42),
            eos_token_ids,
        };
        generation.validate(config)?;
        Ok(generation)
    }
}

/// How to generate, with every question answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub max_new_tokens: usize,
    /// No eos before.
    pub min_new_tokens: usize,
    /// 1 is greedy search, or sampling.
    pub num_beams: usize,
    pub num_return_sequences: usize,
    /// A hypothesis of n tokens, eos included, scores `Σ log p / n^length_penalty`.
    pub length_penalty: f64,
    pub early_stopping: EarlyStopping,
    /// No sequence of so many tokens appears twice among the decoder's; 0 bans nothing.
    pub no_repeat_ngram_size: usize,
    /// Divides logits above 0 of tokens that the decoder has seen, and multiplies those below; with beams, log
    /// probabilities.
    pub repetition_penalty: f32,
    pub do_sample: bool,
    /// What logits are divided by before sampling.
    pub temperature: f32,
    /// Sampling is among the most probable so many tokens; 0: among all.
    pub top_k: usize,
    /// … and among the fewest whose probabilities reach this.
    pub top_p: f64,
    pub seed: u64,
    pub eos_token_ids: Vec<u32>,
}

impl Generation {
    /// Candidates that a step of a beam search keeps: enough for all beams to go on if each of the best were to end.
    pub(super) fn beams_to_keep(&self) -> usize {
        (1 + self.eos_token_ids.len()).max(2) * self.num_beams
    }

    fn validate(&self, config: &Config) -> Result<()> {
        let (max, min, beams) = (self.max_new_tokens, self.min_new_tokens, self.num_beams);
        check("max_new_tokens", (1..=1 << 16).contains(&max), max, "1 to 65536")?;
        check("min_new_tokens", min <= max, min, &format!("at most max_new_tokens ({max})"))?;
        check("num_beams", (1..=1024).contains(&beams), beams, "1 to 1024")?;
        let fitting = config.vocab_size * beams / self.beams_to_keep();
        let fits = beams == 1 || beams <= fitting;
        check("num_beams", fits, beams, &format!("at most {fitting} for this vocabulary"))?;
        check("length_penalty", self.length_penalty.is_finite(), self.length_penalty, "a number")?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", penalty > 0.0 && penalty.is_finite(), penalty, "above 0")?;
        let temperature = self.temperature;
        let warm = temperature > 0.0 && temperature.is_finite();
        check("temperature", warm, temperature, "above 0; what is most probable comes without do_sample")?;
        check("top_p", self.top_p > 0.0 && self.top_p <= 1.0, self.top_p, "above 0 and at most 1")?;
        if let Some(&id) = self.eos_token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            check("eos_token_id", false, id, "below the vocabulary's size")?;
        }
        self.validate_sequences()
    }

    fn validate_sequences(&self) -> Result<()> {
        const KEY: &str = "num_return_sequences";
        let (sequences, beams) = (self.num_return_sequences, self.num_beams);
        if self.do_sample && beams > 1 {
            let problem = format!("excludes num_beams = {beams}: sample with one beam, or do not sample");
            return Err(Error::Generation { key: "do_sample", problem });
        }
        check(KEY, (1..=1024).contains(&sequences), sequences, "1 to 1024")?;
        let most = match (self.do_sample, beams) {
            (true, _) => 1024,
            (false, 1) => 1,
            (false, beams) => beams,
        };
        check(
            KEY,
            sequences <= most,
            sequences,
            &format!("at most {most}: greedy search finds one, beams find num_beams"),
        )
    }
}

fn check(key: &'static str, holds: bool, value: impl std::fmt::Display, wanted: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Generation { key, problem: format!("is {value}, must be {wanted}") }) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options(value: Value) -> GenerationOptions {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn defaults_are_those_of_transformers_but_for_the_length() {
        let generation = GenerationOptions::default().resolve(&Config::default()).unwrap();
        assert_eq!((generation.max_new_tokens, generation.min_new_tokens, generation.num_beams), (64, 0, 1));
        assert_eq!((generation.top_k, generation.top_p, generation.temperature), (50, 1.0, 1.0));
        assert_eq!((generation.early_stopping, generation.eos_token_ids), (EarlyStopping::Heuristic, vec![1]));
    }

    #[test]
    fn one_says_what_another_leaves_open() {
        let file = options(json!({
            "max_length": 21, "min_length": 5, "num_beams": 4, "early_stopping": "never", "eos_token_id": [1, 7],
            "pad_token_id": 0, "decoder_start_token_id": 0, "transformers_version": "5.23.0", "top_k": null,
        }));
        let generation = options(json!({"num_beams": 2})).or(file.clone()).resolve(&Config::default()).unwrap();
        assert_eq!((generation.max_new_tokens, generation.min_new_tokens, generation.num_beams), (20, 4, 2));
        assert_eq!((generation.early_stopping, generation.beams_to_keep()), (EarlyStopping::Never, 6));
        let generation = options(json!({"max_new_tokens": 30})).or(file).resolve(&Config::default()).unwrap();
        assert_eq!(generation.max_new_tokens, 30);
        let generation = options(json!({"max_length": 11})).or(options(json!({"max_new_tokens": 30})));
        assert_eq!(generation.resolve(&Config::default()).unwrap().max_new_tokens, 10);
    }

    #[test]
    fn early_stopping_has_three_forms() {
        for text in ["false", "true", "\"never\""] {
            let value: EarlyStopping = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&value).unwrap(), text);
        }
        assert!(serde_json::from_str::<EarlyStopping>("3").is_err());
        assert!("sometimes".parse::<EarlyStopping>().unwrap_err().contains("\"sometimes\""));
    }

    #[test]
    fn every_bad_value_names_its_key() {
        for (bad, key) in [
            (json!({"max_new_tokens": 0}), "max_new_tokens: is 0"),
            (json!({"max_length": 1}), "max_new_tokens: is 0"),
            (json!({"min_new_tokens": 65}), "min_new_tokens: is 65"),
            (json!({"num_beams": 0}), "num_beams: is 0"),
            (json!({"num_beams": 20}), "num_beams: is 20, must be at most 15"),
            (json!({"repetition_penalty": 0.0}), "repetition_penalty: is 0"),
            (json!({"temperature": 0.0}), "temperature: is 0"),
            (json!({"top_p": 2.0}), "top_p: is 2"),
            (json!({"top_p": 0.0}), "top_p: is 0"),
            (json!({"do_sample": true, "num_beams": 2}), "do_sample: excludes num_beams = 2"),
            (json!({"num_return_sequences": 0}), "num_return_sequences: is 0"),
            (json!({"num_return_sequences": 2}), "num_return_sequences: is 2, must be at most 1"),
            (json!({"num_return_sequences": 3, "num_beams": 2}), "num_return_sequences: is 3, must be at most 2"),
            (json!({"eos_token_id": 30}), "eos_token_id: is 30"),
        ] {
            let config = Config { vocab_size: 30, ..Config::default() };
            let error = options(bad.clone()).resolve(&config).expect_err(&bad.to_string());
            assert!(error.is_user_error());
            assert!(error.to_string().contains(key), "{bad}: {error}");
        }
    }

    #[test]
    fn a_file_that_asks_for_what_is_not_supported_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("generation_config.json");
        assert_eq!(GenerationOptions::from_pretrained(directory.path()).unwrap(), GenerationOptions::default());
        fs::write(&path, r#"{"num_beams": 4, "typical_p": 1.0, "forced_eos_token_id": null, "bad_words_ids": []}"#)
            .unwrap();
        assert_eq!(GenerationOptions::from_pretrained(directory.path()).unwrap().num_beams, Some(4));
        for (text, want) in [
            (r#"{"forced_bos_token_id": 5}"#, "forced_bos_token_id = 5 is not supported"),
            (r#"{"num_beams": "four"}"#, "not a generation configuration"),
            ("{", "not JSON"),
        ] {
            fs::write(&path, text).unwrap();
            let error = GenerationOptions::from_pretrained(directory.path()).unwrap_err();
            assert!(error.is_user_error() && error.to_string().contains(want), "{error}");
        }
    }
}
