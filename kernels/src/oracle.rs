//! The operations once more, naively and in f64: what the fast ones are compared with.
//!
//! Written from the mathematics alone, sharing no code with the operations. Matrices are row by row; `rows`, `cols` and
//! the like are told apart by the legend of [`crate::ops`]. The gradients are checked against finite differences.

use crate::ops::{Adafactor, AdamW, RelativeBuckets, TensorSlot};
use crate::{Dropout, Segments};

/// Random inputs for tests: SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// Standard normal numbers, by Box and Muller.
    pub(crate) fn normals(&mut self, count: usize) -> Vec<f32> {
        let mut uniform = || ((self.bits() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        (0..count).map(|_| normal() as f32).collect()
    }
}

/// The dropout factor of element `index`, by Philox4x32-7 one block at a time.
pub(crate) fn dropout_factor(mask: Dropout, index: u64) -> f64 {
    let block = index / 128 * 16 + index % 16;
    let mut x = [block as u32, (block >> 32) as u32, mask.stream as u32, (mask.stream >> 32) as u32];
    let mut key = [mask.seed as u32, (mask.seed >> 32) as u32];
    for _ in 0..7 {
        let (a, b) = (0xD251_1F53_u64 * u64::from(x[0]), 0xCD9E_8D57_u64 * u64::from(x[2]));
        x = [(b >> 32) as u32 ^ x[1] ^ key[0], b as u32, (a >> 32) as u32 ^ x[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    let half = (index / 16 % 8) as usize;
    let number = f64::from(x[half % 4] >> (half / 4 * 16) & 0xffff) / 65536.0;
    let dropped_share = mask.dropped_share();
    if number < dropped_share { 0.0 } else { 1.0 / (1.0 - dropped_share) }
}

/// The factors of a tensor of `count` elements.
pub(crate) fn dropout_factors(mask: Dropout, count: usize) -> Vec<f64> {
    (0..count).map(|index| dropout_factor(mask, index as u64)).collect()
}

pub(crate) fn multiply(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x * y).collect()
}

pub(crate) fn add(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

pub(crate) fn transpose(x: &[f64], cols: usize) -> Vec<f64> {
    let rows = x.len() / cols;
    (0..x.len()).map(|index| x[index % rows * cols + index / rows]).collect()
}

/// `a[·,k] · b[k,·]`
pub(crate) fn matmul(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let (m, n) = (a.len() / k, b.len() / k);
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + p] * b[p * n + j];
            }
        }
    }
    c
}

/// `(y, rstd)`
pub(crate) fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let cols = weight.len();
    let rstd = |row: &[f64]| 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / cols as f64 + eps).sqrt();
    let rstd: Vec<f64> = x.chunks(cols).map(rstd).collect();
    let y = (0..x.len()).map(|index| x[index] * rstd[index / cols] * weight[index % cols]).collect();
    (y, rstd)
}

/// `(d_x, d_weight)`
pub(crate) fn rms_norm_backward(d_y: &[f64], x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let cols = weight.len();
    let (_, rstd) = rms_norm(x, weight, eps);
    let (mut d_x, mut d_weight) = (vec![0.0; x.len()], vec![0.0; cols]);
    for (row, r) in rstd.into_iter().enumerate() {
        let at = |col: usize| row * cols + col;
        let along = (0..cols).map(|col| d_y[at(col)] * weight[col] * x[at(col)]).sum::<f64>();
        for col in 0..cols {
            d_x[at(col)] = r * weight[col] * d_y[at(col)] - x[at(col)] * r.powi(3) * along / cols as f64;
            d_weight[col] += d_y[at(col)] * x[at(col)] * r;
        }
    }
    (d_x, d_weight)
}

pub(crate) fn tanh(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.tanh()).collect()
}

/// From the output.
pub(crate) fn tanh_backward(y: &[f64], d_y: &[f64]) -> Vec<f64> {
    y.iter().zip(d_y).map(|(y, d_y)| d_y * (1.0 - y * y)).collect()
}

pub(crate) fn relu(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.max(0.0)).collect()
}

