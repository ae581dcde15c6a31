//! Records: named fields, and what of their values matters.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::value::RawValue;

/// A field's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text; everything of a table that has no types.
    Text(String),
    /// A number, as it is written in the source.
    Number(String),
    /// True or false.
    Bool(bool),
    /// Nothing.
    Null,
    /// A list or an object, as JSON.
    Nested(String),
}

/// One record: named fields.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    fields: Vec<(String, Value)>,
}

impl Record {
    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }

    /// The value of a field, or of what lies inside one: `answers.text.0` is the first of the list `text` of the object
    /// `answers`, unless a field is called just so.
    pub(crate) fn lookup(&self, path: &str) -> Option<Cow<'_, Value>> {
        if let Some(value) = self.get(path) {
            return Some(Cow::Borrowed(value));
        }
        let (name, inside) = path.split_once('.')?;
        let Value::Nested(json) = self.get(name)? else { return None };
        inside_of(json, inside).map(Cow::Owned)
    }

    /// All fields: a table's in the order of its columns, an object's by name.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.fields.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub(crate) fn set(&mut self, name: &str, value: Value) {
        if let Some((_, old)) = self.fields.iter_mut().find(|(field, _)| field == name) {
            *old = value;
        }
    }

    /// What there is instead of a field that is missing.
    pub(crate) fn lacks(&self, name: &str) -> String {
        let names: Vec<_> = self.fields().map(|(name, _)| name).collect();
        format!("no field {name:?}; the record has: {}", names.join(", "))
    }

    pub(super) fn new(fields: Vec<(String, Value)>) -> Self {
        Self { fields }
    }

    /// Parses a line of a JSON lines file.
    pub(crate) fn from_json(line: &str) -> Result<Self, String> {
        // Raw values, because a number parsed and printed may read differently (1e3, 0.10).
        let object: BTreeMap<String, &RawValue> = serde_json::from_str(line).map_err(|error| json_message(&error))?;
        let fields = object.into_iter().map(|(name, raw)| Ok((name, Value::from_json(raw)?)));
        Ok(Self { fields: fields.collect::<Result<_, String>>()? })
    }

    pub(crate) fn from_texts<N: Into<String>, V: Into<String>>(fields: impl IntoIterator<Item = (N, V)>) -> Self {
        Self { fields: fields.into_iter().map(|(name, text)| (name.into(), Value::Text(text.into()))).collect() }
    }
}

impl Value {
    fn from_json(raw: &RawValue) -> Result<Self, String> {
        let json = raw.get();
        Ok(match json.as_bytes().first() {
            Some(b'"') => Self::Text(serde_json::from_str(json).map_err(|error| json_message(&error))?),
            Some(b'n') => Self::Null,
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            Some(b'[' | b'{') => Self::Nested(json.to_owned()),
            _ => Self::Number(json.to_owned()),
        })
    }

    /// What it renders to: numbers and booleans as they are written.
    ///
    /// # Errors
    /// Null, a list or an object: what it is, in words.
    pub(crate) fn text(&self) -> Result<&str, &'static str> {
        match self {
            Self::Text(text) | Self::Number(text) => Ok(text),
            Self::Bool(true) => Ok("true"),
            Self::Bool(false) => Ok("false"),
            Self::Null => Err("null"),
            Self::Nested(json) if json.starts_with('[') => Err("a list"),
            Self::Nested(_) => Err("an object"),
        }
    }
}

/// What a path such as `text.0` leads to in a list or an object.
fn inside_of(json: &str, path: &str) -> Option<Value> {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let raw: &RawValue = if json.starts_with('[') {
        let list: Vec<&RawValue> = serde_json::from_str(json).ok()?;
        list.get(name.parse::<usize>().ok()?)?
    } else {
        let object: BTreeMap<String, &RawValue> = serde_json::from_str(json).ok()?;
        object.get(name)?
    };
    match rest {
        Some(rest) => inside_of(raw.get(), rest),
        None => Value::from_json(raw).ok(),
    }
}

/// serde_json's message without its line, which is always 1 here.
fn json_message(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    if error.is_data() {
        format!("not a JSON object with text keys: {what}")
    } else {
        format!("broken JSON at column {}: {what}", error.column())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_kind_and_spelling() {
        let record = Record::from_json(r#"{"a": "x", "b": 1e3, "c": true, "d": null, "e": [1, "y"]}"#).unwrap();
        let values: Vec<_> = record.fields().map(|(_, value)| value.clone()).collect();
        let nested = Value::Nested("[1, \"y\"]".to_owned());
        let expected = [Value::Text("x".to_owned()), Value::Number("1e3".to_owned()), Value::Bool(true), Value::Null];
        assert_eq!(values[..4], expected);
        assert_eq!(values[4], nested);
    }

    #[test]
    fn paths_lead_into_lists_and_objects() {
        let record = Record::from_json(r#"{"answers": {"text": ["Rome", "rome"], "n": 0.10}, "a.b": "dot"}"#).unwrap();
        let text = |path| record.lookup(path).map(|value| value.text().map(str::to_owned));
        assert_eq!(text("answers.text.0"), Some(Ok("Rome".to_owned())));
        assert_eq!(text("answers.n"), Some(Ok("0.10".to_owned())));
        assert_eq!(text("a.b"), Some(Ok("dot".to_owned())));
        assert_eq!(text("answers.text"), Some(Err("a list")));
        for absent in ["answers.text.2", "answers.text.x", "answers.x", "a", "answers.text.0.0"] {
            assert_eq!(text(absent), None, "{absent}");
        }
    }
}
