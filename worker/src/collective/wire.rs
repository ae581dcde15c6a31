//! What a link's bytes travel in: as they are, or in sealed records.
//!
//! Two ranks that do not share a machine meet by a TLS handshake in which both prove their
//! certificates, and take the keys of their records from it, as TLS' exporters are for. The records
//! are our own, because TLS' are of 16 KiB, and because its connections cannot be read and written
//! by two threads: a record is up to 128 KiB, sealed by AES-256-GCM under a key of its direction
//! with its number as nonce, and opened where it is to lie. One that is changed, dropped, repeated
//! or out of order does not open.
//!
//! On the wire: length (4 bytes, little endian, authenticated), tag (16 bytes), ciphertext.

use std::io::{self, Read, Write};

use quintet_identity::RecordKey;

use super::stream::Stream;

/// The longest record. What is shorter than a processor's second-level cache is encrypted in it.
const RECORD_BYTES_MAX: usize = 128 << 10;
const TAG_BYTES: usize = RecordKey::TAG_BYTES;
const PREFIX_BYTES: usize = 4 + TAG_BYTES;

/// One direction of a connection.
pub(super) struct Wire {
    stream: Stream,
    cipher: Cipher,
}

enum Cipher {
    Plain,
    Seals(Sealer),
    Opens(Opener),
}

/// The keys of both directions.
pub(super) struct Ciphers {
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
}

impl Wire {
    /// Both directions of a connection, to read and to write.
    pub(super) fn pair(stream: Stream, ciphers: Option<Ciphers>) -> io::Result<(Self, Self)> {
        let other = stream.try_clone()?;
        let (opens, seals) = match ciphers {
            None => (Cipher::Plain, Cipher::Plain),
            Some(Ciphers { sealer, opener }) => (Cipher::Opens(opener), Cipher::Seals(sealer)),
        };
        Ok((Self { stream: other, cipher: opens }, Self { stream, cipher: seals }))
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.cipher {
            Cipher::Plain => (&self.stream).read(buffer),
            Cipher::Opens(opener) => opener.read(&mut &self.stream, buffer),
            Cipher::Seals(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.cipher {
            Cipher::Plain => (&self.stream).write(bytes),
            Cipher::Seals(sealer) => sealer.write(&mut &self.stream, bytes),
            Cipher::Opens(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is held back.
        Ok(())
    }
}

/// Seals what is sent.
pub(super) struct Sealer {
    key: RecordKey,
    /// A record as it travels.
    record: Vec<u8>,
}

impl Sealer {
    pub(super) fn new(key: RecordKey) -> Self {
        Self { key, record: Vec::new() }
    }

    /// Sends a record of the first of `bytes`; how many.
    pub(super) fn write(&mut self, stream: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(RECORD_BYTES_MAX)];
        if bytes.is_empty() {
            return Ok(0);
        }
        let length = (bytes.len() as u32).to_le_bytes();
        self.record.clear();
        self.record.extend_from_slice(&length);
        self.record.extend_from_slice(&[0; TAG_BYTES]);
        self.record.extend_from_slice(bytes);
        let tag = self.key.seal(&length, &mut self.record[PREFIX_BYTES..]).ok_or_else(worn_out)?;
        self.record[4..PREFIX_BYTES].copy_from_slice(&tag);
        stream.write_all(&self.record)?;
        Ok(bytes.len())
    }
}

/// Opens what is received.
pub(super) struct Opener {
    key: RecordKey,
    /// An opened record that was longer than what was asked for, and how much of it was handed out.
    rest: Vec<u8>,
    taken: usize,
}

impl Opener {
    pub(super) fn new(key: RecordKey) -> Self {
        Self { key, rest: Vec::new(), taken: 0 }
    }

    /// At least a byte, if the stream has not ended and `buffer` is not empty.
    pub(super) fn read(&mut self, stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.rest.len() && !buffer.is_empty() {
            let mut prefix = [0; PREFIX_BYTES];
            stream.read_exact(&mut prefix)?;
            let (length, tag) = prefix.split_at(4);
            let length: [u8; 4] = length.try_into().expect("four bytes"); // why: split above
            let bytes = u32::from_le_bytes(length) as usize;
            if bytes == 0 || bytes > RECORD_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a record of a length that nobody sends"));
            }
            if let Some(place) = buffer.get_mut(..bytes) {
                stream.read_exact(place)?;
                self.key.open(&length, tag, place).ok_or_else(forged)?;
                return Ok(bytes);
            }
            self.rest.resize(bytes, 0);
            self.taken = bytes;
            stream.read_exact(&mut self.rest)?;
            self.key.open(&length, tag, &mut self.rest).ok_or_else(forged)?;
            self.taken = 0;
        }
        let count = buffer.len().min(self.rest.len() - self.taken);
        buffer[..count].copy_from_slice(&self.rest[self.taken..][..count]);
        self.taken += count;
        Ok(count)
    }
}

fn forged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a record that was changed on its way")
}

fn worn_out() -> io::Error {
    io::Error::other("the connection's key has sealed as much as it may")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> (Sealer, Opener) {
        (Sealer::new(RecordKey::new(&[3; 32])), Opener::new(RecordKey::new(&[3; 32])))
    }

    /// Everything in `wire`, asked for in portions of these sizes again and again.
    fn read_in(opener: &mut Opener, wire: &[u8], portions: &[usize], total: usize) -> io::Result<Vec<u8>> {
        let (mut stream, mut bytes) = (wire, Vec::new());
        for portion in portions.iter().cycle() {
            let mut buffer = vec![0; *portion.min(&(total - bytes.len()))];
            if buffer.is_empty() {
                return Ok(bytes);
            }
            let count = opener.read(&mut stream, &mut buffer)?;
            bytes.extend_from_slice(&buffer[..count]);
        }
        unreachable!()
    }

    #[test]
    fn what_is_sealed_opens_in_portions_of_any_size() {
        let text: Vec<u8> = (0..400_000_u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        for portions in [&[400_000][..], &[1, 131_072], &[7, 40_000, 200_000], &[4096]] {
            let (mut sealer, mut opener) = ends();
            let mut wire = Vec::new();
            for part in [&text[..5], &text[5..5], &text[5..140_000], &text[140_000..]] {
                let mut left = part;
                while !left.is_empty() {
                    let count = sealer.write(&mut wire, left).unwrap();
                    left = &left[count..];
                }
            }
            assert!(!wire.windows(16).any(|window| window == &text[1000..1016]));
            assert!(read_in(&mut opener, &wire, portions, text.len()).unwrap() == text);
        }
    }

    #[test]
    fn what_was_changed_dropped_repeated_or_never_sent_does_not_open() {
        let (mut sealer, _) = ends();
        let mut records = Vec::new();
        for text in [[1_u8; 100], [2; 100]] {
            let mut wire = Vec::new();
            sealer.write(&mut wire, &text).unwrap();
            records.push(wire);
        }
        let refused = |wire: &[u8], total| read_in(&mut ends().1, wire, &[64], total).is_err();
        assert!(!refused(&records.concat(), 200));
        assert!(refused(&records[1], 100));
        assert!(refused(&[&records[0][..], &records[0]].concat(), 200));
        for at in [0, 4, 20, 119] {
            let mut changed = records[0].clone();
            changed[at] ^= 1;
            assert!(refused(&changed, 100), "byte {at}");
        }
        assert!(refused(&records[0][..119], 100));
        // A length out of all proportion asks for no memory.
        assert!(refused(&[0xff; 64], 100));
        assert!(refused(&[0; 64], 100));
    }
}
