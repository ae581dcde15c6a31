//! Where records come from: JSON lines, CSV, TSV and Parquet files, compressed or not, folders of these, and the built-in
//! pronunciation dictionary.

mod compression;
mod folder;
mod parquet;
mod record;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use compression::Compression;
pub use record::{Record, Value};

/// The CMU Pronouncing Dictionary as its authors distribute it; build.rs put it there.
const CMUDICT: &str = include_str!(concat!(env!("OUT_DIR"), "/cmudict.dict"));
const CMUDICT_NAME: &str = "builtin:cmudict";
const BUILTIN_PREFIX: &str = "builtin:";
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// The fields that somebody reads; none: all of them.
pub(crate) type Wanted<'a> = Option<&'a BTreeSet<String>>;

/// A source that can be read: a file of a known format, or a built-in set.
#[derive(Clone, Debug, PartialEq)]
pub struct Source(Kind);

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    File {
        path: PathBuf,
        format: Format,
        compression: Compression,
        /// The path as the user wrote it, for messages.
        shown: String,
    },
    Cmudict,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    JsonLines,
    Separated { delimiter: u8 },
    Parquet,
}

impl Format {
    /// By the ending of the name, with what it is compressed by.
    fn of(path: &Path) -> Option<(Self, Compression)> {
        let (path, compression) = Compression::of(path);
        let format = match path.extension()?.to_string_lossy().to_ascii_lowercase().as_str() {
            "jsonl" | "json-lines" | "jsonlines" | "ndjson" => Self::JsonLines,
            "csv" => Self::Separated { delimiter: b',' },
            "tsv" => Self::Separated { delimiter: b'\t' },
            // Its pages are compressed; the file as a whole is not.
            "parquet" if compression == Compression::None => Self::Parquet,
            _ => return None,
        };
        Some((format, compression))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::File { shown, .. } => formatter.write_str(shown),
            Kind::Cmudict => formatter.write_str(CMUDICT_NAME),
        }
    }
}

/// Finds the sources that the entries name: paths, globs (their files in alphabetical order), folders of a data set (the
/// files of one split), and `builtin:cmudict`. Relative paths are relative to `base`; `split` is that of a folder which
/// is named without one.
///
/// # Errors
/// A file that is missing or of an unknown format, a glob without a match, a folder without the split, an unknown
/// built-in set.
pub fn resolve_sources(entries: &[String], base: &Path, split: &str) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for entry in entries {
        if let Some(name) = entry.strip_prefix(BUILTIN_PREFIX) {
            if entry != CMUDICT_NAME {
                return Err(Error::source(entry, format!("no built-in set {name:?}; there is {CMUDICT_NAME}")));
            }
            sources.push(Source(Kind::Cmudict));
            continue;
        }
        let path = base.join(entry);
        if path.is_dir() {
            sources.extend(folder::open(&path, entry, split)?);
        } else if path.exists() {
            sources.push(Source::file(path, entry)?);
        } else if let Some((name, split)) = entry.rsplit_once(':').filter(|(name, _)| base.join(name).is_dir()) {
            sources.extend(folder::open(&base.join(name), name, split)?);
        } else if entry.contains(['*', '?', '[']) {
            sources.extend(expand_glob(entry, base)?);
        } else {
            return Err(Error::source(entry, format!("no such file ({})", path.display())));
        }
    }
    Ok(sources)
}

fn expand_glob(pattern: &str, base: &Path) -> Result<Vec<Source>> {
    let bad = |error: &dyn fmt::Display| Error::source(pattern, format!("cannot expand the glob: {error}"));
    // The base is a literal folder whatever characters it has; only what the user wrote is a pattern.
    let escaped_base = glob::Pattern::escape(&base.to_string_lossy());
    let full = Path::new(&escaped_base).join(pattern);
    let mut sources = Vec::new();
    for path in glob::glob(&full.to_string_lossy()).map_err(|error| bad(&error))? {
        let path = path.map_err(|error| bad(&error))?;
        if path.is_file() {
            let shown = path.strip_prefix(base).unwrap_or(&path).display().to_string();
            sources.push(Source::file(path, &shown)?);
        }
    }
    if sources.is_empty() {
        return Err(Error::source(pattern, format!("no file matches (looked in {})", base.display())));
    }
    Ok(sources)
}

