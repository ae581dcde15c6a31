//! `quintet bench`: a training step, generation, sums over workers, how both grow with their number, and loading of data.

mod allreduce;
mod chart;
mod cost;
mod generate;
mod model;
mod ranks;
mod scaling;
mod step;

use crate::args::{BenchArguments, BenchCommand};
use crate::commands::{bench_data, on_threads, print_json};
use crate::error::{Failure, Result, exit};

pub(crate) fn run(arguments: BenchArguments) -> Result<u8> {
    match arguments.command {
        BenchCommand::Step(arguments) => on_threads(arguments.threads, || step::run(&arguments).map(|()| exit::DONE)),
        BenchCommand::Allreduce(arguments) => allreduce::run(&arguments).map(|()| exit::DONE),
        BenchCommand::Scaling(arguments) => scaling::run(&arguments).map(|()| exit::DONE),
        BenchCommand::Generate(arguments) => {
            on_threads(arguments.threads, || generate::run(&arguments).map(|()| exit::DONE))
        }
        BenchCommand::Data(arguments) => bench_data::run(&arguments),
        BenchCommand::Rank => ranks::serve().map(|()| exit::DONE),
    }
}

/// As a document, or a line a figure.
fn print_result(result: &serde_json::Value, as_json: bool) {
    if as_json {
        return print_json(result);
    }
    for (name, value) in result.as_object().into_iter().flatten() {
        println!("{name}: {value}");
    }
}

fn require_positive(flags: &[(&str, usize)]) -> Result<()> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(Failure::bad_input(format!("{flag} must be at least 1"))),
        None => Ok(()),
    }
}

/// The middle one; the upper of two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
