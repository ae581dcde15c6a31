//! Against the scores of rouge-score, sacrebleu and SQuAD's script, and the stems of NLTK, for the same texts.
//! `tests/references/metrics.py` made them.

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Reference {
    names: Vec<String>,
    /// Prediction, target, how often both are to be repeated, scores.
    pairs: Vec<(String, String, usize, Vec<f64>)>,
    corpora: Vec<serde_json::Map<String, serde_json::Value>>,
    stems: String,
}

fn reference() -> Reference {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/references/metrics.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Reference {
    fn texts(&self) -> Vec<(String, String)> {
        let repeated = |(prediction, target, times, _): &(String, String, usize, _)| {
            (prediction.repeat(*times), target.repeat(*times))
        };
        self.pairs.iter().map(repeated).collect()
    }
}

fn metric(name: &str) -> Metric {
    serde_json::from_value(name.into()).unwrap()
}

#[test]
fn pairs_score_as_elsewhere() {
    let reference = reference();
    let texts = reference.texts();
    assert!(texts.len() >= 1000);
    let pairs: Vec<Pair> = texts.iter().map(|(prediction, target)| Pair { prediction, target }).collect();
    for (column, name) in reference.names.iter().enumerate() {
        let contributions = Contributions::new(metric(name), &pairs).unwrap();
        let mut between = 0;
        for (index, (_, _, _, scores)) in reference.pairs.iter().enumerate() {
            let (score, expected) = (contributions.score_of(std::iter::once(index)), scores[column]);
            assert!((score - expected).abs() < 1e-6, "{name}: {score}, not {expected}, of {:?}", pairs[index]);
            between += usize::from(expected > 0.0 && expected < 1.0);
        }
        assert!(between >= 400 || name == "exact_match", "{name}: only {between} pairs tell much");
    }
}

#[test]
fn corpora_score_as_elsewhere() {
    let reference = reference();
    let texts = reference.texts();
    let pairs: Vec<Pair> = texts.iter().map(|(prediction, target)| Pair { prediction, target }).collect();
    for corpus in &reference.corpora {
        let number = |key: &str| corpus[key].as_u64().unwrap() as usize;
        let part = &pairs[number("first")..number("last_exclusive")];
        for name in ["bleu", "chrf", "chrf++"] {
            let score = Contributions::new(metric(name), part).unwrap().score();
            let expected = corpus[name].as_f64().unwrap();
            assert!((score - expected).abs() < 1e-6, "{name}: {score}, not {expected}, of {} pairs", part.len());
        }
    }
}

#[test]
fn stems_are_those_of_nltk() {
    let reference = reference();
    let mut words = 0;
    for (word, stem) in reference.stems.split(' ').map(|pair| pair.split_once(':').unwrap()) {
        assert_eq!(porter::stem(word), stem, "{word}");
        words += 1;
    }
    assert!(words > 2000);
}

const ALL: [Metric; 15] = [
    Metric::Loss,
    Metric::Perplexity,
    Metric::ExactMatch,
    Metric::F1,
    Metric::Accuracy,
    Metric::MacroF1,
    Metric::Rouge1,
    Metric::Rouge2,
    Metric::RougeL,
    Metric::RougeLSum,
    Metric::Bleu,
    Metric::Chrf,
    Metric::ChrfPlusPlus,
    Metric::PhonemeErrorRate,
    Metric::WordErrorRate,
];

fn pairs<'a>(texts: &[(&'a str, &'a str)]) -> Vec<Pair<'a>> {
    texts.iter().map(|&(prediction, target)| Pair { prediction, target }).collect()
}

#[test]
fn names_are_those_of_job_files() {
    for metric in ALL {
        assert_eq!(serde_json::to_value(metric).unwrap(), metric.name());
    }
}

#[test]
fn rates() {
    let pairs =
        pairs(&[("HH AH L OW", "HH AH L OW"), ("W ER L", "W ER L D"), ("K AE T S", "K AE T"), (" D AO G", "D AO G")]);
    let wanted = [Metric::ExactMatch, Metric::Accuracy, Metric::PhonemeErrorRate, Metric::WordErrorRate, Metric::Loss];
    let expected =
        [("exact_match", 0.5), ("accuracy", 0.5), ("phoneme_error_rate", 2.0 / 14.0), ("word_error_rate", 0.5)];
    assert_eq!(scores(&wanted, &pairs, None), expected);
    assert_eq!(scores(&[Metric::Perplexity], &[], Some(0.0)), [("perplexity", 1.0)]);
}

#[test]
fn nothing_to_score_is_not_a_nan() {
    for (name, score) in scores(&ALL, &[], None) {
        assert_eq!(score, 0.0, "{name}");
    }
}

#[test]
fn a_sample_scores_as_a_set_of_its_examples() {
    let texts =
        [("the cats sat down here", "a cat sat down here"), ("x", "y"), ("no it was not me", "yes it was me too")];
    let whole = pairs(&texts);
    let sample = [2, 0, 2];
    let drawn = pairs(&sample.map(|index| texts[index]));
    for metric in ALL.into_iter().filter(|metric| metric.needs_predictions()) {
        let of_sample = Contributions::new(metric, &whole).unwrap().score_of(sample.into_iter());
        assert_eq!(of_sample, Contributions::new(metric, &drawn).unwrap().score(), "{}", metric.name());
    }
}
