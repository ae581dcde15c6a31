//! `quintet launch kubernetes`: submits a run, or shows what it would submit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use quintet_coordinator::launch::command::CommandLine;
use quintet_coordinator::launch::kubernetes::Cluster;
use quintet_identity::{Authority, Role};

use super::{block_on, device_words};
use crate::commands::tokens;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::launch_args::KubernetesArguments;

/// Pods that replace others join by tokens too, as long as a run may take.
const TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Tokens for each worker: one, and others for the pods that take its place.
const TOKENS_PER_WORKER: u32 = 8;
/// A Secret takes a mebibyte, and a token about 200 bytes.
const TOKENS_MAX: u32 = 4096;

pub(super) fn run(arguments: KubernetesArguments) -> Result<u8> {
    let mut cluster = render(&arguments)?;
    cluster.validate()?;
    // What is wrong with the job is said here and not by a pod.
    let mut job = arguments.job.clone();
    job.workers = Some(cluster.world_size());
    Job::load(&job)?;
    if arguments.dry_run {
        cluster.authority = BTreeMap::from([("authority.key".to_string(), b"made when it is submitted".to_vec())]);
        cluster.tokens = vec!["made when it is submitted".to_string()];
        print!("{}", cluster.manifest()?);
        return Ok(exit::DONE);
    }
    admit(&mut cluster)?;
    let apply = CommandLine::new("kubectl", ["apply", "--filename", "-"]);
    print!("{}", block_on(async { Ok(apply.output(&cluster.manifest()?).await?) })?);
    Ok(exit::DONE)
}

fn render(arguments: &KubernetesArguments) -> Result<Cluster> {
    let path = &arguments.job.job;
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
    let name = path.file_stem().map_or("quintet".into(), |stem| stem.to_string_lossy());
    let usable = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    // The job file is the first of a job's words, and elsewhere there.
    let mut coordinator_arguments = arguments.job.words().split_off(1);
    coordinator_arguments.extend(device_words(&arguments.job.device));
    Ok(Cluster {
        name: arguments.name.clone().unwrap_or_else(|| name.chars().map(usable).collect()),
        namespace: arguments.namespace.clone(),
        image: arguments.image.clone(),
        nodes: arguments.nodes,
        gpus_per_node: arguments.gpus_per_node,
        claim: arguments.claim.clone(),
        job: text,
        coordinator_arguments,
        worker_arguments: device_words(&arguments.job.device),
        authority: BTreeMap::new(),
        tokens: Vec::new(),
    })
}

/// Makes the run's authority, which only its secret keeps, and tokens of it.
fn admit(cluster: &mut Cluster) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("quintet-authority-{}", std::process::id()));
    let made = (|| {
        let authority = Authority::open(&folder, &folder)?;
        let count = cluster.world_size().saturating_mul(TOKENS_PER_WORKER).min(TOKENS_MAX);
        let tokens = tokens::issue(&authority, Role::Worker, count, TOKEN_LIFETIME)?;
        cluster.tokens = tokens.lines().map(str::to_string).collect();
        cluster.authority = files(&folder)?;
        Ok(())
    })();
    // A folder of this process's own.
    let _ = fs::remove_dir_all(&folder);
    made
}

/// The key and the certificate.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let failed = |error: std::io::Error| Failure::failed(format!("{}: {error}", folder.display()));
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("authority.") {
            files.insert(name, fs::read(entry.path()).map_err(failed)?);
        }
    }
    Ok(files)
}
