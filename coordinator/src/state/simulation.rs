//! Seeded simulations: workers that join, compute, die, hang, come back, repeat themselves, speak
//! late and cannot reach each other, and a coordinator that is killed between any two effects and goes on from its
//! record, in any interleaving, against what must always hold. A failure names its seed, which
//! replays it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quintet_proto::v1::{Evaluated, Finished, Heartbeat, Lease, Plan, SaveFailed, Saved, State, StateLost, StepFailed};

use super::tests::{ready, schedule, settings, step_done};
use super::*;

mod checks;

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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    Runs,
    /// Stopped by a signal: it does nothing, and may go on later.
    Hangs,
    Dead,
}

/// A worker process.
struct Process {
    life: Life,
    /// The state of its replica.
    held: Option<State>,
    /// Reduced and reported, and not known to be committed.
    pending: Option<State>,
    /// What of the optimizer's state it has: all of it, or its own and a neighbour's slice of a generation.
    slices: Option<Slices>,
    /// Of the generation it is in.
    place: Option<Slices>,
    /// Its number on the stream that it has, if it has one.
    worker: Option<WorkerId>,
    generation: u64,
    rank: u32,
    digest_due: bool,
    lease: Option<Lease>,
    /// A checkpoint that it writes.
    saving: Option<u64>,
}

/// The slices of a rank among so many.
#[derive(Clone, Copy)]
struct Slices {
    rank: u32,
    world: u32,
}

impl Slices {
    /// Points of a state that divisions among up to five ranks cut.
    const POINTS: u32 = 60;

    /// Whether a point is in a rank's slice, or in that of the rank before.
    fn cover(self, point: u32) -> bool {
        let owner = point * self.world / Self::POINTS;
        owner == self.rank || (owner + 1) % self.world == self.rank
    }
}

/// Both directions of a stream: each keeps its order, none waits for another's.
struct Stream {
    process: usize,
    commands: VecDeque<Command>,
    reports: VecDeque<Input>,
    /// What the machine has heard on it, to repeat.
    past: Vec<Report>,
    open: bool,
}

/// A generation, as its plan was sent out.
#[derive(Default)]
struct Generation {
    number: u64,
    members: Vec<WorkerId>,
    /// The step that is leased, and what of it to whom.
    leased: Vec<Lease>,
    reported: Vec<WorkerId>,
    /// Whether its members had the whole state when the first of them met the others.
    complete: Option<bool>,
}

