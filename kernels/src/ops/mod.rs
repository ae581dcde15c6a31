//! The operations, one file each: its mathematics, its code for every device, its tests against a float64 oracle.
//!
//! Legend of shapes: N rows (tokens), I inputs, O outputs, D model, H heads, K head dimension, F feed-forward,
//! V vocabulary, R the largest distance that a relative bias tells apart.

mod activation;
mod adafactor;
mod adamw;
mod attention;
mod cached_attention;
mod cast;
mod cross_entropy;
mod elementwise;
mod embedding;
mod linear;
mod lora;
mod modules;
mod norm;
mod relative_bias;
mod residual;
mod rms_norm;
mod slots;
mod top_tokens;

pub use activation::{gated_gelu_backward, gated_gelu_forward, relu_backward, relu_forward};
pub use activation::{tanh_backward, tanh_forward};
pub use adafactor::{Adafactor, adafactor};
pub use adamw::{AdamW, Moments, adamw};
pub use attention::{Attention, AttentionGradients, attention_backward, attention_forward};
pub use cached_attention::{CachedAttention, cached_attention};
pub use cast::cast;
pub use cross_entropy::{CrossEntropy, IGNORED_LABEL, cross_entropy_forward, cross_entropy_forward_backward};
pub use embedding::{embedding_backward, embedding_forward};
pub use linear::{PreparedWeight, linear_forward_prepared};
pub use linear::{linear_backward_input, linear_backward_input_scaled, linear_backward_weight};
pub use linear::{linear_forward, linear_forward_scaled};
pub use lora::{Lora, LoraGradients, lora_backward, lora_backward_input, lora_forward};
pub(crate) use modules::{KernelModule, modules};
pub use norm::{NORM_BLOCK, find_not_finite, global_norm, sums_of_squares};
pub use relative_bias::{RelativeBuckets, relative_bias_backward, relative_bias_forward};
pub use residual::{dropout, residual_forward};
pub use rms_norm::{rms_norm_backward, rms_norm_forward};
pub use slots::{FactoredMoments, TensorSlot, TensorSlots};
pub use top_tokens::{TopTokens, top_tokens};

/// A wrong shape is a bug of the caller.
macro_rules! check_shape {
    ($view:ident, $rows:expr, $cols:expr) => {
        assert_eq!(($view.rows(), $view.cols()), ($rows, $cols), concat!("shape of ", stringify!($view)))
    };
}
use check_shape;

/// So is a wrong type.
macro_rules! check_dtype {
    ($dtype:expr, $($view:ident),+) => {
        $(assert_eq!($view.dtype(), $dtype, concat!("type of ", stringify!($view)));)+
    };
}
use check_dtype;
