//! Templates over a record's fields: `review: {title}, {stars} Stars!`.

use std::borrow::Cow;

use crate::source::Record;

/// Text with holes named after a record's fields. `{name}` is a hole, `{{` and `}}` are literal braces.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Field(String),
}

/// Why a template does not parse.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message} at character {column} of the template {template:?}")]
pub struct TemplateError {
    template: String,
    /// From 1.
    column: usize,
    message: &'static str,
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// An unmatched brace, an empty hole, or a template without any hole (every example would be the same).
    pub fn parse(template: &str) -> Result<Self, TemplateError> {
        let error = |column: usize, message| TemplateError { template: template.to_owned(), column, message };
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut characters = template.chars().enumerate().map(|(index, c)| (index + 1, c)).peekable();
        while let Some((column, c)) = characters.next() {
            let doubled = characters.next_if(|&(_, next)| next == c && matches!(c, '{' | '}')).is_some();
            match c {
                '{' if !doubled => {
                    let mut name = String::new();
                    loop {
                        match characters.next() {
                            Some((_, '}')) => break,
                            Some((_, '{')) | None => return Err(error(column, "a { that no } closes ({{ writes a {)")),
                            Some((_, c)) => name.push(c),
                        }
                    }
                    if name.trim().is_empty() {
                        return Err(error(column, "a hole {} without a field's name"));
                    }
                    if !text.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut text)));
                    }
                    pieces.push(Piece::Field(name));
                }
                '}' if !doubled => return Err(error(column, "a } that closes no { (}} writes a })")),
                _ => text.push(c),
            }
        }
        if !text.is_empty() {
            pieces.push(Piece::Text(text));
        }
        let parsed = Self { pieces };
        if parsed.fields().next().is_none() {
            return Err(error(1, "no field such as {text}"));
        }
        Ok(parsed)
    }

    /// The names of the fields it reads, in order of appearance.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Field(name) => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// Appends the rendered text to `output`. Numbers and booleans appear as they are written in the source.
    ///
    /// # Errors
    /// A field that the record lacks or that is no text, as a message that names it and the fields there are.
    pub fn render(&self, record: &Record, output: &mut String) -> Result<(), String> {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => output.push_str(text),
                Piece::Field(name) => output.push_str(&text_of(record, name)?),
            }
        }
        Ok(())
    }
}

/// The text of the field `name`, or a message that says why it has none.
pub(crate) fn text_of<'r>(record: &'r Record, name: &str) -> Result<Cow<'r, str>, String> {
    let what = match record.lookup(name) {
        Some(Cow::Borrowed(value)) => value.text().map(Cow::Borrowed),
        Some(Cow::Owned(value)) => value.text().map(|text| Cow::Owned(text.to_owned())),
        None => return Err(record.lacks(name)),
    };
    what.map_err(|what| match what {
        "null" => format!("the field {name:?} is null; fill it in, or leave it out with data.where"),
        kind => format!("the field {name:?} is {kind}; only text, numbers and booleans render, such as {{{name}.0}}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: &str) -> Record {
        Record::from_json(json).unwrap()
    }

    fn render(template: &str, json: &str) -> Result<String, String> {
        let mut output = String::new();
        Template::parse(template).unwrap().render(&record(json), &mut output).map(|()| output)
    }

    #[test]
    fn renders_fields_and_escapes() {
        let json = r#"{"title": "Pens", "stars": 5, "price": 4.0, "big": 1e3, "new": true, "odd name": "x{y}", "answers": {"text": ["Rome", 1.0]}}"#;
        assert_eq!(render("review: {title}, {stars} Stars!", json).unwrap(), "review: Pens, 5 Stars!");
        assert_eq!(render("{price} {big} {new}", json).unwrap(), "4.0 1e3 true");
        assert_eq!(render("{{{title}}} {{}}", json).unwrap(), "{Pens} {}");
        assert_eq!(render("{answers.text.0} {answers.text.1}", json).unwrap(), "Rome 1.0");
        assert_eq!(render("{odd name}", json).unwrap(), "x{y}");
        assert_eq!(render("é{title}é", json).unwrap(), "éPensé");
    }

    #[test]
    fn says_what_a_record_lacks() {
        let json = r#"{"a": null, "b": [1], "c": {}, "d": ""}"#;
        assert_eq!(render("{x}", json).unwrap_err(), "no field \"x\"; the record has: a, b, c, d");
        assert_eq!(
            render("{a}", json).unwrap_err(),
            "the field \"a\" is null; fill it in, or leave it out with data.where"
        );
        assert_eq!(
            render("{b}", json).unwrap_err(),
            "the field \"b\" is a list; only text, numbers and booleans render, such as {b.0}"
        );
        assert_eq!(
            render("{c}", json).unwrap_err(),
            "the field \"c\" is an object; only text, numbers and booleans render, such as {c.0}"
        );
        assert_eq!(render("{d}", json).unwrap(), "");
    }

    #[test]
    fn bad_templates_say_where() {
        for (template, start) in [
            ("ab {c", "a { that no } closes ({{ writes a {) at character 4"),
            ("{a{b}", "a { that no } closes ({{ writes a {) at character 1"),
            ("a}b", "a } that closes no { (}} writes a }) at character 2"),
            ("{a} {}", "a hole {} without a field's name at character 5"),
            ("plain", "no field such as {text} at character 1"),
            ("", "no field such as {text} at character 1"),
        ] {
            let error = Template::parse(template).unwrap_err().to_string();
            assert_eq!(error, format!("{start} of the template {template:?}"));
        }
    }

    #[test]
    fn lists_its_fields() {
        let template = Template::parse("{a} and {b}{a}").unwrap();
        assert_eq!(template.fields().collect::<Vec<_>>(), ["a", "b", "a"]);
    }
}
