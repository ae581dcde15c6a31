//! Who takes part: joining, leaving, and the plan of a new generation.

use quintet_proto::v1::{
    self, Actions, Finished, Lease, Linked, Plan, Ready, StateLost, StepFailed, to_worker::Command,
};

use super::{ATTEMPTS_MAX, Effect, Event, JoinedWorker, LostWorker, Machine, Member, Notice, Phase, Trouble};
use super::{WorkerId, hex};
use crate::exit_code;

/// A worker that is taken for lost.
pub(super) struct Loss {
    pub(super) worker: WorkerId,
    pub(super) noticed_by: Notice,
    pub(super) why: String,
}

impl Machine {
    pub(super) fn on_joined(&mut self, worker: WorkerId, host: String, pid: u32, instance: u64) {
        let earlier = self.members.iter().find(|(_, member)| member.instance == instance);
        if let Some((&earlier, _)) = earlier {
            let why = "it connected anew".to_owned();
            self.lose(vec![Loss { worker: earlier, noticed_by: Notice::Connection, why }]);
            if self.phase == Phase::Done {
                return;
            }
        }
        let expected = self.settings.workers_expected;
        if self.members.len() as u32 == expected {
            let reason = format!("the run already has its {expected} workers (cluster.workers)");
            self.effects.push(Effect::Dismiss { worker, reason, rejoin: false });
            return;
        }
        match self.absent.iter().position(|&absent| absent == pid) {
            Some(index) => drop(self.absent.swap_remove(index)),
            None => self.coming = self.coming.saturating_sub(1),
        }
        let member = Member {
            host: host.clone(),
            pid,
            instance,
            heard_ms: self.now_ms,
            waiting: false,
            progress: (0, self.now_ms),
            ready: None,
            holds: false,
            rank: None,
            done: None,
            failed: None,
            unreachable: Vec::new(),
            finished: None,
            exited: None,
        };
        let known = self.members.insert(worker, member);
        assert!(known.is_none(), "worker number {worker} was given twice");
        self.last_worker = self.last_worker.max(worker);
        self.effects.push(Effect::Welcome { worker, under_way: self.phase != Phase::Gathering });
        let joined = self.members.len() as u32;
        self.event(Event::Joined { worker, host, pid, joined, expected });
    }

    pub(super) fn on_ready(&mut self, worker: WorkerId, ready: Ready) {
        if self.members[&worker].ready.is_some() {
            return self.stop_on_violation(worker, "said twice that it is ready");
        }
        if ready.dataset_fingerprint != self.settings.dataset_fingerprint {
            return self.refuse_other_data(worker, &ready.dataset_fingerprint);
        }
        if !ready.through_coordinator.is_empty() {
            let what = format!("{}: {}", self.name(worker), ready.through_coordinator);
            self.event(Event::ThroughCoordinator { what });
        }
        let holds = self.has_committed_state(&ready);
        if self.phase == Phase::Gathering && !holds {
            let what = format!("holds the weights of step {}, not {}", ready.committed_step, self.committed_step);
            return self.stop_on_violation(worker, &what);
        }
        if let Some(member) = self.members.get_mut(&worker) {
            (member.ready, member.holds) = (Some(ready), holds);
        }
        // It may bring what is missing.
        self.state_is_lost &= !holds;
        match self.phase {
            Phase::Gathering => {
                let all_ready = self.members.values().all(|member| member.ready.is_some());
                if all_ready && self.members.len() as u32 == self.settings.workers_expected {
                    self.start();
                }
            }
            Phase::Waiting => self.go_on_if_possible(),
            // At the end of the step in flight.
            Phase::Running | Phase::Preempted | Phase::Finishing | Phase::Done => {}
        }
    }

    /// With other data the run cannot begin; one that is under way can do without the worker.
    fn refuse_other_data(&mut self, worker: WorkerId, fingerprint: &str) {
        let reason = format!(
            "{} reads other data than the coordinator (fingerprint {fingerprint}, not {}): \
             give every machine the same files",
            self.name(worker),
            self.settings.dataset_fingerprint,
        );
        if self.phase == Phase::Gathering {
            return self.stop(exit_code::BAD_INPUT, reason);
        }
        self.members.remove(&worker);
        self.event(Event::Refused { reason: reason.clone() });
        self.effects.push(Effect::Dismiss { worker, reason, rejoin: false });
    }

