//! Readable transcripts: what happens, and what the machine answers.

use quintet_data::TrainingLength;
use quintet_proto::v1::{
    Evaluated, Failed, Finished, Heartbeat, Interrupted, Lease, Linked, MicroBatch, NotFinite, SaveFailed, Saved,
    StateLost, StepFailed,
};

use super::*;

mod recovery;

pub(super) fn settings() -> Settings {
    Settings {
        schedule: schedule(10, 4, 2, 3),
        dataset_fingerprint: "data".to_owned(),
        workers_expected: 2,
        workers_min: 1,
        join_timeout_ms: 30_000,
        reconnect_timeout_ms: 20_000,
        restarts_max: None,
        heartbeat_timeout_ms: 10_000,
        step_timeout_ms: 60_000,
        logging_steps: 1,
        eval_steps: None,
        save_steps: None,
        digest_steps: None,
        start_step: 0,
        start_step_generation: 0,
        start_generation: 0,
        selection: None,
        past_evaluations: Vec::new(),
        abandoned: None,
    }
}

pub(super) fn schedule(examples: u64, global: u64, micro: u64, total_steps: u64) -> Schedule {
    Schedule::new(examples, global, micro, TrainingLength::Steps(total_steps)).unwrap()
}

pub(super) fn ready(step: u64) -> Report {
    Report::Ready(Ready {
        dataset_fingerprint: "data".to_owned(),
        collective_address: "here:1".to_owned(),
        committed_step: step,
        weights_digest: vec![7],
        ..Ready::default()
    })
}

/// Of one who holds nothing.
fn newcomer() -> Report {
    let Report::Ready(ready) = ready(0) else { unreachable!() };
    Report::Ready(Ready { committed_generation: u64::MAX, ..ready })
}

/// A report of a lease under which every micro-batch `i` has a loss sum of `i + 1`, two targets,
/// one source token, and as many examples as the schedule says.
pub(super) fn step_done(schedule: &Schedule, generation: u64, lease: &Lease) -> StepDone {
    let plan = schedule.step(lease.step);
    let micro_batch = |index: u32| {
        let positions = plan.micro_batch(index);
        MicroBatch {
            index,
            loss_sum: f64::from(index + 1),
            target_tokens: 2,
            source_tokens: 1,
            examples: positions.end - positions.start,
        }
    };
    StepDone {
        generation,
        step: lease.step,
        grad_norm: 1.5,
        learning_rate: 0.1,
        micro_batches: (lease.first_micro_batch..lease.last_exclusive).map(micro_batch).collect(),
        step_seconds: 2.0,
        peak_memory_bytes: 100,
        weights_digest: None,
        skipped: false,
        loss_scale: None,
    }
}

/// A machine with a clock, and its effects as lines.
struct Script {
    machine: Machine,
    schedule: Schedule,
    now_ms: u64,
}

impl Script {
    fn new(settings: Settings) -> Self {
        let schedule = settings.schedule.clone();
        Self { machine: Machine::new(settings), schedule, now_ms: 0 }
    }

    /// With workers 0 and 1, started.
    fn started(settings: Settings) -> Self {
        let step = settings.start_step;
        let mut script = Self::new(settings);
        script.join(0);
        script.join(1);
        script.report(0, ready(step));
        script.report(1, ready(step));
        script
    }

    fn input(&mut self, input: Input) -> Vec<String> {
        self.machine.step(self.now_ms, input).iter().flat_map(lines).collect()
    }

    fn join(&mut self, worker: WorkerId) -> Vec<String> {
        self.input(Input::Joined { worker, host: "h".to_owned(), pid: 100 + worker as u32, instance: worker })
    }

    fn report(&mut self, worker: WorkerId, report: Report) -> Vec<String> {
        self.input(Input::Report { worker, report })
    }

    fn leave(&mut self, worker: WorkerId) -> Vec<String> {
        self.input(Input::Left { worker, why: "gone".to_owned() })
    }

    fn done(&mut self, worker: WorkerId, generation: u64, step: u64, range: std::ops::Range<u32>) -> Vec<String> {
        let lease = Lease { step, first_micro_batch: range.start, last_exclusive: range.end };
        let done = step_done(&self.schedule, generation, &lease);
        self.report(worker, Report::StepDone(done))
    }

