//! The three sub-layers of T5, forward and backward side by side.
//!
//! Each is `x + dropout(f(norm(x)))`. `forward` takes the residual stream and returns it longer by one sub-layer, with what
//! the backward pass needs; `backward` turns the gradient of the stream after the sub-layer into that before it, in place.
//! Normed inputs are not kept: they are computed again, which costs little and saves as much as the stream itself.

mod cross_attention;
mod feed_forward;
mod self_attention;

pub(crate) use cross_attention::{CrossAttention, CrossAttentionSaved};
pub(crate) use feed_forward::{FeedForward, FeedForwardSaved};
pub(crate) use self_attention::{SelfAttention, SelfAttentionSaved};
