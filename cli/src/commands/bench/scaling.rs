//! `quintet bench scaling`: how training speeds up with workers; measured here, and by a model of the exchange for more of
//! them than there are.
//!
//! Measured rows are training steps of real worker processes with real exchanges. The model is one of the exchange's time
//! only (`cost.rs`); its parameters are fitted to some measured sums and its error is that on others.

use std::fs;
use std::ops::Range;
use std::time::Instant;

use quintet_data::share;
use quintet_kernels::Device;
use quintet_t5::{BatchShape, Model, Parameters};
use quintet_worker::collective::Collective;
use quintet_worker::gradient::StepGradient;
use quintet_worker::replica::Replica;
use quintet_worker::shards::Shards;
use quintet_worker::{Precision, TrainingConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::allreduce::{self, Sums, cores};
use super::chart::{Chart, Series};
use super::cost::{CostModel, Held, Network};
use super::model::{batch, open, sum};
use super::ranks::{self, Rank, Task};
use super::{median, require_positive};
use crate::args::BenchScalingArguments;
use crate::commands::print_json;
use crate::device::Decision;
use crate::error::{Failure, Result};

/// Training steps of a micro-batch size, shared out over the ranks.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Steps {
    model: String,
    micro_batch_size: usize,
    /// Of a step, over all ranks.
    micro_batches: u32,
    source_length: usize,
    target_length: usize,
    steps: usize,
}

/// What a rank measured: medians over its steps.
#[derive(Serialize, Deserialize)]
pub(super) struct StepTime {
    seconds: f64,
    /// Spent waiting for the exchange of gradients, while nothing was computed.
    exchange_seconds: f64,
    /// Of the gradient that is exchanged.
    gradient_bytes: usize,
}

/// A row of the result.
#[derive(Clone)]
struct Row {
    workers: u32,
    mode: &'static str,
    micro_batches: u32,
    tokens_per_second: f64,
    efficiency: f64,
    exposed: f64,
    /// Of a modelled row.
    network: Option<Network>,
}

pub(super) fn run(arguments: &BenchScalingArguments) -> Result<()> {
    require_positive(&[
        ("--batch-size", arguments.batch_size),
        ("--source-length", arguments.source_length),
        ("--target-length", arguments.target_length),
        ("--steps", arguments.steps),
        ("--sums", arguments.sums),
        ("--nodes", arguments.nodes as usize),
    ])?;
    if let Some(gbps) = arguments.network_gbps.iter().find(|gbps| !(gbps.is_finite() && **gbps > 0.0)) {
        return Err(Failure::bad_input(format!("--network-gbps {gbps}: must be more than 0")));
    }
    if !(arguments.network_latency_us.is_finite() && arguments.network_latency_us >= 0.0) {
        return Err(Failure::bad_input("--network-latency-us must be 0 or more"));
    }
    let decision = Decision::new(arguments.device.into(), 0)?;
    eprintln!("{}", decision.line());
    let places = if decision.gpus > 0 { decision.gpus } else { cores() };
    let workers = worker_counts(arguments, places)?;
    let most = workers.iter().copied().max().unwrap_or(1);
    let threads = if decision.gpus > 0 { 1 } else { (cores() / most as usize).max(1) };
    let scaling = Scaling { arguments, decision, threads };

    let mut rows = Vec::new();
    let (alone, weak) = scaling.measure("weak", &workers, |workers| workers)?;
    rows.extend(weak);
    let (_, strong) = scaling.measure("strong", &workers, |_| most)?;
    rows.extend(strong);
    let (model, held) = scaling.fit(alone.gradient_bytes, places)?;
    let errors = HeldErrors::new(&held);
    let step_seconds = alone.seconds - alone.exchange_seconds;
    for network in scaling.networks() {
        rows.extend(scaling.project(&model, network, step_seconds, alone.gradient_bytes));
    }

    if let Some(file) = &arguments.svg {
        let picture = scaling.chart(&rows, &errors).svg();
        fs::write(file, picture).map_err(|error| Failure::failed(format!("{}: {error}", file.display())))?;
    }
    if arguments.json {
        print_json(&rows.iter().map(|row| row.json(&errors)).collect::<Vec<_>>().into());
    } else {
        scaling.print(&rows, &model, &held, &errors);
    }
    Ok(())
}

