//! The `[data]` table of the job file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::filter::Filter;
use crate::mixture::{self, MixtureSource};
use crate::objective::{self, DenoiserConfig, Objective};
use crate::template::Template;

/// One or several sources: in the job file a string or a list of strings. Each is a path, a glob such as
/// `data/*.jsonl`, a folder of a data set (`folder` or `folder:split`), or `builtin:cmudict`.
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

impl Default for SourceList {
    /// None.
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<&str> for SourceList {
    fn from(entry: &str) -> Self {
        Self::One(entry.to_owned())
    }
}

/// The names of a field's classes, by field: 0 is the first of its list.
pub type LabelNames = BTreeMap<String, Vec<String>>;

/// How many examples to take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number of examples, or a fraction such as 0.1")]
pub enum Sample {
    /// So many.
    Count(u64),
    /// This part of them, between 0 and 1.
    Fraction(f64),
}

/// The `[data]` table of the job file: where examples come from and how they become input and target text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What to train on; or `mixture`. Relative paths are relative to the folder the caller names.
    #[serde(default)]
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
    #[serde(default)]
    pub input: String,
    /// Template of the target text; span corruption makes its own.
    #[serde(default)]
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
    /// Records that do not fulfil this condition are left out.
    #[serde(rename = "where", default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Names that fields with class numbers have in templates.
    #[serde(default, skip_serializing_if = "LabelNames::is_empty")]
    pub label_names: LabelNames,
    /// Train on the first so many examples only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_examples: Option<u64>,
    /// Train on so many examples, or such a part, chosen by the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
    /// Text in front of every input.
    #[serde(default)]
    pub source_prefix: String,
    /// So many training examples stand in front of every input.
    #[serde(default)]
    pub num_shots: usize,
    /// Template of each of them over its `input` and `target`.
    #[serde(default = "default_shot_template")]
    pub shot_template: String,
    /// What is learned from an example.
    #[serde(default)]
    pub objective: Objective,
    /// Of span corruption: the part of a text that is masked; between 0 and 1.
    #[serde(default = "objective::default_noise_density")]
    pub noise_density: f64,
    /// Of span corruption: the mean length of what is masked at a place, in tokens; at least 1.
    #[serde(default = "objective::default_mean_noise_span_length")]
    pub mean_noise_span_length: f64,
    /// Of UL2: what an example may be made into; the paper's seven if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denoisers: Vec<DenoiserConfig>,
    /// Of UL2: whether inputs begin with the paper's mode tokens.
    #[serde(default)]
    pub mode_tokens: bool,
    /// Train on several sources, in proportions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<MixtureSource>,
    /// Of a mixture: a source counts as at most so many examples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture_limit: Option<u64>,
    /// Of a mixture: 1 is proportional; the higher, the more alike are the rates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture_temperature: Option<f64>,
    /// The folder of what is prepared ahead, and of examples that do not fit into memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
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

fn default_shot_template() -> String {
    "{input}\n{target}\n\n".to_owned()
}

/// Beyond this a length is a slip of the keyboard: attention is quadratic in it.
const LENGTH_MAX: usize = 1 << 20;

impl DataConfig {
    /// Checks every range and combination, and that the templates parse; opens no file.
    ///
    /// # Errors
    /// The first setting that is wrong, named as in the job file.
    pub fn validate(&self) -> Result<()> {
        mixture::validate(self)?;
        self.tasks().iter().try_for_each(Self::validate_task)?;
        check_length("data.max_source_length", self.max_source_length)?;
        check_length("data.max_target_length", self.max_target_length)?;
        check_filter("data.min_source_characters", self.min_source_characters, self.max_source_characters)?;
        check_filter("data.min_target_characters", self.min_target_characters, self.max_target_characters)?;
        objective::validate(self)
    }

    /// The job for each source of its mixture alone; itself where it has none.
    pub(crate) fn tasks(&self) -> Vec<Self> {
        match self.mixture.as_slice() {
            [] => vec![self.clone()],
            sources => sources.iter().map(|source| source.alone(self)).collect(),
        }
    }

    fn validate_task(&self) -> Result<()> {
        check_sources("data.train", &self.train)?;
        if let Some(validation) = &self.validation {
            check_sources("data.validation", validation)?;
        }
        self.check_split()?;
        self.input_template()?;
        self.target_template()?;
        self.filter()?;
        self.shot_template()?;
        self.check_sample()?;
        for (field, names) in &self.label_names {
            if names.is_empty() {
                return Err(Error::setting("data.label_names", format!("{field:?} has no names")));
            }
        }
        Ok(())
    }

    fn check_sample(&self) -> Result<()> {
        match self.sample {
            Some(Sample::Count(0)) => return Err(Error::setting("data.sample", "is 0; give at least 1 example")),
            // Written so that NaN fails too.
            Some(Sample::Fraction(fraction)) if !(fraction > 0.0 && fraction < 1.0) => {
                let message =
                    format!("{fraction:?} is not a fraction between 0 and 1; a number of examples has no point");
                return Err(Error::setting("data.sample", message));
            }
            _ => {}
        }
        match self.max_examples {
            Some(0) => Err(Error::setting("data.max_examples", "is 0; give at least 1 example")),
            _ => Ok(()),
        }
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

    /// The parsed template of the target text; none where the objective makes targets.
    ///
    /// # Errors
    /// The template does not parse, or is one too many.
    pub fn target_template(&self) -> Result<Option<Template>> {
        if self.objective != Objective::Seq2Seq {
            return match self.target.is_empty() {
                true => Ok(None),
                false => {
                    Err(Error::setting("data.target", "data.objective makes the targets from the inputs; remove this"))
                }
            };
        }
        Template::parse(&self.target).map(Some).map_err(|source| Error::Template { key: "data.target", source })
    }

    /// The parsed template of an example in front of an input.
    ///
    /// # Errors
    /// The template does not parse or has other fields than `input` and `target`.
    pub fn shot_template(&self) -> Result<Template> {
        let key = "data.shot_template";
        let template = Template::parse(&self.shot_template).map_err(|source| Error::Template { key, source })?;
        if let Some(other) = template.fields().find(|field| !["input", "target"].contains(field)) {
            return Err(Error::setting(key, format!("no field {other:?}; it has: input, target")));
        }
        Ok(template)
    }

    /// The parsed condition on records.
    ///
    /// # Errors
    /// It does not parse.
    pub fn filter(&self) -> Result<Option<Filter>> {
        Ok(self.filter.as_deref().map(Filter::parse).transpose()?)
    }
}

fn check_sources(key: &'static str, sources: &SourceList) -> Result<()> {
    let entries = sources.entries();
    if entries.is_empty() || entries.iter().any(|entry| entry.is_empty()) {
        return Err(Error::setting(
            key,
            "is empty; give a path, a glob, a folder, a list of these, or \"builtin:cmudict\"",
        ));
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
            ("max_examples = 0", "data.max_examples: is 0; give at least 1 example"),
            ("sample = 0", "data.sample: is 0; give at least 1 example"),
            ("sample = 1.0", "data.sample: 1.0 is not a fraction between 0 and 1; a number of examples has no point"),
            ("label_names = { x = [] }", "data.label_names: \"x\" has no names"),
            ("shot_template = \"{x}\"", "data.shot_template: no field \"x\"; it has: input, target"),
            ("where = \"x >\"", "data.where: expected a field or a value, found the end at character 4 of \"x >\""),
            (
                "validation = []",
                "data.validation: is empty; give a path, a glob, a folder, a list of these, or \"builtin:cmudict\"",
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
