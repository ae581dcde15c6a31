//! The step in flight: reports of the members, the commit, and the actions after it.

use quintet_proto::v1::{Actions, Commit, Evaluated, NotFinite, SaveFailed, Saved, StepDone, to_worker::Command};

use super::selection::Tracker;
use super::tally::tally;
use super::{CommitRecord, Effect, Entry, EvalMetrics, Event, Machine, Member, Phase, Record, Recovery, TrainMetrics};
use super::{WorkerId, hex};
use crate::exit_code;

impl Machine {
    pub(super) fn on_step_done(&mut self, worker: WorkerId, done: StepDone) {
        let in_flight =
            self.phase == Phase::Running && done.generation == self.generation && done.step == self.committed_step + 1;
        let member = &self.members[&worker];
        let Some(rank) = member.rank.filter(|_| in_flight && member.done.is_none()) else {
            return; // Of an older generation, or said before.
        };
        if let Some(what) = self.violation(rank, &done) {
            return self.stop_on_violation(worker, &what);
        }
        if !done.skipped && !done.grad_norm.is_finite() {
            return self.stop_not_finite(worker, "the gradient norm");
        }
        if let Some(member) = self.members.get_mut(&worker) {
            // It computed on the committed state: what it had to be given, it has.
            (member.done, member.holds) = (Some(done), true);
        }
        self.progress_ms = self.now_ms;
        if self.ranks().all(|(_, member)| member.done.is_some()) {
            self.commit();
        }
    }

    /// What is wrong with a report of the step in flight, if anything.
    fn violation(&self, rank: u32, done: &StepDone) -> Option<String> {
        let step = done.step;
        let lease = self.lease(rank)?;
        let leased = lease.first_micro_batch..lease.last_exclusive;
        if !done.micro_batches.iter().map(|m| m.index).eq(leased.clone()) {
            return Some(format!("reported other micro-batches of step {step} than the leased {leased:?}"));
        }
        let plan = self.settings.schedule.step(step);
        let examples = |index| plan.micro_batch(index).end - plan.micro_batch(index).start;
        if let Some(odd) = done.micro_batches.iter().find(|m| m.examples != examples(m.index)) {
            let (reported, index) = (odd.examples, odd.index);
            return Some(format!(
                "reported {reported} examples in micro-batch {index} of step {step}, which has {}",
                examples(index)
            ));
        }
        if self.due.digest != done.weights_digest.is_some() {
            let was = if self.due.digest { "asked for" } else { "not asked for" };
            return Some(format!("treated the digest before step {step} as if it was not {was}"));
        }
        if rank == 0 && self.due.evaluate {
            return Some(format!("computed step {step} before it reported the evaluation due"));
        }
        None
    }

    /// Every member has reported the step in flight.
    fn commit(&mut self) {
        let step = self.committed_step + 1;
        let grad_norm = |member: &Member| member.done.as_ref().map(|done| done.grad_norm.to_bits());
        let show_norm = |bits: &Option<u64>| format!("{:e}", f64::from_bits(bits.unwrap_or_default()));
        let scaling = |member: &Member| member.done.as_ref().map(|done| (done.skipped, done.loss_scale));
        let show_scaling = |scaling: &Option<(bool, Option<f64>)>| format!("{:?}", scaling.unwrap_or_default());
        let digest = |member: &Member| member.done.as_ref().and_then(|done| done.weights_digest.clone());
        let show_digest = |digest: &Option<Vec<u8>>| hex(digest.as_deref().unwrap_or_default());
        if !self.replicas_agree(&format!("the gradient norm of step {step}"), grad_norm, show_norm)
            || !self.replicas_agree(&format!("whether step {step} is skipped"), scaling, show_scaling)
            || !self.replicas_agree(&format!("the weights before step {step}"), digest, show_digest)
        {
            return;
        }
        let reports: Vec<&StepDone> = self.ranks().filter_map(|(_, m)| m.done.as_ref()).collect();
        let metrics = tally(&self.settings.schedule, step, &reports);
        let digest = reports[0].weights_digest.as_deref().map(hex);
        if !metrics.loss.is_finite() {
            return self.stop(exit_code::NUMERIC_GUARD, format!("the loss of step {step} is not finite"));
        }
        let record = self.commit_record(&metrics, digest);
        self.advance(record, metrics);
    }

