//! `quintet bench allreduce`: how fast ranks add up a gradient, beside a plain copy between the same processes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::time::Instant;

use quintet_worker::collective::Collective;
use quintet_worker::gradient::StepGradient;
use quintet_worker::shards::Shards;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ranks::{self, Rank, Task};
use super::{median, require_positive};
use crate::args::BenchAllreduceArguments;
use crate::commands::print_json;
use crate::device::Decision;
use crate::error::{Failure, Result};

/// Sums of so many bytes, one size after the other.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Sums {
    pub(super) bytes: Vec<usize>,
    pub(super) iterations: usize,
    /// Whether to time a plain copy too.
    pub(super) copies: bool,
    /// Whether these ranks of one machine meet by TCP, as those of several do.
    pub(super) tcp: bool,
}

/// What a rank measured at one size: seconds of each iteration.
#[derive(Serialize, Deserialize)]
pub(super) struct Measured {
    bytes: usize,
    backend: String,
    sums: Vec<f64>,
    copies: Vec<f64>,
}

/// Of one size, over all ranks.
pub(super) struct Row {
    pub(super) backend: String,
    pub(super) world_size: u32,
    pub(super) bytes: usize,
    pub(super) seconds: f64,
    copy_seconds: Option<f64>,
}

pub(super) fn run(arguments: &BenchAllreduceArguments) -> Result<()> {
    require_positive(&[("--min-bytes", arguments.min_bytes), ("--iterations", arguments.iterations)])?;
    if arguments.world_size < 2 {
        return Err(Failure::bad_input("--world-size must be at least 2: one rank has nothing to exchange"));
    }
    let decision = Decision::new(arguments.device.into(), 0)?;
    eprintln!("{}", decision.line());
    let bytes = std::iter::successors(Some(arguments.min_bytes), |bytes| bytes.checked_mul(4));
    let sums = Sums {
        bytes: bytes.take_while(|&bytes| bytes <= arguments.max_bytes).collect(),
        iterations: arguments.iterations,
        copies: true,
        tcp: false,
    };
    if sums.bytes.is_empty() {
        return Err(Failure::bad_input("--max-bytes is less than --min-bytes"));
    }
    let rows: Vec<Value> = measure(sums, arguments.world_size, &decision)?.iter().map(Row::json).collect();
    if arguments.json {
        print_json(&rows.into());
    } else {
        println!("backend  ranks       bytes      seconds  algbw GB/s  busbw GB/s   copy GB/s  of the copy");
        for row in &rows {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            println!(
                "{:7} {:6} {:11} {:12.6} {:11.3} {:11.3} {:11.3} {:11.0}%",
                row["backend"].as_str().unwrap_or_default(),
                number("world_size"),
                number("bytes"),
                number("seconds"),
                number("algbw_gbps"),
                number("busbw_gbps"),
                number("copy_busbw_gbps"),
                100.0 * number("share_of_copy"),
            );
        }
    }
    Ok(())
}

