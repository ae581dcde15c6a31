//! Learning-rate schedules, those of `transformers.get_scheduler`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The names of Hugging Face's `lr_scheduler_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    #[default]
    Linear,
    Constant,
    ConstantWithWarmup,
    Cosine,
    InverseSqrt,
    Polynomial,
}

/// The learning rate as a function of the optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    /// The rate that the multiplier multiplies.
    pub learning_rate: f64,
    pub warmup_steps: u64,
    /// Steps of the whole training.
    pub total_steps: u64,
    /// Where `Polynomial` ends, as a rate, and by which power it decays.
    pub lr_end: f64,
    pub power: f64,
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        self.learning_rate * self.multiplier(step)
    }

    /// What torch's `LambdaLR` multiplies the rate by at step `step`, counted from 0.
    ///
    /// As in transformers, step k of W warm-up steps gets k/W: the first step of a training
    /// with warm-up has rate 0 and moves nothing, and step W is the first at the full rate.
    pub fn multiplier(&self, step: u64) -> f64 {
        use SchedulerType::*;
        let warmup = self.warmup_steps;
        if step < warmup && self.kind != Constant {
            return step as f64 / warmup as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(warmup).max(1) as f64;
        match self.kind {
            Constant | ConstantWithWarmup => 1.0,
            Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            Cosine => {
                let progress = (step - warmup) as f64 / decay_steps;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
            InverseSqrt => {
                // transformers takes the warm-up as the time scale, and 10,000 without one.
                let timescale = if warmup == 0 { 10_000 } else { warmup };
                let shifted = step + timescale - warmup;
                (shifted as f64 / timescale as f64).sqrt().recip()
            }
            Polynomial if step > self.total_steps => self.lr_end / self.learning_rate,
            Polynomial => {
                let remaining = 1.0 - (step - warmup) as f64 / decay_steps;
                let rate = (self.learning_rate - self.lr_end) * remaining.powf(self.power) + self.lr_end;
                rate / self.learning_rate
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: SchedulerType, warmup_steps: u64, total_steps: u64) -> Schedule {
        Schedule { kind, learning_rate: 1e-3, warmup_steps, total_steps, lr_end: 1e-7, power: 1.0 }
    }

    #[track_caller]
    fn check(schedule: Schedule, expected: &[(u64, f64)]) {
        for &(step, value) in expected {
            let got = schedule.multiplier(step);
            assert!((got - value).abs() < 1e-12, "{:?} at {step}: {got}, not {value}", schedule.kind);
        }
    }

    #[test]
    fn multipliers_are_those_of_transformers() {
        use SchedulerType::*;
        check(
            schedule(Linear, 4, 12),
            &[(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (6, 0.75), (11, 0.125), (12, 0.0), (99, 0.0)],
        );
        check(schedule(Linear, 0, 4), &[(0, 1.0), (1, 0.75), (3, 0.25)]);
        check(schedule(Constant, 4, 12), &[(0, 1.0), (50, 1.0)]);
        check(schedule(ConstantWithWarmup, 4, 12), &[(0, 0.0), (2, 0.5), (4, 1.0), (50, 1.0)]);
        let half_sqrt3 = 0.866_025_403_784_438_6;
        check(
            schedule(Cosine, 2, 14),
            &[(0, 0.0), (1, 0.5), (2, 1.0), (4, 0.5 + 0.5 * half_sqrt3), (8, 0.5), (10, 0.25), (14, 0.0)],
        );
        check(schedule(InverseSqrt, 4, 99), &[(0, 0.0), (3, 0.75), (4, 1.0), (16, 0.5), (64, 0.25)]);
        check(schedule(InverseSqrt, 0, 99), &[(0, 1.0), (30_000, 0.5)]);
        let end = 1e-4;
        check(
            schedule(Polynomial, 2, 10),
            &[(0, 0.0), (1, 0.5), (2, 1.0), (6, 0.5 * (1.0 - end) + end), (10, end), (11, end)],
        );
        let squared = Schedule { power: 2.0, lr_end: 0.0, ..schedule(Polynomial, 0, 4) };
        check(squared, &[(0, 1.0), (1, 0.5625), (2, 0.25), (4, 0.0)]);
    }

    #[test]
    fn a_training_shorter_than_its_warmup_stays_finite() {
        use SchedulerType::*;
        for kind in [Linear, Constant, ConstantWithWarmup, Cosine, InverseSqrt, Polynomial] {
            for step in 0..20 {
                assert!(schedule(kind, 10, 5).multiplier(step).is_finite(), "{kind:?} at {step}");
            }
        }
    }

    #[test]
    fn the_rate_is_the_multiple_of_the_peak() {
        assert_eq!(schedule(SchedulerType::Linear, 4, 12).learning_rate_at(8), 0.5e-3);
    }
}
