//! Many byte strings one behind the other: in memory while they are few, in a file that is mapped when they are many.
//!
//! ```text
//! file = header (128 bytes) · all bytes · padding to 8 · the end of every item in the bytes (u64, little-endian)
//! header = magic (16) · key (32) · root of the items' tree (32) · number of items (8) · number of bytes (8) · notes (4 × 8)
//! ```
//! A file that is kept carries the key of what it was made from. It is written beside, synced and renamed, so what has
//! the final name is whole, and nobody writes to it again.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::remote::{Fetched, Remote, StoreAbout};
use crate::tree::{self, Growing};

const MAGIC: &[u8; 16] = b"quintet-items-2\n";
const HEADER_BYTES: usize = 128;
const END_BYTES: usize = size_of::<u64>();
/// So much is kept in memory: where all of it fits, nothing is written to disk.
pub(crate) const MEMORY_BYTES: usize = 32 << 20;
const BUFFER_BYTES: usize = 1 << 18;

/// A store that is on another machine can only be asked for what was gathered: whoever asks for more is mistaken.
const NOT_HERE: &str = "a store of another machine is read as if it were here";

/// A digest of what something was made from.
pub(crate) type Key = blake3::Hash;

/// Byte strings, by number.
#[derive(Debug)]
pub(crate) struct Store {
    data: Data,
    items: u64,
    bytes: usize,
    /// Of the tree over the items.
    root: blake3::Hash,
    notes: Notes,
}

/// Numbers that whoever makes a store leaves in it for whoever opens it.
pub(crate) type Notes = [u64; 4];

#[derive(Debug)]
enum Data {
    Memory {
        bytes: Vec<u8>,
        ends: Vec<u64>,
    },
    Mapped(Mmap),
    /// Another machine's, of which nothing is here.
    Remote(Remote),
    /// Some of that.
    Fetched(Fetched),
}

/// Where a store is kept if it is too large for memory.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The folder of caches. Without one the file is temporary, and gone with the store.
    pub(crate) folder: Option<PathBuf>,
    /// What kind of store it is: the beginning of the file's name.
    pub(crate) kind: &'static str,
    /// What it is made from: the rest of the file's name.
    pub(crate) key: Key,
    /// Beyond so many bytes it goes to a file.
    pub(crate) memory_bytes: usize,
}

impl Place {
    fn path(&self) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{}-{}.bin", self.kind, &self.key.to_hex()[..16])))
    }

    /// The store that was kept here, if it is there, whole, and made from the same.
    pub(crate) fn open(&self) -> Option<Store> {
        Store::open(&self.path()?, &self.key)
    }
}

impl Store {
    pub(crate) fn len(&self) -> u64 {
        self.items
    }

    /// A digest of all items in their order.
    pub(crate) fn digest(&self) -> blake3::Hash {
        tree::digest(self.items, &self.root)
    }

    /// By what another machine can check what it gets of this.
    pub(crate) fn about(&self) -> StoreAbout {
        StoreAbout { items: self.items, root: *self.root.as_bytes() }
    }

    /// One that is on another machine.
    pub(crate) fn remote(remote: Remote) -> Self {
        let StoreAbout { items, root } = remote.about();
        Self { items, bytes: 0, root: root.into(), notes: Notes::default(), data: Data::Remote(remote) }
    }

    /// The same with the given items at hand, if it is on another machine; `None` where all are.
    ///
    /// # Errors
    /// The other machine does not answer, or not with what was asked for.
    pub(crate) fn gathered(&self, items: impl Iterator<Item = u64>) -> Result<Option<Self>> {
        let Data::Remote(remote) = &self.data else { return Ok(None) };
        let data = Data::Fetched(remote.fetch(items)?);
        Ok(Some(Self { items: self.items, bytes: 0, root: self.root, notes: self.notes, data }))
    }

    pub(crate) fn is_remote(&self) -> bool {
        matches!(self.data, Data::Remote(_))
    }

    pub(crate) fn notes(&self) -> Notes {
        self.notes
    }

    /// # Panics
    /// When there is no such item, or it was not gathered.
    pub(crate) fn item(&self, index: u64) -> &[u8] {
        assert!(index < self.items, "item {index} of {}", self.items);
        if let Data::Fetched(fetched) = &self.data {
            return fetched.item(index);
        }
        let end = self.end(index);
        let start = if index == 0 { 0 } else { self.end(index - 1).min(end) };
        &self.bytes()[start..end]
    }

