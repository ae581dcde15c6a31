//! Which evaluation was the best, and whether there is still hope for a better one: Hugging Face's `metric_for_best_model`,
//! `load_best_model_at_end` and `EarlyStoppingCallback`.

use super::EvalMetrics;

/// What makes an evaluation better than another, and what follows from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// `loss`, or the name of a metric.
    pub metric: String,
    /// Whether more of it is better.
    pub greater_is_better: bool,
    /// Make the weights of the best evaluation the final model.
    pub load_best_model_at_end: bool,
    /// Stop after so many evaluations in a row that are no better than the best before them.
    pub early_stopping_patience: Option<u32>,
    /// By how much an evaluation must be better to count as such for the patience.
    pub early_stopping_threshold: f64,
}

/// The evaluations of a run so far, as a selection sees them.
#[derive(Clone, Debug)]
pub(super) struct Tracker {
    selection: Selection,
    best: Option<EvalMetrics>,
    /// Evaluations since one was better.
    disappointments: u32,
}

impl Tracker {
    /// After the evaluations of a run's earlier life.
    pub(super) fn new(selection: Selection, past: &[EvalMetrics]) -> Self {
        let mut tracker = Self { selection, best: None, disappointments: 0 };
        past.iter().for_each(|evaluation| tracker.observe(evaluation));
        tracker
    }

    pub(super) fn observe(&mut self, evaluation: &EvalMetrics) {
        let (value, best) = (self.value(evaluation), self.best.as_ref().map(|best| self.value(best)));
        // What is not a number is better than nothing, and nothing is worse than it.
        let gain = best.map_or(f64::INFINITY, |best| match self.selection.greater_is_better {
            _ if best.is_nan() && !value.is_nan() => f64::INFINITY,
            true => value - best,
            false => best - value,
        });
        match gain > self.selection.early_stopping_threshold {
            true => self.disappointments = 0,
            false => self.disappointments += 1,
        }
        if gain > 0.0 {
            self.best = Some(evaluation.clone());
        }
    }

    /// The evaluation whose weights are to become the final model.
    pub(super) fn best(&self) -> Option<&EvalMetrics> {
        self.best.as_ref().filter(|_| self.selection.load_best_model_at_end)
    }

    pub(super) fn is_out_of_patience(&self) -> bool {
        self.selection.early_stopping_patience.is_some_and(|patience| self.disappointments >= patience)
    }

    /// For people: what has not become better, and since when.
    pub(super) fn describe(&self) -> String {
        let best = self
            .best
            .as_ref()
            .map_or(String::new(), |best| format!("; the best was {:.4} after step {}", self.value(best), best.step));
        format!("{} has not become better in {} evaluations{best}", self.selection.metric, self.disappointments)
    }

    fn value(&self, evaluation: &EvalMetrics) -> f64 {
        let named = evaluation.metrics.get(&self.selection.metric).copied();
        named.unwrap_or(if self.selection.metric == "loss" { evaluation.eval_loss } else { f64::NAN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(greater_is_better: bool, patience: u32, threshold: f64, values: &[f64]) -> Tracker {
        let metric = if greater_is_better { "rouge1" } else { "loss" };
        let selection = Selection {
            metric: metric.to_owned(),
            greater_is_better,
            load_best_model_at_end: true,
            early_stopping_patience: Some(patience),
            early_stopping_threshold: threshold,
        };
        let evaluations: Vec<EvalMetrics> = (1..)
            .zip(values)
            .map(|(step, &value)| EvalMetrics {
                step,
                eval_loss: value,
                metrics: [("rouge1".to_owned(), value)].into(),
            })
            .collect();
        Tracker::new(selection, &evaluations)
    }

    #[test]
    fn the_best_is_the_first_of_equals() {
        for (greater, values, step) in [
            (true, &[0.1, 0.3, 0.2, 0.3][..], 2),
            (false, &[3.0, 2.0, 2.0, 4.0], 2),
            (true, &[f64::NAN, 0.0], 2),
            (false, &[1.0, f64::NAN], 1),
        ] {
            assert_eq!(tracker(greater, 9, 0.0, values).best().unwrap().step, step, "{values:?}");
        }
        assert!(tracker(true, 1, 0.0, &[]).best().is_none());
    }

    /// As transformers' EarlyStoppingCallback: the threshold delays no new best, only counts.
    #[test]
    fn patience_runs_out_when_nothing_gets_better() {
        for (values, threshold, out) in [
            (&[3.0, 2.0, 1.0][..], 0.0, false),
            (&[3.0, 2.0, 2.0], 0.0, false),
            (&[3.0, 2.0, 2.0, 2.5], 0.0, true),
            (&[3.0, 2.0, 2.0, 1.9, 2.0], 0.0, false),
            (&[3.0, 2.9, 2.8], 0.5, true),
            (&[3.0, 2.9, 2.3], 0.5, false),
            (&[3.0, 2.7, 2.4], 0.5, true),
            (&[3.0, f64::NAN, f64::NAN], 0.0, true),
        ] {
            assert_eq!(tracker(false, 2, threshold, values).is_out_of_patience(), out, "{values:?}");
        }
    }
}
