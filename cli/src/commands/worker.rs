//! `quintet worker`: a rank of a run.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use quintet_coordinator::admission::RUN_TOKEN_VARIABLE;
use quintet_coordinator::secret::Secret;
use quintet_worker::access::{Access, Pass};
use quintet_worker::rank::{self, RankJob};
use quintet_worker::session::{Session, SessionError};

use crate::args::WorkerArguments;
use crate::commands::tokens;
use crate::device::Decision;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::prepare::working_directory;

pub(crate) fn run(arguments: WorkerArguments) -> Result<u8> {
    let ticket = Ticket::of(&arguments)?;
    let url = &arguments.coordinator;
    let joined = ticket.access(url).and_then(|access| {
        let (session, welcome) = Session::connect(url, &access, &host_name())?;
        Ok((access, session, welcome))
    });
    let (access, session, welcome) = match joined {
        Ok(joined) => joined,
        // Mostly the run was over before this worker came.
        Err(error) if arguments.supervised && !error.is_user_error() => return Ok(exit::FAILURE),
        Err(error) => return Err(quintet_worker::Error::from(error).into()),
    };
    let listen = listen_address(&arguments, access.address(url).map_err(quintet_worker::Error::from)?)?;
    let job: Job = serde_json::from_str(&welcome.job_json)
        .map_err(|error| Failure::failed(format!("the coordinator sent a job that is not understood: {error}")))?;
    let collective_token = welcome.collective_token.as_slice().try_into();
    let collective_token = collective_token.map_err(|_| Failure::failed("the coordinator sent a bad token"))?;
    let wanted = arguments.device.map_or(job.cluster.device, Into::into);
    let device = Decision::new(wanted, arguments.gpu)?;
    if !arguments.supervised {
        eprintln!("{}", device.line());
    }
    let job = RankJob {
        device: device.choice,
        shares_gpu: std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1"),
        fingerprint: job.fingerprint(),
        silence_limit: Duration::from_secs_f64(job.cluster.step_timeout_seconds),
        model: job.model,
        data: job.data,
        training: job.training,
        evaluation: job.evaluation,
        output_dir: job.output_dir,
        base_dir: working_directory()?,
        tokenizer_json: welcome.tokenizer_json,
        collective_token,
        access,
        listen,
        resume_step: welcome.resume_step,
    };
    // How the run ended, and what went wrong here, is for the coordinator to tell, which has heard of it; unless it is
    // the coordinator that is gone.
    match rank::run(&session, job) {
        Ok((exit_code, _)) => Ok(exit_code),
        Err(error @ quintet_worker::Error::Session(_)) if !arguments.supervised => Err(error.into()),
        Err(error) => Ok(Failure::from(error).exit_code),
    }
}

/// What a worker was given to get in.
enum Ticket {
    Secret { run_token: [u8; 32], insecure: bool },
    JoinTokens(Vec<String>),
}

impl Ticket {
    fn of(arguments: &WorkerArguments) -> Result<Self> {
        let insecure = arguments.insecure_plaintext;
        if arguments.coordinator.starts_with("https://") {
            if insecure {
                return Err(Failure::bad_input("--insecure-plaintext: the coordinator's URL is https, and encrypted"));
            }
            return Ok(Self::JoinTokens(tokens::given(arguments.token_index)?));
        }
        if let Some(listen) = arguments.listen.filter(|listen| !quintet_identity::is_private(listen.ip()) && !insecure)
        {
            return Err(Failure::bad_input(format!(
                "--listen {listen}: gradients would cross the network in plain text; join by https, or accept that with \
                 --insecure-plaintext"
            )));
        }
        let secret = std::env::var(RUN_TOKEN_VARIABLE).ok().as_deref().and_then(Secret::from_hex);
        let secret = secret.ok_or_else(|| {
            Failure::bad_input(format!("{RUN_TOKEN_VARIABLE} must hold the token that the coordinator printed"))
        })?;
        Ok(Self::Secret { run_token: *secret.as_bytes(), insecure })
    }

    fn access(&self, url: &str) -> std::result::Result<Access, SessionError> {
        match self {
            &Self::Secret { run_token, insecure } => Ok(Access::Plain { run_token, insecure }),
            Self::JoinTokens(tokens) => Pass::join(url, tokens).map(Access::Certificate),
        }
    }
}

/// Where other workers reach this one: as told, or on the interface that leads to the coordinator.
fn listen_address(arguments: &WorkerArguments, coordinator: SocketAddr) -> Result<SocketAddr> {
    if let Some(listen) = arguments.listen {
        return Ok(listen);
    }
    let any: IpAddr = if coordinator.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Sends nothing: connecting a datagram socket only looks up the route.
    let route = || -> std::io::Result<SocketAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(coordinator)?;
        Ok(SocketAddr::new(socket.local_addr()?.ip(), 0))
    };
    route().map_err(|error| {
        Failure::failed(format!("no address of this machine leads to {coordinator}: {error}; give one with --listen"))
    })
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "unknown".to_string(), |name| name.trim().to_string())
}
