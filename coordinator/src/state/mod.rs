//! The state machine of a run: who takes part, which step is in flight, what is committed.
//!
//! Pure: time comes in as an argument, everything to be done goes out as effects, in the order in
//! which they must happen. The shell ([`crate::server`]) persists an entry before it carries out
//! the effects behind it, as a Raft shell persists entries before messages; a machine that is
//! made anew from the last one's [`Record`] goes on where it was.
//!
//! ```text
//! Gathering --all ready--> Running --last commit--> Finishing --all finished--> Done (0)
//!                          |  ^  ^
//!                          |  |  '-- worker lost, or newcomer ready at the end of a step:
//!                          |  |      next generation
//!                          |  '-- enough workers again -- Waiting --in vain--> Done (69)
//!                          |          too few workers left --^  ^-- the coordinator came back
//!                          '--preempted--> Preempted --checkpoint saved--> Done (75)
//! ```
//!
//! What always holds:
//! - a step is committed once, in order, and only when every member of the current generation
//!   reported it under that generation;
//! - the generation rises with every change of membership and never falls;
//! - the leases of a generation cover each micro-batch of a step exactly once;
//! - nobody computes on a state other than the committed one.

mod deadlines;
mod links;
mod membership;
mod record;
mod selection;
mod steps;
mod tally;
mod waiting;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use quintet_data::Schedule;
use quintet_proto::v1::{Actions, Ready, State, StepDone, Stop, from_worker::Report, to_worker::Command};

use self::deadlines::Pace;
use self::links::Links;
pub use self::record::{
    CommitRecord, Entry, EvalMetrics, Event, JoinedWorker, LostWorker, Notice, Record, Recovery, TrainMetrics,
};
pub use self::selection::Selection;
use self::selection::Tracker;
use self::waiting::Wait;
use crate::exit_code;

/// Number of a worker, given by the shell in the order of joining and never reused.
pub type WorkerId = u64;

/// How often a step is tried again while all workers are alive, before the run gives up.
const ATTEMPTS_MAX: u32 = 3;
/// With so many steps committed and nobody lost meanwhile, what was lost before is forgotten.
const CALM_STEPS: u64 = 10;

/// What a run is, for the state machine.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Steps, their positions and micro-batches.
    pub schedule: Schedule,
    /// What every worker must find its data to be.
    pub dataset_fingerprint: String,
    /// The run starts when so many workers are ready, and never has more.
    pub workers_expected: u32,
    /// It goes on while so many are left.
    pub workers_min: u32,
    /// How long it waits for others when fewer are left.
    pub join_timeout_ms: u64,
    /// For so long workers try to reach a coordinator that they lost.
    pub reconnect_timeout_ms: u64,
    /// How many dead worker processes are replaced before ten steps go well; `None`
    /// where workers are started by somebody else.
    pub restarts_max: Option<u32>,
    /// A worker not heard of for longer is lost.
    pub heartbeat_timeout_ms: u64,
    /// A step, or the actions before it, without any progress for longer is hung.
    pub step_timeout_ms: u64,
    /// Report every so many steps, and the last.
    pub logging_steps: u64,
    /// Evaluate every so many steps, and after the last.
    pub eval_steps: Option<u64>,
    /// Save a checkpoint every so many steps, and after the last.
    pub save_steps: Option<u64>,
    /// Compare the replicas' weights every so many steps.
    pub digest_steps: Option<u64>,
    /// The committed step to go on from; 0 for a fresh run.
    pub start_step: u64,
    /// The generation in which it was committed.
    pub start_step_generation: u64,
    /// The last generation of the run so far; 0 for a fresh run.
    pub start_generation: u64,
    /// Which evaluation is the best, and what follows; where anything does.
    pub selection: Option<Selection>,
    /// The evaluations up to `start_step`.
    pub past_evaluations: Vec<EvalMetrics>,
    /// A later state of the run that was lost, where that is why it goes on from a checkpoint.
    pub abandoned: Option<Abandoned>,
}

/// A state of the run that nobody holds any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abandoned {
    /// The committed step.
    pub step: u64,
    /// Who was lost since, as far as is known.
    pub lost: Vec<LostWorker>,
}

