//! The life of a rank: joins a generation, computes leases, reduces, commits, and does what the coordinator says is due.
//!
//! One thread computes. What can block it (a collective whose peer died) is interrupted from the session's thread when a
//! newer generation or the end arrives.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quintet_data::{
    DataConfig, Dataset, Loader, PackedBatch, Packer, Schedule as StepSchedule, Splits, Tokenizer, share,
};
use quintet_kernels::{Device, WaitLimits, ops};
use quintet_proto::v1::{Actions, Evaluated, Failed, Finished, Lease, Linked, MicroBatch, NotFinite, Plan};
use quintet_proto::v1::{Ready, Saved, StepDone, StepFailed, Stop};
use quintet_t5::{Generation, Model, Parameters};

use crate::access::Access;
use crate::adapter::Adapter;
use crate::checkpoint::{self, Progress, Snapshot};
use crate::collective::{Collective, Interrupter, Listener, Membership, Mesh};
use crate::config::{EvaluationConfig, LoraConfig, ModelSection, Precision, TrainingConfig};
use crate::evaluation::{self, BatchEvaluation, EvaluationTask};
use crate::gradient::StepGradient;
use crate::output;
use crate::replica::{self, Replica, Update};
use crate::session::{Command, Report, Session};
use crate::{DeviceChoice, Error, Result};

/// What a rank is told about its job.
#[derive(Clone, Debug)]
pub struct RankJob {
    pub model: ModelSection,
    pub lora: Option<LoraConfig>,
    pub data: DataConfig,
    pub training: TrainingConfig,
    pub evaluation: EvaluationConfig,
    pub output_dir: PathBuf,
    /// What relative paths of the job are relative to.
    pub base_dir: PathBuf,
    /// The run's tokenizer, as the coordinator sent it.
    pub tokenizer_json: String,
    pub collective_token: [u8; 32],
    /// By which this rank joined, and proves itself to others.
    pub access: Access,
    pub device: DeviceChoice,
    /// Whether NCCL was told that ranks may share a GPU (`NCCL_MULTI_RANK_GPU_ENABLE=1`).
    pub shares_gpu: bool,
    /// Where other ranks connect to.
    pub listen: SocketAddr,
    /// The committed step whose checkpoint to load; 0 to start afresh.
    pub resume_step: u64,
    /// Of what decides the numbers of a run; a checkpoint of another is refused.
    pub fingerprint: String,
    /// How long a peer may be silent inside a collective: longer than the slowest step lags.
    pub silence_limit: Duration,
}

impl RankJob {
    fn checkpoints(&self) -> PathBuf {
        self.output_dir.join("checkpoints")
    }
}

/// How long the ranks of a generation may take to find each other.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// Tokenization is far cheaper than a step.
const TOKENIZER_THREADS: usize = 1;

/// Serves a run until the coordinator says stop; the exit code and reason that it gave.
///
/// # Errors
/// What keeps this worker from going on; the coordinator has been told.
pub fn run(session: &Session, job: RankJob) -> Result<(u8, String)> {
    let outcome = Rank::prepare(session, job).and_then(|mut rank| rank.serve(session));
    if let Err(error) = &outcome {
        let exit_code = if error.is_user_error() { 2 } else { 1 };
        // Best effort: when the stream is gone the coordinator knows already.
        session.send(failed(exit_code, error.to_string())).ok();
    }
    outcome
}

struct Rank {
    job: RankJob,
    replica: Replica,
    validation: Option<Arc<Dataset>>,
    /// Of an evaluation's predictions.
    generation: Generation,
    tokenizer: Arc<Tokenizer>,
    schedule: StepSchedule,
    loader: Loader,
    /// The micro-batches that the loader has been asked for, in order, and not yet given.
    requested: VecDeque<(u64, u32)>,
    listener: Listener,
    /// Of the step under way, or of the one that waits for its commit.
    gradient: StepGradient,
    pending: Option<(u64, Update)>,
    /// The digest that the next report carries.
    digest: Option<blake3::Hash>,
}

/// A rank's place in a generation.
struct Place {
    generation: u64,
    rank: u32,
    world_size: u32,
    collective: Collective,
}

/// What a step's attempt came to.
enum Attempt {
    Done(StepDone),
    /// Not finite: where.
    Poisoned(String),
}

