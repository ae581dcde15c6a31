//! What a Parquet file says of its pages, checked before the library makes room for it.
//!
//! The library takes a page's size and a dictionary's length for granted, and fills so much memory. Both stand in the page's
//! header, a structure of Thrift's compact protocol; of it only the numbers that matter are read here.
//! <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>,
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parquet::basic::Compression;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};

/// A file whose pages' headers are checked when the library turns to them.
pub(super) struct CheckedPages {
    file: File,
    /// By their first byte.
    chunks: BTreeMap<u64, Chunk>,
}

/// The pages of a column in a row group.
struct Chunk {
    /// The byte after the last.
    end: u64,
    compression: Compression,
    /// What follows the header that was checked last.
    content: AtomicU64,
}

impl CheckedPages {
    pub(super) fn new(file: File) -> Result<Self> {
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file)?;
        let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
        let chunk = |column: &ColumnChunkMetaData| {
            let (start, length) = column.byte_range();
            let (end, compression) = (start.saturating_add(length), column.compression());
            (start, Chunk { end, compression, content: AtomicU64::new(u64::MAX) })
        };
        Ok(CheckedPages { file, chunks: columns.map(chunk).collect() })
    }

    /// Checks the header of the page that begins here, if one does.
    fn check(&self, start: u64) -> Result<()> {
        let chunk = self.chunks.range(..=start).next_back().map(|(_, chunk)| chunk);
        let Some(chunk) = chunk.filter(|chunk| start < chunk.end) else { return Ok(()) };
        // The library turns to a page once more when it has peeked at its header.
        if chunk.content.load(Ordering::Relaxed) == start {
            return Ok(());
        }
        let mut input = self.file.get_read(start)?;
        let header = Header::read(&mut input)?;
        header.check(chunk.compression)?;
        // Where a page is empty, the next header follows, and is to be checked.
        let content = if header.compressed_page_size > 0 { input.stream_position()? } else { u64::MAX };
        chunk.content.store(content, Ordering::Relaxed);
        Ok(())
    }
}

impl Length for CheckedPages {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for CheckedPages {
    type T = BufReader<File>;

    /// The library asks for each page's header by itself.
    fn get_read(&self, start: u64) -> Result<Self::T> {
        self.check(start)?;
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len()) {
            return Err(ParquetError::EOF("a part lies beyond the file's end".to_owned()));
        }
        self.file.get_bytes(start, length)
    }
}

/// `PageHeader`: the numbers that the library makes room by.
#[derive(Debug, Default, PartialEq, Eq)]
struct Header {
    uncompressed_page_size: u64,
    compressed_page_size: u64,
    /// Of a page that is a dictionary, its `num_values`.
    dictionary_values: u64,
}

impl Header {
    fn read(input: &mut impl Read) -> Result<Self> {
        let mut header = Header::default();
        each_field(input, &mut |id, kind, input| {
            match (id, kind) {
                (2, Kind::I32) => header.uncompressed_page_size = read_size(input)?,
                (3, Kind::I32) => header.compressed_page_size = read_size(input)?,
                (7, Kind::Struct) => each_field(input, &mut |id, kind, input| match (id, kind) {
                    (1, Kind::I32) => {
                        header.dictionary_values = read_size(input)?;
                        Ok(())
                    }
                    (1, _) => Err(malformed()),
                    _ => skip(input, kind, DEPTH_MAX),
                })?,
                (2 | 3 | 7, _) => return Err(malformed()),
                _ => skip(input, kind, DEPTH_MAX)?,
            }
            Ok(())
        })?;
        Ok(header)
    }

    fn check(&self, compression: Compression) -> Result<()> {
        let possible = SMALL_BYTES + self.compressed_page_size.saturating_mul(expansion_max(compression));
        if self.uncompressed_page_size > possible {
            return Err(ParquetError::General(format!(
                "a page of {} bytes says that it holds {}",
                self.compressed_page_size, self.uncompressed_page_size
            )));
        }
        // Values take four bytes at least, but for types of one or two, of which there are no more than 65,536.
        if self.dictionary_values > (1 << 16) + self.uncompressed_page_size / 3 {
            return Err(ParquetError::General(format!(
                "a dictionary of {} bytes says that it holds {} values",
                self.uncompressed_page_size, self.dictionary_values
            )));
        }
        Ok(())
    }
}

/// A page that holds no more than this is never refused for its size.
const SMALL_BYTES: u64 = 1 << 20;

/// How many bytes one byte can stand for at most.
fn expansion_max(compression: Compression) -> u64 {
    match compression {
        // Copies of 64 bytes are written in 3.
        Compression::SNAPPY => 22,
        // A byte of a match's length stands for 255.
        Compression::LZ4 | Compression::LZ4_RAW => 255,
        Compression::GZIP(_) => 1032,
        // A block of 128 KiB that repeats one byte takes 4.
        Compression::ZSTD(_) => 32 << 10,
        _ => 1,
    }
}

/// Structures in structures; the format has three.
const DEPTH_MAX: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Byte,
    I16,
    I32,
    I64,
    Double,
    Binary,
    List,
    Struct,
}

