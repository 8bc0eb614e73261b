//! Random ids: migrations, secrets, and this process.

use std::io;
use std::sync::OnceLock;

use switchover::message::Id;

/// A new random id.
pub(crate) fn random() -> io::Result<Id> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(Id(u128::from_le_bytes(bytes)))
}

/// This process's id, the same for all its migrations.
pub(crate) fn instance() -> io::Result<Id> {
    static INSTANCE: OnceLock<Id> = OnceLock::new();
    if let Some(id) = INSTANCE.get() {
        return Ok(*id);
    }
    let id = random()?;
    Ok(*INSTANCE.get_or_init(|| id))
}
