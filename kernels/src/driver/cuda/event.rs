//! Points in the stream whose distance in time the GPU itself measures.

use cudarc::driver::result;
use cudarc::driver::sys;

use super::Cuda;
use crate::Result;

/// A moment on the GPU's clock: when the work before it was done.
pub(crate) struct Event(pub(super) sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Cuda {
    pub(crate) fn record(&self) -> Result<Event> {
        self.bind()?;
        let event = Event(self.check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?);
        // SAFETY: event and stream are of this context.
        self.check("cuEventRecord", unsafe { result::event::record(event.0, self.stream) })?;
        Ok(event)
    }

    /// Waits for the later one.
    pub(crate) fn seconds_between(&self, start: &Event, end: &Event) -> Result<f64> {
        self.bind()?;
        // SAFETY: both were recorded on this stream.
        let milliseconds = unsafe {
            self.check("cuEventSynchronize", result::event::synchronize(end.0))?;
            self.check("cuEventElapsedTime", result::event::elapsed(start.0, end.0))?
        };
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `record`; destroyed only here. The driver knows its context by itself.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
