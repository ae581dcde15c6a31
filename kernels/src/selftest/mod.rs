//! Every operation against the float64 oracle, on the device at hand: "does this machine compute right?"
//!
//! Inputs are random (seeded) and exact in the type under test, outputs are NaN beforehand, so that what an operation
//! forgets to write shows. The error of an element is `|got − want| / (|want| + rms(want))`, or with the size of the numbers
//! that the element is the sum of instead of the rms where the oracle knows it, and the tolerance
//! `8 · ε₃₂ · √terms`, where `terms` is how many rounded numbers end up in an element (errors of a sum grow like a random
//! walk; 8 standard deviations), plus `ε` for each time that the type under test rounds on the way, if it is not f32.

mod attention;
mod cases;
mod decoding;
mod updates;

use std::hash::{DefaultHasher, Hash, Hasher};

use half::{bf16, f16};

use crate::float::{Float, with_float};
use crate::oracle::{Random, Sums};
use crate::{DType, Device, Result, Tensor};

const TF32_EPSILON: f64 = 1.0 / 1024.0;

/// What an operation did.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The operation, and which of its results.
    pub op: String,
    /// Of activations and weights: `"f32"`, `"bf16"`, `"f16"`, or `"tf32"` for f32 that is multiplied so.
    pub dtype: &'static str,
    pub shape: String,
    pub max_error: f64,
    pub tolerance: f64,
    pub passed: bool,
}

/// Runs all cases on `device`.
pub fn run(device: &Device) -> Result<Vec<Outcome>> {
    run_with_digest(device).map(|(outcomes, _)| outcomes)
}

/// As [`run`], with a digest of every bit of every result.
fn run_with_digest(device: &Device) -> Result<(Vec<Outcome>, u64)> {
    let (random, shape) = (Random::new(20), String::new());
    let (outcomes, digest) = (Vec::new(), DefaultHasher::new());
    let mut bench = Bench { device, dtype: DType::F32, tf32: false, random, shape, outcomes, digest };
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        bench.dtype = dtype;
        cases::all(&mut bench)?;
    }
    bench.dtype = DType::F32;
    updates::all(&mut bench)?;
    if let Device::Gpu(gpu) = device {
        bench.tf32 = true;
        // The emulator's matrix products do not round.
        let cases = if gpu.name() == "emulated" { attention::all } else { cases::all };
        let before = gpu.tf32();
        gpu.set_tf32(true);
        let result = cases(&mut bench);
        gpu.set_tf32(before);
        result?;
    }
    Ok((bench.outcomes, bench.digest.finish()))
}

/// Where a case gets its tensors and leaves its results.
struct Bench<'a> {
    device: &'a Device,
    dtype: DType,
    /// Whether f32 is multiplied as tf32: inputs have its 10 bits of mantissa, results are rounded to it on the way.
    tf32: bool,
    random: Random,
    shape: String,
    outcomes: Vec<Outcome>,
    digest: DefaultHasher,
}

/// A tensor and the same numbers in f64.
struct Input {
    tensor: Tensor,
    exact: Vec<f64>,
}

