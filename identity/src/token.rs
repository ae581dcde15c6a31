//! Tokens that admit once, and hexadecimal.
//!
//! A token is proved by a message authentication code of the authority's, so that tokens can be
//! made wherever its key is, before or while the run is served, and nobody needs a list of them.

use std::fmt;
use std::str::FromStr;

use ring::digest;

use crate::error::Refusal;
use crate::role::Role;

/// How all tokens begin, with the version of what follows.
pub(crate) const PREFIX: &str = "quintet1.";

/// No token's text is longer: who reads one need not read more.
pub const TOKEN_TEXT_BYTES_MAX: usize = 256;

/// Length of an authority's fingerprint: SHA-256.
pub const FINGERPRINT_BYTES: usize = 32;

const PROOF_BYTES: usize = 32;

/// By which an authority's certificate is known, as `openssl x509 -fingerprint -sha256` shows it.
pub fn fingerprint(certificate: &[u8]) -> [u8; FINGERPRINT_BYTES] {
    let mut bytes = [0; FINGERPRINT_BYTES];
    bytes.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    bytes
}

/// The number of a token, and of the member that it admits; drawn at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub(crate) [u8; 8]);

impl fmt::Display for MemberId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&to_hex(&self.0))
    }
}

impl FromStr for MemberId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        from_hex(text).map(Self).ok_or(())
    }
}

/// Admits one member, until it expires.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// What the member may do.
    pub role: Role,
    /// Seconds since 1970.
    pub expires_at: u64,
    /// Which token it is.
    pub id: MemberId,
    /// Of the authority to believe: whom the member tells this token.
    pub fingerprint: [u8; FINGERPRINT_BYTES],
    /// What only the authority can compute.
    pub(crate) proof: [u8; PROOF_BYTES],
}

impl JoinToken {
    /// All but the proof: what it proves.
    pub(crate) fn claim(role: Role, expires_at: u64, id: MemberId, fingerprint: &[u8; FINGERPRINT_BYTES]) -> String {
        format!("{PREFIX}{}.{expires_at}.{id}.{}", role.name(), to_hex(fingerprint))
    }

    /// The token itself: whoever has it can join. Not `Display`, so that no log shows it by accident.
    pub fn to_text(&self) -> String {
        let claim = Self::claim(self.role, self.expires_at, self.id, &self.fingerprint);
        format!("{claim}.{}", to_hex(&self.proof))
    }
}

impl FromStr for JoinToken {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        if text.len() > TOKEN_TEXT_BYTES_MAX {
            return Err(Refusal::Unreadable);
        }
        let parse = || {
            let mut parts = text.trim().strip_prefix(PREFIX)?.split('.');
            let role = parts.next()?.parse().ok()?;
            let seconds = parts.next()?;
            let expires_at = seconds.bytes().all(|byte| byte.is_ascii_digit()).then(|| seconds.parse().ok())??;
            let id = parts.next()?.parse().ok()?;
            let token =
                Self { role, expires_at, id, fingerprint: from_hex(parts.next()?)?, proof: from_hex(parts.next()?)? };
            // One text a token: what was not written by us is none.
            (parts.next().is_none() && token.to_text() == text.trim()).then_some(token)
        };
        parse().ok_or(Refusal::Unreadable)
    }
}

/// Never shows the proof, so that no log can.
impl fmt::Debug for JoinToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "JoinToken({} {}, until {})", self.role.name(), self.id, self.expires_at)
    }
}

/// Lower-case hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From [`to_hex`] of exactly `N` bytes.
pub(crate) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(bytes)
}
