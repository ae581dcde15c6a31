//! `quintet doctor`: what this machine, or each link of a cluster, has, and what to do about what is missing.

mod cluster;
mod link;
mod probe;

use std::net::TcpListener;

use quintet_kernels::{Found, Inventory, Library};
use serde_json::{Value, json};

use crate::args::DoctorArguments;
use crate::commands::print_json;
use crate::error::{Result, exit};

/// What was found.
struct Findings {
    cores: usize,
    simd: &'static str,
    gpu: Inventory,
    /// The emulated device's.
    compiler: Found<String>,
    loopback: bool,
}

pub(crate) fn run(arguments: DoctorArguments) -> Result<u8> {
    match &arguments.cluster {
        Some(job) if arguments.probe => return probe::run(job),
        Some(job) => return cluster::run(&arguments, job),
        None => {}
    }
    let findings = Findings {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        simd: simd(),
        gpu: quintet_kernels::inventory(),
        compiler: quintet_kernels::emulator_compiler().map_err(|error| error.to_string()),
        loopback: TcpListener::bind("127.0.0.1:0").is_ok(),
    };
    match arguments.json {
        true => print_json(&findings.to_json()),
        false => findings.print(),
    }
    Ok(exit::DONE)
}

impl Findings {
    /// What `--device` takes here.
    fn devices(&self) -> Vec<&'static str> {
        let candidates = [("cpu", true), ("cuda", self.gpu.has_usable_gpu()), ("emulated", self.compiler.is_ok())];
        candidates.into_iter().filter(|(_, usable)| *usable).map(|(name, _)| name).collect()
    }

    fn print(&self) {
        println!("cpu: {} cores, {}", self.cores, self.simd);
        for (ordinal, gpu) in self.gpu.gpus.iter().enumerate() {
            let (major, minor) = gpu.compute_capability;
            let gibibytes = gpu.memory_bytes as f64 / (1_u64 << 30) as f64;
            println!(
                "gpu {ordinal}: {}, {gibibytes:.1} GiB, compute capability {major}.{minor}, {} multiprocessors",
                gpu.name, gpu.multiprocessors
            );
            if let Some(unfit) = &gpu.unfit {
                println!("  {unfit}");
            }
        }
        match &self.gpu.driver {
            Ok(driver) => println!("NVIDIA driver: runs CUDA up to {}, {}", driver.version, driver.path.display()),
            Err(missing) => println!("{missing}"),
        }
        for (title, found) in &self.gpu.libraries {
            match found {
                Ok(library) => println!("{title}: {}, {}", library.version, library.path.display()),
                Err(missing) => println!("{missing}"),
            }
        }
        match &self.compiler {
            Ok(version) => println!("C++ compiler, for the emulated device: {version}"),
            Err(missing) => println!("{missing}"),
        }
        match self.loopback {
            true => println!("loopback: ports can be opened"),
            false => {
                println!("loopback: no port can be opened on 127.0.0.1; workers need one, allow it in the sandbox")
            }
        }
        println!("devices: {}", self.devices().join(", "));
    }

    fn to_json(&self) -> Value {
        let gpus = self.gpu.gpus.iter().map(|gpu| {
            json!({
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "compute_capability": format!("{}.{}", gpu.compute_capability.0, gpu.compute_capability.1),
                "multiprocessors": gpu.multiprocessors,
                "problem": gpu.unfit,
            })
        });
        let libraries = self.gpu.libraries.iter();
        let libraries = libraries.map(|(title, found)| (title.to_lowercase(), library_json(found)));
        json!({
            "cores": self.cores,
            "simd": self.simd,
            "loopback": self.loopback,
            "devices": self.devices(),
            "gpus": gpus.collect::<Vec<_>>(),
            "driver": library_json(&self.gpu.driver),
            "libraries": libraries.collect::<serde_json::Map<_, _>>(),
            "compiler": match &self.compiler {
                Ok(version) => json!({"version": version}),
                Err(missing) => json!({"problem": missing}),
            },
        })
    }
}

fn library_json(found: &Found<Library>) -> Value {
    match found {
        Ok(library) => json!({"version": library.version, "path": library.path.display().to_string()}),
        Err(missing) => json!({"problem": missing}),
    }
}

/// The widest vector instructions that the kernels will use.
fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            return "AVX2";
        }
    }
    "baseline vector instructions"
}
