//! Command lines, to run and to show.

use std::fmt;
use std::process::Stdio;

use crate::{Error, Result};

/// A program and its arguments. Shown as a POSIX shell would read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// The program, looked for as the system does.
    pub program: String,
    /// Its arguments, without itself.
    pub arguments: Vec<String>,
}

impl CommandLine {
    /// From words, the first of which is the program.
    pub fn new<I: IntoIterator<Item: Into<String>>>(program: &str, arguments: I) -> Self {
        Self { program: program.to_owned(), arguments: arguments.into_iter().map(Into::into).collect() }
    }

    /// Runs it to its end with `input` on its standard input; its standard output.
    ///
    /// # Errors
    /// [`Error::Command`], with what it said, if it cannot be started or fails.
    pub async fn output(&self, input: &str) -> Result<String> {
        use tokio::io::AsyncWriteExt;

        let failed = |problem: String| Error::Command { command: self.to_string(), problem };
        let mut child = tokio::process::Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read says at its end what it thinks of it.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let output = child.wait_with_output().await.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(failed(if said.is_empty() { output.status.to_string() } else { said }));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&quote(&self.program))?;
        self.arguments.iter().try_for_each(|argument| write!(formatter, " {}", quote(argument)))
    }
}

/// One word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shell_reads_what_was_quoted() {
        let words = ["plain", "", "two words", "it's", "$HOME", "a\nb", "--set=x.y=\"z\"", "*"];
        let inner = CommandLine::new("printf", ["%s|"].into_iter().chain(words));
        let shell = CommandLine::new("sh", ["-c".to_owned(), inner.to_string()]);
        assert_eq!(shell.output("").await.unwrap(), words.map(|word| format!("{word}|")).concat());
    }

    #[tokio::test]
    async fn a_failing_command_is_shown_with_what_it_said() {
        let error = CommandLine::new("sh", ["-c", "echo no such host >&2; exit 3"]).output("").await.unwrap_err();
        assert_eq!(error.to_string(), "sh -c 'echo no such host >&2; exit 3' failed: no such host");
        let error = CommandLine::new("/absent/sbatch", ["x"]).output("").await.unwrap_err();
        assert!(error.to_string().starts_with("/absent/sbatch x failed: No such file"), "{error}");
    }

    #[tokio::test]
    async fn input_reaches_the_command() {
        assert_eq!(CommandLine::new("cat", [""; 0]).output("job\n").await.unwrap(), "job\n");
    }
}
