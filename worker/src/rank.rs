//! The life of a rank: joins a generation, computes leases, reduces, commits, and does what the coordinator says is due.
//!
//! One thread computes. What can block it (a collective whose peer died) is interrupted from the session's thread when a
//! newer generation or the end arrives. When the stream to the coordinator breaks, the rank keeps what it holds and
//! connects again: the coordinator may come back, or only the connection may have been lost.

mod start;
mod step;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quintet_data::{Classes, DataConfig, Dataset, Loader, Schedule as StepSchedule, StoreAbout, Tokenizer};
use quintet_kernels::{Device, WaitLimits};
use quintet_proto::v1::{Actions, Commit, Evaluated, Failed, Finished, Lease, Linked, NotFinite, Plan};
use quintet_proto::v1::{Ready, SaveFailed, Saved, State, StateLost, StepFailed, Stop};
use quintet_t5::Parameters;

use self::start::{load_data, new_replica};
use self::step::Attempt;
use crate::access::Access;
use crate::checkpoint::Progress;
use crate::collective::{Collective, Interrupter, Listener, Membership, Mesh};
use crate::config::{EvaluationConfig, LoraConfig, ModelSection, TrainingConfig};
use crate::evaluation::{self, BatchEvaluation, EvaluationTask};
use crate::gradient::StepGradient;
use crate::outbox::Outbox;
use crate::remote::Remote;
use crate::replica::{Replica, Update};
use crate::saver::{self, Image, Saver};
use crate::session::{self, Command, Report, Session, SessionError};
use crate::shards::Shards;
use crate::task::{self, Task};
use crate::toxicity::ToxicityModel;
use crate::{DeviceChoice, Error, Result};
use crate::{healing, output};

/// What a rank is told about its job.
#[derive(Clone, Debug)]
pub struct RankJob {
    pub model: ModelSection,
    /// What the job calls the model that it begins with, if it begins with one: its adapter is to name it.
    pub base_name: Option<String>,
    pub lora: Option<LoraConfig>,
    pub data: DataConfig,
    pub training: TrainingConfig,
    pub evaluation: EvaluationConfig,
    /// Where what the run keeps is written.
    pub output: Outbox,
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
    /// The state to start with: the committed step whose checkpoint to load, or 0 to start afresh. `None` in a run that is
    /// under way, where another rank hands it over.
    pub start: Option<State>,
    /// How long to try to reach a coordinator that was lost.
    pub reconnect_timeout: Duration,
    /// Of what decides the numbers of a run; a checkpoint of another is refused.
    pub fingerprint: String,
    /// How long a peer may be silent inside a collective: longer than the slowest step lags.
    pub silence_limit: Duration,
    /// The coordinator's machine, which has the run's data and its directory.
    pub remote: Arc<Remote>,
    /// Of the coordinator's data.
    pub dataset_fingerprint: String,
    pub stores: Vec<StoreAbout>,
    /// What is read or written through the coordinator, and why, for people.
    pub through_coordinator: Vec<String>,
}

/// How long the ranks of a generation may take to find each other.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// Tokenization is far cheaper than a step.
const TOKENIZER_THREADS: usize = 1;

/// Serves a run until the coordinator says stop; the exit code and reason that it gave.
///
/// # Errors
/// What keeps this worker from going on; the coordinator has been told.
pub fn run(session: &mut Session, job: RankJob) -> Result<(u8, String)> {
    let outcome = Rank::prepare(session, job).and_then(|mut rank| {
        let outcome = rank.serve(session);
        // Before threads that read or write through the coordinator are joined.
        session.leave();
        outcome
    });
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
    /// Of the data.
    fingerprint: String,
    /// The state that the replica is in; `None` where it is of no use.
    held: Option<State>,
    validation: Option<Arc<Dataset>>,
    /// How an evaluation's predictions are made.
    task: Task,
    toxicity: Option<ToxicityModel>,
    tokenizer: Arc<Tokenizer>,
    schedule: StepSchedule,
    loader: Loader,
    /// The micro-batches that the loader has been asked for, in order, and not yet given.
    requested: VecDeque<(u64, u32)>,
    listener: Listener,
    /// Of the step under way, or of the one that waits for its commit.
    gradient: StepGradient,
    pending: Option<(State, Update)>,
    saver: Saver,
    /// The digest that the next report carries.
    digest: Option<blake3::Hash>,
}

/// A rank's place in a generation.
struct Place {
    generation: u64,
    rank: u32,
    world_size: u32,
    collective: Collective,
    shards: Shards,
}

