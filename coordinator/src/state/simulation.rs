//! Seeded simulations: workers that join, compute, die, repeat themselves and speak late, in any
//! interleaving, against what must always hold. A failure names its seed, which replays it.

use std::collections::{BTreeMap, VecDeque};

use quintet_proto::v1::{Evaluated, Finished, Heartbeat, Lease, Saved, StepFailed};

use super::tests::{ready, schedule, settings, step_done};
use super::*;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> Option<T> {
        (!items.is_empty()).then(|| items[self.below(items.len() as u64) as usize])
    }
}

/// A worker, with both directions of its stream: each keeps its order, none waits for another's.
struct Worker {
    alive: bool,
    /// Steps its weights have seen.
    weights: u64,
    generation: u64,
    rank: u32,
    digest_due: bool,
    lease: Option<Lease>,
    commands: VecDeque<Command>,
    reports: VecDeque<Input>,
    /// What the machine has heard of it, to repeat.
    past: Vec<Report>,
}

struct World {
    machine: Machine,
    settings: Settings,
    random: Random,
    now_ms: u64,
    workers: BTreeMap<WorkerId, Worker>,
    next_worker: WorkerId,
    /// The members of the newest generation.
    members: Vec<WorkerId>,
    generation: u64,
    /// Who reported which step under which generation, as far as the machine has heard.
    reported: Vec<(WorkerId, u64, u64)>,
    ledger: Vec<CommitRecord>,
    saved: Option<u64>,
    /// With the step whose weights it has, if not those of the end.
    model_written: Option<u64>,
    evaluations: Vec<(u64, f64)>,
    preempted: bool,
    deaths: u32,
    end: Option<u32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let workers_expected = 1 + random.below(5) as u32;
        let every = |random: &mut Random| random.chance(50).then(|| 1 + random.below(4));
        let start_step = if random.chance(25) { random.below(20) } else { 0 };
        let settings = Settings {
            schedule: schedule(1 + random.below(40), 8, [1, 2, 4, 8][random.below(4) as usize], 20),
            workers_expected,
            workers_min: 1 + random.below(u64::from(workers_expected)) as u32,
            eval_steps: every(&mut random),
            save_steps: every(&mut random),
            digest_steps: every(&mut random),
            start_step,
            start_generation: start_step,
            selection: random.chance(40).then(|| Selection {
                metric: "loss".to_owned(),
                greater_is_better: false,
                load_best_model_at_end: random.chance(50),
                early_stopping_patience: random.chance(50).then(|| 1 + random.below(3) as u32),
                early_stopping_threshold: 0.0,
            }),
            ..settings()
        };
        let settings = match settings.eval_steps {
            Some(_) => settings,
            // As the configuration sees to it.
            None => Settings { selection: None, ..settings },
        };
        let machine = Machine::new(settings.clone());
        Self {
            machine,
            random,
            now_ms: 0,
            workers: BTreeMap::new(),
            next_worker: 0,
            members: Vec::new(),
            generation: settings.start_generation,
            reported: Vec::new(),
            ledger: Vec::new(),
            saved: None,
            model_written: None,
            evaluations: Vec::new(),
            preempted: false,
            deaths: 0,
            end: None,
            settings,
        }
    }

    /// One random event.
    fn event(&mut self) {
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        let worker = self.random.pick(&ids);
        match (self.random.below(1000), worker) {
            (0..450, Some(worker)) => self.deliver_report(worker),
            (450..900, Some(worker)) => self.obey(worker),
            (900..960, _) => self.pass_time(),
            (960..970, Some(worker)) => self.repeat(worker),
            (970..974, Some(worker)) => self.die(worker),
            (974, _) => {
                self.preempted = true;
                self.input(Input::Preempt);
            }
            _ => self.join(),
        }
    }

    fn join(&mut self) {
        // Now and then one too many, or too late.
        if self.next_worker >= u64::from(self.settings.workers_expected) && !self.random.chance(2) {
            return;
        }
        let worker = self.next_worker;
        self.next_worker += 1;
        let fresh = Worker {
            alive: true,
            weights: self.settings.start_step,
            generation: 0,
            rank: 0,
            digest_due: false,
            lease: None,
            commands: VecDeque::new(),
            reports: VecDeque::new(),
            past: Vec::new(),
        };
        self.workers.insert(worker, fresh);
        self.input(Input::Joined { worker, host: "h".to_owned(), pid: worker as u32 });
    }

    fn deliver_report(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(input) = worker.reports.pop_front() else { return };
        if let Input::Report { report, .. } = &input {
            worker.past.push(report.clone());
        }
        self.input(input);
    }

    /// An earlier report once more, out of turn. (Saying ready twice is a violation of its own.)
    fn repeat(&mut self, worker: WorkerId) {
        let past: Vec<usize> = (0..self.workers[&worker].past.len()).collect();
        let Some(index) = self.random.pick(&past) else { return };
        let report = self.workers[&worker].past[index].clone();
        if self.workers[&worker].alive && !matches!(report, Report::Ready(_)) {
            self.input(Input::Report { worker, report });
        }
    }

    fn die(&mut self, worker: WorkerId) {
        let why = "killed".to_owned();
        let silent = self.random.chance(30);
        let Some(dying) = self.workers.get_mut(&worker) else { return };
        if !std::mem::take(&mut dying.alive) {
            return;
        }
        self.deaths += 1;
        // Either its stream breaks behind what it said last, or its machine vanishes.
        if silent {
            dying.reports.clear();
        } else {
            dying.reports.push_back(Input::Left { worker, why });
        }
    }

    /// Time passes; the living are heard of.
    fn pass_time(&mut self) {
        self.now_ms += 1 + self.random.below(4000);
        let alive: Vec<WorkerId> = self.workers.iter().filter(|(_, w)| w.alive).map(|(&id, _)| id).collect();
        for worker in alive {
            self.input(Input::Report { worker, report: Report::Heartbeat(Heartbeat {}) });
        }
        self.input(Input::Tick);
    }

    /// A worker takes its next command, or goes on with its lease.
    fn obey(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if !worker.alive {
            return;
        }
        let (actions, finish) = match worker.commands.pop_front() {
            None => return self.compute(id),
            Some(Command::Plan(plan)) => {
                assert_eq!(plan.committed_step, worker.weights, "planned on other weights");
                assert!(plan.generation > worker.generation);
                (worker.generation, worker.rank, worker.lease) = (plan.generation, plan.rank, plan.next);
                let actions = plan.actions.unwrap();
                (actions, actions.finish)
            }
            Some(Command::Commit(commit)) => {
                assert_eq!((commit.step, commit.generation), (worker.weights + 1, worker.generation));
                worker.weights = commit.step;
                worker.lease = commit.next;
                let actions = commit.actions.unwrap();
                (actions, actions.finish)
            }
            Some(Command::Stop(_)) => {
                worker.alive = false;
                return;
            }
            Some(Command::Welcome(_)) => unreachable!("the shell fills in the welcome"),
        };
        worker.digest_due = actions.digest;
        let (step, generation, rank) = (worker.weights, worker.generation, worker.rank);
        if rank == 0 && actions.evaluate {
            // The same for the same weights, and as good as drawn.
            let loss = (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64;
            self.say(id, Report::Evaluated(Evaluated { step, loss, metrics: BTreeMap::new() }));
        }
        if rank == 0 && actions.save {
            self.say(id, Report::Saved(Saved { step }));
        }
        if finish {
            if rank == 0 {
                self.model_written = Some(actions.best_step);
            }
            self.say(id, Report::Finished(Finished { generation, weights_digest: vec![step as u8] }));
        }
    }

    /// Computes the lease with the peers, or notices that one is dead.
    fn compute(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        let Some(lease) = worker.lease else { return };
        let generation = worker.generation;
        let peer_dead = self.members.iter().any(|peer| !self.workers[peer].alive);
        let report = if peer_dead && self.random.chance(50) {
            Report::StepFailed(StepFailed { generation, step: lease.step, detail: "peer closed".to_owned() })
        } else {
            // Replicas that have seen the same steps have the same digest.
            let weights_digest = worker.digest_due.then(|| worker.weights.to_le_bytes().to_vec());
            let done = step_done(&self.settings.schedule, generation, &lease);
            Report::StepDone(StepDone { weights_digest, ..done })
        };
        self.say(id, report);
        self.workers.get_mut(&id).unwrap().lease = None;
    }

    fn say(&mut self, id: WorkerId, report: Report) {
        let worker = self.workers.get_mut(&id).unwrap();
        worker.reports.push_back(Input::Report { worker: id, report });
    }

    fn input(&mut self, input: Input) {
        match &input {
            Input::Report { worker, report: Report::StepDone(done) } => {
                self.reported.push((*worker, done.generation, done.step));
            }
            Input::Report { report: Report::Saved(saved), .. } => self.saved = self.saved.max(Some(saved.step)),
            _ => {}
        }
        let effects = self.machine.step(self.now_ms, input);
        assert!(self.end.is_none() || effects.is_empty(), "something happened after the end");
        for effect in effects {
            self.check(effect);
        }
    }

    fn check(&mut self, effect: Effect) {
        assert!(self.end.is_none(), "an effect behind the last");
        match effect {
            Effect::Commit(record) => self.check_commit(record),
            Effect::Welcome { worker } => {
                let step = self.settings.start_step;
                self.say(worker, ready(step));
            }
            Effect::Send { worker, command } => self.check_command(worker, command),
            Effect::Dismiss { worker, .. } => self.workers.get_mut(&worker).unwrap().alive = false,
            Effect::Event(Event::Recovery(recovery)) => {
                assert_eq!(recovery.generation, self.generation + 1);
                for lost in &recovery.lost {
                    assert!(!self.workers[&lost.worker].alive, "one who lives was taken for lost");
                }
            }
            Effect::Event(Event::Eval(metrics)) => self.evaluations.push((metrics.step, metrics.eval_loss)),
            Effect::Event(_) => {}
            Effect::Stop { exit_code, reason } => {
                self.check_end(exit_code, &reason);
                self.end = Some(exit_code);
            }
        }
    }

    fn check_commit(&mut self, record: CommitRecord) {
        let previous = self.ledger.last();
        assert_eq!(record.step, previous.map_or(self.settings.start_step, |p| p.step) + 1, "a step lost or repeated");
        assert_eq!(record.generation, self.generation, "committed under another generation");
        assert_eq!(record.workers as usize, self.members.len());
        for &member in &self.members {
            let report = (member, record.generation, record.step);
            assert!(self.reported.contains(&report), "committed without worker {member}");
        }
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
        self.reported.clear();
        self.ledger.push(record);
    }

    fn check_command(&mut self, worker: WorkerId, command: Command) {
        let committed = self.ledger.last().map_or(self.settings.start_step, |record| record.step);
        match &command {
            Command::Plan(plan) => {
                if plan.rank == 0 {
                    assert_eq!(plan.generation, self.generation + 1, "a generation skipped or repeated");
                    self.generation = plan.generation;
                    self.members = plan.members.iter().map(|member| member.worker_id).collect();
                    assert!(self.members.is_sorted(), "ranks are not in the order of numbers");
                }
                assert_eq!((plan.generation, plan.committed_step), (self.generation, committed));
                assert_eq!(self.members[plan.rank as usize], worker);
            }
            Command::Commit(commit) => {
                assert_eq!((commit.generation, commit.step), (self.generation, committed), "commit before the record");
            }
            Command::Stop(_) | Command::Welcome(_) => {}
        }
        self.workers.get_mut(&worker).unwrap().commands.push_back(command);
    }

    fn check_end(&self, code: u32, reason: &str) {
        let total = self.settings.schedule.total_steps;
        let committed = self.ledger.last().map_or(self.settings.start_step, |record| record.step);
        match code {
            exit_code::DONE => {
                let selection = self.settings.selection.as_ref();
                let best = self.evaluations.iter().rev().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |best| best.0);
                let loads = selection.is_some_and(|selection| selection.load_best_model_at_end);
                assert_eq!(self.model_written.expect("done without a model"), if loads { best } else { 0 });
                assert!(self.settings.save_steps.is_none() || self.saved == Some(committed) || self.ledger.is_empty());
                let patience = selection.and_then(|selection| selection.early_stopping_patience);
                // Nothing was better than the best in so many evaluations, and in no fewer.
                let after_best = self.evaluations.iter().filter(|evaluation| evaluation.0 > best).count();
                assert!(patience.is_none_or(|patience| after_best <= patience as usize), "stopped late");
                let out = patience.is_some_and(|patience| after_best == patience as usize);
                assert!(committed == total || out, "stopped at {committed} of {total}: {reason}");
            }
            exit_code::PREEMPTED => {
                assert!(self.preempted);
                assert!(self.generation == self.settings.start_generation || self.saved == Some(committed));
            }
            exit_code::TOO_FEW_WORKERS => assert!(self.deaths > 0, "{reason}"),
            _ => panic!("exit code {code}: {reason}"),
        }
    }
}

