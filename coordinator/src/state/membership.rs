//! Who takes part: joining, leaving, time running out, and the plan of a new generation.

use quintet_proto::v1::{self, Actions, Finished, Lease, Linked, Plan, Ready, StepFailed, to_worker::Command};

use super::{ATTEMPTS_MAX, Effect, Event, LostWorker, Machine, Member, Phase, Recovery, WorkerId, hex};
use crate::exit_code;

impl Machine {
    pub(super) fn on_joined(&mut self, worker: WorkerId, host: String, pid: u32) {
        let expected = self.settings.workers_expected;
        let refusal = if self.phase != Phase::Gathering {
            Some("the run has started; workers cannot join it any more".to_owned())
        } else if self.world() == expected {
            Some(format!("the run already has its {expected} workers (cluster.workers)"))
        } else {
            None
        };
        if let Some(reason) = refusal {
            self.effects.push(Effect::Dismiss { worker, reason });
            return;
        }
        let member = Member {
            host: host.clone(),
            pid,
            heard_ms: self.now_ms,
            ready: None,
            rank: 0,
            done: None,
            failed: None,
            finished: None,
        };
        let known = self.members.insert(worker, member);
        assert!(known.is_none(), "worker number {worker} was given twice");
        self.effects.push(Effect::Welcome { worker });
        let joined = self.world();
        self.event(Event::Joined { worker, host, pid, joined, expected });
    }

    pub(super) fn on_ready(&mut self, worker: WorkerId, ready: Ready) {
        if self.phase != Phase::Gathering || self.members[&worker].ready.is_some() {
            return self.stop_on_violation(worker, "said twice that it is ready");
        }
        if ready.dataset_fingerprint != self.settings.dataset_fingerprint {
            let reason = format!(
                "{} reads other data than the coordinator (fingerprint {}, not {}): \
                 give every machine the same files",
                self.name(worker),
                ready.dataset_fingerprint,
                self.settings.dataset_fingerprint,
            );
            return self.stop(exit_code::BAD_INPUT, reason);
        }
        if ready.committed_step != self.settings.start_step {
            let what = format!("holds the weights of step {}, not {}", ready.committed_step, self.settings.start_step);
            return self.stop_on_violation(worker, &what);
        }
        if let Some(member) = self.members.get_mut(&worker) {
            member.ready = Some(ready);
        }
        let all_ready = self.members.values().all(|member| member.ready.is_some());
        if all_ready && self.world() == self.settings.workers_expected {
            self.start();
        }
    }

    fn start(&mut self) {
        let digest = |member: &Member| member.ready.as_ref().map(|ready| ready.weights_digest.clone());
        let show = |digest: &Option<Vec<u8>>| hex(digest.as_deref().unwrap_or_default());
        if !self.replicas_agree("the digest of the weights to start with", digest, show) {
            return;
        }
        let complete = self.committed_step == self.settings.schedule.total_steps || self.is_out_of_patience();
        self.phase = if complete { Phase::Finishing } else { Phase::Running };
        self.due = Actions {
            digest: !complete && self.settings.digest_steps.is_some(),
            finish: complete,
            best_step: self.best_step(),
            ..Actions::default()
        };
        let (workers, step) = (self.world(), self.committed_step + 1);
        self.event(Event::Started { workers, step });
        self.plan();
    }

    /// Begins a generation of the present members: ranks, the actions still due, and the step in
    /// flight leased anew.
    pub(super) fn plan(&mut self) {
        self.generation += 1;
        self.failed_ms = None;
        self.progress_ms = self.now_ms;
        let mut ranks = Vec::with_capacity(self.members.len());
        for (rank, (&worker_id, member)) in (0..).zip(&mut self.members) {
            member.rank = rank;
            member.done = None;
            member.failed = None;
            member.finished = None;
            let address = member.ready.as_ref().map(|ready| ready.collective_address.clone());
            ranks.push(v1::Member { rank, worker_id, address: address.unwrap_or_default() });
        }
        for member in ranks.clone() {
            let plan = Plan {
                generation: self.generation,
                rank: member.rank,
                members: ranks.clone(),
                committed_step: self.committed_step,
                actions: Some(self.due),
                next: self.lease(member.rank),
            };
            self.send(member.worker_id, Command::Plan(plan));
        }
    }

