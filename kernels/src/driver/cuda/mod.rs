//! The CUDA driver: one GPU, its primary context, and one stream on which everything runs in order.
//!
//! Nothing waits but [`Cuda::download`] and [`Cuda::synchronize`]. A failure of a kernel is noticed at some later call;
//! its message then names the last kernel that was launched.

mod blas;
mod event;
mod nvrtc;
mod plan;
mod query;
pub(crate) mod resources;
mod side;
mod staging;
#[cfg(test)]
mod tests;
mod transfer;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::fs;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use self::blas::{Blas, WORKSPACE_BYTES};
use self::nvrtc::Nvrtc;
use self::plan::Problem;
use self::transfer::Transfer;
use super::{Argument, Launch, Module, Product, cache, sources};
use crate::{DType, Error, Result, SearchPath};

pub(crate) use self::event::Event;
pub(crate) use self::query::{DriverLibrary, GpuInfo, library_versions, needed_libraries};
pub(crate) use self::side::SideStream;

/// Dynamic shared memory that every kernel may have without being asked for.
const SHARED_BYTES_DEFAULT: usize = 48 << 10;

/// A GPU that was opened.
pub(crate) struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The most dynamic shared memory that a block can have.
    shared_bytes_max: usize,
    nvrtc: Nvrtc,
    architecture: String,
    driver_major: u32,
    modules: Mutex<HashMap<ModuleKey, Loaded>>,
    transfer: Mutex<Transfer>,
    workspace: sys::CUdeviceptr,
    /// Dropped by hand, before the context.
    blas: ManuallyDrop<Blas>,
    /// For messages.
    last_kernel: Mutex<&'static str>,
}

type ModuleKey = (&'static str, DType, Vec<(&'static str, u32)>);

struct Loaded {
    module: sys::CUmodule,
    functions: HashMap<&'static str, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that was asked for so far.
    shared_bytes: usize,
}

