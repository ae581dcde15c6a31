//! The most probable tokens of each row of logits, so that the rest of a vocabulary need not leave the device.
//!
//! For logits `x`, times the head's scale, `log p = x − logsumexp(x)`. Tokens that are set apart (because their scores are
//! to be changed, or because they are banned) are passed over, and their log probabilities given separately.

use super::cross_entropy::logsumexp;
use super::{check_dtype, check_shape};
use crate::driver::{Gpu, Launch, Module};
use crate::parallel::{SharedMut, for_each_task};
use crate::simd::{max, multiversion};
use crate::{DType, Device, Result, View, ViewMut};

/// What is found of `[B,V]` logits. Legend: B rows, V vocabulary, N tokens wanted of each row, A set apart of all rows.
pub struct TopTokens<'a> {
    /// `[A,1]` (u32): of row `i`, the distinct tokens `apart_starts[i]..apart_starts[i + 1]`.
    pub apart: View<'a>,
    /// `[B+1,1]` (u32)
    pub apart_starts: View<'a>,
    /// `[B,N]` (u32): of equals the lower first; `u32::MAX` where there are no more.
    pub tokens: ViewMut<'a>,
    /// `[B,N]` (f32), falling; −∞ where there are no more.
    pub log_probs: ViewMut<'a>,
    /// `[A,1]` (f32)
    pub apart_log_probs: ViewMut<'a>,
    /// `[B,1]` (f32)
    pub logsumexp: ViewMut<'a>,
}

/// Finds them; `logits[B,V]` (f32), which `scale` multiplies first, lose those that are set apart.
pub fn top_tokens(logits: ViewMut, scale: f32, found: TopTokens) -> Result<()> {
    let TopTokens { apart, apart_starts, tokens, log_probs, apart_log_probs, logsumexp } = &found;
    let (rows, count) = (logits.rows(), tokens.cols());
    check_shape!(tokens, rows, count);
    check_shape!(log_probs, rows, count);
    check_shape!(logsumexp, rows, 1);
    check_shape!(apart_starts, rows + 1, 1);
    check_shape!(apart_log_probs, apart.rows(), 1);
    check_dtype!(DType::F32, logits, log_probs, apart_log_probs, logsumexp);
    check_dtype!(DType::U32, apart, apart_starts, tokens);
    assert!(count > 0 && logits.view().is_contiguous(), "no tokens wanted, or logits with gaps");
    match logits.device() {
        Device::Gpu(gpu) => launch(gpu, logits, scale, found)?,
        Device::Cpu(_) => cpu(logits, scale, found),
    }
    Ok(())
}

fn cpu(logits: ViewMut, scale: f32, found: TopTokens) {
    let (rows, vocabulary, count) = (logits.rows(), logits.cols(), found.tokens.cols());
    let (apart, starts) = (found.apart.as_slice::<u32>(), found.apart_starts.as_slice::<u32>());
    let logits = SharedMut::<f32>::new(logits);
    let tokens = SharedMut::<u32>::new(found.tokens);
    let log_probs = SharedMut::<f32>::new(found.log_probs);
    let of_apart = SharedMut::<f32>::new(found.apart_log_probs);
    let sums = SharedMut::<f32>::new(found.logsumexp);
    for_each_task(rows, rows * vocabulary, |row| {
        // SAFETY: a row belongs to one task, here and below.
        let (logits, lse) = unsafe { (logits.row(row, 0..vocabulary), sums.row(row, 0..1)) };
        lse[0] = logsumexp(logits, scale);
        for index in starts[row] as usize..starts[row + 1] as usize {
            let logit = &mut logits[apart[index] as usize];
            // SAFETY: an index belongs to one row.
            let log_prob = unsafe { of_apart.row(index, 0..1) };
            log_prob[0] = *logit * scale - lse[0];
            *logit = f32::NEG_INFINITY;
        }
        // SAFETY: as above.
        let (tokens, log_probs) = unsafe { (tokens.row(row, 0..count), log_probs.row(row, 0..count)) };
        largest(logits, log_probs, tokens);
        log_probs.iter_mut().for_each(|value| *value = *value * scale - lse[0]);
    });
}

multiversion! {
    /// The largest numbers of a row, falling, and where they are.
    fn largest(row: &[f32], values: &mut [f32], places: &mut [u32]) {
        /// Numbers that are looked at together: none of them counts as long as the largest of them does not.
        const BLOCK: usize = 128;
        values.fill(f32::NEG_INFINITY);
        places.fill(u32::MAX);
        let last = values.len() - 1;
        for (block, numbers) in row.chunks(BLOCK).enumerate() {
            if max(numbers) <= values[last] {
                continue;
            }
            for (index, &number) in numbers.iter().enumerate() {
                if number > values[last] {
                    let mut place = last;
                    while place > 0 && values[place - 1] < number {
                        (values[place], places[place]) = (values[place - 1], places[place - 1]);
                        place -= 1;
                    }
                    (values[place], places[place]) = (number, (block * BLOCK + index) as u32);
                }
            }
        }
    }
}

fn launch(gpu: &Gpu, logits: ViewMut, scale: f32, found: TopTokens) -> Result<()> {
    const THREADS_MAX: usize = 1024;
    let vocabulary = logits.cols();
    let threads = vocabulary.div_ceil(16).next_multiple_of(32).min(THREADS_MAX);
    let outputs = [&found.tokens, &found.log_probs, &found.apart_log_probs, &found.logsumexp];
    assert!(outputs.iter().all(|output| output.view().is_contiguous()), "outputs with gaps");
    gpu.launch(Launch {
        module: Module { source: "top_tokens", element: DType::F32, constants: &[] },
        function: "top_tokens",
        grid: [logits.rows() as u32, 1, 1],
        block: threads as u32,
        shared_bytes: 128 + 256 + 16,
        arguments: &[
            (&logits).into(),
            vocabulary.into(),
            scale.into(),
            found.apart.into(),
            found.apart_starts.into(),
            found.tokens.cols().into(),
            (&found.tokens).into(),
            (&found.log_probs).into(),
            (&found.apart_log_probs).into(),
            (&found.logsumexp).into(),
        ],
    })
}