#[test]
fn whatever_happens_every_step_is_committed_once_and_the_run_ends() {
    const RUNS: u64 = 5_000;
    const EVENTS_MAX: u64 = 50_000;
    let mut events = 0;
    let mut ends: BTreeMap<u32, u32> = BTreeMap::new();
    let mut recovered = 0;
    for seed in 0..RUNS {
        let run = std::panic::AssertUnwindSafe(|| {
            let mut world = World::new(seed);
            let mut count = 0;
            while world.end.is_none() {
                assert!(count < EVENTS_MAX, "the run does not end");
                world.event();
                count += 1;
            }
            (count, world)
        });
        let Ok((count, world)) = std::panic::catch_unwind(run) else {
            panic!("seed {seed} fails");
        };
        events += count;
        *ends.entry(world.end.unwrap()).or_default() += 1;
        recovered += u64::from(world.generation > world.settings.start_generation + 1 && world.end == Some(0));
    }
    // The simulation is worth its name only if it meets all of it.
    assert!(events > 1_000_000, "{events} events");
    assert!(recovered > 50, "{recovered} runs recovered and completed");
    for code in [exit_code::DONE, exit_code::TOO_FEW_WORKERS, exit_code::PREEMPTED] {
        assert!(ends.get(&code).is_some_and(|&runs| runs > 20), "{ends:?}");
    }
}
