//! Secrets of a run.

use std::fmt;

use quintet_proto::TOKEN_BYTES;

use crate::{Error, Result};

/// 256 random bits that only the members of a run know.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; TOKEN_BYTES]);

impl Secret {
    /// A new one, from the operating system's generator.
    ///
    /// # Errors
    /// [`Error::Random`] where the system has none.
    pub fn generate() -> Result<Self> {
        let mut bytes = [0; TOKEN_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| Error::Random(error.to_string()))?;
        Ok(Self(bytes))
    }

    /// A given one.
    pub fn from_bytes(bytes: [u8; TOKEN_BYTES]) -> Self {
        Self(bytes)
    }

    /// From [`Secret::to_hex`]; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; TOKEN_BYTES];
        if text.len() != 2 * TOKEN_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// Lower-case hexadecimal.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The bytes themselves.
    pub fn as_bytes(&self) -> &[u8; TOKEN_BYTES] {
        &self.0
    }

    /// Whether a stranger's bytes are the secret, in a time that does not tell how many of them
    /// are right.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        bytes.len() == TOKEN_BYTES
            && 0 == std::hint::black_box(self.0.iter().zip(bytes))
                .fold(0, |difference, (a, b)| std::hint::black_box(difference | (a ^ b)))
    }
}

/// Never shows the secret, so that no log can.
impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_matches() {
        let secret = Secret::generate().unwrap();
        let mut bytes = *secret.as_bytes();
        assert!(secret.matches(&bytes));
        assert!(!secret.matches(&bytes[1..]) && !secret.matches(&[]));
        bytes[31] ^= 1;
        assert!(!secret.matches(&bytes));
        assert_ne!(secret, Secret::generate().unwrap());
    }

    #[test]
    fn hexadecimal_there_and_back() {
        let secret = Secret::generate().unwrap();
        assert_eq!(Secret::from_hex(&secret.to_hex()), Some(secret.clone()));
        assert_eq!(Secret::from_hex(&secret.to_hex()[1..]), None);
        assert_eq!(Secret::from_hex(&"+f".repeat(32)), None);
        assert!(!format!("{secret:?}").contains(&secret.to_hex()[..4]));
    }
}
