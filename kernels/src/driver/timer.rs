//! How long a GPU takes.

use std::time::Instant;

use super::{Driver, Gpu, cuda};
use crate::Result;

/// Runs from the moment when the work launched before it is done, by the GPU's own clock.
pub struct Timer {
    gpu: Gpu,
    start: Moment,
}

enum Moment {
    Event(cuda::Event),
    /// The emulator's launches have run when they return.
    Host(Instant),
}

impl Gpu {
    pub fn start_timer(&self) -> Result<Timer> {
        let start = match &*self.driver {
            Driver::Cuda(cuda) => Moment::Event(cuda.record()?),
            Driver::Emulated(_) => Moment::Host(Instant::now()),
        };
        Ok(Timer { gpu: self.clone(), start })
    }
}

impl Timer {
    /// Until the work launched so far is done, for which it waits.
    pub fn seconds(&self) -> Result<f64> {
        match (&*self.gpu.driver, &self.start) {
            (Driver::Cuda(cuda), Moment::Event(start)) => cuda.seconds_between(start, &cuda.record()?),
            (_, Moment::Host(start)) => Ok(start.elapsed().as_secs_f64()),
            (_, Moment::Event(_)) => unreachable!("an event without a driver"),
        }
    }
}