struct World {
    /// None while the coordinator is dead.
    machine: Option<Machine>,
    settings: Settings,
    random: Random,
    /// The optimizer's state is sharded.
    sharded: bool,
    /// Of the coordinator, which begins anew at zero.
    now_ms: u64,
    processes: Vec<Process>,
    /// Pairs of processes, the earlier first, between which nothing arrives.
    cut: BTreeSet<(usize, usize)>,
    streams: BTreeMap<WorkerId, Stream>,
    next_worker: WorkerId,
    generation: Generation,
    // What is on disk.
    ledger: Vec<CommitRecord>,
    trained: Vec<u64>,
    record: Option<Record>,
    saved: u64,
    /// Steps whose checkpoint could not be written.
    unsaved: Vec<u64>,
    evaluations: Vec<EvalMetrics>,
    /// With the step whose weights it has, if not those of the end.
    model_written: Option<u64>,
    // What is expected.
    preempted: bool,
    faults: u32,
    crashes: u32,
    abandoned: u32,
    states_lost: u32,
    healed: u32,
    /// Workers that were left out of a generation for want of a link.
    left_out: u32,
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
            restarts_max: random.chance(40).then(|| random.below(6) as u32),
            eval_steps: every(&mut random),
            save_steps: every(&mut random),
            digest_steps: every(&mut random),
            start_step,
            start_step_generation: start_step,
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
        let generation = Generation { number: settings.start_generation, ..Generation::default() };
        Self {
            machine: Some(Machine::new(settings.clone())),
            sharded: random.chance(40),
            random,
            now_ms: 0,
            processes: Vec::new(),
            cut: BTreeSet::new(),
            streams: BTreeMap::new(),
            next_worker: 0,
            generation,
            ledger: Vec::new(),
            trained: Vec::new(),
            record: None,
            saved: settings.start_step,
            unsaved: Vec::new(),
            evaluations: Vec::new(),
            model_written: None,
            preempted: false,
            faults: 0,
            crashes: 0,
            abandoned: 0,
            states_lost: 0,
            healed: 0,
            left_out: 0,
            end: None,
            settings,
        }
    }

    fn committed(&self) -> State {
        let start = State { step: self.settings.start_step, generation: self.settings.start_step_generation };
        self.ledger.last().map_or(start, |last| State { step: last.step, generation: last.generation })
    }

    /// One random event.
    fn event(&mut self) {
        let process = match self.processes.len() as u64 {
            0 => None,
            count => Some(self.random.below(count) as usize),
        };
        match (self.random.below(2000), process) {
            (0..900, _) => self.deliver_report(),
            (900..1800, Some(process)) => self.run_process(process),
            (1800..1920, _) => self.pass_time(),
            (1920..1940, _) => self.repeat(),
            (1940..1946, Some(process)) => self.die(process),
            (1946..1950, Some(process)) => self.hang_or_go_on(process),
            (1950..1954, Some(process)) => self.cut_stream(process),
            (1960..1964, Some(process)) => self.cut_or_mend(process),
            (1954, _) => {
                self.preempted = true;
                self.input(Input::Preempt);
            }
            (1955..1957, _) => self.crash(),
            (1957..1960, _) => self.now_ms += self.random.below(3_600_000),
            _ => self.start_process(),
        }
    }

    /// A process is started: at the beginning, in place of a dead one, or one too many.
    fn start_process(&mut self) {
        let alive = self.processes.iter().filter(|process| process.life != Life::Dead).count() as u32;
        let launched =
            self.settings.restarts_max.is_some() && self.processes.len() as u32 >= self.settings.workers_expected;
        if launched || alive >= self.settings.workers_expected && !self.random.chance(2) {
            return;
        }
        self.spawn();
    }

    fn spawn(&mut self) {
        self.processes.push(Process {
            life: Life::Runs,
            held: None,
            pending: None,
            slices: None,
            place: None,
            worker: None,
            generation: 0,
            rank: 0,
            digest_due: false,
            lease: None,
            saving: None,
        });
    }

    /// A process takes its next command, goes on with its lease, or connects.
    fn run_process(&mut self, process: usize) {
        if self.processes[process].life != Life::Runs {
            return;
        }
        let Some(worker) = self.processes[process].worker else { return self.connect(process) };
        let stream = self.streams.get_mut(&worker).unwrap();
        match stream.commands.pop_front() {
            Some(command) => self.obey(process, command),
            // What the coordinator had sent is read before the end is noticed.
            None if !stream.open => self.processes[process].worker = None,
            None => self.compute(process),
        }
    }

    fn connect(&mut self, process: usize) {
        if self.machine.is_none() {
            return;
        }
        let worker = self.next_worker;
        self.next_worker += 1;
        let stream =
            Stream { process, commands: VecDeque::new(), reports: VecDeque::new(), past: Vec::new(), open: true };
        self.streams.insert(worker, stream);
        let running = &mut self.processes[process];
        (running.worker, running.lease, running.generation) = (Some(worker), None, 0);
        let (pid, instance) = (process as u32, process as u64);
        self.input(Input::Joined { worker, host: "h".to_owned(), pid, instance });
    }

    fn deliver_report(&mut self) {
        let waiting: Vec<WorkerId> =
            self.streams.iter().filter(|(_, stream)| !stream.reports.is_empty()).map(|(&id, _)| id).collect();
        let Some(worker) = self.random.pick(&waiting) else { return };
        let stream = self.streams.get_mut(&worker).unwrap();
        let Some(input) = stream.reports.pop_front() else { return };
        if let Input::Report { report, .. } = &input {
            stream.past.push(report.clone());
        }
        self.input(input);
    }

    /// An earlier report once more, out of turn. (Saying ready twice is a violation of its own.)
    fn repeat(&mut self) {
        let ids: Vec<WorkerId> = self.streams.keys().copied().collect();
        let Some(worker) = self.random.pick(&ids) else { return };
        let past = &self.streams[&worker].past;
        if past.is_empty() {
            return;
        }
        let report = past[self.random.below(past.len() as u64) as usize].clone();
        if !matches!(report, Report::Ready(_)) {
            self.input(Input::Report { worker, report });
        }
    }

    fn die(&mut self, process: usize) {
        if self.processes[process].life == Life::Dead {
            return;
        }
        self.faults += 1;
        self.kill(process);
        // Its machine may vanish, so that nobody hears of it.
        if self.settings.restarts_max.is_some() || !self.random.chance(30) {
            self.tell_of_death(process);
        }
    }

    fn kill(&mut self, process: usize) {
        self.processes[process].life = Life::Dead;
    }

    /// Its stream breaks behind what it said last; and its parent is told, earlier or later.
    fn tell_of_death(&mut self, process: usize) {
        let exited = self.settings.restarts_max.is_some().then(|| Input::ProcessExited {
            pid: process as u32,
            exit_code: None,
            why: "killed".to_owned(),
        });
        let worker = self.processes[process].worker;
        let left = worker.map(|worker| (worker, Input::Left { worker, why: "reset".to_owned() }));
        let exit_first = self.random.chance(50);
        match (left, exited) {
            (Some((worker, left)), exited) => {
                let reports = &mut self.streams.get_mut(&worker).unwrap().reports;
                let exited = exited.into_iter();
                let both: Vec<Input> = if exit_first {
                    exited.chain([left]).collect()
                } else {
                    [left].into_iter().chain(exited).collect()
                };
                reports.extend(both);
            }
            (None, Some(exited)) => self.input(exited),
            (None, None) => {}
        }
    }

    fn hang_or_go_on(&mut self, process: usize) {
        let life = &mut self.processes[process].life;
        match life {
            Life::Runs => (*life, self.faults) = (Life::Hangs, self.faults + 1),
            Life::Hangs => *life = Life::Runs,
            Life::Dead => {}
        }
    }

    /// What one process sends another is lost from now on; or arrives again.
    fn cut_or_mend(&mut self, process: usize) {
        let other = self.random.below(self.processes.len() as u64) as usize;
        let pair = (process.min(other), process.max(other));
        if process != other && !self.cut.remove(&pair) {
            self.faults += 1;
            self.cut.insert(pair);
        }
    }

    /// Pairs of ranks of the generation that do not reach each other.
    fn cut_ranks(&self) -> Vec<(u32, u32)> {
        let process = |rank: usize| self.streams[&self.generation.members[rank]].process;
        let world = self.generation.members.len();
        let pairs = (0..world).flat_map(|low| (low + 1..world).map(move |high| (low, high)));
        let is_cut = |&(low, high): &(usize, usize)| {
            let (a, b) = (process(low), process(high));
            self.cut.contains(&(a.min(b), a.max(b)))
        };
        pairs.filter(is_cut).map(|(low, high)| (low as u32, high as u32)).collect()
    }

    /// Whether the process waits for what does not come.
    fn is_blocked(&self, id: usize) -> bool {
        let process = &self.processes[id];
        process.lease.is_some() && process.generation == self.generation.number && !self.cut_ranks().is_empty()
    }

    /// A connection breaks, and nobody dies.
    fn cut_stream(&mut self, process: usize) {
        let Some(worker) = self.processes[process].worker else { return };
        let stream = self.streams.get_mut(&worker).unwrap();
        if !std::mem::replace(&mut stream.open, false) {
            return;
        }
        self.faults += 1;
        // Some of what was under way is lost, in both directions.
        let lose = |count: usize, random: &mut Random| random.below(count as u64 + 1) as usize;
        stream.commands.truncate(lose(stream.commands.len(), &mut self.random));
        stream.reports.truncate(lose(stream.reports.len(), &mut self.random));
        stream.reports.push_back(Input::Left { worker, why: "cut".to_owned() });
    }

    /// The coordinator is killed; all it had not made durable is gone, and another starts at once
    /// or after a while. Processes that it launched go with it, and with them the run.
    fn crash(&mut self) {
        if self.settings.restarts_max.is_some() || self.end.is_some() {
            return;
        }
        self.crashes += 1;
        self.restart();
    }

    fn restart(&mut self) {
        self.machine = None;
        for stream in self.streams.values_mut() {
            stream.open = false;
            stream.reports.clear();
            stream.commands.truncate(self.random.below(stream.commands.len() as u64 + 1) as usize);
        }
        self.now_ms = 0;
        self.generation.members.clear();
        self.preempted = false;
        let machine = match &self.record {
            Some(record) => {
                let last = self.committed();
                assert_eq!((record.committed_step, record.committed_generation), (last.step, last.generation));
                let past_evaluations = self.evaluations.clone();
                Machine::take_over(Settings { past_evaluations, ..self.settings.clone() }, record)
            }
            None => {
                let past_evaluations = self.evaluations.clone();
                Machine::new(Settings { past_evaluations, ..self.settings.clone() })
            }
        };
        self.machine = Some(machine);
    }

    /// Time passes; those who run are heard of.
    fn pass_time(&mut self) {
        self.now_ms += 1 + self.random.below(2000);
        let running: Vec<(WorkerId, bool)> = self
            .processes
            .iter()
            .enumerate()
            .filter(|(_, process)| process.life == Life::Runs)
            .filter_map(|(id, process)| {
                let worker = process.worker.filter(|worker| self.streams[worker].open)?;
                Some((worker, self.is_blocked(id)))
            })
            .collect();
        for (worker, blocked) in running {
            let waiting = blocked || self.random.chance(50);
            let progress = if blocked { 0 } else { self.now_ms };
            self.input(Input::Report { worker, report: Report::Heartbeat(Heartbeat { waiting, progress }) });
        }
        self.input(Input::Tick);
    }

    fn obey(&mut self, id: usize, command: Command) {
        let committed_in = |generation, step| State { step, generation };
        let process = &mut self.processes[id];
        let (actions, lease) = match command {
            Command::Welcome(_) => unreachable!("the shell fills in the welcome"),
            Command::Stop(stop) => {
                process.worker = None;
                if !stop.rejoin {
                    process.life = Life::Dead;
                    self.tell_of_death(id);
                }
                return;
            }
            Command::Plan(plan) => {
                assert!(plan.generation > process.generation);
                (process.generation, process.rank, process.lease) = (plan.generation, plan.rank, None);
                let committed = committed_in(plan.committed_generation, plan.committed_step);
                if process.pending.take() == Some(committed) && process.held.is_some() {
                    process.held = Some(committed);
                }
                if !self.connect_all(id, &plan) {
                    return;
                }
                let slices = Slices { rank: plan.rank, world: plan.members.len() as u32 };
                self.processes[id].place = Some(slices);
                if self.sharded && !self.meet(id, &plan, committed) {
                    return;
                }
                if plan.healed.contains(&plan.rank) {
                    self.processes[id].held = None;
                    if !plan.members.iter().any(|member| self.holds(member.worker_id, committed)) {
                        let (generation, step) = (plan.generation, plan.committed_step);
                        let detail = "nobody to be healed by".to_owned();
                        let failed = StepFailed { generation, step, detail, ..StepFailed::default() };
                        return self.say(id, Report::StepFailed(failed));
                    }
                    self.healed += 1;
                    (self.processes[id].held, self.processes[id].slices) = (Some(committed), Some(slices));
                }
                assert_eq!(self.processes[id].held, Some(committed), "planned on another state");
                (plan.actions, plan.next)
            }
            Command::Commit(commit) => {
                let committed = committed_in(commit.generation, commit.step);
                assert_eq!(process.pending.take(), Some(committed));
                process.held = Some(committed);
                (commit.actions, commit.next)
            }
        };
        self.act(id, actions.unwrap_or_default(), lease);
    }

    /// Whether the process on this stream can hand over the state.
    fn holds(&self, worker: WorkerId, state: State) -> bool {
        let process = &self.processes[self.streams[&worker].process];
        self.is_there(worker) && (process.held == Some(state) || process.pending == Some(state))
    }

    fn is_there(&self, worker: WorkerId) -> bool {
        let process = &self.processes[self.streams[&worker].process];
        process.worker == Some(worker) && process.life == Life::Runs
    }

    /// Whether the mesh of a generation comes about, as far as this member needs it at once. Who dials another in vain says
    /// so, and who is dialled waits.
    fn connect_all(&mut self, id: usize, plan: &Plan) -> bool {
        let cut = if plan.generation == self.generation.number { self.cut_ranks() } else { Vec::new() };
        if cut.is_empty() {
            return true;
        }
        let is_healed = plan.healed.contains(&plan.rank);
        if is_healed {
            self.processes[id].held = None;
        }
        let unreachable: Vec<u32> =
            cut.into_iter().filter(|&(_, high)| high == plan.rank).map(|(low, _)| low).collect();
        if unreachable.is_empty() {
            return !(is_healed || self.sharded);
        }
        let (generation, step, detail) = (plan.generation, plan.committed_step, "no answer".to_owned());
        self.say(id, Report::StepFailed(StepFailed { generation, step, detail, unreachable }));
        false
    }

    /// A member of a generation meets the others, to find out whether they have all of the optimizer's state between them.
    /// If it cannot, or they have not, it says so.
    fn meet(&mut self, id: usize, plan: &Plan, state: State) -> bool {
        let generation = plan.generation;
        let members: Vec<WorkerId> = plan.members.iter().map(|member| member.worker_id).collect();
        let complete = match self.generation.complete {
            // All others found the same.
            Some(complete) if self.generation.number == generation => complete,
            _ if members.iter().all(|&member| self.is_there(member)) => {
                self.covered(members.iter().copied().filter(|&member| self.holds(member, state)))
            }
            _ => {
                let (step, detail) = (plan.committed_step, "a peer is missing".to_owned());
                let failed = StepFailed { generation, step, detail, ..StepFailed::default() };
                self.say(id, Report::StepFailed(failed));
                return false;
            }
        };
        if self.generation.number == generation {
            self.generation.complete = Some(complete);
        }
        if !complete {
            self.say(id, Report::StateLost(StateLost { generation, problem: "a slice is gone".to_owned() }));
        }
        complete
    }

    /// Whether the processes on these streams have all of the optimizer's state.
    fn covered(&self, workers: impl Iterator<Item = WorkerId>) -> bool {
        let slices: Vec<Option<Slices>> =
            workers.map(|worker| self.processes[self.streams[&worker].process].slices).collect();
        let has = |point| slices.iter().any(|slices| slices.is_none_or(|slices| slices.cover(point)));
        (0..Slices::POINTS).all(has)
    }

    fn act(&mut self, id: usize, actions: Actions, lease: Option<Lease>) {
        let process = &mut self.processes[id];
        process.lease = lease;
        process.digest_due = actions.digest;
        let (generation, rank) = (process.generation, process.rank);
        let step = process.held.map_or(0, |held| held.step);
        if rank == 0 && actions.evaluate {
            // The same for the same weights, and as good as drawn.
            let loss = (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64;
            self.say(id, Report::Evaluated(Evaluated { step, loss, metrics: BTreeMap::new() }));
        }
        if rank == 0 && actions.save && self.processes[id].saving != Some(step) {
            self.end_save(id);
            self.processes[id].saving = Some(step);
        }
        if lease.is_none() && (actions.save || actions.finish) {
            self.end_save(id);
        }
        if actions.finish {
            if rank == 0 {
                self.model_written = Some(actions.best_step);
            }
            self.say(id, Report::Finished(Finished { generation, weights_digest: vec![step as u8] }));
        }
    }

    /// The checkpoint under way is on disk, or fails.
    fn end_save(&mut self, id: usize) {
        let Some(step) = self.processes[id].saving.take() else { return };
        if step < self.settings.schedule.total_steps && !self.preempted && self.random.chance(10) {
            self.unsaved.push(step);
            return self.say(id, Report::SaveFailed(SaveFailed { step, message: "disk full".to_owned() }));
        }
        self.saved = self.saved.max(step);
        self.say(id, Report::Saved(Saved { step }));
    }

    /// Computes the lease with the peers, or notices that one is dead.
    fn compute(&mut self, id: usize) {
        if self.random.chance(30) {
            self.end_save(id);
        }
        let process = &self.processes[id];
        let (Some(lease), Some(worker)) = (process.lease, process.worker) else { return };
        let generation = process.generation;
        let current = generation == self.generation.number && self.generation.members.contains(&worker);
        let peer_failed = !current
            || self.generation.members.iter().any(|peer| {
                let process = &self.processes[self.streams[peer].process];
                process.worker != Some(*peer) || process.life == Life::Dead
            });
        let blocked = self.is_blocked(id);
        if blocked && !self.random.chance(5) {
            return;
        }
        if blocked || peer_failed && self.random.chance(50) {
            let detail = "peer closed".to_owned();
            self.say(
                id,
                Report::StepFailed(StepFailed { generation, step: lease.step, detail, ..StepFailed::default() }),
            );
        } else {
            let held = process.held.expect("computes on a state");
            // Replicas that have seen the same commits have the same digest.
            let digest = [held.step.to_le_bytes(), held.generation.to_le_bytes()].concat();
            let weights_digest = process.digest_due.then_some(digest);
            assert_eq!(held.step + 1, lease.step);
            let done = step_done(&self.settings.schedule, generation, &lease);
            self.processes[id].pending = Some(State { step: lease.step, generation });
            self.processes[id].slices = self.processes[id].place;
            self.say(id, Report::StepDone(StepDone { weights_digest, ..done }));
        }
        self.processes[id].lease = None;
    }

    fn say(&mut self, id: usize, report: Report) {
        let Some(worker) = self.processes[id].worker else { return };
        let stream = self.streams.get_mut(&worker).unwrap();
        if stream.open {
            stream.reports.push_back(Input::Report { worker, report });
        }
    }

    fn input(&mut self, input: Input) {
        let Some(machine) = &mut self.machine else { return };
        if let Input::Report { worker, report: Report::StepDone(done) } = &input
            && done.generation == self.generation.number
            && self.generation.leased.first().is_some_and(|lease| lease.step == done.step)
        {
            self.generation.reported.push(*worker);
        }
        let effects = machine.step(self.now_ms, input);
        assert!(self.end.is_none() || effects.is_empty(), "something happened after the end");
        // Now and then the coordinator dies between two effects.
        let by_hand = self.settings.restarts_max.is_none();
        let cut = (by_hand && !effects.is_empty() && self.random.below(500) == 0)
            .then(|| self.random.below(effects.len() as u64) as usize);
        for (index, effect) in effects.into_iter().enumerate() {
            if cut == Some(index) {
                return self.crash();
            }
            self.check(effect);
        }
    }
}

