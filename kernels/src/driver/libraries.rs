//! Finding NVIDIA's shared libraries where the driver, the toolkit, pip, conda and the system's packages put them.
//!
//! A library is opened by its full path, and its functions are looked up once, into a table: what is missing is an
//! [`Error`] then, and not a panic at the first call. (cudarc's own loader would know neither `libnccl.so.2` nor a
//! Python environment, so it is left the one library that only ever lies where the system's loader looks: the driver.)

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libloading::Library;

use crate::{Error, Result, SearchPath};

/// The newest version of the toolkit that was tried.
pub(crate) const NEWEST_MAJOR: u32 = 13;

/// A library by the names of the files that hold it, the best first.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) title: &'static str,
    pub(crate) files: Vec<String>,
    /// Whether pip and conda have it, so that Python environments are searched.
    pub(crate) packaged: bool,
    /// How to get it: the end of a sentence.
    pub(crate) remedy: String,
}

/// NVIDIA's libraries, as far as they are used here.
impl Wanted {
    pub(crate) fn driver() -> Self {
        Wanted {
            title: "NVIDIA driver",
            files: vec!["libcuda.so.1".into()],
            packaged: false,
            remedy: "install it (https://www.nvidia.com/drivers), or start the container with GPUs".into(),
        }
    }

    pub(crate) fn nvrtc(driver_major: u32) -> Self {
        Wanted::of_toolkit("NVRTC", "libnvrtc.so", "nvidia-cuda-nvrtc", driver_major)
    }

    pub(crate) fn cublaslt(driver_major: u32) -> Self {
        Wanted::of_toolkit("cuBLASLt", "libcublasLt.so", "nvidia-cublas", driver_major)
    }

    pub(crate) fn nccl(driver_major: u32) -> Self {
        let package = format!("nvidia-nccl-cu{}", driver_major.clamp(12, NEWEST_MAJOR));
        Wanted {
            title: "NCCL",
            files: vec!["libnccl.so.2".into()],
            packaged: true,
            remedy: format!("`pip install {package}`, or install the package libnccl2"),
        }
    }

    /// What tests build in the place of NCCL, for it cannot add up what lies in the host's memory.
    pub(crate) fn emulated_nccl() -> Self {
        Wanted {
            title: "NCCL for emulated GPUs",
            files: vec!["libnccl_emulated.so".into()],
            packaged: false,
            remedy: "only tests have it".into(),
        }
    }

    /// A part of the toolkit, which must not be of a newer major version than what the driver supports.
    fn of_toolkit(title: &'static str, stem: &str, package: &str, driver_major: u32) -> Self {
        let newest = driver_major.clamp(12, NEWEST_MAJOR);
        let package = if newest == 12 { format!("{package}-cu12") } else { package.to_string() };
        Wanted {
            title,
            files: (12..=newest).rev().map(|major| format!("{stem}.{major}")).collect(),
            packaged: true,
            remedy: format!("`pip install {package}`, or install the CUDA {newest} toolkit"),
        }
    }
}

/// A library that was opened; it stays loaded, because NVIDIA's libraries do not like to be unloaded.
#[derive(Debug)]
pub(crate) struct Shared {
    library: Library,
    pub(crate) path: PathBuf,
}

impl Shared {
    /// Opens the first file that can be opened, in the order of [`places`], and within a place of [`Wanted::files`].
    pub(crate) fn open(wanted: &Wanted, search_path: &SearchPath) -> Result<&'static Shared> {
        let mut broken = None;
        for place in places(search_path, wanted.packaged) {
            for file in &wanted.files {
                let path = match &place {
                    Place::Loader => PathBuf::from(file),
                    Place::Folder(folder) => folder.join(file),
                };
                if matches!(place, Place::Folder(_)) && !path.exists() {
                    continue;
                }
                // SAFETY: the initialisers of NVIDIA's libraries have no requirements; whoever can put another file of
                // this name into these folders runs code here already.
                match unsafe { Library::new(&path) } {
                    Ok(library) => {
                        let path = if path.is_absolute() { path } else { loaded_path(file).unwrap_or(path) };
                        return Ok(Box::leak(Box::new(Shared { library, path })));
                    }
                    Err(error) if path.is_absolute() => broken = broken.or(Some(reason(&error))),
                    Err(_) => {}
                }
            }
        }
        let mut problem =
            "is neither in LD_LIBRARY_PATH nor in the system's library folders or a CUDA toolkit".to_string();
        if wanted.packaged {
            problem += " nor in a Python environment";
        }
        if let Some(error) = broken {
            problem = format!("cannot be loaded ({error})");
        }
        Err(Error::MissingLibrary {
            title: wanted.title,
            files: wanted.files.join(" or "),
            problem,
            remedy: wanted.remedy.clone(),
        })
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `F` must be the function's type.
    pub(crate) unsafe fn function<F: Copy>(&self, name: &str) -> Result<F> {
        // SAFETY: the caller's.
        let symbol = unsafe { self.library.get::<F>(name.as_bytes()) };
        symbol.map(|symbol| *symbol).map_err(|_| Error::UnfitLibrary {
            path: self.path.display().to_string(),
            problem: format!("it has no function {name}"),
        })
    }
}

