//! Tokenized micro-batches, made ahead of time on background threads.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::classes::Classes;
use crate::dataset::{At, Dataset};
use crate::error::Result;
use crate::order::Order;
use crate::tokenizer::Tokenizer;

/// Packed batches that wait to be taken, per thread: enough to smooth over uneven lengths, little enough to forget.
const AHEAD_PER_THREAD: u64 = 4;

/// The longest texts in tokens, end of sequence included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of an input.
    pub max_source_length: usize,
    /// Of a target.
    pub max_target_length: usize,
}

/// The tokens of a micro-batch of B examples, concatenated without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// The epoch it was packed for.
    pub epoch: u64,
    /// The positions of that epoch's order; B of them.
    pub positions: Range<u64>,
    /// The tokens of all inputs, each with its end of sequence.
    pub source_ids: Vec<u32>,
    /// `[B + 1]`: input b is `source_ids[source_offsets[b]..source_offsets[b + 1]]`.
    pub source_offsets: Vec<u32>,
    /// The tokens of all targets, each with its end of sequence: the labels. Or, of each example, its class.
    pub target_ids: Vec<u32>,
    /// `[B + 1]`: target b is `target_ids[target_offsets[b]..target_offsets[b + 1]]`.
    pub target_offsets: Vec<u32>,
}

/// Turns positions into tokens.
#[derive(Clone, Debug)]
pub struct Packer {
    dataset: Arc<Dataset>,
    tokenizer: Arc<Tokenizer>,
    order: Order,
    limits: Limits,
    classes: Option<Arc<Classes>>,
}

impl Packer {
    /// # Panics
    /// When `order` is of another number of examples than `dataset`.
    pub fn new(dataset: Arc<Dataset>, tokenizer: Arc<Tokenizer>, order: Order, limits: Limits) -> Self {
        assert_eq!(order.examples(), dataset.len(), "the order must be of this dataset");
        Self { dataset, tokenizer, order, limits, classes: None }
    }

    /// Packs, as an example's target, the number of its class instead of tokens.
    #[must_use]
    pub fn with_classes(self, classes: Arc<Classes>) -> Self {
        Self { classes: Some(classes), ..self }
    }

    /// The tokens of the examples at `positions` of `epoch`.
    ///
    /// # Errors
    /// The tokenizer fails on a text, or another machine that has the texts; a target is no class.
    ///
    /// # Panics
    /// When a position lies beyond the dataset.
    pub fn pack(&self, epoch: u64, positions: Range<u64>) -> Result<PackedBatch> {
        let mut batch = PackedBatch {
            epoch,
            positions: positions.clone(),
            source_offsets: vec![0],
            target_offsets: vec![0],
            ..PackedBatch::default()
        };
        let indices: Vec<u64> = positions.clone().map(|position| self.order.example(epoch, position)).collect();
        let dataset = self.dataset.gathered(&indices)?;
        for (position, index) in positions.zip(indices) {
            let at = At { epoch, position, index };
            let targets = batch.target_ids.len();
            let PackedBatch { source_ids, target_ids, .. } = &mut batch;
            dataset.encode(at, &self.tokenizer, self.limits, source_ids, target_ids)?;
            if let Some(classes) = &self.classes {
                // In the place of its tokens.
                target_ids.truncate(targets);
                target_ids.push(classes.id_in(&dataset, index)?);
            }
            batch.source_offsets.push(offset(batch.source_ids.len()));
            batch.target_offsets.push(offset(batch.target_ids.len()));
        }
        Ok(batch)
    }
}

fn offset(tokens: usize) -> u32 {
    u32::try_from(tokens).expect("a micro-batch of more than 4 billion tokens fits no memory")
}

/// Packs requested batches on background threads and hands them out in the order of the requests. However many are
/// requested, only a bounded number is packed ahead of [`Loader::next`].
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    packer: Packer,
    /// Batches that may be packed or in the making but not taken.
    ahead_max: u64,
    state: Mutex<State>,
    /// Something to pack, or the end.
    work: Condvar,
    /// Something packed.
    ready: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that no thread has begun, numbered in order.
    queue: VecDeque<Request>,
    /// Packed and not taken, by number. The outer error is a panic's payload, which `next` passes on.
    packed: BTreeMap<u64, thread::Result<Result<PackedBatch>>>,
    /// The number of the next request.
    next_request: u64,
    /// The number that `next` hands out next; what is below it has been taken or cleared.
    next_taken: u64,
    ended: bool,
}

#[derive(Debug)]
struct Request {
    number: u64,
    epoch: u64,
    positions: Range<u64>,
}

