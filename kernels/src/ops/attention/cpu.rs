//! On the CPU: a task is a head of some sequences; scores of a block of queries are in memory at a time.

use std::ops::Range;

use super::{Attention, AttentionGradients, KEYS_MAX};
use crate::float::Float;
use crate::gemm::{Matrix, MatrixMut, gemm_serial};
use crate::parallel::{Scratch, SharedMut, for_each_task, with_scratch};
use crate::simd::{LANES, add_assign, convert, exp, max, multiversion, sum};
use crate::{DType, Dropout, Result, View, ViewMut};

/// Queries whose scores are in memory at a time.
const QUERY_BLOCK: usize = 64;
/// Sequences are dealt out in groups of at least about this many scores a head.
const GROUP_SCORES: usize = 2048;

impl<'a> Attention<'a> {
    /// How many sequences a task takes. It decides the order in which `d_bias` is summed, so it looks at the shapes only.
    fn group(&self) -> usize {
        (GROUP_SCORES / (self.queries.longest() * self.keys.longest()).max(1)).max(1)
    }

    /// Runs `task(number, head, sequences)` for each head and group of sequences.
    fn for_each_group(&self, passes: usize, task: impl Fn(usize, usize, Range<usize>) + Sync + Send) {
        let (sequences, group) = (self.queries.len(), self.group());
        let scores = sequences * self.heads * self.queries.longest() * self.keys.longest();
        let work = passes * scores * (2 * self.head_size() + 60) / 100;
        for_each_task(sequences.div_ceil(group) * self.heads, work, |index| {
            let (number, head) = (index / self.heads, index % self.heads);
            task(index, head, number * group..sequences.min((number + 1) * group));
        });
    }

    fn head(&self, sequence: usize, head: usize) -> Head<'a> {
        let (queries, keys) = (self.queries.rows(sequence), self.keys.rows(sequence));
        Head {
            columns: head * self.head_size()..(head + 1) * self.head_size(),
            first_position: keys.len() as isize - queries.len() as isize,
            bias: self.bias.map(|bias| bias.row(head)),
            causal: self.causal,
            heads: self.heads,
            mask: self.mask,
            head,
            queries,
            keys,
        }
    }
}

/// One head of one sequence.
struct Head<'a> {
    /// Of the inputs and outputs.
    columns: Range<usize>,
    /// Rows of the inputs and outputs.
    queries: Range<usize>,
    keys: Range<usize>,
    /// The first query's position among the keys.
    first_position: isize,
    bias: Option<&'a [f32]>,
    causal: bool,
    heads: usize,
    head: usize,
    mask: Dropout,
}

