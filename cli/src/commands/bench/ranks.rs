//! Worker processes of a benchmark, connected as those of a run are.
//!
//! The parent starts `quintet bench rank` for each; parent and child speak JSON lines: the child gets a [`Start`], answers
//! with the address that it listens on, gets everybody's addresses, connects, does the [`Task`], and answers with its
//! results.

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use quintet_coordinator::secret::Secret;
use quintet_kernels::{Device, WaitLimits};
use quintet_worker::DeviceChoice;
use quintet_worker::collective::{Collective, Interrupter, Listener, Membership, Mesh};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{allreduce, scaling};
use crate::commands::on_threads;
use crate::device::Decision;
use crate::error::{Failure, Result, exit};

/// How long ranks may take to start, and a peer to send a byte.
const PATIENCE: Duration = Duration::from_secs(120);

/// What ranks do together.
#[derive(Clone, Serialize, Deserialize)]
pub(super) enum Task {
    AllReduce(allreduce::Sums),
    Steps(scaling::Steps),
}

#[derive(Serialize, Deserialize)]
struct Start {
    rank: u32,
    world_size: u32,
    threads: usize,
    device: Place,
    token: [u8; 32],
    task: Task,
}

/// Where a rank computes.
#[derive(Clone, Copy, Serialize, Deserialize)]
enum Place {
    Cpu,
    Cuda(usize),
    Emulated,
}

/// What a task runs on.
pub(super) struct Rank {
    pub(super) device: Device,
    pub(super) collective: Collective,
}

/// Runs `task` on `world_size` processes of `threads` threads each; each rank's results.
pub(super) fn run<T: DeserializeOwned>(
    world_size: u32,
    threads: usize,
    decision: &Decision,
    task: &Task,
) -> Result<Vec<T>> {
    let token = Secret::generate()?;
    let place = |rank: u32| match decision.choice {
        DeviceChoice::Cpu => Place::Cpu,
        DeviceChoice::Cuda(_) => Place::Cuda(rank as usize % decision.gpus.max(1)),
        DeviceChoice::Emulated => Place::Emulated,
    };
    let start =
        |rank| Start { rank, world_size, threads, device: place(rank), token: *token.as_bytes(), task: task.clone() };
    let mut processes = (0..world_size).map(|rank| Process::start(&start(rank))).collect::<Result<Vec<_>>>()?;
    let addresses = processes.iter_mut().map(Process::hear).collect::<Result<Vec<SocketAddr>>>()?;
    processes.iter_mut().try_for_each(|process| process.tell(&addresses))?;
    processes.iter_mut().map(Process::hear).collect()
}

/// A child, killed when this is dropped.
struct Process {
    rank: u32,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(start: &Start) -> Result<Self> {
        let failed = |error: std::io::Error| Failure::failed(format!("cannot start a rank: {error}"));
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["bench", "rank"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both are pipes")
        };
        let mut process = Process { rank: start.rank, child, input, output: BufReader::new(output).lines() };
        process.tell(start)?;
        Ok(process)
    }

    fn tell(&mut self, message: &impl Serialize) -> Result<()> {
        write_line(&mut self.input, message).map_err(|error| self.lost(&error.to_string()))
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = self.output.next().unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()));
        let message = line.and_then(|line| Ok(serde_json::from_str(&line)?));
        message.map_err(|error| self.lost(&error.to_string()))
    }

    fn lost(&self, why: &str) -> Failure {
        Failure::failed(format!("rank {} ended early ({why}); its own message, if any, is above", self.rank))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that is done ends by itself; one that is not has lost its parent's interest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_line(to: &mut impl Write, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// The child: `quintet bench rank`.
pub(super) fn serve() -> Result<()> {
    let start: Start = read_line()?;
    on_threads(Some(start.threads), || serve_on_threads(&start).map(|()| exit::DONE)).map(|_| ())
}

fn serve_on_threads(start: &Start) -> Result<()> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = match &start.task {
        Task::AllReduce(sums) if sums.tcp => Listener::bind_tcp(any)?,
        _ => Listener::bind(any)?,
    };
    let choice = match start.device {
        Place::Cpu => DeviceChoice::Cpu,
        Place::Cuda(gpu) => DeviceChoice::Cuda(gpu),
        Place::Emulated => DeviceChoice::Emulated,
    };
    let device = choice.open()?;
    answer(&listener.local_addr())?;
    let addresses: Vec<SocketAddr> = read_line()?;
    let mut rank = Rank { collective: connect(start, &listener, &addresses, &device)?, device };
    match &start.task {
        Task::AllReduce(sums) => answer(&sums.run(&mut rank)?),
        Task::Steps(steps) => answer(&steps.run(rank)?),
    }
}

fn connect(start: &Start, listener: &Listener, addresses: &[SocketAddr], device: &Device) -> Result<Collective> {
    if start.world_size == 1 {
        return Ok(Collective::local());
    }
    let members: Vec<(u32, SocketAddr)> = (0..start.world_size).zip(addresses.iter().copied()).collect();
    let membership =
        Membership { rank: start.rank, members: &members, token: &start.token, identity: None, generation: 1 };
    let mesh = Mesh::connect(listener, membership, Instant::now() + PATIENCE, PATIENCE, Interrupter::new())?;
    let Device::Gpu(gpu) = device else { return Ok(Collective::tcp(mesh)) };
    let shares_gpu = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
    let limits = WaitLimits { meeting: PATIENCE / 2, sum: PATIENCE / 2 };
    let (collective, line) = Collective::between_gpus(mesh, gpu, 0, shares_gpu, limits)?;
    if start.rank == 0 {
        eprintln!("{line}");
    }
    Ok(collective)
}

fn read_line<T: DeserializeOwned>() -> Result<T> {
    let mut line = String::new();
    let message = std::io::stdin().read_line(&mut line).and_then(|_| Ok(serde_json::from_str(&line)?));
    message
        .map_err(|error| Failure::bad_input(format!("`quintet bench rank` is for `quintet bench` to start: {error}")))
}

fn answer(message: &impl Serialize) -> Result<()> {
    let written = write_line(&mut std::io::stdout().lock(), message);
    written.map_err(|error| Failure::failed(format!("cannot answer: {error}")))
}
