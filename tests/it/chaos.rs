//! Chaos: hosts, disks and processes of a run fail at random, by a seed that is printed, and the run must end as if nothing
//! had happened. `QUINTET_CHAOS_FAULTS=1000 cargo test --release -p quintet-cli --test it chaos -- --nocapture` draws as many
//! faults as one likes, `QUINTET_CHAOS_SEED` the same ones again.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use quintet_worker::checkpoint;
use rustix::process::Signal;

use crate::harness::{Process, announce};
use crate::jobs::{RunOutput, Workspace};
use crate::network::{Link, Network, fill_disk, join_tokens, mount_small_disk, with_own_mounts};
use crate::random::Random;

const STEPS: u64 = 400;
/// On a host each, behind the coordinator's.
const WORKERS: usize = 3;
const SETTINGS: &str = "training.max_steps=400 training.save_steps=7 training.save_total_limit=3 training.eval_steps=100 \
                        cluster.workers=3 cluster.reconnect_timeout_seconds=30";
/// Room for three checkpoints and what else a run leaves, and not much more.
const SMALL_DISK_BYTES: u64 = 4 << 20;
/// Processes of a job, of which each takes a token.
const TOKENS: u32 = 1000;

/// Without any progress for so long, though nothing is in its way, a run hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the driver looks.
const LOOK_UP: Duration = Duration::from_millis(4);
/// So long a fault that cannot happen yet is waited for.
const DEFER_MAX: Duration = Duration::from_secs(15);
/// More time at once did not pass for this process: it was stopped itself.
const LOOK_UP_MAX: Duration = Duration::from_millis(200);

/// What may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillWorker,
    /// The one that writes a checkpoint, while it does.
    KillSaver,
    KillCoordinator,
    KillCoordinatorDuringSave,
    /// All processes at once, so that nobody holds the state: what counts then is the checkpoint.
    KillAll,
    StopWorker,
    StopCoordinator,
    /// A worker's host is cut off from all others.
    Partition,
    /// Two workers cannot reach each other; both reach the coordinator.
    CutPair,
    /// What is sent to a worker's host gets lost; what it sends arrives.
    Deaf,
    Loss,
    Delay,
    /// A worker's host goes, and nobody is told; another comes in its place.
    Vanish,
    FillDisk,
}

/// What is drawn, and how often, relative to the others.
const FAULTS: [(Fault, u64); 14] = [
    (Fault::KillWorker, 22),
    (Fault::KillSaver, 10),
    (Fault::KillCoordinator, 12),
    (Fault::KillCoordinatorDuringSave, 6),
    (Fault::KillAll, 2),
    (Fault::StopWorker, 12),
    (Fault::StopCoordinator, 4),
    (Fault::Partition, 8),
    (Fault::CutPair, 4),
    (Fault::Deaf, 3),
    (Fault::Loss, 6),
    (Fault::Delay, 4),
    (Fault::Vanish, 4),
    (Fault::FillDisk, 6),
];

/// Numbers of a chaos run.
#[derive(Default)]
struct Tally {
    jobs: u64,
    faults: BTreeMap<Fault, u64>,
    /// Runs that went on from a checkpoint, because nobody held the state.
    from_checkpoint: u64,
    generations: u64,
}

impl Tally {
    fn count(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// A worker's place: the process there, if there is one, and since when there may be another.
struct Place {
    process: Option<Process>,
    start: Instant,
    stopped: bool,
}

/// What is to be undone, and when.
struct Passing {
    until: Instant,
    cure: Cure,
}

#[derive(Clone, Debug)]
enum Cure {
    Go(usize),
    GoCoordinator,
    /// Links of a host are as they should be.
    Mend(usize, Vec<usize>),
    Empty(PathBuf),
}

/// A job under way.
struct Chaos<'a> {
    workspace: Workspace,
    small_disk: bool,
    network: Network,
    random: &'a mut Random,
    tally: &'a mut Tally,
    coordinator: Option<Process>,
    coordinator_start: Instant,
    places: Vec<Place>,
    tokens: std::vec::IntoIter<String>,
    passing: Vec<Passing>,
    /// The next fault, since when it waits to be possible.
    drawn: Option<(Fault, Instant)>,
    /// What the ledger held when last seen, in whole lines.
    ledger: Vec<u8>,
    /// The generation of its last line when a worker was last killed.
    killed_in: u64,
    /// All are killed: the ledger may be cut back.
    cut_back: bool,
    began: Instant,
    story: String,
}

impl<'a> Chaos<'a> {
    fn new(random: &'a mut Random, tally: &'a mut Tally) -> Option<Self> {
        let network = Network::new(1 + WORKERS, random.next())?;
        let workspace = Workspace::new();
        let small_disk = random.chance(25);
        if small_disk {
            mount_small_disk(&workspace.path().join("run"), SMALL_DISK_BYTES);
        }
        tally.jobs += 1;
        let now = Instant::now();
        let places = (0..WORKERS).map(|_| Place { process: None, start: now, stopped: false }).collect();
        Some(Chaos {
            workspace,
            small_disk,
            network,
            random,
            tally,
            coordinator: None,
            coordinator_start: now,
            places,
            tokens: Vec::new().into_iter(),
            passing: Vec::new(),
            drawn: None,
            ledger: Vec::new(),
            killed_in: 0,
            cut_back: false,
            began: now,
            story: String::new(),
        })
    }

