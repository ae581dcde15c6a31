//! Updates of an arena, and what is asked about a gradient before one.

use super::{Bench, Input};
use crate::ops::{self, Adafactor, AdamW, FactoredMoments, Moments, TensorSlot, TensorSlots};
use crate::oracle::Updated;
use crate::{DType, Result, Tensor};

/// Updates made in a row: the second sees the moments of the first, and another correction of their bias.
const STEPS: u64 = 2;
/// The gradient that operations are given is a sum, this times the one to apply.
const GRADIENT_SCALE: f32 = 0.125;

/// All of f32, whatever the type under test is.
pub(super) fn all(bench: &mut Bench) -> Result<()> {
    // Matrices, a vector and a bias table; gaps between them; more elements than any block has; a length of one.
    let arena = arena(&[&[37, 53], &[13], &[1, 5], &[32, 3], &[700, 64], &[1], &[3, 1024]]);
    bench.shape = format!("{} tensors, {} elements", arena.as_slice().len(), arena.end());
    for scale_by_rms in [false, true] {
        adamw(bench, &arena, scale_by_rms)?;
    }
    adafactor(bench, &arena)?;
    for length in [1, 1000, 70_001] {
        bench.shape = format!("{length} elements");
        global_norm(bench, length)?;
        find_not_finite(bench, length)?;
    }
    Ok(())
}

/// Tensors one after the other, with a gap behind each; every other one decays.
fn arena(shapes: &[&[usize]]) -> TensorSlots {
    let mut start = 0;
    let slots = shapes.iter().enumerate().map(|(index, shape)| {
        let length: usize = shape.iter().product();
        let range = start..start + length;
        start = (range.end + 1).next_multiple_of(16);
        let is_matrix = shape.len() == 2;
        let (rows, cols) = if is_matrix { (shape[0], shape[1]) } else { (1, shape[0]) };
        TensorSlot { range, rows, cols, is_matrix, decays: index % 2 == 0 }
    });
    TensorSlots::new(slots.collect())
}

/// Elements behind the last tensor, which nobody may touch.
const TAIL: usize = 7;

fn exact_parts(slots: &TensorSlots, parameters: &[f64], zeros: impl Fn(&TensorSlot) -> [usize; 2]) -> Vec<Updated> {
    let part = |slot: &TensorSlot| {
        let [first, second] = zeros(slot);
        let parameters = parameters[slot.range.clone()].to_vec();
        Updated { parameters, first: vec![0.0; first], second: vec![0.0; second] }
    };
    slots.as_slice().iter().map(part).collect()
}

/// A gradient of which a tenth is zero, as rows of the embedding's are; as it is given, and as it is meant.
fn gradient(bench: &mut Bench, length: usize) -> Result<(Tensor, Vec<f64>)> {
    let mut values = bench.random.normals(length);
    values.iter_mut().step_by(10).for_each(|value| *value = 0.0);
    let meant = values.iter().map(|&value| f64::from(value) * f64::from(GRADIENT_SCALE)).collect();
    Ok((bench.device.upload(&values, 1, length)?, meant))
}

/// The whole arena: `before` with the tensors replaced.
fn whole(slots: &TensorSlots, before: &[f64], tensors: impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
    let mut all = before.to_vec();
    slots.as_slice().iter().zip(tensors).for_each(|(slot, values)| all[slot.range.clone()].copy_from_slice(&values));
    all
}