impl Head<'_> {
    /// The queries in blocks, as ranges in the sequence.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let count = self.queries.len();
        (0..count).step_by(QUERY_BLOCK).map(move |start| start..count.min(start + QUERY_BLOCK))
    }

    /// How many keys query `query` sees.
    fn visible(&self, query: usize) -> usize {
        if self.causal { (self.first_position + query as isize) as usize + 1 } else { self.keys.len() }
    }

    /// Rows of `view` of some of the queries, in this head's columns.
    fn query_rows<'a, T: Float>(&self, view: View<'a>, queries: &Range<usize>) -> Matrix<'a, T> {
        let rows = self.queries.start + queries.start..self.queries.start + queries.end;
        Matrix::from_view(view.rows_range(rows).columns(self.columns.clone()))
    }

    /// Rows of `view` of the first `count` keys, in this head's columns.
    fn key_rows<'a, T: Float>(&self, view: View<'a>, count: usize) -> Matrix<'a, T> {
        let rows = self.keys.start..self.keys.start + count;
        Matrix::from_view(view.rows_range(rows).columns(self.columns.clone()))
    }

    /// Floats between the scores of two queries that see up to `keys` keys: whole vectors.
    fn stride(&self, keys: usize) -> usize {
        keys.next_multiple_of(LANES)
    }

    /// `a · bᵀ` with a row for each of a block of queries and a column for each of the first `keys` keys.
    fn query_by_key<T: Float>(&self, a: View, b: View, queries: &Range<usize>, keys: usize, product: &mut [f32]) {
        let (a, b) = (self.query_rows::<T>(a, queries), self.key_rows::<T>(b, keys).transposed());
        gemm_serial(a, b, MatrixMut::from_slice(product, queries.len(), keys, self.stride(keys)), false);
    }

    /// How many distances between a query and a key there are, those of the vectors' padding included.
    fn distances(&self) -> usize {
        self.queries.len() + self.stride(self.keys.len())
    }

    /// The place in the bias of each of [`Head::distances`], from the least one on.
    fn places(&self, bias: usize) -> impl Iterator<Item = usize> {
        let reach = (bias / 2) as isize;
        let least = 1 - self.queries.len() as isize - self.first_position;
        (least..).take(self.distances()).map(move |distance| (distance.clamp(-reach, reach) + reach) as usize)
    }

    /// The bias by [`Head::distances`], so that the keys of a query find theirs next to each other.
    fn spread_bias(&self, spread: &mut [f32]) {
        if let Some(bias) = self.bias {
            for (spread, place) in spread.iter_mut().zip(self.places(bias.len())) {
                *spread = bias[place];
            }
        } else {
            spread.fill(0.0);
        }
    }

    /// Which of [`Head::distances`] are those from a query to its keys.
    fn distances_of(&self, query: usize, stride: usize) -> Range<usize> {
        let first = self.queries.len() - 1 - query;
        first..first + stride
    }

    /// The dropout factors of a query's probabilities; `factors` come as those of another query, or as ones.
    fn factors(&self, query: usize, factors: &mut [f32]) {
        if !self.mask.is_none() {
            let index = (self.queries.start + query) * self.heads + self.head;
            self.mask.factors((index * KEYS_MAX) as u64, factors);
        }
    }
}

thread_local! {
    static SCORES: Scratch = Scratch::default();
}

pub(super) fn forward<T: Float>(inputs: Attention, out: ViewMut, logsumexp: ViewMut) {
    let (out, logsumexp) = (SharedMut::<T>::new(out), SharedMut::<f32>::new(logsumexp));
    inputs.for_each_group(2, |_, head, sequences| {
        for sequence in sequences {
            forward_head(&inputs, &inputs.head(sequence, head), &out, &logsumexp);
        }
    });
}

fn forward_head<T: Float>(inputs: &Attention, head: &Head, out: &SharedMut<T>, logsumexp: &SharedMut<f32>) {
    let (rows, longest) = (QUERY_BLOCK.min(head.queries.len()), head.stride(head.keys.len()));
    with_scratch(&SCORES, head.distances() + (rows + 1) * longest, |scratch| {
        let (bias, scratch) = scratch.split_at_mut(head.distances());
        let (factors, scores) = scratch.split_at_mut(longest);
        head.spread_bias(bias);
        factors.fill(1.0);
        for queries in head.blocks() {
            let keys = head.visible(queries.end - 1);
            let stride = head.stride(keys);
            let scores = &mut scores[..queries.len() * stride];
            head.query_by_key::<T>(inputs.q, inputs.k, &queries, keys, scores);
            for (query, scores) in queries.clone().zip(scores.chunks_exact_mut(stride)) {
                let (bias, factors) = (&bias[head.distances_of(query, stride)], &mut factors[..stride]);
                head.factors(query, factors);
                // SAFETY: a query and head belong to one task.
                let logsumexp = unsafe { logsumexp.row(head.queries.start + query, head.head..head.head + 1) };
                logsumexp[0] = softmax(scores, bias, factors, head.visible(query));
            }
            let address = out.address(head.queries.start + queries.start, head.columns.start);
            // SAFETY: the queries' rows in this head's columns belong to this task.
            let out = unsafe { MatrixMut::from_raw(address, queries.len(), head.columns.len(), out.stride()) };
            let probabilities = Matrix::from_slice(scores, queries.len(), keys, stride);
            gemm_serial(probabilities, head.key_rows::<T>(inputs.v, keys), out, false);
        }
    });
}

