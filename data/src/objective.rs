//! What an example is made into: itself, or a text with holes and what was in them.
//!
//! Span corruption (Raffel et al., 2020, section 3.1.4) and UL2's mixture of denoisers (Tay et al., 2022, section 3.1).
//! The documents are tokenized and concatenated, without anything between them, and cut to pieces of one length, of
//! which the last may be shorter; a piece is an example. Masks are a pure function of (seed, epoch, position).

use serde::{Deserialize, Serialize};

use crate::config::DataConfig;
use crate::error::{Error, Result};
use crate::order::mix;
use crate::tokenizer::Tokenizer;

/// What is learned from an example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The target from the input.
    #[default]
    #[serde(rename = "seq2seq")]
    Seq2Seq,
    /// What was masked, from what is left.
    SpanCorruption,
    /// The same in several ways, mixed.
    Ul2,
}

/// One way to make an example.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenoiserConfig {
    /// The part of the tokens that is masked; between 0 and 1.
    pub noise_density: f64,
    /// The mean length of a masked span in tokens, at least 1; without it all that is masked is the end (a prefix
    /// language model), and no sentinel stands for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_noise_span_length: Option<f64>,
    /// Text in front of its inputs, such as a mode token.
    #[serde(default)]
    pub prefix: String,
    /// Its share of the examples is this over the sum of all.
    #[serde(default = "default_rate")]
    pub rate: f64,
}

fn default_rate() -> f64 {
    1.0
}

pub(crate) fn default_noise_density() -> f64 {
    0.15
}

pub(crate) fn default_mean_noise_span_length() -> f64 {
    3.0
}

/// Density and mean span length of UL2's denoisers, with their mode tokens: R, S and X of its table 1.
const UL2: [(f64, Option<f64>, &str); 7] = [
    (0.15, Some(3.0), "[NLU]"),
    (0.15, Some(8.0), "[NLU]"),
    (0.25, None, "[S2S]"),
    (0.5, Some(3.0), "[NLG]"),
    (0.5, Some(8.0), "[NLG]"),
    (0.15, Some(64.0), "[NLG]"),
    (0.5, Some(64.0), "[NLG]"),
];

/// No piece is longer.
const RAW_LENGTH_MAX: usize = 1 << 20;

impl DenoiserConfig {
    fn check(&self, key: &'static str) -> Result<()> {
        // Written so that NaN fails too.
        if !(self.noise_density > 0.0 && self.noise_density < 1.0) {
            let message = format!("noise_density {} is not between 0 and 1, such as 0.15", self.noise_density);
            return Err(Error::setting(key, message));
        }
        if let Some(mean) = self.mean_noise_span_length.filter(|&mean| !(mean >= 1.0 && mean.is_finite())) {
            return Err(Error::setting(key, format!("mean_noise_span_length {mean} is not 1 or more, such as 3.0")));
        }
        match self.rate > 0.0 && self.rate.is_finite() {
            true => Ok(()),
            false => Err(Error::setting(key, format!("rate {} is not a positive number", self.rate))),
        }
    }
}

/// The ways a job makes its examples; none where they are made already.
fn denoisers(config: &DataConfig) -> Vec<DenoiserConfig> {
    match config.objective {
        Objective::Seq2Seq => Vec::new(),
        Objective::SpanCorruption => vec![DenoiserConfig {
            noise_density: config.noise_density,
            mean_noise_span_length: Some(config.mean_noise_span_length),
            prefix: String::new(),
            rate: 1.0,
        }],
        Objective::Ul2 if config.denoisers.is_empty() => {
            let denoiser = |(noise_density, mean_noise_span_length, mode): (f64, Option<f64>, &str)| DenoiserConfig {
                noise_density,
                mean_noise_span_length,
                prefix: if config.mode_tokens { mode.to_owned() } else { String::new() },
                rate: 1.0,
            };
            UL2.map(denoiser).to_vec()
        }
        Objective::Ul2 => config.denoisers.clone(),
    }
}