impl Rank {
    fn prepare(session: &Session, job: RankJob) -> Result<Self> {
        let tokenizer = Arc::new(Tokenizer::from_json(&job.tokenizer_json)?);
        let splits = Splits::load(&job.data, &job.base_dir, job.training.seed)?.tokenized(&tokenizer)?;
        let (fingerprint, order) = (splits.fingerprint(), splits.order());
        let train = Arc::new(splits.train);
        let validation = splits.validation.map(Arc::new);
        let schedule = job.training.steps(order.positions())?;
        let device = job.device.open()?;
        let (model, parameters) = replica::load_model(&device, &job.model, &tokenizer, job.training.seed)?;
        let pretrained = job.model.pretrained.as_deref().map(Path::new);
        let generation = job.evaluation.resolve_generation(model.config(), pretrained)?;
        let precision = job.training.precision.unwrap_or(Precision::default_on(job.device));
        let tokens_max = u64::from(job.training.global_batch_size) * job.data.max_target_length as u64;
        let adapter = open_adapter(&job, &model, &parameters)?;
        let (training, total_steps) = (&job.training, schedule.total_steps);
        let mut replica = Replica::new(model, parameters, adapter, training, precision, total_steps, tokens_max)?;
        if job.resume_step > 0 {
            restore(&job, &mut replica)?;
        }
        let listener = Listener::bind(job.listen)?;
        session.send(Report::Ready(Ready {
            dataset_fingerprint: fingerprint,
            collective_address: listener.local_addr().to_string(),
            committed_step: replica.step(),
            weights_digest: replica.digest()?.as_bytes().to_vec(),
        }))?;
        let packer = Packer::new(train, tokenizer.clone(), order, job.data.limits());
        let loader = Loader::new(packer, TOKENIZER_THREADS);
        let gradient = StepGradient::new(&device, replica.master().layout().len())?;
        Ok(Rank {
            job,
            replica,
            validation,
            generation,
            tokenizer,
            schedule,
            loader,
            requested: VecDeque::new(),
            listener,
            gradient,
            pending: None,
            digest: None,
        })
    }

