//! `quintet worker`: a rank of a run.

use std::fs;
use std::time::Duration;

use quintet_coordinator::launch::RUN_TOKEN_VARIABLE;
use quintet_coordinator::secret::Secret;
use quintet_worker::rank::{self, RankJob};
use quintet_worker::session::Session;

use crate::args::WorkerArguments;
use crate::device::Decision;
use crate::error::{Failure, Result, exit};
use crate::hub;
use crate::job::Job;
use crate::prepare::working_directory;

pub(crate) fn run(arguments: WorkerArguments) -> Result<u8> {
    let token = std::env::var(RUN_TOKEN_VARIABLE).ok().as_deref().and_then(Secret::from_hex);
    let token = token.ok_or_else(|| {
        Failure::bad_input(format!("{RUN_TOKEN_VARIABLE} must hold the token that the coordinator printed"))
    })?;
    let insecure = arguments.insecure_plaintext;
    if !arguments.listen.ip().is_loopback() && !insecure {
        return Err(Failure::bad_input(format!(
            "--listen {}: gradients would cross the network in plain text; accept that with --insecure-plaintext",
            arguments.listen
        )));
    }
    let (session, welcome) = match Session::connect(&arguments.coordinator, token.as_bytes(), &host_name(), insecure) {
        Ok(joined) => joined,
        // Mostly the run was over before this worker came.
        Err(error) if arguments.supervised && !error.is_user_error() => return Ok(exit::FAILURE),
        Err(error) => return Err(quintet_worker::Error::from(error).into()),
    };
    let mut job: Job = serde_json::from_str(&welcome.job_json)
        .map_err(|error| Failure::failed(format!("the coordinator sent a job that is not understood: {error}")))?;
    let fingerprint = job.fingerprint();
    let base_dir = working_directory()?;
    if let Some(name) = &job.model.pretrained {
        // Of another machine's hub: at the commit that the coordinator chose.
        let model = hub::model("model.pretrained", name, &base_dir)?;
        job.model.pretrained = Some(model.directory.display().to_string());
    }
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
        fingerprint,
        silence_limit: Duration::from_secs_f64(job.cluster.step_timeout_seconds),
        model: job.model,
        data: job.data,
        training: job.training,
        evaluation: job.evaluation,
        output_dir: job.output_dir,
        base_dir,
        tokenizer_json: welcome.tokenizer_json,
        collective_token,
        listen: arguments.listen,
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

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "unknown".to_string(), |name| name.trim().to_string())
}
