//! Sums over the GPUs of several processes, by NCCL, beside what the GPU computes.
//!
//! One thread owns the communicator and makes every call of NCCL's. None of them waits: it looks again and again at the
//! state of the call, at the stream, at the clock and at whether the work was declared void, and aborts the communicator
//! when one of them says so. An abort can hang where a GPU does; then the thread is left behind, and the process has to
//! end.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::nccl::{Handle, Nccl, UniqueId};
use super::{Driver, Gpu, cuda};
use crate::{DType, Error, Result, ViewMut};

/// How long NCCL may take to abort.
const ABORT_LIMIT: Duration = Duration::from_secs(30);
/// Between looks at the state of a call: longer as time passes, for what is waited for long is not urgent.
const PAUSE_MIN: Duration = Duration::from_micros(10);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// A rank's place in a communicator.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub id: UniqueId,
    pub rank: u32,
    pub world_size: u32,
}

/// The longest waits for the other ranks.
#[derive(Clone, Copy, Debug)]
pub struct WaitLimits {
    /// Until all have met.
    pub meeting: Duration,
    /// In a sum, until all have their part of it.
    pub sum: Duration,
}

/// When to give up waiting.
#[derive(Clone)]
pub struct Patience {
    pub limits: WaitLimits,
    /// Whether the work has become void.
    pub is_void: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// A rank of a group whose GPUs add up.
pub struct Communicator {
    gpu: Gpu,
    patience: Patience,
    /// Nobody waits for anything any more.
    abandoned: Arc<AtomicBool>,
    /// Absent when nothing is to be asked of the owner any more.
    commands: Option<Sender<Command>>,
    answers: Receiver<Result<()>>,
    owner: Option<thread::JoinHandle<()>>,
    /// Of what does not wait, for [`Communicator::wait`] to tell.
    failure: Option<Error>,
}

enum Command {
    Reduce(Span),
    /// Answer when all is done.
    Wait,
}

/// Numbers of type f32 in the GPU's memory, final when the event has come.
struct Span {
    address: usize,
    count: usize,
    after: Option<cuda::Event>,
}

impl Communicator {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`Error::PeersLost`] if they do not come in time, [`Error::Void`].
    pub fn join(gpu: &Gpu, nccl: Nccl, place: Place, patience: Patience) -> Result<Self> {
        assert!(place.rank < place.world_size, "rank {} of {}", place.rank, place.world_size);
        let (commands, received) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let abandoned = Arc::new(AtomicBool::new(false));
        let (its_gpu, its_patience, its_abandoned) = (gpu.clone(), patience.clone(), abandoned.clone());
        let owner = thread::Builder::new().name("nccl".to_string()).spawn(move || {
            match Owner::join(its_gpu, nccl, place, its_patience, its_abandoned) {
                Ok(owner) => owner.serve(&received, &answer),
                Err(error) => drop(answer.send(Err(error))),
            }
        });
        let owner = owner.map_err(|error| Error::Nccl { action: "starting its thread", reason: error.to_string() })?;
        let (gpu, owner) = (gpu.clone(), Some(owner));
        let commands = Some(commands);
        let mut communicator =
            Communicator { gpu, patience: patience.clone(), abandoned, commands, answers, owner, failure: None };
        communicator.answer(patience.limits.meeting)?;
        Ok(communicator)
    }

    /// Adds up a range of f32 over all ranks, in place, after what was launched before and beside what is launched from
    /// now on. Does not wait, and leaves failures to [`Communicator::wait`]. All ranks give the same ranges in the same
    /// order.
    ///
    /// # Safety
    /// Until [`Communicator::wait`] has returned, or the communicator is dropped, the memory stays, and nothing else reads
    /// or writes these elements.
    pub unsafe fn all_reduce(&mut self, values: ViewMut) {
        assert_eq!((values.dtype(), values.rows()), (DType::F32, 1), "a flat range of f32");
        let after = match &*self.gpu.driver {
            Driver::Cuda(cuda) => match cuda.record() {
                Ok(event) => Some(event),
                Err(error) => {
                    self.failure.get_or_insert(error);
                    return;
                }
            },
            // Launches have run when they return.
            Driver::Emulated(_) => None,
        };
        let span = Span { address: values.address(), count: values.cols(), after };
        // An owner that is gone has left its reason among the answers.
        let _ = self.commands.as_ref().map(|commands| commands.send(Command::Reduce(span)));
    }

