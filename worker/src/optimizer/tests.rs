use quintet_kernels::{Tensor, View};

use super::*;

fn hyperparameters(weight_decay: f64) -> Hyperparameters {
    Hyperparameters { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay }
}

/// Seeded values in (-1, 1).
fn values(seed: u64, len: usize) -> Vec<f32> {
    let value = |i: usize| {
        let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x >> 40) as f32 + 0.5) / (1 << 23) as f32 - 1.0
    };
    (0..len).map(value).collect()
}

/// A matrix, a gap, a bias matrix, a vector: sizes that are no multiple of anything.
fn slots() -> Vec<NamedSlot> {
    vec![
        NamedSlot::new("w".to_owned(), 0, &[777, 53]),
        NamedSlot::new("relative_attention_bias.weight".to_owned(), 41_200, &[32, 3]),
        NamedSlot::new("norm".to_owned(), 41_300, &[13]),
    ]
}
const ARENA: usize = 41_320;

/// An optimizer and what it updates.
struct Training {
    optimizer: Optimizer,
    parameters: Tensor,
}

impl Training {
    fn new(kind: OptimizerKind, weight_decay: f64, slots: Vec<NamedSlot>, parameters: &[f32]) -> Self {
        let device = Device::cpu();
        let optimizer = Optimizer::new(&device, kind, hyperparameters(weight_decay), slots).unwrap();
        Training { optimizer, parameters: upload(parameters) }
    }

    fn step(&mut self, gradient: &[f32]) {
        self.optimizer.step(0.1, self.parameters.view_mut(), upload(gradient).view(), 1.0).unwrap();
    }

    fn parameters(&self) -> &[f32] {
        self.parameters.as_slice()
    }
}

fn upload(values: &[f32]) -> Tensor {
    Device::cpu().upload(values, 1, values.len()).unwrap()
}

const KINDS: [OptimizerKind; 3] = [OptimizerKind::AdamW, OptimizerKind::AdamWScaled, OptimizerKind::Adafactor];

#[test]
fn one_step_by_hand() {
    let step = |kind, weight_decay| {
        let matrix = NamedSlot::new("w".to_owned(), 0, &[2, 2]);
        let mut training = Training::new(kind, weight_decay, vec![matrix], &[1.0; 4]);
        training.step(&[3.0, 4.0, 0.0, 0.0]);
        training.parameters().to_vec()
    };
    let near = |got: Vec<f32>, wanted: [f32; 4]| {
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
    let matrix = NamedSlot::new("w".to_owned(), 0, &[2, 2]);
    let mut training = Training::new(OptimizerKind::AdamWScaled, 0.0, vec![matrix], &[0.0; 4]);
    training.step(&[1.0; 4]);
    let parameters = training.parameters();
    assert!(parameters.iter().all(|p| (p + 1e-4).abs() < 1e-9), "{parameters:?}");
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let run = |kind, threads| {
        let slots =
            vec![NamedSlot::new("w".to_owned(), 0, &[7000, 100]), NamedSlot::new("v".to_owned(), 700_000, &[70_001])];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut training = Training::new(kind, 0.0, slots, &values(8, 770_001));
            training.step(&values(9, 770_001));
            training.step(&values(9, 770_001));
            let norm = ops::global_norm(training.parameters.view()).unwrap().to_bits();
            (training.parameters().iter().map(|p| p.to_bits()).collect::<Vec<_>>(), norm)
        })
    };
    for kind in KINDS {
        let expected = run(kind, 1);
        for threads in [2, 3, 5] {
            assert!(run(kind, threads) == expected, "{kind:?} on {threads} threads");
        }
    }
}

#[test]
fn a_restored_state_continues_with_the_same_bits() {
    for kind in KINDS {
        let mut training = Training::new(kind, 0.1, slots(), &values(1, ARENA));
        training.step(&values(2, ARENA));
        let mut restored = Training::new(kind, 0.1, slots(), training.parameters());
        restored.optimizer.begin_at(training.optimizer.steps(), saved(&training.optimizer));
        restored.optimizer.hold(0..ARENA).unwrap();
        training.step(&values(3, ARENA));
        restored.step(&values(3, ARENA));
        assert!(training.parameters() == restored.parameters(), "{kind:?}");
    }
}

