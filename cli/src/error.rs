//! How a command ends when it does not end well.

/// The documented exit codes.
pub(crate) mod exit {
    pub(crate) const DONE: u8 = 0;
    pub(crate) const FAILURE: u8 = 1;
    pub(crate) const BAD_INPUT: u8 = 2;
}

/// One line for the person, and a code for the program that called.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) exit_code: u8,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// The input is wrong; trying again is no use.
    pub(crate) fn bad_input(message: impl Into<String>) -> Self {
        Failure { message: message.into(), exit_code: exit::BAD_INPUT }
    }

    /// Something went wrong that was not the input.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Failure { message: message.into(), exit_code: exit::FAILURE }
    }
}

/// A library knows whether the user or the machine is at fault.
macro_rules! from_library_error {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                let exit_code = if error.is_user_error() { exit::BAD_INPUT } else { exit::FAILURE };
                Failure { message: error.to_string(), exit_code }
            }
        }
    )*};
}

from_library_error!(
    quintet_kernels::Error,
    quintet_data::Error,
    quintet_t5::Error,
    quintet_worker::Error,
    quintet_coordinator::Error,
    quintet_identity::Error
);