/// What the loader says; libloading itself only says that it failed.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Declares a table of a library's functions, and `load`, which fills it or says what the library lacks.
macro_rules! functions {
    ($name:ident { $(fn $function:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)* }) => {
        #[allow(non_snake_case)]
        pub(crate) struct $name {
            $(pub(crate) $function: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl $name {
            fn load(library: &$crate::driver::libraries::Shared) -> $crate::Result<Self> {
                Ok($name {
                    // SAFETY: the types are those of NVIDIA's header of this library.
                    $($function: unsafe { library.function(stringify!($function)) }?,)*
                })
            }
        }
    };
}
pub(crate) use functions;

enum Place {
    Folder(PathBuf),
    /// Wherever the system's loader looks by itself.
    Loader,
}

/// Where libraries are looked for, in order: what the user set, what the system knows, a toolkit, and Python
/// environments if it is `packaged`. Lazy, because the last of them costs the start of an interpreter.
fn places(path: &SearchPath, packaged: bool) -> impl Iterator<Item = Place> {
    let once = || std::iter::once(());
    let set = path.libraries.iter().cloned();
    let toolkits = once().flat_map(|()| toolkit_folders(path));
    let active = path.python_environments.iter().flat_map(|prefix| environment_folders(prefix));
    let packages = active.chain(once().flat_map(|()| python_folders(path)));
    let packages = packages.take(if packaged { usize::MAX } else { 0 });
    set.map(Place::Folder).chain([Place::Loader]).chain(toolkits.chain(packages).map(Place::Folder))
}

/// The library folders of `CUDA_HOME`, then of /usr/local/cuda, then of its numbered siblings, the newest first.
fn toolkit_folders(path: &SearchPath) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = path.toolkit.iter().cloned().collect();
    roots.push("/usr/local/cuda".into());
    roots.extend(children(Path::new("/usr/local"), "cuda-").into_iter().rev());
    roots.push("/opt/cuda".into());
    // Where containers and Windows' Linux get the driver from; their loader mostly knows.
    roots.extend(["/usr/local/nvidia".into(), "/usr/lib/wsl".into()]);
    roots.iter().flat_map(|root| library_folders(root)).collect()
}

fn library_folders(root: &Path) -> Vec<PathBuf> {
    let target = match std::env::consts::ARCH {
        "aarch64" => "targets/sbsa-linux/lib",
        _ => "targets/x86_64-linux/lib",
    };
    ["lib64", target, "lib"].map(|folder| root.join(folder)).into_iter().filter(|folder| folder.is_dir()).collect()
}

/// Library folders of a virtual or conda environment.
fn environment_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = library_folders(prefix);
    for python in children(&prefix.join("lib"), "python3").into_iter().rev() {
        folders.extend(package_folders(&python.join("site-packages")));
    }
    folders
}

/// Library folders of NVIDIA's packages: `nvidia/cu13/lib` for all of CUDA 13, `nvidia/cublas/lib` and the like for 12.
fn package_folders(site_packages: &Path) -> Vec<PathBuf> {
    let packages = children(&site_packages.join("nvidia"), "");
    packages.into_iter().map(|package| package.join("lib")).filter(|folder| folder.is_dir()).collect()
}

/// As [`package_folders`], of the `python3` that a shell would start.
fn python_folders(path: &SearchPath) -> Vec<PathBuf> {
    let candidates = path.executables.iter().map(|folder| folder.join("python3"));
    let Some(python) = candidates.into_iter().find(|path| path.is_file()) else { return Vec::new() };
    let program = "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";
    // -S and -I would hide the very folders that are asked for.
    let output = Command::new(python).args(["-c", program]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    output.lines().flat_map(|folder| package_folders(Path::new(folder))).collect()
}

/// The entries of a folder whose names begin so, sorted; none where there is no such folder.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The file that the system's loader took for a name, where Linux can tell.
fn loaded_path(file: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let stem = file.split(".so").next()?;
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let mut paths = paths.filter(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy());
        name.is_some_and(|name| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(".so")))
    });
    paths.next().map(Path::to_path_buf)
}

