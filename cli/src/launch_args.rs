//! The command line of `quintet launch`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::args::{JobArguments, TrainArguments};

#[derive(Args)]
pub(crate) struct LaunchArguments {
    #[command(subcommand)]
    pub(crate) engine: Engine,
}

#[derive(Subcommand)]
pub(crate) enum Engine {
    /// This machine, as `quintet train`.
    Local(LocalArguments),
    /// A list of hosts, by the system's ssh; the coordinator is this process.
    Ssh(SshArguments),
    /// Slurm: submits a job; inside an allocation or a step, runs it.
    Slurm(SlurmArguments),
    /// Kubernetes: a Job with the coordinator and an Indexed Job with workers.
    Kubernetes(KubernetesArguments),
}

#[derive(Args)]
pub(crate) struct LocalArguments {
    #[command(flatten)]
    pub(crate) train: TrainArguments,
    /// Only show what would be run.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Of every engine that has a coordinator of its own.
#[derive(Args)]
pub(crate) struct ClusterArguments {
    #[command(flatten)]
    pub(crate) job: JobArguments,
    /// Where workers reach the coordinator; by default the address of this machine on the way to them.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
    /// Allow plain text between machines: anyone on the network can then read and join the run.
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
    /// Only show what would be submitted or run.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct SshArguments {
    #[command(flatten)]
    pub(crate) cluster: ClusterArguments,
    #[command(flatten)]
    pub(crate) hosts: HostArguments,
    /// Copy a file or folder of the working directory to every host first; may be given several times.
    #[arg(long, value_name = "PATH")]
    pub(crate) copy: Vec<String>,
}

/// Hosts that ssh reaches.
#[derive(Args)]
pub(crate) struct HostArguments {
    /// HOST or HOST:WORKERS, with commas between.
    #[arg(long, value_name = "LIST", conflicts_with = "hostfile")]
    pub(crate) hosts: Option<String>,
    /// A file of lines such as "HOST slots=WORKERS".
    #[arg(long, value_name = "FILE")]
    pub(crate) hostfile: Option<PathBuf>,
    /// The ssh to use, with its options.
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    pub(crate) ssh: String,
    /// Where to run on the hosts; by default in the folder of this name.
    #[arg(long, value_name = "DIR")]
    pub(crate) remote_dir: Option<String>,
    /// This program on the hosts; by default the file of this name.
    #[arg(long, value_name = "FILE")]
    pub(crate) remote_quintet: Option<String>,
}

#[derive(Args)]
pub(crate) struct SlurmArguments {
    #[command(flatten)]
    pub(crate) cluster: ClusterArguments,
    /// Hosts of the job.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: u32,
    /// GPUs on each, with a worker for each.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) gpus_per_node: u32,
    /// Save and go back into the queue so many seconds before the time limit.
    #[arg(long, value_name = "N", default_value_t = 120)]
    pub(crate) warning_seconds: u32,
    /// Options of sbatch, after "--": --time=4:00:00 --partition=gpu.
    #[arg(last = true, value_name = "SBATCH_OPTION")]
    pub(crate) sbatch: Vec<String>,
}

#[derive(Args)]
pub(crate) struct KubernetesArguments {
    #[command(flatten)]
    pub(crate) job: JobArguments,
    /// An image of the Dockerfile's.
    #[arg(long)]
    pub(crate) image: String,
    /// A persistent volume claim that all pods can mount and write, with the data; relative paths of the job begin there.
    #[arg(long, value_name = "CLAIM")]
    pub(crate) claim: String,
    /// Of the objects; by default that of the job file.
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[arg(long)]
    pub(crate) namespace: Option<String>,
    /// Pods with workers.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) nodes: u32,
    /// GPUs of each, with a worker for each.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=64))]
    pub(crate) gpus_per_node: u32,
    /// Only show what would be submitted.
    #[arg(long)]
    pub(crate) dry_run: bool,
}
