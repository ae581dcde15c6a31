//! NVIDIA's library of collectives, and the little of it that is used here.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::libraries::{Shared, Wanted, functions};
use super::{Driver, Gpu};
use crate::{Error, Result, SearchPath};

functions!(Functions {
    fn ncclGetVersion(version: *mut c_int) -> c_int;
    fn ncclGetErrorString(status: c_int) -> *const c_char;
    fn ncclGetLastError(communicator: Handle) -> *const c_char;
    fn ncclGetUniqueId(id: *mut UniqueId) -> c_int;
    fn ncclCommInitRankConfig(communicator: *mut Handle, world_size: c_int, id: UniqueId, rank: c_int, config: *mut Config) -> c_int;
    fn ncclCommGetAsyncError(communicator: Handle, status: *mut c_int) -> c_int;
    fn ncclCommAbort(communicator: Handle) -> c_int;
    fn ncclAllReduce(
        from: *const c_void, to: *mut c_void, count: usize, dtype: c_int, operation: c_int, communicator: Handle,
        stream: *mut c_void,
    ) -> c_int;
});

/// A communicator, as the library calls it.
pub(crate) type Handle = *mut c_void;

pub(super) const SUCCESS: c_int = 0;
const SYSTEM_ERROR: c_int = 2;
const INTERNAL_ERROR: c_int = 3;
const REMOTE_ERROR: c_int = 6;
pub(super) const IN_PROGRESS: c_int = 7;
const TIMEOUT: c_int = 8;

const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// Communicators that can be begun without waiting and aborted are in every version from here on.
const VERSION_MIN: NcclVersion = NcclVersion(21_800);

/// `ncclConfig_t` as it was in 2.17: newer libraries know by `size` and `version` what of theirs it lacks.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// By which the ranks of one communicator find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Of the bytes of another process's.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(UniqueId)
    }
}

/// 23007 is 2.30.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NcclVersion(pub u32);

impl std::fmt::Display for NcclVersion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let NcclVersion(code) = self;
        write!(formatter, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}

/// The library, loaded.
#[derive(Clone, Copy)]
pub struct Nccl {
    pub(super) library: &'static Shared,
    functions: &'static Functions,
    version: NcclVersion,
}

