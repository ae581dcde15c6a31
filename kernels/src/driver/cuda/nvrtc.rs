//! NVRTC: CUDA C++ in, a cubin for one architecture out. Needs no GPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

use crate::driver::libraries::{Shared, Wanted, functions};
use crate::{Error, Result, SearchPath};

type Program = *mut c_void;

functions!(Functions {
    fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int;
    fn nvrtcGetErrorString(status: c_int) -> *const c_char;
    fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> c_int;
    fn nvrtcGetSupportedArchs(architectures: *mut c_int) -> c_int;
    fn nvrtcCreateProgram(
        program: *mut Program, source: *const c_char, name: *const c_char,
        headers: c_int, texts: *const *const c_char, names: *const *const c_char,
    ) -> c_int;
    fn nvrtcDestroyProgram(program: *mut Program) -> c_int;
    fn nvrtcCompileProgram(program: Program, options: c_int, texts: *const *const c_char) -> c_int;
    fn nvrtcGetCUBINSize(program: Program, bytes: *mut usize) -> c_int;
    fn nvrtcGetCUBIN(program: Program, cubin: *mut c_char) -> c_int;
    fn nvrtcGetProgramLogSize(program: Program, bytes: *mut usize) -> c_int;
    fn nvrtcGetProgramLog(program: Program, log: *mut c_char) -> c_int;
});

const SUCCESS: c_int = 0;
/// The source is wrong; the log says where.
const COMPILATION: c_int = 6;

/// The compiler, found and ready. Its functions may be called from any thread.
pub(crate) struct Nvrtc {
    functions: Functions,
    pub(crate) library: &'static Shared,
    pub(crate) version: (u32, u32),
    /// Compute capabilities as `major * 10 + minor`, rising.
    pub(crate) architectures: Vec<u32>,
}

/// A text under the name by which it is included or reported.
pub(crate) type Named<'a> = (&'a str, &'a str);

pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// Warnings, and whatever the options ask the assembler to say.
    pub(crate) log: String,
}

impl Nvrtc {
    /// The newest that a driver of this major version can use.
    pub(crate) fn open(driver_major: u32, search_path: &SearchPath) -> Result<Self> {
        let library = Shared::open(&Wanted::nvrtc(driver_major), search_path)?;
        let functions = Functions::load(library)?;
        let mut nvrtc = Nvrtc { functions, library, version: (0, 0), architectures: Vec::new() };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the pointers are to integers that live through the calls.
        unsafe {
            nvrtc.check("nvrtcVersion", (nvrtc.functions.nvrtcVersion)(&mut major, &mut minor))?;
            nvrtc.check("nvrtcGetNumSupportedArchs", (nvrtc.functions.nvrtcGetNumSupportedArchs)(&mut count))?;
        }
        let mut architectures = vec![0; count.max(0) as usize];
        // SAFETY: the array has as many elements as the library says that it writes.
        let status = unsafe { (nvrtc.functions.nvrtcGetSupportedArchs)(architectures.as_mut_ptr()) };
        nvrtc.check("nvrtcGetSupportedArchs", status)?;
        nvrtc.version = (major.max(0) as u32, minor.max(0) as u32);
        nvrtc.architectures = architectures.into_iter().map(|architecture| architecture.max(0) as u32).collect();
        nvrtc.architectures.sort_unstable();
        Ok(nvrtc)
    }

    /// The version of the library, with all its digits where its file name has them.
    pub(crate) fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// What to compile for on a device of this compute capability.
    ///
    /// Machine code runs on later devices of the same major version, so an NVRTC older than the device may still serve.
    pub(crate) fn architecture(&self, capability: (u32, u32)) -> Result<String> {
        let device = capability.0 * 10 + capability.1;
        let fits = |&&architecture: &&u32| architecture / 10 == capability.0 && architecture <= device;
        match self.architectures.iter().rev().find(fits) {
            // The `a` is for what Hopper has beyond the portable instructions, wgmma above all.
            Some(90) => Ok("sm_90a".to_string()),
            Some(architecture) => Ok(format!("sm_{architecture}")),
            None => Err(Error::UnfitLibrary {
                path: self.library.path.display().to_string(),
                problem: format!(
                    "NVRTC {} cannot compile for this GPU (compute capability {}.{}); install a newer one",
                    self.version(),
                    capability.0,
                    capability.1
                ),
            }),
        }
    }