impl Kind {
    /// None for what the format uses nowhere in a page's header: maps.
    fn of(code: u8) -> Option<Self> {
        Some(match code {
            1 | 2 => Self::Bool,
            3 => Self::Byte,
            4 => Self::I16,
            5 => Self::I32,
            6 => Self::I64,
            7 => Self::Double,
            8 => Self::Binary,
            9 | 10 => Self::List,
            12 => Self::Struct,
            _ => return None,
        })
    }
}

/// Visits the fields of a structure by number and kind; the visitor reads the field's value, of which a bool has none.
fn each_field<R: Read>(input: &mut R, visit: &mut dyn FnMut(i64, Kind, &mut R) -> Result<()>) -> Result<()> {
    let mut id = 0;
    loop {
        let byte = read_byte(input)?;
        if byte & 0xf == 0 {
            return Ok(());
        }
        let kind = Kind::of(byte & 0xf).ok_or_else(malformed)?;
        id = match i64::from(byte >> 4) {
            0 => read_signed(input)?,
            delta => id + delta,
        };
        visit(id, kind, input)?;
    }
}

fn skip<R: Read>(input: &mut R, kind: Kind, depth: u32) -> Result<()> {
    let Some(depth) = depth.checked_sub(1) else { return Err(malformed()) };
    match kind {
        Kind::Bool => Ok(()),
        Kind::Byte => skip_bytes(input, 1),
        Kind::I16 | Kind::I32 | Kind::I64 => read_varint(input).map(|_| ()),
        Kind::Double => skip_bytes(input, 8),
        Kind::Binary => {
            let length = read_varint(input)?;
            skip_bytes(input, length)
        }
        Kind::List => {
            let byte = read_byte(input)?;
            let length = if byte >> 4 == 15 { read_varint(input)? } else { u64::from(byte >> 4) };
            let kind = Kind::of(byte & 0xf).filter(|&kind| kind != Kind::Bool || length == 0);
            let kind = if byte == 0 { Kind::Byte } else { kind.ok_or_else(malformed)? };
            (0..length).try_for_each(|_| skip(input, kind, depth))
        }
        Kind::Struct => each_field(input, &mut |_, kind, input| skip(input, kind, depth)),
    }
}

fn read_byte(input: &mut impl Read) -> Result<u8> {
    let mut byte = [0];
    input.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn skip_bytes(input: &mut impl Read, bytes: u64) -> Result<()> {
    match io::copy(&mut input.take(bytes), &mut io::sink())? == bytes {
        true => Ok(()),
        false => Err(malformed()),
    }
}

fn read_varint(input: &mut impl Read) -> Result<u64> {
    let mut value = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let byte = read_byte(input)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(malformed())
}

fn read_signed(input: &mut impl Read) -> Result<i64> {
    let value = read_varint(input)?;
    Ok((value >> 1) as i64 ^ -((value & 1) as i64))
}

/// A size: an `i32` that is not negative.
fn read_size(input: &mut impl Read) -> Result<u64> {
    let value = i32::try_from(read_signed(input)?).ok();
    value.and_then(|value| u64::try_from(value).ok()).ok_or_else(malformed)
}

fn malformed() -> ParquetError {
    ParquetError::General("a header is malformed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_past_what_does_not_matter() {
        // A dictionary of 22 values with a checksum, as in snappy.parquet.
        let bytes = b"\x15\x04\x15\xae\x04\x15\x82\x02\x15\xe2\x8a\xbf\x81\x0b\x3c\x15\x2c\x15\x00\x12\x00\x00";
        let header = Header { uncompressed_page_size: 279, compressed_page_size: 129, dictionary_values: 22 };
        assert_eq!(Header::read(&mut &bytes[..]).unwrap(), header);
        // A page of data with statistics: texts, a number and a bool.
        let bytes = b"\x15\x00\x15\x14\x15\x14\x2c\x15\x0a\x15\x00\x1c\x18\x01z\x18\x01a\x16\x02\x41\x00\x00\x00";
        let header = Header { uncompressed_page_size: 10, compressed_page_size: 10, dictionary_values: 0 };
        let mut rest = &bytes[..];
        assert_eq!(Header::read(&mut rest).unwrap(), header);
        assert!(rest.is_empty());
        for length in 0..bytes.len() {
            assert!(Header::read(&mut &bytes[..length]).is_err(), "{length} bytes");
        }
        for bad in [
            &b"\x15\x00\x15\x01\x00"[..],
            b"\x18\x00\x18\x01a\x00",
            b"\x15\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert!(Header::read(&mut &bad[..]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_page_holds_no_more_than_its_codec_can_make_of_it() {
        let page = |bytes| Header { uncompressed_page_size: bytes, compressed_page_size: 1000, dictionary_values: 0 };
        for (compression, bytes) in [
            (Compression::UNCOMPRESSED, 1000),
            (Compression::SNAPPY, 22_000),
            (Compression::LZ4_RAW, 255_000),
            (Compression::ZSTD(Default::default()), 32_768_000),
        ] {
            page((1 << 20) + bytes).check(compression).unwrap();
            page((1 << 20) + bytes + 1).check(compression).unwrap_err();
        }
    }
}