/// Text that the objective adds to inputs, for a vocabulary to know it.
pub(crate) fn literals(config: &DataConfig) -> Vec<String> {
    denoisers(config).into_iter().map(|denoiser| denoiser.prefix).filter(|prefix| !prefix.is_empty()).collect()
}

/// Checks what can be checked without a tokenizer.
pub(crate) fn validate(config: &DataConfig) -> Result<()> {
    let has_no_effect = |key, wanted: &str| {
        Err(Error::setting(
            key,
            format!("has no effect without data.objective = \"{wanted}\"; set that or remove this"),
        ))
    };
    if config.objective != Objective::SpanCorruption {
        if config.noise_density != default_noise_density() {
            return has_no_effect("data.noise_density", "span_corruption");
        }
        if config.mean_noise_span_length != default_mean_noise_span_length() {
            return has_no_effect("data.mean_noise_span_length", "span_corruption");
        }
    }
    if config.objective != Objective::Ul2 {
        if !config.denoisers.is_empty() {
            return has_no_effect("data.denoisers", "ul2");
        }
        if config.mode_tokens {
            return has_no_effect("data.mode_tokens", "ul2");
        }
    }
    if config.mode_tokens && !config.denoisers.is_empty() {
        return Err(Error::setting("data.mode_tokens", "is for UL2's own denoisers; give each of yours a prefix"));
    }
    if config.objective == Objective::Seq2Seq {
        return Ok(());
    }
    let prompt = config.num_shots > 0 || config.tasks().iter().any(|task| !task.source_prefix.is_empty());
    if prompt {
        let message = "makes inputs from texts alone; remove data.num_shots and data.source_prefix";
        return Err(Error::setting("data.objective", message));
    }
    let key = if config.objective == Objective::Ul2 { "data.denoisers" } else { "data.objective" };
    let denoisers = denoisers(config);
    denoisers.iter().try_for_each(|denoiser| denoiser.check(key))?;
    let denoisers: Vec<Denoiser> = denoisers.iter().map(|denoiser| Denoiser::new(denoiser, Vec::new())).collect();
    raw_length(&denoisers, config).map(|_| ())
}

/// The length of the pieces: the longest for which no denoiser's input is too long.
fn raw_length(denoisers: &[Denoiser], config: &DataConfig) -> Result<usize> {
    let fits = |raw: usize| denoisers.iter().all(|denoiser| denoiser.lengths(raw).0 <= config.max_source_length);
    if !fits(2) {
        let message = format!("{} is too short for this objective", config.max_source_length);
        return Err(Error::setting("data.max_source_length", message));
    }
    // Inputs do not become shorter as pieces become longer.
    let (mut fitting, mut too_long) = (2, RAW_LENGTH_MAX);
    while too_long - fitting > 1 {
        let middle = fitting.midpoint(too_long);
        if fits(middle) { fitting = middle } else { too_long = middle }
    }
    let target = denoisers.iter().map(|denoiser| denoiser.lengths(fitting).1).max().unwrap_or_default();
    if target > config.max_target_length {
        let message = format!(
            "{} is too short: pieces of {fitting} tokens, whose inputs have up to {}, have targets of up to {target}",
            config.max_target_length, config.max_source_length
        );
        return Err(Error::setting("data.max_target_length", message));
    }
    Ok(fitting)
}

/// One way to make an example, ready to use.
#[derive(Clone, Debug)]
struct Denoiser {
    noise_density: f64,
    /// None: the noise is the end.
    mean_noise_span_length: Option<f64>,
    prefix: Vec<u32>,
    rate: f64,
}

impl Denoiser {
    fn new(config: &DenoiserConfig, prefix: Vec<u32>) -> Self {
        let DenoiserConfig { noise_density, mean_noise_span_length, rate, .. } = *config;
        Self { noise_density, mean_noise_span_length, prefix, rate }
    }

