//! A launch: arguments, the order of blocks, and threads of the pool to run them on.

use std::alloc::{self, Layout};
use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Mutex;

use rayon::prelude::*;

use super::compile::{Kernel, Library, RawLaunch, stack_bytes};
use crate::driver::{Argument, Launch};
use crate::{Error, Result};

/// Blocks that a thread of the pool takes at a time, at least.
const BLOCKS_MIN: usize = 4;

/// The most blocks along y and z.
const GRID_MAX: u32 = 65_535;
/// The most shared memory of a block that any GPU has (sm_90).
const SHARED_BYTES_MAX: usize = 227 << 10;

/// Runs all blocks in an order that `seed` draws.
pub(super) fn launch(library: &Library, launch: &Launch, seed: u64) -> Result<()> {
    let kernel = library.kernel(launch.function);
    check_arguments(kernel, launch);
    let Launch { function, block, .. } = *launch;
    assert!(block <= kernel.threads_max, "{block} threads, but kernel {function} is for {}", kernel.threads_max);
    let pointers: Vec<*const c_void> = launch.arguments.iter().map(address_of_value).collect();
    let raw = RawLaunch {
        grid: launch.grid,
        block: launch.block,
        shared_bytes: launch.shared_bytes as u64,
        arguments: pointers.as_ptr(),
        seed,
    };
    assert!(launch.grid[1..].iter().all(|&blocks| blocks <= GRID_MAX), "a grid of {:?} blocks", launch.grid);
    assert!(launch.shared_bytes <= SHARED_BYTES_MAX, "{} bytes of shared memory", launch.shared_bytes);
    let count: u64 = launch.grid.iter().map(|&blocks| u64::from(blocks)).product();
    let order = permutation(count, seed);
    let failure: Mutex<Option<(usize, String)>> = Mutex::new(None);
    let chunk = order.len().div_ceil(4 * rayon::current_num_threads()).max(BLOCKS_MIN);
    order.par_chunks(chunk).enumerate().for_each(|(index, blocks)| {
        with_stacks(launch.block as usize, |stacks| {
            // SAFETY: the stacks are this thread's for now; `check_arguments` compared the types; what pointers point to
            // is the operation's promise, as on any device.
            if let Err(message) = unsafe { library.run(kernel, &raw, blocks, stacks) } {
                let mut failure = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if failure.as_ref().is_none_or(|(first, _)| index < *first) {
                    *failure = Some((index, message));
                }
            }
        });
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        None => Ok(()),
        Some((_, reason)) => Err(Error::Kernel { kernel: launch.function, reason }),
    }
}

/// A launch with other arguments than the kernel's parameters is a bug.
fn check_arguments(kernel: &Kernel, launch: &Launch) {
    let letter = |argument: &Argument| match argument {
        Argument::Pointer(_) => 'p',
        Argument::U32(_) => 'u',
        Argument::I32(_) => 'i',
        Argument::U64(_) => 'U',
        Argument::F32(_) => 'f',
    };
    let given: String = launch.arguments.iter().map(letter).collect();
    assert_eq!(given, kernel.signature, "arguments and parameters of kernel {}", launch.function);
}

fn address_of_value(argument: &Argument) -> *const c_void {
    match argument {
        Argument::Pointer(value) => std::ptr::from_ref(value).cast(),
        Argument::U32(value) => std::ptr::from_ref(value).cast(),
        Argument::I32(value) => std::ptr::from_ref(value).cast(),
        Argument::U64(value) => std::ptr::from_ref(value).cast(),
        Argument::F32(value) => std::ptr::from_ref(value).cast(),
    }
}

/// `0..count` in an order drawn from `seed`.
fn permutation(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = crate::oracle::Random::new(seed);
    for index in (1..order.len()).rev() {
        order.swap(index, random.below(index + 1));
    }
    order
}

/// Memory for the stacks of a block's threads, kept by each thread of the pool.
struct Stacks {
    address: *mut u8,
    layout: Layout,
}

impl Stacks {
    fn new(count: usize) -> Self {
        let layout = Layout::from_size_align(count * stack_bytes(), stack_bytes()).expect("stacks of moderate size");
        // SAFETY: there is at least one stack.
        let address = unsafe { alloc::alloc(layout) };
        if address.is_null() {
            alloc::handle_alloc_error(layout);
        }
        Stacks { address, layout }
    }
}

impl Drop for Stacks {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { alloc::dealloc(self.address, self.layout) }
    }
}

fn with_stacks<R>(count: usize, f: impl FnOnce(*mut u8) -> R) -> R {
    thread_local! {
        static STACKS: RefCell<Option<Stacks>> = const { RefCell::new(None) };
    }
    STACKS.with(|stacks| {
        let mut stacks = stacks.borrow_mut();
        if stacks.as_ref().is_none_or(|stacks| stacks.layout.size() < count * stack_bytes()) {
            *stacks = Some(Stacks::new(count));
        }
        f(stacks.as_ref().map_or(std::ptr::null_mut(), |stacks| stacks.address))
    })
}
