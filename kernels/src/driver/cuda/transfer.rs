//! Copies between the host and the device, through pinned memory: the copy engine reads nothing else at full speed, and
//! a copy from pageable memory would make the host wait for everything before it.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::check;
use super::staging::Ring;
use crate::Result;

type Outcome<T> = std::result::Result<T, DriverError>;

const UPLOAD_BYTES: usize = 16 << 20;
/// The largest piece of an upload, so that writing one overlaps with the transfer of another.
const UPLOAD_PIECE: usize = 4 << 20;
/// Downloads take turns with two of these.
const DOWNLOAD_PIECE: usize = 4 << 20;

/// Pinned buffers, and events that tell when a piece of them is free.
pub(crate) struct Transfer {
    upload: Pinned,
    ring: Ring<sys::CUevent>,
    download: Pinned,
    /// Of the two halves of `download`.
    arrived: [sys::CUevent; 2],
    spare: Vec<sys::CUevent>,
}

impl Transfer {
    /// The device's context must be current, here and in all calls.
    pub(crate) fn new() -> Result<Self> {
        let upload = check("pinned memory for uploads", Pinned::new(UPLOAD_BYTES))?;
        let download = check("pinned memory for downloads", Pinned::new(2 * DOWNLOAD_PIECE))?;
        let arrived = [check("cuEventCreate", new_event())?, check("cuEventCreate", new_event())?];
        Ok(Transfer { upload, ring: Ring::new(UPLOAD_BYTES), download, arrived, spare: Vec::new() })
    }

    pub(crate) fn upload(&mut self, to: sys::CUdeviceptr, bytes: &[u8], stream: sys::CUstream) -> Outcome<()> {
        for (index, piece) in bytes.chunks(UPLOAD_PIECE).enumerate() {
            let spare = &mut self.spare;
            let range = self.ring.take(piece.len(), |event| {
                // SAFETY: the event is ours, and was recorded.
                unsafe { result::event::synchronize(event)? };
                spare.push(event);
                Ok(())
            })?;
            let staged = &mut self.upload.as_mut_slice()[range.clone()];
            staged.copy_from_slice(piece);
            let event = self.spare.pop().map_or_else(new_event, Ok)?;
            // SAFETY: the staged bytes stay as they are until the event; the device's memory is as long as `bytes`.
            unsafe {
                result::memcpy_htod_async(to + (index * UPLOAD_PIECE) as sys::CUdeviceptr, staged, stream)?;
                result::event::record(event, stream)?;
            }
            self.ring.give(range, event);
        }
        Ok(())
    }

    pub(crate) fn download(&mut self, from: sys::CUdeviceptr, bytes: &mut [u8], stream: sys::CUstream) -> Outcome<()> {
        let pieces = bytes.len().div_ceil(DOWNLOAD_PIECE);
        let halves = self.download.as_mut_slice();
        // One piece is under way while the one before is copied out.
        for index in 0..=pieces {
            if index < pieces {
                let start = index * DOWNLOAD_PIECE;
                let length = DOWNLOAD_PIECE.min(bytes.len() - start);
                let half = &mut halves[index % 2 * DOWNLOAD_PIECE..][..length];
                // SAFETY: this half is not read before its event; the device's memory is as long as `bytes`.
                unsafe {
                    result::memcpy_dtoh_async(half, from + start as sys::CUdeviceptr, stream)?;
                    result::event::record(self.arrived[index % 2], stream)?;
                }
            }
            if let Some(previous) = index.checked_sub(1) {
                // SAFETY: the event was recorded one turn before.
                unsafe { result::event::synchronize(self.arrived[previous % 2])? };
                let piece = bytes.chunks_mut(DOWNLOAD_PIECE).nth(previous).unwrap_or_default();
                piece.copy_from_slice(&halves[previous % 2 * DOWNLOAD_PIECE..][..piece.len()]);
            }
        }
        Ok(())
    }

    /// Gives everything back, after the stream is done.
    ///
    /// # Safety
    /// Nothing else may be called afterwards.
    pub(crate) unsafe fn release(&mut self) {
        let mut events: Vec<sys::CUevent> = self.spare.drain(..).chain(self.arrived).collect();
        events.extend(self.ring.drain());
        for event in events {
            // SAFETY: created by `new_event`; forgotten here.
            let _ = unsafe { result::event::destroy(event) };
        }
        for pinned in [&self.upload, &self.download] {
            // SAFETY: allocated by `Pinned::new`; the caller uses it no more.
            let _ = unsafe { result::free_host(pinned.address.cast()) };
        }
    }
}

/// Host memory that stays where it is.
struct Pinned {
    address: *mut u8,
    bytes: usize,
}

impl Pinned {
    fn new(bytes: usize) -> Outcome<Self> {
        // SAFETY: a context is current; the memory is written before anything of it is read as a slice.
        let address = unsafe { result::malloc_host(bytes, 0)? }.cast::<u8>();
        // SAFETY: it is `bytes` long.
        unsafe { address.write_bytes(0, bytes) };
        Ok(Pinned { address, bytes })
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised by `new`; the device writes only to parts that nobody reads meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

fn new_event() -> Outcome<sys::CUevent> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
}