pub(crate) fn relu_backward(x: &[f64], d_h: &[f64]) -> Vec<f64> {
    x.iter().zip(d_h).map(|(&x, d_h)| if x > 0.0 { *d_h } else { 0.0 }).collect()
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

fn gelu_tanh_slope(x: f64) -> f64 {
    let scale = (2.0 / std::f64::consts::PI).sqrt();
    let tanh = (scale * (x + 0.044_715 * x.powi(3))).tanh();
    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * scale * (1.0 + 3.0 * 0.044_715 * x * x)
}

/// From `x[N,2F]`.
pub(crate) fn gated_gelu(x: &[f64], features: usize) -> Vec<f64> {
    let row = |x: &[f64]| (0..features).map(|col| gelu_tanh(x[col]) * x[features + col]).collect::<Vec<_>>();
    x.chunks(2 * features).flat_map(row).collect()
}

pub(crate) fn gated_gelu_backward(x: &[f64], d_h: &[f64], features: usize) -> Vec<f64> {
    let row = |(x, d_h): (&[f64], &[f64])| {
        let gate = (0..features).map(|col| d_h[col] * x[features + col] * gelu_tanh_slope(x[col]));
        let up = (0..features).map(|col| d_h[col] * gelu_tanh(x[col]));
        gate.chain(up).collect::<Vec<_>>()
    };
    x.chunks(2 * features).zip(d_h.chunks(features)).flat_map(row).collect()
}

pub(crate) fn embedding(ids: &[u32], table: &[f64], cols: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| table[id as usize * cols..][..cols].to_vec()).collect()
}

/// The gradient of a table of `rows` rows.
pub(crate) fn embedding_backward(ids: &[u32], d_y: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut d_table = vec![0.0; rows * cols];
    for (index, value) in d_y.iter().enumerate() {
        d_table[ids[index / cols] as usize * cols + index % cols] += value;
    }
    d_table
}

/// `bias[H, 2R+1]`
pub(crate) fn relative_bias(table: &[f64], buckets: RelativeBuckets, heads: usize) -> Vec<f64> {
    let reach = buckets.max_distance as isize;
    let row = |head: usize| (-reach..=reach).map(move |distance| table[buckets.bucket(distance) * heads + head]);
    (0..heads).flat_map(row).collect()
}

pub(crate) fn relative_bias_backward(d_bias: &[f64], buckets: RelativeBuckets, heads: usize) -> Vec<f64> {
    let distances = 2 * buckets.max_distance + 1;
    let mut d_table = vec![0.0; buckets.num_buckets * heads];
    for (index, value) in d_bias.iter().enumerate() {
        let distance = (index % distances) as isize - buckets.max_distance as isize;
        d_table[buckets.bucket(distance) * heads + index / distances] += value;
    }
    d_table
}

/// The inputs of attention; as [`crate::ops::Attention`].
#[derive(Clone)]
pub(crate) struct Attention<'a> {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) bias: Option<Vec<f64>>,
    pub(crate) queries: &'a Segments,
    pub(crate) keys: &'a Segments,
    pub(crate) heads: usize,
    pub(crate) size: usize,
    pub(crate) causal: bool,
    pub(crate) mask: Dropout,
}

pub(crate) struct AttentionGradients {
    pub(crate) d_q: Sums,
    pub(crate) d_k: Sums,
    pub(crate) d_v: Sums,
    pub(crate) d_bias: Sums,
}

/// Sums, and how large the numbers were that cancelled in them: what rounding errors are proportional to.
#[derive(Clone, Default)]
pub(crate) struct Sums {
    pub(crate) values: Vec<f64>,
    /// Sums of the squares of the terms' sizes.
    squares: Vec<f64>,
}

impl Sums {
    pub(crate) fn zeros(length: usize) -> Self {
        Sums { values: vec![0.0; length], squares: vec![0.0; length] }
    }

    /// Adds a term that came out of numbers of about this size.
    pub(crate) fn add(&mut self, index: usize, term: f64, size: f64) {
        self.values[index] += term;
        self.squares[index] += size * size;
    }

    /// The rows of these and of others, of `cols` columns, side by side.
    pub(crate) fn beside(&self, others: &Sums, cols: usize) -> Self {
        let beside = |left: &[f64], right: &[f64]| {
            left.chunks(cols).zip(right.chunks(cols)).flat_map(|(left, right)| [left, right].concat()).collect()
        };
        Sums { values: beside(&self.values, &others.values), squares: beside(&self.squares, &others.squares) }
    }

    /// Of a random walk of such steps.
    pub(crate) fn sizes(&self) -> Vec<f64> {
        self.squares.iter().map(|squares| squares.sqrt()).collect()
    }
}

