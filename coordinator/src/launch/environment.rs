//! Where a process stands among the others of its job, by the variables that schedulers and `torchrun` set.

use std::fmt;

use crate::{Error, Result};

/// Who set a variable. In this order: who comes first wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A flag of this program.
    Flag,
    /// `QUINTET_*`.
    Quintet,
    /// The names that `torchrun` made common.
    Torchrun,
    /// `SLURM_*` of a job step.
    Slurm,
    /// `OMPI_COMM_WORLD_*`.
    OpenMpi,
    /// An Indexed Job.
    Kubernetes,
    /// Nobody.
    Default,
}

/// A value and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<T> {
    /// The value.
    pub value: T,
    /// Who set it.
    pub source: Source,
    /// The variable or flag, for people.
    pub name: &'static str,
}

/// Where a process stands. What nobody says is that of a process alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the process in its job. Not the rank in the run, which the coordinator gives.
    pub rank: Found<u32>,
    /// Processes of the job.
    pub world_size: Found<u32>,
    /// Index of the process on its host.
    pub local_rank: Found<u32>,
    /// Processes on its host.
    pub local_world_size: Found<u32>,
    /// The coordinator's URL, if somebody says it.
    pub coordinator: Option<Found<String>>,
}

/// The port of `MASTER_ADDR` where no `MASTER_PORT` is set.
pub const PORT: u16 = 4700;

