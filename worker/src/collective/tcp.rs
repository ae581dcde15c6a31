//! Collectives over a full mesh of connections: TCP, and Unix sockets inside a machine.
//!
//! Every operation runs one sending thread a peer beside the receiving one, so no pair of
//! ranks can block each other with full buffers. A failed operation leaves streams half
//! read: it shuts the whole mesh, and the next generation builds a new one.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::rendezvous::{self, Interrupter, Listener, Membership};
use super::stream::Stream;
use super::tree::{Node, TreeSum, merge_plan, nodes_of};
use super::wire::{Ciphers, Wire};
use crate::shards::Shards;
use crate::{Error, Result};

/// Elements summed at a time: a few nodes' chunks fit the second-level cache, and a read is
/// large enough for the system call not to matter.
const CHUNK: usize = 32 * 1024;
/// The most bytes that one rank may gather from another in one message.
pub const GATHER_BYTES_MAX: u64 = 64 << 20;

const FRAME_MAGIC: u32 = 0x5135_4652;
const HEADER_BYTES: usize = 4 + 4 + 8 + 8 + 8;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Tag {
    Contribution = 1,
    Total = 2,
    Gather = 3,
    AllGather = 4,
    Broadcast = 5,
    Slice = 6,
}

/// One peer's connection.
pub(super) struct Link {
    peer: u32,
    reader: Wire,
    writer: Wire,
    silence_limit: Duration,
}

impl Link {
    pub(super) fn new(
        peer: u32,
        stream: Stream,
        ciphers: Option<Ciphers>,
        silence_limit: Duration,
    ) -> io::Result<Self> {
        stream.set_read_timeout(Some(silence_limit))?;
        stream.set_write_timeout(Some(silence_limit))?;
        let (reader, writer) = Wire::pair(stream, ciphers)?;
        Ok(Self { peer, reader, writer, silence_limit })
    }

    fn halves(&mut self) -> (Half<'_>, Half<'_>) {
        let Self { peer, silence_limit, .. } = *self;
        (Half { peer, silence_limit, stream: &mut self.reader }, Half { peer, silence_limit, stream: &mut self.writer })
    }
}

/// The reading or the writing half of a link, with errors that name the peer.
struct Half<'a> {
    peer: u32,
    silence_limit: Duration,
    stream: &'a mut Wire,
}

impl Half<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(|source| self.error(source))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes).map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Error::PeerSilent { rank: self.peer, seconds: self.silence_limit.as_secs_f64() }
            }
            _ => Error::PeerLost { rank: self.peer, source },
        }
    }

    fn write_header(&mut self, header: Header) -> Result<()> {
        self.write(&header.encode())
    }

    /// Reads a header that must match `expected` in everything but the length, and returns
    /// the length.
    fn read_header(&mut self, expected: Header) -> Result<u64> {
        let mut bytes = [0; HEADER_BYTES];
        self.read(&mut bytes)?;
        let (wanted, split) = (expected.encode(), HEADER_BYTES - 8);
        if bytes[..split] != wanted[..split] {
            let problem = format!("frame header {:02x?} where {:02x?} was due", &bytes[..split], &wanted[..split]);
            return Err(Error::Protocol { rank: self.peer, problem });
        }
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[split..]);
        Ok(u64::from_le_bytes(length))
    }

    /// [`Half::read_header`] where the length is known beforehand.
    fn expect_header(&mut self, expected: Header) -> Result<()> {
        let length = self.read_header(expected)?;
        if length != expected.length {
            let problem = format!("a frame of {length} bytes where {} were due", expected.length);
            return Err(Error::Protocol { rank: self.peer, problem });
        }
        Ok(())
    }

    fn read_message(&mut self, expected: Header) -> Result<Vec<u8>> {
        let length = self.read_header(expected)?;
        if length > GATHER_BYTES_MAX {
            let problem = format!("a message of {length} bytes, the limit is {GATHER_BYTES_MAX}");
            return Err(Error::Protocol { rank: self.peer, problem });
        }
        let mut message = vec![0; length as usize];
        self.read(&mut message)?;
        Ok(message)
    }
}

