//! Machines with GPUs, with drivers that are too old, and with none: what is said, with which exit code. The driver is made
//! up (kernels/tests/fake_cuda), so nothing is computed here.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::harness::{Ended, Process, quintet};
use crate::structure::root;

/// A folder with the driver alone, or with the libraries that a GPU needs beside it.
struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    fn new(sources: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("lib")).unwrap();
        for (name, source) in sources {
            let mut command = Command::new("cc");
            command.args(["-shared", "-fPIC", "-pthread", &format!("-Wl,-soname,{name}"), "-o"]);
            command.arg(directory.path().join("lib").join(name));
            assert!(command.arg(root().join("kernels/tests/fake_cuda").join(source)).status().unwrap().success());
        }
        Machine { directory }
    }

    fn with_driver() -> Self {
        Machine::new(&[("libcuda.so.1", "driver.c")])
    }

    fn with_gpu() -> Self {
        let libraries = [("libnvrtc.so.13", "nvrtc.c"), ("libcublasLt.so.13", "cublaslt.c")];
        Machine::new(&[[("libcuda.so.1", "driver.c")].as_slice(), &libraries].concat())
    }

    /// Runs the program where nothing but these libraries can be found.
    fn run(&self, line: &str, variables: &[(&str, &str)]) -> Ended {
        let path = self.path();
        let mut command = quintet(path);
        command.args(line.split(' ')).env("LD_LIBRARY_PATH", path.join("lib")).env("HOME", path).env("PATH", path);
        for name in ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        Process::start(command.envs(variables.iter().copied())).wait()
    }

    fn doctor(&self, variables: &[(&str, &str)]) -> Value {
        serde_json::from_str(&self.run("doctor --json", variables).expect(0).stdout).unwrap()
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// A machine with the toolkit's libraries or a driver of its own would answer for itself.
fn has_cuda() -> bool {
    let machine = Machine::new(&[]);
    let doctor = machine.doctor(&[]);
    let found = |library: &Value| library["path"].is_string();
    let any = found(&doctor["driver"]) || ["nvrtc", "cublaslt"].iter().any(|name| found(&doctor["libraries"][name]));
    if any {
        eprintln!("SKIPPED: this machine has CUDA, so a made-up one would not be found alone");
    }
    any
}

#[test]
fn a_gpu_that_was_asked_for_and_is_not_there_is_bad_input() {
    if has_cuda() {
        return;
    }
    let selftest = "selftest --device cuda";
    let error =
        |machine: &Machine, variables: &[(&str, &str)]| machine.run(selftest, variables).expect(2).error().to_string();
    let nothing = Machine::new(&[]);
    let said = error(&nothing, &[]);
    assert!(said.contains("NVIDIA driver is missing: libcuda.so.1") && said.contains("install it"), "{said}");

    let driver = Machine::with_driver();
    let said = error(&driver, &[("FAKE_CUDA_VERSION", "11040")]);
    assert!(said.contains("too old: it runs CUDA 11.4, and at least 12.0"), "{said}");
    let said = error(&driver, &[("FAKE_CUDA_DEVICES", "0")]);
    assert!(said.contains("no GPU that can be used: the driver sees none"), "{said}");
    let said = error(&driver, &[("FAKE_CUDA_CAPABILITY", "75")]);
    assert!(said.contains("Made Up 0 has compute capability 7.5, and the kernels need 8.0"), "{said}");
    let said = error(&driver, &[]);
    assert!(said.contains("NVRTC is missing: libnvrtc.so.13 or libnvrtc.so.12"), "{said}");
    // A driver for CUDA 12 is not offered a library for 13.
    let said = error(&Machine::with_gpu(), &[("FAKE_CUDA_VERSION", "12040")]);
    assert!(said.contains("NVRTC is missing: libnvrtc.so.12 is") && said.contains("nvidia-cuda-nvrtc-cu12"), "{said}");
}

#[test]
fn the_doctor_sees_gpus_and_libraries() {
    if has_cuda() {
        return;
    }
    let machine = Machine::with_gpu();
    let doctor = machine.doctor(&[("FAKE_CUDA_DEVICES", "2")]);
    assert_eq!(doctor["devices"], serde_json::json!(["cpu", "cuda"]));
    assert_eq!(
        (&doctor["gpus"][1]["name"], &doctor["gpus"][1]["compute_capability"]),
        (&"Made Up 1".into(), &"9.0".into())
    );
    assert_eq!(doctor["driver"]["version"], "13.0");
    assert_eq!(doctor["libraries"]["nvrtc"]["path"], machine.path().join("lib/libnvrtc.so.13").display().to_string());
    assert_eq!(doctor["libraries"]["cublaslt"]["version"], "13.0.0");
    assert!(doctor["libraries"]["nccl"]["problem"].as_str().unwrap().contains("pip install nvidia-nccl-cu13"));

    // One that the kernels cannot use is shown, with the reason.
    let doctor = machine.doctor(&[("FAKE_CUDA_CAPABILITY", "75")]);
    assert!(doctor["gpus"][0]["problem"].as_str().unwrap().contains("compute capability 7.5"));
    assert_eq!(doctor["devices"], serde_json::json!(["cpu"]));
}
