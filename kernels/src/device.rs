//! Where tensors live and operations run.

use std::fmt;
use std::sync::Arc;

use crate::pool::{MemoryStatistics, Pool};
use crate::tensor::{DType, Tensor};
use crate::{Element, Result};

/// A device; clones are the same device. An operation matches on it once.
#[derive(Clone)]
pub enum Device {
    /// The host's cores: the calling thread's rayon pool, with SIMD found at run time.
    Cpu(Cpu),
}

#[derive(Clone, Default)]
pub struct Cpu {
    pub(crate) pool: Arc<Pool>,
}

impl Device {
    pub fn cpu() -> Self {
        Device::Cpu(Cpu::default())
    }

    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
        }
    }

    /// A `[rows, cols]` tensor of unspecified contents, from the pool.
    pub fn empty(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        match self {
            Device::Cpu(cpu) => {
                let block = cpu.pool.take(rows * cols * dtype.bytes())?;
                Ok(Tensor::new(self.clone(), block, dtype, rows, cols))
            }
        }
    }

    pub fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let mut tensor = self.empty(dtype, rows, cols)?;
        tensor.view_mut().fill_zero();
        Ok(tensor)
    }

    /// A `[rows, cols]` tensor with these values, row by row.
    pub fn upload<T: Element>(&self, values: &[T], rows: usize, cols: usize) -> Result<Tensor> {
        assert_eq!(values.len(), rows * cols, "{rows} x {cols} tensor from {} values", values.len());
        let mut tensor = self.empty(T::DTYPE, rows, cols)?;
        tensor.as_mut_slice().copy_from_slice(values);
        Ok(tensor)
    }

    pub fn memory(&self) -> MemoryStatistics {
        match self {
            Device::Cpu(cpu) => cpu.pool.statistics(),
        }
    }

    /// Forgets the largest use so far, so that the next reading is of what follows.
    pub fn reset_peak_memory(&self) {
        match self {
            Device::Cpu(cpu) => cpu.pool.reset_peak(),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
