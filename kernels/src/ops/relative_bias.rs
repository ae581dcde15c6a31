//! T5's relative position bias: a learnt number for each head and bucket of distance.
//!
//! Every distance of `max_distance` or more falls into the last bucket of its side, so that a head's bias is a vector
//! over the clamped distance `key − query` in `-R..=R`, `R = max_distance`. Attention looks it up there.

use crate::{Result, View, ViewMut};

/// How distances fall into buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBuckets {
    pub num_buckets: usize,
    pub max_distance: usize,
    /// Half of the buckets for keys after the query (encoder), or all for keys before it (decoder).
    pub bidirectional: bool,
}

impl RelativeBuckets {
    /// The bucket of `relative = key − query` (T5, `_relative_position_bucket`).
    pub fn bucket(&self, relative: isize) -> usize {
        let _ = relative;
        todo!()
    }
}

/// `bias[H, 2R+1]` (f32) by distance from `table[num_buckets, H]`.
pub fn relative_bias_forward(table: View, buckets: RelativeBuckets, bias: ViewMut) -> Result<()> {
    let _ = (table, buckets, bias);
    todo!()
}

/// `d_table[num_buckets, H] += ` the sums of `d_bias[H, 2R+1]` over each bucket's distances; both f32.
pub fn relative_bias_backward(d_bias: View, buckets: RelativeBuckets, d_table: ViewMut) -> Result<()> {
    let _ = (d_bias, buckets, d_table);
    todo!()
}
