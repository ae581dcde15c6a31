//! Text to expressions, with a check of kinds.

use super::{Comparison, Expression, FilterError, Function};

/// How deep parentheses, functions and `not` may lie in each other: far more than anybody writes, and no strain on the
/// stack.
const DEPTH_MAX: usize = 64;

const FUNCTIONS: [(&str, Function, usize); 5] = [
    ("len", Function::Len, 1),
    ("lower", Function::Lower, 1),
    ("contains", Function::Contains, 2),
    ("startswith", Function::StartsWith, 2),
    ("endswith", Function::EndsWith, 2),
];

const SYMBOLS: [&str; 11] = ["==", "!=", "<=", ">=", "<", ">", "(", ")", "[", "]", ","];

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    /// A name in back-quotes, which is never a word of the language.
    Quoted(String),
    Text(String),
    Number(f64, String),
    Symbol(&'static str),
    End,
}

impl Token {
    fn describe(&self) -> String {
        match self {
            Self::Name(name) | Self::Quoted(name) => format!("{name:?}"),
            Self::Text(text) => format!("{text:?}"),
            Self::Number(_, written) => format!("{written:?}"),
            Self::Symbol(symbol) => format!("{symbol:?}"),
            Self::End => "the end".to_owned(),
        }
    }
}

/// What is known of a value before any record is seen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    /// A field's.
    Any,
    Text,
    Number,
    Bool,
    Null,
}

impl Type {
    fn describe(self) -> &'static str {
        match self {
            Self::Any => "a field",
            Self::Text => "a text",
            Self::Number => "a number",
            Self::Bool => "true or false",
            Self::Null => "null",
        }
    }
}

/// A message and its column.
type Fault = (String, usize);

pub(super) fn parse(text: &str) -> Result<Expression, FilterError> {
    let located = |(message, column)| FilterError { text: text.to_owned(), column, message };
    let tokens = tokenize(text).map_err(located)?;
    let mut parser = Parser { tokens, next: 0, depth: 0 };
    let condition =
        parser.condition().and_then(|condition| parser.expect_end().map(|()| condition)).map_err(located)?;
    let mut fields = std::collections::BTreeSet::new();
    condition.collect_fields(&mut fields);
    match fields.is_empty() {
        true => Err(located(("names no field".to_owned(), 1))),
        false => Ok(condition),
    }
}

fn tokenize(text: &str) -> Result<Vec<(Token, usize)>, Fault> {
    let characters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < characters.len() {
        let (c, column) = (characters[at], at + 1);
        let token = if c.is_whitespace() {
            at += 1;
            continue;
        } else if c == '"' || c == '\'' {
            Token::Text(quoted(&characters, &mut at).ok_or(("a text that no quote ends".to_owned(), column))?)
        } else if c == '`' {
            Token::Quoted(quoted(&characters, &mut at).ok_or(("a name that no back-quote ends".to_owned(), column))?)
        } else if c.is_ascii_digit() || (c == '-' && characters.get(at + 1).is_some_and(char::is_ascii_digit)) {
            let is_part =
                |c: char, before: char| c.is_ascii_alphanumeric() || c == '.' || (before == 'e' && "+-".contains(c));
            let start = at;
            at += 1;
            while at < characters.len() && is_part(characters[at], characters[at - 1].to_ascii_lowercase()) {
                at += 1;
            }
            let written: String = characters[start..at].iter().collect();
            let number = written.parse().map_err(|_| (format!("no number: {written:?}"), column))?;
            Token::Number(number, written)
        } else if c.is_alphabetic() || c == '_' {
            let start = at;
            while at < characters.len() && (characters[at].is_alphanumeric() || "_.".contains(characters[at])) {
                at += 1;
            }
            Token::Name(characters[start..at].iter().collect())
        } else {
            let symbol = SYMBOLS
                .into_iter()
                .find(|symbol| symbol.chars().eq(characters[at..].iter().copied().take(symbol.len())));
            let message = || match c {
                '=' => "expected \"==\", found \"=\"".to_owned(),
                _ => format!("a character that has no meaning here: {:?}", c.to_string()),
            };
            let symbol = symbol.ok_or_else(|| (message(), column))?;
            at += symbol.len();
            Token::Symbol(symbol)
        };
        tokens.push((token, column));
    }
    tokens.push((Token::End, characters.len() + 1));
    Ok(tokens)
}

