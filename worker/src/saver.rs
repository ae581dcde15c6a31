//! Checkpoints beside the training: the state is copied at the end of a step, and another thread writes the copy.

use std::path::Path;
use std::thread::JoinHandle;

use quintet_kernels::{DType, Device, Tensor, View};

use crate::checkpoint::{self, Progress, Snapshot};
use crate::optimizer::{Part, Piece, named};
use crate::outbox::Outbox;
use crate::replica::{Replica, digest_over};
use crate::{Error, Result};

/// A copy of what a replica is, on the host.
pub struct Image {
    /// The master weights, and behind them the optimizer's arenas.
    arenas: Vec<Tensor>,
    model: Vec<Piece>,
    optimizer: Vec<Piece>,
    progress: Progress,
    /// Of a LoRA run.
    base_fingerprint: Option<String>,
}

impl Image {
    /// With the whole of the optimizer's `state`, in the host's memory; `progress` without its digest, which is taken from
    /// the copy.
    ///
    /// # Errors
    /// Memory, or a device's.
    pub fn of(replica: &Replica, state: Part, progress: Progress) -> Result<Self> {
        // A pool of its own, so that the memory is given back with it.
        let host = Device::cpu();
        let view = replica.master().view();
        let mut weights = host.empty(DType::F32, 1, view.cols())?;
        view.read(weights.as_mut_slice::<f32>())?;
        let arenas = std::iter::once(weights).chain(state.tensors).collect();
        let base_fingerprint = replica.adapter().map(|about| about.base.fingerprint.clone());
        let (model, optimizer) = (replica.pieces(), replica.optimizer().pieces());
        Ok(Self { arenas, model, optimizer, progress, base_fingerprint })
    }

    fn save(mut self, directory: &Path) -> Result<()> {
        let views: Vec<View> = self.arenas.iter().map(Tensor::view).collect();
        let weights: &[f32] = views[0].as_slice();
        let digest = digest_over(blake3::hash(bytemuck::cast_slice(weights)), self.base_fingerprint.as_deref());
        self.progress.weights_digest = digest.to_hex().to_string();
        let (model, optimizer) = (named(&self.model, &views[..1]), named(&self.optimizer, &views[1..]));
        checkpoint::save(directory, &Snapshot { progress: self.progress, model: &model, optimizer: &optimizer })?;
        Ok(())
    }
}

/// How often to look whether a checkpoint is written, where there is nothing else to do.
const LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(2);

/// Writes one checkpoint at a time.
pub struct Saver {
    output: Outbox,
    /// So many are kept.
    keep: Option<usize>,
    under_way: Option<(u64, JoinHandle<Result<()>>)>,
}

/// What became of the checkpoint of a step.
pub type Saved = (u64, Result<()>);

impl Saver {
    pub fn new(output: Outbox, keep: Option<usize>) -> Self {
        Self { output, keep, under_way: None }
    }

    /// Begins to write an image. The one before must have been waited for, and that of step `best` is kept.
    ///
    /// # Errors
    /// [`Error::File`] where the system gives no thread.
    pub fn begin(&mut self, step: u64, image: Image, best: Option<u64>) -> Result<()> {
        assert!(self.under_way.is_none(), "one checkpoint at a time");
        let (output, keep) = (self.output.clone(), self.keep);
        let write = move || {
            image.save(&output.checkpoints())?;
            output.publish_checkpoint(step, keep, best)
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
        self.under_way = Some((step, thread.map_err(Error::file("start a thread for", self.output.directory()))?));
        Ok(())
    }

    /// The step whose checkpoint is being written.
    pub fn step(&self) -> Option<u64> {
        self.under_way.as_ref().map(|(step, _)| *step)
    }

    /// What became of the checkpoint under way, if it has ended.
    pub fn poll(&mut self) -> Option<Saved> {
        self.under_way.as_ref().is_some_and(|(_, thread)| thread.is_finished()).then(|| self.wait())?
    }

    /// As [`Saver::wait`], and calls `alive` now and then meanwhile.
    pub fn wait_alive(&mut self, alive: impl Fn()) -> Option<Saved> {
        while self.under_way.as_ref().is_some_and(|(_, thread)| !thread.is_finished()) {
            alive();
            std::thread::sleep(LOOK_INTERVAL);
        }
        self.wait()
    }

    /// What becomes of the checkpoint under way, if there is one.
    pub fn wait(&mut self) -> Option<Saved> {
        let (step, thread) = self.under_way.take()?;
        // A writer that panics is a bug, which is to end this process as it would on this thread.
        Some((step, thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Some((_, thread)) = self.under_way.take() {
            // Nobody is there to be told how it went.
            let _ = thread.join();
        }
    }
}
