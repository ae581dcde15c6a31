//! Where tensors live and operations run.

use std::fmt;
use std::sync::Arc;

use crate::driver::{Driver, Gpu, cuda, emulated};
use crate::pool::{Memory, MemoryStatistics, Pool};
use crate::tensor::{DType, Tensor};
use crate::{Element, Error, Result, SearchPath};

/// A device; clones are the same device. An operation matches on it once.
#[derive(Clone)]
pub enum Device {
    /// The host's cores: the calling thread's rayon pool, with SIMD found at run time.
    Cpu(Cpu),
    /// A GPU, real or emulated: the same kernels, launched in the same way.
    Gpu(Gpu),
}

#[derive(Clone)]
pub struct Cpu {
    pub(crate) pool: Arc<Pool>,
}

impl Device {
    pub fn cpu() -> Self {
        Device::Cpu(Cpu { pool: Pool::new(Memory::Host) })
    }

    /// The NVIDIA GPU of this number.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Device::Gpu(Gpu::new(Driver::Cuda(cuda::Cuda::new(ordinal, SearchPath::current())?))))
    }

    /// The CUDA kernels, compiled for the host by the system's C++ compiler. Slow, and for tests: the order in which
    /// threads and blocks run is drawn from `seed`, so that results that depend on it show.
    pub fn emulated(seed: u64) -> Result<Self> {
        Ok(Device::Gpu(Gpu::new(Driver::Emulated(emulated::Emulated::new(seed)))))
    }

    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Gpu(gpu) => gpu.name(),
        }
    }

    /// A `[rows, cols]` tensor of unspecified contents, from the pool.
    ///
    /// # Errors
    /// Memory; and a GPU's kernels count elements in 32 bits.
    pub fn empty(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        if matches!(self, Device::Gpu(_)) && u32::try_from(rows * cols).is_err() {
            return Err(Error::TooManyElements { rows, cols });
        }
        let block = self.pool().take(rows * cols * dtype.bytes())?;
        Ok(Tensor::new(self.clone(), block, dtype, rows, cols))
    }

    pub fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let mut tensor = self.empty(dtype, rows, cols)?;
        tensor.view_mut().fill_zero()?;
        Ok(tensor)
    }

    /// A `[rows, cols]` tensor with these values, row by row.
    pub fn upload<T: Element>(&self, values: &[T], rows: usize, cols: usize) -> Result<Tensor> {
        assert_eq!(values.len(), rows * cols, "{rows} x {cols} tensor from {} values", values.len());
        let mut tensor = self.empty(T::DTYPE, rows, cols)?;
        tensor.view_mut().write(values)?;
        Ok(tensor)
    }

    /// Waits until everything asked of the device so far is done.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Gpu(gpu) => gpu.synchronize(),
        }
    }

    pub fn memory(&self) -> MemoryStatistics {
        self.pool().statistics()
    }

    /// Forgets the largest use so far, so that the next reading is of what follows.
    pub fn reset_peak_memory(&self) {
        self.pool().reset_peak();
    }

    /// Whether both are the same device, not just of the same kind.
    pub(crate) fn is_same(&self, other: &Device) -> bool {
        Arc::ptr_eq(self.pool(), other.pool())
    }

    fn pool(&self) -> &Arc<Pool> {
        match self {
            Device::Cpu(cpu) => &cpu.pool,
            Device::Gpu(gpu) => &gpu.pool,
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
