//! What the compiler makes of the kernels: registers, shared memory, spills. Needs NVRTC and no GPU.

use rayon::prelude::*;

use super::nvrtc::Nvrtc;
use super::{compile, options};
use crate::driver::Module;
use crate::driver::libraries::NEWEST_MAJOR;
use crate::driver::sources::{self, is_hot};
use crate::ops::{KernelModule, modules};
use crate::{Result, SearchPath};

/// What one kernel takes on one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelResources {
    /// `sm_90a`
    pub architecture: String,
    /// `attention_forward (bf16, HEAD_SIZE=64)`
    pub module: String,
    pub kernel: String,
    /// Of a thread.
    pub registers: u32,
    /// Static shared memory of a block; what a launch asks for comes on top.
    pub shared_bytes: u32,
    /// Of a thread, in device memory: arrays that are indexed at run time, and spilled registers.
    pub stack_bytes: u32,
    pub spill_store_bytes: u32,
    pub spill_load_bytes: u32,
    /// Whether the source says that the time of a step depends on it.
    pub hot: bool,
}

impl KernelResources {
    pub fn spills(&self) -> bool {
        self.spill_store_bytes + self.spill_load_bytes > 0
    }
}

/// Compiles every module that operations launch for these architectures, and reports every kernel. `only` keeps the
/// modules whose description contains it.
///
/// # Errors
/// NVRTC is missing, or a kernel does not compile.
pub fn kernel_resources(architectures: &[&str], only: &str) -> Result<Vec<KernelResources>> {
    let nvrtc = Nvrtc::open(NEWEST_MAJOR, SearchPath::current())?;
    let modules = modules();
    let mut work = Vec::new();
    for KernelModule { source, element, constants } in &modules {
        let module = Module { source, element: *element, constants };
        if module.describe().contains(only) {
            work.extend(architectures.iter().map(|architecture| (module, *architecture)));
        }
    }
    let reports: Result<Vec<Vec<KernelResources>>> =
        work.par_iter().map(|(module, architecture)| report(&nvrtc, architecture, *module)).collect();
    Ok(reports?.concat())
}

fn report(nvrtc: &Nvrtc, architecture: &str, module: Module) -> Result<Vec<KernelResources>> {
    let mut options = options(architecture, module);
    options.push("--ptxas-options=-v".into());
    let log = compile(nvrtc, &options, module)?.log;
    let mut kernels = parse(&log);
    for kernel in &mut kernels {
        kernel.architecture = architecture.to_string();
        kernel.module = module.describe();
        kernel.hot = is_hot(sources::kernels(module.source), &kernel.kernel);
    }
    Ok(kernels)
}

/// The assembler's account of each kernel.
fn parse(log: &str) -> Vec<KernelResources> {
    let sections = log.split("Compiling entry function '").skip(1);
    sections
        .filter_map(|section| {
            let (kernel, rest) = section.split_once('\'')?;
            Some(KernelResources {
                architecture: String::new(),
                module: String::new(),
                kernel: kernel.to_string(),
                registers: number_before(rest, " registers"),
                shared_bytes: number_before(rest, " bytes smem"),
                stack_bytes: number_before(rest, " bytes stack frame"),
                spill_store_bytes: number_before(rest, " bytes spill stores"),
                spill_load_bytes: number_before(rest, " bytes spill loads"),
                hot: false,
            })
        })
        .collect()
}

/// The number that stands before a text; 0 without one.
fn number_before(text: &str, what: &str) -> u32 {
    let Some(at) = text.find(what) else { return 0 };
    let digits = text[..at].rsplit(|character: char| !character.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_assemblers_account() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'g' for 'sm_90a'
ptxas info    : Function properties for g
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas         .     256 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 256 bytes cumulative stack size, 1024 bytes smem";
        let kernels = parse(log);
        assert_eq!(kernels.len(), 2);
        assert_eq!((kernels[0].kernel.as_str(), kernels[0].registers, kernels[0].spills()), ("g", 8, false));
        let f = &kernels[1];
        assert_eq!((f.kernel.as_str(), f.registers, f.shared_bytes, f.stack_bytes), ("f", 80, 1024, 256));
        assert_eq!((f.spill_store_bytes, f.spill_load_bytes), (12, 16));
    }
}