    fn commit_record(&self, metrics: &TrainMetrics, weights_digest: Option<String>) -> CommitRecord {
        let plan = self.settings.schedule.step(metrics.step);
        assert_eq!(plan.step, metrics.step, "the schedule counts otherwise");
        CommitRecord {
            step: plan.step,
            epoch: plan.epoch,
            positions: [plan.positions.start, plan.positions.end],
            generation: self.generation,
            workers: self.world(),
            weights_digest,
        }
    }

    /// Records the step and goes on from it: actions, phase, and the next leases.
    fn advance(&mut self, record: CommitRecord, metrics: TrainMetrics) {
        let step = metrics.step;
        let last = step == self.settings.schedule.total_steps;
        (self.committed_step, self.committed_generation) = (step, self.generation);
        self.progress_ms = self.now_ms;
        self.pace.commit(self.now_ms);
        self.attempts_failed = 0;
        (self.failed_ms, self.stalled_ms) = (None, None);
        self.trust_links();
        self.due = self.actions_after(step);
        self.phase = match (last, self.preempting) {
            (true, _) => Phase::Finishing,
            (false, true) => Phase::Preempted,
            (false, false) => Phase::Running,
        };
        let mut events: Vec<Event> = self.recovered(step).map(Event::Recovery).into_iter().collect();
        if last || step.is_multiple_of(self.settings.logging_steps) {
            events.push(Event::Train(metrics));
        }
        self.calm_down();
        let mut ranks = Vec::with_capacity(self.members.len());
        for (&worker, member) in &mut self.members {
            let Some(rank) = member.rank else {
                // Whatever it held, the others are one step further.
                member.holds = false;
                continue;
            };
            (member.done, member.failed) = (None, None);
            member.unreachable.clear();
            ranks.push((worker, rank));
        }
        // Who is ready by now takes part from here on.
        let grows = self.phase == Phase::Running && self.can_grow();
        if !grows {
            self.count_save(ranks[0].0);
        }
        self.persist(Some(record), events);
        for (worker, rank) in ranks {
            let (actions, next) = if grows { (None, None) } else { (Some(self.due), self.lease(rank)) };
            self.send(worker, Command::Commit(Commit { generation: self.generation, step, actions, next }));
        }
        if grows {
            self.plan();
        }
    }

    /// The report of what went wrong before this commit, if anything did.
    fn recovered(&mut self, step: u64) -> Option<Recovery> {
        let trouble = self.trouble.take()?;
        Some(Recovery {
            step,
            generation: self.generation,
            lost: trouble.lost,
            workers: self.world(),
            joined: trouble.joined,
            coordinator_restarted: std::mem::take(&mut self.took_over),
            seconds: (self.now_ms - trouble.noticed_ms) as f64 / 1000.0,
            micro_batches_recomputed: trouble.micro_batches,
            steps_recomputed: trouble.steps,
        })
    }

    /// Makes durable what a coordinator that comes after this one must know.
    pub(super) fn persist(&mut self, commit: Option<CommitRecord>, events: Vec<Event>) {
        let record = Record {
            generation: self.generation,
            committed_step: self.committed_step,
            committed_generation: self.committed_generation,
            workers: self.world(),
            evaluate: self.due.evaluate,
            save: self.due.save || !self.saving.is_empty(),
            finish: self.due.finish,
            last_worker: self.last_worker,
        };
        self.effects.push(Effect::Record(Entry { commit, events, record }));
    }

    /// Takes note of a checkpoint that rank 0 is about to be asked for.
    pub(super) fn count_save(&mut self, rank_0: WorkerId) {
        if self.due.save {
            self.saver = Some(rank_0);
            if !self.saving.contains(&self.committed_step) {
                self.saving.push(self.committed_step);
            }
        }
    }

    /// What is due on the weights that a step leaves.
    fn actions_after(&self, step: u64) -> Actions {
        let last = step == self.settings.schedule.total_steps;
        let due = |every: Option<u64>| every.is_some_and(|every| last || step.is_multiple_of(every));
        let preempted = self.preempting && !last;
        Actions {
            // Answered with the next step: not asked for where none follows.
            digest: !last && !preempted && due(self.settings.digest_steps),
            // One who preempts has little patience.
            evaluate: !preempted && due(self.settings.eval_steps),
            save: preempted || due(self.settings.save_steps) || (self.selects_model() && due(self.settings.eval_steps)),
            // Where the last evaluation may turn out the best, not before its result.
            finish: last && !self.selects_model(),
            best_step: self.best_step(),
        }
    }