    /// All items' bytes, one behind the other.
    ///
    /// # Panics
    /// When they are on another machine.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Memory { bytes, .. } => bytes,
            Data::Mapped(map) => &map[HEADER_BYTES..HEADER_BYTES + self.bytes],
            Data::Remote(_) | Data::Fetched(_) => panic!("{NOT_HERE}"),
        }
    }

    fn end(&self, index: u64) -> usize {
        match &self.data {
            Data::Memory { ends, .. } => ends[index as usize] as usize,
            Data::Mapped(map) => {
                let at = ends_start(self.bytes) + END_BYTES * index as usize;
                let end = map[at..at + END_BYTES].try_into().map_or(0, u64::from_le_bytes);
                // Of a damaged file, an item may be wrong, but nothing is read from outside.
                (end as usize).min(self.bytes)
            }
            Data::Remote(_) | Data::Fetched(_) => panic!("{NOT_HERE}"),
        }
    }

    /// Whether it lies in a file.
    #[cfg(test)]
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.data, Data::Mapped(_))
    }

    fn open(path: &Path, key: &Key) -> Option<Self> {
        Self::map(&File::open(path).ok()?).ok()?.filter(|(_, found)| found == key).map(|(store, _)| store)
    }

    /// Maps a file, if it is whole, with the key it carries.
    fn map(file: &File) -> io::Result<Option<(Self, Key)>> {
        // SAFETY: nobody writes to such a file once it has its final name (or, if it is temporary, no name). Whoever
        // replaces it renames another one over it, which leaves this one as it is for as long as it is mapped.
        let map = unsafe { Mmap::map(file)? };
        if map.len() < HEADER_BYTES || &map[..16] != MAGIC {
            return Ok(None);
        }
        let number = |at: usize| map[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        let digest =
            |at: usize| map[at..at + 32].try_into().map_or(blake3::Hash::from_bytes([0; 32]), blake3::Hash::from_bytes);
        let (items, bytes) = (number(80), number(88) as usize);
        let length = (items as usize)
            .checked_mul(END_BYTES)
            .and_then(|ends| ends.checked_add(bytes)?.checked_add(HEADER_BYTES + 8));
        let is_whole = length.is_some() && ends_start(bytes) + END_BYTES * items as usize == map.len();
        let (key, root) = (digest(16), digest(48));
        let notes = [96, 104, 112, 120].map(number);
        Ok(is_whole.then(|| (Self { items, bytes, root, notes, data: Data::Mapped(map) }, key)))
    }
}

fn ends_start(bytes: usize) -> usize {
    (HEADER_BYTES + bytes).next_multiple_of(END_BYTES)
}

/// Writes a store, item by item.
pub(crate) struct StoreWriter {
    place: Place,
    bytes: Vec<u8>,
    ends: Vec<u64>,
    /// Where the items went before those in `bytes` and `ends`.
    files: Option<Files>,
    items: u64,
    total_bytes: u64,
    tree: Growing,
}

struct Files {
    bytes: BufWriter<tempfile::NamedTempFile>,
    ends: BufWriter<File>,
    folder: PathBuf,
}

impl StoreWriter {
    pub(crate) fn new(place: Place) -> Self {
        let (bytes, ends) = (Vec::new(), Vec::new());
        Self { place, bytes, ends, files: None, items: 0, total_bytes: 0, tree: Growing::default() }
    }

    pub(crate) fn len(&self) -> u64 {
        self.items
    }

