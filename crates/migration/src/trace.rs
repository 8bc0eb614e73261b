//! The record of a migration in a file: one JSON object a line, the header first, then what happened, the end
//! last (docs/downtime.md).
//!
//! It is kept in memory while the migration runs and written when it is over: nothing goes to a disk with the
//! guest standing still. A file from outside is capped before memory is taken.

use std::io::{BufRead, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use switchover::trace::{ENTRIES_HALF, End, Entry, Header, Trace, VERSION};

/// No trace that was written here is larger, in bytes.
pub const FILE_MAX_BYTES: u64 = 16 << 20;

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no trace of this version.
    #[error("{path}: {what}; a trace is what vmferry migrate --record writes")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// Where a trace will be written once the migration is over.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    beside: PathBuf,
    file: std::fs::File,
}

impl TraceFile {
    /// Opens a file beside `path`, so that one that cannot be written is refused before anything moves.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path) -> Result<Self, TraceError> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let created = std::fs::File::create(&beside);
        let file = created.map_err(|source| TraceError::File { path: beside.clone(), source })?;
        Ok(Self { path: path.to_owned(), beside, file })
    }

    /// Writes the trace in the place of what was there.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, trace: &Trace) -> Result<(), TraceError> {
        let written = write_lines(&mut BufWriter::new(&self.file), trace)
            .and_then(|()| std::fs::rename(&self.beside, &self.path));
        written.map_err(|source| TraceError::File { path: self.path.clone(), source })
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        // Written, it has its own name already.
        let _ = std::fs::remove_file(&self.beside);
    }
}

fn write_lines(out: &mut impl Write, trace: &Trace) -> std::io::Result<()> {
    let mut line = |value: serde_json::Result<String>| -> std::io::Result<()> {
        out.write_all(value?.as_bytes())?;
        out.write_all(b"\n")
    };
    line(serde_json::to_string(&trace.header))?;
    for entry in &trace.entries {
        line(serde_json::to_string(entry))?;
    }
    line(serde_json::to_string(&serde_json::json!({ "end": trace.end })))?;
    out.flush()
}

#[derive(Deserialize)]
struct EndLine {
    end: End,
}

/// Reads a trace.
///
/// # Errors
/// It cannot be read, or is no trace of this version.
pub fn load(path: &Path) -> Result<Trace, TraceError> {
    let file = |source| TraceError::File { path: path.to_owned(), source };
    let opened = std::fs::File::open(path).map_err(file)?;
    // One byte more than allowed shows that there is more.
    let mut bytes = Vec::new();
    opened.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(file)?;
    parse(&bytes).map_err(|what| TraceError::Content { path: path.to_owned(), what })
}

fn parse(bytes: &[u8]) -> Result<Trace, String> {
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(format!("more than {FILE_MAX_BYTES} bytes"));
    }
    let mut lines = bytes.lines().map(|line| line.map_err(|error| error.to_string()));
    let first = lines.next().ok_or("it is empty")??;
    let header: Header =
        serde_json::from_str(&first).map_err(|error| format!("its first line: {error}"))?;
    if header.version != VERSION {
        return Err(format!("version {}, and {VERSION} is known here", header.version));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in lines.enumerate() {
        let line = line?;
        if let Ok(EndLine { end }) = serde_json::from_str(&line) {
            return Ok(Trace { header, entries, end });
        }
        if entries.len() > 2 * ENTRIES_HALF {
            return Err("more entries than a trace has".to_owned());
        }
        let entry = serde_json::from_str(&line);
        entries.push(entry.map_err(|error| format!("line {}: {error}", number + 2))?);
    }
    Err("it has no end: the migration was not over".to_owned())
}

#[cfg(test)]
mod tests {
    use switchover::trace::{TracedDevice, What};

    use super::*;

    fn trace() -> Trace {
        let device = TracedDevice { id: "nic0".into(), ..TracedDevice::default() };
        let header = Header { version: VERSION, devices: vec![device], ..Header::default() };
        let info = What::Info {
            device: 0,
            initial_bytes: Some(u64::MAX),
            dirty_bytes: None,
            reinit: true,
            stop_copy_bytes: None,
            offset: 7,
            took_us: 8,
        };
        let entries = vec![
            Entry { at_us: 1, what: What::PassSent },
            Entry { at_us: 2, what: info },
            Entry { at_us: 3, what: What::Left { entries: 9 } },
        ];
        let end = End { status: "completed".into(), downtime_us: Some(5), ..End::default() };
        Trace { header, entries, end }
    }

    #[test]
    fn what_is_written_is_read_and_replaces_what_was_there_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        std::fs::write(&path, "older").unwrap();
        let file = TraceFile::create(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"older");
        file.write(&trace()).unwrap();
        drop(file);
        assert_eq!(load(&path).unwrap(), trace());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
        drop(TraceFile::create(&path).unwrap());
        assert_eq!(load(&path).unwrap(), trace(), "a migration that never began leaves it alone");
        assert!(TraceFile::create(&dir.path().join("no/where")).is_err());
    }

    #[test]
    fn what_is_no_trace_says_what_is_wrong() {
        let mut whole = Vec::new();
        write_lines(&mut whole, &trace()).unwrap();
        let whole = String::from_utf8(whole).unwrap();
        assert_eq!(parse(whole.as_bytes()), Ok(trace()));
        let without_end = whole.lines().take(3).collect::<Vec<_>>().join("\n");
        let newer = whole.replacen("\"vmferry-trace\":1", "\"vmferry-trace\":2", 1);
        for (text, what) in [
            ("", "empty"),
            ("{}", "first line"),
            ("\u{0}\n", "first line"),
            (&without_end, "no end"),
            (&newer, "version 2"),
            (&whole.replacen("pass-sent", "pass-lost", 1), "line 2"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(what), "{text:?}: {error}");
        }
        let head = whole.lines().next().unwrap();
        let many = "\n{\"at-us\":1,\"event\":\"pass-sent\"}".repeat(2 * ENTRIES_HALF + 2);
        assert!(parse(format!("{head}{many}").as_bytes()).unwrap_err().contains("more entries"));
        assert!(parse(&vec![b' '; FILE_MAX_BYTES as usize + 1]).is_err());
    }
}