impl Source {
    fn file(path: PathBuf, shown: &str) -> Result<Self> {
        let Some((format, compression)) = Format::of(&path) else {
            let message = "unknown format; convert it to .jsonl (one object a line), .csv or .tsv (with a header), any \
                           of them as .gz or .zst, or .parquet";
            return Err(Error::source(shown, message));
        };
        Ok(Self(Kind::File { path, format, compression, shown: shown.to_owned() }))
    }

    /// What tells whether it has changed since it was last read: name, size and time of change.
    ///
    /// # Errors
    /// The file is gone.
    pub(crate) fn stamp(&self) -> Result<String> {
        let Kind::File { path, shown, .. } = &self.0 else { return Ok(self.to_string()) };
        let metadata = fs::metadata(path).map_err(|error| Error::io(path, error))?;
        let changed = metadata.modified().map_err(|error| Error::io(path, error))?;
        Ok(format!("{shown} {} {changed:?}", metadata.len()))
    }

    /// Calls `visit` with every record and the line it starts on (from 1; a Parquet file's row; 0 for a built-in set),
    /// in order.
    ///
    /// # Errors
    /// What cannot be read, by file and line; an error message that `visit` returns is put behind its record's file
    /// and line. A source without any record is an error too.
    pub fn for_each(&self, mut visit: impl FnMut(u64, Record) -> Result<(), String>) -> Result<()> {
        self.for_each_of(None, |line, record| visit(line, record).map(|()| true)).map(|_| ())
    }

    /// The same, until `visit` says false; whether it never did. A format that can leaves out fields that nobody wants.
    pub(crate) fn for_each_of(
        &self,
        wanted: Wanted<'_>,
        mut visit: impl FnMut(u64, Record) -> Result<bool, String>,
    ) -> Result<bool> {
        let mut count = 0_u64;
        let mut visit = |line: u64, record: Record| {
            count += 1;
            visit(line, record).map_err(|message| self.record_error(line, message))
        };
        let whole = match &self.0 {
            Kind::File { path, format: Format::JsonLines, compression, .. } => {
                self.read_json_lines(compression.open(path)?, path, &mut visit)
            }
            Kind::File { path, format: Format::Separated { delimiter }, compression, .. } => {
                self.read_separated(compression.open(path)?, path, *delimiter, &mut visit)
            }
            Kind::File { path, format: Format::Parquet, .. } => self.read_parquet(path, wanted, &mut visit),
            Kind::Cmudict => read_cmudict(&mut visit),
        }?;
        if count == 0 {
            return Err(Error::source(self.to_string(), "holds no records"));
        }
        Ok(whole)
    }

    fn record_error(&self, line: u64, message: impl Into<String>) -> Error {
        Error::Record { origin: self.to_string(), line, message: message.into() }
    }

    /// A failure to read: of a compressed file mostly its content's fault, otherwise the machine's.
    fn read_error(&self, path: &Path, line: u64, error: io::Error) -> Error {
        let compression = match &self.0 {
            Kind::File { compression, .. } => *compression,
            Kind::Cmudict => Compression::None,
        };
        // What the operating system refuses has a number.
        match (compression.name(), error.raw_os_error()) {
            (Some(name), None) => {
                let message = format!("broken {name} after this line ({error}); the file is torn or damaged");
                self.record_error(line.saturating_sub(1), message)
            }
            _ => Error::io(path, error),
        }
    }