    /// Appends an item.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn push(&mut self, item: &[u8]) -> Result<()> {
        self.tree.push(item);
        self.bytes.extend_from_slice(item);
        self.items += 1;
        self.total_bytes += item.len() as u64;
        self.ends.push(self.total_bytes);
        match self.bytes.len() + END_BYTES * self.ends.len() > self.place.memory_bytes {
            true => self.spill(),
            false => Ok(()),
        }
    }

    /// Moves what is in memory to the files.
    fn spill(&mut self) -> Result<()> {
        let folder = self.place.folder.clone().unwrap_or_else(std::env::temp_dir);
        let failed = |error| Error::io(&folder, error);
        if self.files.is_none() {
            fs::create_dir_all(&folder).map_err(failed)?;
            let named = tempfile::Builder::new().prefix(".cache-").tempfile_in(&folder).map_err(failed)?;
            let mut bytes = BufWriter::with_capacity(BUFFER_BYTES, named);
            bytes.write_all(&[0; HEADER_BYTES]).map_err(failed)?;
            let ends = BufWriter::with_capacity(BUFFER_BYTES, tempfile::tempfile_in(&folder).map_err(failed)?);
            self.files = Some(Files { bytes, ends, folder: folder.clone() });
        }
        if let Some(files) = &mut self.files {
            files.bytes.write_all(&self.bytes).map_err(failed)?;
            for end in self.ends.drain(..) {
                files.ends.write_all(&end.to_le_bytes()).map_err(failed)?;
            }
            self.bytes.clear();
        }
        Ok(())
    }

    /// The store; `keep` puts it into the folder of caches even if it would fit into memory.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn finish(mut self, keep: bool, notes: Notes) -> Result<Store> {
        if keep || self.files.is_some() {
            self.spill()?;
        }
        let root = std::mem::take(&mut self.tree).root();
        let Some(files) = self.files.take() else {
            let (bytes, items) = (self.bytes.len(), self.items);
            return Ok(Store { data: Data::Memory { bytes: self.bytes, ends: self.ends }, items, bytes, root, notes });
        };
        let folder = files.folder.clone();
        self.complete(files, &root, notes).map_err(|error| Error::io(&folder, error))
    }

    fn complete(&self, files: Files, root: &blake3::Hash, notes: Notes) -> io::Result<Store> {
        let mut bytes = files.bytes;
        let padding = ends_start(self.total_bytes as usize) - HEADER_BYTES - self.total_bytes as usize;
        bytes.write_all(&[0; END_BYTES][..padding])?;
        let mut ends = files.ends.into_inner()?;
        ends.seek(SeekFrom::Start(0))?;
        let mut ends = BufReader::with_capacity(BUFFER_BYTES, ends);
        io::copy(&mut ends.by_ref(), &mut bytes)?;
        let mut header = [0; HEADER_BYTES];
        header[..16].copy_from_slice(MAGIC);
        header[16..48].copy_from_slice(self.place.key.as_bytes());
        header[48..80].copy_from_slice(root.as_bytes());
        header[80..88].copy_from_slice(&self.items.to_le_bytes());
        header[88..96].copy_from_slice(&self.total_bytes.to_le_bytes());
        for (at, note) in (96..).step_by(8).zip(notes) {
            header[at..at + 8].copy_from_slice(&note.to_le_bytes());
        }
        let mut named = bytes.into_inner()?;
        named.seek(SeekFrom::Start(0))?;
        named.write_all(&header)?;
        let file = match self.place.path() {
            Some(path) => {
                named.as_file().sync_all()?;
                named.persist(path)?
            }
            // Mapped, it outlives its name.
            None => named.into_file(),
        };
        let (store, _) =
            Store::map(&file)?.ok_or_else(|| io::Error::other("the cache that was just written is damaged"))?;
        Ok(store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(folder: Option<&Path>, key: &str, memory_bytes: usize) -> Place {
        let folder = folder.map(Path::to_owned);
        Place { folder, kind: "test", key: blake3::hash(key.as_bytes()), memory_bytes }
    }

    fn written(place: Place, keep: bool) -> Store {
        let mut writer = StoreWriter::new(place);
        for index in 0..1000_usize {
            writer.push(&vec![index as u8; index % 37]).unwrap();
        }
        writer.finish(keep, [1, 2, 3, 4]).unwrap()
    }

    fn check(store: &Store) {
        assert_eq!((store.len(), store.notes()), (1000, [1, 2, 3, 4]));
        for index in 0..1000 {
            assert_eq!(store.item(index), vec![index as u8; index as usize % 37], "{index}");
        }
    }

    #[test]
    fn items_are_the_same_in_memory_and_in_files() {
        let folder = tempfile::tempdir().unwrap();
        let memory = written(place(None, "a", 1 << 20), false);
        assert!(!memory.is_mapped());
        check(&memory);
        for (folder, memory_bytes, keep) in [
            (None, 0, false),
            (None, 999, false),
            (Some(folder.path()), 1, false),
            (Some(folder.path()), 1 << 20, true),
        ] {
            let store = written(place(folder, "a", memory_bytes), keep);
            assert!(store.is_mapped());
            check(&store);
            assert_eq!(store.digest(), memory.digest());
            assert_eq!(store.bytes(), memory.bytes());
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no leftovers");
    }

    #[test]
    fn what_is_kept_is_found_by_its_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let here = place(Some(folder.path()), "a", 0);
        assert!(here.open().is_none());
        drop(written(here.clone(), true));
        check(&here.open().unwrap());
        assert!(place(Some(folder.path()), "b", 0).open().is_none());
        // Torn, damaged, or another's under this name.
        let path = here.path().unwrap();
        let whole = fs::read(&path).unwrap();
        let mut foreign = whole.clone();
        foreign[20] ^= 1;
        let longer = [&whole[..], &[0; 8]].concat();
        let mut many = whole.clone();
        many[80..88].copy_from_slice(&u64::MAX.to_le_bytes());
        for damaged in [&whole[..whole.len() - 1], &whole[..100], b"", &foreign, &longer, &many] {
            fs::write(&path, damaged).unwrap();
            assert!(here.open().is_none());
        }
        // It is written anew over what is damaged.
        drop(written(here.clone(), true));
        check(&here.open().unwrap());
    }

    #[test]
    fn an_empty_store_is_one() {
        for keep in [false, true] {
            let store = StoreWriter::new(place(None, "a", 10)).finish(keep, [0; 4]).unwrap();
            assert_eq!((store.len(), store.bytes()), (0, &[][..]));
        }
    }
}
