//! What this machine has for computing on a GPU, and how to get what is missing.

use std::path::PathBuf;

use super::cuda::{DriverLibrary, GpuInfo, library_versions, needed_libraries};
use super::libraries::NEWEST_MAJOR;
use crate::{Result, SearchPath};

/// What was found, or one line that says what is missing and what to do about it.
pub type Found<T> = std::result::Result<T, String>;

/// What [`inventory`] found.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Its version is the newest CUDA that it runs.
    pub driver: Found<Library>,
    pub gpus: Vec<GpuSummary>,
    /// NVRTC, cuBLASLt and NCCL.
    pub libraries: Vec<(&'static str, Found<Library>)>,
}

#[derive(Clone, Debug)]
pub struct Library {
    pub version: String,
    pub path: PathBuf,
}

#[derive(Clone, Debug)]
pub struct GpuSummary {
    pub name: String,
    pub memory_bytes: usize,
    pub compute_capability: (u32, u32),
    pub multiprocessors: u32,
    /// Why the kernels do not run on it.
    pub unfit: Option<String>,
}

impl Inventory {
    /// Whether [`usable_gpus`] finds one. NCCL is only for several.
    pub fn has_usable_gpu(&self) -> bool {
        let libraries = self.libraries.iter().filter(|(title, _)| *title != "NCCL");
        self.gpus.iter().any(|gpu| gpu.unfit.is_none()) && libraries.into_iter().all(|(_, found)| found.is_ok())
    }
}

/// The GPUs of this machine, of which at least one can be used. Opens none of them; takes no time where there is no driver.
///
/// # Errors
/// What is in the way of using one.
pub fn usable_gpus() -> Result<Vec<GpuSummary>> {
    let search_path = SearchPath::current();
    let driver = DriverLibrary::open(search_path)?;
    let gpus = driver.gpus()?;
    if !gpus.iter().any(|gpu| gpu.check_supported().is_ok()) {
        driver.gpu(0)?.check_supported()?;
    }
    needed_libraries(driver.major(), search_path)?;
    Ok(gpus.into_iter().map(summary).collect())
}

/// Looks for the driver, GPUs and libraries. Opens no GPU; takes a second at most.
pub fn inventory() -> Inventory {
    let search_path = SearchPath::current();
    let (driver, major) = match DriverLibrary::open(search_path) {
        Ok(driver) => {
            let major = driver.major();
            (Ok(driver), major)
        }
        Err(error) => (Err(error.to_string()), NEWEST_MAJOR),
    };
    let gpus = driver.as_ref().map_or(Ok(Vec::new()), DriverLibrary::gpus);
    let (gpus, driver) = match gpus {
        Ok(gpus) => (gpus.into_iter().map(summary).collect(), driver),
        Err(error) => (Vec::new(), Err(error.to_string())),
    };
    let libraries = library_versions(major, search_path).into_iter().map(|(title, found)| {
        let found = found.map(|(version, library)| Library { version, path: library.path.clone() });
        (title, found.map_err(|error| error.to_string()))
    });
    Inventory {
        driver: driver.map(|driver| Library { version: driver.version(), path: driver.library.path.clone() }),
        gpus,
        libraries: libraries.collect(),
    }
}

fn summary(gpu: GpuInfo) -> GpuSummary {
    GpuSummary {
        unfit: gpu.check_supported().err().map(|error| error.to_string()),
        name: gpu.name,
        memory_bytes: gpu.memory_bytes,
        compute_capability: gpu.compute_capability,
        multiprocessors: gpu.multiprocessors,
    }
}