impl Nccl {
    /// The library for a GPU: NVIDIA's, or for an emulated one the stand-in that tests bring.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn open(gpu: &Gpu) -> Result<Self> {
        let wanted = match &*gpu.driver {
            Driver::Cuda(cuda) => Wanted::nccl(cuda.driver_major()),
            Driver::Emulated(_) => Wanted::emulated_nccl(),
        };
        Nccl::load(&wanted, SearchPath::current())
    }

    pub(super) fn load(wanted: &Wanted, search_path: &SearchPath) -> Result<Self> {
        let library = Shared::open(wanted, search_path)?;
        let functions = Functions::load(library)?;
        let mut version = 0;
        // SAFETY: the integer outlives the call.
        let status = unsafe { (functions.ncclGetVersion)(&mut version) };
        let version = NcclVersion(version.max(0) as u32);
        let unfit = |problem| Error::UnfitLibrary { path: library.path.display().to_string(), problem };
        match status {
            SUCCESS if version >= VERSION_MIN => {
                Ok(Nccl { library, functions: Box::leak(Box::new(functions)), version })
            }
            SUCCESS => Err(unfit(format!("NCCL {version} is too old, {VERSION_MIN} is needed"))),
            _ => Err(unfit(format!("it does not tell its version (error {status})"))),
        }
    }

    pub fn version(&self) -> NcclVersion {
        self.version
    }

    /// An id for a new communicator, made by its rank 0, where the others will look for it.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the id outlives the call.
        let status = unsafe { (self.functions.ncclGetUniqueId)(&mut id) };
        self.check("ncclGetUniqueId", status)?;
        Ok(id)
    }

    /// Begins to form a communicator.
    ///
    /// # Safety
    /// The GPU's context is current.
    pub(super) unsafe fn begin(&self, id: UniqueId, rank: u32, world_size: u32) -> Result<Handle> {
        let (mut handle, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        let (rank, world_size) = (rank as c_int, world_size as c_int);
        // SAFETY: the caller's; handle and configuration outlive the call.
        let status = unsafe { (self.functions.ncclCommInitRankConfig)(&mut handle, world_size, id, rank, &mut config) };
        self.check("ncclCommInitRankConfig", status)?;
        Ok(handle)
    }

    /// Begins to add up `count` numbers over all ranks, in place, after what is in the stream.
    ///
    /// # Safety
    /// The handle is of a communicator that stands, the context of its GPU current; nobody uses the numbers, of type f32,
    /// until the stream is done.
    pub(super) unsafe fn all_reduce(
        &self,
        handle: Handle,
        address: usize,
        count: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let numbers = address as *mut c_void;
        // SAFETY: the caller's.
        let status = unsafe { (self.functions.ncclAllReduce)(numbers, numbers, count, FLOAT32, SUM, handle, stream) };
        self.check("ncclAllReduce", status)
    }

    /// Whether nothing is under way on the host's side: the answer to every call that was told to be in progress.
    ///
    /// # Safety
    /// The handle is of a communicator that was begun and not aborted.
    pub(super) unsafe fn is_settled(&self, handle: Handle) -> Result<bool> {
        let mut state = SUCCESS;
        // SAFETY: the caller's; the integer outlives the call.
        let status = unsafe { (self.functions.ncclCommGetAsyncError)(handle, &mut state) };
        self.check("ncclCommGetAsyncError", status)?;
        self.check("a collective", state)?;
        Ok(state == SUCCESS)
    }

    /// Ends a communicator and what it has under way. May hang where a GPU does.
    ///
    /// # Safety
    /// As [`Nccl::is_settled`]; the handle is used no more.
    pub(super) unsafe fn abort(&self, handle: Handle) {
        // SAFETY: the caller's. There is nothing to be done about a failure to end.
        let _ = unsafe { (self.functions.ncclCommAbort)(handle) };
    }

    fn check(&self, action: &'static str, status: c_int) -> Result<()> {
        if status == SUCCESS || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: the library answers every number with a text that stays, and has a last error even without communicator.
        let (text, last) = unsafe {
            let text = |text: *const c_char| match text.is_null() {
                true => String::new(),
                false => CStr::from_ptr(text).to_string_lossy().trim().to_string(),
            };
            (
                text((self.functions.ncclGetErrorString)(status)),
                text((self.functions.ncclGetLastError)(std::ptr::null_mut())),
            )
        };
        let reason = if last.is_empty() { text } else { format!("{text}: {last}") };
        match status {
            // What a rank sees of another's end.
            SYSTEM_ERROR | INTERNAL_ERROR | REMOTE_ERROR | TIMEOUT => {
                Err(Error::PeersLost { problem: format!("{action} failed: {reason}") })
            }
            _ => Err(Error::Nccl { action, reason }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::libraries::NEWEST_MAJOR;

    #[test]
    fn versions_read_as_written() {
        assert_eq!(NcclVersion(23_007).to_string(), "2.30.7");
        assert!(VERSION_MIN < NcclVersion(23_003));
        assert_eq!(size_of::<Config>(), 48);
    }

    /// NVIDIA's own, which needs a GPU for communicators only; tests/cuda/compile.sh sees to it.
    #[test]
    fn the_real_library_has_what_is_used() {
        let nccl = match Nccl::load(&Wanted::nccl(NEWEST_MAJOR), &SearchPath::default()) {
            Ok(nccl) => nccl,
            Err(error) => return eprintln!("SKIPPED: NVIDIA's NCCL was not loaded, because {error}"),
        };
        assert!(nccl.version() >= VERSION_MIN, "{}", nccl.version());
        let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
        assert_ne!(ids[0], ids[1]);
        assert_eq!(UniqueId::from_bytes(ids[0].as_bytes()), Some(ids[0]));
        let error = nccl.check("something", 5).unwrap_err();
        assert!(error.to_string().starts_with("NCCL: something failed: invalid usage"), "{error}");
        assert!(matches!(nccl.check("something", 6), Err(Error::PeersLost { .. })));
    }
}