impl Rank {
    fn prepare(session: &Session, mut job: RankJob) -> Result<Self> {
        job.training.check_device(job.device)?;
        let tokenizer = Arc::new(Tokenizer::from_json(&job.tokenizer_json)?);
        let splits = load_data(&mut job)?.tokenized(&tokenizer)?;
        let (fingerprint, order) = (splits.fingerprint(), splits.order());
        let schedule = job.training.steps(order.positions())?;
        let pretrained = job.model.pretrained.as_deref().map(Path::new);
        let classes = task::classes(&job.model, job.lora.as_ref(), pretrained, &splits)?;
        let replica = new_replica(&job, &tokenizer, classes.as_deref(), schedule.total_steps)?;
        let task = Task::new(classes, &job.evaluation, replica.model().config(), pretrained)?;
        let toxicity = ToxicityModel::of(&job.evaluation, replica.model().device())?;
        let train = Arc::new(splits.train);
        let validation = splits.validation.map(Arc::new);
        let listener = Listener::bind(job.listen)?;
        let packer = evaluation::packer(&train, &tokenizer, order, job.data.limits(), &task);
        let loader = Loader::new(packer, TOKENIZER_THREADS);
        let gradient = StepGradient::new(replica.model().device(), replica.master().layout().len())?;
        let saver = Saver::new(job.output.clone(), job.training.save_total_limit.map(|keep| keep as usize));
        let rank = Rank {
            held: job.start,
            fingerprint,
            job,
            replica,
            validation,
            task,
            toxicity,
            tokenizer,
            schedule,
            loader,
            requested: VecDeque::new(),
            listener,
            gradient,
            pending: None,
            saver,
            digest: None,
        };
        rank.say_ready(session)?;
        Ok(rank)
    }

    fn classes(&self) -> Option<&Classes> {
        self.task.classes().map(Arc::as_ref)
    }

    /// Tells a coordinator what this rank holds.
    fn say_ready(&self, session: &Session) -> Result<()> {
        // No commit is of this generation.
        let held = self.held.unwrap_or(State { step: 0, generation: u64::MAX });
        Ok(session.send(Report::Ready(Ready {
            dataset_fingerprint: self.fingerprint.clone(),
            collective_address: self.listener.local_addr().to_string(),
            committed_step: held.step,
            committed_generation: held.generation,
            weights_digest: self.replica.digest()?.as_bytes().to_vec(),
            pending: self.pending.map(|(state, _)| state),
            through_coordinator: self.job.through_coordinator.join("; "),
        }))?)
    }

    /// Obeys commands until the last.
    fn serve(&mut self, session: &mut Session) -> Result<(u8, String)> {
        let mut place: Option<Place> = None;
        loop {
            let obeyed = match session.recv() {
                Ok(Command::Stop(Stop { exit_code, reason, .. })) => return Ok((exit_code as u8, reason)),
                Ok(Command::Plan(plan)) => self.begin(session, &mut place, plan),
                Ok(Command::Commit(commit)) => self.advance(session, &mut place, commit),
                Err(SessionError::Disconnected(_)) => {
                    place = None;
                    self.rejoin(session)?;
                    Ok(())
                }
                Err(error) => Err(error.into()),
            };
            match obeyed {
                // Whoever receives next finds out.
                Err(Error::Session(SessionError::Disconnected(_))) => place = None,
                obeyed => obeyed?,
            }
        }
    }

    /// Connects to a coordinator that was lost, with all that this rank holds.
    fn rejoin(&mut self, session: &mut Session) -> Result<()> {
        let welcome = session.reconnect(self.job.reconnect_timeout)?;
        if let Ok(token) = welcome.collective_token.as_slice().try_into() {
            self.job.collective_token = token;
        }
        if let Some(start) = session::start_of(&welcome) {
            // It begins anew, from a checkpoint; what came later is void.
            self.pending = None;
            if self.held != Some(start) || !self.replica.has_everything() {
                self.job.start = Some(start);
                self.replica = new_replica(&self.job, &self.tokenizer, self.classes(), self.schedule.total_steps)?;
                self.held = Some(start);
            }
        }
        self.say_ready(session)
    }

    /// Takes its place in a new generation, and does what is due there.
    fn begin(&mut self, session: &Session, place: &mut Option<Place>, plan: Plan) -> Result<()> {
        self.settle(&plan)?;
        self.forget_requests();
        // Ends what the old generation still has under way on the device.
        drop(place.take());
        match self.join(session, &plan) {
            Ok(joined) => self.act_in(session, place.insert(joined), plan.actions, plan.next),
            Err(error) if error.is_peer_failure() => {
                Ok(session.send(step_failed(plan.generation, plan.committed_step, &error))?)
            }
            Err(Error::StateLost { problem }) => {
                Ok(session.send(Report::StateLost(StateLost { generation: plan.generation, problem }))?)
            }
            Err(error) => Err(error),
        }
    }

