//! What holds a GPU's memory and launches its kernels: the CUDA driver, or an emulator that runs the same kernels on the
//! host. An operation knows neither; names, arguments, grids and shared memory are the same for both.

pub(crate) mod cache;
pub(crate) mod communicator;
pub(crate) mod cuda;
pub(crate) mod emulated;
pub(crate) mod inventory;
mod libraries;
pub(crate) mod nccl;
pub(crate) mod sources;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pool::{Memory, Pool};
use crate::{DType, Dropout, Result, View, ViewMut};

/// A GPU: a driver, the pool of its memory, and one stream on which everything runs in order. Clones are the same GPU.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<Driver>,
    pub(crate) pool: Arc<Pool>,
    tf32: Arc<AtomicBool>,
}

#[expect(clippy::large_enum_variant, reason = "a process has a few, each behind an Arc")]
pub(crate) enum Driver {
    Cuda(cuda::Cuda),
    Emulated(emulated::Emulated),
}

/// A file of kernels, compiled for an element type and with integer constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Module<'a> {
    /// The file's stem: `"rms_norm"`.
    pub(crate) source: &'static str,
    /// What `element` is in the source.
    pub(crate) element: DType,
    /// Names and values of macros.
    pub(crate) constants: &'a [(&'static str, u32)],
}

/// A kernel's launch.
pub(crate) struct Launch<'a> {
    pub(crate) module: Module<'a>,
    pub(crate) function: &'static str,
    /// Blocks along x, y and z; if one of them is 0, nothing runs.
    pub(crate) grid: [u32; 3],
    /// Threads of a block, along x; whole warps.
    pub(crate) block: u32,
    pub(crate) shared_bytes: usize,
    pub(crate) arguments: &'a [Argument],
}

/// A kernel's argument. A view passes its address alone; what else a kernel wants to know of it are further arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Argument {
    Pointer(usize),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
}

/// A matrix product, row by row: `c[M,N] = alpha · op(a)[M,K] · op(b)[K,N]`, plus the old `c` if `accumulate`. An operand
/// that is `transposed` lies as `[K,M]` (or `[N,K]`) in memory. `a` and `b` have one type, `c` has that or is f32.
pub(crate) struct Product<'a> {
    pub(crate) a: View<'a>,
    pub(crate) a_transposed: bool,
    pub(crate) b: View<'a>,
    pub(crate) b_transposed: bool,
    pub(crate) c: ViewMut<'a>,
    pub(crate) alpha: f32,
    pub(crate) accumulate: bool,
}

impl Module<'_> {
    /// The macros that the module is compiled with.
    pub(crate) fn defines(&self) -> Vec<String> {
        let element = match self.element {
            DType::F32 => "ELEMENT_F32",
            DType::Bf16 => "ELEMENT_BF16",
            DType::F16 => "ELEMENT_F16",
            DType::U32 => panic!("kernels over elements of type u32"),
        };
        let constants = self.constants.iter().map(|(name, value)| format!("-D{name}={value}"));
        std::iter::once(format!("-D{element}")).chain(constants).collect()
    }

    /// For messages: `rms_norm (bf16, HEAD_SIZE=64)`.
    pub(crate) fn describe(&self) -> String {
        let constants: String = self.constants.iter().map(|(name, value)| format!(", {name}={value}")).collect();
        format!("{} ({}{constants})", self.source, self.element.name())
    }
}

impl Product<'_> {
    /// `(M, N, K)`
    pub(crate) fn shape(&self) -> (usize, usize, usize) {
        let (m, k) = match self.a_transposed {
            false => (self.a.rows(), self.a.cols()),
            true => (self.a.cols(), self.a.rows()),
        };
        (m, self.c.cols(), k)
    }

    fn check(&self) {
        let (m, n, k) = self.shape();
        assert_eq!((self.c.rows(), self.c.cols()), (m, n), "shape of a product");
        let b = if self.b_transposed { (n, k) } else { (k, n) };
        assert_eq!((self.b.rows(), self.b.cols()), b, "shape of a product's second operand");
        assert_eq!(self.a.dtype(), self.b.dtype(), "types of a product's operands");
        assert!([self.a.dtype(), DType::F32].contains(&self.c.dtype()), "type of a product");
    }
}

impl Gpu {
    pub(crate) fn new(driver: Driver) -> Self {
        let driver = Arc::new(driver);
        Gpu { pool: Pool::new(Memory::Gpu(driver.clone())), driver, tf32: Arc::default() }
    }

    /// Whether tensor cores may round operands of type f32 to tf32 (10 bits of mantissa) from now on; not at first.
    pub fn set_tf32(&self, tf32: bool) {
        self.tf32.store(tf32, Ordering::Relaxed);
    }