impl Attention<'_> {
    /// `(out, logsumexp)`
    pub(crate) fn forward(&self) -> (Sums, Vec<f64>) {
        let mut out = Sums::zeros(self.q.len());
        let mut logsumexp = vec![0.0; self.q.len() / self.size];
        self.for_each_query(|query, head, keys| {
            let total = keys.iter().map(|key| key.score.exp()).sum::<f64>();
            logsumexp[query * self.heads + head] = total.ln();
            for key in keys {
                for col in 0..self.size {
                    let term = key.score.exp() / total * key.factor * self.v[self.at(key.row, head, col)];
                    out.add(self.at(query, head, col), term, term);
                }
            }
        });
        (out, logsumexp)
    }

    /// With `out`, `δ` is taken from it as from any other input, and not from the probabilities: a device that does so sees
    /// the rounding of `out`, which is no fault of its backward pass.
    pub(crate) fn backward(&self, d_out: &[f64], out: Option<&[f64]>) -> AttentionGradients {
        let (mut d_q, mut d_k, mut d_v) =
            (Sums::zeros(self.q.len()), Sums::zeros(self.k.len()), Sums::zeros(self.k.len()));
        let mut d_bias = Sums::zeros(self.bias.as_ref().map_or(0, Vec::len));
        self.for_each_query(|query, head, keys| {
            let total = keys.iter().map(|key| key.score.exp()).sum::<f64>();
            let p: Vec<f64> = keys.iter().map(|key| key.score.exp() / total).collect();
            let d_p: Vec<Sums> = keys.iter().map(|key| self.d_p(d_out, query, head, key)).collect();
            let delta = match out {
                Some(out) => {
                    let columns = self.at(query, head, 0)..self.at(query, head, 0) + self.size;
                    out[columns.clone()].iter().zip(&d_out[columns]).map(|(out, d_out)| out * d_out).sum::<f64>()
                }
                None => p.iter().zip(&d_p).map(|(p, d_p)| p * d_p.values[0]).sum::<f64>(),
            };
            for (index, key) in keys.iter().enumerate() {
                let d_score = p[index] * (d_p[index].values[0] - delta);
                let size = p[index] * (d_p[index].sizes()[0] + delta.abs());
                for col in 0..self.size {
                    let (at_query, at_key) = (self.at(query, head, col), self.at(key.row, head, col));
                    let d_value = p[index] * key.factor * d_out[at_query];
                    d_v.add(at_key, d_value, d_value);
                    d_q.add(at_query, d_score * self.k[at_key], size * self.k[at_key]);
                    d_k.add(at_key, d_score * self.q[at_query], size * self.q[at_query]);
                }
                if let Some(distance) = key.distance {
                    d_bias.add(distance, d_score, size);
                }
            }
        });
        AttentionGradients { d_q, d_k, d_v, d_bias }
    }

    fn d_p(&self, d_out: &[f64], query: usize, head: usize, key: &Key) -> Sums {
        let mut d_p = Sums::zeros(1);
        for col in 0..self.size {
            let term = key.factor * d_out[self.at(query, head, col)] * self.v[self.at(key.row, head, col)];
            d_p.add(0, term, term);
        }
        d_p
    }

    fn at(&self, row: usize, head: usize, col: usize) -> usize {
        (row * self.heads + head) * self.size + col
    }

    fn for_each_query(&self, mut f: impl FnMut(usize, usize, &[Key])) {
        for sequence in 0..self.queries.len() {
            let (queries, keys) = (self.queries.rows(sequence), self.keys.rows(sequence));
            for (index, query) in queries.clone().enumerate() {
                let position = (index + keys.len()) as isize - queries.len() as isize;
                for head in 0..self.heads {
                    let seen = keys.clone().enumerate();
                    let seen = seen.filter(|(index, _)| !self.causal || *index as isize <= position);
                    let seen = seen.map(|(index, row)| self.key(query, head, row, index, index as isize - position));
                    f(query, head, &seen.collect::<Vec<_>>());
                }
            }
        }
    }

    fn key(&self, query: usize, head: usize, row: usize, index: usize, relative: isize) -> Key {
        let product = (0..self.size).map(|col| self.q[self.at(query, head, col)] * self.k[self.at(row, head, col)]);
        let distance = self.bias.as_ref().map(|bias| {
            let reach = (bias.len() / self.heads / 2) as isize;
            head * bias.len() / self.heads + (relative.clamp(-reach, reach) + reach) as usize
        });
        let bias = distance.map_or(0.0, |distance| self.bias.as_ref().map_or(0.0, |bias| bias[distance]));
        let number = ((query * self.heads + head) as u64) << 20 | index as u64;
        Key { row, score: product.sum::<f64>() + bias, factor: dropout_factor(self.mask, number), distance }
    }
}

/// A key as a query sees it.
struct Key {
    row: usize,
    score: f64,
    factor: f64,
    /// Its place in the bias.
    distance: Option<usize>,
}

