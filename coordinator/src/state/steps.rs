//! The step in flight: reports of the members, the commit, and the actions after it.

use quintet_proto::v1::{Actions, Commit, Evaluated, NotFinite, Saved, StepDone, to_worker::Command};

use super::selection::Tracker;
use super::tally::tally;
use super::{CommitRecord, Effect, EvalMetrics, Event, Machine, Member, Phase, TrainMetrics, WorkerId, hex};
use crate::exit_code;

impl Machine {
    pub(super) fn on_step_done(&mut self, worker: WorkerId, done: StepDone) {
        let in_flight =
            self.phase == Phase::Running && done.generation == self.generation && done.step == self.committed_step + 1;
        let member = &self.members[&worker];
        if !in_flight || member.done.is_some() {
            return; // Of an older generation, or said before.
        }
        if let Some(what) = self.violation(member, &done) {
            return self.stop_on_violation(worker, &what);
        }
        if !done.skipped && !done.grad_norm.is_finite() {
            return self.stop_not_finite(worker, "the gradient norm");
        }
        if let Some(member) = self.members.get_mut(&worker) {
            member.done = Some(done);
        }
        self.progress_ms = self.now_ms;
        if self.members.values().all(|member| member.done.is_some()) {
            self.commit();
        }
    }

    /// What is wrong with a report of the step in flight, if anything.
    fn violation(&self, member: &Member, done: &StepDone) -> Option<String> {
        let step = done.step;
        let lease = self.lease(member.rank)?;
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
        if member.rank == 0 && (self.due.evaluate || self.due.save) {
            return Some(format!("computed step {step} before it reported the evaluation or checkpoint due"));
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
        let reports: Vec<&StepDone> = self.members.values().filter_map(|m| m.done.as_ref()).collect();
        let metrics = tally(&self.settings.schedule, step, &reports);
        let digest = reports[0].weights_digest.as_deref().map(hex);
        if !metrics.loss.is_finite() {
            return self.stop(exit_code::NUMERIC_GUARD, format!("the loss of step {step} is not finite"));
        }
        self.record(&metrics, digest);
        self.advance(metrics);
    }

    fn record(&mut self, metrics: &TrainMetrics, weights_digest: Option<String>) {
        let plan = self.settings.schedule.step(metrics.step);
        assert_eq!(plan.step, metrics.step, "the schedule counts otherwise");
        self.effects.push(Effect::Commit(CommitRecord {
            step: plan.step,
            epoch: plan.epoch,
            positions: [plan.positions.start, plan.positions.end],
            generation: self.generation,
            workers: self.world(),
            weights_digest,
        }));
    }

    /// Goes on from a recorded step: actions, phase, and the next leases.
    fn advance(&mut self, metrics: TrainMetrics) {
        let step = metrics.step;
        let last = step == self.settings.schedule.total_steps;
        self.committed_step = step;
        self.progress_ms = self.now_ms;
        self.attempts_failed = 0;
        self.failed_ms = None;
        self.due = self.actions_after(step);
        self.phase = match (last, self.preempting) {
            (true, _) => Phase::Finishing,
            (false, true) => Phase::Preempted,
            (false, false) => Phase::Running,
        };
        if last || step.is_multiple_of(self.settings.logging_steps) {
            self.event(Event::Train(metrics));
        }
        let mut ranks = Vec::with_capacity(self.members.len());
        for (&worker, member) in &mut self.members {
            member.done = None;
            member.failed = None;
            ranks.push((worker, member.rank));
        }
        for (worker, rank) in ranks {
            let commit = Commit { generation: self.generation, step, actions: Some(self.due), next: self.lease(rank) };
            self.send(worker, Command::Commit(commit));
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
            let metrics = EvalMetrics { step: report.step, eval_loss: report.loss, metrics: report.metrics };
            if let Some(tracker) = &mut self.tracker {
                tracker.observe(&metrics);
            }
            self.event(Event::Eval(metrics));
            let awaited = self.phase == Phase::Finishing && !self.due.finish;
            if awaited || (self.phase == Phase::Running && self.is_out_of_patience()) {
                self.conclude();
            }
        }
    }

    pub(super) fn on_saved(&mut self, report: &Saved) {
        if self.due.save && report.step == self.committed_step {
            self.due.save = false;
            self.progress_ms = self.now_ms;
            self.event(Event::Saved { step: report.step });
            if self.phase == Phase::Preempted {
                let reason = format!("preempted; step {} is saved, --resume goes on from it", report.step);
                self.stop(exit_code::PREEMPTED, reason);
            }
        }
    }
}
