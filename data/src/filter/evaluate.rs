//! Expressions over a record.

use std::borrow::Cow;
use std::cmp::Ordering;

use serde_json::value::RawValue;

use super::{Comparison, Expression, Function};
use crate::source::{Record, Value};

/// What an expression comes to.
#[derive(Clone, Debug)]
enum Operand<'r> {
    Text(Cow<'r, str>),
    Number(f64),
    Bool(bool),
    Null,
    /// A list or an object, as JSON.
    Nested(Cow<'r, str>),
}

/// Of what an operand is, for messages.
struct Named<'r> {
    value: Operand<'r>,
    /// The field that it is.
    field: Option<&'r str>,
}

impl Expression {
    pub(super) fn is_true(&self, record: &Record) -> Result<bool, String> {
        match self {
            Self::And(parts) => Ok(parts[0].is_true(record)? && parts[1].is_true(record)?),
            Self::Or(parts) => Ok(parts[0].is_true(record)? || parts[1].is_true(record)?),
            Self::Not(part) => Ok(!part.is_true(record)?),
            Self::Compare(comparison, parts) => {
                compare(*comparison, &parts[0].evaluate(record)?, &parts[1].evaluate(record)?)
            }
            Self::In(parts) => is_in(&parts[0].evaluate(record)?, &parts[1], record),
            Self::Call(function, arguments) if *function != Function::Len && *function != Function::Lower => {
                let [text, part] = [arguments[0].evaluate(record)?, arguments[1].evaluate(record)?];
                let (Some(text), Some(part)) = (text.spelled(), part.spelled()) else { return Ok(false) };
                Ok(match function {
                    Function::StartsWith => text.starts_with(&*part),
                    Function::EndsWith => text.ends_with(&*part),
                    _ => text.contains(&*part),
                })
            }
            other => other.evaluate(record)?.truth(),
        }
    }

    fn evaluate<'r>(&'r self, record: &'r Record) -> Result<Named<'r>, String> {
        let plain = |value| Ok(Named { value, field: None });
        match self {
            Self::Field(name) => Ok(Named { value: operand_of(record, name), field: Some(name) }),
            Self::Text(text) => plain(Operand::Text(Cow::Borrowed(text))),
            Self::Number(number) => plain(Operand::Number(*number)),
            Self::Bool(truth) => plain(Operand::Bool(*truth)),
            Self::Null => plain(Operand::Null),
            Self::Call(Function::Len, arguments) => plain(length(&arguments[0].evaluate(record)?)?),
            Self::Call(Function::Lower, arguments) => plain(match arguments[0].evaluate(record)?.spelled() {
                Some(text) => Operand::Text(Cow::Owned(text.to_lowercase())),
                None => Operand::Null,
            }),
            condition => plain(Operand::Bool(condition.is_true(record)?)),
        }
    }
}

fn operand_of<'r>(record: &'r Record, name: &str) -> Operand<'r> {
    let text = |text: Cow<'r, Value>| match text {
        Cow::Borrowed(Value::Text(text)) => Operand::Text(Cow::Borrowed(text)),
        Cow::Borrowed(Value::Nested(json)) => Operand::Nested(Cow::Borrowed(json)),
        other => match other.into_owned() {
            Value::Text(text) => Operand::Text(Cow::Owned(text)),
            Value::Nested(json) => Operand::Nested(Cow::Owned(json)),
            // JSON knows no number that f64 does not approximate; NaN of a Parquet file is one too.
            Value::Number(number) => Operand::Number(number.parse().unwrap_or(f64::NAN)),
            Value::Bool(truth) => Operand::Bool(truth),
            Value::Null => Operand::Null,
        },
    };
    record.lookup(name).map_or(Operand::Null, text)
}

impl Named<'_> {
    fn fault(&self, what: &str) -> String {
        match self.field {
            Some(field) => format!("data.where: the field {field:?} is {}{what}", self.value.describe()),
            None => format!("data.where: {}{what}", self.value.describe()),
        }
    }

    /// As text, if it is anything that has one.
    fn spelled(&self) -> Option<Cow<'_, str>> {
        match &self.value {
            Operand::Text(text) => Some(Cow::Borrowed(text)),
            Operand::Number(number) => Some(Cow::Owned(number.to_string())),
            Operand::Bool(truth) => Some(Cow::Borrowed(if *truth { "true" } else { "false" })),
            Operand::Null | Operand::Nested(_) => None,
        }
    }

    fn truth(&self) -> Result<bool, String> {
        match &self.value {
            Operand::Bool(truth) => Ok(*truth),
            Operand::Null => Ok(false),
            Operand::Text(text) => {
                truth_of(text).ok_or_else(|| self.fault(", which is neither true nor false; compare it"))
            }
            Operand::Number(_) | Operand::Nested(_) => Err(self.fault(", which is neither true nor false; compare it")),
        }
    }
}