    /// A step that was reduced but not committed is void; unless its commit is on record, and was not heard of.
    fn settle(&mut self, plan: &Plan) -> Result<()> {
        let committed = State { step: plan.committed_step, generation: plan.committed_generation };
        if self.pending.is_some_and(|(state, _)| state == committed) && self.held.is_some() {
            self.commit(committed)?;
        }
        self.pending = None;
        // Who was given the state in a generation that came to nothing has it, and the coordinator does not know.
        let holds = self.held == Some(committed);
        assert!(holds || plan.healed.contains(&plan.rank), "the coordinator knows what this rank holds");
        if !holds {
            self.held = None;
        }
        Ok(())
    }

    /// Goes on from a committed step.
    fn advance(&mut self, session: &Session, place: &mut Option<Place>, commit: Commit) -> Result<()> {
        let Some(joined) = place.as_mut().filter(|place| place.generation == commit.generation) else { return Ok(()) };
        self.commit(State { step: commit.step, generation: commit.generation })?;
        self.act_in(session, joined, commit.actions, commit.next)
    }

    fn join(&mut self, session: &Session, plan: &Plan) -> Result<Place> {
        let _waiting = session.wait();
        let world_size = plan.members.len() as u32;
        let mut collective = if world_size == 1 {
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
            let mesh = Mesh::connect(&self.listener, membership, deadline, self.job.silence_limit, interrupter)?;
            self.link(session, mesh, plan.committed_step)?
        };
        let elements = self.replica.master().layout().len();
        let shards = match self.job.training.zero_stage {
            0 => Shards::replicated(elements, world_size),
            _ => Shards::sharded(elements, world_size),
        };
        let step = plan.committed_step;
        healing::heal(&mut collective, &mut self.replica, &shards, step, self.held.is_some())?;
        self.held = Some(State { step, generation: plan.committed_generation });
        healing::settle(&mut collective, &mut self.replica, &shards, step)?;
        Ok(Place { generation: plan.generation, rank: plan.rank, world_size, collective, shards })
    }

    /// The collective of ranks that have met to go on from `step`, which some do not hold yet.
    fn link(&self, session: &Session, mesh: Mesh, step: u64) -> Result<Collective> {
        let Device::Gpu(gpu) = self.replica.model().device() else { return Ok(Collective::tcp(mesh)) };
        let silence_limit = self.job.silence_limit;
        // Ranks that give up sooner than the mesh and the coordinator do can try again together.
        let limits = WaitLimits { meeting: RENDEZVOUS_TIMEOUT.min(silence_limit / 2), sum: silence_limit / 2 };
        let (generation, rank) = (mesh.generation(), mesh.rank());
        let (collective, gradients) = Collective::between_gpus(mesh, gpu, step, self.job.shares_gpu, limits)?;
        if rank == 0 {
            session.send(Report::Linked(Linked { generation, gradients }))?;
        }
        Ok(collective)
    }

    /// Applies the update of a step that is recorded.
    fn commit(&mut self, committed: State) -> Result<()> {
        let pending = self.pending.take().filter(|(state, _)| *state == committed);
        let (_, update) = pending.expect("a step is committed after this rank reported it"); // why: the coordinator waits
        self.replica.update(committed.step, self.gradient.total(), update)?;
        self.held = Some(committed);
        Ok(())
    }

    /// What is due in a generation, which a lost peer makes void.
    fn act_in(
        &mut self,
        session: &Session,
        place: &mut Place,
        actions: Option<Actions>,
        lease: Option<Lease>,
    ) -> Result<()> {
        match self.act(session, place, actions.unwrap_or_default(), lease) {
            Err(error) if error.is_peer_failure() => {
                // Peers are to notice at once.
                place.collective = Collective::local();
                Ok(session.send(step_failed(place.generation, self.replica.step() + 1, &error))?)
            }
            acted => acted,
        }
    }

    /// What is due on the committed weights, then the next step.
    fn act(&mut self, session: &Session, place: &mut Place, actions: Actions, lease: Option<Lease>) -> Result<()> {
        let step = self.replica.step();
        if let Some(lease) = &lease {
            // Tokenization of the next step runs while the actions do.
            self.request_ahead(place, lease);
        }
        if !self.replica.is_whole() {
            let _waiting = session.wait();
            self.replica.complete(&mut place.collective, &place.shards)?;
        }
        self.digest = if actions.digest { Some(self.replica.digest()?) } else { None };
        if actions.evaluate {
            self.evaluate(session, place, step)?;
        }
        if actions.save {
            self.begin_save(session, place, step, actions.best_step)?;
        }
        // Where no step follows, nothing else is left to wait for.
        let saved =
            if actions.finish || actions.save && lease.is_none() { self.saver.wait() } else { self.saver.poll() };
        tell_saved(session, saved)?;
        if actions.finish {
            if place.rank == 0 {
                let best = self.read_best(actions.best_step)?;
                output::write_model(&self.job.output, &self.replica, best.as_ref(), &self.tokenizer)?;
            }
            session.send(Report::Finished(Finished {
                generation: place.generation,
                weights_digest: self.replica.digest()?.as_bytes().to_vec(),
            }))?;
        }
        let Some(lease) = lease else { return Ok(()) };
        let report = match self.attempt(session, place, &lease)? {
            Attempt::Done(done) => Report::StepDone(done),
            Attempt::Poisoned(what) => {
                Report::NotFinite(NotFinite { generation: place.generation, step: lease.step, what })
            }
        };
        tell_saved(session, self.saver.poll())?;
        Ok(session.send(report)?)
    }

