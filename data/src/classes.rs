//! Targets as classes, for models that tell classes apart.

use std::collections::{BTreeSet, HashMap};

use crate::dataset::Dataset;
use crate::error::{Error, Result};

/// More different targets than this are no classes.
const CLASSES_MAX: usize = 1 << 12;

/// The names of classes; a class's number is its index.
#[derive(Clone, Debug, PartialEq)]
pub struct Classes {
    names: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Classes {
    /// Classes of these names, in this order.
    pub fn new(names: Vec<String>) -> Self {
        let ids = (0..).zip(&names).map(|(id, name)| (name.clone(), id)).collect();
        Self { names, ids }
    }

    /// The different targets of a data set: those that are all numbers by size, others in alphabetical order. So the
    /// numbers depend on which targets there are, and on nothing else.
    ///
    /// # Errors
    /// Fewer or more different targets than can be classes.
    pub fn of(dataset: &Dataset) -> Result<Self> {
        let mut targets = BTreeSet::new();
        for target in dataset.targets() {
            if !targets.contains(&*target) {
                targets.insert(target.into_owned());
            }
            if targets.len() > CLASSES_MAX {
                let message = format!("has more than {CLASSES_MAX} different texts; render the class alone");
                return Err(Error::setting("data.target", message));
            }
        }
        let mut names: Vec<String> = targets.into_iter().collect();
        if let [only] = names.as_slice() {
            let message = format!("is {:?} in every example; a classifier needs at least two classes", start_of(only));
            return Err(Error::setting("data.target", message));
        }
        let numbers: Option<Vec<f64>> = names.iter().map(|name| name.parse().ok()).collect();
        if numbers.is_some() {
            let number = |name: &String| name.parse().unwrap_or(0.0);
            names.sort_by(|a, b| f64::total_cmp(&number(a), &number(b)));
        }
        Ok(Self::new(names))
    }

    /// In the order of their numbers.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The number of a target; none if it is none of the classes.
    pub fn id(&self, target: &str) -> Option<u32> {
        self.ids.get(target).copied()
    }

    /// The number of an example's target.
    pub(crate) fn id_in(&self, dataset: &Dataset, index: u64) -> Result<u32> {
        let target = dataset.target(index);
        self.id(&target).ok_or_else(|| self.unknown(index, &target, "data.target"))
    }

    /// Finds a target that is no class, of what the setting `key` named.
    ///
    /// # Errors
    /// The first such.
    pub fn check(&self, dataset: &Dataset, key: &'static str) -> Result<()> {
        match (0..).zip(dataset.targets()).find(|(_, target)| self.id(target).is_none()) {
            None => Ok(()),
            Some((index, target)) => Err(self.unknown(index, &target, key)),
        }
    }

    fn unknown(&self, index: u64, target: &str, key: &'static str) -> Error {
        let (number, target) = (index + 1, start_of(target));
        Error::setting(key, format!("example {number} has the class {target:?}, and the model has {}", self.listed()))
    }

    fn listed(&self) -> String {
        const SHOWN: usize = 8;
        let shown: Vec<String> = self.names.iter().take(SHOWN).map(|name| format!("{:?}", start_of(name))).collect();
        let rest = self.names.len().saturating_sub(SHOWN);
        let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("{}{rest}", shown.join(", "))
    }
}

/// What of a text fits into a message.
fn start_of(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Splits;

    fn dataset(targets: &[&str]) -> Dataset {
        let directory = tempfile::tempdir().unwrap();
        let lines: String = targets.iter().map(|target| format!("{{\"y\": {target:?}}}\n")).collect();
        std::fs::write(directory.path().join("t.jsonl"), lines).unwrap();
        let config = toml::from_str("train = \"t.jsonl\"\ninput = \"{y}\"\ntarget = \"{y}\"").unwrap();
        Splits::load(&config, directory.path(), 0).unwrap().train
    }

    fn classes(targets: &[&str]) -> Classes {
        Classes::of(&dataset(targets)).unwrap()
    }

    #[test]
    fn numbers_are_in_order_of_size_and_words_in_that_of_the_alphabet() {
        assert_eq!(classes(&["10", "9", "-1", "9"]).names(), ["-1", "9", "10"]);
        let words = classes(&["positive", "negative", "10", "positive"]);
        assert_eq!(words.names(), ["10", "negative", "positive"]);
        assert_eq!((words.id("negative"), words.id("neutral")), (Some(1), None));
    }
    #[test]
    fn what_is_no_class_is_named() {
        let classes = classes(&["good", "bad"]);
        classes.check(&dataset(&["bad", "bad"]), "data.validation").unwrap();
        let error = classes.check(&dataset(&["bad", "so-so"]), "data.validation").unwrap_err();
        assert_eq!(
            error.to_string(),
            "data.validation: example 2 has the class \"so-so\", and the model has \"bad\", \"good\""
        );
        let error = Classes::of(&dataset(&["good", "good"])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "data.target: is \"good\" in every example; a classifier needs at least two classes"
        );
    }
}
