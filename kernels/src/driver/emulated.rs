//! A GPU made of the host: the kernels of kernels/cuda, compiled by the system's C++ compiler against kernels/emulator,
//! where a block's threads are fibers; device memory is host memory.
//!
//! What it is for is to execute kernels and their launches where there is no GPU, and to be strict where a GPU is not:
//! memory that nobody has written is NaN, every block of memory has its exact size and is watched beyond its end, arguments
//! are checked by number and type, and threads run in an order that a seed draws. With AddressSanitizer's runtime in the
//! process, kernels are compiled with it.

mod compile;
mod memory;
mod run;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use compile::Library;
pub use compile::{emulator_compiler, set_compiler};
use memory::Allocations;

use super::{Launch, Product};
use crate::float::{Float, with_float};
use crate::gemm::{Matrix, MatrixMut, gemm};
use crate::{DType, Device, Result, View};

/// Kernels that only tests know.
pub(crate) const TEST_KERNELS: &[super::sources::Source] = &[
    #[cfg(test)]
    ("emulator_test", include_str!("emulated/test.cu")),
];

/// Whether there is no compiler for the emulator; then what needs one is skipped.
#[cfg(test)]
pub(crate) fn is_missing() -> bool {
    let missing = emulator_compiler().err();
    if let Some(error) = &missing {
        eprintln!("SKIPPED: nothing runs on the emulated GPU, because {error}");
    }
    missing.is_some()
}

pub(crate) struct Emulated {
    seed: u64,
    /// How many kernels were launched: each draws its own order.
    launches: AtomicU64,
    memory: Mutex<Allocations>,
    /// On which matrix products run.
    host: Device,
}

impl Emulated {
    pub(crate) fn new(seed: u64) -> Self {
        Emulated { seed, launches: AtomicU64::new(0), memory: Mutex::default(), host: Device::cpu() }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<usize> {
        self.memory().allocate(bytes)
    }

    pub(crate) fn free(&self, address: usize) {
        self.memory().free(address);
    }

    pub(crate) fn upload(&self, address: usize, bytes: &[u8]) -> Result<()> {
        self.memory().check(address, bytes.len());
        // SAFETY: `check` found these bytes inside one allocation; views are borrowed from their tensors, so that nobody
        // else writes there.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
        Ok(())
    }

    pub(crate) fn download(&self, address: usize, bytes: &mut [u8]) -> Result<()> {
        self.memory().check(address, bytes.len());
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) }
        Ok(())
    }

    pub(crate) fn copy(&self, to: usize, from: usize, bytes: usize) -> Result<()> {
        let memory = self.memory();
        memory.check(to, bytes);
        memory.check(from, bytes);
        // SAFETY: as in `upload`, on both sides.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) }
        Ok(())
    }

    pub(crate) fn fill_zero(&self, address: usize, bytes: usize) -> Result<()> {
        self.memory().check(address, bytes);
        // SAFETY: as in `upload`; zeros are a value of every element type.
        unsafe { (address as *mut u8).write_bytes(0, bytes) }
        Ok(())
    }

    /// Runs the kernel to its end.
    pub(crate) fn launch(&self, launch: &Launch) -> Result<()> {
        let library = Library::get(&launch.module)?;
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        let seed = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        run::launch(library, launch, seed)?;
        self.memory().check_guards(launch.function)
    }

    /// The CPU's matrix product on the same memory.
    pub(crate) fn gemm(&self, product: Product) -> Result<()> {
        with_float!(product.a.dtype(), T => with_float!(product.c.dtype(), C => self.typed_gemm::<T, C>(product)))
    }

    fn typed_gemm<T: Float, C: Float>(&self, product: Product) -> Result<()> {
        let Product { a, a_transposed, b, b_transposed, c, alpha, accumulate } = product;
        let (a, b) = (operand::<T>(a, a_transposed, &self.host), operand::<T>(b, b_transposed, &self.host));
        let mut c = c.on_device(&self.host);
        if alpha == 1.0 {
            gemm(a, b, MatrixMut::<C>::from_view(c), accumulate);
            return Ok(());
        }
        let mut sum = self.host.empty(DType::F32, c.rows(), c.cols())?;
        gemm(a, b, MatrixMut::<f32>::from_view(sum.view_mut()), false);
        for row in 0..c.rows() {
            scale_row(sum.view().row(row), alpha, c.reborrow().rows_range(row..row + 1).into_slice::<C>(), accumulate);
        }
        Ok(())
    }

    /// Launches have run when they return.
    pub(crate) fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Allocations> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn operand<'a, T: Float>(view: View<'a>, transposed: bool, host: &'a Device) -> Matrix<'a, T> {
    let matrix = Matrix::from_view(view.on_device(host));
    if transposed { matrix.transposed() } else { matrix }
}

fn scale_row<C: Float>(sum: &[f32], alpha: f32, c: &mut [C], accumulate: bool) {
    for (c, sum) in c.iter_mut().zip(sum) {
        let old = if accumulate { c.to_f32() } else { 0.0 };
        *c = C::from_f32(old + alpha * sum);
    }
}
