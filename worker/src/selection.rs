//! The keys of `[training]` that say which evaluation is the best one, and what follows from that.

use crate::config::TrainingConfig;
use crate::metrics::Metric;
use crate::{Error, Result};

impl TrainingConfig {
    /// Whether anything depends on which evaluation is the best.
    pub fn selects(&self) -> bool {
        self.load_best_model_at_end || self.early_stopping_patience.is_some()
    }

    /// By which metric evaluations are compared, and whether more of it is better.
    ///
    /// # Errors
    /// If there is no metric of this name.
    pub fn metric_for_best(&self) -> Result<(Metric, bool)> {
        let name = self.metric_for_best_model.as_deref().unwrap_or("loss");
        let metric = serde_json::from_value(name.strip_prefix("eval_").unwrap_or(name).into());
        let metric: Metric =
            metric.map_err(|error| Error::config("training.metric_for_best_model", error.to_string()))?;
        Ok((metric, self.greater_is_better.unwrap_or(metric.greater_is_better())))
    }

    pub(crate) fn validate_selection(&self) -> Result<()> {
        self.metric_for_best()?;
        for (key, given) in [
            ("training.metric_for_best_model", self.metric_for_best_model.is_some()),
            ("training.greater_is_better", self.greater_is_better.is_some()),
        ] {
            if given && !self.selects() {
                let problem = "nothing depends on it; set load_best_model_at_end or early_stopping_patience";
                return Err(Error::config(key, problem));
            }
        }
        if self.early_stopping_patience == Some(0) {
            let problem = "is 0, must be at least 1; leave it out to train to the end";
            return Err(Error::config("training.early_stopping_patience", problem));
        }
        let threshold = self.early_stopping_threshold;
        let key = "training.early_stopping_threshold";
        if threshold < 0.0 || !threshold.is_finite() {
            return Err(Error::config(key, format!("is {threshold}, must be at least 0")));
        }
        if threshold > 0.0 && self.early_stopping_patience.is_none() {
            return Err(Error::config(key, "nothing depends on it; set early_stopping_patience"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_directions_are_hugging_faces() {
        for (name, given, metric, greater) in [
            (None, None, Metric::Loss, false),
            (Some("eval_loss"), None, Metric::Loss, false),
            (Some("eval_rougeL"), None, Metric::RougeL, true),
            (Some("word_error_rate"), None, Metric::WordErrorRate, false),
            (Some("perplexity"), Some(true), Metric::Perplexity, true),
        ] {
            let config = TrainingConfig {
                load_best_model_at_end: true,
                metric_for_best_model: name.map(str::to_string),
                greater_is_better: given,
                ..TrainingConfig::default()
            };
            config.validate().unwrap();
            assert_eq!(config.metric_for_best().unwrap(), (metric, greater));
        }
    }
}