/// Rows in order of size. An iteration takes as long as its slowest rank.
pub(super) fn measure(sums: Sums, world_size: u32, decision: &Decision) -> Result<Vec<Row>> {
    let threads = (cores() / world_size as usize).max(1);
    let ranks: Vec<Vec<Measured>> = ranks::run(world_size, threads, decision, &Task::AllReduce(sums.clone()))?;
    let slowest = |size: usize, of: fn(&Measured) -> &Vec<f64>| {
        let iteration = |index: usize| ranks.iter().map(|rank| of(&rank[size])[index]).fold(0.0, f64::max);
        let iterations = of(&ranks[0][size]).len();
        (iterations > 0).then(|| median((0..iterations).map(iteration).collect()))
    };
    let row = |(size, &bytes): (usize, &usize)| Row {
        backend: ranks[0][size].backend.clone(),
        world_size,
        bytes,
        seconds: slowest(size, |measured| &measured.sums).unwrap_or(f64::NAN),
        copy_seconds: slowest(size, |measured| &measured.copies),
    };
    Ok(sums.bytes.iter().enumerate().map(row).collect())
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Row {
    /// Bandwidths as nccl-tests defines them, in 10⁹ bytes a second.
    fn json(&self) -> Value {
        let algbw = |seconds: f64| self.bytes as f64 / seconds / 1e9;
        let bus = 2.0 * f64::from(self.world_size - 1) / f64::from(self.world_size);
        json!({
            "backend": self.backend,
            "world_size": self.world_size,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "algbw_gbps": algbw(self.seconds),
            "busbw_gbps": algbw(self.seconds) * bus,
            "copy_seconds": self.copy_seconds,
            "copy_busbw_gbps": self.copy_seconds.map(|seconds| algbw(seconds) * bus),
            "share_of_copy": self.copy_seconds.map(|seconds| seconds / self.seconds),
        })
    }
}

impl Sums {
    /// A rank's part.
    pub(super) fn run(&self, rank: &mut Rank) -> Result<Vec<Measured>> {
        let copies = if self.copies { Some(Copies::connect(&mut rank.collective)?) } else { None };
        let largest = self.bytes.iter().copied().max().unwrap_or_default();
        let mut memory = Memory { copies, source: vec![1; largest], sink: vec![0; largest] };
        self.bytes.iter().map(|&bytes| self.measure(rank, bytes, &mut memory)).collect()
    }

    /// One size. An iteration that is not timed comes first.
    fn measure(&self, rank: &mut Rank, bytes: usize, memory: &mut Memory) -> Result<Measured> {
        let elements = (bytes / size_of::<f32>()).max(1);
        let mut gradient = StepGradient::new(&rank.device, elements)?;
        let backend = if rank.collective.overlaps() { "nccl" } else { "tcp" }.to_string();
        let mut measured = Measured { bytes, backend, sums: Vec::new(), copies: Vec::new() };
        for iteration in 0..=self.iterations {
            let sum = self.time_sum(rank, &mut gradient, elements)?;
            let copy = match &mut memory.copies {
                Some(copies) => {
                    meet(&mut rank.collective)?;
                    let part = 2 * bytes / (copies.peers.len() + 1);
                    Some(copies.time(&memory.source[..part], &mut memory.sink[..part])?)
                }
                None => None,
            };
            if iteration > 0 {
                measured.sums.push(sum);
                measured.copies.extend(copy);
            }
        }
        Ok(measured)
    }

    /// Seconds that adding up takes, of numbers whose sum is known and checked.
    fn time_sum(&self, rank: &mut Rank, gradient: &mut StepGradient, elements: usize) -> Result<f64> {
        let (own, world_size) = (rank.collective.rank(), rank.collective.world_size());
        let value = |index: usize, factor: u32| (index % 1000) as f32 * factor as f32;
        gradient.begin(own..own + 1, world_size)?;
        let mut part = gradient.lend()?;
        part.view_mut().write(&(0..elements).map(|index| value(index, own + 1)).collect::<Vec<_>>())?;
        gradient.give_back(part);
        let ranges: Vec<Range<u32>> = (0..world_size).map(|rank| rank..rank + 1).collect();
        let shards = Shards::replicated(elements, world_size);
        meet(&mut rank.collective)?;
        rank.device.synchronize()?;
        let started = Instant::now();
        gradient.reduce(&mut rank.collective, 1, &ranges, &shards)?;
        rank.device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        let mut total = vec![0.0_f32; elements];
        gradient.total().read(&mut total)?;
        let factor = world_size * (world_size + 1) / 2;
        match total.iter().enumerate().position(|(index, &sum)| sum != value(index, factor)) {
            Some(index) => Err(Failure::failed(format!("element {index} of the sum of {elements} is wrong"))),
            None => Ok(seconds),
        }
    }
}

/// Returns when all ranks have come here.
fn meet(collective: &mut Collective) -> Result<()> {
    collective.all_gather_bytes(1, &[])?;
    Ok(())
}

struct Memory {
    copies: Option<Copies>,
    source: Vec<u8>,
    sink: Vec<u8>,
}

/// Plain connections to every other rank, for copies that nothing is computed with.
struct Copies {
    peers: Vec<TcpStream>,
}

impl Copies {
    fn connect(collective: &mut Collective) -> Result<Self> {
        let (rank, world_size) = (collective.rank() as usize, collective.world_size() as usize);
        let failed = |error: std::io::Error| Failure::failed(format!("cannot connect for plain copies: {error}"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let ports = collective.all_gather_bytes(1, &port.to_le_bytes())?;
        let mut peers = Vec::with_capacity(world_size - 1);
        for port in &ports[..rank] {
            let port = u16::from_le_bytes([port[0], port[1]]);
            peers.push(TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).map_err(failed)?);
        }
        for _ in rank + 1..world_size {
            peers.push(listener.accept().map_err(failed)?.0);
        }
        peers.iter().try_for_each(|peer| peer.set_nodelay(true)).map_err(failed)?;
        Ok(Copies { peers })
    }

    /// Seconds in which every rank sends as much to every other as a sum makes it, and takes as much.
    fn time(&mut self, source: &[u8], sink: &mut [u8]) -> Result<f64> {
        let failed = |error: std::io::Error| Failure::failed(format!("a plain copy failed: {error}"));
        let started = Instant::now();
        std::thread::scope(|scope| {
            let writers: Vec<_> =
                self.peers.iter().map(|mut peer| scope.spawn(move || peer.write_all(source))).collect();
            for mut peer in &self.peers {
                peer.read_exact(sink)?;
            }
            writers
                .into_iter()
                .try_for_each(|writer| writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
        .map_err(failed)?;
        Ok(started.elapsed().as_secs_f64())
    }
}