    pub fn tf32(&self) -> bool {
        self.tf32.load(Ordering::Relaxed)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.driver.name()
    }

    /// Waits until everything launched so far is done; its failures, if any, are reported here.
    pub fn synchronize(&self) -> Result<()> {
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.synchronize(),
            Driver::Emulated(emulated) => emulated.synchronize(),
        }
    }

    /// Tells this GPU, or the part of one that it is, from all others in the world.
    pub fn id(&self) -> Result<String> {
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.uuid(),
            Driver::Emulated(_) => Ok(format!("emulated by process {}", std::process::id())),
        }
    }

    /// Runs a kernel after everything launched before it; does not wait.
    pub(crate) fn launch(&self, launch: Launch) -> Result<()> {
        assert!((32..=1024).contains(&launch.block) && launch.block.is_multiple_of(32), "{} threads", launch.block);
        if launch.grid.contains(&0) {
            return Ok(());
        }
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.launch(&launch),
            Driver::Emulated(emulated) => emulated.launch(&launch),
        }
    }

    /// A matrix product, in order with launches.
    pub(crate) fn gemm(&self, product: Product) -> Result<()> {
        product.check();
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.gemm(product, self.tf32()),
            Driver::Emulated(emulated) => emulated.gemm(product),
        }
    }

    pub(crate) fn upload(&self, address: usize, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.upload(address, bytes),
            Driver::Emulated(emulated) => emulated.upload(address, bytes),
        }
    }

    pub(crate) fn download(&self, address: usize, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.download(address, bytes),
            Driver::Emulated(emulated) => emulated.download(address, bytes),
        }
    }

    pub(crate) fn fill_zero(&self, address: usize, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match &*self.driver {
            Driver::Cuda(cuda) => cuda.fill_zero(address, bytes),
            Driver::Emulated(emulated) => emulated.fill_zero(address, bytes),
        }
    }

    /// Copies a view without gaps to another of the same type and size.
    pub(crate) fn copy(&self, from: View, to: ViewMut) -> Result<()> {
        assert!(from.is_contiguous() && to.view().is_contiguous(), "copy between views with gaps");
        assert_eq!((from.dtype(), from.rows() * from.cols()), (to.dtype(), to.rows() * to.cols()), "sizes of a copy");
        let bytes = from.rows() * from.cols() * from.dtype().bytes();
        match &*self.driver {
            _ if bytes == 0 => Ok(()),
            Driver::Cuda(cuda) => cuda.copy(to.address(), from.address(), bytes),
            Driver::Emulated(emulated) => emulated.copy(to.address(), from.address(), bytes),
        }
    }
}

impl Driver {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Driver::Cuda(_) => "cuda",
            Driver::Emulated(_) => "emulated",
        }
    }

    pub(crate) fn is_emulated(&self) -> bool {
        matches!(self, Driver::Emulated(_))
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<usize> {
        match self {
            Driver::Cuda(cuda) => cuda.allocate(bytes),
            Driver::Emulated(emulated) => emulated.allocate(bytes),
        }
    }

    pub(crate) fn free(&self, address: usize) {
        match self {
            Driver::Cuda(cuda) => cuda.free(address),
            Driver::Emulated(emulated) => emulated.free(address),
        }
    }
}

impl From<View<'_>> for Argument {
    fn from(view: View<'_>) -> Self {
        Argument::Pointer(view.address())
    }
}

impl From<&ViewMut<'_>> for Argument {
    fn from(view: &ViewMut<'_>) -> Self {
        Argument::Pointer(view.address())
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Argument::U32(value)
    }
}

/// Sizes and strides; kernels take them in 32 bits.
impl From<usize> for Argument {
    fn from(value: usize) -> Self {
        Argument::U32(u32::try_from(value).expect("a size of 32 bits")) // why: `Device::empty` gives no larger tensor
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Argument::I32(value)
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Argument::U64(value)
    }
}

impl From<bool> for Argument {
    fn from(value: bool) -> Self {
        Argument::U32(value.into())
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Argument::F32(value)
    }
}

/// What `DROPOUT_PARAMETERS` of random.cuh takes.
pub(crate) fn dropout_arguments(mask: Dropout) -> [Argument; 4] {
    [mask.seed.into(), mask.stream.into(), mask.threshold.into(), mask.scale.into()]
}

/// Whether rows can be read and written in vectors of 16 bytes and in groups of 8 elements: their addresses and lengths
/// are whole ones. Kernels go element by element otherwise.
pub(crate) fn has_whole_vectors(views: &[View]) -> bool {
    views.iter().all(|view| {
        let bytes = view.dtype().bytes();
        view.address().is_multiple_of(16) && view.cols().is_multiple_of(8) && (view.stride() * bytes).is_multiple_of(16)
    })
}
