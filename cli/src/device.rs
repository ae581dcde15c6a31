//! Which device a command computes on, and why.

use quintet_coordinator::config::Device as Wanted;
use quintet_kernels::{Device, usable_gpus};
use quintet_worker::DeviceChoice;

use crate::args::DeviceChoice as Flag;
use crate::error::{Failure, Result};

/// A decision, which is said in one line.
pub(crate) struct Decision {
    pub(crate) choice: DeviceChoice,
    /// GPUs of this machine that can be used; 0 where none is.
    pub(crate) gpus: usize,
    why: String,
}

impl Decision {
    /// Looks for GPUs where they are wanted. Opens none: who supervises workers holds no CUDA.
    ///
    /// # Errors
    /// What is in the way of the GPU that was asked for.
    pub(crate) fn new(wanted: Wanted, gpu: usize) -> Result<Self> {
        let plain = |choice, why: &str| Ok(Decision { choice, gpus: 0, why: why.to_string() });
        match wanted {
            Wanted::Cpu => plain(DeviceChoice::Cpu, ""),
            Wanted::Emulated => plain(DeviceChoice::Emulated, ": the GPU's kernels on the processor, for tests"),
            Wanted::Cuda | Wanted::Auto => match (usable_gpus(), wanted) {
                (Ok(found), _) => {
                    let gpus = found.len();
                    let name = found.get(gpu).map_or("no such GPU", |gpu| &gpu.name);
                    let count = if gpus > 1 { format!(", of {gpus}") } else { String::new() };
                    let why = format!(": GPU {gpu}{count}, {name}");
                    Ok(Decision { choice: DeviceChoice::Cuda(gpu), gpus, why })
                }
                (Err(obstacle), Wanted::Auto) => plain(DeviceChoice::Cpu, &format!(", not a GPU: {obstacle}")),
                (Err(obstacle), _) => Err(Failure::bad_input(format!("device cuda: {obstacle}"))),
            },
        }
    }

    /// As in the job file.
    pub(crate) fn as_wanted(&self) -> Wanted {
        match self.choice {
            DeviceChoice::Cpu => Wanted::Cpu,
            DeviceChoice::Cuda(_) => Wanted::Cuda,
            DeviceChoice::Emulated => Wanted::Emulated,
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        format!("device: {}{}", self.choice.name(), self.why)
    }

    pub(crate) fn open(&self) -> Result<Device> {
        self.choice.open().map_err(|error| {
            let failure = Failure::from(error);
            Failure { message: format!("device {}: {}", self.choice.name(), failure.message), ..failure }
        })
    }
}

impl From<Flag> for Wanted {
    fn from(flag: Flag) -> Self {
        match flag {
            Flag::Auto => Wanted::Auto,
            Flag::Cpu => Wanted::Cpu,
            Flag::Cuda => Wanted::Cuda,
            Flag::Emulated => Wanted::Emulated,
        }
    }
}

/// Decides, says so on standard error, and opens the device.
pub(crate) fn open(flag: Flag) -> Result<Device> {
    let decision = Decision::new(flag.into(), 0)?;
    eprintln!("{}", decision.line());
    decision.open()
}
