//! A run by Kubernetes: a Job with the coordinator and an Indexed Job with the workers, and what they share.
//!
//! Two Jobs, because the coordinator needs no GPU and outlives workers, as they outlive it; both are Indexed, which gives
//! pods names that stay: `NAME-coordinator-0.NAME` is where workers join, whichever pod it is.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
    PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    Probe, ResourceRequirements, SeccompProfile, Secret, SecretVolumeSource, SecurityContext, Service, ServicePort,
    ServiceSpec, TCPSocketAction, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::{ByteString, Resource};
use serde::Serialize;

use crate::exit_code::{BAD_INPUT, NUMERIC_GUARD, PREEMPTED};
use crate::{Error, Result};

/// Where the coordinator listens in its pod.
pub const COORDINATOR_PORT: u16 = 4700;
/// Where the first worker of a pod listens; the others of the pod follow.
pub const WORKER_PORT: u16 = 4710;
/// Where the volume is, in which relative paths of the job begin.
pub const WORK_DIRECTORY: &str = "/work";

const JOB_DIRECTORY: &str = "/etc/quintet/job";
const AUTHORITY_DIRECTORY: &str = "/etc/quintet/authority";
const TOKENS_DIRECTORY: &str = "/etc/quintet/tokens";
/// Of the image's user.
const USER: i64 = 10_001;
/// Time to finish a step and to save, before Kubernetes kills.
const GRACE_SECONDS: i64 = 120;
/// Pods that may fail for reasons of their own, such as a lack of memory, before the run is given up.
const FAILURES_MAX: i32 = 20;

/// A run to submit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Of the objects: a DNS label.
    pub name: String,
    /// Where to make them; the user's where none is given.
    pub namespace: Option<String>,
    /// With this program as its entry point.
    pub image: String,
    /// Pods with workers.
    pub nodes: u32,
    /// GPUs of each, with a worker for each; 0 for one worker that computes on CPUs.
    pub gpus_per_node: u32,
    /// A volume claim that all pods can mount and write, with the data; runs are written there.
    pub claim: String,
    /// The text of the job file.
    pub job: String,
    /// More arguments of `quintet coordinator`.
    pub coordinator_arguments: Vec<String>,
    /// More arguments of `quintet worker`.
    pub worker_arguments: Vec<String>,
    /// Files of the run's authority, by name; only the coordinator sees them.
    pub authority: BTreeMap<String, Vec<u8>>,
    /// A join token for each worker, and for those that replace some.
    pub tokens: Vec<String>,
}

impl Cluster {
    /// Checks the names.
    ///
    /// # Errors
    /// [`Error::Hosts`] that names the flag.
    pub fn validate(&self) -> Result<()> {
        let wrong = |place: &str, problem: String| Err(Error::Hosts { place: place.to_owned(), problem });
        // `-coordinator-0` and a pod's random end must fit into 63.
        let label = |text: &str| {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            (1..=40).contains(&text.len())
                && text.chars().all(plain)
                && !text.ends_with('-')
                && text.starts_with(|c: char| c.is_ascii_lowercase())
        };
        if !label(&self.name) {
            let problem = format!("{:?} is not of at most 40 small letters, digits and hyphens", self.name);
            return wrong("--name", problem);
        }
        if self.image.is_empty() || self.image.contains(char::is_whitespace) {
            return wrong("--image", format!("{:?} is no image", self.image));
        }
        Ok(())
    }

    /// The objects, as a stream of YAML documents for `kubectl apply -f -`.
    ///
    /// # Errors
    /// [`Error::Yaml`], which would be a bug.
    pub fn manifest(&self) -> Result<String> {
        let mut text = String::new();
        document(&mut text, &self.secret("authority", self.authority.clone()))?;
        let tokens = BTreeMap::from([("tokens".to_owned(), (self.tokens.join("\n") + "\n").into_bytes())]);
        document(&mut text, &self.secret("tokens", tokens))?;
        document(&mut text, &self.job_file())?;
        document(&mut text, &self.service())?;
        document(&mut text, &self.coordinator())?;
        document(&mut text, &self.workers())?;
        Ok(text)
    }

    /// Workers of the run.
    pub fn world_size(&self) -> u32 {
        self.nodes * self.workers_per_node()
    }

    fn workers_per_node(&self) -> u32 {
        self.gpus_per_node.max(1)
    }

