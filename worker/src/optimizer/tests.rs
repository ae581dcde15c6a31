use super::*;

fn slot(name: &str, range: Range<usize>, rows: usize, cols: usize, is_matrix: bool) -> TensorSlot {
    TensorSlot::new(name.to_owned(), range, rows, cols, is_matrix)
}

fn hyperparameters(weight_decay: f64) -> Hyperparameters {
    Hyperparameters { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay }
}

/// A seeded value in (-1, 1).
fn value(seed: u64, i: usize) -> f32 {
    let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as f32 + 0.5) / (1 << 23) as f32 - 1.0
}

fn values(seed: u64, len: usize) -> Vec<f32> {
    (0..len).map(|i| value(seed, i)).collect()
}

/// A matrix, a gap, a bias matrix, a vector: sizes that are no multiple of anything.
fn slots() -> Vec<TensorSlot> {
    vec![
        slot("w", 0..777 * 53, 777, 53, true),
        slot("relative_attention_bias.weight", 41_200..41_200 + 32 * 3, 32, 3, true),
        slot("norm", 41_300..41_313, 1, 13, false),
    ]
}
const ARENA: usize = 41_320;

/// The rules in f64, element by element, straight from their papers' formulas.
struct Oracle {
    kind: OptimizerKind,
    weight_decay: f64,
    m: Vec<f64>,
    v: Vec<f64>,
    row: Vec<Vec<f64>>,
    col: Vec<Vec<f64>>,
}

impl Oracle {
    fn new(kind: OptimizerKind, weight_decay: f64) -> Self {
        let row = slots().iter().map(|s| vec![0.0; s.rows]).collect();
        let col = slots().iter().map(|s| vec![0.0; s.cols]).collect();
        Self { kind, weight_decay, m: vec![0.0; ARENA], v: vec![0.0; ARENA], row, col }
    }

    fn step(&mut self, t: i32, rate: f64, p: &mut [f64], g: &[f32]) {
        for (index, slot) in slots().iter().enumerate() {
            let decay = if slot.decays { self.weight_decay } else { 0.0 };
            if self.kind == OptimizerKind::Adafactor {
                self.adafactor(index, slot, t, rate, decay, p, g);
                continue;
            }
            let n = slot.range.len() as f64;
            let rms = (slot.range.clone().map(|i| p[i] * p[i]).sum::<f64>() / n).sqrt();
            let scaled = self.kind == OptimizerKind::AdamWScaled && slot.is_matrix;
            let rate = if scaled { rate * rms.max(1e-3) } else { rate };
            for i in slot.range.clone() {
                let g = f64::from(g[i]);
                p[i] -= rate * decay * p[i];
                self.m[i] = 0.9 * self.m[i] + 0.1 * g;
                self.v[i] = 0.999 * self.v[i] + 0.001 * g * g;
                let (m, v) = (self.m[i] / (1.0 - 0.9f64.powi(t)), self.v[i] / (1.0 - 0.999f64.powi(t)));
                p[i] -= rate * m / (v.sqrt() + 1e-8);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn adafactor(&mut self, index: usize, slot: &TensorSlot, t: i32, rate: f64, decay: f64, p: &mut [f64], g: &[f32]) {
        let beta = 1.0 - f64::from(t).powf(-0.8);
        let (rows, cols) = (slot.rows, slot.cols);
        let at = |r: usize, c: usize| slot.range.start + r * cols + c;
        let square = |r: usize, c: usize| f64::from(g[at(r, c)]).powi(2) + 1e-30;
        let (row, col) = (&mut self.row[index], &mut self.col[index]);
        for (r, row) in row.iter_mut().enumerate() {
            let mean = (0..cols).map(|c| square(r, c)).sum::<f64>() / cols as f64;
            *row = beta * *row + (1.0 - beta) * mean;
        }
        for (c, col) in col.iter_mut().enumerate() {
            let mean = (0..rows).map(|r| square(r, c)).sum::<f64>() / rows as f64;
            *col = beta * *col + (1.0 - beta) * mean;
        }
        let row_mean = row.iter().sum::<f64>() / rows as f64;
        let mut update = vec![0.0; slot.range.len()];
        for r in 0..rows {
            for c in 0..cols {
                let second_moment = if slot.is_matrix { row[r] / row_mean * col[c] } else { col[c] };
                update[r * cols + c] = f64::from(g[at(r, c)]) / second_moment.sqrt();
            }
        }
        let rms = (update.iter().map(|u| u * u).sum::<f64>() / update.len() as f64).sqrt();
        for (u, i) in update.iter().zip(slot.range.clone()) {
            p[i] -= rate * decay * p[i] + rate * u / rms.max(1.0);
        }
    }
}

#[test]
fn five_steps_agree_with_the_formulas_in_f64() {
    for kind in [OptimizerKind::AdamW, OptimizerKind::AdamWScaled, OptimizerKind::Adafactor] {
        for weight_decay in [0.0, 0.1] {
            let mut optimizer = Optimizer::new(kind, hyperparameters(weight_decay), &slots());
            let mut oracle = Oracle::new(kind, weight_decay);
            let mut params = values(1, ARENA);
            let mut expected: Vec<f64> = params.iter().map(|&p| f64::from(p)).collect();
            let rate = 1e-2;
            for t in 1..=5 {
                // A tenth of the gradients is zero, as rows of the embedding's are.
                let mut grads = values(1 + t as u64, ARENA);
                grads.iter_mut().step_by(10).for_each(|g| *g = 0.0);
                let doubled: Vec<f32> = grads.iter().map(|g| 2.0 * g).collect();
                optimizer.step(rate, &mut params, &doubled, 0.5);
                oracle.step(t, rate, &mut expected, &grads);
            }
            // A few roundings of a value below 2 in each of 5 steps.
            let tolerance = 5.0 * 4.0 * f64::from(f32::EPSILON);
            for (i, (&p, &e)) in params.iter().zip(&expected).enumerate() {
                assert!((f64::from(p) - e).abs() < tolerance, "{kind:?} element {i}: {p}, not {e}");
            }
        }
    }
}

#[test]
fn one_step_by_hand() {
    let matrix = [slot("w", 0..4, 2, 2, true)];
    let grads = [3.0f32, 4.0, 0.0, 0.0];
    let step = |kind, weight_decay| {
        let mut params = [1.0f32; 4];
        Optimizer::new(kind, hyperparameters(weight_decay), &matrix).step(0.1, &mut params, &grads, 1.0);
        params
    };
    let near = |got: [f32; 4], wanted: [f32; 4]| {
        assert!(got.iter().zip(wanted).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?}, not {wanted:?}");
    };
    // AdamW's first step moves by the rate, whatever the gradient; decay of 0.1·0.5 first.
    near(step(OptimizerKind::AdamW, 0.0), [0.9, 0.9, 1.0, 1.0]);
    near(step(OptimizerKind::AdamW, 0.5), [0.85, 0.85, 0.95, 0.95]);
    // The RMS of four ones is one.
    near(step(OptimizerKind::AdamWScaled, 0.0), [0.9, 0.9, 1.0, 1.0]);
    // Adafactor: row means 12.5 and 0, so r = √2 in the first; column means 4.5 and 8; u = (1, 1)
    // in the first row, 0 in the second; its RMS is below 1, so nothing is clipped.
    near(step(OptimizerKind::Adafactor, 0.0), [0.9, 0.9, 1.0, 1.0]);
}

#[test]
fn a_scaled_rate_has_a_floor() {
    let mut params = [0.0f32; 4];
    let matrix = [slot("w", 0..4, 2, 2, true)];
    Optimizer::new(OptimizerKind::AdamWScaled, hyperparameters(0.0), &matrix).step(0.1, &mut params, &[1.0; 4], 1.0);
    assert!(params.iter().all(|p| (p + 1e-4).abs() < 1e-9), "{params:?}");
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let slots = [slot("w", 0..700_000, 7000, 100, true), slot("v", 700_000..770_001, 1, 70_001, false)];
    let grads = values(9, 770_001);
    let run = |kind, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut params = values(8, 770_001);
            let mut optimizer = Optimizer::new(kind, hyperparameters(0.0), &slots);
            optimizer.step(0.1, &mut params, &grads, 1.0);
            optimizer.step(0.1, &mut params, &grads, 1.0);
            (params.iter().map(|p| p.to_bits()).collect::<Vec<_>>(), global_norm(&params).to_bits())
        })
    };
    for kind in [OptimizerKind::AdamW, OptimizerKind::AdamWScaled, OptimizerKind::Adafactor] {
        let expected = run(kind, 1);
        for threads in [2, 3, 5] {
            assert!(run(kind, threads) == expected, "{kind:?} on {threads} threads");
        }
    }
}