// SAFETY: handles of the driver may be used from any thread, as long as the context is made current there (`bind`);
// what is changed on the host lies behind mutexes.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Opens the GPU of this number, with the libraries that it needs.
    pub(crate) fn new(ordinal: usize, search_path: &SearchPath) -> Result<Self> {
        let driver = DriverLibrary::open(search_path)?;
        let info = driver.gpu(ordinal)?;
        info.check_supported()?;
        let nvrtc = Nvrtc::open(driver.major(), search_path)?;
        let architecture = nvrtc.architecture(info.compute_capability)?;
        let context = Context::retain(info.device)?;
        let stream = check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let transfer = Transfer::new()?;
        // SAFETY: the context is current.
        let workspace = unsafe { result::malloc_sync(WORKSPACE_BYTES) };
        let workspace = check("the workspace of cuBLASLt", workspace)?;
        let blas = Blas::open(driver.major(), search_path, workspace as usize)?;
        Ok(Cuda {
            device: info.device,
            context: context.keep(),
            stream,
            shared_bytes_max: info.shared_bytes_max,
            nvrtc,
            architecture,
            driver_major: driver.major(),
            modules: Mutex::default(),
            transfer: Mutex::new(transfer),
            workspace,
            blas: ManuallyDrop::new(blas),
            last_kernel: Mutex::new("none"),
        })
    }

    /// Of the GPU, or of the MIG instance that it is.
    pub(crate) fn uuid(&self) -> Result<String> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the answer outlives the call. The first version would not tell instances apart.
        check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.device) }.result())?;
        Ok(uuid.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect())
    }

    /// Of the newest CUDA that the driver runs.
    pub(crate) fn driver_major(&self) -> u32 {
        self.driver_major
    }

    /// Device memory, aligned to 256 bytes.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<usize> {
        self.bind()?;
        // SAFETY: the context is current.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(address as usize),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = check("cuMemGetInfo", result::mem_get_info())?;
                Err(Error::OutOfMemory { device: "cuda", requested_bytes: bytes, live_bytes: total - free })
            }
            Err(error) => self.check("cuMemAlloc", Err(error)),
        }
    }

    /// Gives back what [`Cuda::allocate`] gave, once the stream is done with it.
    pub(crate) fn free(&self, address: usize) {
        // A GPU that has failed, or a process that is ending, has no use for the memory.
        if self.bind().is_ok() {
            // SAFETY: the pool frees a block once; the driver waits for the kernels that use it.
            let _ = unsafe { result::free_sync(address as sys::CUdeviceptr) };
        }
    }

    /// Copies to the device, in order with launches; `bytes` may be changed when this returns.
    pub(crate) fn upload(&self, address: usize, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let outcome = lock(&self.transfer).upload(address as sys::CUdeviceptr, bytes, self.stream);
        self.check("a copy to the GPU", outcome)
    }

    /// Copies from the device, after everything launched before, and waits for it.
    pub(crate) fn download(&self, address: usize, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        let outcome = lock(&self.transfer).download(address as sys::CUdeviceptr, bytes, self.stream);
        self.check("a copy from the GPU", outcome)
    }

    pub(crate) fn copy(&self, to: usize, from: usize, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: both are `bytes` long, on this device, and not freed before the stream is done with them.
        let outcome =
            unsafe { result::memcpy_dtod_async(to as sys::CUdeviceptr, from as sys::CUdeviceptr, bytes, self.stream) };
        self.check("a copy on the GPU", outcome)
    }

    pub(crate) fn fill_zero(&self, address: usize, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: as in `copy`.
        let outcome = unsafe { result::memset_d8_async(address as sys::CUdeviceptr, 0, bytes, self.stream) };
        self.check("filling memory of the GPU", outcome)
    }

    /// Waits for everything so far, and reports what failed of it.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        let outcome = unsafe { result::stream::synchronize(self.stream) };
        self.check("the work so far", outcome)
    }

    pub(crate) fn launch(&self, launch: &Launch) -> Result<()> {
        self.bind()?;
        let function = self.function(launch)?;
        let mut arguments: Vec<*mut c_void> = launch.arguments.iter().map(pointer).collect();
        let [x, y, z] = launch.grid;
        *lock(&self.last_kernel) = launch.function;
        // SAFETY: the function is of a module that is never unloaded before `self` is dropped; argument types are the
        // kernel's, which the emulator checks by running the same launches; the driver copies the arguments.
        let outcome = unsafe {
            let shared_bytes = launch.shared_bytes as u32;
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), shared_bytes, self.stream, &mut arguments)
        };
        outcome.map_err(|error| Error::Kernel {
            kernel: launch.function,
            reason: format!(
                "grid {x} x {y} x {z}, {} threads and {} bytes of shared memory a block: {}",
                launch.block,
                launch.shared_bytes,
                explain(error)
            ),
        })
    }

    /// A product whose operands, if they are f32, may be rounded to `tf32`.
    pub(crate) fn gemm(&self, product: Product, tf32: bool) -> Result<()> {
        let (m, n, k) = product.shape();
        if m == 0 || n == 0 || (k == 0 && product.accumulate) {
            return Ok(());
        }
        self.bind()?;
        if k == 0 {
            return self.fill_rows_zero(&product);
        }
        *lock(&self.last_kernel) = "a matrix product";
        self.blas.multiply(&Problem::new(&product, tf32), self.stream)
    }

    /// The sum over nothing.
    fn fill_rows_zero(&self, product: &Product) -> Result<()> {
        let c = product.c.view();
        let bytes = c.dtype().bytes();
        // SAFETY: these are the rows of the exclusive view.
        let status = unsafe {
            sys::cuMemsetD2D8Async(
                c.address() as sys::CUdeviceptr,
                c.stride() * bytes,
                0,
                c.cols() * bytes,
                c.rows(),
                self.stream,
            )
        };
        self.check("filling memory of the GPU", status.result())
    }

    /// The kernel, compiled and loaded at its first launch.
    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let mut modules = lock(&self.modules);
        let key = (launch.module.source, launch.module.element, launch.module.constants.to_vec());
        let loaded = match modules.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(Loaded { module: self.load(launch.module)?, functions: HashMap::new() })
            }
        };
        let function = match loaded.functions.entry(launch.function) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let name = CString::new(launch.function).expect("a kernel's name");
                // SAFETY: the module is loaded.
                let handle = unsafe { result::module::get_function(loaded.module, name) };
                let handle = handle.map_err(|error| Error::Load {
                    module: launch.module.describe(),
                    reason: format!("kernel {}: {}", launch.function, explain(error)),
                })?;
                entry.insert(Function { handle, shared_bytes: SHARED_BYTES_DEFAULT })
            }
        };
        if launch.shared_bytes > function.shared_bytes {
            self.allow_shared_bytes(launch, function.handle)?;
            function.shared_bytes = launch.shared_bytes;
        }
        Ok(function.handle)
    }

    /// More shared memory than the default has to be asked for.
    fn allow_shared_bytes(&self, launch: &Launch, function: sys::CUfunction) -> Result<()> {
        let bytes = launch.shared_bytes;
        if bytes > self.shared_bytes_max {
            let reason =
                format!("it needs {bytes} bytes of shared memory, and this GPU has {} a block", self.shared_bytes_max);
            return Err(Error::Kernel { kernel: launch.function, reason });
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function's module is loaded.
        let outcome = unsafe { result::function::set_function_attribute(function, attribute, bytes as i32) };
        outcome.map_err(|error| Error::Kernel {
            kernel: launch.function,
            reason: format!("asking for {bytes} bytes of shared memory: {}", explain(error)),
        })
    }

    fn load(&self, module: Module) -> Result<sys::CUmodule> {
        let cubin = cubin(&self.nvrtc, &self.architecture, module)?;
        // SAFETY: the bytes are a cubin; the driver copies it.
        let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
        loaded.map_err(|error| Error::Load { module: module.describe(), reason: explain(error) })
    }

    /// Makes the context current for the calling thread.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// A failure, which may be that of a kernel launched earlier.
    fn check<T>(&self, action: &str, outcome: std::result::Result<T, DriverError>) -> Result<T> {
        outcome.map_err(|error| Error::Cuda {
            action: action.to_string(),
            reason: format!("{} (launched last: {})", explain(error), lock(&self.last_kernel)),
        })
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: after the stream is done nobody uses any of these; each is given back once, here. At the end of a process
        // the driver may be gone before, which is no harm.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            ManuallyDrop::drop(&mut self.blas);
            for loaded in lock(&self.modules).values() {
                let _ = result::module::unload(loaded.module);
            }
            lock(&self.transfer).release();
            let _ = result::free_sync(self.workspace);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// The primary context, given back unless it is kept.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

impl Context {
    /// Retains it, and makes it current.
    fn retain(device: sys::CUdevice) -> Result<Self> {
        // SAFETY: the device was given by the driver.
        let context = check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        let context = Context { device, context };
        // SAFETY: it was retained.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(context.context) })?;
        Ok(context)
    }

    fn keep(self) -> sys::CUcontext {
        let context = self.context;
        std::mem::forget(self);
        context
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained, and whoever failed to open the GPU uses it no more.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// The module's machine code, from the disk if it was compiled before by this version of NVRTC from the same text.
pub(crate) fn cubin(nvrtc: &Nvrtc, architecture: &str, module: Module) -> Result<Vec<u8>> {
    let options = options(architecture, module);
    let source = sources::kernels(module.source);
    let version = nvrtc.version();
    let mut inputs: Vec<&[u8]> = vec![version.as_bytes(), source.as_bytes()];
    inputs.extend(options.iter().map(|option| option.as_bytes()));
    inputs.extend(sources::HEADERS.iter().flat_map(|(name, text)| [name.as_bytes(), text.as_bytes()]));
    let path = cache::artifact(&inputs, "cubin", |path| {
        let compiled = compile(nvrtc, &options, module)?;
        fs::write(path, compiled.cubin).map_err(|source| Error::Cache { path: path.to_path_buf(), source })
    })?;
    fs::read(&path).map_err(|source| Error::Cache { path, source })
}

fn compile(nvrtc: &Nvrtc, options: &[String], module: Module) -> Result<nvrtc::Compiled> {
    let name = format!("{}.cu", module.source);
    let compiled = nvrtc.compile((&name, sources::kernels(module.source)), sources::HEADERS, options);
    compiled.map_err(|error| match error {
        Error::Compile { log, .. } => {
            Error::Compile { module: format!("{} for {}", module.describe(), options[0]), log }
        }
        other => other,
    })
}

/// Of the compiler: no fast mathematics, because tolerances are those of the CPU.
fn options(architecture: &str, module: Module) -> Vec<String> {
    let fixed = [format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "-default-device".into()];
    fixed.into_iter().chain(["-lineinfo".into()]).chain(module.defines()).collect()
}

/// Where an argument lies on the host.
fn pointer(argument: &Argument) -> *mut c_void {
    match argument {
        Argument::Pointer(address) => (&raw const *address).cast_mut().cast(),
        Argument::U32(value) => (&raw const *value).cast_mut().cast(),
        Argument::I32(value) => (&raw const *value).cast_mut().cast(),
        Argument::U64(value) => (&raw const *value).cast_mut().cast(),
        Argument::F32(value) => (&raw const *value).cast_mut().cast(),
    }
}

fn check<T>(action: &str, outcome: std::result::Result<T, DriverError>) -> Result<T> {
    outcome.map_err(|error| Error::Cuda { action: action.to_string(), reason: explain(error) })
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered`
fn explain(error: DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("error {}", error.0 as u32))
    };
    format!("{}: {}", text(error.error_name()), text(error.error_string()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