    /// The weights of the best evaluation's checkpoint, where they are not those at hand.
    fn read_best(&self, step: u64) -> Result<Option<Parameters>> {
        if step == 0 || step == self.replica.step() {
            return Ok(None);
        }
        self.job.output.with_checkpoint(step, |loaded| {
            self.replica.read_weights(|name, shape, values| loaded.model.read(name, shape, values)).map(Some)
        })
    }

    /// Copies the state of the committed step for a checkpoint, which rank 0 then writes while training goes on. The one of
    /// `best_step` is kept.
    fn begin_save(&mut self, session: &Session, place: &mut Place, step: u64, best_step: u64) -> Result<()> {
        let mut is_under_way = [u8::from(self.saver.step() == Some(step))];
        if !place.shards.is_replicated() {
            // Rank 0 knows.
            let others: Vec<u32> = (1..place.world_size).collect();
            place.collective.broadcast(step, 0, &others, &mut is_under_way)?;
        }
        if is_under_way == [1] {
            return Ok(());
        }
        if place.rank == 0 {
            // Disks and networks may be slower than checkpoints are due, which is nobody's fault.
            tell_saved(session, self.saver.wait_alive(|| session.count_progress()))?;
        }
        let state = healing::gather_state(&mut place.collective, &self.replica, &place.shards, step)?;
        let Some(state) = state else { return Ok(()) };
        let plan = self.schedule.step(step);
        let progress = Progress {
            step,
            epoch: plan.epoch,
            position: plan.positions.end,
            seed: self.job.training.seed,
            job_fingerprint: self.job.fingerprint.clone(),
            weights_digest: String::new(),
            loss_scaler: self.replica.loss_scaler(),
        };
        let best = (best_step > 0).then_some(best_step);
        self.saver.begin(step, Image::of(&self.replica, state, progress)?, best)
    }

    /// Every rank evaluates its share; rank 0 puts the whole together and reports it.
    fn evaluate(&mut self, session: &Session, place: &mut Place, step: u64) -> Result<()> {
        let Some(validation) = &self.validation else { return Ok(()) };
        let (limits, config) = (self.job.data.limits(), &self.job.evaluation);
        let task = EvaluationTask::new(validation, &self.tokenizer, limits, config, &self.task, self.toxicity.as_ref());
        let share = task.evaluate_share(self.replica.model(), self.replica.weights(), place.rank, place.world_size)?;
        let bytes = serde_json::to_vec(&share).expect("an evaluation is plain data"); // why: no map keys, no custom types
        let waiting = session.wait();
        let gathered = place.collective.gather_bytes(step, 0, &bytes)?;
        drop(waiting);
        let Some(shares) = gathered else { return Ok(()) };
        let mut batches: Vec<BatchEvaluation> = Vec::new();
        for (rank, bytes) in (0..).zip(shares) {
            let share: Vec<BatchEvaluation> = serde_json::from_slice(&bytes).map_err(|error| Error::Protocol {
                rank,
                problem: format!("its evaluation does not parse: {error}"),
            })?;
            batches.extend(share);
        }
        let evaluation = task.summarize(batches);
        output::write_predictions(&self.job.output, &evaluation.predictions)?;
        session.send(Report::Evaluated(Evaluated {
            step,
            loss: evaluation.loss,
            metrics: evaluation.metrics.iter().map(|&(name, value)| (name.to_string(), value)).collect(),
        }))?;
        Ok(())
    }
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().map_err(|_| Error::Protocol { rank: 0, problem: format!("{text:?} is no address") })
}

fn tell_saved(session: &Session, saved: Option<saver::Saved>) -> Result<()> {
    let report = match saved {
        None => return Ok(()),
        Some((step, Ok(()))) => Report::Saved(Saved { step }),
        Some((step, Err(error))) => Report::SaveFailed(SaveFailed { step, message: error.to_string() }),
    };
    Ok(session.send(report)?)
}

fn step_failed(generation: u64, step: u64, error: &Error) -> Report {
    let unreachable = error.unreachable().to_vec();
    Report::StepFailed(StepFailed { generation, step, detail: error.to_string(), unreachable })
}

fn failed(exit_code: u32, message: String) -> Report {
    Report::Failed(Failed { exit_code, message })
}