    /// Lets time pass, with heartbeats of the given workers, until something happens.
    fn wait(&mut self, milliseconds: u64, heartbeats: &[WorkerId]) -> Vec<String> {
        let end_ms = self.now_ms + milliseconds;
        while self.now_ms < end_ms {
            self.now_ms += 1000;
            for &worker in heartbeats {
                self.report(worker, Report::Heartbeat(Heartbeat::default()));
            }
            let lines = self.input(Input::Tick);
            if !lines.is_empty() {
                return lines;
            }
        }
        Vec::new()
    }
}

fn lines(effect: &Effect) -> Vec<String> {
    let line = match effect {
        Effect::Record(entry) => {
            let commit = entry.commit.iter().map(ledger_line);
            return commit.chain(entry.events.iter().map(event_line)).collect();
        }
        Effect::Event(event) => event_line(event),
        Effect::Welcome { worker, under_way } => {
            format!("{worker} <- welcome{}", if *under_way { " to a run under way" } else { "" })
        }
        Effect::Send { worker, command } => format!("{worker} <- {}", command_line(command)),
        Effect::Dismiss { worker, reason, rejoin } => {
            format!("{worker} <- {}: {reason}", if *rejoin { "dismissed" } else { "refused" })
        }
        Effect::Replace { pid } => format!("replace process {pid}"),
        Effect::Abandon { reason, .. } => format!("abandon: {reason}"),
        Effect::Stop { exit_code, reason } => format!("stop {exit_code}: {reason}"),
    };
    vec![line]
}

fn ledger_line(r: &CommitRecord) -> String {
    format!(
        "ledger {} epoch {} positions {:?} generation {} workers {} digest {}",
        r.step,
        r.epoch,
        r.positions,
        r.generation,
        r.workers,
        r.weights_digest.as_deref().unwrap_or("-")
    )
}

fn event_line(event: &Event) -> String {
    match event {
        Event::Joined { worker, joined, expected, .. } => format!("joined {worker}, {joined} of {expected}"),
        Event::ThroughCoordinator { what } => what.clone(),
        Event::Linked { gradients } => gradients.clone(),
        Event::Started { workers, step } => format!("started with {workers} at step {step}"),
        Event::Train(m) => format!("train {} loss {} examples {}", m.step, m.loss, m.examples),
        Event::Eval(m) => format!("eval {} loss {}", m.step, m.eval_loss),
        Event::Best(m) => format!("best {} loss {}", m.step, m.eval_loss),
        Event::Saved { step } => format!("saved {step}"),
        Event::SaveFailed { step, problem } => format!("not saved {step}: {problem}"),
        Event::StorageFull { .. } => unreachable!("the shell finds that out"),
        Event::Lost { workers, left } => {
            let lost: Vec<String> = workers.iter().map(|l| format!("{} ({:?})", l.worker, l.noticed_by)).collect();
            format!("lost {}, {left} left", lost.join(", "))
        }
        Event::TriedAgain { step } => format!("step {step} again"),
        Event::Refused { reason } => format!("refused: {reason}"),
        Event::Waiting { workers, needed, seconds } => format!("waiting with {workers} of {needed} for {seconds} s"),
        Event::StateIncomplete { problem, seconds } => format!("{problem}: waiting for {seconds} s"),
        Event::Recovery(r) => {
            let lost: Vec<WorkerId> = r.lost.iter().map(|l| l.worker).collect();
            let joined: Vec<String> =
                r.joined.iter().map(|j| format!("{}{}", j.worker, if j.healed { " healed" } else { "" })).collect();
            let again =
                if r.steps_recomputed > 0 { format!(", {} steps again", r.steps_recomputed) } else { String::new() };
            format!(
                "recovered at step {} as generation {} of {}: lost {lost:?}, joined [{}]{}, {} s, {} micro-batches{again}",
                r.step,
                r.generation,
                r.workers,
                joined.join(", "),
                if r.coordinator_restarted { ", coordinator" } else { "" },
                r.seconds,
                r.micro_batches_recomputed
            )
        }
    }
}

