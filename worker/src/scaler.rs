//! Dynamic loss scaling for fp16, as `torch.amp.GradScaler` does it.
//!
//! Gradients in fp16 underflow, so the loss is multiplied by a scale before the backward pass, and the gradient divided by
//! it after. A step whose gradient overflows is skipped and halves the scale; 2000 good steps in a row double it. Scales
//! are powers of two, so that scaling rounds nothing.

use serde::{Deserialize, Serialize};

/// 2^16
const FIRST_EXPONENT: i32 = 16;
/// Good steps in a row after which the scale doubles.
const GROWTH_INTERVAL: u32 = 2000;
/// A gradient that overflows at this scale is not finite for other reasons.
const LEAST_EXPONENT: i32 = -24;
/// The largest power of two of f32.
const MOST_EXPONENT: i32 = 127;

/// The scale, and what decides its next value; a part of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    /// The scale is two to this power.
    exponent: i32,
    /// In a row, since the scale last changed.
    good_steps: u32,
    /// Steps without an update since the training began.
    skipped_steps: u64,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self { exponent: FIRST_EXPONENT, good_steps: 0, skipped_steps: 0 }
    }
}

impl LossScaler {
    pub fn scale(&self) -> f64 {
        f64::from(self.exponent).exp2()
    }

    pub fn skipped_steps(&self) -> u64 {
        self.skipped_steps
    }

    /// Whether the scale can still be halved.
    pub fn can_shrink(&self) -> bool {
        self.exponent > LEAST_EXPONENT
    }

    /// Takes note of a committed step.
    pub fn update(&mut self, overflowed: bool) {
        if overflowed {
            self.exponent = (self.exponent - 1).max(LEAST_EXPONENT);
            self.good_steps = 0;
            self.skipped_steps += 1;
            return;
        }
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            self.exponent = (self.exponent + 1).min(MOST_EXPONENT);
            self.good_steps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `torch.amp.GradScaler()` says after the same steps.
    #[test]
    fn scales_are_those_of_torch() {
        let mut scaler = LossScaler::default();
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(true);
        scaler.update(true);
        assert_eq!(scaler.scale(), 16384.0);
        (0..1999).for_each(|_| scaler.update(false));
        assert_eq!(scaler.scale(), 16384.0);
        scaler.update(false);
        assert_eq!(scaler.scale(), 32768.0);
        // An overflow begins the count anew.
        (0..1999).for_each(|_| scaler.update(false));
        scaler.update(true);
        (0..1999).for_each(|_| scaler.update(false));
        assert_eq!((scaler.scale(), scaler.skipped_steps()), (16384.0, 3));
    }

    #[test]
    fn scales_have_an_end() {
        let mut scaler = LossScaler::default();
        (0..100).for_each(|_| scaler.update(true));
        assert_eq!((scaler.scale(), scaler.can_shrink()), (2f64.powi(-24), false));
        (0..2000 * 200).for_each(|_| scaler.update(false));
        assert_eq!(scaler.scale() as f32, 2f32.powi(127));
    }
}