multiversion! {
    /// The products of a query with its keys become probabilities times dropout factors; returns the logsumexp of the
    /// scores. All come in whole vectors, of which the first `visible` numbers count.
    fn softmax(scores: &mut [f32], bias: &[f32], factors: &[f32], visible: usize) -> f32 {
        let count = scores.len();
        let (bias, factors) = (&bias[..count], &factors[..count]);
        for index in 0..count {
            scores[index] += bias[index];
        }
        scores[visible..].fill(f32::NEG_INFINITY);
        let most = max(scores);
        for vector in scores.as_chunks_mut::<LANES>().0 {
            for score in vector {
                *score = exp(*score - most);
            }
        }
        let total = sum(count, |index| scores[index]);
        let normalize = 1.0 / total;
        for index in 0..count {
            scores[index] *= normalize * factors[index];
        }
        most + total.ln()
    }
}

/// What the backward pass of a head reads and writes.
struct Backward<'a, T> {
    inputs: Attention<'a>,
    logsumexp: View<'a>,
    d_out: View<'a>,
    d_q: SharedMut<'a, T>,
    d_k: SharedMut<'a, T>,
    d_v: SharedMut<'a, T>,
}

pub(super) fn backward<T: Float>(
    inputs: Attention,
    logsumexp: View,
    d_out: View,
    gradients: AttentionGradients,
) -> Result<()> {
    let AttentionGradients { d_q, d_k, d_v, d_bias } = gradients;
    let groups = inputs.queries.len().div_ceil(inputs.group());
    let distances = inputs.bias.map_or(0, |bias| bias.cols());
    // A row for each task: group by group, in them the heads.
    let mut partials = d_out.device().empty(DType::F32, groups * inputs.heads, distances)?;
    let shared = SharedMut::<f32>::new(partials.view_mut());
    let (d_q, d_k, d_v) = (SharedMut::new(d_q), SharedMut::new(d_k), SharedMut::new(d_v));
    let backward = Backward::<T> { inputs, logsumexp, d_out, d_q, d_k, d_v };
    inputs.for_each_group(5, |task, head, sequences| {
        // SAFETY: a task has its own row of partial sums.
        let d_bias = unsafe { shared.row(task, 0..distances) };
        d_bias.fill(0.0);
        for sequence in sequences {
            backward.head(&inputs.head(sequence, head), d_bias);
        }
    });
    if let Some(d_bias) = d_bias {
        let d_bias = d_bias.into_slice::<f32>();
        for partials in partials.as_slice::<f32>().chunks_exact(d_bias.len()) {
            add_assign(d_bias, partials);
        }
    }
    Ok(())
}

/// Memory of a head's backward pass.
struct Buffers<'a> {
    /// By [`Head::distances`].
    bias: &'a mut [f32],
    d_bias: &'a mut [f32],
    factors: &'a mut [f32],
    /// Of a block of queries with all keys.
    scores: &'a mut [f32],
    d_scores: &'a mut [f32],
    /// Of all keys.
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
}

