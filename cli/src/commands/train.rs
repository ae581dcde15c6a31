//! `quintet train`: a coordinator in this process, workers in their own.

use quintet_coordinator::launch::LocalWorkers;

use crate::args::TrainArguments;
use crate::commands::coordinator::{RunOptions, serve};
use crate::error::{Failure, Result};
use crate::prepare::prepare;

pub(crate) fn run(arguments: TrainArguments) -> Result<u8> {
    let prepared = prepare(&arguments.job, false)?;
    let workers = prepared.run.settings.workers_expected;
    let address = prepared.job.cluster.listen_address()?;
    let options = RunOptions { address, json: arguments.json, announce: false };
    serve(prepared, options, |address, token| {
        let executable = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("cannot find this program's own file: {error}")))?;
        // Workers on one machine share its cores.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / workers as usize).max(1).to_string();
        let coordinator = format!("http://{address}");
        let worker = ["worker", "--supervised", "--coordinator", &coordinator, "--threads", &threads];
        let arguments: Vec<_> = worker.iter().map(Into::into).collect();
        Ok(Some(LocalWorkers::spawn(&executable, &arguments, token, workers)?))
    })
}