fn command_line(command: &Command) -> String {
    let actions = |a: &Option<Actions>| {
        let a = a.unwrap_or_default();
        let names = [(a.digest, " digest"), (a.evaluate, " evaluate"), (a.save, " save"), (a.finish, " finish")];
        let best = if a.best_step > 0 { format!(" best {}", a.best_step) } else { String::new() };
        names.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect::<String>() + &best
    };
    let next = |lease: &Option<Lease>| match lease {
        Some(l) => format!(", next {} micro-batches {:?}", l.step, l.first_micro_batch..l.last_exclusive),
        None => String::new(),
    };
    match command {
        Command::Welcome(_) => unreachable!("the shell fills in the welcome"),
        Command::Plan(p) => format!(
            "plan {} rank {} of {} after {}{}{}{}",
            p.generation,
            p.rank,
            p.members.len(),
            p.committed_step,
            if p.healed.is_empty() { String::new() } else { format!(" heals {:?}", p.healed) },
            actions(&p.actions),
            next(&p.next)
        ),
        Command::Commit(c) => format!("commit {}{}{}", c.step, actions(&c.actions), next(&c.next)),
        Command::Stop(s) => format!("stop {}", s.exit_code),
    }
}

/// Compares against an indented block of text.
#[track_caller]
fn assert_lines(lines: Vec<String>, expected: &str) {
    let expected: Vec<&str> = expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(lines, expected);
}

#[test]
fn a_run_from_first_hello_to_last_stop() {
    let settings = Settings { eval_steps: Some(2), save_steps: Some(2), digest_steps: Some(2), ..settings() };
    let mut script = Script::new(settings);
    assert_lines(script.join(0), "0 <- welcome\n joined 0, 1 of 2");
    assert_lines(script.report(0, ready(0)), "");
    assert_lines(script.join(1), "1 <- welcome\n joined 1, 2 of 2");
    assert_lines(script.join(2), "2 <- refused: the run already has its 2 workers (cluster.workers)");
    assert_lines(
        script.report(1, ready(0)),
        "started with 2 at step 1
         0 <- plan 1 rank 0 of 2 after 0 digest, next 1 micro-batches 0..1
         1 <- plan 1 rank 1 of 2 after 0 digest, next 1 micro-batches 1..2",
    );
    let digested = |script: &Script, step, range: std::ops::Range<u32>| {
        let lease = Lease { step, first_micro_batch: range.start, last_exclusive: range.end };
        let done = step_done(&script.schedule, 1, &lease);
        Report::StepDone(StepDone { weights_digest: Some(vec![0xab, 0x01]), ..done })
    };
    let report = digested(&script, 1, 1..2);
    assert_lines(script.report(1, report), "");
    let report = digested(&script, 1, 0..1);
    assert_lines(
        script.report(0, report),
        "ledger 1 epoch 0 positions [0, 4] generation 1 workers 2 digest ab01
         train 1 loss 0.75 examples 4
         0 <- commit 1, next 2 micro-batches 0..1
         1 <- commit 1, next 2 micro-batches 1..2",
    );
    assert_lines(script.done(0, 1, 2, 0..1), "");
    assert_lines(
        script.done(1, 1, 2, 1..2),
        "ledger 2 epoch 0 positions [4, 8] generation 1 workers 2 digest -
         train 2 loss 0.75 examples 4
         0 <- commit 2 digest evaluate save, next 3 micro-batches 0..0
         1 <- commit 2 digest evaluate save, next 3 micro-batches 0..1",
    );
    let evaluated = Report::Evaluated(Evaluated { step: 2, loss: 0.5, metrics: Default::default() });
    assert_lines(script.report(0, evaluated), "eval 2 loss 0.5");
    assert_lines(script.report(0, Report::Saved(Saved { step: 2 })), "saved 2");
    let report = digested(&script, 3, 0..0);
    assert_lines(script.report(0, report), "");
    let report = digested(&script, 3, 0..1);
    assert_lines(
        script.report(1, report),
        "ledger 3 epoch 0 positions [8, 10] generation 1 workers 2 digest ab01
         train 3 loss 0.5 examples 2
         0 <- commit 3 evaluate save finish
         1 <- commit 3 evaluate save finish",
    );
    let evaluated = Report::Evaluated(Evaluated { step: 3, loss: 0.25, metrics: Default::default() });
    assert_lines(script.report(0, evaluated), "eval 3 loss 0.25");
    assert_lines(script.report(0, Report::Saved(Saved { step: 3 })), "saved 3");
    let finished = Report::Finished(Finished { generation: 1, weights_digest: vec![9] });
    assert_lines(script.report(1, finished.clone()), "");
    assert_lines(script.report(0, finished), "0 <- stop 0\n 1 <- stop 0\n stop 0: trained to step 3");
    assert_lines(script.leave(0), "");
}