    fn read_json_lines(
        &self,
        mut reader: Box<dyn BufRead>,
        path: &Path,
        visit: &mut dyn FnMut(u64, Record) -> Result<bool>,
    ) -> Result<bool> {
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(|error| self.read_error(path, line, error))? == 0 {
                break;
            }
            let text = std::str::from_utf8(&bytes).map_err(|error| self.record_error(line, utf8_message(&error)))?;
            let text = if line == 1 { text.trim_start_matches(BYTE_ORDER_MARK) } else { text };
            if !text.trim().is_empty() {
                let record = Record::from_json(text.trim()).map_err(|message| self.record_error(line, message))?;
                if !visit(line, record)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn read_separated(
        &self,
        reader: Box<dyn BufRead>,
        path: &Path,
        delimiter: u8,
        visit: &mut dyn FnMut(u64, Record) -> Result<bool>,
    ) -> Result<bool> {
        // Flexible, so that the check of the row lengths and its message are ours.
        let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(reader);
        let header = match reader.headers() {
            Ok(header) => header.clone(),
            Err(error) => return Err(self.csv_error(path, 1, error)),
        };
        let names: Vec<&str> = header.iter().map(|name| name.trim_start_matches(BYTE_ORDER_MARK)).collect();
        for (index, name) in names.iter().enumerate() {
            if names[..index].contains(name) {
                return Err(self.record_error(1, format!("the header names the column {name:?} twice")));
            }
        }
        let mut row = csv::StringRecord::new();
        loop {
            let place = reader.position().line();
            if !reader.read_record(&mut row).map_err(|error| self.csv_error(path, place, error))? {
                return Ok(true);
            }
            let line = row.position().map_or(0, csv::Position::line);
            if row.len() != names.len() {
                let message = format!("{} columns where the header has {}", row.len(), names.len());
                return Err(self.record_error(line, message));
            }
            if !visit(line, Record::from_texts(names.iter().copied().zip(&row)))? {
                return Ok(false);
            }
        }
    }

    /// `place` is the line that was reached, for errors that know none.
    fn csv_error(&self, path: &Path, place: u64, error: csv::Error) -> Error {
        let line = error.position().map_or(place, csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(error) => self.read_error(path, line, error),
            csv::ErrorKind::Utf8 { err, .. } => {
                self.record_error(line, format!("column {} is not valid UTF-8; convert the file", err.field() + 1))
            }
            kind => self.record_error(line, format!("cannot be read: {kind:?}")),
        }
    }
}

fn utf8_message(error: &std::str::Utf8Error) -> String {
    format!("not valid UTF-8 from byte {} of the line on; convert the file", error.valid_up_to() + 1)
}

/// The CMU Pronouncing Dictionary as records `word` (hello), `letters` (h e l l o) and `phonemes` (HH AH L OW, without
/// stress digits), in the dictionary's order.
///
/// Words with anything but the letters a to z and apostrophes (abbreviations with points, compounds with hyphens; 1 %)
/// are left out. Of several pronunciations only the first is kept, so that no word is in training and validation.
fn read_cmudict(visit: &mut dyn FnMut(u64, Record) -> Result<bool>) -> Result<bool> {
    for (index, line) in CMUDICT.lines().enumerate() {
        let entry = line.split('#').next().unwrap_or_default();
        let Some((word, pronunciation)) = entry.split_once(' ') else { continue };
        // Further pronunciations are listed as word(2): the parenthesis fails this test.
        if !word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'\'') {
            continue;
        }
        let phonemes: Vec<&str> = pronunciation
            .split_whitespace()
            .map(|symbol| symbol.trim_end_matches(|c: char| c.is_ascii_digit()))
            .collect();
        let letters: Vec<&str> = word.split("").filter(|letter| !letter.is_empty()).collect();
        let fields = [("word", word.to_owned()), ("letters", letters.join(" ")), ("phonemes", phonemes.join(" "))];
        if !visit(index as u64 + 1, Record::from_texts(fields))? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn sources(base: &Path, entries: &[&str]) -> Result<Vec<Source>> {
        let entries: Vec<String> = entries.iter().map(|&entry| entry.to_owned()).collect();
        resolve_sources(&entries, base, "train")
    }

    fn read(base: &Path, entry: &str) -> Result<Vec<(u64, Record)>> {
        let mut records = Vec::new();
        for source in sources(base, &[entry])? {
            source.for_each(|line, record| {
                records.push((line, record));
                Ok(())
            })?;
        }
        Ok(records)
    }

    fn written(name: &str, content: impl AsRef<[u8]>) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(name), content).unwrap();
        directory
    }

