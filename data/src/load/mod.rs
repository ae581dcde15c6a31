//! From sources to examples: which records become one, and which of these train and which validate.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{DataConfig, LabelNames, Sample, SourceList};
use crate::dataset::{Dataset, Part, Texts, Tokenization};
use crate::error::{Error, Result};
use crate::filter::Filter;
use crate::mixture;
use crate::objective::{self, Corruption, Objective};
use crate::order::{Order, mix};
use crate::prompt::Prompt;
use crate::remote::{Catalogue, Shelf, Shelves};
use crate::source::{Record, Source, Value, resolve_sources};
use crate::store::{Key, MEMORY_BYTES, Place, Store, StoreWriter};
use crate::template::{Template, text_of};
use crate::tokenizer::Tokenizer;

/// Keep the choices of splits and samples apart from the order's, which mixes the same seed.
const SPLIT_SALT: u64 = 0x7370_6c69_745f_6b65;
const SAMPLE_SALT: u64 = 0x7361_6d70_6c65_5f6b;

/// In the key of what is kept: another way to make it is another number.
const FORMAT: u32 = 1;

/// The examples of a job.
#[derive(Clone, Debug)]
pub struct Splits {
    /// To train on; never empty.
    pub train: Dataset,
    /// To evaluate on, if the job names any; never empty.
    pub validation: Option<Dataset>,
    /// What became of the records of each training source.
    pub counts: Vec<SourceCounts>,
    config: DataConfig,
    base: PathBuf,
    seed: u64,
}

/// What became of the records of a training source.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceCounts {
    /// In a mixture.
    pub name: Option<String>,
    /// Records that were read.
    pub records: u64,
    /// Of these, those that `data.where` left out.
    pub filtered: u64,
    /// And those that the bounds on characters left out.
    pub by_length: u64,
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

    /// Reads and renders a job's examples, drops those that filters exclude, takes a sample if the job says so, and
    /// holds a part out for validation. Relative paths are relative to `base`.
    ///
    /// Of n examples, `round(fraction · n)` are held out (with `stratify_by`, of every class on its own), but at least
    /// one, and at least one stays. Which ones depends on the seed and n alone; both parts keep file order.
    ///
    /// # Errors
    /// A wrong setting, a source that cannot be read, a record that lacks a field, no example left.
    pub fn load(config: &DataConfig, base: &Path, seed: u64) -> Result<Self> {
        Self::load_by(config, base, seed, |task| load_task(task, base, seed))
    }

    /// The same of another machine's examples. Those to train on are got as they are needed; the others now, and all of
    /// them where they are wanted as a `whole` or what is to be made of one depends on others: of shots, of classes to
    /// stratify by, and where spans are masked. What is large of these is kept in the folder of caches.
    ///
    /// # Errors
    /// A wrong setting; [`Error::Origin`].
    pub fn fetched(config: &DataConfig, base: &Path, seed: u64, catalogue: &Catalogue, whole: bool) -> Result<Self> {
        let mut shelves = Shelves::new(catalogue);
        Self::load_by(config, base, seed, |task| fetch_task(task, base, seed, &mut shelves, whole))
    }

    fn load_by(
        config: &DataConfig,
        base: &Path,
        seed: u64,
        mut load: impl FnMut(&DataConfig) -> Result<Loaded>,
    ) -> Result<Self> {
        config.validate()?;
        let (mut train, mut validation, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let names = config.mixture.iter().map(|source| Some(source.name.clone())).chain([None]);
        for (task, name) in config.tasks().iter().zip(names) {
            let loaded = load(task)?;
            let [records, filtered, by_length, _] = loaded.notes;
            counts.push(SourceCounts { name, records, filtered, by_length });
            let own = Prompt::new(task, &loaded.train, true, seed)?;
            if let Some(texts) = loaded.validation {
                validation.push(Part::new(texts, Prompt::new(task, &loaded.train, false, seed)?));
            }
            train.push(Part::new(loaded.train, own));
        }
        Ok(Self {
            train: Dataset::new(train).with_literals(objective::literals(config)),
            validation: (!validation.is_empty()).then(|| Dataset::new(validation)),
            counts,
            config: config.clone(),
            base: base.to_owned(),
            seed,
        })
    }

    /// All examples, for machines that have none.
    pub fn shelf(&self) -> Shelf {
        let mut validation = self.validation.iter().flat_map(Dataset::texts_of_parts);
        let mut stores = Vec::new();
        for (task, train) in self.config.tasks().iter().zip(self.train.texts_of_parts()) {
            stores.push(Arc::clone(train.store()));
            let validates = task.validation.is_some() || task.validation_split.is_some();
            let validation = if validates { validation.next() } else { None };
            // What is held out of a source is in one store with the rest of it.
            stores.extend(validation.filter(|_| task.validation.is_some()).map(|texts| Arc::clone(texts.store())));
        }
        Shelf::new(stores)
    }

    /// With what has been tokenized ahead, if it is there and made from the same, and with what the objective needs
    /// tokenized: only then is the number of examples known.
    ///
    /// # Errors
    /// Lengths or sentinels that the objective lacks, a text that does not tokenize, a cache that cannot be written.
    pub fn tokenized(mut self, tokenizer: &Arc<Tokenizer>) -> Result<Self> {
        self.tokenize(tokenizer, false)?;
        Ok(self)
    }

    /// Tokenizes everything ahead into the folder of caches; how many of how many sources were there already.
    ///
    /// # Errors
    /// As of [`Splits::tokenized`].
    pub fn prepare(&mut self, tokenizer: &Arc<Tokenizer>) -> Result<(usize, usize)> {
        self.tokenize(tokenizer, true)
    }

    fn tokenize(&mut self, tokenizer: &Arc<Tokenizer>, keep: bool) -> Result<(usize, usize)> {
        let corruption = Corruption::new(&self.config, tokenizer, self.seed)?.map(Arc::new);
        let (mut opened, mut sources) = (0, 0);
        for (key, dataset) in [("data.train", Some(&mut self.train)), ("data.validation", self.validation.as_mut())] {
            let Some(dataset) = dataset else { continue };
            let with = Tokenization {
                tokenizer,
                corruption: corruption.as_ref(),
                limits: self.config.limits(),
                place: self.config.place(&self.base, "tokens", Key::from_bytes([0; 32])),
                keep,
            };
            opened += dataset.tokenize(&with)?;
            sources += dataset.part_lens().len();
            if dataset.part_lens().contains(&0) {
                return Err(Error::setting(key, "holds less than two tokens; there is nothing to mask"));
            }
        }
        Ok((opened, sources))
    }

    /// Which training example lies at a position of an epoch.
    pub fn order(&self) -> Order {
        let (config, examples) = (&self.config, self.train.part_lens());
        match config.mixture.is_empty() {
            true => Order::new(self.train.len(), self.seed, config.shuffle),
            false => Order::mixture(mixture::slots(config, &examples), self.seed, config.shuffle),
        }
    }
}

