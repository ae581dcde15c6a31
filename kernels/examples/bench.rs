//! Times every operation at the shapes of t5-small (8 × (128 + 32) tokens) and of a tiny model, forward and backward:
//! `cargo run --release -p quintet-kernels --example bench`.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::Instant;

use half::bf16;
use quintet_kernels::ops::{self, Attention, AttentionGradients, CrossEntropy};
use quintet_kernels::{DType, Device, Dropout, Segments, Tensor};

struct Model {
    name: &'static str,
    d_model: usize,
    heads: usize,
    head_size: usize,
    d_ff: usize,
    vocabulary: usize,
    source: Segments,
    target: Segments,
}

struct Bench {
    device: Device,
    dtype: DType,
    mask: Dropout,
}

fn main() {
    let even =
        |count: u32, length: u32| Segments::from_offsets(&(0..=count).map(|index| index * length).collect::<Vec<_>>());
    let models = [
        Model {
            name: "t5-small",
            d_model: 512,
            heads: 8,
            head_size: 64,
            d_ff: 2048,
            vocabulary: 32128,
            source: even(8, 128),
            target: even(8, 32),
        },
        Model {
            name: "tiny",
            d_model: 128,
            heads: 4,
            head_size: 32,
            d_ff: 512,
            vocabulary: 80,
            source: even(64, 8),
            target: even(64, 8),
        },
    ];
    for model in &models {
        for dtype in [DType::F32, DType::Bf16] {
            let mask = Dropout { probability: 0.1, seed: 1, stream: 2 };
            println!("\n{} {dtype:?}, {} threads", model.name, rayon::current_num_threads());
            Bench { device: Device::cpu(), dtype, mask }.run(model);
        }
    }
}

impl Bench {
    fn run(&self, model: &Model) {
        let (rows, inner) = (model.source.end(), model.heads * model.head_size);
        self.linear("linear qkv", rows, model.d_model, 3 * inner);
        self.linear("linear o", rows, inner, model.d_model);
        self.linear("linear wi", rows, model.d_model, model.d_ff);
        self.linear("linear wo", rows, model.d_ff, model.d_model);
        self.linear("linear decoder wi", model.target.end(), model.d_model, model.d_ff);
        self.rows(rows, model.d_model, model.d_ff);
        self.attention("attention encoder", model, &model.source, &model.source, true);
        self.attention("attention cross", model, &model.target, &model.source, false);
        self.attention("attention decoder", model, &model.target, &model.target, true);
        self.head(model.target.end(), model.d_model, model.vocabulary);
    }

    fn tensor(&self, rows: usize, cols: usize) -> Tensor {
        self.typed(self.dtype, rows, cols)
    }

    fn typed(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let value = |index: usize| ((index * 7919) % 1009) as f32 / 1009.0 - 0.5;
        let values: Vec<f32> = (0..rows * cols).map(value).collect();
        match dtype {
            DType::Bf16 => {
                let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                self.device.upload(&values, rows, cols).unwrap()
            }
            _ => self.device.upload(&values, rows, cols).unwrap(),
        }
    }

    fn linear(&self, name: &str, rows: usize, inputs: usize, outputs: usize) {
        let (x, w) = (self.tensor(rows, inputs), self.tensor(outputs, inputs));
        let (mut y, mut d_x) = (self.tensor(rows, outputs), self.tensor(rows, inputs));
        let mut d_w = self.typed(DType::F32, outputs, inputs);
        let flops = 2 * rows * inputs * outputs;
        time(&format!("{name} forward"), flops, "GFLOP/s", || {
            ops::linear_forward(x.view(), w.view(), y.view_mut(), false).unwrap();
        });
        time(&format!("{name} backward input"), flops, "GFLOP/s", || {
            ops::linear_backward_input(y.view(), w.view(), d_x.view_mut(), false).unwrap();
        });
        time(&format!("{name} backward weight"), flops, "GFLOP/s", || {
            ops::linear_backward_weight(y.view(), x.view(), d_w.view_mut()).unwrap();
        });
    }