/// The whole state, as a checkpoint has it.
fn saved(optimizer: &Optimizer) -> ReadSaved {
    let (whole, pieces) = (optimizer.copy(&Device::cpu(), 0..ARENA).unwrap(), optimizer.pieces());
    Box::new(move |name, shape, range, values| {
        let views: Vec<View> = whole.tensors.iter().map(Tensor::view).collect();
        let tensors = named(&pieces, &views);
        let tensor = tensors.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(tensor.shape, shape);
        let elements = tensor.values.rows() * tensor.values.cols();
        Ok(tensor.values.reshape(0, 1, elements).columns(range).read(values)?)
    })
}

/// Parts that cut a matrix in three, of which one rank holds two, and that begin where nothing else does.
#[test]
fn parts_of_an_arena_are_updated_as_the_whole_is() {
    let (first, second) = (20_000, 40_003);
    for kind in [OptimizerKind::AdamW, OptimizerKind::AdamWScaled] {
        let mut whole = Training::new(kind, 0.1, slots(), &values(1, ARENA));
        whole.step(&values(2, ARENA));
        let begin = |parts: &[std::ops::Range<usize>]| {
            let optimizer = Optimizer::without_state(&Device::cpu(), kind, hyperparameters(0.1), slots());
            let mut training = Training { optimizer, parameters: upload(whole.parameters()) };
            training.optimizer.begin_at(1, saved(&whole.optimizer));
            parts.iter().for_each(|part| training.optimizer.hold(part.clone()).unwrap());
            training
        };
        let mut ends = begin(&[0..first, second..ARENA]);
        let mut middle = begin(std::slice::from_ref(&(first..second)));
        for training in [&mut whole, &mut ends, &mut middle] {
            training.step(&values(3, ARENA));
        }
        let expected = whole.parameters();
        assert!(ends.parameters()[..first] == expected[..first], "{kind:?}");
        assert!(ends.parameters()[second..] == expected[second..], "{kind:?}");
        assert!(middle.parameters()[first..second] == expected[first..second], "{kind:?}");
        assert!(middle.parameters()[..first] != expected[..first] && ends.parameters() != expected);
        let state = |training: &Training, range: std::ops::Range<usize>| -> Vec<Vec<f32>> {
            let part = training.optimizer.copy(&Device::cpu(), range).unwrap();
            part.tensors.iter().map(|tensor| tensor.as_slice::<f32>().to_vec()).collect()
        };
        assert!(state(&middle, first..second) == state(&whole, first..second), "{kind:?}");
        assert!(state(&ends, second..ARENA) == state(&whole, second..ARENA), "{kind:?}");
        // What is divided anew is what it was.
        middle.optimizer.hold(first + 5..second).unwrap();
        middle.optimizer.retain(std::slice::from_ref(&(first + 5..second)));
        assert!(state(&middle, first + 5..second) == state(&whole, first + 5..second), "{kind:?}");
    }
}

#[test]
fn padding_between_tensors_is_not_touched() {
    let mut training = Training::new(OptimizerKind::AdamW, 0.1, slots(), &[5.0; ARENA]);
    training.step(&[1.0; ARENA]);
    let parameters = training.parameters();
    assert!(parameters[777 * 53..41_200].iter().chain(&parameters[41_313..]).all(|&p| p == 5.0));
    assert!(slots().iter().all(|s| parameters[s.slot.range.clone()].iter().all(|&p| p != 5.0)));
}

#[test]
fn norms_and_clipping() {
    let mut gradient = vec![0.0; 100_000];
    (gradient[7], gradient[99_999]) = (3.0, -4.0);
    let mean = |max_norm| ClippedMean::new(upload(&gradient).view(), 2.0, max_norm).unwrap();
    assert_eq!(mean(0.0), ClippedMean { norm: 2.5, scale: 0.5 });
    assert_eq!(mean(10.0), ClippedMean { norm: 2.5, scale: 0.5 });
    let clipped = mean(1.0);
    assert_eq!(clipped.norm, 2.5);
    assert!((f64::from(clipped.scale) * 5.0 - 1.0).abs() < 1e-6);
}
