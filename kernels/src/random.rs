//! Random numbers by counter: the value at (seed, stream, index) needs no state, so that whoever computes a micro-batch,
//! and however often a block is recomputed, sees the same dropout mask.

/// Which elements to drop: a pure function of the key, the stream and the element's index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The share of elements that become zero; the others are divided by `1 - probability`.
    pub probability: f32,
    /// The key of the generator: one per run and step.
    pub seed: u64,
    /// Tells apart micro-batches and places in the model.
    pub stream: u64,
}

impl Dropout {
    /// Keeps everything.
    pub const NONE: Dropout = Dropout { probability: 0.0, seed: 0, stream: 0 };

    pub fn is_none(&self) -> bool {
        self.probability == 0.0
    }
}