/// `12040` as `12.4`: how CUDA writes its versions as one number.
pub(crate) fn dotted(version: u32) -> String {
    let mut text = String::new();
    let _ = write!(text, "{}.{}", version / 1000, version % 1000 / 10);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search_path(root: &Path) -> SearchPath {
        SearchPath {
            libraries: vec![root.join("set")],
            executables: vec![root.join("bin")],
            toolkit: Some(root.join("toolkit")),
            python_environments: vec![root.join("venv")],
        }
    }

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "no library").unwrap();
    }

    /// Positions of these folders among the places.
    fn order(path: &SearchPath, folders: &[PathBuf]) -> Vec<Option<usize>> {
        let places: Vec<Option<PathBuf>> = places(path, true)
            .map(|place| match place {
                Place::Folder(folder) => Some(folder),
                Place::Loader => None,
            })
            .collect();
        folders.iter().map(|folder| places.iter().position(|place| place.as_ref() == Some(folder))).collect()
    }

    #[test]
    fn looks_where_toolkit_conda_and_pip_put_libraries() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let packages = root.join("venv/lib/python3.12/site-packages/nvidia");
        let expected = [
            root.join("set"),
            root.join("toolkit/lib64"),
            root.join("venv/lib"),
            packages.join("cu13/lib"),
            packages.join("cublas/lib"),
        ];
        for folder in &expected {
            fs::create_dir_all(folder).unwrap();
        }
        fs::create_dir_all(packages.join("headers/include")).unwrap();
        let found = order(&search_path(root), &expected);
        assert!(found.iter().all(Option::is_some) && found.is_sorted(), "{found:?}");
        assert_eq!(order(&search_path(root), &[packages.join("headers/lib")]), [None]);
    }

    #[cfg(unix)]
    #[test]
    fn asks_the_python_of_the_path() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let site = root.join("site");
        fs::create_dir_all(site.join("nvidia/nccl/lib")).unwrap();
        let python = root.join("bin/python3");
        touch(&python);
        fs::write(&python, format!("#!/bin/sh\necho {}\n", site.display())).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(order(&search_path(root), &[site.join("nvidia/nccl/lib")])[0].is_some());
    }

    #[test]
    fn a_missing_library_is_one_line_with_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let wanted = Wanted { files: vec!["libabsent.so.7".into()], ..Wanted::nvrtc(13) };
        let error = Shared::open(&wanted, &search_path(directory.path())).unwrap_err().to_string();
        assert!(
            error.starts_with("NVRTC is missing: libabsent.so.7 is") && error.contains("pip install nvidia-cuda-nvrtc"),
            "{error}"
        );
        assert!(!error.contains('\n') && !error.contains("cannot be loaded"), "{error}");

        // One that is there but no library: said too, because that is what has to be mended.
        touch(&directory.path().join("set/libabsent.so.7"));
        let error = Shared::open(&wanted, &search_path(directory.path())).unwrap_err().to_string();
        assert!(error.contains("cannot be loaded") && error.contains("set/libabsent.so.7"), "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn opens_what_the_loader_finds_and_knows_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let files = vec!["libm.so.6".into()];
        let wanted = Wanted { title: "libm", files, packaged: false, remedy: String::new() };
        let library = Shared::open(&wanted, &search_path(directory.path())).unwrap();
        assert!(library.path.is_absolute() && library.path.is_file(), "{}", library.path.display());
        // SAFETY: the type of C's cos.
        let cos: unsafe extern "C" fn(f64) -> f64 = unsafe { library.function("cos") }.unwrap();
        // SAFETY: cos has no requirements.
        assert_eq!(unsafe { cos(0.0) }, 1.0);
        // SAFETY: it is never called.
        let absent = unsafe { library.function::<unsafe extern "C" fn()>("no_such_function") };
        assert!(absent.unwrap_err().to_string().contains("no_such_function"));
    }

    #[test]
    fn a_driver_is_not_given_libraries_of_a_newer_toolkit() {
        assert_eq!(Wanted::nvrtc(12).files, ["libnvrtc.so.12"]);
        assert_eq!(Wanted::cublaslt(13).files, ["libcublasLt.so.13", "libcublasLt.so.12"]);
        assert_eq!(Wanted::nvrtc(14).files, Wanted::nvrtc(13).files);
        assert!(Wanted::cublaslt(12).remedy.contains("nvidia-cublas-cu12"));
        assert_eq!(dotted(12040), "12.4");
    }
}
