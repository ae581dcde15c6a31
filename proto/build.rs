//! Compiles the contract with protox, so that nobody has to install protoc.

use std::error::Error;

const CONTRACT: &str = "proto/quintet/v1/coordinator.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={CONTRACT}");
    let descriptors = protox::compile([CONTRACT], ["proto"])?;
    tonic_prost_build::configure()
        // Ordered, so that what is built from a message is the same everywhere.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
