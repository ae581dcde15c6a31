//! Examples, as text and as tokens.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::config::DataConfig;
use crate::error::Result;
use crate::loader::Limits;
use crate::objective::Corruption;
use crate::prompt::Prompt;
use crate::store::{Key, MEMORY_BYTES, Place, Store, StoreWriter};
use crate::tokenizer::Tokenizer;

/// An example as text.
#[derive(Clone, Debug, PartialEq)]
pub struct Example<'a> {
    /// What the encoder reads.
    pub input: Cow<'a, str>,
    /// What the decoder is to write.
    pub target: Cow<'a, str>,
}

/// Where an example lies: what masks are chosen by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) epoch: u64,
    pub(crate) position: u64,
    /// The example's number in file order.
    pub(crate) index: u64,
}

/// Rendered texts in file order: all of a store, or some.
#[derive(Clone, Debug)]
pub(crate) struct Texts {
    store: Arc<Store>,
    /// Items of the store an example: its input, its target, and its class if it has one.
    stride: u64,
    selection: Option<Arc<[u32]>>,
    /// Of a copy: the digest of what it is a copy of.
    copied: Option<blake3::Hash>,
}

/// Examples that are got from another machine at a time, where all of them are.
const COPIED_AT_A_TIME: u64 = 1024;

impl Texts {
    pub(crate) fn new(store: Store, stride: u64) -> Self {
        Self { store: Arc::new(store), stride, selection: None, copied: None }
    }

    /// All that these are some of.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The items of the store that an example is made of.
    fn items(&self, index: u64) -> Range<u64> {
        let index = self.selection.as_ref().map_or(index, |selection| u64::from(selection[index as usize]));
        self.stride * index..self.stride * (index + 1)
    }

    /// With these examples at hand, if they are on another machine; `None` where all are.
    fn gathered(&self, indices: impl Iterator<Item = u64>) -> Result<Option<Self>> {
        let gathered = self.store.gathered(indices.flat_map(|index| self.items(index)))?;
        Ok(gathered.map(|store| Self { store: Arc::new(store), ..self.clone() }))
    }

    /// All of these on this machine; what is large is kept in `place`, for its next run. Copies those of another machine.
    pub(crate) fn at_hand(self, place: Place) -> Result<Self> {
        if !self.store.is_remote() {
            return Ok(self);
        }
        let digest = self.digest();
        let place = Place { kind: "fetched", key: digest, ..place };
        let store = match place.open() {
            Some(store) => store,
            None => self.copy(place)?,
        };
        Ok(Self { store: Arc::new(store), stride: self.stride, selection: None, copied: Some(digest) })
    }

    fn copy(&self, place: Place) -> Result<Store> {
        let mut writer = StoreWriter::new(place);
        for first in (0..self.len()).step_by(COPIED_AT_A_TIME as usize) {
            let indices = first..self.len().min(first + COPIED_AT_A_TIME);
            let Some(gathered) = self.gathered(indices.clone())? else { continue };
            for item in indices.flat_map(|index| self.items(index)) {
                writer.push(gathered.store.item(item))?;
            }
        }
        writer.finish(false, [0; 4])
    }

    /// Some of these, by number.
    pub(crate) fn select(&self, chosen: impl Iterator<Item = u32>) -> Self {
        let of_store = |index: u32| self.selection.as_ref().map_or(index, |selection| selection[index as usize]);
        Self { selection: Some(chosen.map(of_store).collect()), ..self.clone() }
    }

    pub(crate) fn len(&self) -> u64 {
        self.selection.as_ref().map_or(self.store.len() / self.stride, |selection| selection.len() as u64)
    }

    fn text(&self, index: u64, which: u64) -> Cow<'_, str> {
        // It was text when it was stored; of a file that was damaged since, what is none is replaced.
        String::from_utf8_lossy(self.store.item(self.items(index).start + which))
    }

    pub(crate) fn input(&self, index: u64) -> Cow<'_, str> {
        self.text(index, 0)
    }

    pub(crate) fn target(&self, index: u64) -> Cow<'_, str> {
        self.text(index, 1)
    }

    /// # Panics
    /// When examples have no class.
    pub(crate) fn class(&self, index: u64) -> Cow<'_, str> {
        assert!(self.stride > 2, "examples without a class");
        self.text(index, 2)
    }

    /// Equal if the texts are.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let whole = self.copied.unwrap_or_else(|| self.store.digest());
        let Some(selection) = &self.selection else { return whole };
        let mut hasher = blake3::Hasher::new();
        hasher.update(whole.as_bytes());
        for index in selection.iter() {
            hasher.update(&index.to_le_bytes());
        }
        hasher.finalize()
    }
}

