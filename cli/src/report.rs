//! A run as people see it on stderr: a progress bar on a terminal, plain lines elsewhere.

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use quintet_coordinator::state::{EvalMetrics, Event, LostWorker, Recovery, TrainMetrics};
use serde_json::Value;

/// Shows the events of a run, and remembers what its summary needs.
pub(crate) struct Reporter {
    total_steps: u64,
    bar: Option<ProgressBar>,
    /// For one who starts the workers by hand.
    announce_joins: bool,
    last_line: Option<Instant>,
    pub(crate) last_train: Option<TrainMetrics>,
    pub(crate) last_eval: Option<EvalMetrics>,
}

/// Without a terminal, no more than a line in this time: a log is read by people too.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

impl Reporter {
    pub(crate) fn new(total_steps: u64, start_step: u64, announce_joins: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} [{elapsed}<{eta}] {msg}");
            let bar = ProgressBar::new(total_steps).with_position(start_step);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Reporter { total_steps, bar, announce_joins, last_line: None, last_train: None, last_eval: None }
    }

    /// A line that stays.
    pub(crate) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    pub(crate) fn show(&mut self, event: Event) {
        match event {
            Event::Joined { host, pid, joined, expected, .. } => {
                if self.announce_joins {
                    self.line(&format!("{joined} of {expected} workers joined: process {pid} on {host}"));
                }
            }
            Event::Started { workers, step } => {
                let plural = if workers == 1 { "" } else { "s" };
                let next = match step > self.total_steps {
                    true => "all steps are done".to_string(),
                    false => format!("step {step} of {} begins", self.total_steps),
                };
                self.line(&format!("{workers} worker{plural} ready; {next}"));
            }
            Event::ThroughCoordinator { what } => self.line(&what),
            Event::Linked { gradients } => self.line(&gradients),
            Event::Train(metrics) => {
                self.show_step(&metrics);
                self.last_train = Some(metrics);
            }
            Event::Eval(metrics) => {
                self.line(&format!("step {}: {}", metrics.step, scores(&metrics)));
                self.last_eval = Some(metrics);
            }
            Event::Best(metrics) => {
                self.line(&format!("the best model is that of step {}: {}", metrics.step, scores(&metrics)));
                self.last_eval = Some(metrics);
            }
            Event::Saved { step } => self.line(&format!("step {step}: checkpoint saved")),
            Event::SaveFailed { step, problem } => {
                self.line(&format!("warning: step {step}: no checkpoint: {problem}; training goes on"));
            }
            Event::StorageFull { problem, seconds } => {
                self.line(&format!("warning: {problem}; waiting up to {seconds:.0} seconds for room"));
            }
            Event::Lost { workers, left } => {
                for lost in workers {
                    let LostWorker { worker, host, pid, why, .. } = lost;
                    self.line(&format!("lost worker {worker} on {host} (pid {pid}): {why}; {left} left"));
                }
            }
            Event::TriedAgain { step } => {
                self.line(&format!("step {step} failed, though all workers are alive; it is computed again"));
            }
            Event::Refused { reason } => self.line(&format!("warning: {reason}")),
            Event::Waiting { workers, needed, seconds } => {
                let there = format!("{workers} workers there, {needed} needed");
                self.line(&format!("{there}; waiting up to {seconds:.0} seconds for others"));
            }
            Event::StateIncomplete { problem, seconds } => {
                self.line(&format!("{problem}; waiting up to {seconds:.0} seconds for them to come back"));
            }
            Event::Recovery(recovery) => self.line(&recovered(&recovery)),
        }
    }

    fn show_step(&mut self, metrics: &TrainMetrics) {
        let mut text = format!(
            "loss {:.4}  grad_norm {:.3}  lr {:.2e}  {:.0} tokens/s",
            metrics.loss, metrics.grad_norm, metrics.learning_rate, metrics.tokens_per_second
        );
        if let (Some(scale), true) = (metrics.loss_scale, metrics.grad_norm.is_nan()) {
            text += &format!("  (no update: the gradient overflowed at loss scale {scale})");
        }
        if let Some(bar) = &self.bar {
            bar.set_position(metrics.step);
            bar.set_message(text);
        } else if metrics.step == self.total_steps || self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL)
        {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{}  {text}", metrics.step, self.total_steps);
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What a change of membership came to.
fn recovered(recovery: &Recovery) -> String {
    let Recovery { step, generation, workers, seconds, .. } = recovery;
    let mut what = Vec::new();
    if recovery.coordinator_restarted {
        what.push("the coordinator back".to_string());
    }
    match recovery.lost.len() {
        0 => {}
        lost => what.push(format!("{lost} lost")),
    }
    match (recovery.joined.len(), recovery.joined.iter().filter(|joined| joined.healed).count()) {
        (0, _) => {}
        (joined, 0) => what.push(format!("{joined} joined")),
        (joined, healed) => what.push(format!("{joined} joined ({healed} given the state)")),
    }
    if recovery.steps_recomputed > 0 {
        what.push(format!("{} committed steps are computed again", recovery.steps_recomputed));
    }
    if what.is_empty() {
        what.push("tried again".to_string());
    }
    format!(
        "step {step} committed by {workers} worker(s) as generation {generation}, after {seconds:.2} s: {}",
        what.join(", ")
    )
}

pub(crate) fn scores(metrics: &EvalMetrics) -> String {
    let mut text = format!("eval_loss {:.4}", metrics.eval_loss);
    for (name, value) in &metrics.metrics {
        text += &format!("  {name} {value:.4}");
    }
    text
}

/// A few lines of `predictions.jsonl`, spread over the file.
pub(crate) fn sample_predictions(output_dir: &Path, count: usize) -> Vec<Value> {
    let text = fs::read_to_string(output_dir.join("predictions.jsonl")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let stride = (lines.len() / count.max(1)).max(1);
    lines.iter().step_by(stride).take(count).filter_map(|line| serde_json::from_str(line).ok()).collect()
}