    /// A rank's share of the step in flight, if one is.
    pub(super) fn lease(&self, rank: u32) -> Option<Lease> {
        if self.phase != Phase::Running {
            return None;
        }
        let step = self.committed_step + 1;
        let micro_batches = self.settings.schedule.step(step).micro_batches;
        let share = quintet_data::share(micro_batches, rank, self.world());
        Some(Lease { step, first_micro_batch: share.start, last_exclusive: share.end })
    }

    pub(super) fn on_left(&mut self, worker: WorkerId, why: String) {
        if self.members.contains_key(&worker) {
            self.lose(vec![(worker, why)]);
        }
    }

    /// The stream tells of a worker that had joined, and in order with what it said last. Only one
    /// that never came that far leaves no other trace.
    pub(super) fn on_process_exited(&mut self, pid: u32, code: Option<u32>, why: String) {
        let joined = self.members.values().any(|member| member.pid == pid);
        if self.phase == Phase::Gathering && !joined {
            let code = code.filter(|&code| code != 0).unwrap_or(exit_code::FAILURE);
            self.stop(code, format!("worker process {pid} ended before it joined: {why}"));
        }
    }

    pub(super) fn on_linked(&mut self, report: Linked) {
        if report.generation == self.generation {
            self.event(Event::Linked { gradients: report.gradients });
        }
    }

    /// Takes workers out and goes on with the others, if enough are left.
    fn lose(&mut self, workers: Vec<(WorkerId, String)>) {
        let names: Vec<String> = workers.iter().map(|(worker, why)| format!("{}: {why}", self.name(*worker))).collect();
        let mut lost = Vec::with_capacity(workers.len());
        let mut all_had_finished = true;
        for (worker, why) in workers {
            let Some(member) = self.members.remove(&worker) else {
                continue;
            };
            all_had_finished &= member.finished.is_some();
            self.effects.push(Effect::Dismiss { worker, reason: format!("taken for lost: {why}") });
            lost.push(LostWorker { worker, host: member.host, pid: member.pid, why });
        }
        let names = names.join("; ");
        if self.phase == Phase::Gathering {
            let reason = format!("a worker left before training began: {names}");
            return self.stop(exit_code::TOO_FEW_WORKERS, reason);
        }
        if self.phase == Phase::Finishing && all_had_finished {
            return self.stop_when_all_finished();
        }
        // What remains after the last step, one can do.
        let needed = if self.phase == Phase::Running { self.settings.workers_min } else { 1 };
        if self.world() < needed {
            let reason = format!("{} workers left, {needed} needed: {names}", self.world());
            return self.stop(exit_code::TOO_FEW_WORKERS, reason);
        }
        self.attempts_failed = 0;
        self.recover(lost);
    }

    fn recover(&mut self, lost: Vec<LostWorker>) {
        self.event(Event::Recovery(Recovery {
            step: self.committed_step + 1,
            generation: self.generation + 1,
            lost,
            workers: self.world(),
        }));
        self.plan();
    }

    /// A worker lost contact with a peer. It is well itself: mostly the peer is dead and will be
    /// found so. When nobody turns out to be, everybody tries again.
    pub(super) fn on_step_failed(&mut self, worker: WorkerId, report: StepFailed) {
        if self.phase == Phase::Gathering || report.generation != self.generation {
            return;
        }
        if let Some(member) = self.members.get_mut(&worker) {
            member.failed = Some(report.detail);
        }
        self.failed_ms.get_or_insert(self.now_ms);
        // The dead report nothing: if all did, nobody is.
        if self.members.values().all(|member| member.failed.is_some()) {
            self.try_again();
        }
    }

    fn try_again(&mut self) {
        self.attempts_failed += 1;
        if self.attempts_failed < ATTEMPTS_MAX {
            return self.recover(Vec::new());
        }
        let details: Vec<String> = self
            .members
            .iter()
            .filter_map(|(&worker, member)| {
                member.failed.as_ref().map(|detail| format!("{}: {detail}", self.name(worker)))
            })
            .collect();
        let reason = format!(
            "step {} failed {ATTEMPTS_MAX} times with all workers alive: {}",
            self.committed_step + 1,
            details.join("; ")
        );
        self.stop(exit_code::FAILURE, reason);
    }

