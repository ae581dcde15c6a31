//! `quintet data`: look at a source, or write it as JSON lines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use quintet_data::{Record, Source, Value as Field, resolve_sources};
use serde_json::{Map, Value, json};

use crate::args::{DataArguments, DataCommand};
use crate::commands::print_json;
use crate::error::{Failure, Result, exit};
use crate::prepare::working_directory;

pub(crate) fn run(arguments: DataArguments) -> Result<u8> {
    match arguments.command {
        DataCommand::Inspect { source, records } => inspect(&source, records)?,
        DataCommand::Export { source, output } => export(&source, &output)?,
    }
    Ok(exit::DONE)
}

fn open(source: &str) -> Result<Vec<Source>> {
    Ok(resolve_sources(&[source.to_string()], &working_directory()?)?)
}

fn inspect(source: &str, shown: usize) -> Result<()> {
    let mut count = 0;
    for source in open(source)? {
        source.for_each(|_, record| {
            if count < shown {
                print_json(&to_json(&record));
            }
            count += 1;
            Ok(())
        })?;
    }
    eprintln!("{count} records");
    Ok(())
}

fn export(source: &str, output: &Path) -> Result<()> {
    let failure = |error: std::io::Error| Failure::failed(format!("{}: cannot write: {error}", output.display()));
    let sources = open(source)?;
    let mut file = BufWriter::new(File::create(output).map_err(failure)?);
    for source in sources {
        source.for_each(|_, record| writeln!(file, "{}", to_json(&record)).map_err(|error| error.to_string()))?;
    }
    file.flush().map_err(failure)
}

fn to_json(record: &Record) -> Value {
    let fields = record.fields().map(|(name, field)| (name.to_string(), field_to_json(field)));
    Value::Object(fields.collect::<Map<String, Value>>())
}

fn field_to_json(field: &Field) -> Value {
    match field {
        Field::Text(text) => text.as_str().into(),
        Field::Null => Value::Null,
        Field::Nested(what) => json!(format!("({what})")),
    }
}
