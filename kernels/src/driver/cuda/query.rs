//! What is there: the driver, its GPUs, and the libraries beside it. Opens no context.

use std::ffi::{c_int, c_void};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::nvrtc::Nvrtc;
use super::{blas, check, explain};
use crate::driver::libraries::{Shared, Wanted, dotted, functions};
use crate::driver::nccl::Nccl;
use crate::{Error, Result, SearchPath};

/// The first driver that runs what a toolkit of version 12 makes, as the driver counts (12.0).
const DRIVER_VERSION_MIN: u32 = 12_000;
/// Tensor cores for bf16, and asynchronous copies to shared memory.
const CAPABILITY_MIN: (u32, u32) = (8, 0);

functions!(DriverFunctions {
    fn cuDriverGetVersion(version: *mut c_int) -> c_int;
});

/// The driver, loaded; cudarc finds it as the library that is loaded already.
pub(crate) struct DriverLibrary {
    pub(crate) library: &'static Shared,
    /// 12040 is 12.4.
    version: u32,
}

/// A GPU as the driver describes it.
#[derive(Clone, Debug)]
pub(crate) struct GpuInfo {
    pub(crate) device: sys::CUdevice,
    pub(crate) name: String,
    pub(crate) memory_bytes: usize,
    pub(crate) compute_capability: (u32, u32),
    pub(crate) multiprocessors: u32,
    /// The most dynamic shared memory that a block can have.
    pub(crate) shared_bytes_max: usize,
}

impl DriverLibrary {
    /// Loads the driver, and sees that it is new enough; before this, no function of cudarc may be called.
    pub(crate) fn open(search_path: &SearchPath) -> Result<Self> {
        let wanted = Wanted::driver();
        let library = Shared::open(&wanted, search_path)?;
        let functions = DriverFunctions::load(library)?;
        let mut version = 0;
        // SAFETY: the integer outlives the call.
        let status = unsafe { (functions.cuDriverGetVersion)(&mut version) };
        if status != 0 {
            return Err(Error::NoGpu { reason: format!("the driver does not tell its version (error {status})") });
        }
        let driver = DriverLibrary { library, version: version.max(0) as u32 };
        // Every function that is called here is in every driver from this version on, so cudarc misses none.
        if driver.version < DRIVER_VERSION_MIN {
            return Err(Error::DriverTooOld { found: driver.version(), needed: dotted(DRIVER_VERSION_MIN) });
        }
        // SAFETY: it only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::MissingLibrary {
                title: wanted.title,
                files: wanted.files.join(" or "),
                problem: format!("is at {}, where the system's loader does not look", library.path.display()),
                remedy: "put its folder into LD_LIBRARY_PATH".into(),
            });
        }
        // SAFETY: addresses are compared, not called; the library is present.
        let (ours, cudarcs) = unsafe {
            let cudarcs = sys::culib().get::<*const c_void>(b"cuInit").map(|symbol| *symbol);
            (library.function::<*const c_void>("cuInit")?, cudarcs)
        };
        if cudarcs.ok() != Some(ours) {
            return Err(Error::UnfitLibrary {
                path: library.path.display().to_string(),
                problem: "the system's loader finds another libcuda.so; leave one of them in LD_LIBRARY_PATH".into(),
            });
        }
        result::init().map_err(no_gpu)?;
        Ok(driver)
    }

    /// The newest CUDA that the driver runs: "12.4".
    pub(crate) fn version(&self) -> String {
        dotted(self.version)
    }

    pub(crate) fn major(&self) -> u32 {
        self.version / 1000
    }

    pub(crate) fn gpus(&self) -> Result<Vec<GpuInfo>> {
        let count = result::device::get_count().map_err(no_gpu)?;
        (0..count.max(0) as usize).map(|ordinal| describe(ordinal as c_int)).collect()
    }

    pub(crate) fn gpu(&self, ordinal: usize) -> Result<GpuInfo> {
        let count = result::device::get_count().map_err(no_gpu)?.max(0) as usize;
        match ordinal < count {
            true => describe(ordinal as c_int),
            false if count == 0 => Err(Error::NoGpu { reason: "the driver sees none".into() }),
            false => Err(Error::NoGpu { reason: format!("number {ordinal} of {count}, counted from 0") }),
        }
    }
}

impl GpuInfo {
    pub(crate) fn check_supported(&self) -> Result<()> {
        if self.compute_capability >= CAPABILITY_MIN {
            return Ok(());
        }
        let ((major, minor), needed) = (self.compute_capability, CAPABILITY_MIN);
        Err(Error::NoGpu {
            reason: format!(
                "{} has compute capability {major}.{minor}, and the kernels need {}.{} (Ampere)",
                self.name, needed.0, needed.1
            ),
        })
    }
}

fn describe(ordinal: c_int) -> Result<GpuInfo> {
    use sys::CUdevice_attribute as Attribute;
    let device = check("cuDeviceGet", result::device::get(ordinal))?;
    let attribute = |attribute| {
        // SAFETY: the device was given by the driver.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        check("cuDeviceGetAttribute", value).map(|value| value.max(0) as u32)
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(GpuInfo {
        device,
        name: check("cuDeviceGetName", result::device::get_name(device))?,
        // SAFETY: as above.
        memory_bytes: check("cuDeviceTotalMem", unsafe { result::device::total_mem(device) })?,
        compute_capability: (major, minor),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
    })
}

fn no_gpu(error: DriverError) -> Error {
    use sys::CUresult as Code;
    let reason = match error.0 {
        Code::CUDA_ERROR_NO_DEVICE => "the driver sees none; CUDA_VISIBLE_DEVICES may hide it".to_string(),
        Code::CUDA_ERROR_STUB_LIBRARY => {
            "libcuda.so is the toolkit's stub; take its folder out of LD_LIBRARY_PATH".to_string()
        }
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver's library and its kernel module differ in version; restart the machine".to_string()
        }
        _ => explain(error),
    };
    Error::NoGpu { reason }
}

/// A library that was found: its title, version and file.
pub(crate) type LibraryVersion = (&'static str, Result<(String, &'static Shared)>);

/// The libraries beside the driver, for a driver of this major version.
pub(crate) fn library_versions(driver_major: u32, search_path: &SearchPath) -> [LibraryVersion; 3] {
    let nvrtc = Nvrtc::open(driver_major, search_path).map(|nvrtc| (nvrtc.version(), nvrtc.library));
    let blas = blas::version(driver_major, search_path).map(|(library, version)| (version, library));
    let nccl = Nccl::load(&Wanted::nccl(driver_major), search_path);
    let nccl = nccl.map(|nccl| (nccl.version().to_string(), nccl.library));
    [("NVRTC", nvrtc), ("cuBLASLt", blas), ("NCCL", nccl)]
}

/// Sees that the libraries without which no GPU can be used are there.
pub(crate) fn needed_libraries(driver_major: u32, search_path: &SearchPath) -> Result<()> {
    Nvrtc::open(driver_major, search_path)?;
    blas::version(driver_major, search_path)?;
    Ok(())
}
