//! What must hold of every effect, and of the end.

use super::*;

impl World {
    pub(super) fn check(&mut self, effect: Effect) {
        assert!(self.end.is_none(), "an effect behind the last");
        match effect {
            Effect::Record(entry) => self.check_entry(entry),
            Effect::Welcome { worker, under_way } => {
                let id = self.streams[&worker].process;
                let start = State { step: self.settings.start_step, generation: self.settings.start_step_generation };
                let process = &mut self.processes[id];
                if !under_way {
                    (process.held, process.pending, process.slices) = (Some(start), None, None);
                }
                let held = process.held.unwrap_or(State { step: 0, generation: u64::MAX });
                let pending = process.pending;
                let Report::Ready(ready) = ready(held.step) else { unreachable!() };
                let committed_generation = held.generation;
                self.say(id, Report::Ready(Ready { committed_generation, pending, ..ready }));
            }
            Effect::Send { worker, command } => self.check_command(worker, command),
            Effect::Dismiss { worker, reason, rejoin } => {
                let stop = Command::Stop(Stop { exit_code: 1, reason, rejoin });
                let stream = self.streams.get_mut(&worker).unwrap();
                stream.commands.push_back(stop);
                stream.open = false;
                stream.reports.clear();
            }
            Effect::Replace { pid } => {
                assert!(self.settings.restarts_max.is_some());
                let replaced = pid as usize;
                if self.processes[replaced].life != Life::Dead {
                    self.kill(replaced);
                    self.tell_of_death(replaced);
                }
                self.spawn();
            }
            Effect::Event(Event::Lost { workers, .. }) => {
                self.left_out += workers.iter().filter(|lost| lost.noticed_by == Notice::Link).count() as u32;
                assert!(self.faults > 0 || self.crashes > 0 || self.now_ms > 0, "{workers:?} are well");
            }
            Effect::Event(_) => {}
            Effect::Abandon { abandoned, .. } => self.begin_at_checkpoint(abandoned),
            Effect::Stop { exit_code, reason } => {
                self.check_end(exit_code, &reason);
                self.end = Some(exit_code);
            }
        }
    }

    /// The run's files are cut back to the newest checkpoint, and a new machine begins there.
    ///
    /// Nobody who holds the committed state has said so, or not all parts of it are held, or it would have been gone on
    /// with. One may still be on its way: too late, or shut out by as many newcomers as the run has places. That costs the
    /// steps since the checkpoint and nothing else.
    fn begin_at_checkpoint(&mut self, abandoned: Abandoned) {
        self.abandoned += 1;
        let (committed, machine) = (self.committed(), self.machine.as_ref().unwrap());
        assert_eq!(abandoned.step, committed.step);
        if machine.state_is_lost {
            self.states_lost += 1;
            // Of those that reach each other.
            let holders = machine.roster().into_iter().filter(|worker| machine.members[worker].holds);
            assert!(self.sharded && !self.covered(holders), "abandoned with all parts at hand");
        } else {
            self.check_nobody_holds(committed);
        }
        self.cut_back();
        self.settings.abandoned = Some(abandoned);
        if self.settings.restarts_max.is_some() {
            // They end with what started them, and so many begin anew.
            for process in &mut self.processes {
                (process.life, process.worker) = (Life::Dead, None);
            }
            (0..self.settings.workers_expected).for_each(|_| self.spawn());
        }
        self.restart();
    }

    fn check_nobody_holds(&self, committed: State) {
        assert!(self.crashes > 0, "abandoned by the coordinator that knew its workers");
        let said_so = |report: &Report| {
            let Report::Ready(ready) = report else { return false };
            let held = State { step: ready.committed_step, generation: ready.committed_generation };
            held == committed || held.step + 1 == committed.step && ready.pending == Some(committed)
        };
        let mut open = self.streams.values().filter(|stream| stream.open);
        assert!(!open.any(|stream| stream.past.iter().any(said_so)), "abandoned with the state at hand");
    }

    fn cut_back(&mut self) {
        let generation = self.record.as_ref().map_or(0, |record| record.generation);
        self.ledger.retain(|record| record.step <= self.saved);
        self.trained.retain(|&step| step <= self.saved);
        self.evaluations.retain(|eval| eval.step <= self.saved);
        let saved_generation = self.ledger.iter().find(|record| record.step == self.saved).map(|r| r.generation);
        if let Some(saved_generation) = saved_generation {
            (self.settings.start_step, self.settings.start_step_generation) = (self.saved, saved_generation);
        }
        self.settings.start_generation = generation;
        self.ledger.retain(|record| record.step > self.settings.start_step);
        self.trained.retain(|&step| step > self.settings.start_step);
        self.record = None;
    }

    fn check_entry(&mut self, entry: Entry) {
        let before = self.record.as_ref().map_or(self.settings.start_generation, |record| record.generation);
        assert!(entry.record.generation >= before, "the generation on record falls");
        if let Some(commit) = entry.commit {
            self.check_commit(commit);
        }
        for event in &entry.events {
            match event {
                Event::Train(metrics) => self.trained.push(metrics.step),
                Event::Eval(metrics) => self.evaluations.push(metrics.clone()),
                Event::Recovery(recovery) => assert_eq!(Some(recovery.step), self.ledger.last().map(|last| last.step)),
                _ => {}
            }
        }
        let committed = self.committed();
        assert_eq!(entry.record.committed_step, committed.step);
        assert_eq!(entry.record.committed_generation, committed.generation);
        self.record = Some(entry.record);
    }

