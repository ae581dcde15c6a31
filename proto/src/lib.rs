//! The wire contract between coordinator and workers: messages and the gRPC service, generated
//! from `proto/quintet/v1/*.proto`. No logic lives here, only what both ends must agree on.

/// Raised by every change of the contract that an older peer would misread.
pub const PROTOCOL_VERSION: u32 = 4;

/// Length of the secrets in `Hello` and `Welcome`, in bytes.
pub const TOKEN_BYTES: usize = 32;

/// Largest message from a worker, in bytes: a `StepDone` of about 100 000 micro-batches.
pub const FROM_WORKER_BYTES_MAX: usize = 4 << 20;

/// Largest message to a worker, in bytes: a `Welcome` with a large tokenizer.
pub const TO_WORKER_BYTES_MAX: usize = 256 << 20;

/// Pieces that files are sent in, in bytes.
pub const PIECE_BYTES: usize = 1 << 20;

/// Length of the digests of files and examples, in bytes.
pub const HASH_BYTES: usize = 32;

/// Whether a `File` may have this name: that of a file in a directory, and not the way out of it.
pub fn is_file_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_plain)
}

/// Version 1 of the contract.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("quintet.v1");
}