/// What can happen to the machine.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time passed. Wanted at least every quarter of the heartbeat timeout.
    Tick,
    /// A worker said hello with the right version and token.
    Joined {
        /// A number never used before.
        worker: WorkerId,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// Drawn by the process: the same again is the same process on a new connection.
        instance: u64,
    },
    /// A worker reported.
    Report {
        /// Who.
        worker: WorkerId,
        /// What.
        report: Report,
    },
    /// A worker's stream ended.
    Left {
        /// Who.
        worker: WorkerId,
        /// What was seen of it.
        why: String,
    },
    /// A worker process of the local launcher ended.
    ProcessExited {
        /// Which.
        pid: u32,
        /// Its exit code, unless a signal ended it.
        exit_code: Option<u32>,
        /// The same for people.
        why: String,
    },
    /// The run must make room (SIGTERM): save after the step in flight, then stop.
    Preempt,
}

/// What the shell must do, in the order given.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Make durable, before anything that follows.
    Record(Entry),
    /// Tell the one who watches.
    Event(Event),
    /// Admit a worker: send it the job.
    Welcome {
        /// Whom.
        worker: WorkerId,
        /// The run is under way: it need not load the state to start with.
        under_way: bool,
    },
    /// Send a command.
    Send {
        /// To whom.
        worker: WorkerId,
        /// What.
        command: Command,
    },
    /// Tell a worker to stop and end its stream; it is no member (any more).
    Dismiss {
        /// Whom.
        worker: WorkerId,
        /// Why.
        reason: String,
        /// Whether it may join again.
        rejoin: bool,
    },
    /// Start a worker process in place of another, which is killed if it still runs.
    Replace {
        /// The other.
        pid: u32,
    },
    /// The state is lost: nobody came back to a coordinator that did, or too many of those who held
    /// a part of it are gone. The run can go on from its last checkpoint. Comes last; workers are
    /// told nothing, and will connect again.
    Abandon {
        /// For people: one line.
        reason: String,
        /// For the report of the first step that follows.
        abandoned: Abandoned,
    },
    /// The run is over. Comes last, after the workers were told.
    Stop {
        /// Of the whole run.
        exit_code: u32,
        /// For people: one line.
        reason: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waiting for the expected workers.
    Gathering,
    /// Waiting for workers to come, or to come back.
    Waiting,
    /// Step `committed_step + 1` is in flight.
    Running,
    /// Waiting for the checkpoint that a preempted run leaves.
    Preempted,
    /// Waiting for the workers to write what the run leaves.
    Finishing,
    /// Nothing happens any more.
    Done,
}

/// A worker that is connected.
#[derive(Debug)]
struct Member {
    host: String,
    pid: u32,
    instance: u64,
    heard_ms: u64,
    /// Its computing thread waits for others, as far as it said.
    waiting: bool,
    /// How far its computing thread has got, and when that last changed.
    progress: (u64, u64),
    ready: Option<Ready>,
    /// It holds the committed state.
    holds: bool,
    /// Place among the members of the generation, by rising worker number; `None` for one who
    /// joined since.
    rank: Option<u32>,
    /// Its report of the step in flight.
    done: Option<StepDone>,
    /// Why it could not complete the step in flight.
    failed: Option<String>,
    /// The ranks that it did not reach then.
    unreachable: Vec<u32>,
    /// It wrote what the run leaves; with its digest of the final weights.
    finished: Option<Vec<u8>>,
    /// Its process has ended, in this way; its stream is about to.
    exited: Option<String>,
}

/// What has gone wrong since the last commit, for the report behind the next.
#[derive(Debug)]
struct Trouble {
    noticed_ms: u64,
    lost: Vec<LostWorker>,
    joined: Vec<JoinedWorker>,
    micro_batches: u64,
    /// Committed steps that are computed again.
    steps: u64,
}