    /// Waits until everything so far is summed.
    ///
    /// # Errors
    /// [`Error::PeersLost`] or [`Error::Void`], after which this rank is well but the communicator is of no more use, and
    /// the numbers are undefined; others where this rank itself is not well.
    pub fn wait(&mut self) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let _ = self.commands.as_ref().map(|commands| commands.send(Command::Wait));
        self.answer(self.patience.limits.sum)
    }

    /// What the owner says, who keeps to the same limit; unless it hangs.
    fn answer(&mut self, limit: Duration) -> Result<()> {
        let mut given_up: Option<Instant> = None;
        let started = Instant::now();
        loop {
            match self.answers.recv_timeout(ABORT_LIMIT / 100) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::PeersLost { problem: "the communicator has failed before".to_string() });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if started.elapsed() > limit || (self.patience.is_void)() {
                let since = *given_up.get_or_insert_with(Instant::now);
                if since.elapsed() > ABORT_LIMIT {
                    // It holds what it uses of the GPU; nothing of that may be given back under it.
                    self.owner = None;
                    let reason = "it hangs; this process has to end".to_string();
                    return Err(Error::Nccl { action: "ncclCommAbort", reason });
                }
            }
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.commands = None;
        let Some(owner) = self.owner.take() else { return };
        let started = Instant::now();
        while !owner.is_finished() {
            if started.elapsed() > ABORT_LIMIT {
                return;
            }
            thread::sleep(PAUSE_MAX);
        }
        // What it had to say, it has said.
        let _ = owner.join();
    }
}

/// Who makes the calls.
struct Owner {
    gpu: Gpu,
    nccl: Nccl,
    handle: Handle,
    /// None where the device is emulated: there, what NCCL does not call in progress is done.
    stream: Option<cuda::SideStream>,
    patience: Patience,
    abandoned: Arc<AtomicBool>,
}

impl Owner {
    fn join(gpu: Gpu, nccl: Nccl, place: Place, patience: Patience, abandoned: Arc<AtomicBool>) -> Result<Self> {
        let stream = match &*gpu.driver {
            // Leaves the context current in this thread.
            Driver::Cuda(cuda) => Some(cuda.side_stream()?),
            Driver::Emulated(_) => None,
        };
        // SAFETY: see above.
        let handle = unsafe { nccl.begin(place.id, place.rank, place.world_size)? };
        let owner = Owner { gpu, nccl, handle, stream, patience: patience.clone(), abandoned };
        owner.settle("meeting the other ranks", patience.limits.meeting, Owner::is_settled)?;
        Ok(owner)
    }

    /// Obeys until nobody commands any more, or something fails.
    fn serve(self, commands: &Receiver<Command>, answer: &Sender<Result<()>>) {
        let mut answered = answer.send(Ok(()));
        for command in commands {
            let outcome = match command {
                Command::Reduce(span) => self.reduce(&span),
                Command::Wait => self
                    .settle("the sum over the ranks", self.patience.limits.sum, Owner::is_done)
                    .inspect(|()| answered = answer.send(Ok(()))),
            };
            if let Err(error) = outcome {
                // Ends what the GPU does before anybody hears of the failure and uses its memory otherwise.
                drop(self);
                answered = answer.send(Err(error));
                break;
            }
        }
        // Who does not listen any more has no use for an answer.
        let _ = answered;
    }

    fn reduce(&self, span: &Span) -> Result<()> {
        if let (Driver::Cuda(cuda), Some(stream), Some(event)) = (&*self.gpu.driver, &self.stream, &span.after) {
            cuda.hold(stream, event)?;
        }
        let stream: *mut c_void = self.stream.as_ref().map_or(std::ptr::null_mut(), cuda::SideStream::as_ptr);
        // SAFETY: the communicator stands; for the numbers, the caller of `all_reduce` has promised it.
        unsafe { self.nccl.all_reduce(self.handle, span.address, span.count, stream)? };
        // The next call may only come after this one.
        self.settle("beginning a sum over the ranks", self.patience.limits.sum, Owner::is_settled)
    }

    fn is_settled(&self) -> Result<bool> {
        // SAFETY: the handle is used until it is aborted in `drop`.
        unsafe { self.nccl.is_settled(self.handle) }
    }

    fn is_done(&self) -> Result<bool> {
        let is_idle = match (&*self.gpu.driver, &self.stream) {
            (Driver::Cuda(cuda), Some(stream)) => cuda.is_idle(stream)?,
            _ => true,
        };
        // Asked last: a stream is idle too when an error has ended what was in it.
        Ok(self.is_settled()? && is_idle)
    }

