//! Rendered examples, and how training and validation are told apart.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::{DataConfig, SourceList};
use crate::error::{Error, Result};
use crate::order::mix;
use crate::source::resolve_sources;
use crate::template::{Template, text_of};

/// Keeps the split's choices apart from the order's, which mix the same seed.
const SPLIT_SALT: u64 = 0x7370_6c69_745f_6b65;

/// An example as text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Example<'a> {
    /// What the encoder reads.
    pub input: &'a str,
    /// What the decoder is to write.
    pub target: &'a str,
}

/// Rendered examples in file order, in one buffer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    text: String,
    /// Where every input and every target ends in `text`: two bounds an example.
    ends: Vec<usize>,
}

impl Dataset {
    /// Reads and renders the examples of `sources`; relative paths are relative to `base`.
    ///
    /// # Errors
    /// A source that cannot be read or a record that lacks a template's field, by file and line.
    pub fn load(sources: &SourceList, input: &Template, target: &Template, base: &Path) -> Result<Self> {
        let mut dataset = Self::default();
        let renderer = Renderer { input, target, filter: LengthFilter::default(), class_field: None };
        renderer.render(sources, base, |example, _| dataset.push(example))?;
        Ok(dataset)
    }

    fn push(&mut self, example: Example<'_>) {
        for text in [example.input, example.target] {
            self.text.push_str(text);
            self.ends.push(self.text.len());
        }
    }

    /// The number of examples.
    pub fn len(&self) -> u64 {
        self.ends.len() as u64 / 2
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The example `index`, from 0, in file order.
    ///
    /// # Panics
    /// When there is no such example.
    pub fn example(&self, index: u64) -> Example<'_> {
        assert!(index < self.len(), "example {index} of {}", self.len());
        let i = 2 * index as usize;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        Example { input: &self.text[start..self.ends[i]], target: &self.text[self.ends[i]..self.ends[i + 1]] }
    }

    /// All examples in file order.
    pub fn examples(&self) -> impl Iterator<Item = Example<'_>> {
        (0..self.len()).map(|index| self.example(index))
    }

    /// Every input and every target: what a tokenizer is trained on.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.examples().flat_map(|example| [example.input, example.target])
    }

    /// A digest (BLAKE3, hexadecimal) of all examples in order: equal digests, equal training data.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for text in self.texts() {
            // Length first, so that text cannot move between fields unnoticed.
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// The examples of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Splits {
    /// To train on; never empty.
    pub train: Dataset,
    /// To evaluate on, if the job names any; never empty.
    pub validation: Option<Dataset>,
}

impl Splits {
    /// Of both parts together: equal on two machines exactly if their examples are.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.train.fingerprint().as_bytes());
        if let Some(validation) = &self.validation {
            hasher.update(validation.fingerprint().as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Reads and renders a job's examples, drops those that the length filters exclude, and holds a part out for
    /// validation if the job says so. Relative paths are relative to `base`.
    ///
    /// Of n examples, `round(fraction · n)` are held out (with `stratify_by`, of every class on its own), but at least
    /// one, and at least one stays. Which ones depends on the seed and n alone; both parts keep file order.
    ///
    /// # Errors
    /// A wrong setting, a source that cannot be read, a record that lacks a field, no example left.
    pub fn load(config: &DataConfig, base: &Path, seed: u64) -> Result<Self> {
        config.validate()?;
        let (input, target) = (config.input_template()?, config.target_template()?);
        let filter = LengthFilter {
            input: [config.min_source_characters, config.max_source_characters],
            target: [config.min_target_characters, config.max_target_characters],
        };
        let renderer = Renderer { input: &input, target: &target, filter, class_field: config.stratify_by.as_deref() };
        let (all, classes) = renderer.dataset("data.train", &config.train, base)?;
        if let Some(validation) = &config.validation {
            let (validation, _) = renderer.dataset("data.validation", validation, base)?;
            return Ok(Self { train: all, validation: Some(validation) });
        }
        let Some(fraction) = config.validation_split else {
            return Ok(Self { train: all, validation: None });
        };
        if all.len() < 2 {
            return Err(Error::setting("data.validation_split", "there is only one example; add data to split"));
        }
        let held_out = held_out(&classes, fraction, seed);
        let (mut train, mut validation) = (Dataset::default(), Dataset::default());
        for (example, held_out) in all.examples().zip(held_out) {
            if held_out { &mut validation } else { &mut train }.push(example);
        }
        Ok(Self { train, validation: Some(validation) })
    }
}

/// Which examples are held out, given every example's class (numbered from 0 without gaps): in every class those that
/// come first when ordered by a hash of seed and index.
fn held_out(classes: &[usize], fraction: f64, seed: u64) -> Vec<bool> {
    let key = mix(seed ^ SPLIT_SALT);
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); classes.iter().max().map_or(0, |&last| last + 1)];
    for (index, &class) in classes.iter().enumerate() {
        members[class].push(index);
    }
    for indices in &mut members {
        indices.sort_by_cached_key(|&index| (mix(key.wrapping_add(index as u64)), index));
    }
    let mut counts: Vec<usize> =
        members.iter().map(|indices| (fraction * indices.len() as f64).round() as usize).collect();
    // Rounding may leave one side empty; then the largest class gives or keeps one.
    let largest = (0..members.len()).max_by_key(|&class| members[class].len()).expect("there are examples to split");
    let total: usize = counts.iter().sum();
    if total == 0 {
        counts[largest] += 1;
    } else if total == classes.len() {
        counts[largest] -= 1;
    }
    let mut held_out = vec![false; classes.len()];
    for (indices, count) in members.iter().zip(counts) {
        for &index in &indices[..count] {
            held_out[index] = true;
        }
    }
    held_out
}

