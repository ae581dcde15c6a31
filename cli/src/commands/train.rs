//! `quintet train`: a coordinator in this process, workers in their own.

use std::ffi::OsString;

use quintet_coordinator::launch::LocalWorkers;

use crate::args::TrainArguments;
use crate::commands::coordinator::{RunOptions, Workers, serve_to_end};
use crate::device::Decision;
use crate::error::{Failure, Result};
use crate::job::Job;
use crate::prepare::{Door, Serving, prepare};

pub(crate) fn run(arguments: TrainArguments) -> Result<u8> {
    let mut job = Job::load(&arguments.job)?;
    let device = Decision::new(job.cluster.device, 0)?;
    job.settle(&device);
    let address = job.cluster.listen_address()?;
    job.training.check_device(device.choice)?;
    let door = Door { address, insecure_plaintext: false, authority: None };
    let workers = job.cluster.workers();
    let prepare = |resume| {
        let resume = resume || arguments.job.resume;
        let prepared = prepare(job.clone(), Serving { resume, launches: true, ..Serving::default() }, &door)?;
        let device = Some(device.line());
        Ok((prepared, RunOptions { address, json: arguments.json, announce: false, by_hand: false, device }))
    };
    serve_to_end(prepare, |address, admission| {
        let executable = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("cannot find this program's own file: {error}")))?;
        // Workers on one machine share its cores.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / workers as usize).max(1).to_string();
        let coordinator = format!("{}://{address}", admission.scheme());
        let worker = |index: u32| -> Vec<OsString> {
            // Where there are more workers than GPUs, they share.
            let gpu = (index as usize % device.gpus.max(1)).to_string();
            let flags = ["worker", "--supervised", "--coordinator", &coordinator, "--threads", &threads, "--gpu", &gpu];
            flags.map(OsString::from).to_vec()
        };
        // All workers are on this machine, so that nothing outside needs to reach NCCL, which would listen there.
        let interface = ("NCCL_SOCKET_IFNAME", "lo");
        let variables: Vec<_> = [interface].into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
        let arguments: Vec<_> = (0..workers).map(worker).collect();
        let admission = admission.clone();
        let ticket = Box::new(move || admission.ticket());
        Ok(Workers::Local(LocalWorkers::spawn(&executable, &arguments, &variables, ticket)?))
    })
}