impl Dataset {
    /// Reads and renders the examples of `sources`, of the records that `filter` keeps; relative paths are relative to
    /// `base`.
    ///
    /// # Errors
    /// A source that cannot be read or a record that lacks a template's field, by file and line; a filter, as data.where,
    /// that keeps none.
    pub fn load(
        sources: &SourceList,
        input: &Template,
        target: &Template,
        filter: Option<Filter>,
        base: &Path,
    ) -> Result<Self> {
        let renderer = Renderer::plain(input.clone(), target.clone(), filter);
        let sources = resolve_sources(sources.entries(), base, "validation")
            .or_else(|_| resolve_sources(sources.entries(), base, "train"))?;
        let place = Place { folder: None, kind: "examples", key: Key::from_bytes([0; 32]), memory_bytes: MEMORY_BYTES };
        let store = renderer.store("--data", &sources, place)?;
        Ok(Self::new(vec![Part::new(Texts::new(store, renderer.stride()), None)]))
    }
}

/// The examples of one source.
struct Loaded {
    train: Texts,
    validation: Option<Texts>,
    notes: [u64; 4],
}

fn load_task(task: &DataConfig, base: &Path, seed: u64) -> Result<Loaded> {
    let renderer = Renderer::new(task)?;
    let (all, notes) = renderer.texts("data.train", &task.train, task, base)?;
    let validation = match &task.validation {
        Some(validation) => {
            let renderer = Renderer { max_examples: None, ..renderer };
            Some(renderer.texts("data.validation", validation, task, base)?.0)
        }
        None => None,
    };
    chosen(task, seed, all, validation, notes)
}