/// Those asked for; else one, two, four … as many as there are places.
fn worker_counts(arguments: &BenchScalingArguments, places: usize) -> Result<Vec<u32>> {
    let mut workers = arguments.workers.clone();
    if workers.is_empty() {
        workers = (0..).map(|power| 1 << power).take_while(|&workers| workers as usize <= places).collect();
    }
    workers.push(1);
    workers.sort_unstable();
    workers.dedup();
    match workers[0] {
        0 => Err(Failure::bad_input("--workers: there must be at least 1")),
        _ => Ok(workers),
    }
}

/// How far the model was off where it was not fitted, as shares of what was measured.
struct HeldErrors {
    median: f64,
    most: f64,
}

impl HeldErrors {
    fn new(held: &[Held]) -> Self {
        let errors: Vec<f64> = held.iter().map(|held| held.error().abs()).collect();
        HeldErrors { most: errors.iter().copied().fold(0.0, f64::max), median: median(errors) }
    }
}

struct Scaling<'a> {
    arguments: &'a BenchScalingArguments,
    decision: Decision,
    threads: usize,
}

impl Scaling<'_> {
    /// The time of one worker, and rows for each number of workers, which share `micro_batches` a step.
    fn measure(
        &self,
        mode: &'static str,
        workers: &[u32],
        micro_batches: impl Fn(u32) -> u32,
    ) -> Result<(StepTime, Vec<Row>)> {
        let mut alone: Option<(StepTime, f64)> = None;
        let mut rows = Vec::new();
        for &workers in workers {
            let micro_batches = micro_batches(workers);
            let task = Task::Steps(Steps {
                model: self.arguments.model.clone(),
                micro_batch_size: self.arguments.batch_size,
                micro_batches,
                source_length: self.arguments.source_length,
                target_length: self.arguments.target_length,
                steps: self.arguments.steps,
            });
            eprintln!("measuring {mode} scaling, workers: {workers}, threads of each: {}", self.threads);
            let ranks: Vec<StepTime> = ranks::run(workers, self.threads, &self.decision, &task)?;
            let seconds = ranks.iter().map(|rank| rank.seconds).fold(0.0, f64::max);
            let exchange = ranks.iter().map(|rank| rank.exchange_seconds).sum::<f64>() / f64::from(workers);
            let tokens_per_second = self.tokens(micro_batches) / seconds;
            let first = ranks.into_iter().next().ok_or_else(|| Failure::failed("no ranks"))?;
            let (_, speed_of_one) = alone.get_or_insert((first, tokens_per_second));
            let efficiency = tokens_per_second / (*speed_of_one * f64::from(workers));
            let exposed = exchange / seconds;
            rows.push(Row { workers, mode, micro_batches, tokens_per_second, efficiency, exposed, network: None });
        }
        let (alone, _) = alone.ok_or_else(|| Failure::failed("no workers"))?;
        Ok((alone, rows))
    }

    fn tokens(&self, micro_batches: u32) -> f64 {
        let lengths = self.arguments.source_length + self.arguments.target_length;
        (self.arguments.batch_size * lengths) as f64 * f64::from(micro_batches)
    }

    /// The model fitted to sums of two and four ranks at some sizes down from the gradient's, and sums that it was not
    /// fitted to: of three ranks, and of sizes between. By TCP, because what is modelled is between machines.
    fn fit(&self, gradient_bytes: usize, places: usize) -> Result<(CostModel, Vec<Held>)> {
        let sizes: Vec<usize> = (0..5).map(|power| (gradient_bytes >> (2 * power)).max(1 << 10)).collect();
        let (mut fitted, mut held) = (Vec::new(), Vec::new());
        for world_size in [2, 3, 4] {
            eprintln!("measuring sums of {world_size} ranks");
            let sums = Sums { bytes: sizes.clone(), iterations: self.arguments.sums, copies: false, tcp: true };
            for (index, row) in allreduce::measure(sums, world_size, &self.decision)?.into_iter().enumerate() {
                let to_fit = world_size != 3 && index % 2 == 0;
                (if to_fit { &mut fitted } else { &mut held }).push((world_size, row.bytes, row.seconds));
            }
        }
        let model = CostModel::fit(places, &fitted);
        let held = held.into_iter().map(|(world_size, bytes, seconds)| {
            let predicted_seconds = model.here(world_size, bytes);
            Held { world_size, bytes, seconds, predicted_seconds }
        });
        Ok((model, held.collect()))
    }

    fn networks(&self) -> impl Iterator<Item = Network> {
        let latency_us = self.arguments.network_latency_us;
        self.arguments.network_gbps.iter().map(move |&gbps| Network { gbps, latency_us })
    }

    /// Nodes of one such worker each, on a network: compute as measured, the exchange by the model, all of it exposed
    /// where it is on the CPU.
    fn project(&self, model: &CostModel, network: Network, step_seconds: f64, bytes: usize) -> Vec<Row> {
        let nodes = (0..31).map(|power| 1_u32 << power).take_while(|&nodes| nodes <= self.arguments.nodes);
        let row = |workers| {
            let exchange = model.between_nodes(workers, bytes, network);
            let seconds = step_seconds + exchange;
            Row {
                workers,
                mode: "weak",
                micro_batches: workers,
                tokens_per_second: self.tokens(workers) / seconds,
                efficiency: step_seconds / seconds,
                exposed: exchange / seconds,
                network: Some(network),
            }
        };
        nodes.map(row).collect()
    }

    fn chart(&self, rows: &[Row], errors: &HeldErrors) -> Chart {
        let points = |rows: &mut dyn Iterator<Item = &Row>| rows.map(|row| (row.workers, row.efficiency)).collect();
        let mut series = Vec::new();
        for mode in ["weak", "strong"] {
            let mut measured = rows.iter().filter(|row| row.network.is_none() && row.mode == mode);
            series.push(Series {
                name: format!("{mode}, measured here"),
                measured: true,
                points: points(&mut measured),
            });
        }
        for network in self.networks() {
            let mut modelled = rows.iter().filter(|row| row.network == Some(network));
            let name = format!("weak, modelled: {} Gbit/s", network.gbps);
            series.push(Series { name, measured: false, points: points(&mut modelled) });
        }
        let BenchScalingArguments { model, batch_size, source_length, target_length, .. } = self.arguments;
        Chart {
            title: format!("{model}: efficiency of data-parallel training"),
            subtitle: format!(
                "{batch_size} × {source_length}/{target_length} tokens a worker; the model's error on held-out sums: \
                 median {:.0} %, at most {:.0} %",
                100.0 * errors.median,
                100.0 * errors.most
            ),
            series,
        }
    }

    fn print(&self, rows: &[Row], model: &CostModel, held: &[Held], errors: &HeldErrors) {
        println!("workers  mode    kind                      tokens/s  efficiency  exposed communication");
        for row in rows {
            let kind = match row.network {
                None => "measured".to_string(),
                Some(network) => format!("modelled, {} Gbit/s", network.gbps),
            };
            println!(
                "{:7}  {:6}  {kind:22} {:11.0} {:10.1}% {:21.1}%",
                row.workers,
                row.mode,
                row.tokens_per_second,
                100.0 * row.efficiency,
                100.0 * row.exposed
            );
        }
        println!("\nthe model of the exchange: {model}");
        println!("on sums that it was not fitted to:  ranks       bytes     measured s      modelled s     error");
        for held in held {
            println!(
                "{:41} {:11} {:14.6} {:15.6} {:+8.1}%",
                held.world_size,
                held.bytes,
                held.seconds,
                held.predicted_seconds,
                100.0 * held.error()
            );
        }
        println!(
            "error of modelled rows' exchange: median {:.1}%, at most {:.1}%",
            100.0 * errors.median,
            100.0 * errors.most
        );
    }
}

