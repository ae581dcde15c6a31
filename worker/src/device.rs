//! Which device a rank computes on.

use quintet_kernels::{Device, Result};

/// A device that is not opened yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor's cores.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
    /// The GPU's kernels on the processor: slow, for tests.
    Emulated,
}

impl DeviceChoice {
    /// As users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
            Self::Emulated => "emulated",
        }
    }

    /// # Errors
    /// What of driver, libraries or compiler is missing.
    pub fn open(self) -> Result<Device> {
        /// The order of threads that the emulator draws; any gives the same results.
        const THREAD_ORDER: u64 = 0;
        match self {
            Self::Cpu => Ok(Device::cpu()),
            Self::Cuda(ordinal) => Device::cuda(ordinal),
            Self::Emulated => Device::emulated(THREAD_ORDER),
        }
    }
}