#[test]
fn how_gradients_travel_is_told_once_a_generation() {
    let mut script = Script::started(settings());
    let linked = |generation| Report::Linked(Linked { generation, gradients: format!("by generation {generation}") });
    assert_lines(script.report(0, linked(1)), "by generation 1");
    script.leave(1);
    assert_lines(script.report(0, linked(1)), "");
    assert_lines(script.report(0, linked(2)), "by generation 2");
}

#[test]
fn not_finite_is_70_and_names_the_worker() {
    let mut script = Script::started(settings());
    let report =
        |generation| Report::NotFinite(NotFinite { generation, step: 1, what: "loss of micro-batch 1".to_owned() });
    assert_lines(script.report(1, report(0)), "");
    assert_lines(
        script.report(1, report(1)),
        "0 <- stop 70
         1 <- stop 70
         stop 70: step 1: loss of micro-batch 1 is not finite, on worker 1 (h, process 101); \
         the weights were not updated",
    );
}

#[test]
fn replicas_that_disagree_stop_the_run() {
    let mut script = Script::started(settings());
    script.done(0, 1, 1, 0..1);
    let lease = Lease { step: 1, first_micro_batch: 1, last_exclusive: 2 };
    let done = StepDone { grad_norm: 1.75, ..step_done(&script.schedule, 1, &lease) };
    assert_lines(
        script.report(1, Report::StepDone(done)),
        "0 <- stop 1
         1 <- stop 1
         stop 1: replicas disagree on the gradient norm of step 1: \
         worker 0 (h, process 100) has 1.5e0, worker 1 (h, process 101) has 1.75e0",
    );
}

#[test]
fn a_step_that_overflowed_on_all_ranks_is_committed() {
    let mut script = Script::started(settings());
    let done = |script: &Script, range: std::ops::Range<u32>, skipped| {
        let lease = Lease { step: 1, first_micro_batch: range.start, last_exclusive: range.end };
        let done = step_done(&script.schedule, 1, &lease);
        Report::StepDone(StepDone { grad_norm: f64::NAN, skipped, loss_scale: Some(65536.0), ..done })
    };
    let report = done(&script, 0..1, true);
    assert_lines(script.report(0, report), "");
    let report = done(&script, 1..2, true);
    let effects = script.report(1, report);
    assert!(effects.join("\n").contains("ledger 1 epoch 0"), "{effects:?}");

    let mut script = Script::started(settings());
    let report = done(&script, 0..1, false);
    assert!(script.report(0, report).join("\n").contains("the gradient norm is not finite"));
}

#[test]
fn a_preempted_run_saves_and_is_75() {
    let mut script = Script::started(Settings { eval_steps: Some(1), ..settings() });
    assert_lines(script.input(Input::Preempt), "");
    script.done(0, 1, 1, 0..1);
    assert_lines(
        script.done(1, 1, 1, 1..2),
        "ledger 1 epoch 0 positions [0, 4] generation 1 workers 2 digest -
         train 1 loss 0.75 examples 4
         0 <- commit 1 save
         1 <- commit 1 save",
    );
    // The one who saves dies; the next does it.
    assert_lines(
        script.leave(0),
        "0 <- dismissed: taken for lost: gone
         lost 0 (Connection), 1 left
         1 <- plan 2 rank 0 of 1 after 1 save",
    );
    assert_lines(
        script.report(1, Report::Saved(Saved { step: 1 })),
        "saved 1
         1 <- stop 75
         stop 75: preempted; step 1 is saved, --resume goes on from it",
    );
    // A worker whose host is told to stop does the same.
    let mut told = Script::started(settings());
    assert_lines(told.report(1, Report::Interrupted(Interrupted {})), "");
    told.done(0, 1, 1, 0..1);
    assert!(told.done(1, 1, 1, 1..2).contains(&"0 <- commit 1 save".to_owned()));
    let mut early = Script::new(settings());
    assert_lines(early.input(Input::Preempt), "stop 75: preempted before training began: nothing to save");
}

