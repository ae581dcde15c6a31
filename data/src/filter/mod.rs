//! Conditions on a record's fields: `verified_purchase and len(review_body) > 100`.
//!
//! ```text
//! condition  = and-chain { "or" and-chain }          and-chain = negation { "and" negation }
//! negation   = "not" negation | comparison
//! comparison = operand [ ("==" | "!=" | "<" | "<=" | ">" | ">=") operand | ["not"] "in" (operand | list) ]
//! operand    = text | number | "true" | "false" | "null" | field | function "(" operand { "," operand } ")"
//!            | "(" condition ")"
//! list       = "[" operand { "," operand } "]"
//! ```
//! A field is a name, in back-quotes if it has other characters than letters, digits, `_` and `.`; text is in single or
//! double quotes. Functions: `len` (characters of a text, elements of a list), `lower`, `contains`, `startswith`,
//! `endswith`.
//!
//! Tables know no types. So text is a number where it is compared with one, and true or false where that is asked for. A
//! field that is null, or that a record lacks, equals null alone and is neither less nor more than anything.

mod evaluate;
mod parse;

use std::collections::BTreeSet;

use crate::source::Record;

/// A condition that records fulfil or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    condition: Expression,
    text: String,
}

/// Why a condition does not parse.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message} at character {column} of {text:?}")]
pub struct FilterError {
    text: String,
    /// From 1.
    column: usize,
    message: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Expression {
    Field(String),
    Text(String),
    Number(f64),
    Bool(bool),
    Null,
    List(Vec<Expression>),
    Call(Function, Vec<Expression>),
    Compare(Comparison, Box<[Expression; 2]>),
    In(Box<[Expression; 2]>),
    Not(Box<Expression>),
    And(Box<[Expression; 2]>),
    Or(Box<[Expression; 2]>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Len,
    Lower,
    Contains,
    StartsWith,
    EndsWith,
}

impl Filter {
    /// Parses a condition.
    ///
    /// # Errors
    /// What is no condition, or compares what cannot be compared, and where; a condition that reads no field.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        parse::parse(text).map(|condition| Self { condition, text: text.to_owned() })
    }

    /// The fields it reads.
    pub fn fields(&self) -> BTreeSet<String> {
        let mut fields = BTreeSet::new();
        self.condition.collect_fields(&mut fields);
        fields
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a record fulfils it.
    ///
    /// # Errors
    /// Text that is not the number or truth value that the condition needs: which field, and what it holds.
    pub fn keeps(&self, record: &Record) -> Result<bool, String> {
        self.condition.is_true(record)
    }
}

impl Expression {
    fn collect_fields(&self, fields: &mut BTreeSet<String>) {
        match self {
            Self::Field(name) => {
                fields.insert(name.clone());
            }
            Self::Text(_) | Self::Number(_) | Self::Bool(_) | Self::Null => {}
            Self::List(parts) | Self::Call(_, parts) => parts.iter().for_each(|part| part.collect_fields(fields)),
            Self::Compare(_, parts) | Self::In(parts) | Self::And(parts) | Self::Or(parts) => {
                parts.iter().for_each(|part| part.collect_fields(fields));
            }
            Self::Not(part) => part.collect_fields(fields),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(filter: &str, json: &str) -> Result<bool, String> {
        Filter::parse(filter).unwrap().keeps(&Record::from_json(json).unwrap())
    }

    const REVIEW: &str = r#"{"title": "It's é", "stars": 4, "price": "12.50", "verified": true, "flag": "N", "none": null,
        "tags": ["a", "b"], "odd name": "x", "answers": {"text": ["Rome"]}}"#;

    #[test]
    fn conditions_are_true_of_the_right_records() {
        for (filter, expected) in [
            ("stars > 3", true),
            ("stars >= 4 and stars <= 4 and not stars != 4", true),
            ("stars == 4.0", true),
            ("stars < -3", false),
            ("price > 12", true),
            ("12.5 == price", true),
            ("price == \"12.50\"", true),
            ("price == \"12.5\"", false),
            ("title == \"It's é\"", true),
            ("title == 'It\\'s é'", true),
            ("title == 3", false),
            ("title > \"H\"", true),
            ("verified", true),
            ("verified == true and verified != false", true),
            ("not flag", true),
            ("flag == false", true),
            ("len(title) == 6", true),
            ("len(tags) == 2", true),
            ("len(none) > 0", false),
            ("none == null and title != null", true),
            ("none == 3 or none < 3 or none >= 3", false),
            ("none != 3", true),
            ("none", false),
            ("absent == null", true),
            ("stars in [1, 4]", true),
            ("stars not in [1, 4]", false),
            ("title in ['a', \"It's é\"]", true),
            ("\"s é\" in title", true),
            ("'b' in tags and not 'c' in tags", true),
            ("contains(lower(title), \"it's\")", true),
            ("startswith(title, 'It') and endswith(title, 'é')", true),
            ("startswith(none, 'It')", false),
            ("`odd name` == 'x'", true),
            ("answers.text.0 == 'Rome'", true),
            // `and` binds tighter than `or`, and `not` tighter than both.
            ("stars == 4 or stars == 5 and stars == 9", true),
            ("(stars == 4 or stars == 5) and stars == 9", false),
            ("not stars == 5 and stars == 4", true),
            // What is not needed is not looked at.
            ("stars == 4 or title > 3", true),
            ("stars == 5 and title > 3", false),
        ] {
            assert_eq!(keeps(filter, REVIEW), Ok(expected), "{filter}");
        }
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named() {
        for (filter, message) in [
            ("title > 3", "data.where: the field \"title\" is \"It's é\", which is no number"),
            ("title", "data.where: the field \"title\" is \"It's é\", which is neither true nor false"),
            ("stars", "data.where: the field \"stars\" is 4, which is neither true nor false; compare it"),
            ("len(stars) > 1", "data.where: the field \"stars\" is a number and has no len"),
            ("tags > 3", "data.where: the field \"tags\" is a list or an object and has no order"),
            ("tags == 3", "data.where: the field \"tags\" is a list or an object and has no order"),
            ("stars > title", "data.where: the field \"title\" is \"It's é\", which is no number"),
            ("verified > 3", "data.where: the field \"verified\" is true or false and has no order"),
        ] {
            let error = keeps(filter, REVIEW).unwrap_err();
            assert!(error.starts_with(message), "{filter}: {error}");
        }
    }

    #[test]
    fn bad_conditions_point_at_the_place() {
        for (filter, message, column) in [
            ("", "expected a field or a value, found the end", 1),
            ("stars >", "expected a field or a value, found the end", 8),
            ("stars > > 3", "expected a field or a value, found \">\"", 9),
            ("stars = 3", "expected \"==\", found \"=\"", 7),
            ("stars 3", "expected a comparison, \"and\", \"or\" or the end, found \"3\"", 7),
            ("(stars > 3", "expected \")\", found the end", 11),
            ("stars in [1, 2", "expected \",\" or \"]\", found the end", 15),
            ("title == \"x", "a text that no quote ends", 10),
            ("`title", "a name that no back-quote ends", 1),
            ("stars > 3 & x", "a character that has no meaning here: \"&\"", 11),
            ("stars > 1.2.3", "no number: \"1.2.3\"", 9),
            ("size(title) > 3", "no function \"size\"; there are len, lower, contains, startswith, endswith", 1),
            ("len(title, 3) > 3", "len takes 1 argument, not 2", 1),
            ("contains(title) ", "contains takes 2 arguments, not 1", 1),
            ("len(title)", "a condition is needed here, and this is a number; compare it", 1),
            ("stars > 3 and 'x'", "a condition is needed here, and this is a text; compare it", 15),
            ("len(title) > 'x'", "a number and a text cannot be compared", 12),
            ("(stars > 3) == 'x'", "true or false and a text cannot be compared", 13),
            ("stars > null", "null has no order; write == null or != null", 7),
            ("1 < 2", "names no field", 1),
            ("é and 3", "a condition is needed here, and this is a number; compare it", 7),
            ("stars in 3", "\"in\" needs a list or a text behind it, and this is a number", 10),
        ] {
            let error = Filter::parse(filter).unwrap_err();
            assert_eq!(error.to_string(), format!("{message} at character {column} of {filter:?}"), "{filter}");
        }
        let deep = format!("{}x{}", "(".repeat(500), ")".repeat(500));
        let error = Filter::parse(&deep).unwrap_err().to_string();
        assert!(error.starts_with("nested too deeply at character 66 "), "{error}");
    }

    #[test]
    fn lists_its_fields() {
        let filter = Filter::parse("a and len(b) > 1 or c in [d, `e f`]").unwrap();
        assert_eq!(filter.fields().into_iter().collect::<Vec<_>>(), ["a", "b", "c", "d", "e f"]);
    }
}
