//! Names of repositories.

use std::fmt;

/// A repository of the hub at a revision: `google/flan-t5-small`, or `google/flan-t5-small@main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    name: String,
    revision: String,
}

/// The longest name that the hub allows.
const NAME_MAX: usize = 96;

impl Repository {
    /// None for what cannot be the name of one.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_part = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['.', '-']) && !part.contains("..")
        };
        let parts: Vec<&str> = name.split('/').collect();
        let fits = parts.len() <= 2 && name.len() <= NAME_MAX && parts.into_iter().all(is_part);
        // A branch may have slashes.
        let fits = fits && revision.split('/').all(is_part);
        fits.then(|| Self { name: name.to_string(), revision: revision.to_string() })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Whether the revision is a commit, which never moves.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

/// Whether this is the hash of a commit.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name)?;
        match self.revision.as_str() {
            "main" => Ok(()),
            revision => write!(f, "@{revision}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories() {
        for (text, name, revision) in [
            ("google/flan-t5-small", "google/flan-t5-small", "main"),
            ("t5-small", "t5-small", "main"),
            ("google/t5-v1_1-base@refs/pr/9", "google/t5-v1_1-base", "refs/pr/9"),
        ] {
            let repository = Repository::parse(text).unwrap();
            assert_eq!((repository.name(), repository.revision()), (name, revision));
            assert_eq!(repository.to_string(), text);
        }
        for text in
            ["", "a/b/c", "/a", "./a", "../a", "a/..", "a b/c", "a/b@", "a/b@../x", "a@/x", "~/model", ".cache/x"]
        {
            assert_eq!(Repository::parse(text), None, "{text}");
        }
    }
}