    fn run(&self) -> RunOutput {
        self.workspace.output("run")
    }

    fn say(&mut self, what: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        writeln!(self.story, "{seconds:8.3} s, {} steps: {what}", self.lines()).unwrap();
    }

    #[track_caller]
    fn fail(&mut self, problem: &str) -> ! {
        let processes =
            self.coordinator.take().into_iter().chain(self.places.iter_mut().filter_map(|p| p.process.take()));
        for process in processes.collect::<Vec<_>>() {
            let ended = process.kill();
            self.story += &format!("-- a process that still ran had said:\n{}", ended.stderr);
        }
        panic!("{problem}\n{}", self.story)
    }

    /// Committed steps.
    fn lines(&self) -> usize {
        self.ledger.iter().filter(|&&byte| byte == b'\n').count()
    }

    /// Runs the job to its end, with faults until `more` says that there were enough.
    fn drive(mut self, more: &dyn Fn(&Tally) -> bool) {
        self.start_coordinator();
        let run = self.run();
        let (mut last, mut idle, mut seen) = (Instant::now(), Duration::ZERO, 0);
        let (mut next_line, mut next_time) = (3, Instant::now() + Duration::from_secs(5));
        loop {
            std::thread::sleep(LOOK_UP);
            idle += last.elapsed().min(LOOK_UP_MAX);
            last = Instant::now();
            self.look_at_ledger();
            if self.lines() != seen || !self.passing.is_empty() {
                (seen, idle) = (self.lines(), Duration::ZERO);
            }
            if idle > PATIENCE {
                self.fail("the run does not go on");
            }
            self.cure(false);
            self.tend_places();
            if self.tend_coordinator() {
                break;
            }
            let due = self.lines() >= next_line || Instant::now() >= next_time;
            if more(self.tally) && (due || self.drawn.is_some()) && self.strike() {
                next_line = self.lines() + self.random.below(12) as usize;
                next_time = Instant::now() + self.random.milliseconds(100, 2500);
            }
        }
        self.end();
        self.check(&run);
    }

    fn start_coordinator(&mut self) {
        let mut process = self.network.coordinator(&self.workspace, SETTINGS);
        if self.tokens.as_slice().is_empty() {
            process.wait_for("QUINTET_JOIN_TOKEN_FILE=");
            self.tokens = join_tokens(&self.workspace, TOKENS).into_iter();
        }
        self.coordinator = Some(process);
    }

    /// As an engine does: starts another coordinator in place of one that failed. Whether the run is over.
    fn tend_coordinator(&mut self) -> bool {
        let Some(process) = &mut self.coordinator else {
            if Instant::now() >= self.coordinator_start {
                self.start_coordinator();
            }
            return false;
        };
        if !process.has_ended() {
            return false;
        }
        let ended = self.coordinator.take().unwrap().wait();
        writeln!(self.story, "-- the coordinator ended with {:?}; it had said:\n{}", ended.code, ended.stderr).unwrap();
        let full = ended.stderr.contains("No space left on device");
        let lost = ended.stderr.contains("none holds the weights");
        match ended.code {
            Some(0) => return true,
            Some(1) if full && self.small_disk => {}
            // The one that held the state was killed, when it was the only one.
            Some(69) if lost => (self.cut_back, self.tally.from_checkpoint) = (true, self.tally.from_checkpoint + 1),
            code => self.fail(&format!("the coordinator ended with {code:?}")),
        }
        self.coordinator_start = Instant::now() + self.random.milliseconds(0, 300);
        false
    }

