//! Reads reports, and refuses what is none in words that help.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{FORMAT, RunReport, VERSION};

/// Larger than any report: a run of an hour has some 10 MiB.
const LARGEST: u64 = 256 << 20;

/// Why a file is not a report that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is too large to be one.
    #[error("it has {bytes} bytes, more than any report")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// It was cut off.
    #[error("it ends in the middle, at line {line}: it was cut off while it was written or copied")]
    Truncated {
        /// Where.
        line: usize,
    },
    /// It is not JSON at all.
    #[error("it is not JSON")]
    NotJson(#[source] serde_json::Error),
    /// It is something else.
    #[error("it is no report of a migration{}", hint(*guestperf))]
    NotAReport {
        /// It looks like one of guestperf's.
        guestperf: bool,
    },
    /// It was written by a newer vmferry.
    #[error("it has schema version {found}, and this vmferry reads up to {VERSION}: use a newer one")]
    Newer {
        /// Its version.
        found: u64,
    },
    /// It claims to be one, but something in it is missing or of the wrong kind.
    #[error("it does not keep to the schema of docs/report.schema.json")]
    Malformed(#[source] serde_json::Error),
    /// One of the above, of this file.
    #[error("{} cannot be used", path.display())]
    Of {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<ReadError>,
    },
}

fn hint(guestperf: bool) -> &'static str {
    if guestperf { ", but looks like one of guestperf: convert it with `vmferry bench import-guestperf`" } else { "" }
}

/// Reads a report's file.
pub fn read(path: &Path) -> Result<RunReport, ReadError> {
    let of = |source| ReadError::Of { path: path.into(), source: Box::new(source) };
    read_text(&text_of(path)?).map_err(of)
}

/// The text of a file that is not too large for what is read here.
pub(super) fn text_of(path: &Path) -> Result<String, ReadError> {
    let io = |source| ReadError::Io { path: path.into(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > LARGEST {
        return Err(ReadError::Of { path: path.into(), source: Box::new(ReadError::TooLarge { bytes }) });
    }
    std::fs::read_to_string(path).map_err(io)
}

/// Reads a report.
pub fn read_text(text: &str) -> Result<RunReport, ReadError> {
    let value = json(text)?;
    if value.get("format").and_then(Value::as_str) != Some(FORMAT) {
        return Err(ReadError::NotAReport { guestperf: value.get("progress_history").is_some() });
    }
    match value.get("version").and_then(Value::as_u64) {
        Some(found) if found > u64::from(VERSION) => Err(ReadError::Newer { found }),
        _ => serde_json::from_value(value).map_err(ReadError::Malformed),
    }
}

pub(super) fn json(text: &str) -> Result<Value, ReadError> {
    serde_json::from_str(text).map_err(|error| match error.is_eof() {
        true => ReadError::Truncated { line: error.line() },
        false => ReadError::NotJson(error),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Origin, Settings};
    use super::*;

    fn report() -> String {
        RunReport::new(Origin::Bench, Settings::default()).to_json()
    }

    fn refusal(text: &str) -> String {
        read_text(text).unwrap_err().to_string()
    }

    #[test]
    fn a_report_that_was_cut_off_is_told_so_wherever_it_was() {
        let whole = report();
        for length in [0, 1, whole.len() / 3, whole.len() / 2, whole.trim_end().len() - 1] {
            assert!(refusal(&whole[..length]).contains("ends in the middle"), "{length}");
        }
    }

    #[test]
    fn a_report_of_a_newer_schema_is_told_so_although_nothing_else_of_it_is_known() {
        assert!(refusal(r#"{"format":"vmferry-migration","version":2,"all":"new"}"#).contains("schema version 2"));
    }

    #[test]
    fn what_is_no_report_is_told_so() {
        assert!(refusal("PK\u{3}\u{4}").contains("not JSON"));
        assert!(refusal("[1, 2]").contains("no report of a migration"));
        assert!(refusal(r#"{"progress_history":[]}"#).contains("import-guestperf"));
        let wrong = report().replace("\"started\": ", "\"started\": -");
        assert!(refusal(&wrong).contains("report.schema.json"));
    }

    #[test]
    fn fields_that_a_newer_vmferry_added_are_passed_over() {
        let newer = report().replacen('{', "{ \"weather\": \"fine\",", 1);
        assert!(read_text(&newer).is_ok());
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert!(read(&path).unwrap_err().to_string().contains("x.json"));
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("x.json cannot be used"));
    }
}