impl<T: Float> Backward<'_, T> {
    fn head(&self, head: &Head, d_bias: &mut [f32]) {
        let (keys, size) = (head.keys.len() * head.columns.len(), head.columns.len());
        let longest = head.stride(head.keys.len());
        let scores = QUERY_BLOCK.min(head.queries.len()) * longest;
        let total = 2 * head.distances() + longest + 2 * scores + 2 * keys;
        with_scratch(&SCORES, total, |mut scratch| {
            let mut take = |length: usize| scratch.split_off_mut(..length).expect("lengths add up to the total");
            let mut buffers = Buffers {
                bias: take(head.distances()),
                d_bias: take(head.distances()),
                factors: take(longest),
                scores: take(scores),
                d_scores: take(scores),
                d_k: take(keys),
                d_v: take(keys),
            };
            head.spread_bias(buffers.bias);
            buffers.factors.fill(1.0);
            for sum in [&mut buffers.d_bias, &mut buffers.d_k, &mut buffers.d_v] {
                sum.fill(0.0);
            }
            for queries in head.blocks() {
                self.block(head, queries, &mut buffers);
            }
            if !d_bias.is_empty() {
                let places = head.places(d_bias.len());
                places.zip(buffers.d_bias.iter()).for_each(|(place, value)| d_bias[place] += value);
            }
            let rows = buffers.d_k.chunks_exact(size).zip(buffers.d_v.chunks_exact(size));
            for (row, (d_k, d_v)) in head.keys.clone().zip(rows) {
                // SAFETY: the keys' rows in this head's columns belong to this task.
                convert(d_k, unsafe { self.d_k.row(row, head.columns.clone()) });
                // SAFETY: likewise.
                convert(d_v, unsafe { self.d_v.row(row, head.columns.clone()) });
            }
        });
    }

    /// A block of queries: writes its rows of `d_q`, adds to `d_k`, `d_v` and `d_bias`.
    fn block(&self, head: &Head, queries: Range<usize>, buffers: &mut Buffers) {
        let (keys, size) = (head.visible(queries.end - 1), head.columns.len());
        let stride = head.stride(keys);
        let scores = &mut buffers.scores[..queries.len() * stride];
        let d_scores = &mut buffers.d_scores[..queries.len() * stride];
        head.query_by_key::<T>(self.inputs.q, self.inputs.k, &queries, keys, scores);
        head.query_by_key::<T>(self.d_out, self.inputs.v, &queries, keys, d_scores);

        let rows = scores.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride));
        for (query, (scores, d_scores)) in queries.clone().zip(rows) {
            let (distances, factors) = (head.distances_of(query, stride), &mut buffers.factors[..stride]);
            head.factors(query, factors);
            let logsumexp = self.logsumexp.row::<f32>(head.queries.start + query)[head.head];
            let bias = &buffers.bias[distances.clone()];
            softmax_backward(scores, d_scores, bias, factors, logsumexp, head.visible(query));
            add_assign(&mut buffers.d_bias[distances], d_scores);
        }

        let (q, d_out) = (head.query_rows::<T>(self.inputs.q, &queries), head.query_rows::<T>(self.d_out, &queries));
        let probabilities = Matrix::from_slice(scores, queries.len(), keys, stride);
        let d_scores = Matrix::from_slice(d_scores, queries.len(), keys, stride);
        let (d_k, d_v) = (&mut *buffers.d_k, &mut *buffers.d_v);
        gemm_serial(probabilities.transposed(), d_out, MatrixMut::from_slice(d_v, keys, size, size), true);
        gemm_serial(d_scores.transposed(), q, MatrixMut::from_slice(d_k, keys, size, size), true);
        let address = self.d_q.address(head.queries.start + queries.start, head.columns.start);
        // SAFETY: the queries' rows in this head's columns belong to this task.
        let d_q = unsafe { MatrixMut::from_raw(address, queries.len(), size, self.d_q.stride()) };
        gemm_serial(d_scores, head.key_rows::<T>(self.inputs.k, keys), d_q, false);
    }
}

multiversion! {
    /// `scores`, which come as `q · kᵀ`, become `f · p`, and `d_scores`, which come as `d_out · vᵀ`, the gradient of the
    /// scores. All come in whole vectors, of which the first `visible` numbers count.
    fn softmax_backward(
        scores: &mut [f32],
        d_scores: &mut [f32],
        bias: &[f32],
        factors: &[f32],
        logsumexp: f32,
        visible: usize,
    ) {
        let count = scores.len();
        let (d_scores, bias, factors) = (&mut d_scores[..count], &bias[..count], &factors[..count]);
        for index in 0..count {
            scores[index] += bias[index] - logsumexp;
        }
        scores[visible..].fill(f32::NEG_INFINITY);
        d_scores[visible..].fill(0.0);
        for vector in scores.as_chunks_mut::<LANES>().0 {
            for score in vector {
                *score = exp(*score);
            }
        }
        for index in 0..count {
            d_scores[index] *= factors[index];
        }
        let delta = sum(count, |index| scores[index] * d_scores[index]);
        for index in 0..count {
            d_scores[index] = scores[index] * (d_scores[index] - delta);
            scores[index] *= factors[index];
        }
    }
}
