//! Compiles the kernels for GPUs, needs none, and prints what each of them takes:
//!
//!     cargo run --release -p quintet-kernels --example compile [-- [--arch sm_90a]… [TEXT]]
//!
//! TEXT keeps the modules whose name contains it. Fails if a kernel that its source calls hot spills registers.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a program")]

use std::process::ExitCode;

use quintet_kernels::{KernelResources, SearchPath, kernel_resources};

/// Ampere, Hopper, Blackwell.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

fn main() -> ExitCode {
    SearchPath::from_variables(|name| std::env::var_os(name)).install();
    let (mut architectures, mut only) = (Vec::new(), String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--arch" => architectures.extend(arguments.next()),
            _ => only = argument,
        }
    }
    let mut architectures: Vec<&str> = architectures.iter().map(String::as_str).collect();
    if architectures.is_empty() {
        architectures.extend(ARCHITECTURES);
    }
    match kernel_resources(&architectures, &only) {
        Ok(kernels) => report(&kernels),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(kernels: &[KernelResources]) -> ExitCode {
    println!(
        "{:<34} {:<44} {:<7} {:>9} {:>6} {:>5} {:>7}",
        "kernel", "module", "arch", "registers", "shared", "stack", "spilled"
    );
    for kernel in kernels {
        let note = match (kernel.spills(), kernel.hot) {
            (true, true) => "  SPILLS, AND IS HOT",
            (true, false) => "  spills",
            (false, true) => "  hot",
            (false, false) => "",
        };
        println!(
            "{:<34} {:<44} {:<7} {:>9} {:>6} {:>5} {:>7}{note}",
            kernel.kernel,
            kernel.module,
            kernel.architecture,
            kernel.registers,
            kernel.shared_bytes,
            kernel.stack_bytes,
            kernel.spill_store_bytes + kernel.spill_load_bytes
        );
    }
    let spilling = kernels.iter().filter(|kernel| kernel.hot && kernel.spills()).count();
    println!("{} kernels compiled, {spilling} hot ones spill", kernels.len());
    if kernels.is_empty() || spilling > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