/// The unsmoothed losses, and the gradient of the sum of the smoothed ones by the logits; `None` for an ignored row.
pub(crate) fn cross_entropy(logits: &[f64], labels: &[Option<usize>], smoothing: f64) -> (Vec<f64>, Vec<f64>) {
    let vocabulary = logits.len() / labels.len();
    let mut gradient = vec![0.0; logits.len()];
    let mut loss = |(row, label): (usize, &Option<usize>)| {
        let Some(label) = *label else { return 0.0 };
        let logits = &logits[row * vocabulary..][..vocabulary];
        let logsumexp = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        for (index, logit) in logits.iter().enumerate() {
            let target = smoothing / vocabulary as f64 + if index == label { 1.0 - smoothing } else { 0.0 };
            gradient[row * vocabulary + index] = (logit - logsumexp).exp() - target;
        }
        logsumexp - logits[label]
    };
    let losses = labels.iter().enumerate().map(&mut loss).collect();
    (losses, gradient)
}

/// A tensor under an update by AdamW or Adafactor, and its moments, element by element as the papers' formulas have it.
pub(crate) struct Updated {
    pub(crate) parameters: Vec<f64>,
    /// The first moments (AdamW) or the means over columns, one a row (Adafactor of a matrix).
    pub(crate) first: Vec<f64>,
    /// The second moments, or the means over rows.
    pub(crate) second: Vec<f64>,
}

impl Updated {
    pub(crate) fn adamw(&mut self, rule: &AdamW, slot: &TensorSlot, gradient: &[f64]) {
        let square: f64 = self.parameters.iter().map(|p| p * p).sum();
        let rms = (square / self.parameters.len() as f64).sqrt();
        let scale = if rule.scale_by_rms && slot.is_matrix { rms.max(1e-3) } else { 1.0 };
        let rate = rule.learning_rate * scale;
        let decay = if slot.decays { rule.weight_decay } else { 0.0 };
        let unbias = |beta: f64| 1.0 - beta.powi(rule.step as i32);
        for (i, g) in gradient.iter().enumerate() {
            self.first[i] = rule.beta1 * self.first[i] + (1.0 - rule.beta1) * g;
            self.second[i] = rule.beta2 * self.second[i] + (1.0 - rule.beta2) * g * g;
            let (m, v) = (self.first[i] / unbias(rule.beta1), self.second[i] / unbias(rule.beta2));
            self.parameters[i] -= rate * (decay * self.parameters[i] + m / (v.sqrt() + rule.epsilon));
        }
    }

