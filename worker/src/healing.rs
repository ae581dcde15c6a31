//! How the ranks of a new generation come by the state of the run: who has nothing gets it from others, and where the
//! optimizer's state is sharded, everybody gets what the new division has for it.
//!
//! Ranks tell each other what they have, and all of them work out the same list of transfers. What a rank held in the old
//! division it gives up only when all have what they need in the new one. So a death at any moment takes along no more
//! than the dead one's own part, of which its neighbour has the other copy.

use std::ops::Range;

use quintet_kernels::Device;
use serde::{Deserialize, Serialize};

use crate::collective::Collective;
use crate::optimizer::Part;
use crate::replica::Replica;
use crate::scaler::LossScaler;
use crate::shards::Shards;
use crate::transfer::{Goods, Transfer, receive, send};
use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// What a rank has of the state of a step.
#[derive(Debug, Serialize, Deserialize)]
struct Account {
    condition: Condition,
    /// It has all weights; otherwise those of `state`.
    weights: bool,
    /// The elements whose optimizer state it has.
    state: Vec<Range<usize>>,
}

/// What of a state is no tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Condition {
    step: u64,
    updates: u64,
    loss_scaler: Option<LossScaler>,
}

impl Account {
    fn of(replica: &Replica, elements: usize) -> Self {
        let optimizer = replica.optimizer();
        let condition =
            Condition { step: replica.step(), updates: optimizer.steps(), loss_scaler: replica.loss_scaler() };
        let state = if optimizer.has_origin() { std::iter::once(0..elements).collect() } else { optimizer.held() };
        Self { condition, weights: replica.is_whole(), state }
    }

    fn has_state(&self, range: &Range<usize>) -> bool {
        covers(&self.state, range)
    }

    fn has_weights(&self, range: &Range<usize>) -> bool {
        self.weights || self.has_state(range)
    }
}

fn covers(ranges: &[Range<usize>], range: &Range<usize>) -> bool {
    ranges.iter().any(|part| part.start <= range.start && range.end <= part.end)
}

/// Gives every rank all weights of the committed `step`, and the optimizer's state that it has in `shards`; `holds` is
/// whether this rank has anything of that step. [`settle`] is to follow.
///
/// # Errors
/// Those of the mesh; [`Error::Healing`] where what arrived is not what was sent; [`Error::StateLost`], on all ranks, where
/// nobody has a part of the optimizer's state. A rank still has what it had.
pub fn heal(collective: &mut Collective, replica: &mut Replica, shards: &Shards, step: u64, holds: bool) -> Result<()> {
    if !holds {
        replica.forget();
    }
    let account = holds.then(|| Account::of(replica, shards.elements()));
    let accounts = exchange(collective, step, account.as_ref())?;
    let condition = agree(&accounts, step)?;
    let transfers = plan(&accounts, shards)?;
    let before = replica.optimizer().held();
    let filled = fill(collective, replica, shards, step, &transfers);
    if filled.is_err() {
        // What is half filled is worth nothing.
        replica.optimizer_mut().retain(&before);
    }
    filled?;
    if !(holds && replica.is_whole()) {
        replica.resume_at(step, condition.updates, condition.loss_scaler)?;
    }
    Ok(())
}

/// Gives up what this rank held in older divisions, when all have what they need of this one.
///
/// # Errors
/// Those of the mesh; this rank then has both.
pub fn settle(collective: &mut Collective, replica: &mut Replica, shards: &Shards, step: u64) -> Result<()> {
    collective.all_gather_bytes(step, &[])?;
    replica.divide(shards, collective.rank());
    Ok(())
}

/// Every rank's account, by rank.
fn exchange(collective: &mut Collective, step: u64, account: Option<&Account>) -> Result<Vec<Option<Account>>> {
    let bytes = serde_json::to_vec(&account).expect("numbers always have a JSON form");
    let all = collective.all_gather_bytes(step, &bytes)?;
    let parse = |(rank, bytes): (u32, Vec<u8>)| {
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Healing { rank, problem: format!("its account does not parse: {error}") })
    };
    (0..).zip(all).map(parse).collect()
}

/// The condition of all who hold the state, which must be one and the same.
fn agree(accounts: &[Option<Account>], step: u64) -> Result<Condition> {
    let mut conditions =
        (0..).zip(accounts).filter_map(|(rank, account)| Some((rank, account.as_ref()?.condition.clone())));
    let none = || Error::StateLost { problem: format!("no rank has the state of step {step}") };
    let (first, condition) = conditions.next().ok_or_else(none)?;
    if condition.step != step {
        let problem = format!("it stands at step {}, not {step}", condition.step);
        return Err(Error::Healing { rank: first, problem });
    }
    match conditions.find(|(_, other)| *other != condition) {
        Some((rank, other)) => {
            let problem = format!("its state is {other:?}, that of rank {first} {condition:?}");
            Err(Error::Healing { rank, problem })
        }
        None => Ok(condition),
    }
}