    /// As an engine does: starts other workers in place of those that ended.
    fn tend_places(&mut self) {
        for index in 0..WORKERS {
            let place = &mut self.places[index];
            if let Some(process) = &mut place.process {
                if process.has_ended() {
                    let ended = place.process.take().unwrap().wait();
                    // 2: there are as many as the run is to have, one of which is not known yet to be gone; 69: the run
                    // has ended, because nobody holds its state.
                    let known = ended.code.is_some_and(|code| code <= 2 || code == 69);
                    let text = format!("worker of host{} ended with {:?}:\n{}", index + 1, ended.code, ended.stderr);
                    place.start = Instant::now() + self.random.milliseconds(50, 1000);
                    self.say(&text);
                    if !known {
                        self.fail("a worker ended as none may");
                    }
                }
            } else if Instant::now() >= place.start {
                self.start_worker(index);
            }
        }
    }

    fn start_worker(&mut self, index: usize) {
        let Some(token) = self.tokens.next() else { self.fail("no tokens are left") };
        self.places[index].process = Some(self.network.worker(index + 1, &self.workspace, &token));
    }

    /// What was committed stays so, unless everybody who held it is gone.
    fn look_at_ledger(&mut self) {
        let mut now = std::fs::read(self.run().path("ledger.jsonl")).unwrap_or_default();
        now.truncate(now.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        let common = now.len().min(self.ledger.len());
        if now[..common] != self.ledger[..common] {
            if !std::mem::take(&mut self.cut_back) {
                self.say(&format!("the ledger was\n{}", String::from_utf8_lossy(&self.ledger)));
                self.say(&format!("the ledger is\n{}", String::from_utf8_lossy(&now)));
                self.fail("what was committed is so no more");
            }
            self.ledger.clear();
        }
        if now.len() > self.ledger.len() {
            self.ledger = now;
        }
    }

    /// Undoes what has passed, or all.
    fn cure(&mut self, all: bool) {
        let now = Instant::now();
        let (over, rest): (Vec<Passing>, Vec<Passing>) =
            std::mem::take(&mut self.passing).into_iter().partition(|passing| all || passing.until <= now);
        self.passing = rest;
        for Passing { cure, .. } in over {
            self.say(&format!("over: {cure:?}"));
            match cure {
                Cure::Go(index) => {
                    let place = &mut self.places[index];
                    if let Some(process) = place.process.as_ref().filter(|_| place.stopped) {
                        process.signal(Signal::CONT);
                    }
                    place.stopped = false;
                }
                Cure::GoCoordinator => {
                    if let Some(process) = &self.coordinator {
                        process.signal(Signal::CONT);
                    }
                }
                Cure::Mend(host, others) => self.network.change(host, &others, Link::default()),
                Cure::Empty(ballast) => std::fs::remove_file(ballast).unwrap(),
            }
        }
    }

    /// Draws a fault, unless one waits, and has it happen if it can now.
    fn strike(&mut self) -> bool {
        let (fault, since) = self.drawn.take().unwrap_or_else(|| (self.draw(), Instant::now()));
        let happens = self.inflict(fault);
        if happens {
            *self.tally.faults.entry(fault).or_default() += 1;
        } else if since.elapsed() < DEFER_MAX {
            self.drawn = Some((fault, since));
        }
        happens
    }

    fn draw(&mut self) -> Fault {
        let mut drawn = self.random.below(FAULTS.iter().map(|(_, share)| share).sum());
        let mut faults = FAULTS.iter();
        loop {
            let (fault, share) = faults.next().expect("less than all shares together was drawn");
            if drawn < *share {
                let possible = *fault != Fault::FillDisk || self.small_disk;
                return if possible { *fault } else { Fault::KillWorker };
            }
            drawn -= share;
        }
    }

    /// A number of the ledger's last line; 0 without any.
    fn last_line(&self, key: &str) -> u64 {
        let last = self.ledger.rsplitn(3, |&byte| byte == b'\n').nth(1).unwrap_or_default();
        serde_json::from_slice::<serde_json::Value>(last).map_or(0, |line| line[key].as_u64().unwrap())
    }

    /// Whether at least two hold the state, and nothing is under way that could make it one.
    fn can_lose_one(&self) -> bool {
        self.last_line("workers") >= 2 && self.last_line("generation") > self.killed_in && self.passing.is_empty()
    }

    /// Has a fault happen, if it can.
    fn inflict(&mut self, fault: Fault) -> bool {
        let index = self.random.below(WORKERS as u64) as usize;
        let (host, name) = (index + 1, format!("{fault:?}"));
        let lasting = |random: &mut Random, long: u64| {
            if random.chance(long) { random.milliseconds(6_000, 10_000) } else { random.milliseconds(50, 2000) }
        };
        let until = |time: Duration| Instant::now() + time;
        match fault {
            Fault::KillWorker => self.can_lose_one() && self.kill_worker(index, &name),
            Fault::KillSaver => {
                self.can_lose_one() && self.catch_saver().is_some_and(|saver| self.kill_worker(saver, &name))
            }
            Fault::KillCoordinator => self.kill_coordinator(&name),
            Fault::KillCoordinatorDuringSave => {
                self.coordinator.is_some() && self.catch_saver().is_some() && self.kill_coordinator(&name)
            }
            Fault::KillAll => self.lines() > 0 && self.passing.is_empty() && self.kill_all(),
            Fault::StopWorker => {
                let place = &mut self.places[index];
                let Some(process) = place.process.as_ref().filter(|_| !place.stopped) else { return false };
                process.signal(Signal::STOP);
                place.stopped = true;
                let time = lasting(self.random, 15);
                self.pass(&format!("{name} host{host}"), time, Cure::Go(index))
            }
            Fault::StopCoordinator => {
                let Some(process) = &self.coordinator else { return false };
                process.signal(Signal::STOP);
                let time = lasting(self.random, 10);
                self.pass(&name, time, Cure::GoCoordinator)
            }
            Fault::Partition => {
                let others = self.network.others(host);
                let time = lasting(self.random, 20);
                self.weather(host, others, Link { cut: true, ..Link::default() }, time, &name)
            }
            Fault::CutPair => {
                let other = (index + 1) % WORKERS + 1;
                let time = lasting(self.random, 50);
                self.weather(host, vec![other], Link { cut: true, ..Link::default() }, time, &name)
            }
            Fault::Deaf => {
                let others = self.network.others(host);
                for &other in &others {
                    self.network.change_one_way(other, host, Link { cut: true, ..Link::default() });
                }
                let time = lasting(self.random, 20);
                self.pass(&format!("{name} host{host}"), time, Cure::Mend(host, others))
            }
            Fault::Loss => {
                let others = self.network.others(host);
                let link = Link { loss_percent: 1 + self.random.below(30), ..Link::default() };
                let time = self.random.milliseconds(500, 4000);
                self.weather(host, others, link, time, &name)
            }
            Fault::Delay => {
                let others = self.network.others(host);
                let link = Link { delay: self.random.milliseconds(5, 150), ..Link::default() };
                let time = self.random.milliseconds(500, 4000);
                self.weather(host, others, link, time, &name)
            }
            Fault::Vanish => {
                if !self.can_lose_one() {
                    return false;
                }
                let others = self.network.others(host);
                let time = self.random.milliseconds(500, 8000);
                self.weather(host, others, Link { cut: true, ..Link::default() }, time, &name);
                self.kill_worker(index, &name);
                self.places[index].start = until(time);
                true
            }
            Fault::FillDisk => {
                let ballast = self.run().path("ballast");
                if ballast.exists() {
                    return false;
                }
                fill_disk(&ballast);
                let time = self.random.milliseconds(50, 2000);
                self.pass(&name, time, Cure::Empty(ballast))
            }
        }
    }

    fn pass(&mut self, what: &str, time: Duration, cure: Cure) -> bool {
        self.say(&format!("{what} for {} ms", time.as_millis()));
        self.passing.push(Passing { until: Instant::now() + time, cure });
        true
    }

    fn weather(&mut self, host: usize, others: Vec<usize>, link: Link, time: Duration, name: &str) -> bool {
        self.network.change(host, &others, link);
        self.pass(&format!("{name} host{host} from {others:?}: {link:?}"), time, Cure::Mend(host, others))
    }

    fn kill_worker(&mut self, index: usize, name: &str) -> bool {
        let place = &mut self.places[index];
        let Some(process) = place.process.take() else { return false };
        let ended = process.kill();
        place.stopped = false;
        place.start = Instant::now() + self.random.milliseconds(0, 600);
        self.killed_in = self.last_line("generation");
        self.say(&format!("{name} host{}, which had said:\n{}", index + 1, ended.stderr));
        true
    }

    fn kill_coordinator(&mut self, name: &str) -> bool {
        let Some(process) = self.coordinator.take() else { return false };
        let ended = process.kill();
        self.passing.retain(|passing| !matches!(passing.cure, Cure::GoCoordinator));
        self.coordinator_start = Instant::now() + self.random.milliseconds(0, 1000);
        self.say(&format!("{name}, which had said:\n{}", ended.stderr));
        true
    }

    fn kill_all(&mut self) -> bool {
        // Where the run stands has been seen, and is no more to be relied on.
        if !self.kill_coordinator("KillAll") {
            return false;
        }
        for index in 0..WORKERS {
            self.kill_worker(index, "KillAll");
        }
        (self.cut_back, self.tally.from_checkpoint) = (true, self.tally.from_checkpoint + 1);
        true
    }

    /// Waits for a checkpoint to be written; which worker does.
    fn catch_saver(&mut self) -> Option<usize> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            if self.run().checkpoints().iter().any(|name| name.starts_with(".tmp-step-")) {
                return (0..WORKERS).find(|&index| {
                    self.places[index].process.as_ref().is_some_and(|process| has_thread(process.id(), "checkpoint"))
                });
            }
            std::thread::yield_now();
        }
        None
    }

