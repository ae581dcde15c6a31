//! `quintet doctor`: what this machine has, and what to do about what is missing.

use std::net::TcpListener;

use serde_json::json;

use crate::args::DoctorArguments;
use crate::commands::print_json;
use crate::error::{Result, exit};

pub(crate) fn run(arguments: DoctorArguments) -> Result<u8> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let loopback = TcpListener::bind("127.0.0.1:0").is_ok();
    let simd = simd();
    if arguments.json {
        print_json(&json!({"cores": cores, "simd": simd, "loopback": loopback, "devices": ["cpu"]}));
        return Ok(exit::DONE);
    }
    println!("cpu: {cores} cores, {simd}");
    println!("gpu: not used; this version computes on the CPU");
    match loopback {
        true => println!("loopback: ports can be opened"),
        false => println!("loopback: no port can be opened on 127.0.0.1; workers need one, allow it in the sandbox"),
    }
    Ok(exit::DONE)
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