/// The examples of one source.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) texts: Texts,
    pub(crate) prompt: Option<Prompt>,
    tokens: Tokens,
}

/// What is tokenized ahead.
#[derive(Clone, Debug)]
enum Tokens {
    /// Nothing.
    None,
    /// Every input and every target.
    Examples(Arc<Store>),
    /// All texts, to be cut to pieces.
    Documents { store: Arc<Store>, corruption: Arc<Corruption>, tokenizer: Arc<Tokenizer> },
}

/// What tokens are made with.
pub(crate) struct Tokenization<'a> {
    pub(crate) tokenizer: &'a Arc<Tokenizer>,
    pub(crate) corruption: Option<&'a Arc<Corruption>>,
    pub(crate) limits: Limits,
    pub(crate) place: Place,
    /// Whether to make, and to keep, what could be made as it is needed.
    pub(crate) keep: bool,
}

/// Texts are tokenized so many at a time, on all threads.
const CHUNK: u64 = 4096;

impl Part {
    pub(crate) fn new(texts: Texts, prompt: Option<Prompt>) -> Self {
        Self { texts, prompt, tokens: Tokens::None }
    }

    /// With these examples at hand; `None` where all are.
    fn gathered(&self, indices: impl Iterator<Item = u64>) -> Result<Option<Self>> {
        let texts = self.texts.gathered(indices)?;
        Ok(texts.map(|texts| Self { texts, ..self.clone() }))
    }

    fn len(&self) -> u64 {
        match &self.tokens {
            Tokens::Documents { store, corruption, .. } => corruption.pieces(store.bytes().len() as u64 / TOKEN_BYTES),
            _ => self.texts.len(),
        }
    }

