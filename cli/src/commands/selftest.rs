//! `quintet selftest`: does this machine compute T5 right?

mod training;

use serde_json::json;

use crate::args::SelftestArguments;
use crate::commands::print_json;
use crate::device;
use crate::error::{Result, exit};

pub(crate) fn run(arguments: SelftestArguments) -> Result<u8> {
    let device = device::open(arguments.device)?;
    let mut rows = quintet_kernels::selftest::run(&device)?;
    rows.extend(training::run(&device)?);
    let passed = rows.iter().all(|row| row.passed);
    if arguments.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "op": row.op,
                    "dtype": row.dtype,
                    "max_error": row.max_error,
                    "tolerance": row.tolerance,
                    "passed": row.passed,
                })
            })
            .collect();
        print_json(&json!(rows));
    } else {
        for row in &rows {
            let verdict = if row.passed { "ok" } else { "FAILED" };
            println!(
                "{:<44} {:<5} error {:.2e}  tolerance {:.2e}  {verdict}",
                row.op, row.dtype, row.max_error, row.tolerance
            );
        }
    }
    Ok(if passed { exit::DONE } else { exit::FAILURE })
}