/// As [`load_task`], of another machine's stores.
fn fetch_task(task: &DataConfig, base: &Path, seed: u64, shelves: &mut Shelves<'_>, whole: bool) -> Result<Loaded> {
    let stride = Renderer::new(task)?.stride();
    let place = task.place(base, "fetched", Key::from_bytes([0; 32]));
    let mut all = Texts::new(shelves.next()?, stride);
    if task.stratify_by.is_some() {
        all = all.at_hand(place.clone())?;
    }
    let validation = match &task.validation {
        Some(_) => Some(Texts::new(shelves.next()?, stride)),
        None => None,
    };
    let Loaded { train, validation, notes } = chosen(task, seed, all, validation, [0; 4])?;
    let train = match whole || task.num_shots > 0 || task.objective != Objective::Seq2Seq {
        true => train.at_hand(place.clone())?,
        false => train,
    };
    Ok(Loaded { train, validation: validation.map(|texts| texts.at_hand(place)).transpose()?, notes })
}

/// Which of a source's examples train and which validate.
fn chosen(task: &DataConfig, seed: u64, all: Texts, validation: Option<Texts>, notes: [u64; 4]) -> Result<Loaded> {
    let all = match task.sample {
        Some(sample) => sampled(&all, sample, seed)?,
        None => all,
    };
    if validation.is_some() {
        return Ok(Loaded { train: all, validation, notes });
    }
    let Some(fraction) = task.validation_split else {
        return Ok(Loaded { train: all, validation: None, notes });
    };
    if all.len() < 2 {
        return Err(Error::setting("data.validation_split", "there is only one example; add data to split"));
    }
    let held_out = held_out(&members(&all, task.stratify_by.is_some()), fraction, seed);
    let of =
        |side: bool| held_out.iter().zip(0..).filter(move |&(&held_out, _)| held_out == side).map(|(_, index)| index);
    Ok(Loaded { train: all.select(of(false)), validation: Some(all.select(of(true))), notes })
}

/// A sample of the examples: those that come first when ordered by a hash of seed and index.
fn sampled(all: &Texts, sample: Sample, seed: u64) -> Result<Texts> {
    let count = match sample {
        Sample::Count(count) => count,
        Sample::Fraction(fraction) => ((fraction * all.len() as f64).round() as u64).max(1),
    };
    if count > all.len() {
        return Err(Error::setting(
            "data.sample",
            format!("{count} is more than the {} examples there are", all.len()),
        ));
    }
    let mut chosen: Vec<u32> = (0..all.len() as u32).collect();
    keep_first(&mut chosen, count as usize, mix(seed ^ SAMPLE_SALT));
    chosen.sort_unstable();
    Ok(all.select(chosen.into_iter()))
}

/// Keeps the `count` indices that come first when ordered by a hash of the key and the index; in any order.
fn keep_first(indices: &mut Vec<u32>, count: usize, key: u64) {
    if count < indices.len() {
        // The hash is a bijection, so there are no ties.
        indices.select_nth_unstable_by_key(count, |&index| mix(key.wrapping_add(u64::from(index))));
        indices.truncate(count);
    }
}

/// The indices of every class.
fn members(texts: &Texts, has_classes: bool) -> Vec<Vec<u32>> {
    let indices = 0..texts.len() as u32;
    if !has_classes {
        return vec![indices.collect()];
    }
    let mut classes = BTreeMap::<String, Vec<u32>>::new();
    for index in indices {
        let class = texts.class(u64::from(index));
        match classes.get_mut(&*class) {
            Some(members) => members.push(index),
            None => drop(classes.insert(class.into_owned(), vec![index])),
        }
    }
    classes.into_values().collect()
}