    fn example(&self, index: u64) -> Example<'_> {
        if let Tokens::Documents { tokenizer, .. } = &self.tokens {
            let (mut source, mut target) = (Vec::new(), Vec::new());
            self.corrupt(At { epoch: 0, position: index, index }, &mut source, &mut target);
            let text = |ids: &[u32]| Cow::Owned(tokenizer.decode_all(ids));
            return Example { input: text(&source), target: text(&target) };
        }
        let (input, target) = (self.texts.input(index), self.texts.target(index));
        match &self.prompt {
            Some(prompt) => Example { input: prompt.render(index, &input).into(), target },
            None => Example { input, target },
        }
    }

    fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.texts.digest().as_bytes());
        if let Some(prompt) = &self.prompt {
            hasher.update(prompt.digest().as_bytes());
        }
        hasher.finalize()
    }

    /// Appends the tokens of an example.
    fn encode(
        &self,
        at: At,
        tokenizer: &Tokenizer,
        limits: Limits,
        source: &mut Vec<u32>,
        target: &mut Vec<u32>,
    ) -> Result<()> {
        match &self.tokens {
            Tokens::None => {
                source.extend(self.encode_input(at.index, tokenizer, limits)?);
                target.extend(tokenizer.encode(&self.texts.target(at.index), limits.max_target_length)?);
            }
            Tokens::Examples(store) => {
                source.extend(to_tokens(store.item(2 * at.index)));
                target.extend(to_tokens(store.item(2 * at.index + 1)));
            }
            Tokens::Documents { .. } => self.corrupt(at, source, target),
        }
        Ok(())
    }

    /// The tokens of an input. Of a prompt that is too long, shots are left out, so that the question stays.
    fn encode_input(&self, index: u64, tokenizer: &Tokenizer, limits: Limits) -> Result<Vec<u32>> {
        let (input, max) = (self.texts.input(index), limits.max_source_length);
        let Some(prompt) = &self.prompt else { return tokenizer.encode(&input, max) };
        let mut pieces = prompt.pieces(index, &input);
        loop {
            let ids = tokenizer.encode(&pieces.concat(), max + 1)?;
            // The prefix and the input stay.
            if ids.len() <= max || pieces.len() == 2 {
                return if ids.len() <= max { Ok(ids) } else { tokenizer.encode(&pieces.concat(), max) };
            }
            pieces.remove(1);
        }
    }

    fn corrupt(&self, at: At, source: &mut Vec<u32>, target: &mut Vec<u32>) {
        let Tokens::Documents { store, corruption, .. } = &self.tokens else { return };
        let bytes = store.bytes();
        let length = corruption.raw_length() * TOKEN_BYTES as usize;
        let start = at.index as usize * length;
        let piece: Vec<u32> = to_tokens(&bytes[start..bytes.len().min(start + length)]).collect();
        corruption.apply(&piece, (at.epoch, at.position), source, target);
    }

    /// Whether what is tokenized ahead is there already: opened, or made.
    fn tokenize(&mut self, with: &Tokenization<'_>) -> Result<bool> {
        let place = Place { key: self.tokens_key(with), ..with.place.clone() };
        let found = place.open();
        let was_there = found.is_some();
        let store = match (found, with.corruption) {
            (Some(store), _) => store,
            (None, Some(_)) => {
                let bare = |index| Ok([with.tokenizer.encode_bare(&self.texts.input(index))?]);
                self.write_tokens(place, with.keep, bare)?
            }
            (None, None) if with.keep => self.write_tokens(place, true, |index| {
                let target = with.tokenizer.encode(&self.texts.target(index), with.limits.max_target_length)?;
                Ok([self.encode_input(index, with.tokenizer, with.limits)?, target])
            })?,
            (None, None) => return Ok(false),
        };
        let store = Arc::new(store);
        self.tokens = match with.corruption {
            Some(corruption) => {
                Tokens::Documents { store, corruption: corruption.clone(), tokenizer: with.tokenizer.clone() }
            }
            None => Tokens::Examples(store),
        };
        Ok(was_there)
    }

    /// Of all that decides the tokens.
    fn tokens_key(&self, with: &Tokenization<'_>) -> Key {
        let mut hasher = blake3::Hasher::new();
        let limits = match with.corruption {
            Some(_) => String::new(),
            None => format!("{:?}", with.limits),
        };
        hasher.update(limits.as_bytes());
        hasher.update(self.digest().as_bytes());
        hasher.update(with.tokenizer.to_json().as_bytes());
        hasher.finalize()
    }

    fn write_tokens<const N: usize>(
        &self,
        place: Place,
        keep: bool,
        encode: impl Fn(u64) -> Result<[Vec<u32>; N]> + Sync,
    ) -> Result<Store> {
        let mut writer = StoreWriter::new(place);
        let count = self.texts.len();
        for first in (0..count).step_by(CHUNK as usize) {
            let chunk: Vec<_> =
                (first..count.min(first + CHUNK)).into_par_iter().map(&encode).collect::<Result<_>>()?;
            for ids in chunk.iter().flatten() {
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                writer.push(&bytes)?;
            }
        }
        writer.finish(keep, [0; 4])
    }
}

const TOKEN_BYTES: u64 = size_of::<u32>() as u64;

fn to_tokens(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(TOKEN_BYTES as usize).map(|id| id.try_into().map_or(0, u32::from_le_bytes))
}

/// Examples of one source or several, in file order.
#[derive(Clone, Debug)]
pub struct Dataset {
    parts: Vec<Part>,
    /// Where every part ends in the numbers of examples.
    ends: Vec<u64>,
    /// Text that the objective adds to inputs.
    literals: Vec<String>,
}

impl Dataset {
    pub(crate) fn new(parts: Vec<Part>) -> Self {
        let mut dataset = Self { parts, ends: Vec::new(), literals: Vec::new() };
        dataset.number();
        dataset
    }

    pub(crate) fn with_literals(self, literals: Vec<String>) -> Self {
        Self { literals, ..self }
    }

    fn number(&mut self) {
        let mut end = 0;
        let ends = self.parts.iter().map(|part| {
            end += part.len();
            end
        });
        self.ends = ends.collect();
    }

    /// The number of examples.
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of each source.
    pub(crate) fn texts_of_parts(&self) -> impl Iterator<Item = &Texts> {
        self.parts.iter().map(|part| &part.texts)
    }

