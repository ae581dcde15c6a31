//! `quintet launch slurm`: submits a job; inside an allocation, is its coordinator; inside a step, one of its tasks.

use std::ffi::OsString;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use quintet_coordinator::admission::Admission;
use quintet_coordinator::exit_code::PREEMPTED;
use quintet_coordinator::launch::command::CommandLine;
use quintet_coordinator::launch::environment::Place;
use quintet_coordinator::launch::invitation::{Invitation, InvitationFile};
use quintet_coordinator::launch::remote::{Remote, Remotes};
use quintet_coordinator::launch::slurm::{Allocation, Submission, node_address, show_node};
use quintet_coordinator::launch::{LocalWorkers, address};

use super::{block_on, device_words, invitation, load_job, own_file, prepare_run, worker_words};
use crate::args::WorkerArguments;
use crate::commands::coordinator::{Workers, serve};
use crate::commands::worker;
use crate::error::{Failure, Result, exit};
use crate::launch_args::{ClusterArguments, SlurmArguments};

pub(super) fn run(arguments: SlurmArguments) -> Result<u8> {
    let variable = |name: &str| std::env::var(name).ok();
    match Allocation::from_variables(variable) {
        None => submit(&arguments),
        Some(allocation) if allocation.step.is_none() => coordinate(&arguments.cluster, &allocation),
        Some(allocation) => {
            let place = Place::from_variables(variable, None)?;
            task(&arguments.cluster, &allocation, &place)
        }
    }
}

fn submit(arguments: &SlurmArguments) -> Result<u8> {
    let cluster = &arguments.cluster;
    let job = load_job(cluster, cluster.job.workers.unwrap_or(arguments.nodes * arguments.gpus_per_node.max(1)))?;
    let name = job.output_dir.file_name().map_or("quintet".into(), |name| name.to_string_lossy());
    let submission = Submission {
        name: name.into_owned(),
        nodes: arguments.nodes,
        gpus_per_node: arguments.gpus_per_node,
        log: job.output_dir.join("slurm-%j.log").display().to_string(),
        warning_seconds: arguments.warning_seconds,
        options: arguments.sbatch.clone(),
        command: inside(cluster)?,
    };
    if cluster.dry_run {
        print!("{}", submission.script());
        return Ok(exit::DONE);
    }
    // Slurm opens the log before anything of the job runs.
    fs::create_dir_all(&job.output_dir)
        .map_err(|error| Failure::failed(format!("{}: cannot create: {error}", job.output_dir.display())))?;
    let sbatch = CommandLine::new("sbatch", ["--parsable"]);
    let id = block_on(async { Ok(sbatch.output(&submission.script()).await?) })?;
    println!("{}", id.trim());
    Ok(exit::DONE)
}

/// What the batch script runs: this command, where it will find itself in an allocation.
fn inside(cluster: &ClusterArguments) -> Result<CommandLine> {
    let mut words = vec!["launch".to_string(), "slurm".to_string()];
    words.extend(cluster.job.words());
    words.extend(device_words(&cluster.job.device));
    words.extend(cluster.job.resume.then(|| "--resume".to_string()));
    words.extend(cluster.json.then(|| "--json".to_string()));
    words.extend(cluster.listen.iter().flat_map(|address| ["--listen".to_string(), address.to_string()]));
    words.extend(cluster.insecure_plaintext.then(|| "--insecure-plaintext".to_string()));
    Ok(CommandLine { program: own_file()?, arguments: words })
}

/// In a batch script or in `salloc`: the coordinator, which starts a step with the workers.
fn coordinate(cluster: &ClusterArguments, allocation: &Allocation) -> Result<u8> {
    let per_node = allocation.workers_per_node();
    let workers = allocation.nodes * per_node;
    let file = load_job(cluster, workers)?.output_dir.join(allocation.invitation_name());
    let mut words = ["worker", "--nproc-per-node"].map(str::to_string).to_vec();
    words.extend([per_node.to_string(), "--join".to_string(), file.display().to_string()]);
    words.extend(worker_words(cluster));
    let step = allocation.step(&CommandLine { program: own_file()?, arguments: words });
    if cluster.dry_run {
        println!("{step}");
        return Ok(exit::DONE);
    }
    let ip = block_on(own_address(allocation))?;
    run_to_requeue(cluster, allocation, workers, ip, |invitation, _| {
        let written = InvitationFile::write(file, invitation)?;
        let remote = Remote { name: "srun".to_string(), command: step, input: String::new() };
        Ok((Workers::Remote(Remotes::spawn(vec![remote])?), written))
    })
}