    /// Masked tokens and spans of a piece, as `random_spans_noise_mask` of T5 has them.
    fn noise(&self, length: usize) -> (usize, usize) {
        // TensorFlow and Python round halves to even.
        let tokens = ((length as f64 * self.noise_density).round_ties_even() as usize).clamp(1, length - 1);
        let Some(mean) = self.mean_noise_span_length else { return (tokens, 1) };
        let spans = ((tokens as f64 / mean).round_ties_even() as usize).max(1);
        // Every span needs a token, and one before it that stays.
        (tokens, spans.min(tokens).min(length - tokens))
    }

    /// Lengths of input and target of a piece, both with their end of sequence.
    fn lengths(&self, length: usize) -> (usize, usize) {
        let (noise, spans) = self.noise(length);
        let sentinels = if self.mean_noise_span_length.is_some() { spans } else { 0 };
        (self.prefix.len() + length - noise + sentinels + 1, noise + sentinels + 1)
    }
}

/// Makes pieces of text into examples.
#[derive(Clone, Debug)]
pub(crate) struct Corruption {
    denoisers: Vec<Denoiser>,
    sentinels: Vec<u32>,
    eos: u32,
    seed: u64,
    raw_length: usize,
}

/// Keeps masks apart from the order and the split, which mix the same seed.
const NOISE_SALT: u64 = 0x6e6f_6973_655f_6b65;

impl Corruption {
    /// None where the job's objective is to learn targets that it names.
    ///
    /// # Errors
    /// Lengths that do not fit, or a tokenizer with too few sentinels.
    pub(crate) fn new(config: &DataConfig, tokenizer: &Tokenizer, seed: u64) -> Result<Option<Self>> {
        let configs = denoisers(config);
        if configs.is_empty() {
            return Ok(None);
        }
        let prefix = |config: &DenoiserConfig| match config.prefix.is_empty() {
            true => Ok(Vec::new()),
            false => tokenizer.encode_bare(&config.prefix),
        };
        let denoisers = configs.iter().map(|config| Ok(Denoiser::new(config, prefix(config)?)));
        let denoisers = denoisers.collect::<Result<Vec<_>>>()?;
        let raw_length = raw_length(&denoisers, config)?;
        let sentinels = tokenizer.sentinel_ids();
        let with_sentinels = denoisers.iter().filter(|denoiser| denoiser.mean_noise_span_length.is_some());
        let needed = with_sentinels.map(|denoiser| denoiser.noise(raw_length).1).max().unwrap_or_default();
        if needed > sentinels.len() {
            let message = format!(
                "masks {needed} spans of a piece, and the tokenizer has {} sentinels (<extra_id_0> …); shorten \
                 data.max_source_length, or take a tokenizer with more, such as \"unigram\"",
                sentinels.len()
            );
            return Err(Error::setting("data.objective", message));
        }
        Ok(Some(Self { denoisers, sentinels, eos: tokenizer.eos_id(), seed, raw_length }))
    }

    /// The length of a piece in tokens.
    pub(crate) fn raw_length(&self) -> usize {
        self.raw_length
    }

    /// The pieces of so many tokens. A last one of a single token has nothing to mask and is left out.
    pub(crate) fn pieces(&self, tokens: u64) -> u64 {
        let raw_length = self.raw_length as u64;
        tokens / raw_length + u64::from(tokens % raw_length >= 2)
    }

    /// Appends the input and the target that a piece of at least two tokens becomes at this position.
    pub(crate) fn apply(
        &self,
        piece: &[u32],
        (epoch, position): (u64, u64),
        source: &mut Vec<u32>,
        target: &mut Vec<u32>,
    ) {
        let mut random = Random(mix(mix(mix(self.seed ^ NOISE_SALT).wrapping_add(epoch)).wrapping_add(position)));
        let denoiser = self.denoiser(&mut random);
        source.extend(&denoiser.prefix);
        let (noise, spans) = denoiser.noise(piece.len());
        if denoiser.mean_noise_span_length.is_none() {
            let (kept, masked) = piece.split_at(piece.len() - noise);
            source.extend(kept);
            target.extend(masked);
        } else {
            let kept = random.segments(piece.len() - noise, spans);
            let masked = random.segments(noise, spans);
            let mut rest = piece;
            for ((kept, masked), &sentinel) in kept.into_iter().zip(masked).zip(&self.sentinels) {
                let (before, behind) = rest.split_at(kept);
                let (span, behind) = behind.split_at(masked);
                source.extend(before);
                source.push(sentinel);
                target.push(sentinel);
                target.extend(span);
                rest = behind;
            }
        }
        source.push(self.eos);
        target.push(self.eos);
    }