    pub(super) fn on_finished(&mut self, worker: WorkerId, report: Finished) {
        if report.generation != self.generation {
            return; // It has more to do now: rank 0 may have died, and this one be the next.
        }
        if self.phase != Phase::Finishing {
            return self.stop_on_violation(worker, "finished before the run did");
        }
        if let Some(member) = self.members.get_mut(&worker) {
            member.finished = Some(report.weights_digest);
        }
        self.progress_ms = self.now_ms;
        self.stop_when_all_finished();
    }

    fn stop_when_all_finished(&mut self) {
        if !self.members.values().all(|member| member.finished.is_some()) {
            return;
        }
        if self.due.evaluate || self.due.save {
            let reason = "all workers finished, but the last evaluation or checkpoint was never \
                          reported: a bug in the worker"
                .to_owned();
            return self.stop(exit_code::FAILURE, reason);
        }
        let digest = |member: &Member| member.finished.clone();
        let show = |digest: &Option<Vec<u8>>| hex(digest.as_deref().unwrap_or_default());
        if self.replicas_agree("the digest of the final weights", digest, show) {
            self.stop(exit_code::DONE, self.success());
        }
    }

    pub(super) fn on_tick(&mut self) {
        let silent = self.late(self.settings.heartbeat_timeout_ms, "not heard of", |member| member.heard_ms);
        if !silent.is_empty() {
            return self.lose(silent);
        }
        if self.phase == Phase::Gathering {
            return;
        }
        // By now a dead peer would have been found silent.
        if self.failed_ms.is_some_and(|ms| self.now_ms - ms > self.settings.heartbeat_timeout_ms) {
            return self.try_again();
        }
        if self.now_ms - self.progress_ms > self.settings.step_timeout_ms {
            self.on_step_timeout();
        }
    }

    /// The members last heard of too long ago, with the reason.
    fn late(&self, timeout_ms: u64, what: &str, since_ms: impl Fn(&Member) -> u64) -> Vec<(WorkerId, String)> {
        let late = self.members.iter().filter(|(_, member)| self.now_ms - since_ms(member) > timeout_ms);
        late.map(|(&worker, member)| {
            let seconds = (self.now_ms - since_ms(member)) as f64 / 1000.0;
            (worker, format!("{what} for {seconds:.1} seconds"))
        })
        .collect()
    }

    /// Nothing moves, yet all send heartbeats. If some have answered, the others hang; if none
    /// has, nobody can tell who does.
    fn on_step_timeout(&mut self) {
        let seconds = self.settings.step_timeout_ms as f64 / 1000.0;
        let answered = |member: &Member| member.done.is_some() || member.failed.is_some() || member.finished.is_some();
        let hung: Vec<(WorkerId, String)> = self
            .members
            .iter()
            .filter(|(_, member)| !answered(member))
            .map(|(&worker, _)| (worker, format!("hung: no report of the step for {seconds} seconds")))
            .collect();
        if !hung.is_empty() && hung.len() < self.members.len() {
            return self.lose(hung);
        }
        let reason = format!(
            "no progress after step {} for {seconds} seconds, though all workers are alive; \
             if steps may take so long, raise cluster.step_timeout_seconds",
            self.committed_step
        );
        self.stop(exit_code::FAILURE, reason);
    }

    /// A coordinator that did not run for a while (stopped, swapped out, a closed lid) has heard
    /// of nobody for that long, which says nothing about the workers.
    pub(super) fn forgive_own_pause(&mut self, now_ms: u64) {
        let pause_ms = now_ms - self.now_ms;
        if pause_ms <= self.settings.heartbeat_timeout_ms / 2 {
            return;
        }
        for member in self.members.values_mut() {
            member.heard_ms += pause_ms;
        }
        self.progress_ms += pause_ms;
        self.failed_ms = self.failed_ms.map(|ms| ms + pause_ms);
    }
}
