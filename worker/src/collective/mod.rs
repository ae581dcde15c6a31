//! Sums over workers whose bits do not depend on the number of workers.
//!
//! A binary tree over micro-batch numbers fixes the order of additions ([`TreeSum`]), a mesh
//! of TCP connections carries the parts ([`Mesh`]). A rank runs the same
//! sequence of operations, with the same `step`, as every other. Between GPUs, NCCL
//! sums gradients instead ([`NcclMesh`]), and their bits depend on who computed what.

mod handshake;
mod nccl;
mod rendezvous;
mod stream;
mod tcp;
#[cfg(test)]
pub(crate) mod tests;
mod tree;
mod wire;

use std::ops::Range;

use quintet_kernels::{Gpu, Tensor, ViewMut, WaitLimits};

pub use handshake::MeshIdentity;
pub use nccl::NcclMesh;
pub use rendezvous::{Interrupter, Listener, Membership};
pub use tcp::{GATHER_BYTES_MAX, Mesh};
pub use tree::{LEAVES_MAX, Node, TreeSum, nodes_of};

use crate::Result;
use crate::shards::Shards;

/// How a rank reaches the others.
pub enum Collective {
    /// The only rank.
    Local,
    /// One of several, connected by TCP.
    Tcp(Box<Mesh>),
    /// One of several GPUs: NCCL for gradients, TCP for the rest.
    Nccl(Box<NcclMesh>),
}

impl Collective {
    pub fn local() -> Self {
        Self::Local
    }

    pub fn tcp(mesh: Mesh) -> Self {
        Self::Tcp(Box::new(mesh))
    }

    /// A mesh of ranks with GPUs: by NCCL if all of them can, else through their hosts; and which of the two, and why,
    /// for people.
    ///
    /// `shares_gpu` is whether `NCCL_MULTI_RANK_GPU_ENABLE=1` is set; `limits` are NCCL's.
    ///
    /// # Errors
    /// Those of the mesh.
    pub fn between_gpus(
        mesh: Mesh,
        gpu: &Gpu,
        step: u64,
        shares_gpu: bool,
        limits: WaitLimits,
    ) -> Result<(Self, String)> {
        let (connected, line) = nccl::upgrade(mesh, gpu, step, shares_gpu, limits)?;
        Ok((connected.map_or_else(Self::tcp, |nccl| Self::Nccl(Box::new(nccl))), line))
    }

    pub fn rank(&self) -> u32 {
        self.mesh().map_or(0, Mesh::rank)
    }

    pub fn world_size(&self) -> u32 {
        self.mesh().map_or(1, Mesh::world_size)
    }

    fn mesh(&self) -> Option<&Mesh> {
        match self {
            Self::Local => None,
            Self::Tcp(mesh) => Some(mesh),
            Self::Nccl(nccl) => Some(&nccl.mesh),
        }
    }

    fn mesh_mut(&mut self) -> Option<&mut Mesh> {
        match self {
            Self::Local => None,
            Self::Tcp(mesh) => Some(mesh),
            Self::Nccl(nccl) => Some(&mut nccl.mesh),
        }
    }

    /// Whether gradients are reduced while the backward pass runs.
    pub fn overlaps(&self) -> bool {
        matches!(self, Self::Nccl(_))
    }

    /// `gradient`, `[1, elements]` on a GPU, is final from element `start` on: where gradients are reduced as they come,
    /// this part of it may be.
    ///
    /// # Safety
    /// Until [`Collective::finish_sum`] has returned, or this is dropped, the memory of `gradient` stays, and nothing
    /// reads or writes elements that were said to be final.
    pub unsafe fn advance_sum(&mut self, gradient: ViewMut, start: usize) {
        if let Self::Nccl(nccl) = self {
            // SAFETY: the caller's.
            unsafe { nccl.advance(gradient, start) };
        }
    }

    /// Sums what [`Collective::advance_sum`] has not of `gradient` over all ranks, and waits for all of it. Only where
    /// [`Collective::overlaps`].
    ///
    /// # Errors
    /// A lost or silent peer, or an interrupt. The collective is then unusable and the content of `gradient` undefined.
    pub fn finish_sum(&mut self, gradient: ViewMut) -> Result<()> {
        match self {
            Self::Nccl(nccl) => nccl.finish(gradient),
            Self::Local | Self::Tcp(_) => panic!("a sum that was never begun"),
        }
    }

    /// Writes the sum over all micro-batches of the step into `output`, on every rank the slices of `shards` that it
    /// holds, with the same bits whatever `ranges` and `shards` are.
    ///
    /// `ranges[r]` is what rank `r` computed; together they cover `0..sum.leaves()`, each
    /// micro-batch once; empty ranges take part. `output` has `sum.elements()` elements. Where
    /// nothing needs to be exchanged, `output` and the sum trade buffers instead of copying.
    ///
    /// # Errors
    /// A lost or silent peer, a broken protocol, or an interrupt. The mesh is then unusable
    /// and the content of `output` undefined.
    pub fn reduce_tree(
        &mut self,
        step: u64,
        sum: &mut TreeSum,
        ranges: &[Range<u32>],
        shards: &Shards,
        output: &mut Tensor,
    ) -> Result<()> {
        assert_eq!(ranges.len(), self.world_size() as usize, "one range a rank");
        match self {
            Self::Local => {
                assert!(sum.is_complete(), "micro-batches of {:?} are missing", sum.range());
                sum.take_total(output);
                Ok(())
            }
            Self::Tcp(mesh) => mesh.reduce_tree(step, sum, ranges, shards, output.as_mut_slice()),
            Self::Nccl(_) => panic!("a tree of micro-batches between GPUs"),
        }
    }

    /// Brings the slices of `values`, `[1, elements]` on the CPU, from their owners to all who do not hold them.
    ///
    /// # Errors
    /// Those of [`Collective::reduce_tree`]; the content of slices that this rank does not hold is then undefined.
    pub fn gather_slices(&mut self, step: u64, shards: &Shards, values: ViewMut) -> Result<()> {
        match self.mesh_mut() {
            Some(mesh) if !shards.is_replicated() => mesh.gather_slices(step, shards, values.into_slice()),
            _ => Ok(()),
        }
    }

    /// Brings every rank's `bytes` (at most [`GATHER_BYTES_MAX`]) to `root`, by rank; the
    /// others get `None` and do not wait for it.
    pub fn gather_bytes(&mut self, step: u64, root: u32, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        assert!(root < self.world_size(), "root {root} of {}", self.world_size());
        match self.mesh_mut() {
            None => Ok(Some(vec![bytes.to_vec()])),
            Some(mesh) => mesh.gather_bytes(step, root, bytes),
        }
    }

    /// Copies the bytes of `root` to the ranks of `to`, which give as many to be overwritten. The others do not take
    /// part.
    ///
    /// # Errors
    /// Those of [`Collective::reduce_tree`]; the content of `bytes` is then undefined at the ranks of `to`.
    pub fn broadcast(&mut self, step: u64, root: u32, to: &[u32], bytes: &mut [u8]) -> Result<()> {
        assert!(!to.contains(&root), "rank {root} among those it sends to");
        match self.mesh_mut() {
            None => Ok(()),
            Some(mesh) => mesh.broadcast(step, root, to, bytes),
        }
    }

    /// Brings every rank's `bytes` (at most [`GATHER_BYTES_MAX`]) to every rank, by rank.
    pub fn all_gather_bytes(&mut self, step: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self.mesh_mut() {
            None => Ok(vec![bytes.to_vec()]),
            Some(mesh) => mesh.all_gather_bytes(step, bytes),
        }
    }
}
