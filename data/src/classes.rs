//! Targets as classes, for models that tell classes apart.

use std::collections::BTreeSet;

use crate::dataset::Dataset;
use crate::error::{Error, Result};

/// More different targets than this are no classes.
const CLASSES_MAX: usize = 10_000;

/// The different targets of a data set, numbered from 0: those that are all numbers by size, others in alphabetical
/// order. So the numbers depend on which targets there are, and on nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Classes(Vec<String>);

impl Classes {
    /// The classes of a data set's targets.
    ///
    /// # Errors
    /// More different targets than can be classes.
    pub fn of(dataset: &Dataset) -> Result<Self> {
        let mut targets = BTreeSet::new();
        for example in dataset.examples() {
            if !targets.contains(&*example.target) {
                targets.insert(example.target.into_owned());
            }
            if targets.len() > CLASSES_MAX {
                let message = format!("has more than {CLASSES_MAX} different texts; render the class alone");
                return Err(Error::setting("data.target", message));
            }
        }
        let mut names: Vec<String> = targets.into_iter().collect();
        let numbers: Option<Vec<f64>> = names.iter().map(|name| name.parse().ok()).collect();
        if numbers.is_some() {
            let number = |name: &String| name.parse().unwrap_or(0.0);
            names.sort_by(|a, b| f64::total_cmp(&number(a), &number(b)));
        }
        Ok(Self(names))
    }

    /// Their names; a class's number is its index.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// The number of a target; none if it is none of the classes.
    pub fn id(&self, target: &str) -> Option<usize> {
        self.0.iter().position(|name| name == target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Splits;

    fn classes(targets: &[&str]) -> Classes {
        let directory = tempfile::tempdir().unwrap();
        let lines: String = targets.iter().map(|target| format!("{{\"y\": {target:?}}}\n")).collect();
        std::fs::write(directory.path().join("t.jsonl"), lines).unwrap();
        let config = toml::from_str("train = \"t.jsonl\"\ninput = \"{y}\"\ntarget = \"{y}\"").unwrap();
        Classes::of(&Splits::load(&config, directory.path(), 0).unwrap().train).unwrap()
    }

    #[test]
    fn numbers_are_in_order_of_size_and_words_in_that_of_the_alphabet() {
        assert_eq!(classes(&["10", "9", "-1", "9"]).names(), ["-1", "9", "10"]);
        let words = classes(&["positive", "negative", "10", "positive"]);
        assert_eq!(words.names(), ["10", "negative", "positive"]);
        assert_eq!((words.id("negative"), words.id("neutral")), (Some(1), None));
    }
}
