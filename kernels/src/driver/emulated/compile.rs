//! Modules as shared objects: compiled once, kept on disk, loaded into the process.

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::driver::{Module, cache, sources};
use crate::{Error, Result};

/// The language of CUDA for a host's compiler, and what runs it.
const EMULATOR: &[sources::Source] = &[
    ("block.h", include_str!("../../../emulator/block.h")),
    ("cuda.h", include_str!("../../../emulator/cuda.h")),
    ("fiber.h", include_str!("../../../emulator/fiber.h")),
    ("tensor_cores.h", include_str!("../../../emulator/tensor_cores.h")),
];

/// Neither contraction nor reassociation: the same bits on every machine.
const OPTIONS: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-ffp-contract=off",
    "-w",
    "-DEMULATED",
];
const SANITIZER_OPTIONS: &[&str] = &[
    "-ftrivial-auto-var-init=pattern", // what a kernel forgets to initialise is a large number
    "-g1",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-sanitize=vptr",
];

static COMPILER: OnceLock<OsString> = OnceLock::new();

/// The C++ compiler of the emulator, to be told before its first device is made; otherwise `g++` on the path.
pub fn set_compiler(compiler: OsString) {
    let _ = COMPILER.set(compiler);
}

/// The compiler of the emulated device: the first line of what it says it is.
///
/// # Errors
/// There is none; the message says how to get one.
pub fn emulator_compiler() -> Result<String> {
    let compiler = COMPILER.get().cloned().unwrap_or_else(|| "g++".into());
    Ok(compiler_version(&compiler)?.lines().next().unwrap_or_default().to_string())
}

/// Whether AddressSanitizer's runtime is in the process, so that what it has instrumented can be loaded.
pub(super) fn is_sanitized() -> bool {
    static SANITIZED: OnceLock<bool> = OnceLock::new();
    *SANITIZED.get_or_init(|| {
        #[cfg(unix)]
        let symbol = {
            let process = libloading::os::unix::Library::this();
            // SAFETY: the symbol is looked up, not used.
            unsafe { process.get::<*const c_void>(b"__asan_init\0") }.is_ok()
        };
        #[cfg(not(unix))]
        let symbol = false;
        symbol
    })
}

/// Bytes of a thread's stack, and their alignment. A power of two.
pub(super) fn stack_bytes() -> usize {
    if is_sanitized() { 256 << 10 } else { 64 << 10 }
}

/// What block.h calls Kernel.
#[repr(C)]
struct RawKernel {
    name: *const c_char,
    signature: *const c_char,
    call: *const c_void,
    threads_max: u32,
}

/// What block.h calls Launch.
#[repr(C)]
pub(super) struct RawLaunch {
    pub(super) grid: [u32; 3],
    pub(super) block: u32,
    pub(super) shared_bytes: u64,
    pub(super) arguments: *const *const c_void,
    pub(super) seed: u64,
}

// SAFETY: read only; the arguments outlive the launch.
unsafe impl Sync for RawLaunch {}

type Run = unsafe extern "C" fn(*const c_void, *const RawLaunch, *const u64, u64, *mut u8, *mut c_char, u64) -> c_int;

/// A module in the process, for as long as that lasts.
pub(super) struct Library {
    kernels: HashMap<String, Kernel>,
    run: Run,
}

/// A kernel of a library.
pub(super) struct Kernel {
    address: *const c_void,
    /// A letter for each parameter; see block.h.
    pub(super) signature: String,
    /// Its launch bounds.
    pub(super) threads_max: u32,
}

// SAFETY: the address is of constant data of a library that is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: likewise.
unsafe impl Sync for Kernel {}

type Libraries = Mutex<HashMap<String, &'static OnceLock<Library>>>;

impl Library {
    /// The module's library: from the process, from disk, or compiled now.
    pub(super) fn get(module: &Module) -> Result<&'static Library> {
        static LIBRARIES: OnceLock<Libraries> = OnceLock::new();
        static LOADING: Mutex<()> = Mutex::new(());
        let libraries = LIBRARIES.get_or_init(Mutex::default);
        let cell: &'static OnceLock<Library> = libraries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(module.describe())
            .or_insert_with(|| Box::leak(Box::default()));
        if let Some(library) = cell.get() {
            return Ok(library);
        }
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = cell.get() {
            return Ok(library);
        }
        let library = Library::load(module)?;
        Ok(cell.get_or_init(|| library))
    }

    fn load(module: &Module) -> Result<Library> {
        let path = compile(module)?;
        let failed = |error: libloading::Error| Error::Load { module: module.describe(), reason: error.to_string() };
        // SAFETY: the library is what `compile` made of our sources, in a directory of this user's; it has no code that
        // runs on loading. It is never unloaded, so that what is taken from it stays.
        unsafe {
            let library = Box::leak(Box::new(libloading::Library::new(&path).map_err(failed)?));
            let run = *library.get::<Run>(b"emulator_run\0").map_err(failed)?;
            let table = *library.get::<*const RawKernel>(b"emulator_kernels\0").map_err(failed)?;
            let mut kernels = HashMap::new();
            for index in 0.. {
                let address = table.add(index);
                let RawKernel { name, signature, threads_max, .. } = &*address;
                if name.is_null() {
                    break;
                }
                let text = |text: *const c_char| CStr::from_ptr(text).to_string_lossy().into_owned();
                let kernel = Kernel { address: address.cast(), signature: text(*signature), threads_max: *threads_max };
                kernels.insert(text(*name), kernel);
            }
            Ok(Library { kernels, run })
        }
    }

    pub(super) fn kernel(&self, name: &str) -> &Kernel {
        self.kernels.get(name).unwrap_or_else(|| panic!("no kernel {name} in its module"))
    }

    /// Runs some blocks; the error is the message.
    ///
    /// # Safety
    /// `stacks` has room for `launch.block` stacks of [`stack_bytes`], aligned to that, and is nobody else's; the
    /// arguments are of the kernel's types, and its pointers to memory that it may use.
    pub(super) unsafe fn run(
        &self,
        kernel: &Kernel,
        launch: &RawLaunch,
        blocks: &[u64],
        stacks: *mut u8,
    ) -> std::result::Result<(), String> {
        let mut message: [c_char; 1024] = [0; 1024];
        let (count, bytes) = (blocks.len() as u64, message.len() as u64);
        // SAFETY: the caller's promise; the message has its length.
        let failed =
            unsafe { (self.run)(kernel.address, launch, blocks.as_ptr(), count, stacks, message.as_mut_ptr(), bytes) };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: the buffer began as zeros and is never filled to its end.
        Err(unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned())
    }
}

