//! Times every operation, forward and backward, at the shapes of a model:
//!
//!     cargo run --release -p quintet-kernels --example bench [-- [--device cpu|cuda|emulated] [--json] [MODEL] [TEXT]]
//!
//! MODEL is t5-small (8 × (128 + 32) tokens), tiny, or t5-base, t5-large (8 × (512 + 114)); on the CPU the first two by
//! default, else t5-large. TEXT keeps the operations whose name contains it. A GPU is timed in bf16.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, reason = "this is a program")]

use std::process::ExitCode;
use std::time::Instant;

use half::bf16;
use quintet_kernels::ops::{self, Attention, AttentionGradients, CrossEntropy};
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
    model: &'static str,
    json: bool,
    /// Of the names of operations that are timed.
    only: String,
}

fn main() -> ExitCode {
    SearchPath::from_variables(|name| std::env::var_os(name)).install();
    let (mut device, mut json, mut names, mut only) = ("cpu".to_string(), false, Vec::new(), String::new());
    let models = models();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--device" => device = arguments.next().unwrap_or_default(),
            "--json" => json = true,
            name if models.iter().any(|model| model.name == name) => names.push(argument),
            _ => only = argument,
        }
    }
    let opened = match device.as_str() {
        "cpu" => Ok(Device::cpu()),
        "cuda" => Device::cuda(0),
        "emulated" => Device::emulated(1),
        _ => {
            eprintln!("error: --device {device}: not cpu, cuda or emulated");
            return ExitCode::from(2);
        }
    };
    let device = match opened {
        Ok(device) => device,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    if names.is_empty() {
        let defaults: &[&str] = if device.name() == "cpu" { &["t5-small", "tiny"] } else { &["t5-large"] };
        names.extend(defaults.iter().map(ToString::to_string));
    }
    let dtypes: &[DType] = if device.name() == "cpu" { &[DType::F32, DType::Bf16] } else { &[DType::Bf16] };
    for model in models.iter().filter(|model| names.iter().any(|name| name == model.name)) {
        for &dtype in dtypes {
            if !json {
                println!("\n{} {dtype:?} on {}, {} threads", model.name, device.name(), rayon::current_num_threads());
            }
            let mask = Dropout::new(0.1, 1, 2);
            Bench { device: device.clone(), dtype, mask, model: model.name, json, only: only.clone() }.run(model);
        }
    }
    ExitCode::SUCCESS
}

fn models() -> [Model; 4] {
    let even =
        |count: u32, length: u32| Segments::from_offsets(&(0..=count).map(|index| index * length).collect::<Vec<_>>());
    [
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
        Model {
            name: "t5-base",
            d_model: 768,
            heads: 12,
            head_size: 64,
            d_ff: 3072,
            vocabulary: 32128,
            source: even(8, 512),
            target: even(8, 114),
        },
        Model {
            name: "t5-large",
            d_model: 1024,
            heads: 16,
            head_size: 64,
            d_ff: 4096,
            vocabulary: 32128,
            source: even(8, 512),
            target: even(8, 114),
        },
    ]
}

/// Of attention.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Encoder,
    Decoder,
    Cross,
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
        self.attention("attention encoder", model, [&model.source, &model.source], Kind::Encoder);
        self.attention("attention cross", model, [&model.target, &model.source], Kind::Cross);
        self.attention("attention decoder", model, [&model.target, &model.target], Kind::Decoder);
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

    fn attention(&self, name: &str, model: &Model, [queries, keys]: [&Segments; 2], kind: Kind) {
        let biased = kind != Kind::Cross;
        let (heads, inner) = (model.heads, model.heads * model.head_size);
        let (q, kv) = (self.tensor(queries.end(), inner), self.tensor(keys.end(), 2 * inner));
        let (mut d_q, mut d_kv) = (self.tensor(queries.end(), inner), self.tensor(keys.end(), 2 * inner));
        let (mut out, mut lse) = (self.tensor(queries.end(), inner), self.typed(DType::F32, queries.end(), heads));
        let (bias, mut d_bias) = (self.typed(DType::F32, heads, 257), self.typed(DType::F32, heads, 257));
        let (k, v) = (kv.view().columns(0..inner), kv.view().columns(inner..2 * inner));
        let bias = biased.then_some(bias.view());
        let inputs =
            Attention { q: q.view(), k, v, queries, keys, heads, bias, causal: kind == Kind::Decoder, mask: self.mask };
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
        let ids: Vec<u32> = (0..rows as u32).map(|row| row * 31 % vocabulary as u32).collect();
        let labels = self.device.upload(&ids, rows, 1).unwrap();
        let loss = CrossEntropy { scale: 1.0, label_smoothing: 0.0, gradient_scale: 1.0 };
        self.time("cross entropy", 6 * rows * width * vocabulary, "GFLOP/s", || {
            let (losses, d_h, d_w) = (losses.view_mut(), d_h.view_mut(), d_w.view_mut());
            ops::cross_entropy_forward_backward(h.view(), w.view(), labels.view(), loss, losses, d_h, Some(d_w))
                .unwrap();
        });
        self.time("embedding forward", 2 * self.dtype.bytes() * rows * width, "GB/s", || {
            ops::embedding_forward(labels.view(), w.view(), self.mask, d_h.view_mut()).unwrap();
        });
        self.time("embedding backward", (self.dtype.bytes() + 8) * rows * width, "GB/s", || {
            ops::embedding_backward(labels.view(), h.view(), self.mask, d_w.view_mut()).unwrap();
        });
    }

    /// Prints the best time of many. A GPU is given a number of launches at a time, so that it never waits for the host.
    fn time(&self, name: &str, amount: usize, unit: &str, mut f: impl FnMut()) {
        if !name.contains(&self.only) {
            return;
        }
        let repeats = if self.device.name() == "cuda" { 20 } else { 1 };
        // The first compiles kernels.
        f();
        self.device.synchronize().unwrap();
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        let mut rounds = 0;
        while rounds < 3 || begin.elapsed().as_secs_f64() < 0.25 {
            let start = Instant::now();
            for _ in 0..repeats {
                f();
            }
            self.device.synchronize().unwrap();
            best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
            rounds += 1;
        }
        let rate = amount as f64 / best / 1e9;
        if self.json {
            let (model, device, dtype) = (self.model, self.device.name(), self.dtype.name());
            println!(
                r#"{{"op":"{name}","model":"{model}","device":"{device}","dtype":"{dtype}","seconds":{best:e},"rate":{rate:.2},"unit":"{unit}"}}"#
            );
        } else {
            println!("  {name:32} {:10.1} us {rate:8.1} {unit}", best * 1e6);
        }
    }
}
