//! What a rank begins with: its data, and a replica in the state to start with.

use quintet_data::{Catalogue, Classes, Splits, Tokenizer};
use quintet_t5::{Model, Parameters};

use super::RankJob;
use crate::adapter::{Adapter, Base};
use crate::checkpoint::Loaded;
use crate::config::{ModelTask, Precision};
use crate::replica::{self, Replica};
use crate::{Error, Result, task};

/// The run's data: of this machine's files where they are the same, else of the coordinator's.
pub(super) fn load_data(job: &mut RankJob) -> Result<Splits> {
    let why = match Splits::load(&job.data, &job.base_dir, job.training.seed) {
        Ok(splits) if splits.fingerprint() == job.dataset_fingerprint => return Ok(splits),
        Ok(_) => "this machine has other data".to_owned(),
        Err(error) => error.to_string(),
    };
    let catalogue = Catalogue { stores: job.stores.clone(), origin: job.remote.clone() };
    // Which classes there are, all targets tell.
    let whole = job.model.task != ModelTask::Seq2Seq;
    let splits = Splits::fetched(&job.data, &job.base_dir, job.training.seed, &catalogue, whole)?;
    job.through_coordinator.push(format!("reads the data from here ({why})"));
    Ok(splits)
}

/// The replica of a rank, in the state to start with.
pub(super) fn new_replica(
    job: &RankJob,
    tokenizer: &Tokenizer,
    classes: Option<&Classes>,
    total_steps: u64,
) -> Result<Replica> {
    let device = job.device.open()?;
    let seed = job.training.seed;
    let (base, weights) = replica::load_model(&device, &job.model, tokenizer, seed)?;
    let base_fingerprint = job.lora.as_ref().map(|_| weights.digest()).transpose()?;
    let (model, parameters) = task::model_for(classes, base, weights, seed)?;
    let precision = job.training.precision.unwrap_or(Precision::default_on(job.device));
    // A class counts as one token.
    let target_length = classes.map_or(job.data.max_target_length as u64, |_| 1);
    let tokens_max = u64::from(job.training.global_batch_size) * target_length;
    let adapter = open_adapter(job, &model, &parameters, base_fingerprint)?;
    let mut replica = Replica::new(model, parameters, adapter, &job.training, precision, total_steps, tokens_max)?;
    if let Some(start) = job.start.filter(|start| start.step > 0) {
        restore(job, start.step, &mut replica)?;
    }
    Ok(replica)
}

/// What a LoRA run trains; `fingerprint` is that of its base.
fn open_adapter(
    job: &RankJob,
    model: &Model,
    weights: &Parameters,
    fingerprint: Option<blake3::Hash>,
) -> Result<Option<Adapter>> {
    let (Some(lora), Some(fingerprint)) = (&job.lora, fingerprint) else { return Ok(None) };
    let name = job.base_name.clone().unwrap_or_default();
    let base = Base { name, fingerprint: fingerprint.to_hex().to_string() };
    Adapter::open(lora, model, weights, base, job.training.seed).map(Some)
}

/// Takes over the checkpoint that the coordinator resumes from.
fn restore(job: &RankJob, step: u64, replica: &mut Replica) -> Result<()> {
    job.output.with_checkpoint(step, |loaded| restore_from(job, loaded, replica))
}

fn restore_from(job: &RankJob, loaded: Loaded, replica: &mut Replica) -> Result<()> {
    if loaded.progress.job_fingerprint != job.fingerprint {
        let problem = "belongs to a job with other data, model or training settings".to_string();
        return Err(Error::Checkpoint { path: loaded.path, problem });
    }
    let step = loaded.progress.step;
    let optimizer = loaded.optimizer;
    replica.restore(
        step,
        loaded.progress.loss_scaler,
        |name, shape, values| loaded.model.read(name, shape, values),
        Box::new(move |name, shape, range, values| optimizer.read_range(name, shape, range, values)),
    )?;
    if replica.digest()?.to_hex().as_str() != loaded.progress.weights_digest {
        let problem = "holds weights that do not match their digest".to_string();
        return Err(Error::Checkpoint { path: loaded.path, problem });
    }
    Ok(())
}
