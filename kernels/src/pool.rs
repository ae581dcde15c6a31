//! Memory that steady-state steps take and give back without asking the system.
//!
//! Freed blocks are kept in lists by size class and handed out again. Classes are an eighth of a power of two apart, so
//! that batches of slightly different length share blocks and at most an eighth is wasted.

use std::alloc::{self, Layout};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::Driver;
use crate::{Error, Result};

/// The unit of host memory: one cache line, so that every block is aligned for the widest vector loads.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

const LINE_BYTES: usize = size_of::<Line>();

/// Bytes in blocks that are in use, and the largest that number has been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStatistics {
    pub live_bytes: usize,
    pub peak_bytes: usize,
    /// How often the system was asked for a block; constant in steady state.
    pub system_allocations: usize,
}

/// Where a pool's blocks come from.
pub(crate) enum Memory {
    Host,
    Gpu(Arc<Driver>),
}

pub(crate) struct Pool {
    memory: Memory,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Addresses of blocks by their bytes.
    free: HashMap<usize, Vec<usize>>,
    statistics: MemoryStatistics,
}

/// A block on loan from a pool; dropping it gives it back.
pub(crate) struct Block {
    pool: Arc<Pool>,
    address: usize,
    bytes: usize,
}

impl Pool {
    pub(crate) fn new(memory: Memory) -> Arc<Self> {
        Arc::new(Pool { memory, state: Mutex::default() })
    }

    /// A block of at least `bytes`, its contents left over from its last use.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        let bytes = self.memory.block_bytes(bytes);
        let mut state = self.lock();
        let address = match state.free.get_mut(&bytes).and_then(Vec::pop) {
            Some(address) => address,
            None => {
                let address = self.allocate(&mut state, bytes)?;
                state.statistics.system_allocations += 1;
                address
            }
        };
        let statistics = &mut state.statistics;
        statistics.live_bytes += bytes;
        statistics.peak_bytes = statistics.peak_bytes.max(statistics.live_bytes);
        Ok(Block { pool: self.clone(), address, bytes })
    }

    /// Asks the system, if need be a second time after giving back what lies unused.
    fn allocate(&self, state: &mut State, bytes: usize) -> Result<usize> {
        if let Some(address) = self.memory.allocate(bytes)? {
            return Ok(address);
        }
        self.release(state);
        self.memory.allocate(bytes)?.ok_or(Error::OutOfMemory {
            device: self.memory.name(),
            requested_bytes: bytes,
            live_bytes: state.statistics.live_bytes,
        })
    }

    fn release(&self, state: &mut State) {
        for (bytes, addresses) in state.free.drain() {
            addresses.into_iter().for_each(|address| self.memory.free(address, bytes));
        }
    }

    pub(crate) fn statistics(&self) -> MemoryStatistics {
        self.lock().statistics
    }

    pub(crate) fn reset_peak(&self) {
        let mut state = self.lock();
        state.statistics.peak_bytes = state.statistics.live_bytes;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.lock());
        self.release(&mut state);
    }
}

impl Block {
    pub(crate) fn address(&self) -> usize {
        self.address
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.statistics.live_bytes -= self.bytes;
        if self.pool.memory.keeps_free_blocks() {
            state.free.entry(self.bytes).or_default().push(self.address);
        } else {
            self.pool.memory.free(self.address, self.bytes);
        }
    }
}

impl Memory {
    fn name(&self) -> &'static str {
        match self {
            Memory::Host => "cpu",
            Memory::Gpu(driver) => driver.name(),
        }
    }

    /// What is asked of the system for `bytes`: a size class, except where blocks are not used again.
    fn block_bytes(&self, bytes: usize) -> usize {
        if self.keeps_free_blocks() { size_class(bytes.div_ceil(LINE_BYTES).max(1)) * LINE_BYTES } else { bytes }
    }

    /// The emulator does not keep any, so that it sees who uses a block that was freed, or writes beyond its end.
    fn keeps_free_blocks(&self) -> bool {
        !matches!(self, Memory::Gpu(driver) if driver.is_emulated())
    }

    /// The address of a new block; none when memory is short.
    fn allocate(&self, bytes: usize) -> Result<Option<usize>> {
        match self {
            Memory::Host => Ok(host_layout(bytes).and_then(|layout| {
                // SAFETY: a block has at least a line of bytes.
                let address = unsafe { alloc::alloc(layout) };
                if address.is_null() {
                    return None;
                }
                prefer_huge_pages(address, layout);
                // SAFETY: the block is ours. Zeroed, so that it is initialised for every element type.
                unsafe { address.write_bytes(0, bytes) };
                Some(address as usize)
            })),
            Memory::Gpu(driver) => match driver.allocate(bytes) {
                Ok(address) => Ok(Some(address)),
                Err(Error::OutOfMemory { .. }) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    fn free(&self, address: usize, bytes: usize) {
        match self {
            Memory::Host => {
                if let Some(layout) = host_layout(bytes) {
                    // SAFETY: the block came from `allocate` with the same layout, and nobody has it any more.
                    unsafe { alloc::dealloc(address as *mut u8, layout) }
                }
            }
            Memory::Gpu(driver) => driver.free(address),
        }
    }
}

/// What a huge page is on most processors. Blocks of several are aligned to it.
const HUGE_PAGE_BYTES: usize = 2 << 20;

fn host_layout(bytes: usize) -> Option<Layout> {
    let align = if bytes >= 2 * HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { LINE_BYTES };
    Layout::from_size_align(bytes, align).ok()
}

/// Asks for large pages for a large block that nobody has touched: with small ones, a pass over an arena looks up an
/// address for every 4 KiB. A hint: whatever becomes of it, the block is usable.
fn prefer_huge_pages(_address: *mut u8, _layout: Layout) {
    #[cfg(target_os = "linux")]
    if _layout.align() == HUGE_PAGE_BYTES {
        // SAFETY: the block is ours, and the advice changes nothing of what it holds.
        let _ = unsafe { rustix::mm::madvise(_address.cast(), _layout.size(), rustix::mm::Advice::LinuxHugepage) };
    }
}

/// The smallest `m · 2^e ≥ lines` with `8 ≤ m ≤ 16`; below 8, `lines` itself.
fn size_class(lines: usize) -> usize {
    let exponent = lines.ilog2().saturating_sub(3);
    lines.div_ceil(1 << exponent) << exponent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for lines in 1..5000 {
            let class = size_class(lines);
            assert!(class >= lines && class * 8 <= lines * 9 + 7, "{lines} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn blocks_are_reused_and_counted() {
        let pool = Pool::new(Memory::Host);
        let first = pool.take(1000).unwrap();
        let address = first.address();
        assert_eq!(address % 64, 0);
        drop(first);
        let again = pool.take(1010).unwrap();
        assert_eq!(again.address(), address);
        let other = pool.take(1000).unwrap();
        assert_eq!(pool.statistics(), MemoryStatistics { live_bytes: 2048, peak_bytes: 2048, system_allocations: 2 });
        drop((again, other));
        pool.reset_peak();
        assert_eq!(pool.statistics(), MemoryStatistics { live_bytes: 0, peak_bytes: 0, system_allocations: 2 });
    }
}