impl Loader {
    /// Starts `threads` background threads (at least one).
    pub fn new(packer: Packer, threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            packer,
            ahead_max: AHEAD_PER_THREAD * threads as u64,
            state: Mutex::default(),
            work: Condvar::new(),
            ready: Condvar::new(),
        });
        let threads = (0..threads)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.run())
            })
            .collect();
        Self { shared, threads }
    }

    /// Asks for the examples at `positions` of `epoch`; does not wait.
    pub fn request(&mut self, epoch: u64, positions: Range<u64>) {
        let mut state = self.shared.lock();
        let number = state.next_request;
        state.next_request += 1;
        state.queue.push_back(Request { number, epoch, positions });
        drop(state);
        self.shared.work.notify_one();
    }

    /// The batch of the earliest request not yet answered; waits for it.
    ///
    /// # Errors
    /// The tokenizer fails on a text.
    ///
    /// # Panics
    /// When nothing is requested: it would wait for ever.
    #[allow(clippy::should_implement_trait, reason = "an iterator ends; this is asked for exactly what was requested")]
    pub fn next(&mut self) -> Result<PackedBatch> {
        let mut state = self.shared.lock();
        assert!(state.next_taken < state.next_request, "nothing was requested from the loader");
        let number = state.next_taken;
        loop {
            if let Some(result) = state.packed.remove(&number) {
                state.next_taken += 1;
                drop(state);
                // Taking one makes room for another.
                self.shared.work.notify_all();
                return result.unwrap_or_else(|panic| resume_unwind(panic));
            }
            state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Forgets all requests that have not been answered.
    pub fn clear(&mut self) {
        let mut state = self.shared.lock();
        state.queue.clear();
        state.packed.clear();
        state.next_taken = state.next_request;
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // It cannot have panicked: packing is caught.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics between a change of the state and its completion, so a poisoned one is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a background thread does: take the earliest request that is not too far ahead, pack it, repeat.
    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let room = state.next_taken + self.ahead_max;
            let Some(request) = state.queue.pop_front_if(|request| request.number < room) else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let result = catch_unwind(AssertUnwindSafe(|| self.packer.pack(request.epoch, request.positions)));
            state = self.lock();
            // Otherwise it was cleared meanwhile.
            if request.number >= state.next_taken {
                state.packed.insert(request.number, result);
                self.ready.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::SourceList;
    use crate::template::Template;
    use crate::tokenizer::TokenizerSpec;

    const LIMITS: Limits = Limits { max_source_length: 4, max_target_length: 3 };

    fn packer(examples: u64, shuffle: bool) -> Packer {
        let directory = tempfile::tempdir().unwrap();
        let rows: String = (0..examples).map(|x| format!("{x},{}\n", "t".repeat(x as usize % 4))).collect();
        fs::write(directory.path().join("a.csv"), format!("x,y\n{rows}")).unwrap();
        let template = |text| Template::parse(text).unwrap();
        let sources = SourceList::from("a.csv");
        let dataset = Dataset::load(&sources, &template("{x}"), &template("{y}"), None, directory.path()).unwrap();
        let tokenizer = Tokenizer::from_spec(&TokenizerSpec::ByT5, [].into_iter(), None).unwrap();
        Packer::new(Arc::new(dataset), Arc::new(tokenizer), Order::new(examples, 1, shuffle), LIMITS)
    }

    #[test]
    fn packs_without_padding_and_cuts_before_the_end_of_sequence() {
        let batch = packer(5, false).pack(2, 1..4).unwrap();
        let t = u32::from(b't') + 3;
        let digit = |digit: u8| u32::from(digit) + 3;
        assert_eq!(
            batch,
            PackedBatch {
                epoch: 2,
                positions: 1..4,
                source_ids: vec![digit(b'1'), 1, digit(b'2'), 1, digit(b'3'), 1],
                source_offsets: vec![0, 2, 4, 6],
                target_ids: vec![t, 1, t, t, 1, t, t, 1],
                target_offsets: vec![0, 2, 5, 8],
            }
        );
        assert_eq!(packer(5, false).pack(0, 2..2).unwrap().source_offsets, [0]);
    }

    #[test]
    fn packs_classes_in_the_place_of_targets() {
        let names = ["", "tt", "t", "ttt"].map(str::to_owned).to_vec();
        let batch = packer(6, false).with_classes(Arc::new(Classes::new(names))).pack(0, 1..5).unwrap();
        assert_eq!((batch.target_ids, batch.target_offsets), (vec![2, 1, 3, 0], vec![0, 1, 2, 3, 4]));
        let names = vec!["t".to_owned()];
        assert!(packer(6, false).with_classes(Arc::new(Classes::new(names))).pack(0, 1..3).is_err());
    }

    #[test]
    fn answers_in_the_order_of_requests_for_any_number_of_threads() {
        let packer = packer(50, true);
        for threads in [0, 1, 2, 5] {
            let mut loader = Loader::new(packer.clone(), threads);
            // Far more than are packed ahead.
            let requests: Vec<_> = (0..100).map(|k| (k / 10, (k % 10) * 5..(k % 10) * 5 + 5)).collect();
            for (epoch, positions) in requests.iter().cloned() {
                loader.request(epoch, positions);
            }
            for (epoch, positions) in requests {
                assert_eq!(loader.next().unwrap(), packer.pack(epoch, positions).unwrap());
            }
        }
    }

    #[test]
    fn packs_only_a_bounded_number_ahead() {
        let mut loader = Loader::new(packer(50, true), 2);
        for position in 0..50 {
            loader.request(0, position..position + 1);
        }
        // By the time that the third is taken, at most 3 + 8 can have been begun.
        for _ in 0..3 {
            loader.next().unwrap();
        }
        let state = loader.shared.lock();
        assert!(state.queue.front().is_some_and(|request| request.number <= 11), "{:?}", state.queue.front());
        assert!(state.packed.len() <= 8);
    }

    #[test]
    fn clear_forgets_what_was_requested() {
        let packer = packer(50, true);
        let mut loader = Loader::new(packer.clone(), 3);
        for round in 0..20 {
            for position in 0..40 {
                loader.request(round, position..position + 3);
            }
            assert_eq!(loader.next().unwrap(), packer.pack(round, 0..3).unwrap());
            loader.clear();
        }
        loader.request(7, 9..12);
        assert_eq!(loader.next().unwrap(), packer.pack(7, 9..12).unwrap());
    }

    #[test]
    #[should_panic(expected = "position 50 of 50 examples")]
    fn a_panic_while_packing_reaches_the_caller() {
        let mut loader = Loader::new(packer(50, true), 2);
        loader.request(0, 49..51);
        let _ = loader.next();
    }

    #[test]
    #[should_panic(expected = "nothing was requested")]
    fn asking_for_nothing_is_a_bug() {
        let _ = Loader::new(packer(5, true), 1).next();
    }
}
