//! `quintet launch`: the same run, on the machines of an engine.

mod kubernetes;
mod slurm;
mod ssh;

use std::net::{IpAddr, SocketAddr};

use quintet_coordinator::admission::Admission;
use quintet_coordinator::launch::command::CommandLine;
use quintet_coordinator::launch::invitation::Invitation;
use quintet_coordinator::launch::slurm::Allocation;

use crate::args::TrainArguments;
use crate::commands::coordinator::RunOptions;
use crate::commands::train;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::launch_args::{ClusterArguments, Engine, HostArguments, LaunchArguments, LocalArguments};
use crate::prepare::{Door, Prepared, Serving, prepare};

pub(crate) fn run(arguments: LaunchArguments) -> Result<u8> {
    match arguments.engine {
        Engine::Local(arguments) => local(arguments),
        Engine::Ssh(arguments) => ssh::run(arguments),
        Engine::Slurm(arguments) => slurm::run(arguments),
        Engine::Kubernetes(arguments) => kubernetes::run(arguments),
    }
}

/// Commands of this program on the hosts of a cluster, and on this one.
pub(crate) struct ClusterHosts {
    pub(crate) here: CommandLine,
    pub(crate) there: Vec<(String, CommandLine)>,
    /// The address by which the hosts reach this one.
    pub(crate) own: IpAddr,
}

/// For programs that are asked and answer: `words` on the hosts that are named, else on those of Slurm's allocation.
pub(crate) fn cluster_hosts(hosts: &HostArguments, words: Vec<String>) -> Result<ClusterHosts> {
    let here = CommandLine { program: own_file()?, arguments: words.clone() };
    let allocation = Allocation::from_variables(|name| std::env::var(name).ok());
    let (there, own) = match allocation.filter(|_| hosts.hosts.is_none() && hosts.hostfile.is_none()) {
        Some(allocation) => slurm::hosts(&allocation, &here)?,
        None => ssh::hosts(hosts, words)?,
    };
    Ok(ClusterHosts { here, there, own })
}

fn local(arguments: LocalArguments) -> Result<u8> {
    if arguments.dry_run {
        println!("{}", train_command(&arguments.train)?);
        return Ok(exit::DONE);
    }
    train::run(arguments.train)
}

fn train_command(train: &TrainArguments) -> Result<CommandLine> {
    // A dry run of what would be refused shows that.
    Job::load(&train.job)?;
    let mut words = vec!["train".to_string()];
    words.extend(train.job.words());
    if let Some(workers) = train.job.workers {
        words.extend(["--workers".to_string(), workers.to_string()]);
    }
    words.extend(device_words(&train.job.device));
    words.extend(train.job.resume.then(|| "--resume".to_string()));
    Ok(CommandLine { program: own_file()?, arguments: words })
}

fn device_words(device: &Option<crate::args::DeviceChoice>) -> Vec<String> {
    device.map_or_else(Vec::new, |device| vec!["--device".to_string(), device.name()])
}

/// This program's file.
fn own_file() -> Result<String> {
    let file = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot find this program's own file: {error}")))?;
    Ok(file.display().to_string())
}

/// What `quintet worker` is told beyond where to join.
fn worker_words(cluster: &ClusterArguments) -> Vec<String> {
    let mut words = device_words(&cluster.job.device);
    if cluster.insecure_plaintext {
        words.push("--insecure-plaintext".to_string());
    }
    words
}

/// A run of so many workers, ready to be served: where it was asked for, else on `ip` with a free port.
fn prepare_run(cluster: &ClusterArguments, workers: u32, resume: bool, ip: IpAddr) -> Result<(Prepared, RunOptions)> {
    let address = cluster.listen.unwrap_or(SocketAddr::new(ip, 0));
    let door = Door { address, insecure_plaintext: cluster.insecure_plaintext, authority: None };
    let serving = Serving { resume, ..Serving::default() };
    let prepared = prepare(load_job(cluster, workers)?, serving, &door)?;
    let options = RunOptions { address, json: cluster.json, announce: true, by_hand: false, device: None };
    Ok((prepared, options))
}

fn load_job(cluster: &ClusterArguments, workers: u32) -> Result<Job> {
    let mut arguments = cluster.job.clone();
    arguments.workers = Some(workers);
    Job::load(&arguments)
}

/// For so many workers of a coordinator at `address`, each of which may be replaced so often.
fn invitation(address: SocketAddr, admission: &Admission, workers: u32, max_restarts: u32) -> Result<Invitation> {
    let lives = || (0..=max_restarts).map(|_| Ok(admission.ticket()?.1)).collect::<Result<_>>();
    let tokens = (0..workers).map(|_| lives()).collect::<Result<_>>()?;
    Ok(Invitation { coordinator: format!("{}://{address}", admission.scheme()), tokens })
}

/// Runs a launcher's commands one after the other.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::failed(format!("cannot start the event loop: {error}")))?.block_on(work)
}
