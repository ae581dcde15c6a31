//! Where the program says that libraries may lie; the crate reads no environment variable itself.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Folders in which NVIDIA's libraries are looked for, beside the system's own and the toolkit's usual ones.
#[derive(Clone, Debug, Default)]
pub struct SearchPath {
    /// `LD_LIBRARY_PATH`, folder by folder.
    pub(crate) libraries: Vec<PathBuf>,
    /// `PATH`, folder by folder: where `python3` is.
    pub(crate) executables: Vec<PathBuf>,
    /// `CUDA_HOME` or `CUDA_PATH`: a toolkit outside /usr/local.
    pub(crate) toolkit: Option<PathBuf>,
    /// `VIRTUAL_ENV` and `CONDA_PREFIX`: Python environments that may hold NVIDIA's packages.
    pub(crate) python_environments: Vec<PathBuf>,
}

static INSTALLED: OnceLock<SearchPath> = OnceLock::new();

impl SearchPath {
    /// From a process's environment variables, which `variable` looks up.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| variable(name).map(PathBuf::from);
        let list = |name: &str| -> Vec<PathBuf> {
            let Some(value) = variable(name) else { return Vec::new() };
            std::env::split_paths(&value).filter(|folder| folder.is_absolute()).collect()
        };
        SearchPath {
            libraries: list("LD_LIBRARY_PATH"),
            executables: list("PATH"),
            toolkit: path("CUDA_HOME").or_else(|| path("CUDA_PATH")),
            python_environments: ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path).collect(),
        }
    }

    /// Makes this the search path of every device that is opened from now on: to be called by the program at its start;
    /// only the first call counts.
    pub fn install(self) {
        let _ = INSTALLED.set(self);
    }

    /// The installed one, else one that knows no more than the usual places.
    pub(crate) fn current() -> &'static SearchPath {
        static EMPTY: OnceLock<SearchPath> = OnceLock::new();
        INSTALLED.get().unwrap_or_else(|| EMPTY.get_or_init(SearchPath::default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_variables_that_matter() {
        let variables = [
            ("LD_LIBRARY_PATH", "/a/lib::relative:/b"),
            ("CUDA_PATH", "/opt/cuda"),
            ("VIRTUAL_ENV", "/venv"),
            ("CONDA_PREFIX", ""),
        ];
        let path = SearchPath::from_variables(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        });
        assert_eq!(path.libraries, [PathBuf::from("/a/lib"), PathBuf::from("/b")]);
        assert_eq!(path.toolkit, Some(PathBuf::from("/opt/cuda")));
        assert_eq!(path.python_environments, [PathBuf::from("/venv")]);
        assert!(path.executables.is_empty());
    }
}