    /// Obeys commands until the last.
    fn serve(&mut self, session: &Session) -> Result<(u8, String)> {
        let mut place: Option<Place> = None;
        loop {
            let due = match session.recv()? {
                Command::Stop(Stop { exit_code, reason }) => return Ok((exit_code as u8, reason)),
                Command::Plan(plan) => {
                    // A step that was reduced but not committed in the old generation is void.
                    self.pending = None;
                    self.forget_requests();
                    assert_eq!(plan.committed_step, self.replica.step(), "replicas stand at the committed step");
                    // Ends what the old generation still has under way on the device.
                    drop(place.take());
                    place = match self.join(session, &plan) {
                        Ok(joined) => Some(joined),
                        Err(error) if error.is_peer_failure() => {
                            session.send(step_failed(plan.generation, plan.committed_step, &error))?;
                            None
                        }
                        Err(error) => return Err(error),
                    };
                    (plan.actions.unwrap_or_default(), plan.next)
                }
                Command::Commit(commit) => {
                    let Some(place) = &place else { continue };
                    if commit.generation != place.generation {
                        continue;
                    }
                    self.commit(commit.step)?;
                    (commit.actions.unwrap_or_default(), commit.next)
                }
            };
            let Some(joined) = &mut place else { continue };
            let (actions, lease) = due;
            match self.act(session, joined, actions, lease) {
                Ok(()) => {}
                Err(error) if error.is_peer_failure() => {
                    session.send(step_failed(joined.generation, self.replica.step() + 1, &error))?;
                    place = None;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn join(&mut self, session: &Session, plan: &Plan) -> Result<Place> {
        let world_size = plan.members.len() as u32;
        let collective = if world_size == 1 {
            Collective::local()
        } else {
            let members = plan.members.iter().map(|member| Ok((member.rank, address(&member.address)?)));
            let members = members.collect::<Result<Vec<(u32, SocketAddr)>>>()?;
            let identity = self.job.access.mesh_identity()?;
            let membership = Membership {
                rank: plan.rank,
                members: &members,
                token: &self.job.collective_token,
                identity: identity.as_ref(),
                generation: plan.generation,
            };
            let interrupter = Interrupter::new();
            let for_session = interrupter.clone();
            session.on_interrupt(plan.generation, Box::new(move || for_session.interrupt()));
            let deadline = Instant::now() + RENDEZVOUS_TIMEOUT;
            self.link(
                session,
                Mesh::connect(&self.listener, membership, deadline, self.job.silence_limit, interrupter)?,
            )?
        };
        Ok(Place { generation: plan.generation, rank: plan.rank, world_size, collective })
    }

    /// The collective of ranks that have met.
    fn link(&self, session: &Session, mesh: Mesh) -> Result<Collective> {
        let Device::Gpu(gpu) = self.replica.model().device() else { return Ok(Collective::tcp(mesh)) };
        let silence_limit = self.job.silence_limit;
        // Ranks that give up sooner than the mesh and the coordinator do can try again together.
        let limits = WaitLimits { meeting: RENDEZVOUS_TIMEOUT.min(silence_limit / 2), sum: silence_limit / 2 };
        let (generation, rank) = (mesh.generation(), mesh.rank());
        let (collective, gradients) =
            Collective::between_gpus(mesh, gpu, self.replica.step(), self.job.shares_gpu, limits)?;
        if rank == 0 {
            session.send(Report::Linked(Linked { generation, gradients }))?;
        }
        Ok(collective)
    }

    /// Applies the update of the step that was just recorded.
    fn commit(&mut self, step: u64) -> Result<()> {
        let pending = self.pending.take().filter(|&(pending, _)| pending == step);
        let (_, update) = pending.expect("a step is committed after this rank reported it"); // why: the coordinator waits
        self.replica.update(step, self.gradient.total(), update)
    }

    /// What is due on the committed weights, then the next step.
    fn act(&mut self, session: &Session, place: &mut Place, actions: Actions, lease: Option<Lease>) -> Result<()> {
        let step = self.replica.step();
        if let Some(lease) = &lease {
            // Tokenization of the next step runs while the actions do.
            self.request_ahead(place, lease);
        }
        self.digest = if actions.digest { Some(self.replica.digest()?) } else { None };
        if actions.evaluate {
            self.evaluate(session, place, step)?;
        }
        if actions.save && place.rank == 0 {
            self.save(actions.best_step)?;
            session.send(Report::Saved(Saved { step }))?;
        }
        if actions.finish {
            if place.rank == 0 {
                let best = self.read_best(actions.best_step)?;
                output::write_model(&self.job.output_dir, &self.replica, best.as_ref(), &self.tokenizer)?;
            }
            session.send(Report::Finished(Finished {
                generation: place.generation,
                weights_digest: self.replica.digest()?.as_bytes().to_vec(),
            }))?;
        }
        let Some(lease) = lease else { return Ok(()) };
        let report = match self.attempt(place, &lease)? {
            Attempt::Done(done) => Report::StepDone(done),
            Attempt::Poisoned(what) => {
                Report::NotFinite(NotFinite { generation: place.generation, step: lease.step, what })
            }
        };
        Ok(session.send(report)?)
    }

    /// Computes and reduces the gradient of a lease's step.
    fn attempt(&mut self, place: &mut Place, lease: &Lease) -> Result<Attempt> {
        let started = Instant::now();
        let plan = self.schedule.step(lease.step);
        let range = lease.first_micro_batch..lease.last_exclusive;
        self.gradient.begin(range.clone(), plan.micro_batches)?;
        let mut reports = Vec::with_capacity(range.len());
        for index in range {
            let packed = self.next_batch(lease.step, index)?;
            let batch = evaluation::upload(self.replica.model(), &packed)?;
            let is_last = index + 1 == lease.last_exclusive;
            let sums =
                self.gradient.compute(&self.replica, &mut place.collective, (lease.step, index), &batch, is_last)?;
            if !sums.loss_sum.is_finite() {
                return Ok(Attempt::Poisoned(format!("the loss of micro-batch {index}")));
            }
            reports.push(MicroBatch {
                index,
                loss_sum: sums.loss_sum,
                target_tokens: sums.target_tokens,
                source_tokens: batch.source_tokens() as u64,
                examples: batch.examples() as u64,
            });
        }
        // Before the sum, so that a bad number tells whose it is. A rank alone sees it in the norm, for no pass over memory,
        // and so do ranks whose sum is under way already; what overflows under a loss scale is skipped by all ranks, who
        // see it there too.
        let is_whole = place.world_size == 1 || place.collective.overlaps();
        if !is_whole
            && self.replica.loss_scaler().is_none()
            && let Some(index) = self.gradient.find_not_finite()?
        {
            return Ok(Attempt::Poisoned(format!("the gradient of {}", self.tensor_at(index))));
        }
        let target_tokens = self.global_target_tokens(place, lease.step, &reports)?;
        let ranges: Vec<Range<u32>> =
            (0..place.world_size).map(|rank| share(plan.micro_batches, rank, place.world_size)).collect();
        self.gradient.reduce(&mut place.collective, lease.step, &ranges)?;
        let Some(update) = self.replica.plan_update(self.gradient.total(), target_tokens)? else {
            // Squares of f32 do not overflow the norm's f64, so there is one.
            let index = ops::find_not_finite(self.gradient.total())?.unwrap_or_default();
            return Ok(Attempt::Poisoned(format!("the global gradient of {}", self.tensor_at(index))));
        };
        self.pending = Some((lease.step, update));
        Ok(Attempt::Done(StepDone {
            generation: place.generation,
            step: lease.step,
            grad_norm: match update {
                Update::Apply(mean) => mean.norm,
                Update::Skip => f64::NAN,
            },
            skipped: update == Update::Skip,
            loss_scale: self.replica.loss_scaler().map(|scaler| scaler.scale()),
            learning_rate: self.replica.learning_rate(lease.step),
            micro_batches: reports,
            step_seconds: started.elapsed().as_secs_f64(),
            peak_memory_bytes: crate::memory::peak_bytes(self.replica.model().device()),
            weights_digest: self.digest.take().map(|digest| digest.as_bytes().to_vec()),
        }))
    }

    /// The name of the tensor that has element `index` of the arena.
    fn tensor_at(&self, index: usize) -> &str {
        let mut tensors = self.replica.master().layout().tensors().iter();
        tensors.find(|tensor| tensor.range.contains(&index)).map_or("the padding", |tensor| &tensor.name)
    }

    /// Target tokens of the whole step, over all ranks.
    fn global_target_tokens(&self, place: &mut Place, step: u64, reports: &[MicroBatch]) -> Result<u64> {
        let mine: u64 = reports.iter().map(|report| report.target_tokens).sum();
        let all = place.collective.all_gather_bytes(step, &mine.to_le_bytes())?;
        let counts = all.iter().map(|bytes| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes));
        Ok(counts.sum())
    }

    /// Asks for this lease's micro-batches, and for those that the next step will most likely lease to this rank.
    fn request_ahead(&mut self, place: &Place, lease: &Lease) {
        let mut wanted: Vec<(u64, u32)> =
            (lease.first_micro_batch..lease.last_exclusive).map(|index| (lease.step, index)).collect();
        if lease.step < self.schedule.total_steps {
            let next = self.schedule.step(lease.step + 1);
            wanted.extend(share(next.micro_batches, place.rank, place.world_size).map(|index| (next.step, index)));
        }
        if !self.requested.iter().zip(&wanted).all(|(have, want)| have == want) {
            self.forget_requests();
        }
        for &(step, index) in &wanted[self.requested.len().min(wanted.len())..] {
            let plan = self.schedule.step(step);
            self.loader.request(plan.epoch, plan.micro_batch(index));
            self.requested.push_back((step, index));
        }
    }

    fn forget_requests(&mut self) {
        self.loader.clear();
        self.requested.clear();
    }

    fn next_batch(&mut self, step: u64, index: u32) -> Result<PackedBatch> {
        let requested = self.requested.pop_front();
        assert_eq!(requested, Some((step, index)), "batches arrive in the order of their requests");
        Ok(self.loader.next()?)
    }

    /// The weights of the best evaluation's checkpoint, where they are not those at hand.
    fn read_best(&self, step: u64) -> Result<Option<Parameters>> {
        if step == 0 || step == self.replica.step() {
            return Ok(None);
        }
        let loaded = checkpoint::load(&checkpoint::path(&self.job.checkpoints(), step))?;
        self.replica.read_weights(|name, shape, values| loaded.model.read(name, shape, values)).map(Some)
    }

    /// A checkpoint of the committed step, and as many older ones as the job keeps; one of them is that of `best_step`.
    fn save(&self, best_step: u64) -> Result<()> {
        let replica = &self.replica;
        let plan = self.schedule.step(replica.step());
        let layout = replica.master().layout();
        let model: Vec<checkpoint::NamedTensor> = layout
            .tensors()
            .iter()
            .map(|tensor| checkpoint::NamedTensor {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                values: replica.master().range(tensor.range.clone()),
            })
            .collect();
        let progress = Progress {
            step: plan.step,
            epoch: plan.epoch,
            position: plan.positions.end,
            seed: self.job.training.seed,
            job_fingerprint: self.job.fingerprint.clone(),
            weights_digest: replica.digest()?.to_hex().to_string(),
            loss_scaler: replica.loss_scaler(),
        };
        let directory = self.job.checkpoints();
        checkpoint::save(&directory, &Snapshot { progress, model: &model, optimizer: &replica.optimizer().state() })?;
        match self.job.training.save_total_limit {
            Some(keep) => checkpoint::prune(&directory, keep as usize, (best_step > 0).then_some(best_step)),
            None => Ok(()),
        }
    }

    /// Every rank evaluates its share; rank 0 puts the whole together and reports it.
    fn evaluate(&mut self, session: &Session, place: &mut Place, step: u64) -> Result<()> {
        let Some(validation) = &self.validation else { return Ok(()) };
        let (limits, config) = (self.job.data.limits(), &self.job.evaluation);
        let task = EvaluationTask::new(validation, &self.tokenizer, limits, config, &self.generation);
        let share = task.evaluate_share(self.replica.model(), self.replica.weights(), place.rank, place.world_size)?;
        let bytes = serde_json::to_vec(&share).expect("an evaluation is plain data"); // why: no map keys, no custom types
        let Some(shares) = place.collective.gather_bytes(step, 0, &bytes)? else { return Ok(()) };
        let mut batches: Vec<BatchEvaluation> = Vec::new();
        for (rank, bytes) in (0..).zip(shares) {
            let share: Vec<BatchEvaluation> = serde_json::from_slice(&bytes).map_err(|error| Error::Protocol {
                rank,
                problem: format!("its evaluation does not parse: {error}"),
            })?;
            batches.extend(share);
        }
        let evaluation = task.summarize(batches);
        output::write_predictions(&self.job.output_dir, &evaluation.predictions)?;
        session.send(Report::Evaluated(Evaluated {
            step,
            loss: evaluation.loss,
            metrics: evaluation.metrics.iter().map(|&(name, value)| (name.to_string(), value)).collect(),
        }))?;
        Ok(())
    }
}

/// What a LoRA run trains.
fn open_adapter(job: &RankJob, model: &Model, base: &Parameters) -> Result<Option<Adapter>> {
    let open = |lora| {
        let name = job.model.pretrained.as_deref().unwrap_or_default();
        Adapter::open(lora, model, base, name, job.training.seed)
    };
    job.lora.as_ref().map(open).transpose()
}

/// Takes over the checkpoint that the coordinator resumes from.
fn restore(job: &RankJob, replica: &mut Replica) -> Result<()> {
    let loaded = checkpoint::load(&checkpoint::path(&job.checkpoints(), job.resume_step))?;
    if loaded.progress.job_fingerprint != job.fingerprint {
        let problem = "belongs to a job with other data, model or training settings".to_string();
        return Err(Error::Checkpoint { path: loaded.path, problem });
    }
    let step = loaded.progress.step;
    replica.restore(
        step,
        loaded.progress.loss_scaler,
        |name, shape, values| loaded.model.read(name, shape, values),
        |name, shape, values| loaded.optimizer.read(name, shape, values),
    )?;
    if replica.digest()?.to_hex().as_str() != loaded.progress.weights_digest {
        let problem = "holds weights that do not match their digest".to_string();
        return Err(Error::Checkpoint { path: loaded.path, problem });
    }
    Ok(())
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().map_err(|_| Error::Protocol { rank: 0, problem: format!("{text:?} is no address") })
}

fn step_failed(generation: u64, step: u64, error: &Error) -> Report {
    Report::StepFailed(StepFailed { generation, step, detail: error.to_string() })
}

fn failed(exit_code: u32, message: String) -> Report {
    Report::Failed(Failed { exit_code, message })
}
