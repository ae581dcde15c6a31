//! Safetensors files of f32 tensors: written in one stream, read from a map.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use quintet_kernels::View;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::{Map, Value, json};

use super::damaged;
use crate::Result;

/// A tensor on a device that belongs to somebody else.
#[derive(Clone)]
pub struct NamedTensor<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    /// f32, row by row, without gaps.
    pub values: View<'a>,
}

/// Writes `tensors` as a safetensors file, in their order.
pub(super) fn write(sink: &mut dyn Write, tensors: &[NamedTensor]) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for NamedTensor { name, shape, values } in tensors {
        let elements = values.rows() * values.cols();
        assert_eq!(shape.iter().product::<usize>(), elements, "{name}'s shape");
        let begin = end;
        end += elements * size_of::<f32>();
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] });
        assert!(header.insert(name.clone(), entry).is_none(), "two tensors are called {name}");
    }
    let mut header = Value::Object(header).to_string();
    // Data that begins at a multiple of 8 can be mapped and used in place.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    sink.write_all(&(header.len() as u64).to_le_bytes())?;
    sink.write_all(header.as_bytes())?;
    let mut write = |values: &[f32]| sink.write_all(bytemuck::cast_slice(values));
    tensors.iter().try_for_each(|tensor| tensor.values.read_in_pieces(&mut write))
}

/// An open safetensors file of a checkpoint.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the data begins in the file.
    data_start: usize,
}

impl TensorFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            // SAFETY: the map is only read. A checkpoint's files never change under their final
            // name, and removing one keeps a mapped file's content; a foreign program that
            // truncates it meanwhile would end this process with SIGBUS, not corrupt it.
            unsafe { Mmap::map(&file) }
        };
        let map = open().map_err(|e| damaged(path, format!("cannot be read: {e}")))?;
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| damaged(path, format!("is no safetensors file: {e}")))?;
        Ok(Self { path: path.to_owned(), map, metadata, data_start: 8 + header_bytes })
    }

    /// Checks length and BLAKE3 digest of the whole file.
    pub(super) fn verify(&self, bytes: u64, blake3: &str) -> Result<()> {
        let length = self.map.len() as u64;
        if length != bytes {
            return Err(damaged(&self.path, format!("has {length} bytes instead of {bytes}")));
        }
        if blake3::hash(&self.map).to_hex().as_str() != blake3 {
            return Err(damaged(&self.path, "does not match its digest".to_owned()));
        }
        Ok(())
    }

    /// The tensors' names, in the order they were written.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Copies the tensor `name`, which must have this `shape`, into `values`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) names file and tensor.
    pub fn read(&self, name: &str, shape: &[usize], values: &mut [f32]) -> Result<()> {
        self.read_range(name, shape, 0..shape.iter().product(), values)
    }

    /// [`TensorFile::read`] of the elements `range`.
    ///
    /// # Errors
    /// As there.
    pub fn read_range(&self, name: &str, shape: &[usize], range: Range<usize>, values: &mut [f32]) -> Result<()> {
        assert_eq!(range.len(), values.len(), "elements of {name}");
        let Some(info) = self.metadata.info(name) else {
            return Err(damaged(&self.path, format!("has no tensor {name}")));
        };
        if info.dtype != Dtype::F32 || info.shape != shape {
            let problem = format!("tensor {name} is {:?} {:?} instead of F32 {shape:?}", info.dtype, info.shape);
            return Err(damaged(&self.path, problem));
        }
        let (begin, end) = info.data_offsets;
        let data = &self.map[self.data_start + begin..self.data_start + end];
        let data = &data[range.start * size_of::<f32>()..range.end * size_of::<f32>()];
        bytemuck::cast_slice_mut::<f32, u8>(values).copy_from_slice(data);
        Ok(())
    }
}