/// Under `srun`: task 0 is the coordinator too, and all of them are workers.
fn task(cluster: &ClusterArguments, allocation: &Allocation, place: &Place) -> Result<u8> {
    let workers = place.world_size.value;
    let file = load_job(cluster, workers)?.output_dir.join(allocation.invitation_name());
    if cluster.dry_run {
        println!("{}", own_worker(cluster, &file)?);
        return Ok(exit::DONE);
    }
    if place.rank.value > 0 {
        return worker::run(WorkerArguments {
            join: Some(file),
            device: cluster.job.device,
            insecure_plaintext: cluster.insecure_plaintext,
            ..WorkerArguments::default()
        });
    }
    let ip = block_on(own_address(allocation))?;
    let own = own_worker(cluster, &file)?;
    run_to_requeue(cluster, allocation, workers, ip, |invitation, admission| {
        let written = InvitationFile::write(file, invitation)?;
        let arguments: Vec<OsString> = own.arguments.iter().map(OsString::from).collect();
        let executable = PathBuf::from(own.program);
        let admission = admission.clone();
        let ticket = Box::new(move || admission.ticket());
        Ok((Workers::Local(LocalWorkers::spawn(&executable, &[arguments], &[], ticket)?), written))
    })
}

fn own_worker(cluster: &ClusterArguments, file: &Path) -> Result<CommandLine> {
    let mut words = vec!["worker".to_string(), "--join".to_string(), file.display().to_string()];
    words.extend(worker_words(cluster));
    Ok(CommandLine { program: own_file()?, arguments: words })
}

/// Serves the run, which goes on from its checkpoint if this is a later life of the job. One that was preempted goes
/// back into the queue.
fn run_to_requeue(
    cluster: &ClusterArguments,
    allocation: &Allocation,
    workers: u32,
    ip: IpAddr,
    launch: impl FnOnce(&Invitation, &Admission) -> Result<(Workers, InvitationFile)>,
) -> Result<u8> {
    let resume = cluster.job.resume || allocation.restarts > 0;
    let (prepared, options) = prepare_run(cluster, workers, resume, ip)?;
    let max_restarts = prepared.job.cluster.max_restarts;
    // Until the run has ended.
    let mut written = None;
    let served = serve(prepared, &options, |address, admission| {
        let invitation = invitation(address, admission, workers, max_restarts)?;
        let (workers, file) = launch(&invitation, admission)?;
        written = Some(file);
        Ok(workers)
    })?;
    drop(written);
    let code = served.exit_code()?;
    if u32::from(code) == PREEMPTED
        && allocation.is_batch
        && let Err(failure) = block_on(requeue(allocation))
    {
        eprintln!("warning: the job does not go back into the queue: {}", failure.message);
    }
    Ok(code)
}

/// Slurm itself puts a job back that it preempts or requeues; one that it merely warned, this puts back.
async fn requeue(allocation: &Allocation) -> Result<()> {
    let state = allocation.state().output("").await?;
    if state.trim() == "RUNNING" {
        eprintln!("back into the queue: {}", allocation.requeue());
        allocation.requeue().output("").await?;
    }
    Ok(())
}

/// A command on each host of the allocation, and the address of this one.
pub(super) fn hosts(allocation: &Allocation, command: &CommandLine) -> Result<(Vec<(String, CommandLine)>, IpAddr)> {
    block_on(async {
        let names = allocation.host_names().output("").await?;
        let there = names.lines().map(|host| (host.to_string(), allocation.on_host(host, command))).collect();
        Ok((there, own_address(allocation).await?))
    })
}

/// By which the other hosts of the allocation reach this one: that on the way to where Slurm reaches them.
async fn own_address(allocation: &Allocation) -> Result<IpAddr> {
    let hosts = allocation.host_names().output("").await?;
    let mut own = None;
    for host in hosts.lines() {
        let description = show_node(host).output("").await?;
        let name = node_address(&description).unwrap_or(host);
        let found = address::towards_host(name)
            .map_err(|error| Failure::failed(format!("host {host}: {error}; say --listen ADDRESS:PORT")))?;
        if !found.is_loopback() {
            return Ok(found);
        }
        own = Some(found);
    }
    own.ok_or_else(|| Failure::failed("Slurm names no host of the allocation"))
}