#[test]
fn what_is_wrong_before_the_start_stops_the_run() {
    let other = |fingerprint: &str, committed_step, digest| {
        Report::Ready(Ready {
            dataset_fingerprint: fingerprint.to_owned(),
            collective_address: String::new(),
            committed_step,
            weights_digest: digest,
            ..Ready::default()
        })
    };
    let stop = |report: Report| {
        let mut script = Script::new(settings());
        script.join(0);
        script.report(0, ready(0));
        script.join(1);
        script.report(1, report).pop().unwrap()
    };
    assert!(stop(other("other", 0, vec![7])).starts_with("stop 2: worker 1 (h, process 101) reads other data"));
    assert!(stop(other("data", 2, vec![7])).contains("it holds the weights of step 2, not 0"));
    assert!(stop(other("data", 0, vec![8])).contains("replicas disagree on the digest of the weights"));
    let failed = Report::Failed(Failed { exit_code: 2, message: "no such file".to_owned() });
    assert_eq!(stop(failed), "stop 2: worker 1 (h, process 101): no such file");

    let mut script = Script::new(settings());
    script.join(0);
    let exited = |pid| Input::ProcessExited { pid, exit_code: None, why: "signal 9".to_owned() };
    assert_lines(script.input(exited(100)), "");
    assert!(script.input(exited(101))[1].starts_with("stop 1: worker process 101 ended before it joined"));
}

#[test]
fn protocol_violations_stop_the_run() {
    let stop = |report: Report| Script::started(settings()).report(0, report).pop().unwrap();
    let lease = |first_micro_batch, last_exclusive| Lease { step: 1, first_micro_batch, last_exclusive };
    let done = |first, last| step_done(&schedule(10, 4, 2, 3), 1, &lease(first, last));
    assert!(stop(Report::StepDone(done(0, 2))).contains("other micro-batches of step 1 than the leased 0..1"));
    assert!(stop(Report::StepDone(done(1, 1))).contains("other micro-batches"));
    let mut short = done(0, 1);
    short.micro_batches[0].examples = 1;
    assert!(stop(Report::StepDone(short)).contains("1 examples in micro-batch 0 of step 1, which has 2"));
    let digested = StepDone { weights_digest: Some(vec![]), ..done(0, 1) };
    assert!(stop(Report::StepDone(digested)).contains("the digest before step 1"));
    assert!(stop(ready(0)).contains("said twice that it is ready"));
    let finished = Finished { generation: 1, weights_digest: vec![] };
    assert!(stop(Report::Finished(finished)).contains("finished before the run did"));
}

#[test]
fn the_loss_does_not_depend_on_the_number_of_workers() {
    let losses: Vec<f64> = (1..=4)
        .map(|workers| {
            let settings = Settings { schedule: schedule(62, 64, 4, 1), workers_expected: workers, ..settings() };
            let schedule = settings.schedule.clone();
            let mut machine = Machine::new(settings);
            let mut effects = Vec::new();
            for worker in 0..u64::from(workers) {
                machine.step(0, Input::Joined { worker, host: String::new(), pid: 0, instance: worker });
                effects.extend(machine.step(0, Input::Report { worker, report: ready(0) }));
            }
            let plans: Vec<_> = effects
                .iter()
                .filter_map(|effect| match effect {
                    Effect::Send { worker, command: Command::Plan(plan) } => Some((*worker, plan.next.unwrap())),
                    _ => None,
                })
                .collect();
            let mut effects = Vec::new();
            for (worker, lease) in plans {
                let mut done = step_done(&schedule, 1, &lease);
                for micro_batch in &mut done.micro_batches {
                    micro_batch.loss_sum = 1.0 / f64::from(micro_batch.index + 1);
                    micro_batch.target_tokens = u64::from(micro_batch.index) + 3;
                }
                effects.extend(machine.step(0, Input::Report { worker, report: Report::StepDone(done) }));
            }
            effects
                .iter()
                .find_map(|effect| match effect {
                    Effect::Record(entry) => match entry.events.as_slice() {
                        [Event::Train(metrics)] => Some(metrics.loss),
                        _ => None,
                    },
                    _ => None,
                })
                .unwrap()
        })
        .collect();
    assert!(losses.iter().all(|loss| loss.to_bits() == losses[0].to_bits()), "{losses:?}");
}

/// Compares by the loss, and evaluates after every step.
fn selecting(load_best_model_at_end: bool, early_stopping_patience: Option<u32>) -> Settings {
    let selection = Selection {
        metric: "loss".to_owned(),
        greater_is_better: false,
        load_best_model_at_end,
        early_stopping_patience,
        early_stopping_threshold: 0.0,
    };
    Settings { eval_steps: Some(1), save_steps: Some(100), selection: Some(selection), ..settings() }
}