/// What precedes every message, so that ranks out of step notice before they add anything.
#[derive(Clone, Copy)]
struct Header {
    tag: Tag,
    generation: u64,
    step: u64,
    length: u64,
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.tag as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.step.to_le_bytes());
        bytes[24..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

/// This rank's connections to all others of one generation.
pub struct Mesh {
    rank: u32,
    generation: u64,
    /// By rank; `None` at one's own.
    links: Vec<Option<Link>>,
    interrupter: Interrupter,
    /// One chunk of every node; grows in the first step.
    scratch: Vec<f32>,
}

impl Mesh {
    /// Connects to every other member; returns when all connections stand.
    ///
    /// `silence_limit` bounds how long a later operation waits for a peer to send or take a
    /// byte; peers reach an operation at different times, so it must exceed the time by which
    /// the slowest rank's computation of a step lags.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] names a rank that is missing at `deadline`, and
    /// [`Error::Interrupted`] if `interrupter` fired.
    pub fn connect(
        listener: &Listener,
        membership: Membership,
        deadline: Instant,
        silence_limit: Duration,
        interrupter: Interrupter,
    ) -> Result<Self> {
        rendezvous::connect(listener, membership, deadline, silence_limit, interrupter)
    }

    pub(super) fn new(rank: u32, generation: u64, links: Vec<Option<Link>>, interrupter: Interrupter) -> Self {
        Self { rank, generation, links, interrupter, scratch: Vec::new() }
    }

    pub fn rank(&self) -> u32 {
        self.rank
    }

    pub fn world_size(&self) -> u32 {
        self.links.len() as u32
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }

    /// See [`super::Collective::reduce_tree`].
    ///
    /// A rank sends every other what it has of that one's slice, adds up its own slice chunk by chunk, and sends each
    /// chunk's total on, to those who hold the slice, while the next one comes in.
    pub(super) fn reduce_tree(
        &mut self,
        step: u64,
        sum: &TreeSum,
        ranges: &[Range<u32>],
        shards: &Shards,
        output: &mut [f32],
    ) -> Result<()> {
        let plan = Plan::new(sum, ranges, self.rank, shards, output.len());
        let (own_rank, rank, generation) = (self.rank, self.rank as usize, self.generation);
        let header = move |tag, length| Header { tag, generation, step, length };
        let total_header = move |slice: &Range<usize>| header(Tag::Total, (slice.len() * size_of::<f32>()) as u64);
        let mut slices = split(output, shards);
        let own_totals = std::mem::take(&mut slices[rank]);
        let (senders, totals): (Vec<_>, Vec<_>) = plan.slices.iter().map(|_| mpsc::channel()).unzip();
        let totals: Vec<Mutex<Receiver<&[f32]>>> = totals.into_iter().map(Mutex::new).collect();
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.exchange(
            |writer| {
                let peer = writer.peer as usize;
                let slice = plan.slices[peer].clone();
                writer.write_header(header(Tag::Contribution, plan.contribution_bytes(rank, &slice)))?;
                for chunk in chunks(slice) {
                    for (_, partial) in sum.nodes() {
                        writer.write(bytemuck::cast_slice(&partial[chunk.clone()]))?;
                    }
                }
                if !shards.holds(writer.peer, own_rank) {
                    return Ok(());
                }
                writer.write_header(total_header(&plan.slices[rank]))?;
                let totals = totals[peer].lock().unwrap_or_else(PoisonError::into_inner);
                totals.iter().try_for_each(|total| writer.write(bytemuck::cast_slice(total)))
            },
            |readers| {
                // Moved in, so that the writers' channels end when this does, in whatever way.
                let senders = senders;
                for reader in readers.iter_mut() {
                    let bytes = plan.contribution_bytes(reader.peer as usize, &plan.slices[rank]);
                    reader.expect_header(header(Tag::Contribution, bytes))?;
                }
                for (chunk, total) in chunks(plan.slices[rank].clone()).zip(own_totals.chunks_mut(CHUNK)) {
                    plan.sum_chunk(rank, sum, chunk, &mut scratch, readers, total)?;
                    let total: &[f32] = total;
                    // A writer that is gone has failed, which `exchange` tells.
                    senders.iter().for_each(|sender| sender.send(total).unwrap_or_default());
                }
                drop(senders);
                for reader in readers.iter_mut().filter(|reader| shards.holds(own_rank, reader.peer)) {
                    let peer = reader.peer as usize;
                    reader.expect_header(total_header(&plan.slices[peer]))?;
                    reader.read(bytemuck::cast_slice_mut(&mut *slices[peer]))?;
                }
                Ok(())
            },
        );
        self.scratch = scratch;
        result
    }

    /// See [`super::Collective::gather_slices`].
    pub(super) fn gather_slices(&mut self, step: u64, shards: &Shards, values: &mut [f32]) -> Result<()> {
        let (rank, generation) = (self.rank, self.generation);
        let header = |slice: &Range<usize>| {
            let length = (slice.len() * size_of::<f32>()) as u64;
            Header { tag: Tag::Slice, generation, step, length }
        };
        let mut slices = split(values, shards);
        let own = std::mem::take(&mut slices[rank as usize]);
        let own: &[f32] = own;
        self.exchange(
            |writer| {
                if shards.holds(writer.peer, rank) {
                    return Ok(());
                }
                writer.write_header(header(&shards.slices()[rank as usize]))?;
                writer.write(bytemuck::cast_slice(own))
            },
            |readers| {
                for reader in readers.iter_mut().filter(|reader| !shards.holds(rank, reader.peer)) {
                    let peer = reader.peer as usize;
                    reader.expect_header(header(&shards.slices()[peer]))?;
                    reader.read(bytemuck::cast_slice_mut(&mut *slices[peer]))?;
                }
                Ok(())
            },
        )
    }

    /// See [`super::Collective::gather_bytes`].
    pub(super) fn gather_bytes(&mut self, step: u64, root: u32, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        let header = self.message_header(Tag::Gather, step, bytes);
        let is_root = self.rank == root;
        let mut messages = vec![Vec::new(); self.links.len()];
        self.exchange(
            |writer| {
                if writer.peer == root {
                    writer.write_header(header)?;
                    writer.write(bytes)?;
                }
                Ok(())
            },
            |readers| {
                for reader in readers.iter_mut().filter(|_| is_root) {
                    messages[reader.peer as usize] = reader.read_message(header)?;
                }
                Ok(())
            },
        )?;
        messages[self.rank as usize] = bytes.to_vec();
        Ok(is_root.then_some(messages))
    }

    /// See [`super::Collective::all_gather_bytes`].
    pub(super) fn all_gather_bytes(&mut self, step: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let header = self.message_header(Tag::AllGather, step, bytes);
        let mut messages = vec![Vec::new(); self.links.len()];
        self.exchange(
            |writer| {
                writer.write_header(header)?;
                writer.write(bytes)
            },
            |readers| {
                for reader in readers {
                    messages[reader.peer as usize] = reader.read_message(header)?;
                }
                Ok(())
            },
        )?;
        messages[self.rank as usize] = bytes.to_vec();
        Ok(messages)
    }

    /// See [`super::Collective::broadcast`].
    pub(super) fn broadcast(&mut self, step: u64, root: u32, to: &[u32], bytes: &mut [u8]) -> Result<()> {
        let (rank, generation) = (self.rank, self.generation);
        let header = Header { tag: Tag::Broadcast, generation, step, length: bytes.len() as u64 };
        if rank == root {
            let bytes: &[u8] = bytes;
            return self.exchange(
                |writer| {
                    if to.contains(&writer.peer) {
                        writer.write_header(header)?;
                        writer.write(bytes)?;
                    }
                    Ok(())
                },
                |_| Ok(()),
            );
        }
        self.exchange(
            |_| Ok(()),
            |readers| {
                for reader in readers.iter_mut().filter(|reader| reader.peer == root) {
                    reader.expect_header(header)?;
                    reader.read(bytes)?;
                }
                Ok(())
            },
        )
    }

    fn message_header(&self, tag: Tag, step: u64, bytes: &[u8]) -> Header {
        let length = bytes.len() as u64;
        assert!(length <= GATHER_BYTES_MAX, "a message of {length} bytes to gather");
        Header { tag, generation: self.generation, step, length }
    }

    /// Runs `send` for every peer on a thread of its own and `receive` on this one. The
    /// first error wins and shuts the mesh, which releases all other threads.
    fn exchange(
        &mut self,
        send: impl Fn(&mut Half) -> Result<()> + Sync,
        receive: impl FnOnce(&mut [Half]) -> Result<()>,
    ) -> Result<()> {
        if self.interrupter.is_interrupted() {
            return Err(Error::Interrupted);
        }
        let failure = Mutex::new(None);
        let interrupter = &self.interrupter;
        let note = |result: Result<()>| {
            if let Err(error) = result {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                interrupter.shut_sockets();
            }
        };
        std::thread::scope(|scope| {
            let (mut readers, writers): (Vec<Half>, Vec<Half>) =
                self.links.iter_mut().flatten().map(Link::halves).unzip();
            for mut writer in writers {
                let (note, send) = (&note, &send);
                scope.spawn(move || note(send(&mut writer)));
            }
            note(receive(&mut readers));
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(_) if self.interrupter.is_interrupted() => Err(Error::Interrupted),
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // Whoever still holds an interrupter holds the sockets open: end them, so peers notice.
        self.interrupter.shut_sockets();
    }
}

/// Who holds which nodes, who owns which elements, and in which order the owner adds.
struct Plan {
    /// All ranks' nodes, left to right; a node's index is its slot.
    nodes: Vec<Node>,
    /// By rank: the slots of its nodes.
    slots: Vec<Range<usize>>,
    merges: Vec<(usize, usize)>,
    /// By rank: the elements it sums.
    slices: Vec<Range<usize>>,
}

impl Plan {
    fn new(sum: &TreeSum, ranges: &[Range<u32>], rank: u32, shards: &Shards, elements: usize) -> Self {
        let world = ranges.len();
        let leaves = sum.leaves();
        assert_eq!(sum.elements(), elements, "output and gradient sum differ in size");
        assert_eq!((shards.slices().len(), shards.elements()), (world, elements), "a division of something else");
        assert!(sum.is_complete(), "micro-batches of {:?} are missing", sum.range());
        assert!(sum.range() == ranges[rank as usize] || sum.range().is_empty() && ranges[rank as usize].is_empty());
        let mut order: Vec<usize> = (0..world).collect();
        order.sort_by_key(|&r| (ranges[r].start, ranges[r].end));
        let mut nodes = Vec::new();
        let mut slots = vec![0..0; world];
        for r in order {
            let first = nodes.len();
            nodes.extend(nodes_of(ranges[r].clone(), leaves));
            slots[r] = first..nodes.len();
        }
        let merges = merge_plan(&nodes, leaves);
        Self { nodes, slots, merges, slices: shards.slices().to_vec() }
    }

    /// Reads what the others have of a chunk of this rank's slice, and writes the sum of it and what this rank has.
    fn sum_chunk(
        &self,
        rank: usize,
        sum: &TreeSum,
        chunk: Range<usize>,
        scratch: &mut Vec<f32>,
        readers: &mut [Half],
        total: &mut [f32],
    ) -> Result<()> {
        scratch.resize(self.nodes.len() * CHUNK, 0.0);
        let mut received: Vec<&mut [f32]> =
            scratch.chunks_exact_mut(CHUNK).map(|slot| &mut slot[..chunk.len()]).collect();
        for reader in readers.iter_mut() {
            for slot in &mut received[self.slots[reader.peer as usize].clone()] {
                reader.read(bytemuck::cast_slice_mut(slot))?;
            }
        }
        // This rank's own are read where they are, until something is added to them.
        let mut values: Vec<Value> = received.into_iter().map(Value::Received).collect();
        for (value, (_, partial)) in values[self.slots[rank].clone()].iter_mut().zip(sum.nodes()) {
            *value = Value::Own(&partial[chunk.clone()]);
        }
        for &(left, right) in &self.merges {
            let addend = std::mem::replace(&mut values[right], Value::Own(&[]));
            let augend = std::mem::replace(&mut values[left], Value::Own(&[]));
            values[left] = augend.plus(addend);
        }
        total.copy_from_slice(values[0].as_slice());
        Ok(())
    }

    /// Bytes that `rank` sends to the owner of `slice`.
    fn contribution_bytes(&self, rank: usize, slice: &Range<usize>) -> u64 {
        (self.slots[rank].len() * slice.len() * size_of::<f32>()) as u64
    }
}

/// The slices of an arena, by their owner.
fn split<'a>(mut elements: &'a mut [f32], shards: &Shards) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(shards.slices().len());
    for slice in shards.slices() {
        let (part, rest) = elements.split_at_mut(slice.len());
        parts.push(part);
        elements = rest;
    }
    parts
}

/// A node's values in a chunk.
enum Value<'a> {
    Own(&'a [f32]),
    /// In memory that a sum may take the place of.
    Received(&'a mut [f32]),
}

impl Value<'_> {
    fn as_slice(&self) -> &[f32] {
        match self {
            Value::Own(values) => values,
            Value::Received(values) => values,
        }
    }

    fn plus(self, right: Self) -> Self {
        match (self, right) {
            (Value::Received(left), right) => {
                left.iter_mut().zip(right.as_slice()).for_each(|(left, right)| *left += right);
                Value::Received(left)
            }
            (Value::Own(left), Value::Received(right)) => {
                right.iter_mut().zip(left).for_each(|(right, left)| *right += left);
                Value::Received(right)
            }
            (Value::Own(_), Value::Own(_)) => unreachable!("siblings inside a rank's range are added up already"),
        }
    }
}

fn chunks(slice: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    slice.clone().step_by(CHUNK).map(move |first| first..slice.end.min(first + CHUNK))
}

// Gradients travel as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));