#[test]
fn whatever_happens_every_step_is_committed_once_and_the_run_ends() {
    const RUNS: u64 = 5_000;
    const EVENTS_MAX: u64 = 200_000;
    let mut events = 0;
    let mut ends: BTreeMap<u32, u32> = BTreeMap::new();
    let (mut recovered, mut crashes, mut abandoned, mut lost, mut healed, mut left_out) = (0, 0, 0, 0, 0, 0);
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
        recovered += u64::from(world.faults > 0 && world.end == Some(0));
        (crashes, abandoned, healed) = (crashes + world.crashes, abandoned + world.abandoned, healed + world.healed);
        (lost, left_out) = (lost + world.states_lost, left_out + world.left_out);
    }
    // The simulation is worth its name only if it meets all of it.
    let met = format!(
        "{events} events, {recovered} runs recovered, {crashes} crashes, {abandoned} abandoned ({lost} in part), \
         {healed} healed, {left_out} left out, {ends:?}"
    );
    assert!(events > 1_000_000 && recovered > 500 && crashes > 1_000 && healed > 500 && left_out > 500, "{met}");
    assert!(abandoned - lost > 20 && lost > 20, "{met}");
    for code in [exit_code::DONE, exit_code::TOO_FEW_WORKERS, exit_code::PREEMPTED] {
        assert!(ends.get(&code).is_some_and(|&runs| runs > 20), "{met}");
    }
}
