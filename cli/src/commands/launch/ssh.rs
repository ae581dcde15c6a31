//! `quintet launch ssh`: the coordinator here, workers on a list of hosts.

use std::fs;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use quintet_coordinator::launch::address;
use quintet_coordinator::launch::command::CommandLine;
use quintet_coordinator::launch::hosts::{self, Host};
use quintet_coordinator::launch::invitation::Invitation;
use quintet_coordinator::launch::remote::{Remote, Remotes};
use quintet_coordinator::launch::ssh::{self, Ssh};

use super::{block_on, invitation, load_job, own_file, prepare_run, worker_words};
use crate::commands::coordinator::{Workers, serve_to_end};
use crate::error::{Failure, Result, exit};
use crate::launch_args::{HostArguments, SshArguments};
use crate::prepare::working_directory;

pub(super) fn run(arguments: SshArguments) -> Result<u8> {
    let SshArguments { cluster, hosts, copy } = arguments;
    let ssh = render(&hosts, worker_words(&cluster))?;
    let hosts = chosen(&hosts, cluster.job.workers)?;
    let workers = hosts.iter().map(|host| host.slots).sum();
    let pack = if copy.is_empty() { None } else { Some(ssh::pack(&copy)?) };
    if cluster.dry_run {
        load_job(&cluster, workers)?;
        for (index, host) in hosts.iter().enumerate() {
            if let Some(pack) = &pack {
                println!("{pack} | {}", ssh.unpack(host));
            }
            println!("{}", ssh.worker(&hosts, index));
        }
        return Ok(exit::DONE);
    }
    let ip = block_on(own_address(&ssh, &hosts))?;
    // What is wrong with the job is to be found before anything is copied.
    let first = prepare_run(&cluster, workers, cluster.job.resume, ip)?;
    let max_restarts = first.0.job.cluster.max_restarts;
    let mut first = Some(first);
    if let Some(pack) = pack {
        for host in &hosts {
            pipe(&pack, &ssh.unpack(host)).map_err(|failure| on(host, failure))?;
        }
    }
    let prepare = |resume| first.take().map_or_else(|| prepare_run(&cluster, workers, resume, ip), Ok);
    serve_to_end(prepare, |address, admission| {
        let mut left = invitation(address, admission, workers, max_restarts)?;
        let remotes = hosts.iter().enumerate().map(|(index, host)| {
            let rest = left.tokens.split_off(host.slots as usize);
            let mine = std::mem::replace(&mut left.tokens, rest);
            let input = Invitation { coordinator: left.coordinator.clone(), tokens: mine }.to_line();
            Remote { name: host.name.clone(), command: ssh.worker(&hosts, index), input }
        });
        Ok(Workers::Remote(Remotes::spawn(remotes.collect())?))
    })
}

/// How the hosts are reached.
fn render(hosts: &HostArguments, worker_arguments: Vec<String>) -> Result<Ssh> {
    let here = working_directory()?.display().to_string();
    Ok(Ssh {
        ssh: hosts.ssh.split_whitespace().map(str::to_string).collect(),
        quintet: hosts.remote_quintet.clone().map_or_else(own_file, Ok)?,
        directory: hosts.remote_dir.clone().unwrap_or(here),
        worker_arguments,
    })
}

/// The hosts that are named, with as many of their slots as there are to be workers.
fn chosen(arguments: &HostArguments, workers: Option<u32>) -> Result<Vec<Host>> {
    let named = match (&arguments.hosts, &arguments.hostfile) {
        (Some(list), _) => hosts::parse_list(list)?,
        (None, Some(file)) => {
            let name = file.display().to_string();
            let text = fs::read_to_string(file)
                .map_err(|error| Failure::bad_input(format!("--hostfile {name}: cannot read: {error}")))?;
            hosts::parse_file(&text, &name)?
        }
        (None, None) => return Err(Failure::bad_input("which hosts? Give --hosts or --hostfile")),
    };
    match workers {
        Some(workers) => Ok(hosts::take(&named, workers)?),
        None => Ok(named),
    }
}

/// A command of this program on each host, and the address of this machine.
pub(super) fn hosts(arguments: &HostArguments, words: Vec<String>) -> Result<(Vec<(String, CommandLine)>, IpAddr)> {
    let ssh = render(arguments, Vec::new())?;
    let hosts = chosen(arguments, None)?;
    let program = CommandLine { program: ssh.quintet.clone(), arguments: words };
    let there = hosts.iter().map(|host| (host.name.clone(), ssh.run(host, &ssh.in_directory(&program)))).collect();
    Ok((there, block_on(own_address(&ssh, &hosts))?))
}

/// By which all hosts reach this machine: that on the way to the first which is another machine.
async fn own_address(ssh: &Ssh, hosts: &[Host]) -> Result<IpAddr> {
    let mut own = None;
    for host in hosts {
        let settings = ssh.settings(host).output("").await.map_err(|error| on(host, error.into()))?;
        let name = ssh::host_name(&settings).unwrap_or(&host.name);
        let found = address::towards_host(name)
            .map_err(|error| Failure::failed(format!("host {}: {error}; say --listen ADDRESS:PORT", host.name)))?;
        if !found.is_loopback() {
            return Ok(found);
        }
        own = Some(found);
    }
    own.ok_or_else(|| Failure::bad_input("no host is named"))
}

fn on(host: &Host, failure: Failure) -> Failure {
    Failure { message: format!("host {}: {}", host.name, failure.message), ..failure }
}

/// Runs two commands, the second of which reads what the first writes.
fn pipe(from: &CommandLine, to: &CommandLine) -> Result<()> {
    let cannot = |what: &dyn std::fmt::Display, why: &dyn std::fmt::Display| Failure::failed(format!("{what}: {why}"));
    let mut first = Command::new(&from.program)
        .args(&from.arguments)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| cannot(from, &error))?;
    let input = first.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let second =
        Command::new(&to.program).args(&to.arguments).stdin(input).status().map_err(|error| cannot(to, &error))?;
    let first = first.wait().map_err(|error| cannot(from, &error))?;
    match (first.success(), second.success()) {
        (true, true) => Ok(()),
        (_, false) => Err(cannot(to, &second)),
        (false, true) => Err(cannot(from, &first)),
    }
}