    /// After the coordinator's end: workers end too, unless they could not hear of it.
    fn end(&mut self) {
        let disturbed = !self.passing.is_empty();
        self.cure(true);
        for index in 0..WORKERS {
            let Some(mut process) = self.places[index].process.take() else { continue };
            process.give(Duration::from_secs(40));
            let ended = process.wait();
            let known = ended.code == Some(0) || disturbed || ended.code == Some(1);
            self.say(&format!("worker of host{} ended with {:?}:\n{}", index + 1, ended.code, ended.stderr));
            if !known {
                self.fail("a worker ended as none may");
            }
        }
    }

    /// The run ended as if nothing had happened.
    fn check(&mut self, run: &RunOutput) {
        let undisturbed = &*UNDISTURBED;
        if run.weights() != undisturbed.weights {
            self.fail("the weights differ");
        }
        if run.column("loss") != undisturbed.loss {
            self.fail("the losses differ");
        }
        let story = std::mem::take(&mut self.story);
        // The job's own checks tell what is wrong, and this tells why.
        let checked = std::panic::catch_unwind(|| {
            run.check_ledger(STEPS);
            let ledger = run.lines("ledger.jsonl");
            let generations: Vec<u64> = ledger.iter().map(|line| line["generation"].as_u64().unwrap()).collect();
            assert!(generations.is_sorted(), "generations fall: {generations:?}");
            let latest = checkpoint::latest(&run.path("checkpoints")).unwrap();
            assert!(latest.skipped.is_empty(), "{:?}", latest.skipped);
            assert_eq!(latest.checkpoint.unwrap().progress.step, STEPS);
            generations[generations.len() - 1]
        });
        match checked {
            Ok(generations) => self.tally.generations += generations,
            Err(problem) => {
                eprintln!("{story}");
                std::panic::resume_unwind(problem);
            }
        }
    }
}

