//! Parquet files, row by row.

mod pages;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use self::pages::CheckedPages;
use super::{Record, Source, Value, Wanted};
use crate::error::{Error, Result};

impl Source {
    pub(super) fn read_parquet(
        &self,
        path: &Path,
        wanted: Wanted<'_>,
        visit: &mut dyn FnMut(u64, Record) -> Result<bool>,
    ) -> Result<bool> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let broken = |error: ParquetError| {
            Error::source(self.to_string(), format!("no intact Parquet file: {}", message(&error)))
        };
        let reader = caught(|| SerializedFileReader::new(CheckedPages::new(file)?)).map_err(broken)?;
        let schema = reader.metadata().file_metadata().schema().clone();
        let mut rows = caught(|| reader.get_row_iter(projection(&schema, wanted))).map_err(broken)?;
        for line in 1.. {
            let row = caught(|| rows.next().transpose()).map_err(|error| {
                let message = format!("broken Parquet page ({}); the file is torn or damaged", message(&error));
                self.record_error(line, message)
            })?;
            let Some(row) = row else { break };
            let record = to_record(row).map_err(|message| self.record_error(line, message))?;
            if !visit(line, record)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The library checks a page's checksum, but takes for granted that its header is whole, and panics where it is not.
fn caught<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    // After a panic nothing of the reader is used again.
    let outcome = catch_unwind(AssertUnwindSafe(read));
    outcome.unwrap_or_else(|_| Err(ParquetError::General("a header is malformed".to_owned())))
}

/// The columns that are wanted, if the file has all of them; otherwise all, so that whoever misses one is told which
/// there are.
fn projection(schema: &Type, wanted: Wanted<'_>) -> Option<Type> {
    let has = |name: &str| schema.get_fields().iter().any(|field| field.name() == name);
    let wanted: Vec<&str> =
        wanted?.iter().map(|path| if has(path) { path } else { path.split('.').next().unwrap_or(path) }).collect();
    if wanted.is_empty() || !wanted.iter().all(|name| has(name)) {
        return None;
    }
    let fields = schema.get_fields().iter().filter(|field| wanted.contains(&field.name())).cloned().collect();
    Type::group_type_builder(schema.name()).with_fields(fields).build().ok()
}

/// The library's message in one line, without the name of its error's variant.
fn message(error: &ParquetError) -> String {
    let text = error.to_string().replace('\n', " ");
    text.strip_prefix("Parquet error: ").unwrap_or(&text).to_owned()
}

fn to_record(row: Row) -> Result<Record, String> {
    let fields = row.into_columns().into_iter().map(|(name, field)| {
        let value = to_value(field).ok_or_else(|| format!("the field {name:?} holds bytes that are no text"))?;
        Ok((name, value))
    });
    Ok(Record::new(fields.collect::<Result<_, String>>()?))
}

/// None: bytes that are no text.
fn to_value(field: Field) -> Option<Value> {
    Some(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(value),
        Field::Str(text) => Value::Text(text),
        Field::Bytes(bytes) => Value::Text(std::str::from_utf8(bytes.data()).ok()?.to_owned()),
        // As Python writes them: 4.0, not 4.
        Field::Float(value) => Value::Number(format!("{value:?}")),
        Field::Double(value) => Value::Number(format!("{value:?}")),
        Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_)
        | Field::Float16(_)
        | Field::Decimal(_) => Value::Number(field.to_string()),
        Field::Group(_) | Field::ListInternal(_) | Field::MapInternal(_) => Value::Nested(to_json(field)?.to_string()),
        // Dates and times.
        _ => Value::Text(field.to_string()),
    })
}

fn to_json(field: Field) -> Option<serde_json::Value> {
    use serde_json::Value as Json;
    Some(match field {
        Field::Group(row) => {
            let entries = row.into_columns().into_iter().map(|(name, field)| Some((name, to_json(field)?)));
            Json::Object(entries.collect::<Option<_>>()?)
        }
        Field::ListInternal(list) => Json::Array(list.elements().iter().cloned().map(to_json).collect::<Option<_>>()?),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().cloned();
            let entries = entries.map(|(key, value)| Some((to_value(key)?.text().ok()?.to_owned(), to_json(value)?)));
            Json::Object(entries.collect::<Option<_>>()?)
        }
        leaf => match to_value(leaf)? {
            Value::Bool(value) => value.into(),
            Value::Text(text) => text.into(),
            // Not a number is none in JSON.
            Value::Number(number) => serde_json::from_str(&number).unwrap_or(Json::Null),
            Value::Null | Value::Nested(_) => Json::Null,
        },
    })
}
