//! Workers on a list of hosts, by the system's `ssh`.

use std::path::{Component, Path};

use super::command::{CommandLine, quote};
use super::hosts::Host;
use crate::{Error, Result};

/// How hosts are reached and what runs there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssh {
    /// The program with its options: `["ssh", "-p", "2222"]`.
    pub ssh: Vec<String>,
    /// This program, on the hosts.
    pub quintet: String,
    /// Where it runs there: relative paths of the job start here.
    pub directory: String,
    /// More arguments of `quintet worker`.
    pub worker_arguments: Vec<String>,
}

impl Ssh {
    /// Starts the workers of one of `hosts`. They get their invitation on standard input, where nobody else on the host
    /// can see it, and end when it does.
    pub fn worker(&self, hosts: &[Host], index: usize) -> CommandLine {
        let host = &hosts[index];
        let place = [format!("RANK={index}"), format!("WORLD_SIZE={}", hosts.len()), self.quintet.clone()];
        let worker = ["worker", "--join", "-", "--nproc-per-node"].map(str::to_owned);
        let more = self.worker_arguments.iter().cloned();
        let arguments = place.into_iter().chain(worker).chain([host.slots.to_string()]).chain(more);
        let worker = CommandLine { program: "env".to_owned(), arguments: arguments.collect() };
        self.run(host, &self.in_directory(&worker))
    }

    /// Of a program on a host: the shell command that runs it where the job's paths begin.
    pub fn in_directory(&self, program: &CommandLine) -> String {
        format!("cd {} && exec {program}", quote(&self.directory))
    }

    /// Unpacks on a host what [`pack`] writes.
    pub fn unpack(&self, host: &Host) -> CommandLine {
        let directory = quote(&self.directory);
        self.run(host, &format!("mkdir -p {directory} && exec tar -C {directory} -xf -"))
    }

    /// Shows the settings by which `ssh` reaches a host, the first of which are `hostname` and `port`.
    pub fn settings(&self, host: &Host) -> CommandLine {
        self.command(&["-G"], host, None)
    }

    /// Runs a shell command on a host.
    pub fn run(&self, host: &Host, script: &str) -> CommandLine {
        // Never ask anything; notice a host that is gone.
        let options = [
            "-T",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=15",
            "-o",
            "ServerAliveInterval=15",
            "-o",
            "ServerAliveCountMax=4",
        ];
        self.command(&options, host, Some(script))
    }

    fn command(&self, options: &[&str], host: &Host, script: Option<&str>) -> CommandLine {
        let mut words = self.ssh.iter().cloned();
        let program = words.next().unwrap_or_else(|| "ssh".to_owned());
        let options = options.iter().map(|&option| option.to_owned());
        let target = ["--".to_owned(), host.name.clone()];
        let arguments = words.chain(options).chain(target).chain(script.map(str::to_owned)).collect();
        CommandLine { program, arguments }
    }
}

/// Of what [`Ssh::settings`] prints: the name or address that a host really has.
pub fn host_name(settings: &str) -> Option<&str> {
    settings.lines().find_map(|line| line.strip_prefix("hostname "))
}

/// Writes files and folders, by their paths in the working directory, to standard output.
///
/// # Errors
/// [`Error::Hosts`] for a path that leads out of the working directory, which would lie elsewhere there.
pub fn pack(paths: &[String]) -> Result<CommandLine> {
    for path in paths {
        let inside = |component| matches!(component, Component::Normal(_) | Component::CurDir);
        if !Path::new(path).components().all(inside) {
            let problem = format!("{path} is not inside the working directory");
            return Err(Error::Hosts { place: "--copy".to_owned(), problem });
        }
    }
    Ok(CommandLine::new("tar", ["-cf", "-", "--"].into_iter().map(str::to_owned).chain(paths.iter().cloned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh() -> Ssh {
        Ssh {
            ssh: ["ssh", "-p", "2222"].map(str::to_owned).to_vec(),
            quintet: "/opt/quintet".to_owned(),
            directory: "/home/me/my jobs".to_owned(),
            worker_arguments: vec!["--device".to_owned(), "cpu".to_owned()],
        }
    }

    #[test]
    fn a_hosts_workers() {
        let hosts = [("n0", 1), ("me@n1", 2)].map(|(name, slots)| Host { name: name.to_owned(), slots });
        let host = &hosts[1];
        let expected = "ssh -p 2222 -T -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 \
                        -o ServerAliveCountMax=4 -- me@n1 'cd '\\''/home/me/my jobs'\\'' && \
                        exec env RANK=1 WORLD_SIZE=2 /opt/quintet worker --join - \
                        --nproc-per-node 2 --device cpu'";
        assert_eq!(ssh().worker(&hosts, 1).to_string(), expected);
        assert_eq!(ssh().settings(host).to_string(), "ssh -p 2222 -G -- me@n1");
        assert!(ssh().unpack(host).to_string().ends_with("exec tar -C '\\''/home/me/my jobs'\\'' -xf -'"));
    }

    #[test]
    fn what_ssh_calls_a_host() {
        assert_eq!(host_name("host n1\nuser me\nhostname 10.0.0.7\nport 22\n"), Some("10.0.0.7"));
        assert_eq!(host_name("usage: ssh"), None);
    }

    #[test]
    fn only_what_is_in_the_working_directory_is_copied() {
        let paths = |paths: &[&str]| pack(&paths.iter().map(|&path| path.to_owned()).collect::<Vec<_>>());
        assert_eq!(paths(&["job.toml", "data/x y"]).unwrap().to_string(), "tar -cf - -- job.toml 'data/x y'");
        for outside in ["/etc/passwd", "../x", "data/../../x"] {
            assert!(paths(&["a", outside]).unwrap_err().is_user_error());
        }
    }
}
