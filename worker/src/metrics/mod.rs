//! Scores of predicted texts against their targets, one file a family, each equal to the program that defines it.
//!
//! Every metric is a function of what the examples contribute to it. So the score of a part, or of a sample drawn with
//! repetitions, costs no more than a sum.

mod bleu;
mod bootstrap;
mod chrf;
mod error_rates;
mod labels;
mod lcs;
mod porter;
mod rouge;
mod squad;
mod text;

use std::ops::AddAssign;

pub use bootstrap::{Interval, Resampling};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A score of an evaluation. The loss is always computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Loss,
    /// e to the loss.
    Perplexity,
    ExactMatch,
    F1,
    Accuracy,
    MacroF1,
    Rouge1,
    Rouge2,
    #[serde(rename = "rougeL")]
    RougeL,
    #[serde(rename = "rougeLsum")]
    RougeLSum,
    Bleu,
    Chrf,
    #[serde(rename = "chrf++")]
    ChrfPlusPlus,
    PhonemeErrorRate,
    WordErrorRate,
    /// By a classifier; not from these contributions.
    Toxicity,
}

impl Metric {
    /// As in job files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Perplexity => "perplexity",
            Self::ExactMatch => "exact_match",
            Self::F1 => "f1",
            Self::Accuracy => "accuracy",
            Self::MacroF1 => "macro_f1",
            Self::Rouge1 => "rouge1",
            Self::Rouge2 => "rouge2",
            Self::RougeL => "rougeL",
            Self::RougeLSum => "rougeLsum",
            Self::Bleu => "bleu",
            Self::Chrf => "chrf",
            Self::ChrfPlusPlus => "chrf++",
            Self::PhonemeErrorRate => "phoneme_error_rate",
            Self::WordErrorRate => "word_error_rate",
            Self::Toxicity => "toxicity",
        }
    }

    /// Whether texts must be generated for it; the others follow from the loss.
    pub fn needs_predictions(self) -> bool {
        !matches!(self, Self::Loss | Self::Perplexity)
    }

    /// Whether it makes sense of predictions that are classes.
    pub fn is_of_classes(self) -> bool {
        matches!(self, Self::Loss | Self::Accuracy | Self::MacroF1)
    }

    /// Whether more is better.
    pub fn greater_is_better(self) -> bool {
        use Metric::{Loss, Perplexity, PhonemeErrorRate, Toxicity, WordErrorRate};
        !matches!(self, Loss | Perplexity | PhonemeErrorRate | WordErrorRate | Toxicity)
    }
}

/// A text and what it should be.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub prediction: &'a str,
    pub target: &'a str,
}

/// What each example of a set contributes to one metric.
#[derive(Clone, Debug)]
pub struct Contributions(Kind);

#[derive(Clone, Debug)]
enum Kind {
    /// The score is the mean.
    Mean(Vec<f64>),
    /// The score is the sum of the first over the sum of the second.
    Ratio(Vec<[u64; 2]>),
    Bleu(Vec<bleu::Counts>),
    Chrf(Vec<chrf::Counts>),
    Classes(Vec<[u32; 2]>),
}

impl Contributions {
    /// None for what does not follow from texts alone.
    pub fn new(metric: Metric, pairs: &[Pair]) -> Option<Self> {
        Some(Self(match metric {
            Metric::Loss | Metric::Perplexity | Metric::Toxicity => return None,
            Metric::ExactMatch => Kind::Mean(each(pairs, squad::exact_match)),
            Metric::F1 => Kind::Mean(each(pairs, squad::f1)),
            Metric::Accuracy => Kind::Mean(each(pairs, labels::is_right)),
            Metric::MacroF1 => Kind::Classes(labels::classes(pairs.iter().map(|pair| (pair.prediction, pair.target)))),
            Metric::Rouge1 => Kind::Mean(each(pairs, |prediction, target| rouge::rouge_n(prediction, target, 1))),
            Metric::Rouge2 => Kind::Mean(each(pairs, |prediction, target| rouge::rouge_n(prediction, target, 2))),
            Metric::RougeL => Kind::Mean(each(pairs, rouge::rouge_l)),
            Metric::RougeLSum => Kind::Mean(each(pairs, rouge::rouge_l_sum)),
            Metric::Bleu => Kind::Bleu(each(pairs, bleu::Counts::of)),
            Metric::Chrf => Kind::Chrf(each(pairs, chrf::Counts::of)),
            Metric::ChrfPlusPlus => Kind::Chrf(each(pairs, chrf::Counts::with_words)),
            Metric::PhonemeErrorRate => Kind::Ratio(each(pairs, error_rates::token_errors)),
            Metric::WordErrorRate => Kind::Mean(each(pairs, error_rates::is_wrong)),
        }))
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        match &self.0 {
            Kind::Mean(examples) => examples.len(),
            Kind::Ratio(examples) => examples.len(),
            Kind::Bleu(examples) => examples.len(),
            Kind::Chrf(examples) => examples.len(),
            Kind::Classes(examples) => examples.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The score of the whole set.
    pub fn score(&self) -> f64 {
        self.score_of(0..self.len())
    }

    /// The score of the examples of these indices, with as much weight as they are repeated; 0 of none.
    pub fn score_of(&self, sample: impl Iterator<Item = usize>) -> f64 {
        match &self.0 {
            Kind::Mean(examples) => {
                let (sum, count) = sample.fold((0.0, 0_u64), |(sum, count), index| (sum + examples[index], count + 1));
                sum / count.max(1) as f64
            }
            Kind::Ratio(examples) => {
                let [part, whole] = sample
                    .map(|index| examples[index])
                    .fold([0, 0], |[part, whole], [more, total]| [part + more, whole + total]);
                part as f64 / whole.max(1) as f64
            }
            Kind::Bleu(examples) => sum(examples, sample).score(),
            Kind::Chrf(examples) => sum(examples, sample).score(),
            Kind::Classes(examples) => labels::macro_f1(sample.map(|index| examples[index])),
        }
    }
}

fn each<T: Send>(pairs: &[Pair], contribution: impl Fn(&str, &str) -> T + Sync) -> Vec<T> {
    pairs.par_iter().map(|pair| contribution(pair.prediction, pair.target)).collect()
}

fn sum<T: Default + Copy + AddAssign>(examples: &[T], sample: impl Iterator<Item = usize>) -> T {
    let mut sum = T::default();
    sample.for_each(|index| sum += examples[index]);
    sum
}

/// The scores asked for, by name, except the loss and toxicity. `loss` is the mean over target tokens, where it is known.
pub fn scores(wanted: &[Metric], pairs: &[Pair], loss: Option<f64>) -> Vec<(&'static str, f64)> {
    let score = |&metric: &Metric| {
        let value = match metric {
            Metric::Loss | Metric::Toxicity => None,
            Metric::Perplexity => loss.map(f64::exp),
            _ => Contributions::new(metric, pairs).map(|contributions| contributions.score()),
        };
        Some((metric.name(), value?))
    };
    wanted.iter().filter_map(score).collect()
}

#[cfg(test)]
mod tests;