    /// Waits for something; `action` is for people.
    fn settle(&self, action: &str, limit: Duration, is_so: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let (started, mut pause) = (Instant::now(), PAUSE_MIN);
        loop {
            let is_void = || self.abandoned.load(Ordering::SeqCst) || (self.patience.is_void)();
            match is_so(self) {
                Ok(true) => return Ok(()),
                // What fails as peers leave is mostly that they have left.
                _ if is_void() => return Err(Error::Void),
                Ok(false) => {}
                Err(error) => return Err(error),
            }
            let elapsed = started.elapsed();
            if elapsed > limit {
                let problem = format!("{action}: nothing from the other ranks for {:.1} s", elapsed.as_secs_f64());
                return Err(Error::PeersLost { problem });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: the handle came from `begin`, and this is its last use.
        unsafe { self.nccl.abort(self.handle) }
    }
}

/// Ranks as threads, with emulated GPUs and the stand-in for NCCL of tests/fake_cuda.
#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command as Process;
    use std::sync::{Barrier, OnceLock};

    use super::*;
    use crate::driver::libraries::Wanted;
    use crate::{Device, SearchPath, Tensor};

    const PATIENT: Duration = Duration::from_secs(60);

    /// The stand-in; nothing if it cannot be built, and then tests are skipped.
    fn stand_in() -> Option<Nccl> {
        static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
        let build = || {
            let folder = std::env::current_exe().unwrap().parent().unwrap().join("fake_nccl");
            fs::create_dir_all(&folder).unwrap();
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_cuda/nccl.c");
            let unfinished = folder.join(format!("{}.so", std::process::id()));
            let mut command = Process::new("cc");
            command.args(["-shared", "-fPIC", "-O1", "-pthread", "-fvisibility=hidden", source, "-o"]).arg(&unfinished);
            if !command.status().is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: there is no C compiler `cc` to make a stand-in for NCCL with");
                return None;
            }
            fs::rename(unfinished, folder.join("libnccl_emulated.so")).unwrap();
            Some(folder)
        };
        let folder = FOLDER.get_or_init(build).clone()?;
        let path = SearchPath { libraries: vec![folder], ..SearchPath::default() };
        Some(Nccl::load(&Wanted::emulated_nccl(), &path).unwrap())
    }

    struct Rank {
        rank: u32,
        communicator: Communicator,
        device: Device,
    }

    impl Rank {
        /// Element `index` is `f(index)`.
        fn numbers(&self, count: usize, f: impl Fn(usize) -> f32) -> Tensor {
            self.device.upload(&(0..count).map(f).collect::<Vec<_>>(), 1, count).unwrap()
        }

        /// Sums pieces of a tensor, which nobody uses before `wait`.
        fn reduce(&mut self, tensor: &mut Tensor, piece: usize) {
            let count = tensor.cols();
            for start in (0..count).step_by(piece).collect::<Vec<_>>().into_iter().rev() {
                let range = tensor.view_mut().reshape(start, 1, piece.min(count - start));
                // SAFETY: the tests wait or drop the communicator before they use or drop the tensor.
                unsafe { self.communicator.all_reduce(range) };
            }
        }
    }