impl Bench<'_> {
    /// Normal numbers of standard deviation `scale`.
    fn input(&mut self, rows: usize, cols: usize, scale: f32) -> Result<Input> {
        self.typed_input(self.dtype, rows, cols, scale)
    }

    fn typed_input(&mut self, dtype: DType, rows: usize, cols: usize, scale: f32) -> Result<Input> {
        let round = |value: f32| if self.tf32 { f32::from_bits((value.to_bits() + 0x1000) & !0x1fff) } else { value };
        let values = self.random.normals(rows * cols).into_iter().map(|value| round(value * scale));
        let values: Vec<f32> = values.collect();
        let tensor = self.upload(dtype, &values, rows, cols)?;
        let exact = download(&tensor)?;
        Ok(Input { tensor, exact })
    }

    /// A tensor that nobody has written yet.
    fn output(&self, rows: usize, cols: usize) -> Result<Tensor> {
        self.typed_output(self.dtype, rows, cols)
    }

    fn typed_output(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        self.upload(dtype, &vec![f32::NAN; rows * cols], rows, cols)
    }

    fn upload(&self, dtype: DType, values: &[f32], rows: usize, cols: usize) -> Result<Tensor> {
        with_float!(dtype, T => {
            let values: Vec<T> = values.iter().map(|&value| <T as Float>::from_f32(value)).collect();
            self.device.upload(&values, rows, cols)
        })
    }

    fn ids(&mut self, rows: usize, limit: usize) -> Result<(Tensor, Vec<u32>)> {
        let ids: Vec<u32> = (0..rows).map(|_| self.random.below(limit) as u32).collect();
        Ok((self.device.upload(&ids, rows, 1)?, ids))
    }

    /// Compares a result; `roundings` to the type under test were made on the way to it.
    fn compare(&mut self, op: &str, got: &Tensor, want: &[f64], terms: usize, roundings: usize) -> Result<()> {
        let rms = (want.iter().map(|want| want * want).sum::<f64>() / want.len().max(1) as f64).sqrt();
        self.compare_sized(op, got, want, &vec![rms; want.len()], terms, roundings)
    }

    /// As [`Bench::compare`], where the oracle says for each element how large the numbers are that its errors come from.
    fn compare_sums(&mut self, op: &str, got: &Tensor, want: &Sums, terms: usize, roundings: usize) -> Result<()> {
        self.compare_sized(op, got, &want.values, &want.sizes(), terms, roundings)
    }

    fn compare_sized(
        &mut self,
        op: &str,
        got: &Tensor,
        want: &[f64],
        sizes: &[f64],
        terms: usize,
        roundings: usize,
    ) -> Result<()> {
        let got = download(got)?;
        got.iter().for_each(|value| value.to_bits().hash(&mut self.digest));
        assert_eq!(got.len(), want.len(), "{op}: elements of the result and of the oracle's");
        // Below the least normal number errors are no longer proportional to anything.
        let (epsilon, least) = match self.dtype {
            DType::Bf16 => (f64::from(bf16::EPSILON), f64::from(bf16::MIN_POSITIVE)),
            DType::F16 => (f64::from(f16::EPSILON), f64::from(f16::MIN_POSITIVE)),
            DType::F32 if self.tf32 => (TF32_EPSILON, f64::from(f32::MIN_POSITIVE)),
            DType::F32 | DType::U32 => (0.0, f64::from(f32::MIN_POSITIVE)),
        };
        let error = |((got, want), size): ((&f64, &f64), &f64)| {
            let error = (got - want).abs() / (want.abs() + size + least);
            if error.is_nan() { f64::INFINITY } else { error }
        };
        let max_error = got.iter().zip(want).zip(sizes).map(error).fold(0.0, f64::max);
        let tolerance = 8.0 * f64::from(f32::EPSILON) * (terms as f64).sqrt() + roundings as f64 * epsilon;
        self.outcomes.push(Outcome {
            op: op.to_owned(),
            dtype: if self.tf32 { "tf32" } else { self.dtype.name() },
            shape: self.shape.clone(),
            max_error,
            tolerance,
            passed: max_error <= tolerance,
        });
        Ok(())
    }
}

fn download(tensor: &Tensor) -> Result<Vec<f64>> {
    with_float!(tensor.dtype(), T => {
        Ok(tensor.download::<T>()?.into_iter().map(|value| f64::from(Float::to_f32(value))).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_agrees_with_the_oracle() {
        let outcomes = run(&Device::cpu()).unwrap();
        let failures: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
        assert!(failures.is_empty(), "{failures:#?}");
        assert!(outcomes.len() > 100);
    }

    /// Nothing waits for what it should not, or fails to wait: bits do not depend on which thread runs when.
    #[test]
    fn kernels_agree_with_the_oracle_in_any_order_of_threads() {
        if crate::driver::emulated::is_missing() {
            return;
        }
        let run = |seed| run_with_digest(&Device::emulated(seed).unwrap()).unwrap();
        let (outcomes, digest) = run(1);
        let failures: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
        assert!(failures.is_empty(), "{failures:#?}");
        assert_eq!(run(2).1, digest);
    }

    #[test]
    fn steady_state_asks_the_system_for_no_memory() {
        let device = Device::cpu();
        run(&device).unwrap();
        let before = device.memory();
        run(&device).unwrap();
        assert_eq!(device.memory().system_allocations, before.system_allocations);
        assert_eq!(device.memory().live_bytes, 0);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let digest = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run_with_digest(&Device::cpu())).unwrap().1
        };
        let alone = digest(1);
        for threads in [2, 3, 5] {
            assert_eq!(alone, digest(threads), "{threads} threads");
        }
    }
}
