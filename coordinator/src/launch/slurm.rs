//! Workers by Slurm: the batch script, and the step inside an allocation.

use std::fmt::Write;

use super::command::{CommandLine, quote};

/// A job to submit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The job's name.
    pub name: String,
    /// Hosts.
    pub nodes: u32,
    /// GPUs to ask for on each; 0 asks for none.
    pub gpus_per_node: u32,
    /// Where what the job says is appended to, in `sbatch`'s patterns.
    pub log: String,
    /// Slurm warns so many seconds before the time limit: time for a checkpoint.
    pub warning_seconds: u32,
    /// Options of `sbatch` that go before all of these.
    pub options: Vec<String>,
    /// What runs in the allocation.
    pub command: CommandLine,
}

impl Submission {
    /// For `sbatch`'s standard input.
    ///
    /// The script becomes the coordinator, so that Slurm's signals to the batch step reach it and no shell in between.
    pub fn script(&self) -> String {
        let mut script = String::from("#!/bin/sh\n");
        let mut option = |option: &str| {
            // A `String` takes all that is written.
            let _ = writeln!(script, "#SBATCH {option}");
        };
        option(&format!("--job-name={}", quote(&self.name)));
        option(&format!("--nodes={}", self.nodes));
        option("--ntasks-per-node=1");
        if self.gpus_per_node > 0 {
            option(&format!("--gpus-per-node={}", self.gpus_per_node));
        }
        option("--requeue");
        option("--open-mode=append");
        option(&format!("--output={}", quote(&self.log)));
        option(&format!("--signal=B:USR1@{}", self.warning_seconds));
        self.options.iter().for_each(|given| option(&quote(given)));
        script + "exec " + &self.command.to_string() + "\n"
    }
}

/// An allocation that a process is in, by Slurm's variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// `SLURM_JOB_ID`.
    pub job: String,
    /// Times the job was requeued; 0 at first.
    pub restarts: u32,
    /// Its hosts, in Slurm's shorthand: `n[1-2]`.
    pub node_list: String,
    /// Their number.
    pub nodes: u32,
    /// The user asked for so many tasks on each.
    pub tasks_per_node: Option<u32>,
    /// GPUs on this host.
    pub gpus: Option<u32>,
    /// The user asked for so many CPUs for each task.
    pub cpus_per_task: Option<u32>,
    /// It is a batch job: one that can go back into the queue.
    pub is_batch: bool,
    /// The step that the process is a task of; not in a batch script, nor in `salloc`'s shell.
    pub step: Option<String>,
}

impl Allocation {
    /// From variables; `None` outside of Slurm.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let number = |name: &str| variable(name).and_then(|value| value.parse().ok());
        Some(Self {
            job: variable("SLURM_JOB_ID")?,
            restarts: number("SLURM_RESTART_COUNT").unwrap_or(0),
            node_list: variable("SLURM_JOB_NODELIST")?,
            nodes: number("SLURM_JOB_NUM_NODES").or_else(|| number("SLURM_NNODES")).unwrap_or(1),
            tasks_per_node: number("SLURM_NTASKS_PER_NODE"),
            gpus: number("SLURM_GPUS_ON_NODE"),
            cpus_per_task: number("SLURM_CPUS_PER_TASK"),
            is_batch: variable("ENVIRONMENT").as_deref() == Some("BATCH"),
            step: variable("SLURM_STEP_ID"),
        })
    }

    /// Workers on each host: a GPU each, or as many as tasks were asked for, or one, which takes all cores.
    pub fn workers_per_node(&self) -> u32 {
        let gpus = self.gpus.filter(|&gpus| gpus > 0);
        let tasks = self.tasks_per_node.filter(|&tasks| tasks > 0);
        gpus.max(tasks).unwrap_or(1)
    }

    /// The name of the file by which the workers of this life of the job, or of this step, join.
    pub fn invitation_name(&self) -> String {
        let step = self.step.as_ref().map_or(String::new(), |step| format!(".{step}"));
        format!(".join-slurm-{}.{}{step}", self.job, self.restarts)
    }

    /// Starts `command` once on each host.
    pub fn step(&self, command: &CommandLine) -> CommandLine {
        let nodes = self.nodes;
        let mut arguments = vec![
            format!("--nodes={nodes}"),
            format!("--ntasks={nodes}"),
            "--ntasks-per-node=1".to_owned(),
            // A worker that fails is no reason to end the others: that is decided by the coordinator.
            "--kill-on-bad-exit=0".to_owned(),
            "--label".to_owned(),
            "--input=none".to_owned(),
        ];
        // Of all the tasks that the user asked for, and that are one of Slurm's here.
        let cpus = self.cpus_per_task.unwrap_or(1) * self.tasks_per_node.unwrap_or(1);
        if cpus > 1 {
            arguments.push(format!("--cpus-per-task={cpus}"));
        }
        arguments.push("--".to_owned());
        arguments.push(command.program.clone());
        arguments.extend(command.arguments.iter().cloned());
        CommandLine { program: "srun".to_owned(), arguments }
    }

    /// Runs `command` once on one of the hosts, beside whatever runs there, with this process's input and output.
    pub fn on_host(&self, host: &str, command: &CommandLine) -> CommandLine {
        let options = ["--nodes=1", "--ntasks=1", "--overlap", "--quiet", "--unbuffered"].map(str::to_owned);
        let options = options.into_iter().chain([format!("--nodelist={host}"), "--".to_owned()]);
        let command = [command.program.clone()].into_iter().chain(command.arguments.iter().cloned());
        CommandLine { program: "srun".to_owned(), arguments: options.chain(command).collect() }
    }

    /// Names the hosts, one a line.
    pub fn host_names(&self) -> CommandLine {
        CommandLine::new("scontrol", ["show", "hostnames", &self.node_list])
    }

    /// The state of the job, such as `RUNNING`; `COMPLETING` if Slurm is ending it already.
    pub fn state(&self) -> CommandLine {
        CommandLine::new("squeue", ["--noheader", "--format=%T", "--jobs", &self.job])
    }

    /// Puts the job back into the queue.
    pub fn requeue(&self) -> CommandLine {
        CommandLine::new("scontrol", ["requeue", &self.job])
    }
}