/// The state machine. See the module's description.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    phase: Phase,
    members: BTreeMap<WorkerId, Member>,
    last_worker: WorkerId,
    generation: u64,
    committed_step: u64,
    /// The generation in which it was committed.
    committed_generation: u64,
    /// Asked for on the committed step's weights, and not answered yet.
    due: Actions,
    /// The evaluations so far, where something follows from them.
    tracker: Option<Tracker>,
    /// Checkpoints under way, and who writes them.
    saving: Vec<u64>,
    saver: Option<WorkerId>,
    preempting: bool,
    /// What the run waits for, while it does.
    wait: Option<Wait>,
    /// The last generation lacked a part of the state, and nobody came since who may have it.
    state_is_lost: bool,
    trouble: Option<Trouble>,
    /// This coordinator goes on in place of one that died, and has not committed a step yet.
    took_over: bool,
    /// Processes of lost workers that are not known to have ended.
    absent: Vec<u32>,
    /// Processes that were replaced while they may still have run.
    retired: Vec<u32>,
    /// Processes started as replacements that have not joined yet.
    coming: u32,
    /// Replacements, and steps committed, since the last loss.
    restarts: u32,
    calm_steps: u64,
    /// Attempts at the step in flight that failed with all workers alive.
    attempts_failed: u32,
    /// When the first member of the generation reported that it could not complete the step.
    failed_ms: Option<u64>,
    /// Since when the step in flight has been tried again because everybody waited.
    stalled_ms: Option<u64>,
    links: Links,
    /// When the run last moved.
    progress_ms: u64,
    pace: Pace,
    now_ms: u64,
    effects: Vec<Effect>,
}

impl Machine {
    /// A run that waits for its workers. Panics on settings that the configuration refuses.
    pub fn new(settings: Settings) -> Self {
        assert!(settings.workers_min >= 1 && settings.workers_min <= settings.workers_expected);
        assert!(settings.start_step <= settings.schedule.total_steps);
        assert!(settings.logging_steps >= 1);
        Self {
            phase: Phase::Gathering,
            members: BTreeMap::new(),
            last_worker: 0,
            generation: settings.start_generation,
            committed_step: settings.start_step,
            committed_generation: settings.start_step_generation,
            due: Actions::default(),
            tracker: settings.selection.clone().map(|wanted| Tracker::new(wanted, &settings.past_evaluations)),
            saving: Vec::new(),
            saver: None,
            preempting: false,
            wait: None,
            state_is_lost: false,
            trouble: settings.abandoned.as_ref().map(|abandoned| Trouble {
                noticed_ms: 0,
                lost: abandoned.lost.clone(),
                joined: Vec::new(),
                micro_batches: 0,
                steps: abandoned.step.saturating_sub(settings.start_step),
            }),
            took_over: false,
            absent: Vec::new(),
            retired: Vec::new(),
            coming: 0,
            restarts: 0,
            calm_steps: 0,
            attempts_failed: 0,
            failed_ms: None,
            stalled_ms: None,
            links: Links::default(),
            progress_ms: 0,
            pace: Pace::default(),
            now_ms: 0,
            effects: Vec::new(),
            settings,
        }
    }