    /// Whether a worker holds the committed state, or will when it applies what it has at hand.
    fn has_committed_state(&self, ready: &Ready) -> bool {
        let held = v1::State { step: ready.committed_step, generation: ready.committed_generation };
        let committed = self.committed();
        let one_behind = held.step + 1 == committed.step;
        held == committed || one_behind && ready.pending == Some(committed)
    }

    fn start(&mut self) {
        self.assign_ranks();
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
        self.announce_plan();
    }

    /// Begins a generation of all who are ready: ranks, the actions still due, and the step in
    /// flight leased anew.
    pub(super) fn plan(&mut self) {
        let newcomers = self.assign_ranks();
        let computes = self.phase == Phase::Running;
        if computes && newcomers > 0 {
            self.due.digest = self.settings.digest_steps.is_some();
        }
        self.announce_plan();
    }

    /// Gives ranks to all who take part. Answers how many had none.
    fn assign_ranks(&mut self) -> usize {
        let roster = self.roster();
        let (mut rank, mut joined) = (0, Vec::new());
        for (&worker, member) in &mut self.members {
            let before = member.rank.take();
            if !roster.contains(&worker) {
                continue;
            }
            if before.is_none() {
                let (host, pid) = (member.host.clone(), member.pid);
                joined.push(JoinedWorker { worker, host, pid, healed: !member.holds });
            }
            member.rank = Some(rank);
            rank += 1;
            (member.done, member.failed, member.finished) = (None, None, None);
            member.unreachable.clear();
            member.progress.1 = self.now_ms;
        }
        let newcomers = joined.len();
        if self.phase != Phase::Gathering && newcomers > 0 {
            self.trouble().joined.extend(joined);
        }
        newcomers
    }