/// Bounds on rendered text in characters: `[min, max]`.
#[derive(Clone, Copy, Debug, Default)]
struct LengthFilter {
    input: [Option<usize>; 2],
    target: [Option<usize>; 2],
}

impl LengthFilter {
    fn keeps(&self, example: Example<'_>) -> bool {
        let within = |text: &str, [min, max]: [Option<usize>; 2]| {
            if min.is_none() && max.is_none() {
                return true;
            }
            let characters = text.chars().count();
            min.is_none_or(|min| characters >= min) && max.is_none_or(|max| characters <= max)
        };
        within(example.input, self.input) && within(example.target, self.target)
    }
}

/// Records to examples.
struct Renderer<'a> {
    input: &'a Template,
    target: &'a Template,
    filter: LengthFilter,
    /// The field to stratify by.
    class_field: Option<&'a str>,
}

impl Renderer<'_> {
    /// The examples that the filter keeps, and the class of each as a number.
    fn dataset(&self, key: &'static str, sources: &SourceList, base: &Path) -> Result<(Dataset, Vec<usize>)> {
        let (mut dataset, mut classes) = (Dataset::default(), Vec::new());
        let mut numbers = BTreeMap::<String, usize>::new();
        let mut dropped = 0_u64;
        self.render(sources, base, |example, class| {
            if !self.filter.keeps(example) {
                dropped += 1;
                return;
            }
            dataset.push(example);
            let next = numbers.len();
            classes.push(match numbers.get(class) {
                Some(&number) => number,
                None => *numbers.entry(class.to_owned()).or_insert(next),
            });
        })?;
        if dataset.is_empty() {
            let message = format!("the length filters (data.min/max_…_characters) drop all {dropped} examples");
            return Err(Error::setting(key, message));
        }
        Ok((dataset, classes))
    }

    /// Calls `visit` with every example and its class.
    fn render(&self, sources: &SourceList, base: &Path, mut visit: impl FnMut(Example<'_>, &str)) -> Result<()> {
        let (mut input, mut target) = (String::new(), String::new());
        for source in resolve_sources(sources.entries(), base)? {
            source.for_each(|_, record| {
                input.clear();
                target.clear();
                self.input.render(&record, &mut input)?;
                self.target.render(&record, &mut target)?;
                let class = self.class_field.map_or(Ok(""), |field| text_of(&record, field))?;
                visit(Example { input: &input, target: &target }, class);
                Ok(())
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write as _;
    use std::fs;

    use super::*;

    fn config(settings: &str) -> DataConfig {
        toml::from_str(&format!("train = \"t.jsonl\"\ninput = \"in {{x}}\"\ntarget = \"{{y}}\"\n{settings}")).unwrap()
    }

    /// A folder with t.jsonl: x counts up, y = `class(x)`.
    fn numbered(count: usize, class: impl Fn(usize) -> usize) -> tempfile::TempDir {
        let mut lines = String::new();
        for x in 0..count {
            writeln!(lines, "{{\"x\": {x}, \"y\": \"c{}\"}}", class(x)).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("t.jsonl"), lines).unwrap();
        directory
    }

    fn inputs(dataset: &Dataset) -> Vec<usize> {
        dataset.examples().map(|example| example.input.strip_prefix("in ").unwrap().parse().unwrap()).collect()
    }

    #[test]
    fn renders_in_file_order() {
        let directory = numbered(3, |x| x);
        let splits = Splits::load(&config(""), directory.path(), 0).unwrap();
        assert_eq!(splits.validation, None);
        assert_eq!(splits.train.len(), 3);
        assert_eq!(splits.train.example(0), Example { input: "in 0", target: "c0" });
        assert_eq!(splits.train.example(2), Example { input: "in 2", target: "c2" });
        assert_eq!(splits.train.texts().collect::<Vec<_>>(), ["in 0", "c0", "in 1", "c1", "in 2", "c2"]);
    }

    #[test]
    fn the_fingerprint_tells_examples_apart() {
        let dataset = |examples: &[(&str, &str)]| {
            let mut dataset = Dataset::default();
            for &(input, target) in examples {
                dataset.push(Example { input, target });
            }
            dataset.fingerprint()
        };
        let fingerprints: BTreeSet<_> = [
            dataset(&[("ab", "c"), ("d", "e")]),
            dataset(&[("a", "bc"), ("d", "e")]),
            dataset(&[("d", "e"), ("ab", "c")]),
            dataset(&[("ab", "c")]),
        ]
        .into();
        assert_eq!(fingerprints.len(), 4);
        assert_eq!(dataset(&[("ab", "c")]), dataset(&[("ab", "c")]));
        assert_eq!(dataset(&[]).len(), 64);
    }

    #[test]
    fn a_split_has_the_exact_size_and_keeps_order() {
        for (count, fraction, expected) in [(100, 0.05, 5), (7, 0.5, 4), (2, 0.01, 1), (2, 0.99, 1), (50, 0.99, 49)] {
            let directory = numbered(count, |x| x % 3);
            let config = config(&format!("validation_split = {fraction}"));
            let splits = Splits::load(&config, directory.path(), 1).unwrap();
            let (train, validation) = (inputs(&splits.train), inputs(&splits.validation.unwrap()));
            assert_eq!(validation.len(), expected, "{fraction} of {count}");
            assert!(train.is_sorted() && validation.is_sorted());
            let all: BTreeSet<_> = train.into_iter().chain(validation).collect();
            assert!(all.into_iter().eq(0..count));
        }
    }

    #[test]
    fn a_split_depends_on_the_seed_alone() {
        let directory = numbered(100, |x| x);
        let validation = |seed| {
            let splits = Splits::load(&config("validation_split = 0.3"), directory.path(), seed).unwrap();
            inputs(&splits.validation.unwrap())
        };
        assert_eq!(validation(1), validation(1));
        assert_ne!(validation(1), validation(2));
        // Neither the first nor the last 30, nor every third.
        let mean = validation(1).iter().sum::<usize>() as f64 / 30.0;
        assert!((35.0..65.0).contains(&mean), "{mean}");
    }

    #[test]
    fn a_stratified_split_takes_the_same_share_of_every_class() {
        let directory = numbered(100, |x| if x < 80 { 0 } else { 1 });
        let config = config("validation_split = 0.1\nstratify_by = \"y\"");
        let splits = Splits::load(&config, directory.path(), 3).unwrap();
        let validation = inputs(&splits.validation.unwrap());
        assert_eq!(validation.iter().filter(|&&x| x < 80).count(), 8);
        assert_eq!(validation.len(), 10);
    }

    #[test]
    fn classes_too_small_to_round_leave_neither_side_empty() {
        for (fraction, expected) in [(0.1, 1), (0.9, 5)] {
            let directory = numbered(6, |x| x);
            let config = config(&format!("validation_split = {fraction}\nstratify_by = \"y\""));
            let splits = Splits::load(&config, directory.path(), 0).unwrap();
            assert_eq!(splits.validation.unwrap().len(), expected);
        }
    }

    #[test]
    fn a_validation_source_is_read_with_the_same_templates() {
        let directory = numbered(2, |x| x);
        fs::write(directory.path().join("v.csv"), "y,x\nb,a\n").unwrap();
        let splits = Splits::load(&config("validation = \"v.csv\""), directory.path(), 0).unwrap();
        assert_eq!(splits.validation.unwrap().example(0), Example { input: "in a", target: "b" });
        assert_eq!(splits.train.len(), 2);
    }

    #[test]
    fn length_filters_count_characters_of_rendered_text() {
        let directory = tempfile::tempdir().unwrap();
        let lines = "{\"x\":\"é\",\"y\":\"\"}\n{\"x\":\"éé\",\"y\":\"b\"}\n{\"x\":\"ééé\",\"y\":\"bb\"}\n";
        fs::write(directory.path().join("t.jsonl"), lines).unwrap();
        let targets = |settings: &str| {
            let splits = Splits::load(&config(settings), directory.path(), 0)?;
            Ok::<_, Error>(splits.train.examples().map(|example| example.target.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(targets("max_source_characters = 5").unwrap(), ["", "b"]);
        assert_eq!(targets("min_source_characters = 5").unwrap(), ["b", "bb"]);
        assert_eq!(targets("min_target_characters = 1\nmax_target_characters = 1").unwrap(), ["b"]);
        let error = targets("min_source_characters = 50").unwrap_err();
        assert_eq!(error.to_string(), "data.train: the length filters (data.min/max_…_characters) drop all 3 examples");
        assert!(error.is_user_error());
    }

    #[test]
    fn a_missing_field_is_located() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("t.jsonl"), "{\"x\": 1, \"y\": 2}\n{\"x\": 1, \"z\": 2}\n").unwrap();
        let message = |settings: &str| Splits::load(&config(settings), directory.path(), 0).unwrap_err().to_string();
        assert_eq!(message(""), "t.jsonl:2: no field \"y\"; the record has: x, z");
        fs::write(directory.path().join("t.jsonl"), "{\"x\": 1, \"y\": 2}\n").unwrap();
        assert_eq!(
            message("validation_split = 0.5\nstratify_by = \"class\""),
            "t.jsonl:1: no field \"class\"; the record has: x, y"
        );
        assert_eq!(
            message("validation_split = 0.5"),
            "data.validation_split: there is only one example; add data to split"
        );
    }
}