/// What is between two equal quotes; `\` keeps the special meaning from the character behind it.
fn quoted(characters: &[char], at: &mut usize) -> Option<String> {
    let quote = characters[*at];
    let mut text = String::new();
    *at += 1;
    loop {
        let mut c = *characters.get(*at)?;
        *at += 1;
        if c == quote {
            return Some(text);
        }
        if c == '\\' {
            c = match *characters.get(*at)? {
                'n' => '\n',
                't' => '\t',
                other => other,
            };
            *at += 1;
        }
        text.push(c);
    }
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    next: usize,
    depth: usize,
}

/// An expression with its kind and column.
type Typed = (Expression, Type, usize);

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.next].0
    }

    fn column(&self) -> usize {
        self.tokens[self.next].1
    }

    fn take(&mut self) -> Token {
        let token = self.peek().clone();
        // The end stays where it is.
        self.next = (self.next + 1).min(self.tokens.len() - 1);
        token
    }

    fn take_if(&mut self, wanted: &Token) -> bool {
        let is_it = self.peek() == wanted;
        if is_it {
            self.take();
        }
        is_it
    }

    fn take_word(&mut self, word: &str) -> bool {
        let is_it = matches!(self.peek(), Token::Name(name) if name == word);
        if is_it {
            self.take();
        }
        is_it
    }

    fn expected<T>(&self, what: &str) -> Result<T, Fault> {
        Err((format!("expected {what}, found {}", self.peek().describe()), self.column()))
    }

    fn expect_end(&self) -> Result<(), Fault> {
        match self.peek() {
            Token::End => Ok(()),
            _ => self.expected("a comparison, \"and\", \"or\" or the end"),
        }
    }

    /// Runs a rule one level deeper.
    fn deeper<T>(&mut self, rule: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        if self.depth == DEPTH_MAX {
            return Err(("nested too deeply".to_owned(), self.column()));
        }
        self.depth += 1;
        let result = rule(self);
        self.depth -= 1;
        result
    }

    fn condition(&mut self) -> Result<Expression, Fault> {
        let typed = self.disjunction()?;
        as_condition(typed)
    }

    fn disjunction(&mut self) -> Result<Typed, Fault> {
        let mut left = self.conjunction()?;
        while self.take_word("or") {
            let column = left.2;
            let parts = [as_condition(left)?, as_condition(self.conjunction()?)?];
            left = (Expression::Or(Box::new(parts)), Type::Bool, column);
        }
        Ok(left)
    }

    fn conjunction(&mut self) -> Result<Typed, Fault> {
        let mut left = self.negation()?;
        while self.take_word("and") {
            let column = left.2;
            let parts = [as_condition(left)?, as_condition(self.negation()?)?];
            left = (Expression::And(Box::new(parts)), Type::Bool, column);
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Typed, Fault> {
        let column = self.column();
        if !self.take_word("not") {
            return self.comparison();
        }
        let inner = self.deeper(Self::negation)?;
        Ok((Expression::Not(Box::new(as_condition(inner)?)), Type::Bool, column))
    }

    fn comparison(&mut self) -> Result<Typed, Fault> {
        let left = self.operand()?;
        let (column, place) = (left.2, self.column());
        let negated = matches!(self.peek(), Token::Name(name) if name == "not")
            && matches!(self.tokens.get(self.next + 1), Some((Token::Name(name), _)) if name == "in");
        if negated {
            self.take();
        }
        if self.take_word("in") {
            let right = self.container()?;
            let within = Expression::In(Box::new([left.0, right]));
            let condition = if negated { Expression::Not(Box::new(within)) } else { within };
            return Ok((condition, Type::Bool, column));
        }
        let comparison = match self.peek() {
            Token::Symbol("==") => Comparison::Equal,
            Token::Symbol("!=") => Comparison::NotEqual,
            Token::Symbol("<") => Comparison::Less,
            Token::Symbol("<=") => Comparison::LessOrEqual,
            Token::Symbol(">") => Comparison::Greater,
            Token::Symbol(">=") => Comparison::GreaterOrEqual,
            _ => return Ok(left),
        };
        self.take();
        let right = self.operand()?;
        check_comparison(comparison, left.1, right.1, place)?;
        Ok((Expression::Compare(comparison, Box::new([left.0, right.0])), Type::Bool, column))
    }

    /// What stands behind `in`.
    fn container(&mut self) -> Result<Expression, Fault> {
        if !self.take_if(&Token::Symbol("[")) {
            let (expression, kind, column) = self.operand()?;
            if !matches!(kind, Type::Any | Type::Text) {
                let message = format!("\"in\" needs a list or a text behind it, and this is {}", kind.describe());
                return Err((message, column));
            }
            return Ok(expression);
        }
        let mut parts = vec![self.operand()?.0];
        while self.take_if(&Token::Symbol(",")) {
            parts.push(self.operand()?.0);
        }
        match self.take_if(&Token::Symbol("]")) {
            true => Ok(Expression::List(parts)),
            false => self.expected("\",\" or \"]\""),
        }
    }

    fn operand(&mut self) -> Result<Typed, Fault> {
        let column = self.column();
        let (expression, kind) = match self.peek().clone() {
            Token::Symbol("(") => {
                self.take();
                let (expression, kind, _) = self.deeper(Self::disjunction)?;
                if !self.take_if(&Token::Symbol(")")) {
                    return self.expected("\")\"");
                }
                return Ok((expression, kind, column));
            }
            Token::Text(text) => (Expression::Text(text), Type::Text),
            Token::Number(number, _) => (Expression::Number(number), Type::Number),
            Token::Quoted(name) => (Expression::Field(name), Type::Any),
            Token::Name(name) => match name.as_str() {
                "true" => (Expression::Bool(true), Type::Bool),
                "false" => (Expression::Bool(false), Type::Bool),
                "null" => (Expression::Null, Type::Null),
                "and" | "or" | "not" | "in" => return self.expected("a field or a value"),
                _ if self.tokens[self.next + 1].0 == Token::Symbol("(") => return self.call(&name),
                _ => (Expression::Field(name), Type::Any),
            },
            Token::Symbol(_) | Token::End => return self.expected("a field or a value"),
        };
        self.take();
        Ok((expression, kind, column))
    }

    fn call(&mut self, name: &str) -> Result<Typed, Fault> {
        let column = self.column();
        let Some((_, function, arity)) = FUNCTIONS.into_iter().find(|&(known, ..)| known == name) else {
            let known = FUNCTIONS.map(|(known, ..)| known).join(", ");
            return Err((format!("no function {name:?}; there are {known}"), column));
        };
        self.take();
        self.take();
        let mut arguments = vec![self.deeper(Self::operand)?.0];
        while self.take_if(&Token::Symbol(",")) {
            arguments.push(self.deeper(Self::operand)?.0);
        }
        if !self.take_if(&Token::Symbol(")")) {
            return self.expected("\",\" or \")\"");
        }
        if arguments.len() != arity {
            let plural = if arity == 1 { "" } else { "s" };
            return Err((format!("{name} takes {arity} argument{plural}, not {}", arguments.len()), column));
        }
        let kind = match function {
            Function::Len => Type::Number,
            Function::Lower => Type::Text,
            Function::Contains | Function::StartsWith | Function::EndsWith => Type::Bool,
        };
        Ok((Expression::Call(function, arguments), kind, column))
    }
}

fn as_condition((expression, kind, column): Typed) -> Result<Expression, Fault> {
    match kind {
        Type::Any | Type::Bool => Ok(expression),
        _ => Err((format!("a condition is needed here, and this is {}; compare it", kind.describe()), column)),
    }
}

fn check_comparison(comparison: Comparison, left: Type, right: Type, column: usize) -> Result<(), Fault> {
    let is_equality = matches!(comparison, Comparison::Equal | Comparison::NotEqual);
    if !is_equality && (left == Type::Null || right == Type::Null) {
        return Err(("null has no order; write == null or != null".to_owned(), column));
    }
    let comparable = left == right || [left, right].iter().any(|kind| matches!(kind, Type::Any | Type::Null));
    if !comparable {
        let message = format!("{} and {} cannot be compared", left.describe(), right.describe());
        return Err((message, column));
    }
    Ok(())
}