impl Row {
    fn json(&self, errors: &HeldErrors) -> Value {
        let mut row = json!({
            "workers": self.workers,
            "mode": self.mode,
            "micro_batches": self.micro_batches,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
            "exposed_communication_fraction": self.exposed,
            "kind": if self.network.is_none() { "measured" } else { "modelled" },
        });
        if let Some(network) = self.network {
            row["network_gbps"] = network.gbps.into();
            row["network_latency_us"] = network.latency_us.into();
            row["held_out_error_median"] = errors.median.into();
            row["held_out_error_max"] = errors.most.into();
        }
        row
    }
}

impl Steps {
    /// A rank's part: steps that follow each other as in training, after two that are not timed.
    pub(super) fn run(&self, rank: Rank) -> Result<StepTime> {
        const WARM_UP: usize = 2;
        let mut trainer = Trainer::new(self, rank)?;
        let (mut seconds, mut exchange_seconds) = (Vec::new(), Vec::new());
        for step in 0..WARM_UP + self.steps {
            trainer.rank.collective.all_gather_bytes(step as u64, &[])?;
            let started = Instant::now();
            let exchanged = trainer.step()?;
            trainer.rank.device.synchronize()?;
            if step >= WARM_UP {
                seconds.push(started.elapsed().as_secs_f64());
                exchange_seconds.push(exchanged);
            }
        }
        let gradient_bytes = trainer.elements * size_of::<f32>();
        Ok(StepTime { seconds: median(seconds), exchange_seconds: median(exchange_seconds), gradient_bytes })
    }
}