type Names = [(Source, &'static str)];

const RANK: &Names = &[
    (Source::Quintet, "QUINTET_RANK"),
    (Source::Torchrun, "RANK"),
    (Source::Slurm, "SLURM_PROCID"),
    (Source::OpenMpi, "OMPI_COMM_WORLD_RANK"),
    (Source::Kubernetes, "JOB_COMPLETION_INDEX"),
];
const WORLD_SIZE: &Names = &[
    (Source::Quintet, "QUINTET_WORLD_SIZE"),
    (Source::Torchrun, "WORLD_SIZE"),
    (Source::Slurm, "SLURM_STEP_NUM_TASKS"),
    (Source::Slurm, "SLURM_NTASKS"),
    (Source::OpenMpi, "OMPI_COMM_WORLD_SIZE"),
];
const LOCAL_RANK: &Names = &[
    (Source::Quintet, "QUINTET_LOCAL_RANK"),
    (Source::Torchrun, "LOCAL_RANK"),
    (Source::Slurm, "SLURM_LOCALID"),
    (Source::OpenMpi, "OMPI_COMM_WORLD_LOCAL_RANK"),
];
const LOCAL_WORLD_SIZE: &Names = &[
    (Source::Quintet, "QUINTET_LOCAL_WORLD_SIZE"),
    (Source::Torchrun, "LOCAL_WORLD_SIZE"),
    (Source::OpenMpi, "OMPI_COMM_WORLD_LOCAL_SIZE"),
];

impl Place {
    /// From variables; `coordinator` is the flag's value.
    ///
    /// # Errors
    /// [`Error::Variable`] if one is no number.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>, coordinator: Option<String>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        // A batch script has SLURM_PROCID too, and is no task.
        let in_step = variable("SLURM_STEP_ID").is_some();
        let number = |names: &Names, alone: u32| -> Result<Found<u32>> {
            for &(source, name) in names.iter().filter(|(source, _)| *source != Source::Slurm || in_step) {
                if let Some(text) = variable(name) {
                    let value = text.trim().parse().map_err(|_| Error::Variable { name, value: text })?;
                    return Ok(Found { value, source, name });
                }
            }
            Ok(Found { value: alone, source: Source::Default, name: "default" })
        };
        let mut local_world_size = number(LOCAL_WORLD_SIZE, 1)?;
        if let Some(value) = variable("SLURM_STEP_TASKS_PER_NODE").filter(|_| in_step)
            && local_world_size.source > Source::Slurm
        {
            let name = "SLURM_STEP_TASKS_PER_NODE";
            let node = variable("SLURM_NODEID").and_then(|node| node.parse().ok()).unwrap_or(0);
            let tasks = tasks_of_node(&value, node).ok_or(Error::Variable { name, value })?;
            local_world_size = Found { value: tasks, source: Source::Slurm, name };
        }
        Ok(Self {
            rank: number(RANK, 0)?,
            world_size: number(WORLD_SIZE, 1)?,
            local_rank: number(LOCAL_RANK, 0)?,
            local_world_size,
            coordinator: find_coordinator(variable, coordinator)?,
        })
    }

    /// Whether variables say anything.
    pub fn is_told(&self) -> bool {
        let numbers = [&self.rank, &self.world_size, &self.local_rank, &self.local_world_size];
        let url = self.coordinator.as_ref().map(|found| found.source);
        let sources = numbers.map(|number| number.source).into_iter().chain(url);
        sources.into_iter().any(|source| !matches!(source, Source::Flag | Source::Default))
    }

    /// As a process `local_rank` of `local_world_size` on this host, which started it.
    pub fn child(&self, local_rank: u32, local_world_size: u32) -> [(&'static str, String); 5] {
        let group = self.rank.value;
        [
            ("RANK", (group * local_world_size + local_rank).to_string()),
            ("WORLD_SIZE", (self.world_size.value * local_world_size).to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", local_world_size.to_string()),
            ("GROUP_RANK", group.to_string()),
        ]
    }
}

fn find_coordinator(variable: impl Fn(&str) -> Option<String>, flag: Option<String>) -> Result<Option<Found<String>>> {
    if let Some(value) = flag {
        return Ok(Some(Found { value, source: Source::Flag, name: "--coordinator" }));
    }
    if let Some(value) = variable("QUINTET_COORDINATOR") {
        return Ok(Some(Found { value, source: Source::Quintet, name: "QUINTET_COORDINATOR" }));
    }
    let Some(host) = variable("MASTER_ADDR") else { return Ok(None) };
    let port = match variable("MASTER_PORT") {
        None => PORT,
        Some(value) => value.parse().map_err(|_| Error::Variable { name: "MASTER_PORT", value })?,
    };
    // As coordinators do: in plain text on one machine only.
    let private = host == "localhost" || host.parse().is_ok_and(quintet_identity::is_private);
    let scheme = if private { "http" } else { "https" };
    // An IPv6 address wants brackets in a URL.
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
    let value = format!("{scheme}://{host}:{port}");
    Ok(Some(Found { value, source: Source::Torchrun, name: "MASTER_ADDR" }))
}

/// Of `SLURM_STEP_TASKS_PER_NODE`, such as `2(x3),1`.
fn tasks_of_node(text: &str, node: u32) -> Option<u32> {
    let mut left = node;
    for part in text.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if left < times {
            return tasks.trim().parse().ok();
        }
        left -= times;
    }
    None
}

/// `rank 1 of 4 (RANK, WORLD_SIZE), …`: what was found, and where.
impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = |index: &Found<u32>, count: &Found<u32>| {
            let names = if index.name == count.name {
                index.name.to_owned()
            } else {
                format!("{}, {}", index.name, count.name)
            };
            format!("{} of {} ({names})", index.value, count.value)
        };
        write!(formatter, "process {}", pair(&self.rank, &self.world_size))?;
        write!(formatter, ", on this host {}", pair(&self.local_rank, &self.local_world_size))?;
        match &self.coordinator {
            Some(found) => write!(formatter, ", coordinator {} ({})", found.value, found.name),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Place> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Place::from_variables(find, None)
    }

    #[test]
    fn a_process_alone() {
        let alone = place(&[("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "8")]).unwrap();
        assert_eq!(alone.to_string(), "process 0 of 1 (default), on this host 0 of 1 (default)");
        assert!(!alone.is_told() && place(&[("RANK", "0")]).unwrap().is_told());
    }

    #[test]
    fn torchruns_names() {
        let variables = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "n1"),
            ("MASTER_PORT", "29500"),
        ];
        let said = "process 3 of 4 (RANK, WORLD_SIZE), on this host 1 of 2 (LOCAL_RANK, LOCAL_WORLD_SIZE), \
                    coordinator https://n1:29500 (MASTER_ADDR)";
        assert_eq!(place(&variables).unwrap().to_string(), said);
    }

    #[test]
    fn a_slurm_step() {
        let variables = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_STEP_NUM_TASKS", "5"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
        ];
        let said = "process 3 of 5 (SLURM_PROCID, SLURM_STEP_NUM_TASKS), \
                    on this host 0 of 1 (SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE)";
        assert_eq!(place(&variables).unwrap().to_string(), said);
    }

    #[test]
    fn open_mpi_and_kubernetes() {
        let variables = [
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "6"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let found = place(&variables).unwrap();
        assert_eq!((found.rank.value, found.rank.source), (5, Source::OpenMpi));
        assert_eq!((found.local_rank.value, found.local_world_size.value), (1, 2));
        let found = place(&[("JOB_COMPLETION_INDEX", "2")]).unwrap();
        assert_eq!((found.rank.value, found.rank.source), (2, Source::Kubernetes));
    }

    #[test]
    fn who_comes_first_wins() {
        let all = [
            ("QUINTET_RANK", "1"),
            ("RANK", "2"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "3"),
            ("OMPI_COMM_WORLD_RANK", "4"),
            ("JOB_COMPLETION_INDEX", "5"),
        ];
        let order =
            [Source::Quintet, Source::Torchrun, Source::Slurm, Source::Slurm, Source::OpenMpi, Source::Kubernetes];
        for first in [0, 1, 2, 4, 5] {
            assert_eq!(place(&all[first..]).unwrap().rank.source, order[first]);
        }
        let url = |flag: Option<&str>, own: bool| {
            let variables = [("MASTER_ADDR", "::1"), ("QUINTET_COORDINATOR", "http://own:1")];
            let find = |name: &str| {
                let mut known = variables[..1 + usize::from(own)].iter();
                known.find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            };
            Place::from_variables(find, flag.map(str::to_owned)).unwrap().coordinator.unwrap()
        };
        assert_eq!(url(Some("http://flag:1"), true).source, Source::Flag);
        assert_eq!(url(None, true).source, Source::Quintet);
        assert_eq!(url(None, false).value, "http://[::1]:4700");
    }

    #[test]
    fn what_is_no_number_is_named() {
        let error = place(&[("RANK", "first")]).unwrap_err();
        assert!(error.is_user_error());
        assert_eq!(error.to_string(), "the variable RANK is \"first\", which is no number; unset it or correct it");
    }

    #[test]
    fn children_have_torchruns_names() {
        let node = place(&[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap();
        let child: Vec<String> = node.child(3, 4).iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(child, ["RANK=7", "WORLD_SIZE=8", "LOCAL_RANK=3", "LOCAL_WORLD_SIZE=4", "GROUP_RANK=1"]);
    }
}