impl Operand<'_> {
    fn describe(&self) -> String {
        match self {
            Self::Text(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
            Self::Number(number) => number.to_string(),
            Self::Bool(_) => "true or false".to_owned(),
            Self::Null => "null".to_owned(),
            Self::Nested(_) => "a list or an object".to_owned(),
        }
    }
}

/// Text of a table that says yes or no.
fn truth_of(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "y" | "1" => Some(true),
        "false" | "no" | "n" | "0" => Some(false),
        _ => None,
    }
}

fn length(value: &Named<'_>) -> Result<Operand<'static>, String> {
    Ok(match &value.value {
        Operand::Text(text) => Operand::Number(text.chars().count() as f64),
        Operand::Nested(json) => match serde_json::from_str::<Vec<&RawValue>>(json) {
            Ok(list) => Operand::Number(list.len() as f64),
            Err(_) => return Err(value.fault(" and has no len")),
        },
        Operand::Null => Operand::Null,
        Operand::Number(_) | Operand::Bool(_) => {
            let field = value.field.unwrap_or_default();
            let what = if matches!(value.value, Operand::Number(_)) { "a number" } else { "true or false" };
            return Err(format!("data.where: the field {field:?} is {what} and has no len"));
        }
    })
}

fn compare(comparison: Comparison, left: &Named<'_>, right: &Named<'_>) -> Result<bool, String> {
    match comparison {
        Comparison::Equal => equal(left, right),
        Comparison::NotEqual => Ok(!equal(left, right)?),
        _ => {
            let Some(ordering) = order(left, right)? else { return Ok(false) };
            Ok(match comparison {
                Comparison::Less => ordering.is_lt(),
                Comparison::LessOrEqual => ordering.is_le(),
                Comparison::Greater => ordering.is_gt(),
                _ => ordering.is_ge(),
            })
        }
    }
}

fn equal(left: &Named<'_>, right: &Named<'_>) -> Result<bool, String> {
    Ok(match (&left.value, &right.value) {
        (Operand::Null, Operand::Null) => true,
        (Operand::Null, _) | (_, Operand::Null) => false,
        (Operand::Nested(_), _) => {
            return Err(left.fault(" and has no order or equal; write len, in, or a path into it"));
        }
        (_, Operand::Nested(_)) => {
            return Err(right.fault(" and has no order or equal; write len, in, or a path into it"));
        }
        (Operand::Text(a), Operand::Text(b)) => a == b,
        (Operand::Bool(a), Operand::Bool(b)) => a == b,
        (Operand::Bool(truth), Operand::Text(text)) | (Operand::Text(text), Operand::Bool(truth)) => {
            truth_of(text) == Some(*truth)
        }
        (Operand::Number(a), Operand::Number(b)) => a == b,
        (Operand::Number(number), Operand::Text(text)) | (Operand::Text(text), Operand::Number(number)) => {
            text.trim().parse() == Ok(*number)
        }
        (Operand::Number(_), Operand::Bool(_)) | (Operand::Bool(_), Operand::Number(_)) => false,
    })
}

/// None where there is no order: null, or not a number.
fn order(left: &Named<'_>, right: &Named<'_>) -> Result<Option<Ordering>, String> {
    match (&left.value, &right.value) {
        (Operand::Null, _) | (_, Operand::Null) => Ok(None),
        (Operand::Text(a), Operand::Text(b)) => Ok(Some(a.cmp(b))),
        _ => Ok(number_of(left)?.partial_cmp(&number_of(right)?)),
    }
}

fn number_of(value: &Named<'_>) -> Result<f64, String> {
    match &value.value {
        Operand::Number(number) => Ok(*number),
        Operand::Text(text) => text.trim().parse().map_err(|_| value.fault(", which is no number")),
        _ => Err(value.fault(" and has no order")),
    }
}

fn is_in(value: &Named<'_>, container: &Expression, record: &Record) -> Result<bool, String> {
    if let Expression::List(parts) = container {
        for part in parts {
            if equal(value, &part.evaluate(record)?)? {
                return Ok(true);
            }
        }
        return Ok(false);
    }
    let container = container.evaluate(record)?;
    match &container.value {
        Operand::Null => Ok(false),
        Operand::Nested(json) => {
            let Ok(list) = serde_json::from_str::<Vec<&RawValue>>(json) else {
                return Err(container.fault(", and \"in\" needs a list or a text"));
            };
            let wanted = value.spelled();
            let spelled =
                |raw: &&RawValue| serde_json::from_str::<String>(raw.get()).unwrap_or_else(|_| raw.get().to_owned());
            Ok(list.iter().any(|raw| Some(spelled(raw).as_str()) == wanted.as_deref()))
        }
        Operand::Text(text) => Ok(value.spelled().is_some_and(|part| text.contains(&*part))),
        Operand::Number(_) | Operand::Bool(_) => Err(container.fault(", and \"in\" needs a list or a text")),
    }
}