fn evaluated(step: u64, loss: f64) -> Report {
    Report::Evaluated(Evaluated { step, loss, metrics: Default::default() })
}

#[test]
fn a_run_that_gets_no_better_ends_early_and_in_order() {
    let mut script = Script::started(selecting(false, Some(1)));
    script.done(0, 1, 1, 0..1);
    script.done(1, 1, 1, 1..2);
    assert_lines(script.report(0, evaluated(1, 0.5)), "eval 1 loss 0.5");
    script.done(0, 1, 2, 0..1);
    script.done(1, 1, 2, 1..2);
    // Step 3 is under way, and void: the run ends with step 2.
    assert_lines(
        script.report(0, evaluated(2, 0.75)),
        "eval 2 loss 0.75
         0 <- plan 2 rank 0 of 2 after 2 save finish
         1 <- plan 2 rank 1 of 2 after 2 save finish",
    );
    assert_lines(script.done(0, 1, 3, 0..0), "");
    assert_lines(script.report(0, Report::Saved(Saved { step: 2 })), "saved 2");
    let finished = Report::Finished(Finished { generation: 2, weights_digest: vec![9] });
    assert_lines(script.report(0, finished.clone()), "");
    assert_lines(
        script.report(1, finished),
        "0 <- stop 0
         1 <- stop 0
         stop 0: trained to step 2, early: loss has not become better in 1 evaluations; the best was 0.5000 after step 1",
    );
}

#[test]
fn the_best_checkpoint_is_kept_and_becomes_the_model_after_the_last_evaluation() {
    let mut script = Script::started(selecting(true, None));
    script.done(0, 1, 1, 0..1);
    assert_lines(
        script.done(1, 1, 1, 1..2),
        "ledger 1 epoch 0 positions [0, 4] generation 1 workers 2 digest -
         train 1 loss 0.75 examples 4
         0 <- commit 1 evaluate save, next 2 micro-batches 0..1
         1 <- commit 1 evaluate save, next 2 micro-batches 1..2",
    );
    script.report(0, evaluated(1, 0.5));
    script.report(0, Report::Saved(Saved { step: 1 }));
    script.done(0, 1, 2, 0..1);
    assert_lines(
        script.done(1, 1, 2, 1..2)[2..].to_vec(),
        "0 <- commit 2 evaluate save best 1, next 3 micro-batches 0..0
         1 <- commit 2 evaluate save best 1, next 3 micro-batches 0..1",
    );
    script.report(0, evaluated(2, 0.75));
    script.report(0, Report::Saved(Saved { step: 2 }));
    script.done(0, 1, 3, 0..0);
    assert_lines(
        script.done(1, 1, 3, 0..1)[2..].to_vec(),
        "0 <- commit 3 evaluate save best 1
         1 <- commit 3 evaluate save best 1",
    );
    assert_lines(
        script.report(0, evaluated(3, 0.75)),
        "eval 3 loss 0.75
         best 1 loss 0.5
         0 <- plan 2 rank 0 of 2 after 3 save finish best 1
         1 <- plan 2 rank 1 of 2 after 3 save finish best 1",
    );
}

#[test]
fn a_resumed_run_remembers_what_was_best() {
    let past = [(1, 0.5), (2, 0.75)];
    let past_evaluations: Vec<EvalMetrics> =
        past.map(|(step, eval_loss)| EvalMetrics { step, eval_loss, metrics: Default::default() }).into();
    let resumed = |selecting: Settings| Settings {
        start_step: 2,
        start_generation: 1,
        past_evaluations: past_evaluations.clone(),
        ..selecting
    };
    // Out of patience already: nothing is left but to finish.
    let mut script = Script::new(resumed(selecting(true, Some(1))));
    script.join(0);
    script.join(1);
    script.report(0, ready(2));
    assert_lines(
        script.report(1, ready(2)),
        "started with 2 at step 3
         0 <- plan 2 rank 0 of 2 after 2 finish best 1
         1 <- plan 2 rank 1 of 2 after 2 finish best 1",
    );
    let mut script = Script::started(resumed(selecting(true, Some(2))));
    script.done(0, 2, 3, 0..0);
    assert_lines(
        script.done(1, 2, 3, 0..1)[2..].to_vec(),
        "0 <- commit 3 evaluate save best 1
         1 <- commit 3 evaluate save best 1",
    );
}
