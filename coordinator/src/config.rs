//! The `[cluster]` table of a job.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The device that workers compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The best that the machine has.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// The GPU's kernels on the processor, for tests.
    Emulated,
}

/// Workers of a run, and when they count as lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Workers that the run starts with. Default: one a device.
    pub workers: Option<u32>,
    /// The run goes on while so many are left. Default 1.
    pub min_workers: u32,
    /// So many dead worker processes `quintet train` replaces before ten steps in a row go well; elsewhere, so often each
    /// worker is replaced on its host. Default 10.
    pub max_restarts: u32,
    /// `"auto"`, `"cpu"`, `"cuda"` or `"emulated"`. Default `"auto"`.
    pub device: Device,
    /// Address and port for workers to connect to; port 0 takes a free one. Default
    /// `"127.0.0.1:0"`.
    pub listen: String,
    /// A worker not heard of for longer is lost. It sends a heartbeat every second. Default 10.
    pub heartbeat_timeout_seconds: f64,
    /// A step, an evaluation or a checkpoint that takes longer hangs. Default 600.
    pub step_timeout_seconds: f64,
    /// With fewer than `min_workers`, the run waits for others for so long. Default 300.
    pub join_timeout_seconds: f64,
    /// A worker that loses the coordinator tries to reach it again for so long. Default 60.
    pub reconnect_timeout_seconds: f64,
    /// With no room for the ledger, the run waits for so long. Default 600.
    pub storage_timeout_seconds: f64,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            workers: None,
            min_workers: 1,
            max_restarts: 10,
            device: Device::Auto,
            listen: "127.0.0.1:0".to_owned(),
            heartbeat_timeout_seconds: 10.0,
            step_timeout_seconds: 600.0,
            join_timeout_seconds: 300.0,
            reconnect_timeout_seconds: 60.0,
            storage_timeout_seconds: 600.0,
        }
    }
}

/// Sanity bound: the state machine visits all workers at each step.
const WORKERS_MAX: u32 = 4096;

/// Each worker is invited so often beforehand.
const RESTARTS_MAX: u32 = 100;

impl ClusterConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// A user error that names the key and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key, problem: String| Err(Error::Config { key, problem });
        let workers = self.workers();
        if !(1..=WORKERS_MAX).contains(&workers) {
            return refuse("workers", format!("{workers} is not between 1 and {WORKERS_MAX}"));
        }
        if !(1..=WORKERS_MAX).contains(&self.min_workers) {
            let problem = format!("{} is not between 1 and {WORKERS_MAX}", self.min_workers);
            return refuse("min_workers", problem);
        }
        if self.min_workers > workers {
            let problem = format!("{} is more than cluster.workers, {workers}", self.min_workers);
            return refuse("min_workers", problem);
        }
        if self.max_restarts > RESTARTS_MAX {
            return refuse("max_restarts", format!("{} is more than {RESTARTS_MAX}", self.max_restarts));
        }
        self.listen_address()?;
        let seconds = [
            ("heartbeat_timeout_seconds", self.heartbeat_timeout_seconds, 3.0..=3600.0),
            ("step_timeout_seconds", self.step_timeout_seconds, 1.0..=604_800.0),
            ("join_timeout_seconds", self.join_timeout_seconds, 0.0..=604_800.0),
            ("reconnect_timeout_seconds", self.reconnect_timeout_seconds, 0.0..=604_800.0),
            ("storage_timeout_seconds", self.storage_timeout_seconds, 0.0..=604_800.0),
        ];
        for (key, value, range) in seconds {
            if !range.contains(&value) {
                let (low, high) = range.into_inner();
                return refuse(key, format!("{value} is not between {low} and {high}"));
            }
        }
        Ok(())
    }

    /// Workers that the run starts with.
    pub fn workers(&self) -> u32 {
        self.workers.unwrap_or(1)
    }

    /// The address to listen on.
    ///
    /// # Errors
    /// A user error unless `listen` is an IP address and a port.
    pub fn listen_address(&self) -> Result<SocketAddr> {
        self.listen.parse().map_err(|_| Error::Config {
            key: "listen",
            problem: format!("{:?} is not an IP address and a port, such as \"127.0.0.1:4700\"", self.listen),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(change: impl FnOnce(&mut ClusterConfig)) -> String {
        let mut config = ClusterConfig::default();
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert!(error.is_user_error());
        error.to_string()
    }

    #[test]
    fn defaults_are_valid_and_documented() {
        let config: ClusterConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config, ClusterConfig::default());
        config.validate().unwrap();
        assert!(config.listen_address().unwrap().ip().is_loopback());
    }

    #[test]
    fn unknown_keys_and_devices_are_refused() {
        assert!(serde_json::from_str::<ClusterConfig>(r#"{"worker": 2}"#).is_err());
        assert!(serde_json::from_str::<ClusterConfig>(r#"{"device": "tpu"}"#).is_err());
    }

    #[test]
    fn ranges_are_checked_and_name_the_key() {
        assert_eq!(problem(|c| c.workers = Some(0)), "cluster.workers: 0 is not between 1 and 4096");
        assert_eq!(problem(|c| c.min_workers = 0), "cluster.min_workers: 0 is not between 1 and 4096");
        let too_many = problem(|c| (c.workers, c.min_workers) = (Some(2), 3));
        assert_eq!(too_many, "cluster.min_workers: 3 is more than cluster.workers, 2");
        assert_eq!(problem(|c| c.min_workers = 2), "cluster.min_workers: 2 is more than cluster.workers, 1");
        assert_eq!(problem(|c| c.max_restarts = 101), "cluster.max_restarts: 101 is more than 100");
        assert!(problem(|c| c.listen = "localhost".to_owned()).starts_with("cluster.listen: \"localhost\""));
        assert!(problem(|c| c.heartbeat_timeout_seconds = f64::NAN).starts_with("cluster.heartbeat_"));
        assert!(problem(|c| c.step_timeout_seconds = 0.0).starts_with("cluster.step_timeout_seconds: 0"));
    }
}
