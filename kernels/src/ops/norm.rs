//! Norms of flat f32 ranges, and whether all of one is finite. Sums run over fixed blocks of fixed lanes in f64.

use rayon::prelude::*;

use super::check_dtype;
use super::slots::BLOCK;
use crate::driver::{Argument, Gpu, Launch, Module};
use crate::simd::multiversion;
use crate::{DType, Device, Result, Tensor, View};

/// Independent partial sums of a block, so that it vectorises.
pub(super) const LANES: usize = 8;

/// `√Σ x²` of a view without gaps; waits for the device. No square overflows.
pub fn global_norm(x: View) -> Result<f64> {
    check_dtype!(DType::F32, x);
    match x.device() {
        Device::Cpu(_) => Ok(sum_of_squares(x.as_slice()).sqrt()),
        Device::Gpu(gpu) => Ok(sum_of_squares_gpu(gpu, x)?.sqrt()),
    }
}

/// Elements that one of [`sums_of_squares`] is the sum over.
pub const NORM_BLOCK: usize = BLOCK;

/// `Σ x²` of each [`NORM_BLOCK`] elements of a view without gaps, on the CPU. The root of the sum of all, in their order,
/// is [`global_norm`]; so those who have parts of a whole that begin at multiples of a block find its norm together, to the
/// bit.
pub fn sums_of_squares(x: View) -> Vec<f64> {
    check_dtype!(DType::F32, x);
    x.as_slice::<f32>().par_chunks(BLOCK).map(block_sum_of_squares).collect()
}

/// The number of the first element of a view without gaps that is infinite or not a number; waits for the device.
pub fn find_not_finite(x: View) -> Result<Option<usize>> {
    check_dtype!(DType::F32, x);
    match x.device() {
        Device::Cpu(_) => Ok(find_not_finite_cpu(x.as_slice())),
        Device::Gpu(gpu) => find_not_finite_gpu(gpu, x),
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

/// Numbers of 64 bits on a GPU, two words each: there is no tensor of them.
fn empty_words(x: View, count: usize) -> Result<Tensor> {
    x.device().empty(DType::U32, count, 2)
}

fn read_words(tensor: &Tensor) -> Result<u64> {
    let words = tensor.download::<u32>()?;
    Ok(u64::from(words[0]) | u64::from(words[1]) << 32)
}

fn launch(
    gpu: &Gpu,
    function: &'static str,
    blocks: usize,
    threads: usize,
    shared_bytes: usize,
    arguments: &[Argument],
) -> Result<()> {
    gpu.launch(Launch {
        module: Module { source: "norm", element: DType::F32, constants: &[] },
        function,
        grid: [blocks as u32, 1, 1],
        block: threads as u32,
        shared_bytes,
        arguments,
    })
}

/// Threads of a block of [`BLOCK`] elements.
const THREADS: usize = 256;

fn sum_of_squares_gpu(gpu: &Gpu, x: View) -> Result<f64> {
    assert!(x.is_contiguous(), "norm of a view with gaps");
    let count = x.rows() * x.cols();
    let blocks = count.div_ceil(BLOCK);
    let (partials, total) = (empty_words(x, blocks)?, empty_words(x, 1)?);
    let arguments = [x.into(), (count as u64).into(), partials.view().into(), x.address().is_multiple_of(16).into()];
    launch(gpu, "sum_of_squares", blocks, THREADS, THREADS / 32 * 8, &arguments)?;
    let arguments = [partials.view().into(), blocks.into(), total.view().into()];
    launch(gpu, "sum_of_partials", 1, 1024, 32 * 8, &arguments)?;
    Ok(f64::from_bits(read_words(&total)?))
}

fn find_not_finite_gpu(gpu: &Gpu, x: View) -> Result<Option<usize>> {
    assert!(x.is_contiguous(), "finite check of a view with gaps");
    let count = x.rows() * x.cols();
    let mut found = empty_words(x, 1)?;
    found.view_mut().fill_zero()?;
    let arguments = [x.into(), (count as u64).into(), found.view().into(), x.address().is_multiple_of(16).into()];
    launch(gpu, "find_not_finite", count.div_ceil(BLOCK), THREADS, 0, &arguments)?;
    Ok(match read_words(&found)? {
        0 => None,
        from_end => Some(count - from_end as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_each_device(values: &[f32], check: impl Fn(View)) {
        let emulated = (!crate::driver::emulated::is_missing()).then(|| Device::emulated(3).unwrap());
        for device in std::iter::once(Device::cpu()).chain(emulated) {
            check(device.upload(values, 1, values.len()).unwrap().view());
        }
    }

    #[test]
    fn norms_at_the_ends_of_the_range() {
        on_each_device(&[1e30; 4], |x| assert!((global_norm(x).unwrap() / 2e30 - 1.0).abs() < 1e-6));
        on_each_device(&[], |x| assert_eq!(global_norm(x).unwrap(), 0.0));
        on_each_device(&[f32::NAN], |x| assert!(global_norm(x).unwrap().is_nan()));
        // Whole numbers, of which every order of addition gives the same sum.
        let values: Vec<f32> = (0..100_003).map(|index| (index % 17) as f32 - 8.0).collect();
        let sum: f64 = values.iter().map(|&x| f64::from(x * x)).sum();
        on_each_device(&values, |x| {
            assert_eq!(global_norm(x).unwrap(), sum.sqrt());
            let unaligned = x.columns(1..100_003); // begins with -7
            assert_eq!(global_norm(unaligned).unwrap(), (sum - 64.0).sqrt());
        });
    }

    #[test]
    fn the_first_bad_element_is_found() {
        let mut values = vec![f32::MAX; 100_003];
        let find = |x: View| find_not_finite(x).unwrap();
        on_each_device(&values, |x| assert_eq!(find(x), None));
        values[100_002] = f32::NAN;
        on_each_device(&values, |x| assert_eq!(find(x), Some(100_002)));
        values[77_777] = f32::NEG_INFINITY;
        on_each_device(&values, |x| assert_eq!((find(x), find(x.columns(3..90_000))), (Some(77_777), Some(77_774))));
        values[0] = f32::INFINITY;
        on_each_device(&values, |x| assert_eq!(find(x), Some(0)));
    }
}