/// A rank's replica, and what a step of it needs; as `quintet_worker::rank` has it, without a coordinator.
struct Trainer {
    rank: Rank,
    replica: Replica,
    gradient: StepGradient,
    batch: quintet_t5::Batch,
    elements: usize,
    shards: Shards,
    target_tokens: u64,
    ranges: Vec<Range<u32>>,
    micro_batches: u32,
    /// Of the last step.
    number: u64,
}

impl Trainer {
    fn new(steps: &Steps, rank: Rank) -> Result<Self> {
        let (model, weights): (Model, Parameters) = open(&rank.device, &steps.model)?;
        let shape = BatchShape { lengths: vec![(steps.source_length, steps.target_length); steps.micro_batch_size] };
        let batch = batch(&model, &shape)?;
        let target_tokens = sum(&shape, |lengths| lengths.1) as u64 * u64::from(steps.micro_batches);
        let precision = match &rank.device {
            Device::Cpu(_) => Precision::Fp32,
            Device::Gpu(_) => Precision::Bf16,
        };
        let mut replica =
            Replica::new(model, weights, None, &TrainingConfig::default(), precision, u64::MAX, target_tokens)?;
        replica.hold_all()?;
        let elements = replica.master().layout().len();
        let world_size = rank.collective.world_size();
        Ok(Trainer {
            gradient: StepGradient::new(&rank.device, elements)?,
            ranges: (0..world_size).map(|rank| share(steps.micro_batches, rank, world_size)).collect(),
            micro_batches: steps.micro_batches,
            rank,
            replica,
            batch,
            elements,
            shards: Shards::replicated(elements, world_size),
            target_tokens,
            number: 0,
        })
    }

    /// Takes a step; the seconds of it in which the exchange of gradients was waited for.
    fn step(&mut self) -> Result<f64> {
        self.number += 1;
        let Self { rank: Rank { collective, device }, replica, gradient, shards, .. } = self;
        let range = self.ranges[collective.rank() as usize].clone();
        gradient.begin(range.clone(), self.micro_batches)?;
        for index in range.clone() {
            gradient.compute(replica, collective, (self.number, index), &self.batch, index + 1 == range.end)?;
        }
        if !matches!(collective, Collective::Local) && !collective.overlaps() {
            // As a rank does before it sends anything.
            gradient.find_not_finite()?;
        }
        if !collective.overlaps() {
            device.synchronize()?;
        }
        // That all ranks have come here is not the exchange's doing, but it is what they wait for all the same.
        let started = Instant::now();
        gradient.reduce(collective, self.number, &self.ranges, shards)?;
        let exchanged = if self.ranges.len() > 1 { started.elapsed().as_secs_f64() } else { 0.0 };
        let update = replica.plan_update(gradient.norm(collective, self.number, shards)?, self.target_tokens);
        let update =
            update.ok_or_else(|| Failure::failed(format!("the gradient of step {} is not finite", self.number)))?;
        replica.update(self.number, gradient.total(), update)?;
        Ok(exchanged)
    }
}
