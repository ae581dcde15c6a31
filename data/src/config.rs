//! The `[data]` table of the job file.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::template::Template;

/// One or several sources: in the job file a string or a list of strings. Each is a path, a glob such as
/// `data/*.jsonl`, or `builtin:cmudict`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path, a glob, \"builtin:cmudict\", or a list of these")]
pub enum SourceList {
    /// A single string.
    One(String),
    /// A list, read in this order.
    Many(Vec<String>),
}

impl SourceList {
    /// The entries as written.
    pub fn entries(&self) -> &[String] {
        match self {
            Self::One(entry) => std::slice::from_ref(entry),
            Self::Many(entries) => entries,
        }
    }
}

impl From<&str> for SourceList {
    fn from(entry: &str) -> Self {
        Self::One(entry.to_owned())
    }
}

/// The `[data]` table of the job file: where examples come from and how they become input and target text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What to train on. Relative paths are relative to the folder the caller names.
    pub train: SourceList,
    /// What to evaluate on; or `validation_split`; or neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<SourceList>,
    /// The fraction of the training examples to hold out for evaluation, chosen by the seed; between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_split: Option<f64>,
    /// With `validation_split`: a field of the records whose every value is held out in the same proportion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify_by: Option<String>,
    /// Template of the input text over a record's fields, e.g. `review: {title}, {stars} Stars!`.
    pub input: String,
    /// Template of the target text.
    pub target: String,
    /// Longest input in tokens, end of sequence included; longer ones are cut.
    #[serde(default = "default_max_source_length")]
    pub max_source_length: usize,
    /// Longest target in tokens, end of sequence included; longer ones are cut.
    #[serde(default = "default_max_target_length")]
    pub max_target_length: usize,
    /// Whether every epoch has its own random order; otherwise each is in file order.
    #[serde(default = "default_shuffle")]
    pub shuffle: bool,
    /// Examples with a shorter input text, in characters, are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_source_characters: Option<usize>,
    /// Examples with a longer input text, in characters, are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_source_characters: Option<usize>,
    /// Examples with a shorter target text, in characters, are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_target_characters: Option<usize>,
    /// Examples with a longer target text, in characters, are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_target_characters: Option<usize>,
}

fn default_max_source_length() -> usize {
    512
}

fn default_max_target_length() -> usize {
    128
}

fn default_shuffle() -> bool {
    true
}

/// Beyond this a length is a slip of the keyboard: attention is quadratic in it.
const LENGTH_MAX: usize = 1 << 20;

impl DataConfig {
    /// Checks every range and combination, and that the templates parse; opens no file.
    ///
    /// # Errors
    /// The first setting that is wrong, named as in the job file.
    pub fn validate(&self) -> Result<()> {
        check_sources("data.train", &self.train)?;
        if let Some(validation) = &self.validation {
            check_sources("data.validation", validation)?;
        }
        self.check_split()?;
        self.input_template()?;
        self.target_template()?;
        check_length("data.max_source_length", self.max_source_length)?;
        check_length("data.max_target_length", self.max_target_length)?;
        check_filter("data.min_source_characters", self.min_source_characters, self.max_source_characters)?;
        check_filter("data.min_target_characters", self.min_target_characters, self.max_target_characters)
    }

    fn check_split(&self) -> Result<()> {
        if let Some(fraction) = self.validation_split {
            // Written so that NaN fails too.
            if !(fraction > 0.0 && fraction < 1.0) {
                let message = format!("{fraction} is not a fraction between 0 and 1, such as 0.05");
                return Err(Error::setting("data.validation_split", message));
            }
            if self.validation.is_some() {
                let message = "data.validation is set as well; give one of the two";
                return Err(Error::setting("data.validation_split", message));
            }
        } else if self.stratify_by.is_some() {
            let message = "has no effect without data.validation_split; set that or remove this";
            return Err(Error::setting("data.stratify_by", message));
        }
        Ok(())
    }

    /// The parsed template of the input text.
    ///
    /// # Errors
    /// The template does not parse.
    pub fn input_template(&self) -> Result<Template> {
        Template::parse(&self.input).map_err(|source| Error::Template { key: "data.input", source })
    }