/// What the run leaves when nothing happens to it.
struct Undisturbed {
    weights: Vec<u8>,
    loss: Vec<f64>,
}

static UNDISTURBED: std::sync::LazyLock<Undisturbed> = std::sync::LazyLock::new(|| {
    let workspace = Workspace::new();
    let run = workspace.trained("run", &format!("--workers 1 {SETTINGS}"));
    Undisturbed { weights: run.weights(), loss: run.column("loss") }
});

fn has_thread(process: u32, name: &str) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return false };
    threads
        .flatten()
        .any(|thread| std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
}

/// A number that the environment gives.
fn given(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[test]
fn chaos() {
    /// Without a wanted number, as many faults as fit in so much time.
    const SHORT: Duration = Duration::from_secs(35);
    let seed = given("QUINTET_CHAOS_SEED")
        .unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 % 1_000_000_000);
    let wanted = given("QUINTET_CHAOS_FAULTS");
    announce(&format!("chaos: seed {seed} (QUINTET_CHAOS_SEED={seed} draws the same again)"));
    with_own_mounts(|| {
        let _ = &*UNDISTURBED;
        let (mut random, mut tally, began) = (Random(seed), Tally::default(), Instant::now());
        let more = |tally: &Tally| match wanted {
            Some(wanted) => tally.count() < wanted,
            None => began.elapsed() < SHORT,
        };
        while more(&tally) {
            let Some(chaos) = Chaos::new(&mut random, &mut tally) else { return };
            chaos.drive(&more);
            let (jobs, count) = (tally.jobs, tally.count());
            announce(&format!("chaos: {jobs} jobs, {count} faults, {:.0} s", began.elapsed().as_secs_f64()));
        }
        let (faults, fallen) = (&tally.faults, tally.from_checkpoint);
        let generations = tally.generations;
        announce(&format!("chaos: {faults:?}; {fallen} times from a checkpoint; {generations} generations"));
        assert!(tally.count() >= 3, "chaos that hardly happened");
    });
}