    fn selects_model(&self) -> bool {
        self.settings.selection.as_ref().is_some_and(|selection| selection.load_best_model_at_end)
    }

    /// The step whose weights are to become the final model, as far as is known; 0 for none.
    pub(super) fn best_step(&self) -> u64 {
        self.tracker.as_ref().and_then(|tracker| tracker.best()).map_or(0, |best| best.step)
    }

    pub(super) fn is_out_of_patience(&self) -> bool {
        self.tracker.as_ref().is_some_and(Tracker::is_out_of_patience)
    }

    /// Ends the run after an evaluation, with the committed step as its last: one in flight, which nobody has applied, is
    /// void.
    fn conclude(&mut self) {
        self.phase = Phase::Finishing;
        let save = self.due.save || self.settings.save_steps.is_some();
        self.due = Actions { save, finish: true, best_step: self.best_step(), ..Actions::default() };
        if let Some(best) = self.tracker.as_ref().and_then(|tracker| tracker.best()) {
            self.event(Event::Best(best.clone()));
        }
        self.plan();
    }

    /// How the run ended well, for people.
    pub(super) fn success(&self) -> String {
        let early = self.tracker.as_ref().filter(|_| self.committed_step < self.settings.schedule.total_steps);
        let why = early.map_or(String::new(), |tracker| format!(", early: {}", tracker.describe()));
        format!("trained to step {}{why}", self.committed_step)
    }

    pub(super) fn on_not_finite(&mut self, worker: WorkerId, report: &NotFinite) {
        let in_flight = report.generation == self.generation && report.step == self.committed_step + 1;
        if self.phase == Phase::Running && in_flight {
            self.stop_not_finite(worker, &report.what);
        }
    }

    fn stop_not_finite(&mut self, worker: WorkerId, what: &str) {
        let reason = format!(
            "step {}: {what} is not finite, on {}; the weights were not updated",
            self.committed_step + 1,
            self.name(worker)
        );
        self.stop(exit_code::NUMERIC_GUARD, reason);
    }

    pub(super) fn on_evaluated(&mut self, report: Evaluated) {
        if self.due.evaluate && report.step == self.committed_step {
            self.due.evaluate = false;
            self.progress_ms = self.now_ms;
            let eval = EvalMetrics { step: report.step, eval_loss: report.loss, metrics: report.metrics };
            if let Some(tracker) = &mut self.tracker {
                tracker.observe(&eval);
            }
            self.persist(None, vec![Event::Eval(eval)]);
            let awaited = self.phase == Phase::Finishing && !self.due.finish;
            if awaited || (self.phase == Phase::Running && self.is_out_of_patience()) {
                self.conclude();
            }
        }
    }

    pub(super) fn on_saved(&mut self, worker: WorkerId, report: &Saved) {
        if !self.saved(worker, report.step) {
            return;
        }
        self.persist(None, vec![Event::Saved { step: report.step }]);
        if self.phase == Phase::Preempted && !self.due.save {
            let reason = format!("preempted; step {} is saved, --resume goes on from it", report.step);
            self.stop(exit_code::PREEMPTED, reason);
        }
    }

    /// Earlier checkpoints are whole, and the next may succeed; only the last word of a run, the
    /// checkpoint of the step it ends with, may not be lost.
    pub(super) fn on_save_failed(&mut self, worker: WorkerId, report: SaveFailed) {
        if !self.saved(worker, report.step) {
            return;
        }
        let ends_here = matches!(self.phase, Phase::Preempted | Phase::Finishing);
        if !ends_here || report.step < self.committed_step {
            self.persist(None, vec![Event::SaveFailed { step: report.step, problem: report.message }]);
        } else {
            self.stop(exit_code::FAILURE, report.message);
        }
    }

    /// Whether a checkpoint that this worker was asked for is dealt with by its report.
    fn saved(&mut self, worker: WorkerId, step: u64) -> bool {
        let Some(index) = self.saving.iter().position(|&saving| saving == step && self.saver == Some(worker)) else {
            return false;
        };
        self.saving.swap_remove(index);
        if step == self.committed_step {
            self.due.save = false;
        }
        self.progress_ms = self.now_ms;
        true
    }
}