/// The path of the module's shared object.
fn compile(module: &Module) -> Result<std::path::PathBuf> {
    let compiler = COMPILER.get().cloned().unwrap_or_else(|| "g++".into());
    let text = sources::kernels(module.source);
    let mut options: Vec<String> = OPTIONS.iter().map(|&option| option.to_owned()).collect();
    if is_sanitized() {
        options.extend(SANITIZER_OPTIONS.iter().map(|&option| option.to_owned()));
    }
    options.push(format!("-DSTACK_BYTES={}ul", stack_bytes()));
    options.extend(module.defines());
    let unit = translation_unit(module.source, text);
    let version = compiler_version(&compiler)?;
    let files: Vec<(&str, &str)> = sources::HEADERS.iter().chain(EMULATOR).copied().collect();
    let mut inputs: Vec<&[u8]> = vec![version.as_bytes(), text.as_bytes(), unit.as_bytes()];
    inputs.extend(options.iter().map(|option| option.as_bytes()));
    inputs.extend(files.iter().flat_map(|(name, text)| [name.as_bytes(), text.as_bytes()]));
    cache::artifact(&inputs, "so", |output| {
        let directory = output.with_extension("sources");
        let written = write_sources(&directory, &files, (&format!("{}.cu", module.source), text), &unit);
        written.map_err(|source| Error::Cache { path: directory.clone(), source })?;
        let result = run_compiler(&compiler, &options, &directory, output, module);
        let _ = fs::remove_dir_all(&directory);
        result
    })
}

/// What is compiled: the emulator, the kernels, and a table of them.
fn translation_unit(stem: &str, text: &str) -> String {
    let row = |name: &str| {
        let threads_max = launch_bounds(text, name).unwrap_or("emulator::THREADS_MAX");
        format!("    EMULATOR_KERNEL({name}, {threads_max}),\n")
    };
    let rows: String = sources::kernel_names(text).into_iter().map(row).collect();
    format!(
        "#include \"cuda.h\"\n#include \"tensor_cores.h\"\n#include \"{stem}.cu\"\n\
         extern \"C\" __attribute__((visibility(\"default\"))) const emulator::Kernel emulator_kernels[] = {{\n\
         {rows}    {{nullptr, nullptr, nullptr, 0}},\n}};\n"
    )
}

/// The most threads of a block that a kernel is declared for, an expression.
fn launch_bounds<'a>(text: &'a str, kernel: &str) -> Option<&'a str> {
    let bounded = text.lines().filter_map(|line| line.strip_prefix("KERNEL LAUNCH_BOUNDS(")?.split_once(") "));
    bounded
        .filter(|(_, rest)| rest.strip_prefix(kernel).is_some_and(|rest| rest.starts_with('(')))
        .map(|(n, _)| n)
        .next()
}

fn write_sources(directory: &Path, files: &[(&str, &str)], kernels: (&str, &str), unit: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let all = files.iter().copied().chain([kernels, ("unit.cpp", unit)]);
    all.into_iter().try_for_each(|(name, text)| fs::write(directory.join(name), text))
}

fn run_compiler(
    compiler: &OsString,
    options: &[String],
    directory: &Path,
    output: &Path,
    module: &Module,
) -> Result<()> {
    let mut command = Command::new(compiler);
    command.args(options).arg("unit.cpp").arg("-o").arg(output).current_dir(directory);
    let Output { status, stderr, .. } = run(command, compiler)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Compile { module: module.describe(), log: String::from_utf8_lossy(&stderr).into_owned() })
}

/// What the compiler says it is; part of what an artifact depends on.
fn compiler_version(compiler: &OsString) -> Result<&'static str> {
    static VERSION: OnceLock<String> = OnceLock::new();
    if let Some(version) = VERSION.get() {
        return Ok(version);
    }
    let mut command = Command::new(compiler);
    command.arg("--version");
    let Output { stdout, .. } = run(command, compiler)?;
    Ok(VERSION.get_or_init(|| String::from_utf8_lossy(&stdout).into_owned()))
}

fn run(mut command: Command, compiler: &OsString) -> Result<Output> {
    // A sanitizer's runtime, if it was preloaded, is for us and not for the compiler.
    command.env_remove("LD_PRELOAD").stdin(Stdio::null());
    command.output().map_err(|error| Error::NoCompiler {
        compiler: compiler.to_string_lossy().into_owned(),
        reason: error.to_string(),
    })
}