    fn labels(&self, role: Option<&str>) -> BTreeMap<String, String> {
        let run = [("app.kubernetes.io/name", "quintet"), ("app.kubernetes.io/instance", &self.name)];
        let role = role.map(|role| ("app.kubernetes.io/component", role));
        run.into_iter().chain(role).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    fn metadata(&self, suffix: &str, role: Option<&str>) -> ObjectMeta {
        ObjectMeta {
            name: Some(format!("{}{suffix}", self.name)),
            namespace: self.namespace.clone(),
            labels: Some(self.labels(role)),
            ..ObjectMeta::default()
        }
    }

    fn secret(&self, what: &str, files: BTreeMap<String, Vec<u8>>) -> Secret {
        let metadata = self.metadata(&format!("-{what}"), None);
        let data = files.into_iter().map(|(name, bytes)| (name, ByteString(bytes))).collect();
        Secret { metadata, data: Some(data), type_: Some("Opaque".to_owned()), ..Secret::default() }
    }

    fn job_file(&self) -> ConfigMap {
        let files = BTreeMap::from([("job.toml".to_owned(), self.job.clone())]);
        ConfigMap { metadata: self.metadata("-job", None), data: Some(files), ..ConfigMap::default() }
    }

    /// Gives pods their names.
    fn service(&self) -> Service {
        let ports = [("coordinator", COORDINATOR_PORT), ("worker", WORKER_PORT)];
        let port = |(name, port): (&str, u16)| ServicePort {
            name: Some(name.to_owned()),
            port: port.into(),
            ..ServicePort::default()
        };
        let spec = ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(self.labels(None)),
            ports: Some(ports.map(port).to_vec()),
            // Workers may look for the coordinator before it is ready.
            publish_not_ready_addresses: Some(true),
            ..ServiceSpec::default()
        };
        Service { metadata: self.metadata("", None), spec: Some(spec), ..Service::default() }
    }

    fn coordinator(&self) -> Job {
        let mut arguments = words(&["coordinator", &format!("{JOB_DIRECTORY}/job.toml")]);
        arguments.extend(words(&["--listen", &format!("$(POD_IP):{COORDINATOR_PORT}")]));
        arguments.extend(words(&["--authority", AUTHORITY_DIRECTORY]));
        // A pod that takes the place of another goes on with its run.
        arguments.extend(words(&["--resume", "--workers", &self.world_size().to_string()]));
        arguments.extend(self.coordinator_arguments.iter().cloned());
        let alive = tcp(COORDINATOR_PORT);
        let container = Container {
            args: Some(arguments),
            ports: Some(vec![port("coordinator", COORDINATOR_PORT)]),
            // Reading data and training a tokenizer come before it listens.
            startup_probe: Some(Probe { period_seconds: Some(5), failure_threshold: Some(720), ..alive.clone() }),
            readiness_probe: Some(Probe { period_seconds: Some(5), ..alive.clone() }),
            liveness_probe: Some(Probe { period_seconds: Some(20), failure_threshold: Some(6), ..alive }),
            ..self.container("authority", AUTHORITY_DIRECTORY)
        };
        let pod = self.pod(container, "coordinator", "authority");
        self.job(1, pod, "coordinator")
    }

    fn workers(&self) -> Job {
        let coordinator = format!("https://{0}-coordinator-0.{0}:{COORDINATOR_PORT}", self.name);
        let mut arguments = words(&["worker", "--coordinator", &coordinator]);
        arguments.extend(words(&["--listen", &format!("$(POD_IP):{WORKER_PORT}")]));
        // The coordinator's pod may come later, and reads its data first.
        arguments.extend(words(&["--wait-seconds", "3600"]));
        arguments.extend(words(&["--nproc-per-node", &self.workers_per_node().to_string()]));
        arguments.extend(self.worker_arguments.iter().cloned());
        let ports = (WORKER_PORT..).zip(0..self.workers_per_node());
        let alive = tcp(WORKER_PORT);
        let mut container = self.container("tokens", TOKENS_DIRECTORY);
        let tokens = format!("{TOKENS_DIRECTORY}/tokens");
        container.env.get_or_insert_default().push(variable("QUINTET_JOIN_TOKEN_FILE", &tokens));
        if self.gpus_per_node > 0 {
            let gpus = BTreeMap::from([("nvidia.com/gpu".to_owned(), Quantity(self.gpus_per_node.to_string()))]);
            container.resources = Some(ResourceRequirements { limits: Some(gpus), ..ResourceRequirements::default() });
        }
        let container = Container {
            args: Some(arguments),
            ports: Some(ports.map(|(number, index)| port(&format!("worker-{index}"), number)).collect()),
            // It listens when the coordinator has let it in. That it gets on with its work is watched by the
            // coordinator, which knows how long a step takes.
            startup_probe: Some(Probe { period_seconds: Some(5), failure_threshold: Some(720), ..alive.clone() }),
            liveness_probe: Some(Probe { period_seconds: Some(20), failure_threshold: Some(6), ..alive }),
            ..container
        };
        let pod = self.pod(container, "worker", "tokens");
        self.job(self.nodes, pod, "worker")
    }

