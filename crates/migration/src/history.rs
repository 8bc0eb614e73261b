//! What earlier migrations taught, in a file.
//!
//! Estimates rest on it and nothing else, so a file that is missing, damaged, too large or of another
//! version is as good as none: it is said in the log, and overwritten after the next migration.

use std::io::Read;
use std::path::Path;

use switchover::estimate::History;

/// The name of the file in a state directory.
pub const FILE_NAME: &str = "history.json";
/// No history that was written here is larger, in bytes.
const FILE_MAX_BYTES: u64 = 4 << 20;

/// Reads the history; an empty one where there is none that can be used.
pub fn load(path: &Path) -> History {
    match read(path) {
        Ok(history) => history,
        Err(why) => {
            tracing::info!(path = %path.display(), why, "no history");
            History::default()
        }
    }
}

fn read(path: &Path) -> Result<History, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(format!("more than {FILE_MAX_BYTES} bytes"));
    }
    let history: History = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    history.limit().ok_or_else(|| "another version".to_owned())
}

/// Writes the history over the one that is there. A history that cannot be kept is a worse estimate and no
/// failure.
pub fn save(path: &Path, history: &History) {
    let write = || -> std::io::Result<()> {
        let text = serde_json::to_vec(history)?;
        let aside = path.with_extension("json.new");
        std::fs::write(&aside, text)?;
        std::fs::rename(&aside, path)
    };
    if let Err(error) = write() {
        tracing::warn!(path = %path.display(), %error, "the history could not be kept");
    }
}

#[cfg(test)]
mod tests {
    use switchover::estimate::KindHistory;

    use super::*;

    #[test]
    fn what_is_damaged_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        assert_eq!(load(&path), History::default());
        let mut history = History::default();
        history.add_kind("nic", &KindHistory { look: vec![1, 2, 3], ..KindHistory::default() });
        save(&path, &history);
        assert_eq!(load(&path), history);
        let text = std::fs::read_to_string(&path).unwrap();
        for damaged in [
            text.replace("\"version\":1", "\"version\":9"),
            text.replace(':', ";"),
            text[..text.len() / 2].to_owned(),
            " ".repeat(FILE_MAX_BYTES as usize + 2),
        ] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(load(&path), History::default());
        }
        save(&path, &history);
        assert_eq!(load(&path), history, "written over");
    }
}
