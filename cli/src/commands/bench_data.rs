//! `quintet bench data`: how fast examples become tokens, and how long training waits for them.

use std::time::{Duration, Instant};

use quintet_data::{Loader, Schedule};
use serde_json::json;

use crate::args::BenchDataArguments;
use crate::commands::data::JobData;
use crate::commands::print_json;
use crate::error::{Failure, Result, exit};

/// Before the clock starts: threads, pages and caches are there by then.
const WARM_UP: Duration = Duration::from_millis(300);

pub(crate) fn run(arguments: &BenchDataArguments) -> Result<u8> {
    if arguments.threads == 0 || arguments.tokens_per_second == 0 {
        return Err(Failure::bad_input("--threads and --tokens-per-second must be at least 1"));
    }
    if !(0.1..=600.0).contains(&arguments.seconds) {
        return Err(Failure::bad_input("--seconds must be between 0.1 and 600"));
    }
    let data = JobData::load(&arguments.job)?.tokenized()?;
    let schedule = data.job.training.steps(data.splits.order().positions())?;
    for consumption in [None, Some(arguments.tokens_per_second as f64)] {
        let mut consumer = Consumer::new(Loader::new(data.packer(), arguments.threads), schedule.clone());
        consumer.consume(WARM_UP, consumption)?;
        let used = consumer.consume(Duration::from_secs_f64(arguments.seconds), consumption)?;
        let row = json!({
            "threads": arguments.threads,
            "consumption_tokens_per_second": consumption,
            "tokens_per_second": used.tokens as f64 / used.seconds,
            "stall_fraction": used.stalled / used.seconds,
            "examples": used.examples,
            "tokens": used.tokens,
        });
        match (arguments.json, consumption) {
            (true, _) => print_json(&row),
            (false, None) => println!("{} thread(s): {} tokens/s", arguments.threads, row["tokens_per_second"]),
            (false, Some(rate)) => println!("at {rate} tokens/s, waiting takes {} of the time", row["stall_fraction"]),
        }
    }
    Ok(exit::DONE)
}

/// What was consumed.
#[derive(Default)]
struct Used {
    tokens: u64,
    examples: u64,
    seconds: f64,
    /// Seconds of waiting for a batch.
    stalled: f64,
}

/// Takes micro-batches as a lone worker does: this step's and the next step's are under way.
struct Consumer {
    loader: Loader,
    schedule: Schedule,
    requested_steps: u64,
    /// Micro-batches that were requested and not taken.
    pending: u32,
}

impl Consumer {
    fn new(loader: Loader, schedule: Schedule) -> Self {
        // For as long as it takes, whatever the job's length.
        Self { loader, schedule: Schedule { total_steps: u64::MAX, ..schedule }, requested_steps: 0, pending: 0 }
    }

    fn request_step(&mut self) {
        self.requested_steps += 1;
        let plan = self.schedule.step(self.requested_steps);
        (0..plan.micro_batches).for_each(|index| self.loader.request(plan.epoch, plan.micro_batch(index)));
        self.pending += plan.micro_batches;
    }

    /// Takes batches for so long: as fast as they come, or each as long as its tokens take at this rate.
    fn consume(&mut self, duration: Duration, rate: Option<f64>) -> Result<Used> {
        let mut used = Used::default();
        let begun = Instant::now();
        while begun.elapsed() < duration {
            // A step is over when the next one's first micro-batch is due; then the one behind it is requested.
            while self.pending <= self.schedule.step(self.requested_steps.max(1)).micro_batches {
                self.request_step();
            }
            let asked = Instant::now();
            let batch = self.loader.next()?;
            let given = Instant::now();
            self.pending -= 1;
            let tokens = (batch.source_ids.len() + batch.target_ids.len()) as u64;
            used.tokens += tokens;
            used.examples += batch.positions.end - batch.positions.start;
            used.stalled += (given - asked).as_secs_f64();
            if let Some(rate) = rate {
                // Computing keeps a core busy; sleeping would leave it to the tokenizer.
                while given.elapsed().as_secs_f64() < tokens as f64 / rate {
                    std::hint::spin_loop();
                }
            }
        }
        used.seconds = begun.elapsed().as_secs_f64();
        Ok(used)
    }
}
