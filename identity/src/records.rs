//! A key for a sequence of records, each sealed under its number.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};

/// After so many records of 128 KiB an attacker who sees all of them gains an advantage of 2⁻³² (RFC 9001, appendix B,
/// gives the formula): four petabytes, of which the next generation's handshake begins anew.
const RECORDS_MAX: u64 = 1 << 35;

/// Seals or opens records, by AES-256-GCM; one key serves one direction, at one end.
pub struct RecordKey {
    key: LessSafeKey,
    /// Number of the next record, which is its nonce: never the same twice.
    next: u64,
}

impl RecordKey {
    /// What sealing adds.
    pub const TAG_BYTES: usize = 16;
    /// Of a key.
    pub const KEY_BYTES: usize = 32;

    /// Of bytes that were never used as a key before.
    pub fn new(key: &[u8; Self::KEY_BYTES]) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"); // why: the array's type
        Self { key: LessSafeKey::new(key), next: 0 }
    }

    /// Encrypts `text` in place; its tag, which proves it and `header`. `None` when the key is worn out.
    pub fn seal(&mut self, header: &[u8], text: &mut [u8]) -> Option<[u8; Self::TAG_BYTES]> {
        let nonce = self.nonce()?;
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(header), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Decrypts `text` in place; `None`, and `text` is undefined, if anything of it, `header` or `tag` is not what the
    /// other end sealed as its record of this number.
    pub fn open(&mut self, header: &[u8], tag: &[u8], text: &mut [u8]) -> Option<()> {
        let nonce = self.nonce()?;
        let tag = Tag::try_from(tag).ok()?;
        self.key.open_in_place_separate_tag(nonce, Aad::from(header), tag, text, 0..).ok().map(|_| ())
    }

    fn nonce(&mut self) -> Option<Nonce> {
        let number = Some(self.next).filter(|&number| number < RECORDS_MAX)?;
        self.next += 1;
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&number.to_be_bytes());
        Some(Nonce::assume_unique_for_key(nonce))
    }
}