    fn announce_plan(&mut self) {
        self.generation += 1;
        self.wait = None;
        self.failed_ms = None;
        self.progress_ms = self.now_ms;
        self.pace.begin_generation(self.now_ms);
        let address = |member: &Member| member.ready.as_ref().map(|ready| ready.collective_address.clone());
        let members: Vec<v1::Member> = (0..)
            .zip(self.ranks())
            .map(|(rank, (worker_id, member))| v1::Member {
                rank,
                worker_id,
                address: address(member).unwrap_or_default(),
            })
            .collect();
        let healed: Vec<u32> = (0..).zip(self.ranks()).filter(|(_, (_, m))| !m.holds).map(|(rank, _)| rank).collect();
        assert!(healed.len() < members.len(), "a generation begins only with one who holds the committed state");
        self.count_save(members[0].worker_id);
        self.persist(None, Vec::new());
        for member in members.clone() {
            let plan = Plan {
                generation: self.generation,
                rank: member.rank,
                members: members.clone(),
                committed_step: self.committed_step,
                actions: Some(self.due),
                next: self.lease(member.rank),
                committed_generation: self.committed_generation,
                healed: healed.clone(),
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
        let Some(member) = self.members.get(&worker) else { return };
        let (noticed_by, why) = match &member.exited {
            Some(status) => (Notice::Process, format!("its process ended: {status}")),
            None => (Notice::Connection, why),
        };
        self.lose(vec![Loss { worker, noticed_by, why }]);
    }

    pub(super) fn on_linked(&mut self, report: Linked) {
        if report.generation == self.generation {
            self.event(Event::Linked { gradients: report.gradients });
        }
    }

    /// What the report behind the next commit will tell.
    pub(super) fn trouble(&mut self) -> &mut Trouble {
        let noticed_ms = self.now_ms;
        self.trouble.get_or_insert_with(|| Trouble {
            noticed_ms,
            lost: Vec::new(),
            joined: Vec::new(),
            micro_batches: 0,
            steps: 0,
        })
    }

    /// Takes workers out and goes on with the others, if enough are left.
    pub(super) fn lose(&mut self, losses: Vec<Loss>) {
        let names: Vec<String> =
            losses.iter().map(|loss| format!("{}: {}", self.name(loss.worker), loss.why)).collect();
        let names = names.join("; ");
        let (mut lost, mut took_part, mut all_had_finished) = (Vec::new(), false, true);
        for Loss { worker, noticed_by, why } in losses {
            let Some(member) = self.members.remove(&worker) else { continue };
            took_part |= member.rank.is_some();
            all_had_finished &= member.finished.is_some();
            let reason = format!("taken for lost: {why}");
            self.effects.push(Effect::Dismiss { worker, reason, rejoin: true });
            self.replace_if_dead(&member, noticed_by);
            self.forget_saver(worker);
            let (host, pid) = (member.host, member.pid);
            lost.push(LostWorker { worker, host, pid, why, noticed_by });
        }
        if self.phase == Phase::Gathering {
            let reason = format!("a worker left before training began: {names}");
            return self.stop(exit_code::TOO_FEW_WORKERS, reason);
        }
        (self.attempts_failed, self.calm_steps, self.stalled_ms) = (0, 0, None);
        self.event(Event::Lost { workers: lost.clone(), left: self.world() });
        self.trouble().lost.extend(lost);
        if self.phase == Phase::Waiting {
            return self.go_on_if_possible();
        }
        if !took_part {
            return;
        }
        if self.phase == Phase::Finishing && all_had_finished {
            return self.stop_when_all_finished();
        }
        self.void_step();
        if self.can_go_on() {
            return self.plan();
        }
        self.wait_for_workers(names);
    }

    /// What was computed of the step in flight counts for nothing.
    pub(super) fn void_step(&mut self) {
        if self.phase == Phase::Running {
            let micro_batches = self.settings.schedule.step(self.committed_step + 1).micro_batches;
            self.trouble().micro_batches += u64::from(micro_batches);
        }
    }

    /// Writers of checkpoints take them along; what is lost is saved anew, as of now.
    pub(super) fn forget_saver(&mut self, worker: WorkerId) {
        if self.saver == Some(worker) {
            self.saver = None;
            self.due.save |= !std::mem::take(&mut self.saving).is_empty();
        }
    }

    /// A worker lost contact with a peer. It is well itself: mostly the peer is dead and will be
    /// found so. When nobody turns out to be, everybody tries again; or goes on without the links
    /// that do not work.
    pub(super) fn on_step_failed(&mut self, worker: WorkerId, report: StepFailed) {
        if !self.is_under_way() || report.generation != self.generation {
            return;
        }
        if let Some(member) = self.members.get_mut(&worker) {
            (member.failed, member.unreachable) = (Some(report.detail), report.unreachable);
        }
        self.failed_ms.get_or_insert(self.now_ms);
        // The dead report nothing: if all did, nobody is.
        if self.ranks().all(|(_, member)| member.failed.is_some()) {
            self.try_again();
        }
    }

    /// The members of the generation lack a part of the state. Who is not of it, or comes back, may have it; else the run
    /// goes on from its last checkpoint.
    pub(super) fn on_state_lost(&mut self, report: StateLost) {
        if !self.is_under_way() || report.generation != self.generation {
            return;
        }
        self.void_step();
        self.trouble();
        self.state_is_lost = !self.others_may_hold();
        self.wait_for_workers(report.problem);
    }

    /// Members reported that they could not complete the step, and nobody is dead.
    pub(super) fn try_again(&mut self) {
        if self.knows_broken_links() {
            return self.go_on_without_broken_links();
        }
        self.attempts_failed += 1;
        if self.attempts_failed < ATTEMPTS_MAX {
            return self.begin_step_anew();
        }
        let details: Vec<String> = self
            .ranks()
            .filter_map(|(worker, member)| {
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

    /// Everybody waits for everybody: something between them got lost. A new generation connects
    /// anew, and finds out where.
    pub(super) fn connect_anew(&mut self) {
        let stalled_ms = *self.stalled_ms.get_or_insert(self.now_ms);
        if self.now_ms - stalled_ms <= self.settings.step_timeout_ms {
            return self.begin_step_anew();
        }
        let reason = format!(
            "no progress after step {} for {} seconds, though all workers are alive and connected anew again and again",
            self.committed_step,
            self.settings.step_timeout_ms as f64 / 1000.0
        );
        self.stop(exit_code::FAILURE, reason);
    }

    fn begin_step_anew(&mut self) {
        self.event(Event::TriedAgain { step: self.committed_step + 1 });
        self.void_step();
        self.trouble();
        self.plan();
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
        if !self.ranks().all(|(_, member)| member.finished.is_some()) {
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
}
