//! Tensors on devices, and the operations of a T5 training step on them.
//!
//! Synchronous, and deliberately small: an operation is a function over [`View`]s, coarse enough to be one or two
//! launches on a GPU (attention with relative bias, RMSNorm, gated GELU, …); there is no tensor algebra, no tape and no
//! broadcasting. The crate knows no model, no file format and no network.
//!
//! Conventions that every operation keeps:
//! - rows are tokens of a padding-free batch, columns are features; a weight is `[out, in]`;
//! - activations and weights are f32, bf16 or f16, sums are accumulated in f32, parameter gradients are f32;
//! - gradients of parameters accumulate (`+=`), gradients of activations overwrite unless a flag says otherwise;
//! - a result does not depend on the number of threads, to the bit;
//! - a wrong shape, type or device is a bug of the caller and panics; an [`Error`] is something the machine did.

mod device;
mod driver;
mod error;
mod float;
mod gemm;
pub mod ops;
mod oracle;
mod parallel;
mod pool;
mod random;
mod search_path;
pub mod selftest;
mod simd;
mod tensor;

pub use device::Device;
pub use driver::Gpu;
pub use driver::cache::set_cache_directory;
pub use driver::communicator::{Communicator, Patience, Place, WaitLimits};
pub use driver::cuda::resources::{KernelResources, kernel_resources};
pub use driver::emulated::{emulator_compiler, set_compiler};
pub use driver::inventory::{Found, GpuSummary, Inventory, Library, inventory, usable_gpus};
pub use driver::nccl::{Nccl, NcclVersion, UniqueId};
pub use error::{Error, Result};
pub use pool::MemoryStatistics;
pub use random::{Dropout, uniform};
pub use search_path::SearchPath;
pub use tensor::{DType, Element, Segments, Tensor, View, ViewMut};