    pub(crate) fn adafactor(&mut self, rule: &Adafactor, slot: &TensorSlot, gradient: &[f64]) {
        let (rows, cols) = (slot.rows, slot.cols);
        let beta = 1.0 - (rule.step as f64).powf(-0.8);
        let square = |index: usize| gradient[index] * gradient[index] + 1e-30;
        let row_means = (0..rows).map(|r| (0..cols).map(|c| square(r * cols + c)).sum::<f64>() / cols as f64);
        let col_means = (0..cols).map(|c| (0..rows).map(|r| square(r * cols + c)).sum::<f64>() / rows as f64);
        let blend = |old: &mut f64, mean: f64| *old = beta * *old + (1.0 - beta) * mean;
        self.first.iter_mut().zip(row_means).for_each(|(old, mean)| blend(old, mean));
        self.second.iter_mut().zip(col_means).for_each(|(old, mean)| blend(old, mean));
        let row_mean = self.first.iter().sum::<f64>() / rows as f64;
        let moment = |index: usize| match slot.is_matrix {
            true => self.first[index / cols] / row_mean * self.second[index % cols],
            false => self.second[index],
        };
        let update: Vec<f64> = gradient.iter().enumerate().map(|(i, g)| g / moment(i).sqrt()).collect();
        let rms = (update.iter().map(|u| u * u).sum::<f64>() / update.len() as f64).sqrt();
        let decay = if slot.decays { rule.weight_decay } else { 0.0 };
        for (p, u) in self.parameters.iter_mut().zip(&update) {
            *p -= rule.learning_rate * (decay * *p + u / rms.max(1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares `gradient` with that of `f(x) · weights` by central differences.
    fn check(name: &str, x: &[f64], gradient: &[f64], weights: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) {
        let objective = |x: &[f64]| multiply(&f(x), weights).iter().sum::<f64>();
        let step = 1e-5;
        for index in 0..x.len() {
            let mut moved = x.to_vec();
            moved[index] = x[index] + step;
            let above = objective(&moved);
            moved[index] = x[index] - step;
            let slope = (above - objective(&moved)) / (2.0 * step);
            assert!((slope - gradient[index]).abs() < 1e-7 * (1.0 + slope.abs()), "{name}[{index}]: {slope}");
        }
    }

    fn normals(random: &mut Random, count: usize) -> Vec<f64> {
        random.normals(count).into_iter().map(f64::from).collect()
    }

    #[test]
    fn gradients_of_norm_and_activations_are_slopes() {
        let mut random = Random::new(1);
        let (x, weight, d_y) = (normals(&mut random, 12), normals(&mut random, 4), normals(&mut random, 12));
        let (d_x, d_weight) = rms_norm_backward(&d_y, &x, &weight, 1e-2);
        check("d_x", &x, &d_x, &d_y, |x| rms_norm(x, &weight, 1e-2).0);
        check("d_weight", &weight, &d_weight, &d_y, |weight| rms_norm(&x, weight, 1e-2).0);
        check("relu", &x, &relu_backward(&x, &d_y), &d_y, relu);
        check("tanh", &x, &tanh_backward(&tanh(&x), &d_y), &d_y, tanh);
        check("gated gelu", &x, &gated_gelu_backward(&x, &d_y[..6], 3), &d_y[..6], |x| gated_gelu(x, 3));
    }

    #[test]
    fn gradients_of_tables_are_slopes() {
        let mut random = Random::new(2);
        let (table, d_y) = (normals(&mut random, 8), normals(&mut random, 12));
        let ids = [3, 0, 3, 1, 1, 3];
        let gradient = embedding_backward(&ids, &d_y, 4, 2);
        check("embedding", &table, &gradient, &d_y, |table| embedding(&ids, table, 2));
        let buckets = RelativeBuckets { num_buckets: 4, max_distance: 5, bidirectional: true };
        let d_bias = normals(&mut random, 22);
        let gradient = relative_bias_backward(&d_bias, buckets, 2);
        check("bias", &table, &gradient, &d_bias, |table| relative_bias(table, buckets, 2));
    }

    #[test]
    fn gradients_of_attention_are_slopes() {
        let mut random = Random::new(3);
        let (queries, keys) = (Segments::from_offsets(&[0, 2, 5]), Segments::from_offsets(&[0, 3, 7]));
        for causal in [false, true] {
            let inputs = Attention {
                q: normals(&mut random, 5 * 4),
                k: normals(&mut random, 7 * 4),
                v: normals(&mut random, 7 * 4),
                bias: Some(normals(&mut random, 2 * 5)),
                queries: &queries,
                keys: &keys,
                heads: 2,
                size: 2,
                causal,
                mask: Dropout::new(0.3, 4, 5),
            };
            let d_out = normals(&mut random, 5 * 4);
            let gradients = inputs.backward(&d_out, None);
            let with = |set: &dyn Fn(&mut Attention)| {
                let mut inputs = inputs.clone();
                set(&mut inputs);
                inputs.forward().0.values
            };
            check("d_q", &inputs.q, &gradients.d_q.values, &d_out, |q| with(&|inputs| inputs.q = q.to_vec()));
            check("d_k", &inputs.k, &gradients.d_k.values, &d_out, |k| with(&|inputs| inputs.k = k.to_vec()));
            check("d_v", &inputs.v, &gradients.d_v.values, &d_out, |v| with(&|inputs| inputs.v = v.to_vec()));
            let bias = inputs.bias.clone().unwrap();
            check("d_bias", &bias, &gradients.d_bias.values, &d_out, |bias| {
                with(&|inputs| inputs.bias = Some(bias.to_vec()))
            });
        }
    }

    #[test]
    fn gradient_of_cross_entropy_is_its_slope() {
        let mut random = Random::new(4);
        let logits = normals(&mut random, 15);
        let labels = [Some(2), None, Some(0)];
        let smoothing = 0.1;
        let (_, gradient) = cross_entropy(&logits, &labels, smoothing);
        let smoothed = |logits: &[f64]| {
            let (losses, _) = cross_entropy(logits, &labels, 0.0);
            let row = |row: usize| {
                let Some(label) = labels[row] else { return 0.0 };
                let logits = &logits[row * 5..][..5];
                let uniform = losses[row] + logits[label] - logits.iter().sum::<f64>() / 5.0;
                (1.0 - smoothing) * losses[row] + smoothing * uniform
            };
            (0..3).map(row).collect()
        };
        check("logits", &logits, &gradient, &[1.0; 3], smoothed);
    }
}