    fn rows(&self, rows: usize, width: usize, features: usize) {
        let bytes = self.dtype.bytes() * rows * width;
        let (x, delta, mut y) = (self.tensor(rows, width), self.tensor(rows, width), self.tensor(rows, width));
        let (weight, mut d_weight) = (self.tensor(1, width), self.typed(DType::F32, 1, width));
        let mut rstd = self.typed(DType::F32, rows, 1);
        time("rms_norm forward", 2 * bytes, "GB/s", || {
            ops::rms_norm_forward(x.view(), weight.view(), 1e-6, y.view_mut(), rstd.view_mut()).unwrap();
        });
        time("rms_norm backward", 4 * bytes, "GB/s", || {
            let (d_x, d_weight) = (y.view_mut(), d_weight.view_mut());
            ops::rms_norm_backward(delta.view(), x.view(), weight.view(), rstd.view(), d_x, d_weight).unwrap();
        });
        time("residual with dropout", 3 * bytes, "GB/s", || {
            ops::residual_forward(x.view(), delta.view(), self.mask, y.view_mut()).unwrap();
        });
        time("residual without", 3 * bytes, "GB/s", || {
            ops::residual_forward(x.view(), delta.view(), Dropout::NONE, y.view_mut()).unwrap();
        });
        let bytes = self.dtype.bytes() * rows * features;
        let (wide, mut h, mut d_wide) =
            (self.tensor(rows, 2 * features), self.tensor(rows, features), self.tensor(rows, 2 * features));
        time("gated gelu forward, dropout", 3 * bytes, "GB/s", || {
            ops::gated_gelu_forward(wide.view(), self.mask, h.view_mut()).unwrap();
        });
        time("gated gelu backward, dropout", 5 * bytes, "GB/s", || {
            ops::gated_gelu_backward(wide.view(), h.view(), self.mask, d_wide.view_mut()).unwrap();
        });
        time("relu forward, dropout", 2 * bytes, "GB/s", || {
            ops::relu_forward(wide.view().columns(0..features), self.mask, h.view_mut()).unwrap();
        });
    }

    fn attention(&self, name: &str, model: &Model, queries: &Segments, keys: &Segments, biased: bool) {
        let (heads, inner) = (model.heads, model.heads * model.head_size);
        let (q, kv) = (self.tensor(queries.end(), inner), self.tensor(keys.end(), 2 * inner));
        let (mut d_q, mut d_kv) = (self.tensor(queries.end(), inner), self.tensor(keys.end(), 2 * inner));
        let (mut out, mut lse) = (self.tensor(queries.end(), inner), self.typed(DType::F32, queries.end(), heads));
        let (bias, mut d_bias) = (self.typed(DType::F32, heads, 257), self.typed(DType::F32, heads, 257));
        let (k, v) = (kv.view().columns(0..inner), kv.view().columns(inner..2 * inner));
        let bias = biased.then_some(bias.view());
        let inputs = Attention { q: q.view(), k, v, queries, keys, heads, bias, causal: false, mask: self.mask };
        let scores: usize = (0..queries.len()).map(|index| queries.rows(index).len() * keys.rows(index).len()).sum();
        time(&format!("{name} forward"), 4 * scores * inner, "GFLOP/s", || {
            ops::attention_forward(inputs, out.view_mut(), lse.view_mut()).unwrap();
        });
        time(&format!("{name} backward"), 10 * scores * inner, "GFLOP/s", || {
            let (d_k, d_v) = d_kv.view_mut().split_columns(inner);
            let d_bias = biased.then_some(d_bias.view_mut());
            let gradients = AttentionGradients { d_q: d_q.view_mut(), d_k, d_v, d_bias };
            ops::attention_backward(inputs, out.view(), lse.view(), out.view(), gradients).unwrap();
        });
    }

    fn head(&self, rows: usize, width: usize, vocabulary: usize) {
        let (h, w, mut d_h) = (self.tensor(rows, width), self.tensor(vocabulary, width), self.tensor(rows, width));
        let mut d_w = self.typed(DType::F32, vocabulary, width);
        let mut losses = self.typed(DType::F32, rows, 1);
        let ids: Vec<u32> = (0..rows as u32).map(|row| row * 31 % vocabulary as u32).collect();
        let labels = self.device.upload(&ids, rows, 1).unwrap();
        let loss = CrossEntropy { scale: 1.0, label_smoothing: 0.0, gradient_scale: 1.0 };
        time("cross entropy", 6 * rows * width * vocabulary, "GFLOP/s", || {
            let (losses, d_h, d_w) = (losses.view_mut(), d_h.view_mut(), d_w.view_mut());
            ops::cross_entropy_forward_backward(h.view(), w.view(), labels.view(), loss, losses, d_h, d_w).unwrap();
        });
        time("embedding forward", 2 * self.dtype.bytes() * rows * width, "GB/s", || {
            ops::embedding_forward(labels.view(), w.view(), self.mask, d_h.view_mut()).unwrap();
        });
        time("embedding backward", (self.dtype.bytes() + 8) * rows * width, "GB/s", || {
            ops::embedding_backward(labels.view(), h.view(), self.mask, d_w.view_mut()).unwrap();
        });
    }
}

/// Prints the best time of many.
fn time(name: &str, amount: usize, unit: &str, mut f: impl FnMut()) {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut rounds = 0;
    while rounds < 3 || begin.elapsed().as_secs_f64() < 0.25 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
        rounds += 1;
    }
    println!("  {name:32} {:10.1} us {:8.1} {unit}", best * 1e6, amount as f64 / best / 1e9);
}
