//! Numbers from one rank to others, verified where they will be used.

use std::ops::Range;

use crate::collective::Collective;
use crate::{Error, Result};

/// Elements at a time.
const PIECE: usize = 1 << 20;

/// What of a state is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goods {
    Weights,
    /// Of the optimizer.
    State,
}

/// Elements `range` of the arena, from one rank to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) goods: Goods,
    pub(crate) range: Range<usize>,
    pub(crate) from: u32,
    /// Ascending.
    pub(crate) to: Vec<u32>,
}

/// What arrived should be this.
#[must_use]
pub(crate) struct Received {
    from: u32,
    digest: [u8; blake3::OUT_LEN],
}

/// Sends elements `extent` of a tensor, which `read` has.
pub(crate) fn send(
    collective: &mut Collective,
    step: u64,
    transfer: &Transfer,
    extent: Range<usize>,
    mut read: impl FnMut(Range<usize>, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let Transfer { from, to, .. } = transfer;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0.0_f32; PIECE.min(extent.len())];
    for piece in pieces(extent) {
        let values = &mut buffer[..piece.len()];
        read(piece, values)?;
        hasher.update(bytemuck::cast_slice(values));
        collective.broadcast(step, *from, to, bytemuck::cast_slice_mut(values))?;
    }
    let mut digest = *hasher.finalize().as_bytes();
    collective.broadcast(step, *from, to, &mut digest)
}

/// Hands the elements that [`send`] sends to `write`; [`Received::verify`] is to follow.
pub(crate) fn receive(
    collective: &mut Collective,
    step: u64,
    transfer: &Transfer,
    extent: Range<usize>,
    mut write: impl FnMut(Range<usize>, &[f32]) -> Result<()>,
) -> Result<Received> {
    let Transfer { from, to, .. } = transfer;
    let mut buffer = vec![0.0_f32; PIECE.min(extent.len())];
    for piece in pieces(extent) {
        let values = &mut buffer[..piece.len()];
        collective.broadcast(step, *from, to, bytemuck::cast_slice_mut(values))?;
        write(piece, values)?;
    }
    let mut digest = [0; blake3::OUT_LEN];
    collective.broadcast(step, *from, to, &mut digest)?;
    Ok(Received { from: *from, digest })
}

impl Received {
    /// Reads once more what was written, from the memory that training will use.
    pub(crate) fn verify(
        self,
        extent: Range<usize>,
        mut read: impl FnMut(Range<usize>, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0.0_f32; PIECE.min(extent.len())];
        for piece in pieces(extent) {
            let values = &mut buffer[..piece.len()];
            read(piece, values)?;
            hasher.update(bytemuck::cast_slice(values));
        }
        if hasher.finalize() == self.digest {
            return Ok(());
        }
        Err(Error::Healing { rank: self.from, problem: "what arrived does not match its digest".to_owned() })
    }
}

fn pieces(extent: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    extent.clone().step_by(PIECE).map(move |start| start..extent.end.min(start + PIECE))
}
