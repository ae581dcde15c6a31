//! Mixtures of several sources: which share of an epoch is whose.

use serde::{Deserialize, Serialize};

use crate::config::{DataConfig, LabelNames, Sample, SourceList};
use crate::error::{Error, Result};
use crate::order::PartOrder;

/// One source of a mixture. What is not given is that of `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureSource {
    /// What reports call it.
    pub name: String,
    /// As `data.train`.
    pub train: SourceList,
    /// As `data.validation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<SourceList>,
    /// As `data.input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// As `data.target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// As `data.where`.
    #[serde(rename = "where", default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// As `data.stratify_by`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify_by: Option<String>,
    /// As `data.max_examples`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_examples: Option<u64>,
    /// As `data.sample`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
    /// As `data.source_prefix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_prefix: Option<String>,
    /// As `data.label_names`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_names: Option<LabelNames>,
    /// Its share of the examples is this over the sum of all; by default proportional to its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
}

impl MixtureSource {
    /// The job as if it had this source alone.
    pub(crate) fn alone(&self, data: &DataConfig) -> DataConfig {
        let own = self.clone();
        DataConfig {
            train: own.train,
            validation: own.validation,
            input: own.input.unwrap_or_else(|| data.input.clone()),
            target: own.target.unwrap_or_else(|| data.target.clone()),
            filter: own.filter.or_else(|| data.filter.clone()),
            stratify_by: own.stratify_by.or_else(|| data.stratify_by.clone()),
            max_examples: own.max_examples.or(data.max_examples),
            sample: own.sample.or(data.sample),
            source_prefix: own.source_prefix.unwrap_or_else(|| data.source_prefix.clone()),
            label_names: own.label_names.unwrap_or_else(|| data.label_names.clone()),
            mixture: Vec::new(),
            mixture_limit: None,
            mixture_temperature: None,
            ..data.clone()
        }
    }
}

/// Checks what concerns the mixture as a whole.
pub(crate) fn validate(config: &DataConfig) -> Result<()> {
    let setting = |key, message: &str| Err(Error::setting(key, message));
    if config.mixture.is_empty() {
        if config.mixture_temperature.is_some() {
            return setting("data.mixture_temperature", "has no effect without data.mixture");
        }
        return match config.mixture_limit {
            Some(_) => setting("data.mixture_limit", "has no effect without data.mixture"),
            None => Ok(()),
        };
    }
    if !config.train.entries().is_empty() || config.validation.is_some() {
        return setting("data.mixture", "every source has its own train and validation; remove those of [data]");
    }
    let with_rate = config.mixture.iter().filter(|source| source.rate.is_some()).count();
    if with_rate != 0 && with_rate != config.mixture.len() {
        return setting("data.mixture", "some sources have a rate and some have none; give all or none");
    }
    if with_rate != 0 && (config.mixture_limit.is_some() || config.mixture_temperature.is_some()) {
        return setting("data.mixture", "a rate is given, and a limit or a temperature too; give one of the two");
    }
    for (index, source) in config.mixture.iter().enumerate() {
        if source.name.is_empty() || config.mixture[..index].iter().any(|other| other.name == source.name) {
            return setting("data.mixture", &format!("the name {:?} is empty or there twice", source.name));
        }
        // Written so that NaN fails too.
        if source.rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            return setting("data.mixture", &format!("the rate of {:?} is not a positive number", source.name));
        }
    }
    if config.mixture_temperature.is_some_and(|temperature| !(temperature >= 1.0 && temperature.is_finite())) {
        return setting(
            "data.mixture_temperature",
            "is not a number of 1 or more; 1 is proportional, more is more equal",
        );
    }
    match config.mixture_limit {
        Some(0) => setting("data.mixture_limit", "is 0; give at least 1 example"),
        _ => Ok(()),
    }
}

/// How many of an epoch's positions each source has, given their numbers of examples.
///
/// Raffel et al. (2020), section 3.5.2: the rate of a source is proportional to `min(examples, limit)^(1/temperature)`,
/// or it is given. An epoch has as many positions as the sources have examples, each counted up to the limit; so
/// without limit, temperature and rates every example has one. Each source has at least one.
pub(crate) fn slots(config: &DataConfig, examples: &[u64]) -> Vec<PartOrder> {
    let limit = config.mixture_limit.unwrap_or(u64::MAX);
    let sizes: Vec<u64> = examples.iter().map(|&examples| examples.min(limit)).collect();
    let exponent = 1.0 / config.mixture_temperature.unwrap_or(1.0);
    let given: Option<Vec<f64>> = config.mixture.iter().map(|source| source.rate).collect();
    let is_proportional = given.as_ref().is_none_or(Vec::is_empty) && exponent == 1.0;
    let slots = if is_proportional {
        sizes
    } else {
        let rates = given.unwrap_or_else(|| sizes.iter().map(|&size| (size as f64).powf(exponent)).collect());
        apportion(sizes.iter().sum(), &rates)
    };
    examples.iter().zip(slots).map(|(&examples, slots)| PartOrder { examples, slots }).collect()
}

