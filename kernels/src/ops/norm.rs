//! Norms of flat f32 ranges, and whether all of one is finite. Sums run over fixed blocks of fixed lanes in f64.

use rayon::prelude::*;

use super::check_dtype;
use super::slots::BLOCK;
use crate::error::not_on_gpu_yet;
use crate::simd::multiversion;
use crate::{DType, Device, Result, View};

/// Independent partial sums of a block, so that it vectorises.
pub(super) const LANES: usize = 8;

/// `√Σ x²` of a view without gaps; waits for the device. No square overflows.
pub fn global_norm(x: View) -> Result<f64> {
    check_dtype!(DType::F32, x);
    match x.device() {
        Device::Cpu(_) => Ok(sum_of_squares(x.as_slice()).sqrt()),
        Device::Gpu(_) => not_on_gpu_yet("global_norm"),
    }
}

/// The number of the first element of a view without gaps that is infinite or not a number; waits for the device.
pub fn find_not_finite(x: View) -> Result<Option<usize>> {
    check_dtype!(DType::F32, x);
    match x.device() {
        Device::Cpu(_) => Ok(find_not_finite_cpu(x.as_slice())),
        Device::Gpu(_) => not_on_gpu_yet("find_not_finite"),
    }
}

fn find_not_finite_cpu(x: &[f32]) -> Option<usize> {
    let block = x.par_chunks(BLOCK).position_first(|block| !is_finite(block))? * BLOCK;
    x[block..].iter().position(|x| !x.is_finite()).map(|index| block + index)
}

multiversion! {
    // Without an early exit, so that it vectorises.
    fn is_finite(block: &[f32]) -> bool {
        block.iter().fold(true, |all, x| all & x.is_finite())
    }
}

/// `√(Σ x² / n)`; 0 of nothing.
pub(super) fn root_mean_square(values: &[f32]) -> f64 {
    (sum_of_squares(values) / values.len().max(1) as f64).sqrt()
}

/// `Σ x²` in f64, with the same bits for any number of threads.
fn sum_of_squares(values: &[f32]) -> f64 {
    if values.len() <= BLOCK {
        return block_sum_of_squares(values);
    }
    let blocks: Vec<f64> = values.par_chunks(BLOCK).map(block_sum_of_squares).collect();
    blocks.iter().sum()
}

multiversion! {
    fn block_sum_of_squares(block: &[f32]) -> f64 {
        sum_by_lanes(block, |x| f64::from(x) * f64::from(x))
    }
}

/// `Σ f(x)`, lane by lane.
#[inline(always)]
pub(super) fn sum_by_lanes(values: &[f32], f: impl Fn(f32) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(values: &[f32]) -> crate::Tensor {
        Device::cpu().upload(values, 1, values.len()).unwrap()
    }

    #[test]
    fn norms_at_the_ends_of_the_range() {
        let norm = |values: &[f32]| global_norm(upload(values).view()).unwrap();
        assert!((norm(&[1e30; 4]) / 2e30 - 1.0).abs() < 1e-6);
        assert_eq!(norm(&[]), 0.0);
        assert!(norm(&[f32::NAN]).is_nan());
    }

    #[test]
    fn the_first_bad_element_is_found() {
        let mut values = vec![f32::MAX; 100_000];
        assert_eq!(find_not_finite(upload(&values).view()).unwrap(), None);
        values[99_999] = f32::NAN;
        assert_eq!(find_not_finite(upload(&values).view()).unwrap(), Some(99_999));
        values[77_777] = f32::NEG_INFINITY;
        assert_eq!(find_not_finite(upload(&values).view()).unwrap(), Some(77_777));
    }
}
