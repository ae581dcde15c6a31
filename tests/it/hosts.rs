//! Runs on several hosts, whose network and disks fail, end with the bits of a run that nothing happened to.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::{Process, announce};
use crate::jobs::{RunOutput, Workspace};
use crate::network::{Link, Network, fill_disk, join_tokens, mount_small_disk, with_own_mounts};

const STEPS: u64 = 120;
const SETTINGS: &str = "training.max_steps=120 training.save_steps=10 training.eval_steps=40";
const CUT: Link = Link { cut: true, loss_percent: 0, delay: std::time::Duration::ZERO };

static UNDISTURBED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let workspace = Workspace::new();
    workspace.trained("run", &format!("--workers 1 {SETTINGS}")).weights()
});

#[track_caller]
fn assert_undisturbed(run: &RunOutput) {
    assert!(run.weights() == *UNDISTURBED, "the weights differ");
    run.check_ledger(STEPS);
    let generations: Vec<u64> =
        run.lines("ledger.jsonl").iter().map(|line| line["generation"].as_u64().unwrap()).collect();
    assert!(generations.is_sorted(), "{generations:?}");
}

/// A run with a worker on each host behind the coordinator's, which have made 15 steps.
struct Cluster {
    network: Network,
    workspace: Workspace,
    coordinator: Process,
    workers: Vec<Process>,
    tokens: Vec<String>,
}

impl Cluster {
    /// With a host to spare.
    fn start(workers: usize, settings: &str) -> Option<Self> {
        let network = Network::new(workers + 2, 1)?;
        let workspace = Workspace::new();
        let settings = format!("{SETTINGS} cluster.workers={workers} {settings}");
        let mut coordinator = network.coordinator(&workspace, &settings);
        coordinator.wait_for("QUINTET_JOIN_TOKEN_FILE=");
        let mut tokens = join_tokens(&workspace, workers as u32 + 1);
        let workers = (1..=workers).map(|host| network.worker(host, &workspace, &tokens.pop().unwrap())).collect();
        let ledger = workspace.output("run").path("ledger.jsonl");
        assert!(coordinator.wait_for_lines(&ledger, 15));
        Some(Cluster { network, workspace, coordinator, workers, tokens })
    }

    /// Cuts links, and says how long it takes until those that are left commit a step without the others.
    fn measure_cut(&mut self, event: &str, host: usize, others: &[usize]) {
        let ledger = self.workspace.output("run").path("ledger.jsonl");
        let (_, before) = lines_and_generation(&ledger);
        let began = Instant::now();
        self.network.change(host, others, CUT);
        loop {
            // Those that were under way may still be committed, by all.
            let (lines, generation) = lines_and_generation(&ledger);
            if generation > before {
                break;
            }
            assert!(self.coordinator.wait_for_lines(&ledger, lines + 1));
        }
        announce(&format!("MEASURED {}", json!({ "event": event, "seconds": began.elapsed().as_secs_f64() })));
    }

    /// Coordinator and workers come to a good end; where the run is.
    fn end(self) -> Workspace {
        self.coordinator.wait().expect(0);
        for worker in self.workers {
            worker.wait().expect(0);
        }
        assert_undisturbed(&self.workspace.output("run"));
        self.workspace
    }
}

/// How many lines a ledger has, and the generation of the last.
fn lines_and_generation(ledger: &Path) -> (usize, Option<u64>) {
    let text = std::fs::read_to_string(ledger).unwrap();
    // What follows the last end of a line is being written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let last: Option<Value> = whole.lines().last().map(|line| serde_json::from_str(line).unwrap());
    (whole.lines().count(), last.and_then(|line| line["generation"].as_u64()))
}

#[test]
fn a_host_that_is_cut_off_is_gone_on_without() {
    let Some(mut cluster) = Cluster::start(2, "") else { return };
    let others = cluster.network.others(2);
    cluster.measure_cut("host cut off", 2, &others);
    // It cannot hear how the run ends.
    cluster.workers.pop().unwrap().kill();
    cluster.end();
}

#[test]
fn a_host_that_is_cut_off_is_waited_for_where_none_can_be_spared() {
    let Some(mut cluster) = Cluster::start(2, "cluster.min_workers=2") else { return };
    let others = cluster.network.others(2);
    cluster.network.change(2, &others, CUT);
    cluster.coordinator.wait_for("lost worker ");
    cluster.coordinator.wait_for("waiting");
    cluster.network.change(2, &others, Link::default());
    cluster.coordinator.wait_for("1 joined");
    cluster.end();
}

#[test]
fn two_hosts_that_cannot_reach_each_other_do_not_end_the_run() {
    let Some(mut cluster) = Cluster::start(3, "") else { return };
    cluster.measure_cut("link between two workers cut", 2, &[3]);
    cluster.coordinator.wait_for("no connection between it and worker ");
    let workspace = cluster.end();
    let run = workspace.output("run");
    assert_eq!(run.lines("ledger.jsonl").last().unwrap()["workers"], 2);
    let recoveries = run.events("recovery");
    assert_eq!(recoveries[0]["lost"][0]["noticed_by"], "link", "{recoveries:?}");
}

#[test]
fn a_host_that_vanishes_is_replaced_by_another() {
    let Some(mut cluster) = Cluster::start(2, "cluster.min_workers=2") else { return };
    // Nobody is told: what its system says at its end does not arrive.
    cluster.network.change(2, &cluster.network.others(2), CUT);
    cluster.workers.pop().unwrap().kill();
    cluster.coordinator.wait_for("lost worker ");
    cluster.workers.push(cluster.network.worker(3, &cluster.workspace, &cluster.tokens[0]));
    cluster.coordinator.wait_for("1 joined (1 given the state)");
    let workspace = cluster.end();
    let run = workspace.output("run");
    let recoveries = run.events("recovery");
    assert_eq!(recoveries[0]["lost"][0]["host"], "host2", "{recoveries:?}");
    assert_eq!(recoveries.last().unwrap()["joined"][0]["host"], "host3", "{recoveries:?}");
}

#[test]
fn packets_that_are_lost_late_and_out_of_order_change_nothing() {
    let Some(cluster) = Cluster::start(2, "") else { return };
    let bad = Link { loss_percent: 3, delay: std::time::Duration::from_millis(4), ..Link::default() };
    for host in 0..3 {
        cluster.network.change(host, &cluster.network.others(host), bad);
    }
    cluster.end();
}

#[test]
fn a_full_disk_holds_the_run_until_there_is_room() {
    with_own_mounts(|| {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        mount_small_disk(&run.path(""), 4 << 20);
        let mut process = workspace.start("run", &format!("--workers 2 {SETTINGS}"));
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 15));
        let ballast = run.path("ballast");
        fill_disk(&ballast);
        process.wait_for("No space left on device");
        std::fs::remove_file(ballast).unwrap();
        process.wait().expect(0);
        assert_undisturbed(&run);
    });
}
