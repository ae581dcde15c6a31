//! How much memory this process has used.

use quintet_kernels::Device;

/// The most bytes that were in use at once: of the GPU's memory where that is the device, else of the process.
pub fn peak_bytes(device: &Device) -> u64 {
    match device {
        Device::Cpu(_) => peak_resident_bytes(),
        Device::Gpu(_) => device.memory().peak_bytes as u64,
    }
}

/// The most memory that was ever resident, in bytes; 0 where the system does not tell (`VmHWM` of Linux).
fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