/// Which examples are held out, given the indices of every class: in every class those that come first when ordered by
/// a hash of seed and index.
fn held_out(members: &[Vec<u32>], fraction: f64, seed: u64) -> Vec<bool> {
    let key = mix(seed ^ SPLIT_SALT);
    let examples: usize = members.iter().map(Vec::len).sum();
    let mut counts: Vec<usize> =
        members.iter().map(|indices| (fraction * indices.len() as f64).round() as usize).collect();
    // Rounding may leave one side empty; then the largest class, the first of several, gives or keeps one.
    let largest = (0..members.len()).max_by_key(|&class| (members[class].len(), std::cmp::Reverse(members[class][0])));
    let largest = largest.expect("there are examples to split");
    let total: usize = counts.iter().sum();
    if total == 0 {
        counts[largest] += 1;
    } else if total == examples {
        counts[largest] -= 1;
    }
    let mut held_out = vec![false; examples];
    for (indices, count) in members.iter().zip(counts) {
        let mut chosen = indices.clone();
        keep_first(&mut chosen, count, key);
        chosen.into_iter().for_each(|index| held_out[index as usize] = true);
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
    fn keeps(&self, input: &str, target: &str) -> bool {
        let within = |text: &str, [min, max]: [Option<usize>; 2]| {
            if min.is_none() && max.is_none() {
                return true;
            }
            let characters = text.chars().count();
            min.is_none_or(|min| characters >= min) && max.is_none_or(|max| characters <= max)
        };
        within(input, self.input) && within(target, self.target)
    }
}

/// Records to examples.
#[derive(Debug)]
struct Renderer {
    input: Template,
    /// None: there is no target.
    target: Option<Template>,
    filter: Option<Filter>,
    lengths: LengthFilter,
    label_names: LabelNames,
    /// The field to stratify by.
    class_field: Option<String>,
    max_examples: Option<u64>,
}

impl Renderer {
    fn new(config: &DataConfig) -> Result<Self> {
        Ok(Self {
            input: config.input_template()?,
            target: config.target_template()?,
            filter: config.filter()?,
            lengths: LengthFilter {
                input: [config.min_source_characters, config.max_source_characters],
                target: [config.min_target_characters, config.max_target_characters],
            },
            label_names: config.label_names.clone(),
            class_field: config.stratify_by.clone(),
            max_examples: config.max_examples,
        })
    }

    fn plain(input: Template, target: Template, filter: Option<Filter>) -> Self {
        let (class_field, max_examples) = (None, None);
        let (lengths, label_names) = (LengthFilter::default(), LabelNames::new());
        Self { input, target: Some(target), filter, lengths, label_names, class_field, max_examples }
    }

    /// Items of the store an example.
    fn stride(&self) -> u64 {
        2 + u64::from(self.class_field.is_some())
    }

    /// The fields that it reads.
    fn fields(&self) -> BTreeSet<String> {
        let templates = [Some(&self.input), self.target.as_ref()].into_iter().flatten().flat_map(Template::fields);
        let others = self.label_names.keys().chain(&self.class_field).map(String::as_str);
        let mut fields: BTreeSet<String> = templates.chain(others).map(str::to_owned).collect();
        fields.extend(self.filter.iter().flat_map(Filter::fields));
        fields
    }

    /// The examples of sources, from where they are kept if they have been read before and have not changed since, and
    /// the counts.
    fn texts(
        &self,
        key: &'static str,
        list: &SourceList,
        config: &DataConfig,
        base: &Path,
    ) -> Result<(Texts, [u64; 4])> {
        let split = key.strip_prefix("data.").unwrap_or(key);
        let sources = resolve_sources(list.entries(), base, split)?;
        let place = config.place(base, "examples", self.key(&sources)?);
        let store = match place.open() {
            Some(store) => store,
            None => self.store(key, &sources, place)?,
        };
        let notes = store.notes();
        Ok((Texts::new(store, self.stride()), notes))
    }

    /// Of what the examples are made from: the files as they are now, and everything that says how to read them.
    fn key(&self, sources: &[Source]) -> Result<Key> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{FORMAT} {self:?}").as_bytes());
        for source in sources {
            hasher.update(source.stamp()?.as_bytes());
            hasher.update(b"\n");
        }
        Ok(hasher.finalize())
    }

    fn store(&self, key: &'static str, sources: &[Source], place: Place) -> Result<Store> {
        let mut reading = Reading::new(self, place);
        let wanted = self.fields();
        for source in sources {
            let mut failure = None;
            let whole = source.for_each_of(Some(&wanted), |_, mut record| match reading.visit(&mut record) {
                Ok(goes_on) => Ok(goes_on),
                Err(Fault::Record(message)) => Err(message),
                Err(Fault::Writing(error)) => {
                    failure = Some(error);
                    Ok(false)
                }
            })?;
            if let Some(error) = failure {
                return Err(error);
            }
            if !whole {
                break;
            }
        }
        reading.finish(key)
    }
}