    fn check_commit(&mut self, record: CommitRecord) {
        let previous = self.ledger.last();
        assert_eq!(record.step, previous.map_or(self.settings.start_step, |p| p.step) + 1, "a step lost or repeated");
        let Generation { number, members, reported, .. } = &mut self.generation;
        assert_eq!(record.generation, *number, "committed under another generation");
        assert_eq!(record.workers as usize, members.len());
        assert!(members.iter().all(|member| reported.contains(member)), "committed without all of {members:?}");
        reported.clear();
        // Positions tile every epoch.
        let examples = self.settings.schedule.examples;
        if let Some(previous) = previous {
            let expected = match previous.positions[1] {
                end if end == examples => (previous.epoch + 1, 0),
                end => (previous.epoch, end),
            };
            assert_eq!((record.epoch, record.positions[0]), expected);
        }
        assert!(record.positions[0] < record.positions[1] && record.positions[1] <= examples);
        self.ledger.push(record);
    }

    fn check_command(&mut self, worker: WorkerId, command: Command) {
        let committed = self.committed();
        match &command {
            Command::Plan(plan) => {
                if plan.rank == 0 {
                    assert!(plan.generation > self.generation.number, "a generation again");
                    let members: Vec<WorkerId> = plan.members.iter().map(|member| member.worker_id).collect();
                    assert!(members.is_sorted(), "ranks are not in the order of numbers");
                    self.generation = Generation { number: plan.generation, members, ..Generation::default() };
                }
                assert_eq!(self.record.as_ref().unwrap().generation, plan.generation, "sent before it was on record");
                assert_eq!(State { step: plan.committed_step, generation: plan.committed_generation }, committed);
                assert_eq!(self.generation.members[plan.rank as usize], worker);
                self.check_lease(plan.next);
            }
            Command::Commit(commit) => {
                let this = State { step: commit.step, generation: commit.generation };
                assert_eq!(this, committed, "commit before the record");
                self.check_lease(commit.next);
            }
            Command::Stop(_) | Command::Welcome(_) => {}
        }
        self.streams.get_mut(&worker).unwrap().commands.push_back(command);
    }

    /// The leases of a generation, by rising rank, cover each micro-batch of the step once.
    fn check_lease(&mut self, lease: Option<Lease>) {
        let Some(lease) = lease else { return };
        let leased = &mut self.generation.leased;
        if leased.first().is_some_and(|first| first.step != lease.step) {
            leased.clear();
        }
        assert_eq!(lease.first_micro_batch, leased.last().map_or(0, |last| last.last_exclusive));
        leased.push(lease);
        assert!(leased.len() <= self.generation.members.len());
        if leased.len() == self.generation.members.len() {
            assert_eq!(lease.last_exclusive, self.settings.schedule.step(lease.step).micro_batches);
        }
    }

    fn check_end(&self, code: u32, reason: &str) {
        let total = self.settings.schedule.total_steps;
        let committed = self.committed().step;
        assert!(self.trained.iter().copied().eq(self.ledger.iter().map(|record| record.step)), "metrics and ledger");
        match code {
            exit_code::DONE => {
                let selection = self.settings.selection.as_ref();
                let losses = self.evaluations.iter().rev();
                let best = losses.min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).map_or(0, |best| best.step);
                let loads = selection.is_some_and(|selection| selection.load_best_model_at_end);
                assert_eq!(self.model_written.expect("done without a model"), if loads { best } else { 0 });
                assert!(self.settings.save_steps.is_none() || self.saved == committed || self.ledger.is_empty());
                let patience = selection.and_then(|selection| selection.early_stopping_patience);
                // Nothing was better than the best in so many evaluations, and in no fewer.
                let after_best = self.evaluations.iter().filter(|evaluation| evaluation.step > best).count();
                assert!(patience.is_none_or(|patience| after_best <= patience as usize), "stopped late");
                let out = patience.is_some_and(|patience| after_best == patience as usize);
                assert!(committed == total || out, "stopped at {committed} of {total}: {reason}");
            }
            exit_code::PREEMPTED => assert!(self.preempted),
            exit_code::TOO_FEW_WORKERS => assert!(self.faults > 0, "{reason}"),
            // The last word of a run that ends early; any other checkpoint that fails is only told.
            exit_code::FAILURE if reason == "disk full" => {
                assert!(self.unsaved.contains(&committed) && committed < total, "{committed} of {total}");
            }
            // A process of the launcher died before training began.
            exit_code::FAILURE if reason.contains("before it joined") => {
                assert!(self.faults > 0 && self.record.is_none() && self.settings.restarts_max.is_some(), "{reason}");
            }
            _ => panic!("exit code {code}: {reason}"),
        }
    }
}
