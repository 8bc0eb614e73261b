//! Decisions that must outlive the process, as small files.
//!
//! One file per side, migration and attempt, written by write + rename before the step it names, which is
//! enough for a killed process; `durable` adds fdatasync, for a crashed host. A decision that says who runs
//! the guest never changes: a write is a compare-and-swap on the file, under a lock on the folder, so that
//! also two processes with one folder cannot decide differently.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use switchover::handover::Decision;
use switchover::message::{Attempt, Connection, Failure, Id, Side};

/// Most that is written to or read of a file, in bytes: a reason of the other side, the longest there is
/// (64 KiB, escaped twice), must not keep a decision from being recorded.
const FILE_MAX: u64 = 1 << 20;
const SUFFIX: &str = ".record";
const UNFINISHED: &str = ".unfinished";

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Whose decision it is.
    pub role: Side,
    /// The migration.
    pub migration: Id,
    /// The attempt.
    pub attempt: Attempt,
    /// The decision.
    pub decision: Decision,
    /// Why, where there is a reason to tell.
    pub reason: Option<Failure>,
    /// What a later process needs to go on where this one ended.
    pub binding: Option<Binding>,
}

/// What binds a record to its migration's other side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Binding {
    /// The migration's secret.
    pub secret: Id,
    /// The newest connection when it was written.
    pub connection: Connection,
    /// Source: the destination's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
}

/// Everything a store holds.
#[derive(Debug, Default)]
pub struct Recorded {
    /// In order of role, migration and attempt.
    pub records: Vec<Record>,
    /// Files that cannot be read as records, and why. Somebody should look at them: they may say who ran.
    pub corrupt: Vec<(PathBuf, String)>,
}

/// Keeps records; shared by all migrations of a host.
#[derive(Debug)]
pub struct RecordStore {
    place: Place,
    /// Also serialises writing.
    written: Mutex<BTreeMap<Key, Record>>,
}

type Key = (bool, Id, Attempt);

#[derive(Debug)]
enum Place {
    Memory,
    Dir { dir: PathBuf, durable: bool },
}

impl RecordStore {
    /// Files in `dir`, which is made (mode 0700) where it is missing.
    pub fn new(dir: PathBuf, durable: bool) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        if durable {
            sync_dir(dir.parent().filter(|parent| !parent.as_os_str().is_empty()))?;
        }
        let store = Self { place: Place::Dir { dir, durable }, written: Mutex::default() };
        let found = store.read_all()?;
        for (path, why) in &found.corrupt {
            tracing::warn!(path = %path.display(), why, "a record cannot be read");
        }
        let records = found.records.into_iter().map(|record| (key(&record), record)).collect();
        Ok(Self { written: Mutex::new(records), ..store })
    }

    /// Keeps records in this process only: **nothing survives it**, so a migration whose process dies after
    /// Commit can only be resolved by a person who looks at both hosts.
    pub fn in_memory() -> Self {
        Self { place: Place::Memory, written: Mutex::default() }
    }

    /// Whether records outlive the process.
    pub fn outlives_process(&self) -> bool {
        matches!(self.place, Place::Dir { .. })
    }

    /// Records a decision; when this returns it is there. Changing any but Prepared, and a source's
    /// Committing into Never or Gone, is refused with [`io::ErrorKind::AlreadyExists`]; repeating it is not.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let locked = match &self.place {
            Place::Dir { dir, .. } => Some(LockedDir::new(dir)?),
            Place::Memory => None,
        };
        // What another process may have decided meanwhile counts as well. A file that cannot be read
        // decides nothing; what it said is in memory if it was ours.
        let on_disk =
            locked.as_ref().and_then(|locked| read_file(&locked.path.join(file_name(record))).ok());
        let known = written.get(&key(record)).cloned();
        if let Some(before) = on_disk.or(known) {
            if before.decision == record.decision {
                return Ok(());
            }
            // A source that recorded Committing says what came of it once it knows.
            let ends_doubt = record.role == Side::Source && before.decision == Decision::Committing;
            if before.decision != Decision::Prepared && !ends_doubt {
                let what = format!(
                    "attempt {} of migration {} is {:?} on record; that cannot become {:?}",
                    record.attempt.0, record.migration, before.decision, record.decision
                );
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
            }
        }
        if let Place::Dir { dir, durable } = &self.place {
            write_file(dir, *durable, record)?;
        }
        written.insert(key(record), record.clone());
        Ok(())
    }

    /// What is on record about a migration's newest attempt, as this side; read from the files, where another
    /// process may have written.
    pub fn newest(&self, role: Side, migration: Id) -> io::Result<Option<Record>> {
        let of = |record: &Record| record.role == role && record.migration == migration;
        Ok(self.read_all()?.records.into_iter().filter(of).max_by_key(|record| record.attempt))
    }

    /// Migrations of which a source of this host recorded `committing` and nothing since: whoever began them
    /// died in doubt.
    pub fn in_doubt(&self) -> io::Result<Vec<Record>> {
        let doubtful = |record: &Record| {
            record.role == Side::Source && record.decision == Decision::Committing
        };
        Ok(self.read_all()?.records.into_iter().filter(doubtful).collect())
    }

    /// The decision on record.
    pub fn find(&self, role: Side, migration: Id, attempt: Attempt) -> Option<Record> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.get(&(role == Side::Destination, migration, attempt)).cloned()
    }

    /// Reads everything again, from the files where there are files.
    pub fn read_all(&self) -> io::Result<Recorded> {
        let Place::Dir { dir, .. } = &self.place else {
            let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            return Ok(Recorded { records: written.values().cloned().collect(), corrupt: vec![] });
        };
        let mut found = Recorded::default();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.ends_with(SUFFIX) {
                continue;
            }
            match read_file(&path) {
                Ok(record) if file_name(&record) == name => found.records.push(record),
                Ok(_) => found.corrupt.push((path, "its name belongs to another record".into())),
                Err(why) => found.corrupt.push((path, why)),
            }
        }
        found.records.sort_by_key(key);
        found.corrupt.sort();
        Ok(found)
    }
}