/// Why a record became no example.
enum Fault {
    /// It lacks something.
    Record(String),
    /// There was no room for it.
    Writing(Error),
}

impl From<String> for Fault {
    fn from(message: String) -> Self {
        Self::Record(message)
    }
}

/// Sources being read.
struct Reading<'a> {
    renderer: &'a Renderer,
    writer: StoreWriter,
    /// Fields of the filter that no record had yet.
    unseen: BTreeSet<String>,
    /// The fields of the first record.
    there: Option<String>,
    input: String,
    target: String,
    records: u64,
    filtered: u64,
    by_length: u64,
}

impl<'a> Reading<'a> {
    fn new(renderer: &'a Renderer, place: Place) -> Self {
        let unseen = renderer.filter.iter().flat_map(Filter::fields).collect();
        let (input, target) = (String::new(), String::new());
        let writer = StoreWriter::new(place);
        Self { renderer, writer, unseen, there: None, input, target, records: 0, filtered: 0, by_length: 0 }
    }

    /// Whether to go on.
    fn visit(&mut self, record: &mut Record) -> Result<bool, Fault> {
        let renderer = self.renderer;
        self.records += 1;
        if !self.unseen.is_empty() {
            self.unseen.retain(|field| record.lookup(field).is_none());
            self.there.get_or_insert_with(|| record.fields().map(|(name, _)| name).collect::<Vec<_>>().join(", "));
        }
        if let Some(filter) = &renderer.filter
            && !filter.keeps(record)?
        {
            self.filtered += 1;
            return Ok(true);
        }
        for (field, names) in &renderer.label_names {
            name_class(record, field, names)?;
        }
        self.input.clear();
        self.target.clear();
        renderer.input.render(record, &mut self.input)?;
        if let Some(target) = &renderer.target {
            target.render(record, &mut self.target)?;
        }
        let class = renderer.class_field.as_deref().map(|field| text_of(record, field)).transpose()?;
        if !renderer.lengths.keeps(&self.input, &self.target) {
            self.by_length += 1;
            return Ok(true);
        }
        for text in [Some(self.input.as_str()), Some(self.target.as_str()), class.as_deref()].into_iter().flatten() {
            self.writer.push(text.as_bytes()).map_err(Fault::Writing)?;
        }
        let examples = self.writer.len() / renderer.stride();
        if examples > u64::from(u32::MAX) {
            return Err(Fault::Record("there are more than 4 billion examples; name fewer files".to_owned()));
        }
        Ok(renderer.max_examples != Some(examples))
    }

    fn finish(self, key: &'static str) -> Result<Store> {
        let filter = self.renderer.filter.as_ref().map_or("", Filter::text);
        if let Some(field) = self.unseen.first() {
            let there = self.there.unwrap_or_default();
            let message = format!("names the field {field:?}, which no record of {key} has; they have: {there}");
            return Err(Error::setting("data.where", message));
        }
        if self.writer.len() == 0 {
            let Self { records, filtered, by_length, .. } = self;
            if by_length == 0 {
                let message = format!("keeps none of the {records} records of {key}: {filter}");
                return Err(Error::setting("data.where", message));
            }
            let others = if filtered > 0 { " that data.where keeps" } else { "" };
            let message =
                format!("the length filters (data.min/max_…_characters) drop all {by_length} examples{others}");
            return Err(Error::setting(key, message));
        }
        self.writer.finish(false, [self.records, self.filtered, self.by_length, 0])
    }
}

/// Puts a class's name in the place of its number; a name stays.
fn name_class(record: &mut Record, field: &str, names: &[String]) -> Result<(), String> {
    let text = text_of(record, field)?.into_owned();
    let name = match text.parse::<usize>().ok().and_then(|number| names.get(number)) {
        Some(name) => name.clone(),
        None if names.contains(&text) => return Ok(()),
        None => {
            let last = names.len() - 1;
            return Err(format!(
                "data.label_names: the field {field:?} is {text:?}, neither a number from 0 to {last} nor one of the names"
            ));
        }
    };
    record.set(field, Value::Text(name));
    Ok(())
}