/// What has to be sent, in an order that is the same on all ranks.
fn plan(accounts: &[Option<Account>], shards: &Shards) -> Result<Vec<Transfer>> {
    let world_size = shards.world_size();
    let wanted: Vec<Vec<Range<usize>>> = (0..world_size).map(|rank| shards.parts(rank)).collect();
    let held = accounts.iter().flatten().flat_map(|account| &account.state);
    let mut bounds: Vec<usize> = held.chain(wanted.iter().flatten()).flat_map(|part| [part.start, part.end]).collect();
    bounds.extend([0, shards.elements()]);
    bounds.sort_unstable();
    bounds.dedup();
    let mut transfers = Vec::new();
    for (turn, bound) in bounds.windows(2).enumerate() {
        let range = bound[0]..bound[1];
        let ranks = |has: &dyn Fn(&Account) -> bool| -> (Vec<u32>, Vec<u32>) {
            (0..world_size).partition(|&rank| accounts[rank as usize].as_ref().is_some_and(has))
        };
        let (givers, mut takers) = ranks(&|account| account.has_state(&range));
        if givers.is_empty() {
            let problem = format!("all who held the optimizer's state of elements {range:?} are gone");
            return Err(Error::StateLost { problem });
        }
        takers.retain(|&rank| covers(&wanted[rank as usize], &range));
        let mut add = |goods, givers: &[u32], takers: Vec<u32>| {
            if !takers.is_empty() {
                // By turns, so that nobody has to send everything.
                let from = givers[turn % givers.len()];
                transfers.push(Transfer { goods, range: range.clone(), from, to: takers });
            }
        };
        add(Goods::State, &givers, takers);
        let (givers, takers) = ranks(&|account| account.has_weights(&range));
        add(Goods::Weights, &givers, takers);
    }
    Ok(transfers)
}

/// Holds what this rank has in the new division, beside what it held, and carries out its transfers.
fn fill(
    collective: &mut Collective,
    replica: &mut Replica,
    shards: &Shards,
    step: u64,
    transfers: &[Transfer],
) -> Result<()> {
    let rank = collective.rank();
    let wanted = shards.parts(rank);
    wanted.iter().try_for_each(|part| replica.optimizer_mut().hold(part.clone()))?;
    for transfer in transfers.iter().filter(|transfer| transfer.from == rank || transfer.to.contains(&rank)) {
        match transfer.goods {
            Goods::Weights => pass_weights(collective, replica, step, transfer)?,
            Goods::State => pass_state(collective, replica, step, transfer, &wanted)?,
        }
    }
    Ok(())
}

fn pass_weights(collective: &mut Collective, replica: &mut Replica, step: u64, transfer: &Transfer) -> Result<()> {
    let range = transfer.range.clone();
    if transfer.from == collective.rank() {
        return send(collective, step, transfer, range, |range, values| {
            Ok(replica.master().view().columns(range).read(values)?)
        });
    }
    receive(collective, step, transfer, range.clone(), |range, values| {
        Ok(replica.master_mut().columns(range).write(values)?)
    })?
    .verify(range, |range, values| Ok(replica.master().view().columns(range).read(values)?))
}

fn pass_state(
    collective: &mut Collective,
    replica: &mut Replica,
    step: u64,
    transfer: &Transfer,
    wanted: &[Range<usize>],
) -> Result<()> {
    let gives = transfer.from == collective.rank();
    let optimizer = replica.optimizer_mut();
    if gives && !optimizer.holds(&transfer.range) {
        // It can be made from where the state began; `settle` gives it up again.
        optimizer.hold(transfer.range.clone())?;
    }
    for (tensor, extent) in optimizer.extents(&transfer.range).into_iter().enumerate() {
        if gives {
            send(collective, step, transfer, extent, |extent, values| optimizer.read(tensor, extent, values))?;
            continue;
        }
        let part = wanted.iter().find(|part| covers(std::slice::from_ref(part), &transfer.range));
        let part = part.expect("what is sent to a rank is what it wants");
        receive(collective, step, transfer, extent.clone(), |extent, values| {
            optimizer.write(part, tensor, extent, values)
        })?
        .verify(extent, |extent, values| optimizer.read(tensor, extent, values))?;
    }
    Ok(())
}

/// A copy of the whole optimizer state in rank 0's host memory; the others get none. All ranks take part, but where every
/// rank holds everything.
///
/// # Errors
/// Memory; those of the mesh.
pub fn gather_state(
    collective: &mut Collective,
    replica: &Replica,
    shards: &Shards,
    step: u64,
) -> Result<Option<Part>> {
    let (rank, optimizer) = (collective.rank(), replica.optimizer());
    // A pool of its own, so that the memory is given back with it.
    let host = Device::cpu();
    let mut whole = if rank == 0 { Some(optimizer.copy(&host, 0..shards.elements())?) } else { None };
    for (owner, slice) in (0..).zip(shards.slices()) {
        if shards.holds(0, owner) || slice.is_empty() || ![0, owner].contains(&rank) {
            continue;
        }
        let transfer = Transfer { goods: Goods::State, range: slice.clone(), from: owner, to: vec![0] };
        for (tensor, extent) in optimizer.extents(slice).into_iter().enumerate() {
            match &mut whole {
                None => {
                    send(collective, step, &transfer, extent, |extent, values| optimizer.read(tensor, extent, values))?
                }
                Some(whole) => receive(collective, step, &transfer, extent.clone(), |extent, values| {
                    Ok(whole.tensors[tensor].view_mut().columns(extent).write(values)?)
                })?
                .verify(extent, |extent, values| Ok(whole.tensors[tensor].view().columns(extent).read(values)?))?,
            }
        }
    }
    Ok(whole)
}