fn adamw(bench: &mut Bench, slots: &TensorSlots, scale_by_rms: bool) -> Result<()> {
    let length = slots.end() + TAIL;
    let Input { tensor: mut parameters, exact: before } = bench.typed_input(DType::F32, 1, length, 1.0)?;
    let mut exp_avg = bench.device.zeros(DType::F32, 1, length)?;
    let mut exp_avg_sq = bench.device.zeros(DType::F32, 1, length)?;
    let mut exact = exact_parts(slots, &before, |slot| [slot.range.len(); 2]);
    for step in 1..=STEPS {
        let rule = AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            scale_by_rms,
            step,
            gradient_scale: GRADIENT_SCALE,
        };
        let (given, meant) = gradient(bench, length)?;
        let moments = Moments { first: 0, exp_avg: exp_avg.view_mut(), exp_avg_sq: exp_avg_sq.view_mut() };
        ops::adamw(rule, slots, parameters.view_mut(), given.view(), &mut [moments])?;
        for (slot, exact) in slots.as_slice().iter().zip(&mut exact) {
            exact.adamw(&rule, slot, &meant[slot.range.clone()]);
        }
    }
    let name = if scale_by_rms { "adamw scaled" } else { "adamw" };
    let zeros = vec![0.0; length];
    let want = whole(slots, &before, exact.iter().map(|tensor| tensor.parameters.clone()));
    bench.compare(&format!("{name} parameters"), &parameters, &want, 4, 0)?;
    let want = whole(slots, &zeros, exact.iter().map(|tensor| tensor.first.clone()));
    bench.compare(&format!("{name} exp_avg"), &exp_avg, &want, 4, 0)?;
    let want = whole(slots, &zeros, exact.iter().map(|tensor| tensor.second.clone()));
    bench.compare(&format!("{name} exp_avg_sq"), &exp_avg_sq, &want, 4, 0)?;
    Ok(())
}

fn adafactor(bench: &mut Bench, slots: &TensorSlots) -> Result<()> {
    let length = slots.end() + TAIL;
    let Input { tensor: mut parameters, exact: before } = bench.typed_input(DType::F32, 1, length, 1.0)?;
    let mut moments = bench.device.zeros(DType::F32, 1, slots.factored_moments_len())?;
    let mut exact = exact_parts(slots, &before, |slot| [slot.rows, slot.cols]);
    for step in 1..=STEPS {
        let rule = Adafactor { learning_rate: 0.01, weight_decay: 0.1, step, gradient_scale: GRADIENT_SCALE };
        let (given, meant) = gradient(bench, length)?;
        ops::adafactor(rule, slots, parameters.view_mut(), given.view(), moments.view_mut())?;
        for (slot, exact) in slots.as_slice().iter().zip(&mut exact) {
            exact.adafactor(&rule, slot, &meant[slot.range.clone()]);
        }
    }
    let want = whole(slots, &before, exact.iter().map(|tensor| tensor.parameters.clone()));
    bench.compare("adafactor parameters", &parameters, &want, 8, 0)?;
    let mut want = vec![0.0; slots.factored_moments_len()];
    for (places, exact) in slots.factored_moments().iter().zip(&exact) {
        match places {
            FactoredMoments::Factored { row, col } => {
                want[row.clone()].copy_from_slice(&exact.first);
                want[col.clone()].copy_from_slice(&exact.second);
            }
            FactoredMoments::Full(range) => want[range.clone()].copy_from_slice(&exact.second),
        }
    }
    bench.compare("adafactor moments", &moments, &want, 8, 0)?;
    Ok(())
}

fn global_norm(bench: &mut Bench, length: usize) -> Result<()> {
    let x = bench.typed_input(DType::F32, 1, length, 1e20)?;
    let norm = ops::global_norm(x.tensor.view())?;
    let want = x.exact.iter().map(|x| x * x).sum::<f64>().sqrt();
    // A number, as a tensor of one element.
    let got = bench.device.upload(&[norm as f32], 1, 1)?;
    bench.compare("global_norm", &got, &[want], 1, 0)?;
    Ok(())
}

fn find_not_finite(bench: &mut Bench, length: usize) -> Result<()> {
    let mut values = bench.random.normals(length);
    let mut found = Vec::new();
    let mut want = Vec::new();
    let mut look = |values: &[f32], index: Option<usize>| -> Result<()> {
        // One more than the number, 0 of none: as numbers to compare.
        let number = |index: Option<usize>| index.map_or(0, |index| index + 1);
        let tensor = bench.device.upload(values, 1, length)?;
        found.push(number(ops::find_not_finite(tensor.view())?) as f32);
        want.push(number(index) as f64);
        Ok(())
    };
    look(&values, None)?;
    for (index, bad) in [(length - 1, f32::NAN), (length / 2, f32::INFINITY), (0, f32::NEG_INFINITY)] {
        values[index] = bad;
        look(&values, Some(index))?;
    }
    let got = bench.device.upload(&found, 1, found.len())?;
    bench.compare("find_not_finite", &got, &want, 0, 0)?;
    Ok(())
}