    /// Compiles `source`, which may include `headers`.
    pub(crate) fn compile(&self, source: Named, headers: &[Named], options: &[String]) -> Result<Compiled> {
        let texts = Texts::new(headers.iter().map(|(_, text)| *text));
        let names = Texts::new(headers.iter().map(|(name, _)| *name));
        let options = Texts::new(options.iter().map(String::as_str));
        let (name, text) = (c_string(source.0), c_string(source.1));
        let mut program = ProgramGuard { functions: &self.functions, program: ptr::null_mut() };
        // SAFETY: all strings end with a zero byte and outlive the program, as do the arrays of `names` and `texts`.
        let status = unsafe {
            (self.functions.nvrtcCreateProgram)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.pointers.as_ptr(),
                names.pointers.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let count = options.pointers.len() as c_int;
        // SAFETY: the program was created above; the options are `count` strings.
        let status = unsafe { (self.functions.nvrtcCompileProgram)(program.program, count, options.pointers.as_ptr()) };
        let log = self.log(&program)?;
        if status == COMPILATION {
            return Err(Error::Compile { module: source.0.to_string(), log });
        }
        self.check("nvrtcCompileProgram", status)?;
        Ok(Compiled { cubin: self.cubin(&program)?, log })
    }

    fn log(&self, program: &ProgramGuard) -> Result<String> {
        let mut bytes = 0;
        // SAFETY: the program is alive, and `bytes` outlives the call.
        let status = unsafe { (self.functions.nvrtcGetProgramLogSize)(program.program, &mut bytes) };
        self.check("nvrtcGetProgramLogSize", status)?;
        let mut log = vec![0_u8; bytes];
        // SAFETY: the library writes as many bytes as it said.
        let status = unsafe { (self.functions.nvrtcGetProgramLog)(program.program, log.as_mut_ptr().cast()) };
        self.check("nvrtcGetProgramLog", status)?;
        Ok(String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_string())
    }

    fn cubin(&self, program: &ProgramGuard) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: as in `log`.
        let status = unsafe { (self.functions.nvrtcGetCUBINSize)(program.program, &mut bytes) };
        self.check("nvrtcGetCUBINSize", status)?;
        let mut cubin = vec![0_u8; bytes];
        // SAFETY: as in `log`.
        let status = unsafe { (self.functions.nvrtcGetCUBIN)(program.program, cubin.as_mut_ptr().cast()) };
        self.check("nvrtcGetCUBIN", status)?;
        Ok(cubin)
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: the library answers every number with a string of its own that is never freed.
        let text = unsafe { CStr::from_ptr((self.functions.nvrtcGetErrorString)(status)) };
        Err(Error::Cuda { action: call.to_string(), reason: text.to_string_lossy().into_owned() })
    }
}

/// Destroys the program in the end.
struct ProgramGuard<'a> {
    functions: &'a Functions,
    program: Program,
}

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created by `nvrtcCreateProgram`, and destroyed only here.
            unsafe { (self.functions.nvrtcDestroyProgram)(&mut self.program) };
        }
    }
}

/// Strings as C wants them.
struct Texts {
    _owned: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl Texts {
    fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let owned: Vec<CString> = texts.map(c_string).collect();
        Texts { pointers: owned.iter().map(|text| text.as_ptr()).collect(), _owned: owned }
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("a source has no zero byte")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::libraries::NEWEST_MAJOR;

    /// The compiler, where this machine has one: tests/cuda/compile.sh sees to it.
    fn nvrtc() -> Option<Nvrtc> {
        match Nvrtc::open(NEWEST_MAJOR, &SearchPath::default()) {
            Ok(nvrtc) => Some(nvrtc),
            Err(error) => {
                eprintln!("SKIPPED: nothing is compiled by NVRTC, because {error}");
                None
            }
        }
    }

    const OPTIONS: [&str; 2] = ["--gpu-architecture=sm_80", "-DVALUE=7"];

    fn compile(nvrtc: &Nvrtc, text: &str) -> Result<Compiled> {
        let header = ("value.cuh", "inline __device__ int value() { return VALUE; }\n");
        nvrtc.compile(("kernel.cu", text), &[header], &OPTIONS.map(String::from))
    }

    #[test]
    fn compiles_with_headers_and_constants() {
        let Some(nvrtc) = nvrtc() else { return };
        let text = "#include \"value.cuh\"\nextern \"C\" __global__ void kernel(int* x) { *x = value(); }";
        let compiled = compile(&nvrtc, text).unwrap();
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{}", compiled.log);
    }

    #[test]
    fn an_error_of_the_compiler_is_shown() {
        let Some(nvrtc) = nvrtc() else { return };
        let error = compile(&nvrtc, "extern \"C\" __global__ void kernel() {\n  unknown();\n}").err().unwrap();
        let message = error.to_string();
        assert!(matches!(error, Error::Compile { .. }) && message.contains("kernel.cu(2)"), "{message}");
        assert!(message.contains("unknown"), "{message}");
    }

    #[test]
    fn an_architecture_is_the_newest_of_the_devices_generation() {
        let Some(mut nvrtc) = nvrtc() else { return };
        nvrtc.architectures = vec![75, 80, 86, 90, 100];
        assert_eq!(nvrtc.architecture((9, 0)).unwrap(), "sm_90a");
        assert_eq!(nvrtc.architecture((8, 0)).unwrap(), "sm_80");
        assert_eq!(nvrtc.architecture((8, 9)).unwrap(), "sm_86");
        assert_eq!(nvrtc.architecture((10, 3)).unwrap(), "sm_100");
        let error = nvrtc.architecture((12, 0)).unwrap_err().to_string();
        assert!(error.contains("compute capability 12.0") && error.contains("install a newer"), "{error}");
    }
}