/// The folder, held by no other process meanwhile.
struct LockedDir {
    path: PathBuf,
    _held: File,
}

impl LockedDir {
    fn new(dir: &Path) -> io::Result<Self> {
        let held = File::open(dir)?;
        loop {
            // SAFETY: flock on a descriptor that lives.
            if unsafe { libc::flock(held.as_raw_fd(), libc::LOCK_EX) } == 0 {
                return Ok(Self { path: dir.to_owned(), _held: held });
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

fn key(record: &Record) -> Key {
    (record.role == Side::Destination, record.migration, record.attempt)
}

fn file_name(record: &Record) -> String {
    format!("{}-{}-{}{SUFFIX}", record.role, record.migration, record.attempt.0)
}

/// What a file holds: the record's JSON as text, so that its checksum is over exactly these bytes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Envelope {
    checksum: u32,
    record: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Body {
    version: u32,
    role: Side,
    migration: Id,
    attempt: Attempt,
    decision: Word,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<Failure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    binding: Option<Binding>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Committing,
    Prepared,
    Running,
    Never,
    Gone,
}

const VERSION: u32 = 1;

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let decision = match record.decision {
        Decision::Committing => Word::Committing,
        Decision::Prepared => Word::Prepared,
        Decision::Running => Word::Running,
        Decision::Never => Word::Never,
        Decision::Gone => Word::Gone,
    };
    let Record { role, migration, attempt, ref reason, .. } = *record;
    let (reason, binding) = (reason.clone(), record.binding.clone());
    let body = Body { version: VERSION, role, migration, attempt, decision, reason, binding };
    let record = serde_json::to_string(&body)?;
    let envelope = Envelope { checksum: crc32fast::hash(record.as_bytes()), record };
    let mut bytes = serde_json::to_vec(&envelope)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Record, String> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let found = crc32fast::hash(envelope.record.as_bytes());
    if found != envelope.checksum {
        return Err(format!("damaged: checksum {found:#010x}, not {:#010x}", envelope.checksum));
    }
    let body: Body = serde_json::from_str(&envelope.record).map_err(|e| e.to_string())?;
    if body.version != VERSION {
        return Err(format!("version {} of the record is unknown here", body.version));
    }
    let decision = match body.decision {
        Word::Committing => Decision::Committing,
        Word::Prepared => Decision::Prepared,
        Word::Running => Decision::Running,
        Word::Never => Decision::Never,
        Word::Gone => Decision::Gone,
    };
    let Body { role, migration, attempt, reason, binding, .. } = body;
    Ok(Record { role, migration, attempt, decision, reason, binding })
}

fn read_file(path: &Path) -> Result<Record, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut bytes))
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!("longer than {FILE_MAX} bytes"));
    }
    decode(&bytes)
}

fn write_file(dir: &Path, durable: bool, record: &Record) -> io::Result<()> {
    let bytes = encode(record)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the record is too long"));
    }
    let path = dir.join(file_name(record));
    let unfinished = dir.join(format!("{}{UNFINISHED}", file_name(record)));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)?;
    file.write_all(&bytes)?;
    if durable {
        file.sync_data()?;
    }
    fs::rename(&unfinished, &path)?;
    if durable { sync_dir(Some(dir)) } else { Ok(()) }
}

/// The rename must be on disk too.
fn sync_dir(dir: Option<&Path>) -> io::Result<()> {
    File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
}