/// Describes a host; see [`node_address`].
pub fn show_node(name: &str) -> CommandLine {
    CommandLine::new("scontrol", ["--oneliner", "show", "node", name])
}

/// Of what [`show_node`] prints: the address by which Slurm itself reaches the host.
pub fn node_address(description: &str) -> Option<&str> {
    description.split_whitespace().find_map(|word| word.strip_prefix("NodeAddr="))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocation(variables: &[(&str, &str)]) -> Option<Allocation> {
        Allocation::from_variables(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn a_batch_script() {
        let submission = Submission {
            name: "g2p".to_owned(),
            nodes: 2,
            gpus_per_node: 8,
            log: "runs/g 2/slurm-%j.log".to_owned(),
            warning_seconds: 120,
            options: vec!["--time=04:00:00".to_owned()],
            command: CommandLine::new("/opt/quintet", ["launch", "slurm", "my job.toml"]),
        };
        let expected = "\
#!/bin/sh
#SBATCH --job-name=g2p
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH '--output='runs/g 2/slurm-%j.log''
#SBATCH --signal=B:USR1@120
#SBATCH --time=04:00:00
exec /opt/quintet launch slurm 'my job.toml'
";
        let expected = expected.replace("'--output='runs/g 2/slurm-%j.log''", "--output='runs/g 2/slurm-%j.log'");
        assert_eq!(submission.script(), expected);
        let without = Submission { gpus_per_node: 0, ..submission };
        assert!(!without.script().contains("gpus"));
    }

    #[test]
    fn inside_a_batch_script() {
        let variables = [
            ("SLURM_JOB_ID", "7"),
            ("SLURM_JOB_NODELIST", "n[1-2]"),
            ("SLURM_JOB_NUM_NODES", "2"),
            ("SLURM_NTASKS_PER_NODE", "1"),
            ("SLURM_PROCID", "0"),
            ("ENVIRONMENT", "BATCH"),
        ];
        let batch = allocation(&variables).unwrap();
        assert_eq!((batch.workers_per_node(), batch.restarts, batch.step.as_deref()), (1, 0, None));
        assert!(batch.is_batch);
        assert_eq!(batch.invitation_name(), ".join-slurm-7.0");
        let command = CommandLine::new("/opt/quintet", ["worker", "--join", "runs/x/.join"]);
        let expected = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --label --input=none -- \
                        /opt/quintet worker --join runs/x/.join";
        assert_eq!(batch.step(&command).to_string(), expected);
        let expected = "srun --nodes=1 --ntasks=1 --overlap --quiet --unbuffered --nodelist=n2 -- quintet doctor";
        assert_eq!(batch.on_host("n2", &CommandLine::new("quintet", ["doctor"])).to_string(), expected);
        assert_eq!(batch.host_names().to_string(), "scontrol show hostnames 'n[1-2]'");
        assert_eq!(allocation(&variables[1..]), None);
    }

    #[test]
    fn gpus_and_tasks_decide_the_number_of_workers() {
        let base = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n1"), ("SLURM_RESTART_COUNT", "2")];
        let with = |more: &[(&'static str, &'static str)]| allocation(&[&base, more].concat()).unwrap();
        assert_eq!(with(&[("SLURM_GPUS_ON_NODE", "8"), ("SLURM_NTASKS_PER_NODE", "1")]).workers_per_node(), 8);
        let tasks = with(&[("SLURM_NTASKS_PER_NODE", "4"), ("SLURM_CPUS_PER_TASK", "3"), ("SLURM_STEP_ID", "5")]);
        assert_eq!(tasks.workers_per_node(), 4);
        assert_eq!(tasks.invitation_name(), ".join-slurm-7.2.5");
        assert!(tasks.step(&CommandLine::new("x", [""; 0])).to_string().contains(" --cpus-per-task=12 "));
        assert_eq!(with(&[]).workers_per_node(), 1);
    }

    #[test]
    fn the_address_of_a_host() {
        let description = "NodeName=n1 Arch=x86_64 CoresPerSocket=1 NodeAddr=10.0.0.1 NodeHostName=one Port=6818\n";
        assert_eq!(node_address(description), Some("10.0.0.1"));
        assert_eq!(node_address("Node n9 not found"), None);
    }
}
