//! Sums over workers whose bits do not depend on the number of workers.
//!
//! A binary tree over micro-batch numbers fixes the order of additions ([`TreeSum`]), a mesh
//! of TCP connections carries the parts ([`Mesh`]). A rank runs the same
//! sequence of operations, with the same `step`, as every other.

mod rendezvous;
mod tcp;
#[cfg(test)]
mod tests;
mod tree;

use std::ops::Range;

use quintet_kernels::Tensor;

pub use rendezvous::{Interrupter, Listener, Membership};
pub use tcp::{GATHER_BYTES_MAX, Mesh};
pub use tree::{LEAVES_MAX, Node, TreeSum, nodes_of};

use crate::Result;

/// How a rank reaches the others.
pub enum Collective {
    /// The only rank.
    Local,
    /// One of several, connected by TCP.
    Tcp(Box<Mesh>),
}

impl Collective {
    pub fn local() -> Self {
        Self::Local
    }

    pub fn tcp(mesh: Mesh) -> Self {
        Self::Tcp(Box::new(mesh))
    }

    pub fn rank(&self) -> u32 {
        match self {
            Self::Local => 0,
            Self::Tcp(mesh) => mesh.rank(),
        }
    }

    pub fn world_size(&self) -> u32 {
        match self {
            Self::Local => 1,
            Self::Tcp(mesh) => mesh.world_size(),
        }
    }

    /// Writes the sum over all micro-batches of the step into `output`, on every rank, with
    /// the same bits whatever `ranges` is.
    ///
    /// `ranges[r]` is what rank `r` computed; together they cover `0..sum.leaves()`, each
    /// micro-batch once; empty ranges take part. `output` has `sum.elements()` elements. Where
    /// nothing needs to be exchanged, `output` and the sum trade buffers instead of copying.
    ///
    /// # Errors
    /// A lost or silent peer, a broken protocol, or an interrupt. The mesh is then unusable
    /// and the content of `output` undefined.
    pub fn all_reduce_tree(
        &mut self,
        step: u64,
        sum: &mut TreeSum,
        ranges: &[Range<u32>],
        output: &mut Tensor,
    ) -> Result<()> {
        assert_eq!(ranges.len(), self.world_size() as usize, "one range a rank");
        match self {
            Self::Local => {
                assert!(sum.is_complete(), "micro-batches of {:?} are missing", sum.range());
                sum.take_total(output);
                Ok(())
            }
            Self::Tcp(mesh) => mesh.all_reduce_tree(step, sum, ranges, output.as_mut_slice()),
        }
    }

    /// Brings every rank's `bytes` (at most [`GATHER_BYTES_MAX`]) to `root`, by rank; the
    /// others get `None` and do not wait for it.
    pub fn gather_bytes(&mut self, step: u64, root: u32, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        assert!(root < self.world_size(), "root {root} of {}", self.world_size());
        match self {
            Self::Local => Ok(Some(vec![bytes.to_vec()])),
            Self::Tcp(mesh) => mesh.gather_bytes(step, root, bytes),
        }
    }

    /// Brings every rank's `bytes` (at most [`GATHER_BYTES_MAX`]) to every rank, by rank.
    pub fn all_gather_bytes(&mut self, step: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self {
            Self::Local => Ok(vec![bytes.to_vec()]),
            Self::Tcp(mesh) => mesh.all_gather_bytes(step, bytes),
        }
    }
}
