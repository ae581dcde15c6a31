//! Ranks that come and go, on real meshes, against one that has everything and is always there.

use std::sync::Mutex;

use quintet_kernels::{DType, Tensor};
use quintet_t5::{Config, Model};

use super::*;
use crate::collective::tests::on_mesh;
use crate::config::{Precision, TrainingConfig};
use crate::optimizer::ClippedMean;
use crate::replica::Update;

/// Of six blocks and a bit.
fn replica() -> Replica {
    let config =
        Config { vocab_size: 2000, d_model: 64, d_kv: 16, d_ff: 128, num_heads: 4, num_layers: 1, ..Config::default() };
    let model = Model::new(&Device::cpu(), config).unwrap();
    let mut master = model.zero_parameters(DType::F32).unwrap();
    quintet_t5::initialize(model.config(), 1, &mut master).unwrap();
    Replica::new(model, master, None, &TrainingConfig::default(), Precision::Fp32, 100, 10).unwrap()
}

/// The sum of a step's gradients.
fn gradient(replica: &Replica, step: u64) -> Tensor {
    let value = |index: usize| ((index as u64 + 1).wrapping_mul(step * 0x9e37_79b9_7f4a_7c15) >> 40) as f32 - 8e6;
    let values: Vec<f32> = (0..replica.master().layout().len()).map(value).collect();
    Device::cpu().upload(&values, 1, values.len()).unwrap()
}

fn update(replica: &mut Replica, step: u64) {
    let mean = Update::Apply(ClippedMean { norm: 1.0, scale: 1e-7 });
    replica.update(step, gradient(replica, step).view(), mean).unwrap();
}

/// All of the optimizer's state, as numbers.
fn numbers(part: &Part) -> Vec<Vec<f32>> {
    part.tensors.iter().map(|tensor| tensor.as_slice::<f32>().to_vec()).collect()
}

/// A run: one rank that is always there and alone, and others.
struct Run {
    alone: Replica,
    /// Of the others, and whether each has the state of the step.
    ranks: Vec<(Replica, bool)>,
}

impl Run {
    fn new(world_size: usize) -> Self {
        let mut alone = replica();
        alone.hold_all().unwrap();
        Run { alone, ranks: (0..world_size).map(|_| (replica(), true)).collect() }
    }

    /// Lets `body` run as each rank; it answers whether the rank has the state.
    fn on_ranks(
        &mut self,
        body: impl Fn(&mut Collective, &mut Replica, &Shards, bool) -> Result<bool> + Sync,
    ) -> Vec<bool> {
        let world_size = self.ranks.len() as u32;
        let elements = self.alone.master().layout().len();
        let shards = Shards::sharded(elements, world_size);
        let ranks: Vec<_> = self.ranks.drain(..).map(|rank| Mutex::new(Some(rank))).collect();
        let (ranks, outcomes) = on_mesh(world_size, |rank, mut collective| {
            let (mut replica, holds) = ranks[rank as usize].lock().unwrap().take().unwrap();
            let outcome = body(&mut collective, &mut replica, &shards, holds);
            ((replica, *outcome.as_ref().unwrap_or(&holds)), outcome.is_ok())
        })
        .into_iter()
        .unzip();
        self.ranks = ranks;
        outcomes
    }

    /// A new generation: all are given what they lack.
    #[track_caller]
    fn meet(&mut self) {
        let step = self.alone.step();
        let met = self.on_ranks(|collective, replica, shards, holds| {
            heal(collective, replica, shards, step, holds)?;
            settle(collective, replica, shards, step)?;
            assert_eq!(replica.optimizer().held(), shards.parts(collective.rank()));
            Ok(true)
        });
        assert!(met.iter().all(|&met| met));
        self.check();
    }

    /// Takes a step; the weights that others update are brought, or not.
    fn step(&mut self, complete: bool) {
        let step = self.alone.step() + 1;
        update(&mut self.alone, step);
        self.on_ranks(|collective, replica, shards, holds| {
            update(replica, step);
            if complete {
                replica.complete(collective, shards)?;
            }
            assert_eq!(replica.is_whole(), complete || shards.is_replicated());
            Ok(holds)
        });
    }

    /// Everybody has the weights of the one that was always there, and together they have its state.
    #[track_caller]
    fn check(&mut self) {
        let step = self.alone.step();
        let digest = self.alone.digest().unwrap();
        let elements = self.alone.master().layout().len();
        let expected = numbers(&self.alone.optimizer().copy(&Device::cpu(), 0..elements).unwrap());
        let checked = self.on_ranks(|collective, replica, shards, _| {
            assert!(replica.digest().unwrap() == digest, "the weights of rank {}", collective.rank());
            assert_eq!((replica.step(), replica.optimizer().steps()), (step, step));
            let whole = gather_state(collective, replica, shards, step)?;
            assert_eq!(whole.is_some(), collective.rank() == 0);
            assert!(whole.is_none_or(|whole| numbers(&whole) == expected), "the optimizer's state");
            Ok(true)
        });
        assert!(checked.iter().all(|&checked| checked));
    }

    fn lose(&mut self, rank: usize) {
        drop(self.ranks.remove(rank));
    }

    fn join(&mut self) {
        let mut newcomer = replica();
        newcomer.forget();
        self.ranks.push((newcomer, false));
    }
}

#[test]
fn ranks_come_and_go_and_the_state_stays() {
    for complete in [true, false] {
        let mut run = Run::new(4);
        run.meet();
        run.step(true);
        run.check();
        for lost in [0, 2, 3] {
            run.step(complete);
            run.lose(lost);
            run.meet();
            run.step(complete);
            run.join();
            run.meet();
        }
        // Two that are no neighbours, and more newcomers than there are others.
        run.step(complete);
        run.lose(3);
        run.lose(1);
        (0..3).for_each(|_| run.join());
        run.meet();
        run.step(true);
        run.check();
        // Down to one, and up again.
        while run.ranks.len() > 1 {
            run.step(complete);
            run.lose(0);
            run.meet();
        }
        run.step(true);
        run.join();
        run.meet();
    }
}

#[test]
fn two_neighbours_take_the_state_of_a_slice_along() {
    let mut run = Run::new(4);
    run.meet();
    run.step(false);
    run.lose(2);
    run.lose(1);
    run.join();
    let step = run.alone.step();
    let outcomes = run.on_ranks(|collective, replica, shards, holds| {
        let before = replica.optimizer().held();
        let error = heal(collective, replica, shards, step, holds).unwrap_err();
        assert!(matches!(error, Error::StateLost { .. }) && !error.is_peer_failure(), "{error}");
        assert_eq!(replica.optimizer().held(), before);
        Err(error)
    });
    assert_eq!(outcomes, [false; 3]);
}

/// The first to begin again from where a state began can make any part of it.
#[test]
fn at_the_start_everybody_has_everything() {
    let mut run = Run::new(3);
    run.meet();
    run.lose(2);
    run.lose(1);
    run.join();
    run.meet();
    run.step(true);
    run.check();
}

#[test]
fn a_death_before_all_have_settled_leaves_both_divisions() {
    let mut run = Run::new(3);
    run.meet();
    run.step(true);
    run.lose(0);
    let step = run.alone.step();
    // The second has all it needs and is gone before it says so.
    let settled = run.on_ranks(|collective, replica, shards, holds| {
        heal(collective, replica, shards, step, holds)?;
        if collective.rank() == 1 {
            return Err(Error::Interrupted);
        }
        settle(collective, replica, shards, step)?;
        Ok(true)
    });
    assert_eq!(settled, [false; 2]);
    run.lose(1);
    run.meet();
    run.step(true);
    run.check();
}