    /// Takes an input at a time of a clock that never goes back, in milliseconds, and answers what
    /// must be done. After [`Effect::Stop`] every input is ignored.
    pub fn step(&mut self, now_ms: u64, input: Input) -> Vec<Effect> {
        assert!(now_ms >= self.now_ms, "the clock went back from {} to {now_ms} ms", self.now_ms);
        self.forgive_own_pause(now_ms);
        self.now_ms = now_ms;
        if self.phase != Phase::Done {
            match input {
                Input::Tick => self.on_tick(),
                Input::Joined { worker, host, pid, instance } => self.on_joined(worker, host, pid, instance),
                Input::Report { worker, report } => self.on_report(worker, report),
                Input::Left { worker, why } => self.on_left(worker, why),
                Input::ProcessExited { pid, exit_code, why } => {
                    self.on_process_exited(pid, exit_code, why);
                }
                Input::Preempt => self.on_preempt(),
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn on_report(&mut self, worker: WorkerId, report: Report) {
        let Some(member) = self.members.get_mut(&worker) else {
            return; // Dismissed, and what it had sent before it knew.
        };
        member.heard_ms = self.now_ms;
        match report {
            Report::Heartbeat(heartbeat) => {
                member.waiting = heartbeat.waiting;
                if member.progress.0 != heartbeat.progress {
                    member.progress = (heartbeat.progress, self.now_ms);
                }
            }
            Report::Hello(_) => self.stop_on_violation(worker, "said hello twice"),
            Report::Ready(ready) => self.on_ready(worker, ready),
            Report::Linked(linked) => self.on_linked(linked),
            Report::Interrupted(_) => self.on_preempt(),
            Report::StepDone(done) => self.on_step_done(worker, done),
            Report::NotFinite(report) => self.on_not_finite(worker, &report),
            Report::StepFailed(report) => self.on_step_failed(worker, report),
            Report::StateLost(report) => self.on_state_lost(report),
            Report::Evaluated(report) => self.on_evaluated(report),
            Report::Saved(report) => self.on_saved(worker, &report),
            Report::SaveFailed(report) => self.on_save_failed(worker, report),
            Report::Finished(report) => self.on_finished(worker, report),
            Report::Failed(report) => {
                let code = if report.exit_code == 0 { exit_code::FAILURE } else { report.exit_code };
                self.stop(code, format!("{}: {}", self.name(worker), report.message));
            }
        }
    }

    fn on_preempt(&mut self) {
        match self.phase {
            Phase::Gathering => {
                let reason = "preempted before training began: nothing to save".to_owned();
                self.stop(exit_code::PREEMPTED, reason);
            }
            Phase::Running => self.preempting = true,
            Phase::Waiting => {
                self.preempting = true;
                self.go_on_if_possible();
            }
            // The end is near and leaves a complete run.
            Phase::Preempted | Phase::Finishing | Phase::Done => {}
        }
    }

    fn send(&mut self, worker: WorkerId, command: Command) {
        self.effects.push(Effect::Send { worker, command });
    }

    fn event(&mut self, event: Event) {
        self.effects.push(Effect::Event(event));
    }

    fn stop(&mut self, exit_code: u32, reason: String) {
        self.phase = Phase::Done;
        let workers: Vec<WorkerId> = self.members.keys().copied().collect();
        for worker in workers {
            self.send(worker, Command::Stop(Stop { exit_code, reason: reason.clone(), rejoin: false }));
        }
        self.effects.push(Effect::Stop { exit_code, reason });
    }

    /// Ends the run because a worker said what the contract does not allow: a bug, after which
    /// nothing it says can be relied on.
    fn stop_on_violation(&mut self, worker: WorkerId, what: &str) {
        let reason = format!("{} broke the protocol: it {what}", self.name(worker));
        self.stop(exit_code::FAILURE, reason);
    }

    /// A member, for people.
    fn name(&self, worker: WorkerId) -> String {
        let member = &self.members[&worker];
        format!("worker {worker} ({}, process {})", member.host, member.pid)
    }

    /// The members of the generation, by rising rank.
    fn ranks(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        self.members.iter().filter(|(_, member)| member.rank.is_some()).map(|(&worker, member)| (worker, member))
    }

    /// Their number.
    fn world(&self) -> u32 {
        self.ranks().count() as u32
    }

    /// Whether the members work as a generation.
    fn is_under_way(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Preempted | Phase::Finishing)
    }

    /// The state on which the step in flight is computed.
    fn committed(&self) -> State {
        State { step: self.committed_step, generation: self.committed_generation }
    }

    /// Stops the run if the members of the generation do not all answer `value` alike; `what` names the value.
    fn replicas_agree<T: PartialEq>(
        &mut self,
        what: &str,
        value: impl Fn(&Member) -> T,
        show: impl Fn(&T) -> String,
    ) -> bool {
        let answers: Vec<(WorkerId, T)> = self.ranks().map(|(worker, member)| (worker, value(member))).collect();
        if answers.windows(2).all(|pair| pair[0].1 == pair[1].1) {
            return true;
        }
        let list: Vec<String> =
            answers.iter().map(|(worker, answer)| format!("{} has {}", self.name(*worker), show(answer))).collect();
        let reason = format!("replicas disagree on {what}: {}", list.join(", "));
        self.stop(exit_code::FAILURE, reason);
        false
    }
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