    fn denoiser(&self, random: &mut Random) -> &Denoiser {
        let (last, others) = self.denoisers.split_last().expect("an objective has at least one denoiser");
        let mut left = random.unit() * self.denoisers.iter().map(|denoiser| denoiser.rate).sum::<f64>();
        for denoiser in others {
            left -= denoiser.rate;
            if left < 0.0 {
                return denoiser;
            }
        }
        last
    }
}

/// Random numbers of one position.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Below `bound`; its bias is less than bound / 2^64.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Cuts `items` into so many parts of at least one, every way being equally likely.
    fn segments(&mut self, items: usize, parts: usize) -> Vec<usize> {
        let mut lengths = Vec::with_capacity(parts);
        // Of the places between two items, parts − 1 are cuts: each in turn is one with the chance of being among those
        // left to choose (Knuth's selection sampling).
        let (mut cuts, mut start) = (parts - 1, 0);
        for place in 1..items {
            if self.below(items - place) < cuts {
                cuts -= 1;
                lengths.push(place - start);
                start = place;
            }
        }
        lengths.push(items - start);
        lengths
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::tokenizer::TokenizerSpec;

    fn config(settings: &str) -> DataConfig {
        toml::from_str(&format!("train = \"t.jsonl\"\ninput = \"{{x}}\"\n{settings}")).unwrap()
    }

    fn tokenizer(spec: &TokenizerSpec) -> Tokenizer {
        Tokenizer::from_spec(spec, ["a bee sea dee [NLU] [S2S] [NLG]"].into_iter().map(Cow::Borrowed), None).unwrap()
    }

    fn corruption(settings: &str, seed: u64) -> Corruption {
        Corruption::new(&config(settings), &tokenizer(&TokenizerSpec::Unigram), seed).unwrap().unwrap()
    }

    fn applied(corruption: &Corruption, piece: &[u32], epoch: u64, position: u64) -> (Vec<u32>, Vec<u32>) {
        let (mut source, mut target) = (Vec::new(), Vec::new());
        corruption.apply(piece, (epoch, position), &mut source, &mut target);
        (source, target)
    }

    /// Puts what the target has of every span into its place in the source.
    fn restored(corruption: &Corruption, source: &[u32], target: &[u32]) -> Vec<u32> {
        let sentinels: Vec<u32> = target.iter().copied().filter(|id| corruption.sentinels.contains(id)).collect();
        assert!(sentinels.iter().eq(corruption.sentinels.iter().take(sentinels.len())), "in order, each once");
        let mut spans = target.split(|id| corruption.sentinels.contains(id)).skip(1);
        let mut text = Vec::new();
        for &id in source {
            match sentinels.contains(&id) {
                true => text.extend(spans.next().unwrap()),
                false => text.push(id),
            }
        }
        assert!(spans.next().is_none());
        text
    }

    /// Ids that are neither sentinels nor the end of sequence.
    fn piece(length: usize) -> Vec<u32> {
        (0..length as u32).map(|k| 1_000_000 + k).collect()
    }

    #[test]
    fn lengths_are_those_of_t5() {
        let t5 = corruption("objective = \"span_corruption\"", 0);
        assert_eq!((t5.raw_length(), t5.denoisers[0].lengths(568)), (568, (512, 114)));
        let (source, target) = applied(&t5, &piece(568), 3, 7);
        assert_eq!((source.len(), target.len()), (512, 114));
        assert_eq!((source.last(), target.last()), (Some(&1), Some(&1)));
        // As T5's and transformers' helper computes them, for other lengths and settings.
        for (settings, raw, lengths) in [
            ("max_source_length = 128", 141, (128, 29)),
            ("max_source_length = 256", 284, (256, 58)),
            ("max_source_length = 128\nnoise_density = 0.5\nmax_target_length = 400", 191, (128, 129)),
        ] {
            let corruption = corruption(&format!("objective = \"span_corruption\"\n{settings}"), 0);
            assert_eq!((corruption.raw_length(), corruption.denoisers[0].lengths(raw)), (raw, lengths), "{settings}");
        }
    }

    #[test]
    fn source_and_target_give_back_the_text() {
        let t5 = corruption("objective = \"span_corruption\"", 5);
        for (position, length) in (0..200).map(|k| (k, 2 + (k as usize * 37) % 567)) {
            let piece = piece(length);
            let (source, target) = applied(&t5, &piece, 1, position);
            let (source, target) = (source.strip_suffix(&[1]).unwrap(), target.strip_suffix(&[1]).unwrap());
            assert_eq!(restored(&t5, source, target), piece, "{length}");
            assert!(target.len() < source.len() || length < 10);
        }
    }

    #[test]
    fn spans_are_random_and_of_the_asked_density_and_length() {
        let t5 = corruption("objective = \"span_corruption\"", 5);
        let (mut masked, mut spans, mut of_length_one) = (vec![0_u32; 568], 0, 0);
        for position in 0..2000 {
            let (_, target) = applied(&t5, &piece(568), 0, position);
            for span in target[..target.len() - 1].split(|id| t5.sentinels.contains(id)).skip(1) {
                span.iter().for_each(|&id| masked[(id - 1_000_000) as usize] += 1);
                spans += 1;
                of_length_one += u32::from(span.len() == 1);
            }
        }
        assert_eq!((masked.iter().sum::<u32>(), spans), (2000 * 85, 2000 * 28));
        // 85 items are cut to 28 parts in C(84, 27) ways, of which in C(83, 26) the first has length 1: 27 of 84.
        let share = f64::from(of_length_one) / f64::from(spans);
        assert!((share - 27.0 / 84.0).abs() < 0.01, "{share}");
        // The first token always stays and the last is always masked, as in T5; inside, every place is masked alike.
        assert_eq!((masked[0], masked[567]), (0, 2000));
        for window in masked[50..518].chunks(52) {
            let rate = f64::from(window.iter().sum::<u32>()) / (2000 * window.len()) as f64;
            assert!((rate - 0.15).abs() < 0.01, "{rate}");
        }
    }

    #[test]
    fn masks_depend_on_seed_epoch_and_position() {
        let (one, other) = (
            corruption("objective = \"ul2\"\nmax_target_length = 512", 1),
            corruption("objective = \"ul2\"\nmax_target_length = 512", 2),
        );
        let piece = piece(400);
        let first = applied(&one, &piece, 0, 0);
        assert_eq!(first, applied(&one.clone(), &piece, 0, 0));
        for different in [applied(&other, &piece, 0, 0), applied(&one, &piece, 1, 0), applied(&one, &piece, 0, 1)] {
            assert_ne!(first, different);
        }
    }

    #[test]
    fn ul2_mixes_its_seven_denoisers() {
        let ul2 = corruption("objective = \"ul2\"\nmode_tokens = true\nmax_target_length = 512", 1);
        let piece = piece(ul2.raw_length());
        let (mut longest, mut prefix_lm, mut modes) = (0, 0, std::collections::BTreeMap::<Vec<u32>, u32>::new());
        for position in 0..7000 {
            let (source, target) = applied(&ul2, &piece, 0, position);
            longest = longest.max(source.len());
            let start = source.iter().position(|&id| id >= 1_000_000).unwrap();
            *modes.entry(source[..start].to_vec()).or_default() += 1;
            let (source, target) = (&source[start..source.len() - 1], &target[..target.len() - 1]);
            if target.iter().any(|id| ul2.sentinels.contains(id)) {
                assert_eq!(restored(&ul2, source, target), piece);
            } else {
                prefix_lm += 1;
                assert_eq!([source, target].concat(), piece);
                assert_eq!(target.len(), (piece.len() as f64 * 0.25).round_ties_even() as usize);
            }
        }
        assert!(longest <= 512 && longest > 500, "{longest}");
        let counts: Vec<u32> = modes.values().copied().collect();
        assert_eq!(counts.len(), 3, "{modes:?}");
        // One, two and four of seven, with a standard deviation of at most 42.
        let mut sorted = counts.clone();
        sorted.sort_unstable();
        for (count, expected) in sorted.into_iter().zip([1000_u32, 2000, 4000]) {
            assert!(count.abs_diff(expected) < 200, "{counts:?}");
        }
        assert!((800..1200).contains(&prefix_lm));
    }

    #[test]
    fn sentinels_are_the_tokenizers() {
        let unigram = tokenizer(&TokenizerSpec::Unigram);
        let last = unigram.vocab_size() as u32 - 1;
        assert_eq!(unigram.sentinel_ids(), (0..100).map(|k| last - k).collect::<Vec<_>>());
        assert_eq!(tokenizer(&TokenizerSpec::ByT5).sentinel_ids(), (259..384).collect::<Vec<_>>());
        assert_eq!(tokenizer(&TokenizerSpec::WordLevel).sentinel_ids(), [0; 0]);
        let config = config("objective = \"span_corruption\"\nmax_source_length = 4096\nmax_target_length = 4096");
        let error = |spec| Corruption::new(&config, &tokenizer(spec), 0).unwrap_err().to_string();
        assert!(
            error(&TokenizerSpec::ByT5)
                .starts_with("data.objective: masks 227 spans of a piece, and the tokenizer has 125")
        );
        assert!(error(&TokenizerSpec::WordLevel).contains("has 0 sentinels"));
    }

    #[test]
    fn bad_settings_are_named() {
        for (settings, message) in [
            (
                "target = \"{y}\"\nnoise_density = 0.2",
                "data.noise_density: has no effect without data.objective = \"span_corruption\"",
            ),
            (
                "target = \"{y}\"\nmode_tokens = true",
                "data.mode_tokens: has no effect without data.objective = \"ul2\"",
            ),
            (
                "objective = \"span_corruption\"\ntarget = \"{y}\"",
                "data.target: data.objective makes the targets from the inputs; remove this",
            ),
            (
                "objective = \"span_corruption\"\nnoise_density = 1.0",
                "data.objective: noise_density 1 is not between 0 and 1",
            ),
            (
                "objective = \"span_corruption\"\nmean_noise_span_length = 0.5",
                "data.objective: mean_noise_span_length 0.5 is not 1 or more",
            ),
            (
                "objective = \"span_corruption\"\nmax_target_length = 100",
                "data.max_target_length: 100 is too short: pieces of 568 tokens, whose inputs have up to 512, have targets of up to 114",
            ),
            ("objective = \"span_corruption\"\nmax_source_length = 2", "data.max_source_length: 2 is too short"),
            ("objective = \"span_corruption\"\nnum_shots = 1", "data.objective: makes inputs from texts alone"),
            (
                "objective = \"ul2\"\ndenoisers = [{ noise_density = 0.1, rate = -1.0 }]",
                "data.denoisers: rate -1 is not a positive number",
            ),
            (
                "objective = \"ul2\"\nmode_tokens = true\ndenoisers = [{ noise_density = 0.1 }]",
                "data.mode_tokens: is for UL2's own denoisers",
            ),
        ] {
            let error = config(settings).validate().unwrap_err();
            assert!(error.to_string().starts_with(message), "{error}");
            assert!(error.is_user_error());
        }
    }
}
