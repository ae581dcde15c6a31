//! How a rank gets the state of the run from another, bit by bit the same: master weights, optimizer state, loss scaler.

use serde::{Deserialize, Serialize};

use crate::collective::Collective;
use crate::replica::Replica;
use crate::scaler::LossScaler;
use crate::{Error, Result};

/// Of an arena, at a time.
const PIECE_ELEMENTS: usize = 1 << 20;
/// Room for a [`Condition`].
const CONDITION_BYTES: usize = 512;

/// What of a state is no tensor, and the digest of what is.
#[derive(Debug, Serialize, Deserialize)]
struct Condition {
    step: u64,
    updates: u64,
    loss_scaler: Option<LossScaler>,
    digest: String,
}

/// Hands the state of rank `source` to the ranks of `healed`; the others do not take part. Whenever a piece has been
/// handed over, `progressed` is called.
///
/// # Errors
/// Those of the mesh; [`Error::Healing`] where what arrived is not what was sent. The replica of a rank that is healed is
/// then worthless.
pub fn heal(
    collective: &mut Collective,
    replica: &mut Replica,
    step: u64,
    source: u32,
    healed: &[u32],
    progressed: &dyn Fn(),
) -> Result<()> {
    let rank = collective.rank();
    let mut pass_on = |bytes: &mut [u8]| {
        progressed();
        collective.broadcast(step, source, healed, bytes)
    };
    if rank == source {
        hand_over(replica, &mut pass_on)
    } else if healed.contains(&rank) {
        take_over(replica, step, source, &mut pass_on)
    } else {
        Ok(())
    }
}

/// Sends bytes to those who are healed, or receives them.
type PassOn<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<()>;

fn hand_over(replica: &Replica, pass_on: PassOn) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    for arena in replica.arenas() {
        let elements = arena.rows() * arena.cols();
        let mut buffer = vec![0.0_f32; PIECE_ELEMENTS.min(elements)];
        for start in (0..elements).step_by(PIECE_ELEMENTS) {
            let piece = &mut buffer[..PIECE_ELEMENTS.min(elements - start)];
            arena.reshape(start, 1, piece.len()).read(piece)?;
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(piece);
            hasher.update(bytes);
            pass_on(bytes)?;
        }
    }
    let condition = Condition {
        step: replica.step(),
        updates: replica.optimizer().steps(),
        loss_scaler: replica.loss_scaler(),
        digest: hasher.finalize().to_hex().to_string(),
    };
    let mut bytes = serde_json::to_vec(&condition).expect("numbers and strings always have a JSON form");
    assert!(bytes.len() <= CONDITION_BYTES, "a condition of {} bytes", bytes.len());
    bytes.resize(CONDITION_BYTES, b' ');
    pass_on(&mut bytes)
}

fn take_over(replica: &mut Replica, step: u64, source: u32, pass_on: PassOn) -> Result<()> {
    for mut arena in replica.arenas_mut() {
        let elements = arena.rows() * arena.cols();
        let mut buffer = vec![0.0_f32; PIECE_ELEMENTS.min(elements)];
        for start in (0..elements).step_by(PIECE_ELEMENTS) {
            let piece = &mut buffer[..PIECE_ELEMENTS.min(elements - start)];
            pass_on(bytemuck::cast_slice_mut(piece))?;
            arena.reborrow().reshape(start, 1, piece.len()).write(piece)?;
        }
    }
    let mut bytes = vec![0; CONDITION_BYTES];
    pass_on(&mut bytes)?;
    let wrong = |problem: String| Error::Healing { rank: source, problem };
    let condition: Condition =
        serde_json::from_slice(&bytes).map_err(|error| wrong(format!("its condition does not parse: {error}")))?;
    if condition.step != step {
        return Err(wrong(format!("it stands at step {}, not {step}", condition.step)));
    }
    replica.resume_at(step, condition.updates, condition.loss_scaler)?;
    // From the memory that training will use.
    let mut hasher = blake3::Hasher::new();
    for arena in replica.arenas() {
        arena.read_in_pieces(|values: &[f32]| -> Result<()> {
            hasher.update(bytemuck::cast_slice(values));
            Ok(())
        })?;
    }
    match hasher.finalize().to_hex().as_str() == condition.digest {
        true => Ok(()),
        false => Err(wrong("what arrived does not match its digest".to_owned())),
    }
}
