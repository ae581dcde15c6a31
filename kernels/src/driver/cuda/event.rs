//! Points in the stream that others can wait for.

use cudarc::driver::result;
use cudarc::driver::sys;

use super::Cuda;
use crate::Result;

/// The moment when the work before it is done.
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
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `record`; destroyed only here. The driver knows its context by itself.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