/// Cuts `total` in proportion to the rates, by largest remainders, but nothing to less than 1.
fn apportion(total: u64, rates: &[f64]) -> Vec<u64> {
    let sum: f64 = rates.iter().sum();
    let exact: Vec<f64> = rates.iter().map(|rate| total as f64 * rate / sum).collect();
    let mut slots: Vec<u64> = exact.iter().map(|&exact| exact as u64).collect();
    let mut by_remainder: Vec<usize> = (0..rates.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let left = total.saturating_sub(slots.iter().sum());
    for &index in by_remainder.iter().cycle().take(left as usize % (rates.len() + 1)) {
        slots[index] += 1;
    }
    slots.iter_mut().for_each(|slots| *slots = (*slots).max(1));
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(settings: &str, rates: &[Option<f64>]) -> DataConfig {
        let mut text = format!("input = \"{{x}}\"\ntarget = \"{{y}}\"\n{settings}\n");
        for (index, rate) in rates.iter().enumerate() {
            let rate = rate.map_or(String::new(), |rate| format!("rate = {rate:?}"));
            text += &format!("[[mixture]]\nname = \"m{index}\"\ntrain = \"{index}.csv\"\n{rate}\n");
        }
        toml::from_str(&text).unwrap()
    }

    fn counts(settings: &str, rates: &[Option<f64>], examples: &[u64]) -> Vec<u64> {
        let config = config(settings, rates);
        config.validate().unwrap();
        slots(&config, examples).into_iter().map(|part| part.slots).collect()
    }

    #[test]
    fn rates_are_those_of_t5() {
        let none = [None, None, None];
        assert_eq!(counts("", &none, &[10, 1000, 90]), [10, 1000, 90]);
        assert_eq!(counts("mixture_limit = 100", &none, &[10, 1000, 90]), [10, 100, 90]);
        // Square roots of 100, 10000 and 900 are 10, 100 and 30; 11000 examples are cut 1 : 10 : 3.
        assert_eq!(counts("mixture_temperature = 2.0", &none, &[100, 10_000, 900]), [786, 7857, 2357]);
        // With the limit first: 10, 10 and 10 of 300.
        assert_eq!(counts("mixture_temperature = 2.0\nmixture_limit = 100", &none, &[100, 10_000, 900]), [100; 3]);
        assert_eq!(counts("", &[Some(3.0), Some(1.0)], &[50, 50]), [75, 25]);
        assert_eq!(counts("", &[Some(1e9), Some(1.0)], &[50, 50]), [100, 1]);
    }

    #[test]
    fn slots_add_up() {
        for rates in [[0.1, 0.2, 0.7], [1.0, 1.0, 1.0], [1e-3, 1.0, 1e3]] {
            for total in [7_u64, 100, 12_345] {
                let slots = apportion(total, &rates);
                assert!(slots.iter().sum::<u64>().abs_diff(total) <= 2, "{slots:?} of {total}");
                let sum: f64 = rates.iter().sum();
                assert!(
                    slots
                        .iter()
                        .zip(rates)
                        .all(|(&slots, rate)| (slots as f64 - total as f64 * rate / sum).abs() <= 1.0)
                );
            }
        }
    }

    #[test]
    fn bad_mixtures_are_named() {
        let message =
            |settings: &str, rates: &[Option<f64>]| config(settings, rates).validate().unwrap_err().to_string();
        for (settings, rates, expected) in [
            ("train = \"a.csv\"", &[None][..], "data.mixture: every source has its own train"),
            ("", &[None, Some(1.0)], "data.mixture: some sources have a rate and some have none"),
            ("mixture_limit = 5", &[Some(1.0)], "data.mixture: a rate is given, and a limit"),
            ("", &[Some(0.0)], "data.mixture: the rate of \"m0\" is not a positive number"),
            ("mixture_temperature = 0.5", &[None], "data.mixture_temperature: is not a number of 1 or more"),
            ("mixture_limit = 0", &[None], "data.mixture_limit: is 0"),
            ("train = \"a.csv\"\nmixture_limit = 5", &[], "data.mixture_limit: has no effect without data.mixture"),
            ("train = \"a.csv\"\nmixture_temperature = 2.0", &[], "data.mixture_temperature: has no effect"),
        ] {
            let message = message(settings, rates);
            assert!(message.starts_with(expected), "{message}");
        }
        let mut twice = config("", &[None, None]);
        twice.mixture[1].name = "m0".to_owned();
        assert_eq!(twice.validate().unwrap_err().to_string(), "data.mixture: the name \"m0\" is empty or there twice");
    }
}