    /// Runs `body` as every rank of a communicator.
    fn on_ranks<T: Send>(
        world_size: u32,
        limit: Duration,
        is_void: impl Fn(u32) -> bool + Clone + Send + Sync + 'static,
        body: impl Fn(Rank) -> T + Sync,
    ) -> Vec<T> {
        let Some(nccl) = stand_in() else { return Vec::new() };
        let id = nccl.unique_id().unwrap();
        thread::scope(|scope| {
            let start = |rank| {
                let (body, is_void) = (&body, is_void.clone());
                scope.spawn(move || {
                    let device = Device::emulated(0).unwrap();
                    let Device::Gpu(gpu) = &device else { unreachable!() };
                    let limits = WaitLimits { meeting: PATIENT, sum: limit };
                    let patience = Patience { limits, is_void: Arc::new(move || is_void(rank)) };
                    let communicator = Communicator::join(gpu, nccl, Place { id, rank, world_size }, patience).unwrap();
                    body(Rank { rank, communicator, device })
                })
            };
            let ranks: Vec<_> = (0..world_size).map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_add_up_piece_by_piece_again_and_again() {
        for world_size in [1, 2, 4] {
            on_ranks(
                world_size,
                PATIENT,
                |_| false,
                |mut rank| {
                    let mut tensor = rank.numbers(10_000, |index| (index % 100) as f32 + rank.rank as f32);
                    for round in 0..20 {
                        rank.reduce(&mut tensor, 900 + round);
                        rank.communicator.wait().unwrap();
                        let sums = tensor.download::<f32>().unwrap();
                        let expected = |index: usize| {
                            let ranks = world_size as f32;
                            ranks * (index % 100) as f32 + ranks * (ranks - 1.0) / 2.0
                        };
                        assert!(sums.iter().enumerate().all(|(index, &sum)| sum == expected(index)), "{sums:?}");
                        tensor = rank.numbers(10_000, |index| (index % 100) as f32 + rank.rank as f32);
                    }
                },
            );
        }
    }

    #[test]
    fn a_rank_that_leaves_is_a_failure_of_peers() {
        on_ranks(
            3,
            PATIENT,
            |_| false,
            |mut rank| {
                let mut tensor = rank.numbers(1000, |_| 1.0);
                if rank.rank == 1 {
                    return;
                }
                rank.reduce(&mut tensor, 100);
                let error = rank.communicator.wait().unwrap_err();
                assert!(matches!(error, Error::PeersLost { .. }), "{error}");
                assert!(error.to_string().contains("network error"), "{error}");
                assert!(matches!(rank.communicator.wait(), Err(Error::PeersLost { .. })), "of no more use");
            },
        );
    }

    #[test]
    fn a_rank_that_does_not_come_is_waited_for_no_longer_than_allowed() {
        let barrier = Barrier::new(2);
        let limit = Duration::from_millis(50);
        on_ranks(
            2,
            limit,
            |_| false,
            |mut rank| {
                let mut tensor = rank.numbers(1000, |_| 1.0);
                if rank.rank == 0 {
                    rank.reduce(&mut tensor, 1000);
                    let error = rank.communicator.wait().unwrap_err();
                    assert!(matches!(error, Error::PeersLost { .. }), "{error}");
                    assert!(error.to_string().contains("nothing from the other ranks"), "{error}");
                }
                barrier.wait();
            },
        );
    }

    #[test]
    fn who_is_told_that_the_work_is_void_returns() {
        let (barrier, void) = (Barrier::new(2), Arc::new(AtomicBool::new(false)));
        let its_void = void.clone();
        on_ranks(
            2,
            PATIENT,
            move |rank| rank == 0 && its_void.load(Ordering::SeqCst),
            |mut rank| {
                let mut tensor = rank.numbers(1000, |_| 1.0);
                if rank.rank == 0 {
                    rank.reduce(&mut tensor, 1000);
                    void.store(true, Ordering::SeqCst);
                    assert!(matches!(rank.communicator.wait(), Err(Error::Void)));
                }
                barrier.wait();
            },
        );
    }

    #[test]
    fn what_is_under_way_ends_with_the_communicator() {
        let barrier = Barrier::new(2);
        on_ranks(
            2,
            PATIENT,
            |_| false,
            |mut rank| {
                let mut tensor = rank.numbers(1000, |_| 1.0);
                if rank.rank == 0 {
                    rank.reduce(&mut tensor, 10);
                    let started = Instant::now();
                    drop(rank.communicator);
                    assert!(started.elapsed() < PATIENT / 2);
                }
                barrier.wait();
            },
        );
    }

    #[test]
    fn ranks_that_sum_different_ranges_are_told() {
        on_ranks(
            2,
            PATIENT,
            |_| false,
            |mut rank| {
                let mut tensor = rank.numbers(1000, |_| 1.0);
                rank.reduce(&mut tensor, 400 + rank.rank as usize);
                assert!(rank.communicator.wait().is_err());
            },
        );
    }

    #[test]
    fn who_waits_for_absent_ranks_gives_up() {
        let Some(nccl) = stand_in() else { return };
        let Device::Gpu(gpu) = Device::emulated(0).unwrap() else { unreachable!() };
        let place = Place { id: nccl.unique_id().unwrap(), rank: 0, world_size: 2 };
        let patience = |meeting, is_void| Patience {
            limits: WaitLimits { meeting, sum: PATIENT },
            is_void: Arc::new(move || is_void),
        };
        let error = Communicator::join(&gpu, nccl, place, patience(Duration::from_millis(30), false)).err().unwrap();
        assert!(error.to_string().contains("meeting the other ranks"), "{error}");
        let place = Place { id: nccl.unique_id().unwrap(), ..place };
        let error = Communicator::join(&gpu, nccl, place, patience(PATIENT, true)).err().unwrap();
        assert!(matches!(error, Error::Void), "{error}");
    }
}