    fn message(name: &str, content: impl AsRef<[u8]>) -> String {
        let directory = written(name, content);
        let error = read(directory.path(), name).unwrap_err();
        assert!(error.is_user_error());
        error.to_string()
    }

    #[test]
    fn json_lines_skip_blank_lines_and_a_byte_order_mark() {
        let directory = written("a.jsonl", "\u{feff}{\"a\": \"x\\n\"}\r\n\n  \n{\"b\": 2}");
        let records = read(directory.path(), "a.jsonl").unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0], (1, Record::from_texts([("a", "x\n")])));
        assert_eq!(records[1], (4, Record::from_json("{\"b\": 2}").unwrap()));
    }

    #[test]
    fn tables_have_a_header_and_quoted_fields() {
        let content = "\u{feff}a,b\n\"x, \"\"y\"\"\",1\n\n\"two\nlines\",\nlast,3\n";
        let directory = written("a.csv", content);
        let records = read(directory.path(), "a.csv").unwrap();
        assert_eq!(records[0], (2, Record::from_texts([("a", "x, \"y\""), ("b", "1")])));
        assert_eq!(records[1].1, Record::from_texts([("a", "two\nlines"), ("b", "")]));
        assert_eq!(records[2], (6, Record::from_texts([("a", "last"), ("b", "3")])));
        let directory = written("a.tsv", "a\tb\nx,y\tz\n");
        assert_eq!(read(directory.path(), "a.tsv").unwrap(), [(2, Record::from_texts([("a", "x,y"), ("b", "z")]))]);
    }

    #[test]
    fn bad_json_lines_are_located() {
        assert_eq!(
            message("a.jsonl", "{\"a\": 1}\n{\"a\": \n"),
            "a.jsonl:2: broken JSON at column 5: EOF while parsing a value"
        );
        assert_eq!(
            message("a.jsonl", "[1]"),
            "a.jsonl:1: not a JSON object with text keys: invalid type: sequence, expected a map"
        );
        assert_eq!(message("a.jsonl", "{} {}"), "a.jsonl:1: broken JSON at column 4: trailing characters");
        assert_eq!(
            message("a.jsonl", b"{\"a\": \"\xff\"}"),
            "a.jsonl:1: not valid UTF-8 from byte 8 of the line on; convert the file"
        );
        assert_eq!(message("a.jsonl", "\n\n"), "a.jsonl: holds no records");
    }

    #[test]
    fn bad_tables_are_located() {
        assert_eq!(message("a.csv", "a,b\n1,2\n3\n"), "a.csv:3: 1 columns where the header has 2");
        assert_eq!(message("a.csv", "a,b\n1,2,3\n"), "a.csv:2: 3 columns where the header has 2");
        assert_eq!(message("a.csv", "a,a\n1,2\n"), "a.csv:1: the header names the column \"a\" twice");
        assert_eq!(message("a.csv", b"a,b\n1,\xff\n"), "a.csv:2: column 2 is not valid UTF-8; convert the file");
        assert_eq!(message("a.csv", ""), "a.csv: holds no records");
        assert_eq!(message("a.tsv", "a\tb\n"), "a.tsv: holds no records");
    }

    #[test]
    fn what_visit_refuses_is_located() {
        let directory = written("a.jsonl", "{}\n{}\n");
        let source = &sources(directory.path(), &["a.jsonl"]).unwrap()[0];
        let error = source.for_each(|line, _| if line == 2 { Err("no".to_owned()) } else { Ok(()) }).unwrap_err();
        assert_eq!(error.to_string(), "a.jsonl:2: no");
    }

    #[test]
    fn unusable_entries_say_what_to_do() {
        let directory = written("a.txt", "x");
        let base = directory.path();
        fs::create_dir(base.join("d")).unwrap();
        for (entry, start) in [
            ("a.txt", "a.txt: unknown format; convert it to .jsonl"),
            ("d", "d: holds no file of a known format"),
            ("a.jsonl.bz2", "a.jsonl.bz2: no such file"),
            ("b.csv", "b.csv: no such file ("),
            ("*.csv", "*.csv: no file matches (looked in "),
            ("[", "[: cannot expand the glob: "),
            ("builtin:x", "builtin:x: no built-in set \"x\"; there is builtin:cmudict"),
        ] {
            let error = sources(base, &[entry]).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
            assert!(error.is_user_error());
        }
    }

    #[test]
    fn globs_are_sorted_and_shown_relative() {
        let parent = tempfile::tempdir().unwrap();
        // A folder whose name looks like a pattern.
        let base = parent.path().join("[a]");
        fs::create_dir_all(base.join("x")).unwrap();
        for name in ["x/2.csv", "x/10.csv", "x/1.jsonl", "x/*.csv.csv"] {
            fs::write(base.join(name), "").unwrap();
        }
        let shown = |entry| sources(&base, &[entry]).unwrap().iter().map(Source::to_string).collect::<Vec<_>>();
        assert_eq!(shown("x/*0.csv"), ["x/10.csv"]);
        assert_eq!(shown("x/[0-9]*.csv"), ["x/10.csv", "x/2.csv"]);
        assert_eq!(shown("x/*.csv.csv"), ["x/*.csv.csv"], "a file of that very name is no pattern");
    }

    fn gzipped(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut encoder, content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compressed_files_are_what_is_in_them() {
        let json = "{\"a\": 1}\n{\"a\": 2}\n";
        let twice = [gzipped(json.as_bytes()), gzipped(json.as_bytes())].concat();
        let zstd = |content: &str| zstd::encode_all(content.as_bytes(), 0).unwrap();
        for (name, content, records) in [
            ("a.jsonl.gz", gzipped(json.as_bytes()), 2),
            ("a.jsonl.gz", twice, 4),
            ("a.jsonl.zst", zstd(json), 2),
            ("a.jsonl.zst", [zstd(json), zstd(json)].concat(), 4),
            ("a.csv.gz", gzipped(b"a\n1\n2\n3\n"), 3),
            ("a.tsv.zst", zstd("a\tb\n1\t2\n"), 1),
        ] {
            let directory = written(name, content);
            assert_eq!(read(directory.path(), name).unwrap().len(), records, "{name}");
        }
    }

    #[test]
    fn torn_and_damaged_compressed_files_are_located() {
        // What does not compress away, so that half a file holds whole lines.
        let lines: String =
            (0..2000_u64).map(|k| format!("{{\"a\": {}}}\n", k.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
        let rows = format!("a\n{}", lines.replace("{\"a\": ", "").replace('}', ""));
        let zstd = |content: &str| zstd::encode_all(content.as_bytes(), 0).unwrap();
        for (name, whole, codec) in [
            ("a.jsonl.gz", gzipped(lines.as_bytes()), "gzip"),
            ("a.csv.gz", gzipped(rows.as_bytes()), "gzip"),
            ("a.jsonl.zst", zstd(&lines), "zstd"),
            ("a.csv.zst", zstd(&rows), "zstd"),
        ] {
            for content in
                [whole[..whole.len() / 2].to_vec(), whole[..whole.len() - 3].to_vec(), b"no such thing at all".to_vec()]
            {
                let message = message(name, content);
                assert!(message.starts_with(&format!("{name}:")), "{message}");
                assert!(message.contains(&format!("broken {codec} after this line (")), "{message}");
                assert!(!message.contains('\n'));
            }
        }
        let mut damaged = gzipped(lines.as_bytes());
        let end = damaged.len() - 6;
        damaged[end] ^= 1;
        assert!(message("a.jsonl.gz", damaged).contains("a.jsonl.gz:2000: broken gzip"));
    }

    fn references() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/references/parquet")
    }

    #[test]
    fn parquet_files_of_every_codec_hold_the_same_records() {
        let plain = |record: &Record| -> Vec<(String, Value)> {
            let mut fields: Vec<(String, Value)> =
                record.fields().map(|(name, value)| (name.to_owned(), spaceless(value))).collect();
            fields.sort_by(|(a, _), (b, _)| a.cmp(b));
            fields
        };
        let expected: Vec<_> =
            read(&references(), "rows.jsonl").unwrap().iter().map(|(_, record)| plain(record)).collect();
        for codec in ["none", "snappy", "gzip", "zstd", "lz4"] {
            let records = read(&references(), &format!("{codec}.parquet")).unwrap();
            assert_eq!(records.len(), 60);
            for ((line, record), (number, expected)) in records.iter().zip((1..).zip(&expected)) {
                assert_eq!((*line, &plain(record)), (number, expected), "{codec}");
            }
        }
    }

    /// JSON as the writer of the reference spaces it, without spaces.
    fn spaceless(value: &Value) -> Value {
        match value {
            Value::Nested(json) => {
                let json: serde_json::Value = serde_json::from_str(json).unwrap();
                Value::Nested(json.to_string())
            }
            other => other.clone(),
        }
    }

    #[test]
    fn parquet_columns_that_nobody_wants_are_not_read() {
        let source = &sources(&references(), &["snappy.parquet"]).unwrap()[0];
        for (wanted, fields) in [
            (&["title", "stars"][..], &["title", "stars"][..]),
            (&["answers.text.0"], &["answers"]),
            (&["title", "absent"], &["title", "stars", "price", "weight", "verified", "note", "answers", "sold"]),
        ] {
            let wanted: BTreeSet<String> = wanted.iter().map(|&name| name.to_owned()).collect();
            let mut count = 0;
            let whole = source
                .for_each_of(Some(&wanted), |_, record| {
                    assert!(record.fields().map(|(name, _)| name).eq(fields.iter().copied()));
                    count += 1;
                    Ok(count < 30)
                })
                .unwrap();
            assert_eq!((whole, count), (false, 30));
        }
    }

    #[test]
    fn damaged_parquet_files_are_located() {
        for codec in ["none", "snappy", "gzip", "zstd", "lz4"] {
            let name = format!("{codec}.parquet");
            let whole = fs::read(references().join(&name)).unwrap();
            let message = |content: &[u8]| message(&name, content);
            assert!(message(&whole[..whole.len() / 2]).starts_with(&format!("{name}: no intact Parquet file: ")));
            assert!(message(b"").starts_with(&format!("{name}: no intact Parquet file: ")));
            // Wherever in the first pages a byte is wrong, it is noticed, by the checksum at the latest.
            let mut noticed = 0;
            for at in (4..1500).step_by(7) {
                let mut damaged = whole.clone();
                damaged[at] ^= 0x55;
                let directory = written(&name, damaged);
                if let Err(error) = read(directory.path(), &name) {
                    assert!(error.is_user_error(), "{error}");
                    noticed += 1;
                }
            }
            assert!(noticed > 150, "{noticed} of 214");
        }
    }

    #[test]
    fn cmudict_has_letters_and_phonemes_without_stress() {
        let records = read(Path::new(""), "builtin:cmudict").unwrap();
        assert_eq!(records.len(), 124_803);
        let get = |word: &str| {
            let same: Vec<_> = records
                .iter()
                .filter(|(_, record)| record.get("word") == Some(&Value::Text(word.to_owned())))
                .collect();
            assert_eq!(same.len(), 1, "{word}");
            ["letters", "phonemes"].map(|field| same[0].1.get(field).unwrap().text().unwrap().to_owned())
        };
        assert_eq!(get("hello"), ["h e l l o", "HH AH L OW"]);
        assert_eq!(get("gdp"), ["g d p", "G IY D IY P IY"]);
        assert_eq!(get("'til"), ["' t i l", "T IH L"]);
    }
}