#[test]
fn a_restored_state_continues_with_the_same_bits() {
    for kind in [OptimizerKind::AdamW, OptimizerKind::AdamWScaled, OptimizerKind::Adafactor] {
        let mut params = values(1, ARENA);
        let mut optimizer = Optimizer::new(kind, hyperparameters(0.1), &slots());
        optimizer.step(0.1, &mut params, &values(2, ARENA), 1.0);
        let mut restored = Optimizer::new(kind, hyperparameters(0.1), &slots());
        let saved = optimizer.state();
        restored
            .load_state(optimizer.steps(), |name, shape, values| {
                let tensor = saved.iter().find(|t| t.name == name).unwrap();
                assert_eq!(tensor.shape, shape);
                values.copy_from_slice(tensor.values);
                Ok(())
            })
            .unwrap();
        let mut continued = params.clone();
        optimizer.step(0.1, &mut params, &values(3, ARENA), 1.0);
        restored.step(0.1, &mut continued, &values(3, ARENA), 1.0);
        assert!(params == continued, "{kind:?}");
    }
}

#[test]
fn padding_between_tensors_is_not_touched() {
    let mut params = vec![5.0; ARENA];
    let mut optimizer = Optimizer::new(OptimizerKind::AdamW, hyperparameters(0.1), &slots());
    optimizer.step(0.1, &mut params, &vec![1.0; ARENA], 1.0);
    assert!(params[777 * 53..41_200].iter().chain(&params[41_313..]).all(|&p| p == 5.0));
    assert!(slots().iter().all(|s| params[s.range.clone()].iter().all(|&p| p != 5.0)));
}

#[test]
fn norms_and_clipping() {
    let mut grads = vec![0.0; 100_000];
    (grads[7], grads[99_999]) = (3.0, -4.0);
    assert_eq!(global_norm(&grads), 5.0);
    let mean = |max_norm| ClippedMean::new(&grads, 2, max_norm);
    assert_eq!(mean(0.0), ClippedMean { norm: 2.5, scale: 0.5 });
    assert_eq!(mean(10.0), ClippedMean { norm: 2.5, scale: 0.5 });
    let clipped = mean(1.0);
    assert_eq!(clipped.norm, 2.5);
    assert!((f64::from(clipped.scale) * 5.0 - 1.0).abs() < 1e-6);
    // Squares that overflow f32 do not overflow the norm.
    assert!((global_norm(&[1e30; 4]) / 2e30 - 1.0).abs() < 1e-6);
    assert_eq!(global_norm(&[]), 0.0);
    assert!(global_norm(&[f32::NAN]).is_nan());
}
