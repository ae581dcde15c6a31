//! What this machine has for computing on a GPU, and how to get what is missing.

use std::path::PathBuf;

use super::cuda::{DriverLibrary, library_versions};
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
    /// Whether [`crate::Device::cuda`] can be expected to succeed. NCCL is only for several GPUs.
    pub fn has_usable_gpu(&self) -> bool {
        let libraries = self.libraries.iter().filter(|(title, _)| *title != "NCCL");
        self.gpus.iter().any(|gpu| gpu.unfit.is_none()) && libraries.into_iter().all(|(_, found)| found.is_ok())
    }

    /// The first thing in the way of using a GPU.
    pub fn obstacle(&self) -> Option<&str> {
        if self.has_usable_gpu() {
            return None;
        }
        let driver = self.driver.as_ref().err().map(String::as_str);
        let gpu = || self.gpus.iter().find_map(|gpu| gpu.unfit.as_deref());
        let library = || self.libraries.iter().find_map(|(_, found)| found.as_ref().err()).map(String::as_str);
        driver.or_else(gpu).or_else(library)
    }
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
    let gpus = driver.as_ref().map(|driver| summaries(driver)).unwrap_or(Ok(Vec::new()));
    let (gpus, driver) = match (gpus, driver) {
        (Ok(gpus), driver) => (gpus, driver),
        (Err(error), _) => (Vec::new(), Err(error.to_string())),
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

fn summaries(driver: &DriverLibrary) -> Result<Vec<GpuSummary>> {
    let gpus = driver.gpus()?.into_iter().map(|gpu| GpuSummary {
        unfit: gpu.check_supported().err().map(|error| error.to_string()),
        name: gpu.name,
        memory_bytes: gpu.memory_bytes,
        compute_capability: gpu.compute_capability,
        multiprocessors: gpu.multiprocessors,
    });
    Ok(gpus.collect())
}
