//! `quintet`: trains T5 models, on one core or a cluster.
//!
//! The only crate that prints, reads the environment and sets exit codes; everything else is in the libraries.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the crate that talks to people")]

mod args;
mod commands;
mod device;
mod elsewhere;
mod error;
mod hub;
mod job;
mod launch_args;
mod prepare;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use quintet_kernels::SearchPath;

use crate::args::{Arguments, Command};
use crate::commands::on_threads;
use crate::error::Failure;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    describe_surroundings();
    let outcome = match arguments.command {
        Command::Train(arguments) => commands::train::run(arguments),
        Command::Coordinator(arguments) => commands::coordinator::run(arguments),
        Command::Launch(arguments) => commands::launch::run(arguments),
        Command::Worker(arguments) => commands::worker::run(arguments),
        Command::Tokens(arguments) => commands::tokens::run(arguments),
        Command::Evaluate(arguments) => on_threads(None, || commands::evaluate::run(*arguments)),
        Command::Generate(arguments) => on_threads(None, || commands::generate::run(arguments)),
        Command::ImportArgs(arguments) => commands::import_args::run(arguments),
        Command::Embed(arguments) => on_threads(None, || commands::embed::run(arguments)),
        Command::Merge(arguments) => on_threads(None, || commands::merge::run(arguments)),
        Command::Data(arguments) => commands::data::run(arguments),
        Command::Bench(arguments) => commands::bench::run(arguments),
        Command::Selftest(arguments) => on_threads(None, || commands::selftest::run(arguments)),
        Command::Doctor(arguments) => commands::doctor::run(arguments),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(Failure { message, exit_code }) => {
            eprintln!("error: {message}");
            ExitCode::from(exit_code)
        }
    }
}

/// Tells the kernels what they need of the environment, before a device is opened.
fn describe_surroundings() {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    SearchPath::from_variables(variable).install();
    if let Some(compiler) = variable("CXX") {
        quintet_kernels::set_compiler(compiler);
    }
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let cache = cache.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
    if let Some(cache) = cache {
        quintet_kernels::set_cache_directory(cache.join("quintet"));
    }
}