    /// The parsed template of the target text.
    ///
    /// # Errors
    /// The template does not parse.
    pub fn target_template(&self) -> Result<Template> {
        Template::parse(&self.target).map_err(|source| Error::Template { key: "data.target", source })
    }
}

fn check_sources(key: &'static str, sources: &SourceList) -> Result<()> {
    let entries = sources.entries();
    if entries.is_empty() || entries.iter().any(|entry| entry.is_empty()) {
        return Err(Error::setting(key, "is empty; give a path, a glob, a list of these, or \"builtin:cmudict\""));
    }
    Ok(())
}

fn check_length(key: &'static str, length: usize) -> Result<()> {
    // Two, so that one token stays beside the end of sequence.
    if !(2..=LENGTH_MAX).contains(&length) {
        return Err(Error::setting(key, format!("{length} is out of range; give 2 to {LENGTH_MAX} tokens")));
    }
    Ok(())
}

fn check_filter(key: &'static str, min: Option<usize>, max: Option<usize>) -> Result<()> {
    if let (Some(min), Some(max)) = (min, max)
        && min > max
    {
        return Err(Error::setting(key, format!("{min} is more than the maximum, {max}; no text would be left")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "train = \"a.jsonl\"\ninput = \"{x}\"\ntarget = \"{y}\"\n";

    fn parse(extra: &str) -> DataConfig {
        toml::from_str(&format!("{MINIMAL}{extra}")).unwrap()
    }

    #[test]
    fn defaults_are_those_documented() {
        let config = parse("");
        assert_eq!(
            (config.max_source_length, config.max_target_length, config.shuffle, &config.validation),
            (512, 128, true, &None)
        );
        config.validate().unwrap();
    }

    #[test]
    fn survives_a_round_trip() {
        let config = parse("validation_split = 0.25\nstratify_by = \"stars\"\nmax_target_characters = 9\n");
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<DataConfig>(&text).unwrap(), config);
    }

    #[test]
    fn sources_are_a_string_or_a_list() {
        let config: DataConfig =
            toml::from_str("train = [\"a.csv\", \"b.csv\"]\ninput = \"{x}\"\ntarget = \"{y}\"").unwrap();
        assert_eq!(config.train.entries(), ["a.csv", "b.csv"]);
        let error = toml::from_str::<DataConfig>("train = 3\ninput = \"\"\ntarget = \"\"").unwrap_err();
        assert!(error.message().contains("expected a path"), "{error}");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = toml::from_str::<DataConfig>(&format!("{MINIMAL}shufle = true")).unwrap_err();
        assert!(error.message().contains("unknown field `shufle`"), "{error}");
    }

    #[test]
    fn bad_settings_are_named() {
        for (extra, message) in [
            ("validation_split = 1.0", "data.validation_split: 1 is not a fraction between 0 and 1, such as 0.05"),
            ("validation_split = nan", "data.validation_split: NaN is not a fraction between 0 and 1, such as 0.05"),
            (
                "validation = \"v.csv\"\nvalidation_split = 0.5",
                "data.validation_split: data.validation is set as well; give one of the two",
            ),
            (
                "stratify_by = \"stars\"",
                "data.stratify_by: has no effect without data.validation_split; set that or remove this",
            ),
            ("max_source_length = 1", "data.max_source_length: 1 is out of range; give 2 to 1048576 tokens"),
            (
                "max_target_length = 2000000",
                "data.max_target_length: 2000000 is out of range; give 2 to 1048576 tokens",
            ),
            (
                "min_source_characters = 5\nmax_source_characters = 4",
                "data.min_source_characters: 5 is more than the maximum, 4; no text would be left",
            ),
            (
                "validation = []",
                "data.validation: is empty; give a path, a glob, a list of these, or \"builtin:cmudict\"",
            ),
        ] {
            let error = parse(extra).validate().unwrap_err();
            assert_eq!(error.to_string(), message);
            assert!(error.is_user_error());
        }
    }

    #[test]
    fn templates_are_checked_at_the_door() {
        let mut config = parse("");
        config.target = "{y".to_owned();
        let error = config.validate().unwrap_err();
        assert!(error.to_string().starts_with("data.target: "), "{error}");
    }
}
