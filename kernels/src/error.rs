//! What a machine can refuse: memory today, a driver or a library when there is a GPU.

/// A failure of the device, never a mistake of the caller (those panic).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "out of memory on {device}: {requested_bytes} bytes wanted, {live_bytes} in use; lower micro_batch_size or turn on gradient_checkpointing"
    )]
    OutOfMemory { device: &'static str, requested_bytes: usize, live_bytes: usize },
}

pub type Result<T> = std::result::Result<T, Error>;
