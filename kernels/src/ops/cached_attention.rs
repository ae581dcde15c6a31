//! Self-attention of decoding: one query a sequence, against keys and values that lie in any rows of a cache.
//!
//! For a head, `out = softmax(q · kᵀ + bias[key − query]) · v` over the rows that a sequence names. Sequences may name the
//! same rows: the beams of a search share what their hypotheses have in common, and another choice of beams changes
//! nothing but the names.

use super::{check_dtype, check_shape};
use crate::driver::{Gpu, Launch, Module};
use crate::float::{Float, with_float};
use crate::parallel::{Scratch, SharedMut, for_each_task, with_scratch};
use crate::simd::{LANES, exp, max, multiversion, sum};
use crate::{DType, Device, Error, Result, View, ViewMut};

/// Legend: B sequences, T keys of each, C rows of the cache, H heads of K numbers.
#[derive(Clone, Copy)]
pub struct CachedAttention<'a> {
    /// `[B, H·K]`
    pub q: View<'a>,
    /// `[C, H·K]`
    pub k: View<'a>,
    /// `[C, H·K]`
    pub v: View<'a>,
    /// `[B, T]` (u32): the rows of a sequence's keys, in order of position. The last is at the query's own position.
    pub rows: View<'a>,
    pub heads: usize,
    /// `[H, 2R+1]` (f32) by clamped distance.
    pub bias: View<'a>,
}

/// `out[B, H·K]`
pub fn cached_attention(inputs: CachedAttention, out: ViewMut) -> Result<()> {
    let CachedAttention { q, k, v, rows, heads, bias } = inputs;
    check_shape!(out, q.rows(), q.cols());
    check_shape!(k, v.rows(), q.cols());
    check_shape!(v, k.rows(), q.cols());
    check_shape!(rows, q.rows(), rows.cols());
    check_shape!(bias, heads, bias.cols());
    check_dtype!(q.dtype(), k, v, out);
    check_dtype!(DType::F32, bias);
    assert!(rows.cols() > 0 && bias.cols() % 2 == 1 && q.cols().is_multiple_of(heads));
    match out.device() {
        Device::Gpu(gpu) => launch(gpu, inputs, out)?,
        Device::Cpu(_) => with_float!(q.dtype(), T => cpu::<T>(inputs, out)),
    }
    Ok(())
}

thread_local! {
    static SCORES: Scratch = Scratch::default();
}

fn cpu<T: Float>(inputs: CachedAttention, out: ViewMut) {
    let out = SharedMut::<T>::new(out);
    let (queries, length, inner) = (inputs.rows.rows(), inputs.rows.cols(), inputs.q.cols());
    let stride = length.next_multiple_of(LANES);
    for_each_task(queries, queries * length * inner / 10, |query| {
        with_scratch(&SCORES, inputs.heads * stride + inner, |scratch| {
            let (scores, sums) = scratch.split_at_mut(inputs.heads * stride);
            // SAFETY: a query belongs to one task.
            attend::<T>(inputs, query, scores, sums, unsafe { out.row(query, 0..inner) });
        });
    });
}

multiversion! {
    /// All heads of a query. `scores` has whole vectors for each head, `sums` a number for each column.
    fn attend<T: Float>(inputs: CachedAttention, query: usize, scores: &mut [f32], sums: &mut [f32], out: &mut [T]) {
        let (rows, q) = (inputs.rows.row::<u32>(query), inputs.q.row::<T>(query));
        let size = q.len() / inputs.heads;
        let stride = scores.len() / inputs.heads;
        for (position, &row) in rows.iter().enumerate() {
            let k = inputs.k.row::<T>(row as usize);
            for ((head, q), k) in q.chunks_exact(size).enumerate().zip(k.chunks_exact(size)) {
                scores[head * stride + position] = sum(size, |index| q[index].to_f32() * k[index].to_f32());
            }
        }
        for (head, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let bias = inputs.bias.row::<f32>(head);
            let reach = bias.len() / 2;
            for (position, score) in scores[..rows.len()].iter_mut().enumerate() {
                *score += bias[reach - reach.min(rows.len() - 1 - position)];
            }
            scores[rows.len()..].fill(f32::NEG_INFINITY);
            let most = max(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - most);
            }
            let normalize = 1.0 / sum(stride, |index| scores[index]);
            scores.iter_mut().for_each(|score| *score *= normalize);
        }
        sums.fill(0.0);
        for (position, &row) in rows.iter().enumerate() {
            let v = inputs.v.row::<T>(row as usize);
            for ((head, sums), v) in sums.chunks_exact_mut(size).enumerate().zip(v.chunks_exact(size)) {
                let probability = scores[head * stride + position];
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum += probability * v.to_f32();
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(&*sums) {
            *out = T::from_f32(*sum);
        }
    }
}

fn launch(gpu: &Gpu, inputs: CachedAttention, out: ViewMut) -> Result<()> {
    const WARPS: usize = 4;
    const HEAD_SIZE_MAX: usize = 256;
    let CachedAttention { q, k, v, rows, heads, bias } = inputs;
    let head_size = q.cols() / heads;
    if head_size > HEAD_SIZE_MAX {
        return Err(Error::HeadSize { head_size, most: HEAD_SIZE_MAX });
    }
    gpu.launch(Launch {
        module: Module {
            source: "cached_attention",
            element: q.dtype(),
            constants: &[("HEAD_SIZE", head_size as u32)],
        },
        function: "cached_attention",
        grid: [q.rows() as u32, heads as u32, 1],
        block: (WARPS * 32) as u32,
        shared_bytes: 2 * (4 * WARPS).next_multiple_of(16) + (4 * WARPS * head_size).next_multiple_of(16),
        arguments: &[
            q.into(),
            q.stride().into(),
            k.into(),
            k.stride().into(),
            v.into(),
            v.stride().into(),
            rows.into(),
            rows.stride().into(),
            rows.cols().into(),
            bias.into(),
            bias.stride().into(),
            (bias.cols() / 2).into(),
            (&out).into(),
            out.stride().into(),
        ],
    })
}