    /// What both kinds of containers have.
    fn container(&self, secret: &str, secret_directory: &str) -> Container {
        let mount = |name: &str, path: &str, read_only| VolumeMount {
            name: name.to_owned(),
            mount_path: path.to_owned(),
            read_only,
            ..VolumeMount::default()
        };
        let address = EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: "status.podIP".to_owned(),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        };
        let address = EnvVar { name: "POD_IP".to_owned(), value_from: Some(address), ..EnvVar::default() };
        Container {
            name: "quintet".to_owned(),
            image: Some(self.image.clone()),
            working_dir: Some(WORK_DIRECTORY.to_owned()),
            env: Some(vec![address, variable("XDG_CACHE_HOME", "/tmp/cache")]),
            volume_mounts: Some(vec![
                mount("work", WORK_DIRECTORY, None),
                mount("job", JOB_DIRECTORY, Some(true)),
                mount(secret, secret_directory, Some(true)),
                mount("tmp", "/tmp", None),
                // NCCL's, between processes of a pod.
                mount("shm", "/dev/shm", None),
            ]),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                capabilities: Some(Capabilities { drop: Some(words(&["ALL"])), ..Capabilities::default() }),
                ..SecurityContext::default()
            }),
            ..Container::default()
        }
    }

    fn pod(&self, container: Container, role: &str, secret: &str) -> PodTemplateSpec {
        let volume = |name: &str| Volume { name: name.to_owned(), ..Volume::default() };
        let claim = PersistentVolumeClaimVolumeSource {
            claim_name: self.claim.clone(),
            ..PersistentVolumeClaimVolumeSource::default()
        };
        let job = ConfigMapVolumeSource { name: format!("{}-job", self.name), ..ConfigMapVolumeSource::default() };
        let files = SecretVolumeSource {
            secret_name: Some(format!("{}-{secret}", self.name)),
            // For the group, which is the image's user's own.
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        };
        let memory = EmptyDirVolumeSource { medium: Some("Memory".to_owned()), ..EmptyDirVolumeSource::default() };
        let volumes = vec![
            Volume { persistent_volume_claim: Some(claim), ..volume("work") },
            Volume { config_map: Some(job), ..volume("job") },
            Volume { secret: Some(files), ..volume(secret) },
            Volume { empty_dir: Some(EmptyDirVolumeSource::default()), ..volume("tmp") },
            Volume { empty_dir: Some(memory), ..volume("shm") },
        ];
        let spec = PodSpec {
            containers: vec![container],
            volumes: Some(volumes),
            // Pods that failed are replaced by the Job, by the rules of its failure policy.
            restart_policy: Some("Never".to_owned()),
            subdomain: Some(self.name.clone()),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            automount_service_account_token: Some(false),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                fs_group: Some(USER),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            ..PodSpec::default()
        };
        let labels = Some(self.labels(Some(role)));
        PodTemplateSpec { metadata: Some(ObjectMeta { labels, ..ObjectMeta::default() }), spec: Some(spec) }
    }

    fn job(&self, completions: u32, template: PodTemplateSpec, role: &str) -> Job {
        let count = Some(i32::try_from(completions).unwrap_or(i32::MAX));
        let spec = JobSpec {
            completion_mode: Some("Indexed".to_owned()),
            completions: count,
            parallelism: count,
            backoff_limit: Some(FAILURES_MAX),
            pod_failure_policy: Some(failure_policy()),
            template,
            ..JobSpec::default()
        };
        let suffix = if role == "worker" { "-workers".to_owned() } else { format!("-{role}") };
        Job { metadata: self.metadata(&suffix, Some(role)), spec: Some(spec), ..Job::default() }
    }
}

/// What our exit codes mean to a Job. What no rule matches counts towards its limit.
fn failure_policy() -> PodFailurePolicy {
    let on_codes = |action: &str, codes: &[u32]| PodFailurePolicyRule {
        action: action.to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some("quintet".to_owned()),
            operator: "In".to_owned(),
            // Exit codes are small.
            values: codes.iter().map(|&code| code as i32).collect(),
        }),
        ..PodFailurePolicyRule::default()
    };
    let disrupted =
        PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".to_owned(), status: "True".to_owned() };
    let rules = vec![
        // Trying again is no use.
        on_codes("FailJob", &[BAD_INPUT, NUMERIC_GUARD]),
        // Saved; the next pod goes on.
        on_codes("Ignore", &[PREEMPTED]),
        // Evicted, drained, preempted: not the pod's fault.
        PodFailurePolicyRule {
            action: "Ignore".to_owned(),
            on_pod_conditions: Some(vec![disrupted]),
            ..PodFailurePolicyRule::default()
        },
    ];
    PodFailurePolicy { rules }
}

fn tcp(port: u16) -> Probe {
    let tcp_socket = TCPSocketAction { port: IntOrString::Int(port.into()), ..TCPSocketAction::default() };
    Probe { tcp_socket: Some(tcp_socket), ..Probe::default() }
}

fn port(name: &str, port: u16) -> ContainerPort {
    ContainerPort { name: Some(name.to_owned()), container_port: port.into(), ..ContainerPort::default() }
}

fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), ..EnvVar::default() }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn document<T: Resource + Serialize>(text: &mut String, object: &T) -> Result<()> {
    let yaml = serde_saphyr::to_string(object).map_err(|error| Error::Yaml(error.to_string()))?;
    text.push_str("---\n");
    text.push_str(&yaml);
    if !yaml.ends_with('\n') {
        text.push('\n');
    }
    Ok(())
}

#[cfg(test)]
mod tests;