    /// The number of examples of each source.
    pub fn part_lens(&self) -> Vec<u64> {
        self.parts.iter().map(Part::len).collect()
    }

    /// The number of an example's part, and its number there.
    fn place(&self, index: u64) -> (usize, u64) {
        assert!(index < self.len(), "example {index} of {}", self.len());
        let number = self.ends.partition_point(|&end| end <= index);
        let first = if number == 0 { 0 } else { self.ends[number - 1] };
        (number, index - first)
    }

    fn part(&self, index: u64) -> (&Part, u64) {
        let (number, index) = self.place(index);
        (&self.parts[number], index)
    }

    /// With the texts of these examples at hand: where they are on another machine, they are got from there.
    ///
    /// # Errors
    /// [`Error::Origin`](crate::Error::Origin).
    pub(crate) fn gathered(&self, indices: &[u64]) -> Result<Cow<'_, Self>> {
        let mut gathered = Cow::Borrowed(self);
        for (number, part) in self.parts.iter().enumerate().filter(|(_, part)| part.texts.store().is_remote()) {
            let places = indices.iter().map(|&index| self.place(index));
            let own = places.filter(|&(of, _)| of == number).map(|(_, index)| index);
            if let Some(part) = part.gathered(own)? {
                gathered.to_mut().parts[number] = part;
            }
        }
        Ok(gathered)
    }

    /// The example `index`, from 0, in file order; of span corruption as it is at position `index` of its source's epoch 0.
    ///
    /// # Panics
    /// When there is no such example.
    pub fn example(&self, index: u64) -> Example<'_> {
        let (part, index) = self.part(index);
        part.example(index)
    }

    /// All examples in file order.
    pub fn examples(&self) -> impl Iterator<Item = Example<'_>> {
        (0..self.len()).map(|index| self.example(index))
    }

    /// The target of the example `index`, where the objective makes none.
    ///
    /// # Panics
    /// When there is no such example.
    pub(crate) fn target(&self, index: u64) -> Cow<'_, str> {
        let (part, index) = self.part(index);
        part.texts.target(index)
    }

    /// All targets in file order, where the objective makes none.
    pub(crate) fn targets(&self) -> impl Iterator<Item = Cow<'_, str>> {
        (0..self.len()).map(|index| self.target(index))
    }

    /// Every input, every target, and what prompts and objectives add to them: what a tokenizer is trained on.
    pub fn texts(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let literals = self.literals.iter().map(|text| Cow::Borrowed(text.as_str()));
        let of_parts = self.parts.iter().flat_map(|part| {
            let literals = part.prompt.iter().flat_map(Prompt::literals).map(Cow::Owned);
            let texts = &part.texts;
            literals.chain((0..texts.len()).flat_map(move |index| [texts.input(index), texts.target(index)]))
        });
        literals.chain(of_parts)
    }

    /// A digest (BLAKE3, hexadecimal) of all examples in order: equal digests, equal training data.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in &self.parts {
            hasher.update(part.digest().as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Appends the tokens of an example.
    pub(crate) fn encode(
        &self,
        at: At,
        tokenizer: &Tokenizer,
        limits: Limits,
        source: &mut Vec<u32>,
        target: &mut Vec<u32>,
    ) -> Result<()> {
        let (part, index) = self.part(at.index);
        part.encode(At { index, ..at }, tokenizer, limits, source, target)
    }

    /// Opens or makes what is tokenized ahead; how many sources' tokens were there already.
    pub(crate) fn tokenize(&mut self, with: &Tokenization<'_>) -> Result<usize> {
        let mut opened = 0;
        for part in &mut self.parts {
            opened += usize::from(part.tokenize(with)?);
        }
        self.number();
        Ok(opened)
    }
}

impl DataConfig {
    /// The longest texts in tokens.
    pub fn limits(&self) -> Limits {
        Limits { max_source_length: self.max_source_length, max_target_length: self.max_target_length }
    }

    /// Where stores of a kind are kept.
    pub(crate) fn place(&self, base: &std::path::Path, kind: &'static str, key: Key) -> Place {
        let folder = self.cache_dir.as_ref().map(|folder| base.join(folder));
        Place { folder, kind, key, memory_bytes: MEMORY_BYTES }
    }
}
