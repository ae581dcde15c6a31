//! The emulator's device memory: host memory in blocks of exactly the size asked for, poisoned, with guards around.

use std::alloc::{self, Layout};
use std::collections::BTreeMap;

use super::compile::is_sanitized;
use crate::{Error, Result};

/// As a GPU aligns its blocks.
const ALIGNMENT: usize = 256;
/// Bytes after a block that nobody may write. With AddressSanitizer there are none: it watches what lies there itself.
const GUARD_BYTES: usize = 256;
const GUARD: u8 = 0xa5;
/// NaN as a float of any width.
const POISON: u8 = 0xff;

/// Blocks by address.
#[derive(Default)]
pub(super) struct Allocations {
    blocks: BTreeMap<usize, usize>,
}

impl Allocations {
    pub(super) fn allocate(&mut self, bytes: usize) -> Result<usize> {
        let out_of_memory = || Error::OutOfMemory {
            device: "emulated",
            requested_bytes: bytes,
            live_bytes: self.blocks.values().sum(),
        };
        let layout = layout(bytes).ok_or_else(out_of_memory)?;
        // SAFETY: the layout has at least a byte.
        let address = unsafe { alloc::alloc(layout) };
        if address.is_null() {
            return Err(out_of_memory());
        }
        // SAFETY: both are inside the layout.
        unsafe {
            address.write_bytes(POISON, bytes);
            address.add(bytes).write_bytes(GUARD, guard_bytes());
        }
        self.blocks.insert(address as usize, bytes);
        Ok(address as usize)
    }

    pub(super) fn free(&mut self, address: usize) {
        let bytes = self.blocks.remove(&address).expect("a block of this device");
        if let Some(layout) = layout(bytes) {
            // SAFETY: the block was allocated with this layout, and has just been forgotten.
            unsafe { alloc::dealloc(address as *mut u8, layout) }
        }
    }

    /// Panics if these bytes are not inside one block.
    pub(super) fn check(&self, address: usize, bytes: usize) {
        let block = self.blocks.range(..=address).next_back();
        let is_inside = block.is_some_and(|(&start, &length)| address + bytes <= start + length);
        assert!(is_inside, "{bytes} bytes at {address:#x} are not in a block of device memory");
    }

    /// An error if something was written right behind a block.
    pub(super) fn check_guards(&self, kernel: &'static str) -> Result<()> {
        for (&address, &bytes) in &self.blocks {
            // SAFETY: the guard belongs to the block's layout and was initialised with it.
            let guard = unsafe { std::slice::from_raw_parts((address + bytes) as *const u8, guard_bytes()) };
            if let Some(offset) = guard.iter().position(|&byte| byte != GUARD) {
                let reason = format!("out of bounds: wrote byte {offset} after a block of {bytes} bytes");
                return Err(Error::Kernel { kernel, reason });
            }
        }
        Ok(())
    }
}

fn guard_bytes() -> usize {
    if is_sanitized() { 0 } else { GUARD_BYTES }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align((bytes + guard_bytes()).max(1), ALIGNMENT).ok()
}
