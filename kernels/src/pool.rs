//! Memory that steady-state steps take and give back without asking the system.
//!
//! Freed blocks are kept in lists by size class and handed out again. Classes are an eighth of a power of two apart, so
//! that batches of slightly different length share blocks and at most an eighth is wasted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

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

#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: HashMap<usize, Vec<Box<[Line]>>>,
    statistics: MemoryStatistics,
}

/// A block on loan from a pool; dropping it gives it back.
pub(crate) struct Block {
    pool: Arc<Pool>,
    lines: Option<Box<[Line]>>,
}

impl Pool {
    /// A block of at least `bytes`, its contents left over from its last use.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        let class = size_class(bytes.div_ceil(LINE_BYTES).max(1));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = match state.free.get_mut(&class).and_then(Vec::pop) {
            Some(lines) => lines,
            None => {
                let lines = try_allocate(class).ok_or(Error::OutOfMemory {
                    device: "cpu",
                    requested_bytes: class * LINE_BYTES,
                    live_bytes: state.statistics.live_bytes,
                })?;
                state.statistics.system_allocations += 1;
                lines
            }
        };
        let statistics = &mut state.statistics;
        statistics.live_bytes += class * LINE_BYTES;
        statistics.peak_bytes = statistics.peak_bytes.max(statistics.live_bytes);
        Ok(Block { pool: self.clone(), lines: Some(lines) })
    }

    pub(crate) fn statistics(&self) -> MemoryStatistics {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).statistics
    }

    pub(crate) fn reset_peak(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.statistics.peak_bytes = state.statistics.live_bytes;
    }
}

impl Block {
    pub(crate) fn address(&self) -> usize {
        self.lines.as_ref().map_or(0, |lines| lines.as_ptr() as usize)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(lines) = self.lines.take() {
            let mut state = self.pool.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.statistics.live_bytes -= lines.len() * LINE_BYTES;
            state.free.entry(lines.len()).or_default().push(lines);
        }
    }
}

/// The smallest `m · 2^e ≥ lines` with `8 ≤ m ≤ 16`; below 8, `lines` itself.
fn size_class(lines: usize) -> usize {
    let exponent = lines.ilog2().saturating_sub(3);
    lines.div_ceil(1 << exponent) << exponent
}

fn try_allocate(lines: usize) -> Option<Box<[Line]>> {
    let mut block = Vec::new();
    block.try_reserve_exact(lines).ok()?;
    block.resize(lines, bytemuck::Zeroable::zeroed());
    Some(block.into_boxed_slice())
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
        let pool = Arc::new(Pool::default());
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
