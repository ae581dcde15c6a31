//! A stream beside the one on which everything else runs, for what may overlap with it.

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::{Cuda, Event};
use crate::Result;

pub(crate) struct SideStream(sys::CUstream);

// SAFETY: streams may be used from any thread.
unsafe impl Send for SideStream {}

impl Cuda {
    pub(crate) fn side_stream(&self) -> Result<SideStream> {
        self.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(SideStream(self.check("cuStreamCreate", stream)?))
    }

    /// What comes next in the side stream begins after the event.
    pub(crate) fn hold(&self, stream: &SideStream, event: &Event) -> Result<()> {
        self.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are of this context, and the event was recorded.
        self.check("cuStreamWaitEvent", unsafe { result::stream::wait_event(stream.0, event.0, flags) })
    }

    /// Whether all in the side stream is done; does not wait.
    pub(crate) fn is_idle(&self, stream: &SideStream) -> Result<bool> {
        self.bind()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(stream.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => self.check("work beside the computation", status.result()).map(|()| true),
        }
    }
}

impl SideStream {
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.0.cast()
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: created by `side_stream`, destroyed only here; the driver lets it finish first.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}
