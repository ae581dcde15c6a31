//! Times every operation, forward and backward, and the updates: on the host at the shapes of t5-small (8 × (128 + 32)
//! tokens) and of a tiny model, on a GPU at those of T5 1.1 large (64 × (512 + 114) tokens).
//!
//!     cargo run --release -p quintet-kernels --example bench [-- cpu|cuda|emulated]
//!
//! Bytes are the fewest that an operation can read and write, so GB/s of less than the memory's show waste.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, reason = "this is a program")]

use std::process::ExitCode;
use std::time::Instant;

use quintet_kernels::ops::{
    self, Adafactor, AdamW, Attention, AttentionGradients, CrossEntropy, TensorSlot, TensorSlots,
};
use quintet_kernels::{DType, Device, Dropout, SearchPath, Segments, Tensor};

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

fn main() -> ExitCode {
    SearchPath::from_variables(|name| std::env::var_os(name)).install();
    let name = std::env::args().nth(1).unwrap_or_else(|| "cpu".to_owned());
    let device = match name.as_str() {
        "cpu" => Ok(Device::cpu()),
        "cuda" => Device::cuda(0),
        "emulated" => Device::emulated(0),
        _ => panic!("no device {name}"),
    };
    match device {
        Ok(device) => run(&device),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run(device: &Device) {
    let mask = Dropout { probability: 0.1, seed: 1, stream: 2 };
    let (models, dtypes, parameters) = match device.name() {
        "cuda" => (vec![large()], vec![DType::Bf16, DType::F16, DType::F32], 256 << 20),
        "cpu" => (vec![small(), tiny()], vec![DType::F32, DType::Bf16], 16 << 20),
        _ => (vec![tiny()], vec![DType::F32, DType::Bf16], 1 << 20),
    };
    for model in &models {
        for &dtype in &dtypes {
            println!("\n{} {dtype:?}, {}, {} threads", model.name, device.name(), rayon::current_num_threads());
            Bench { device: device.clone(), dtype, mask }.run(model);
        }
    }
    println!("\nupdates of {parameters} parameters");
    Bench { device: device.clone(), dtype: DType::F32, mask }.updates(parameters);
}

fn even(count: u32, length: u32) -> Segments {
    Segments::from_offsets(&(0..=count).map(|index| index * length).collect::<Vec<_>>())
}

fn small() -> Model {
    Model {
        name: "t5-small",
        d_model: 512,
        heads: 8,
        head_size: 64,
        d_ff: 2048,
        vocabulary: 32128,
        source: even(8, 128),
        target: even(8, 32),
    }
}

fn tiny() -> Model {
    Model {
        name: "tiny",
        d_model: 128,
        heads: 4,
        head_size: 32,
        d_ff: 512,
        vocabulary: 80,
        source: even(64, 8),
        target: even(64, 8),
    }
}

/// So many tokens that no activation stays in a GPU's cache from one call to the next.
fn large() -> Model {
    Model {
        name: "t5-v1_1-large",
        d_model: 1024,
        heads: 16,
        head_size: 64,
        d_ff: 2816,
        vocabulary: 32128,
        source: even(64, 512),
        target: even(64, 114),
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
        let tensor = self.device.upload(&values, rows, cols).unwrap();
        if dtype == DType::F32 {
            return tensor;
        }
        let mut narrow = self.device.empty(dtype, rows, cols).unwrap();
        ops::cast(tensor.view(), narrow.view_mut()).unwrap();
        narrow
    }

    fn linear(&self, name: &str, rows: usize, inputs: usize, outputs: usize) {
        let (x, w) = (self.tensor(rows, inputs), self.tensor(outputs, inputs));
        let (mut y, mut d_x) = (self.tensor(rows, outputs), self.tensor(rows, inputs));
        let mut d_w = self.typed(DType::F32, outputs, inputs);
        let flops = 2 * rows * inputs * outputs;
        self.time(&format!("{name} forward"), flops, "GFLOP/s", || {
            ops::linear_forward(x.view(), w.view(), y.view_mut(), false).unwrap();
        });
        self.time(&format!("{name} backward input"), flops, "GFLOP/s", || {
            ops::linear_backward_input(y.view(), w.view(), d_x.view_mut(), false).unwrap();
        });
        self.time(&format!("{name} backward weight"), flops, "GFLOP/s", || {
            ops::linear_backward_weight(y.view(), x.view(), d_w.view_mut()).unwrap();
        });
    }

    fn rows(&self, rows: usize, width: usize, features: usize) {
        let bytes = self.dtype.bytes() * rows * width;
        let (x, delta, mut y) = (self.tensor(rows, width), self.tensor(rows, width), self.tensor(rows, width));
        let (weight, mut d_weight) = (self.tensor(1, width), self.typed(DType::F32, 1, width));
        let mut rstd = self.typed(DType::F32, rows, 1);
        self.time("rms_norm forward", 2 * bytes, "GB/s", || {
            ops::rms_norm_forward(x.view(), weight.view(), 1e-6, y.view_mut(), rstd.view_mut()).unwrap();
        });
        self.time("rms_norm backward", 4 * bytes, "GB/s", || {
            let (d_x, d_weight) = (y.view_mut(), d_weight.view_mut());
            ops::rms_norm_backward(delta.view(), x.view(), weight.view(), rstd.view(), d_x, d_weight).unwrap();
        });
        self.time("residual with dropout", 3 * bytes, "GB/s", || {
            ops::residual_forward(x.view(), delta.view(), self.mask, y.view_mut()).unwrap();
        });
        self.time("residual without", 3 * bytes, "GB/s", || {
            ops::residual_forward(x.view(), delta.view(), Dropout::NONE, y.view_mut()).unwrap();
        });
        let bytes = self.dtype.bytes() * rows * features;
        let (wide, mut h, mut d_wide) =
            (self.tensor(rows, 2 * features), self.tensor(rows, features), self.tensor(rows, 2 * features));
        self.time("gated gelu forward, dropout", 3 * bytes, "GB/s", || {
            ops::gated_gelu_forward(wide.view(), self.mask, h.view_mut()).unwrap();
        });
        self.time("gated gelu backward, dropout", 5 * bytes, "GB/s", || {
            ops::gated_gelu_backward(wide.view(), h.view(), self.mask, d_wide.view_mut()).unwrap();
        });
        self.time("relu forward, dropout", 2 * bytes, "GB/s", || {
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
        self.time(&format!("{name} forward"), 4 * scores * inner, "GFLOP/s", || {
            ops::attention_forward(inputs, out.view_mut(), lse.view_mut()).unwrap();
        });
        self.time(&format!("{name} backward"), 10 * scores * inner, "GFLOP/s", || {
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
        // As frequent as words are: the one of rank r has a share of about 1/r.
        let rank = |row: usize| (vocabulary as f64).powf((row * 7919 % rows) as f64 / rows as f64) as u32 - 1;
        let ids: Vec<u32> = (0..rows).map(rank).collect();
        let labels = self.device.upload(&ids, rows, 1).unwrap();
        let loss = CrossEntropy { scale: 1.0, label_smoothing: 0.0, gradient_scale: 1.0 };
        self.time("cross entropy", 6 * rows * width * vocabulary, "GFLOP/s", || {
            let (losses, d_h, d_w) = (losses.view_mut(), d_h.view_mut(), d_w.view_mut());
            ops::cross_entropy_forward_backward(h.view(), w.view(), labels.view(), loss, losses, d_h, d_w).unwrap();
        });
        self.time("embedding forward", 2 * self.dtype.bytes() * rows * width, "GB/s", || {
            ops::embedding_forward(labels.view(), w.view(), self.mask, d_h.view_mut()).unwrap();
        });
        self.time("embedding backward", (self.dtype.bytes() + 8) * rows * width, "GB/s", || {
            ops::embedding_backward(labels.view(), h.view(), self.mask, d_w.view_mut()).unwrap();
        });
    }

    /// As many parameters as that in matrices of 1024 columns, and a few vectors.
    fn updates(&self, parameters: usize) {
        let shapes = (0..parameters / (1 << 20)).flat_map(|_| [(1024, 1024, true), (1, 1024, false)]);
        let mut end = 0;
        let slots = shapes.map(|(rows, cols, is_matrix)| {
            let range = end..end + rows * cols;
            end = range.end;
            TensorSlot { range, rows, cols, is_matrix, decays: is_matrix }
        });
        let slots = TensorSlots::new(slots.collect());
        let mut parameters = self.typed(DType::F32, 1, end);
        let gradient = self.typed(DType::F32, 1, end);
        let zeros = |cols| self.device.zeros(DType::F32, 1, cols).unwrap();
        let (mut exp_avg, mut exp_avg_sq) = (zeros(end), zeros(end));
        for scale_by_rms in [false, true] {
            let rule = AdamW {
                learning_rate: 1e-3,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                scale_by_rms,
                step: 1,
                gradient_scale: 1.0,
            };
            let (name, bytes) = if scale_by_rms { ("adamw scaled", 32) } else { ("adamw", 28) };
            self.time(name, bytes * end, "GB/s", || {
                let (p, m, v) = (parameters.view_mut(), exp_avg.view_mut(), exp_avg_sq.view_mut());
                ops::adamw(rule, &slots, p, gradient.view(), m, v).unwrap();
            });
        }
        let mut moments = zeros(slots.factored_moments_len());
        let rule = Adafactor { learning_rate: 1e-3, weight_decay: 0.0, step: 1, gradient_scale: 1.0 };
        self.time("adafactor", 20 * end, "GB/s", || {
            ops::adafactor(rule, &slots, parameters.view_mut(), gradient.view(), moments.view_mut()).unwrap();
        });
        self.time("global norm", 4 * end, "GB/s", || {
            ops::global_norm(gradient.view()).unwrap();
        });
        self.time("find not finite", 4 * end, "GB/s", || {
            ops::find_not_finite(gradient.view()).unwrap();
        });
        let mut weights = self.device.empty(DType::Bf16, 1, end).unwrap();
        self.time("cast to bf16", 6 * end, "GB/s", || ops::cast(parameters.view(), weights.view_mut()).unwrap());
    }

    /// Prints the best time of many.
    fn time(&self, name: &str, amount: usize, unit: &str, mut f: impl FnMut()) {
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        let mut rounds = 0;
        while rounds < 3 || begin.elapsed().as_secs_f64() < 0.25 {
            best = best.min(self.seconds(&mut f));
            rounds += 1;
        }
        println!("  {name:32} {:10.1} us {:8.1} {unit}", best * 1e6, amount as f64 / best / 1e9);
    }

    /// Of one call; on a GPU the mean of some that wait for nothing but each other.
    fn seconds(&self, f: &mut impl FnMut()) -> f64 {
        match &self.device {
            Device::Cpu(_) => {
                let start = Instant::now();
                f();
                start.elapsed().as_secs_f64()
            }
            Device::Gpu(gpu) => {
                const CALLS: u32 = 10;
                let calls = if self.device.name() == "cuda" { CALLS } else { 1 };
                let timer = gpu.start_timer().unwrap();
                (0..calls).for_each(|_| f());
                timer.seconds().unwrap() / f64::from(calls)
            }
        }
    }
}
