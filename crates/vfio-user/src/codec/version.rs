//! VERSION: major, minor, and capabilities as JSON with a terminating NUL.
//!
//! Unknown keys are ignored; a known key with the wrong JSON type refuses the message, as
//! libvfio-user does. Our extension lives under `capabilities.migration`:
//!
//! | key | meaning |
//! |---|---|
//! | `pgsize` | page size of DMA logging (libvfio-user) |
//! | `precopy_info`, `precopy_info_command` | precopy information is a command, with this number |
//! | `reinit` | feature 12 (INFOv2) can be opted in |
//! | `data_size` | feature 9 (MIG_DATA_SIZE) is there |
//! | `state_digest` | command 0x8002 answers a digest of the device's internal state |
//! | `whole_messages` | bodies are received whole: writes up to max_data_xfer_size are safe |
//! | `reset_runs` | a reset leads to RUNNING, as in the kernel |

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Command, DecodeError, put, take};

/// The only major version there is.
pub const MAJOR: u16 = 0;
/// The minor version this crate speaks.
pub const MINOR: u16 = 1;

/// Largest capability text that is parsed, in bytes.
pub const JSON_BYTES_MAX: usize = 16 << 10;

/// Never more data than this in one message, in bytes, whatever is asked for: it bounds what a peer's
/// message can make this side allocate.
pub const MAX_DATA_XFER_BYTES: usize = 16 << 20;

/// `max_data_xfer_size` of a peer that names none.
pub const DEFAULT_MAX_DATA_XFER_BYTES: u64 = 1 << 20;
/// `max_msg_fds` of a peer that names none.
pub const DEFAULT_MAX_MSG_FDS: u64 = 1;

/// `capabilities.twin_socket`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinSocket {
    /// Asked for, or granted.
    #[serde(default)]
    pub supported: bool,
    /// In a reply: which of the attached fds is the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// `capabilities.migration`: libvfio-user's key and our extension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapabilities {
    /// Page size of DMA logging, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// Precopy information can be asked.
    #[serde(default, skip_serializing_if = "is_false")]
    pub precopy_info: bool,
    /// The command that asks it; [`Command::PRECOPY_INFO`] where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precopy_info_command: Option<u16>,
    /// INFOv2 can be opted in.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reinit: bool,
    /// MIG_DATA_SIZE can be asked.
    #[serde(default, skip_serializing_if = "is_false")]
    pub data_size: bool,
    /// The state digest can be asked.
    #[serde(default, skip_serializing_if = "is_false")]
    pub state_digest: bool,
    /// Bodies are received whole, so writes need not be small.
    #[serde(default, skip_serializing_if = "is_false")]
    pub whole_messages: bool,
    /// A reset leads to RUNNING.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reset_runs: bool,
}

impl MigrationCapabilities {
    /// The command that asks for precopy information, if it can be asked. A number that the protocol uses
    /// for something else is no offer: asking there would do that.
    pub fn precopy_info_command(&self) -> Option<Command> {
        let number = self.precopy_info_command.map_or(Command::PRECOPY_INFO, Command);
        let taken = number.0 <= Command::MIG_DATA_WRITE.0 || number == Command::STATE_DIGEST;
        (self.precopy_info && !taken).then_some(number)
    }
}

/// `capabilities`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The most fds of one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// The most data of one message, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// The most DMA mappings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// A second socket for the server's commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// Migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationCapabilities>,
}

impl Capabilities {
    /// The most data of one message, in bytes, with the default filled in; at least 1.
    pub fn max_data_xfer_bytes(&self) -> usize {
        let bytes = self.max_data_xfer_size.unwrap_or(DEFAULT_MAX_DATA_XFER_BYTES);
        usize::try_from(bytes).unwrap_or(usize::MAX).max(1)
    }

    /// The most fds of one message, with the default filled in.
    pub fn max_msg_fds(&self) -> usize {
        usize::try_from(self.max_msg_fds.unwrap_or(DEFAULT_MAX_MSG_FDS)).unwrap_or(usize::MAX)
    }

    /// The migration keys; all off where the peer has none.
    pub fn migration(&self) -> MigrationCapabilities {
        self.migration.unwrap_or_default()
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    #[serde(default)]
    capabilities: Capabilities,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawVersion {
    major: u16,
    minor: u16,
}

/// The payload of VERSION, both ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Must be equal on both sides.
    pub major: u16,
    /// The reply's is at most the request's.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// Why a VERSION was refused.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// Shorter than its fixed part.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The text is longer than anybody needs.
    #[error("capabilities of {0} bytes are above the limit of {JSON_BYTES_MAX}")]
    TooLong(usize),
    /// The text has no terminating NUL.
    #[error("capabilities do not end with NUL")]
    NotTerminated,
    /// The text is not JSON, or a known key has the wrong type.
    #[error("capabilities: {0}")]
    Json(#[from] serde_json::Error),
    /// A known key that must be an object is something else.
    #[error("capabilities: {0} is not an object")]
    NotAnObject(&'static str),
}

impl Version {
    /// Parses a payload.
    pub fn decode(payload: &[u8]) -> Result<Self, VersionError> {
        let (raw, text) = take::<RawVersion>("VERSION", payload)?;
        let capabilities = match text {
            [] => Capabilities::default(),
            _ if text.len() > JSON_BYTES_MAX => return Err(VersionError::TooLong(text.len())),
            [text @ .., 0] => parse_json(text)?,
            _ => return Err(VersionError::NotTerminated),
        };
        Ok(Self { major: raw.major, minor: raw.minor, capabilities })
    }

    /// The bytes of the payload.
    pub fn encode(&self) -> Vec<u8> {
        let envelope = Envelope { capabilities: self.capabilities.clone() };
        // Plain numbers and booleans always serialise.
        let text = serde_json::to_vec(&envelope).unwrap_or_else(|_| b"{}".to_vec());
        self.encode_with_text(&text)
    }

    /// As [`encode`](Self::encode), with capability text of the caller's.
    pub fn encode_with_text(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len() + 5);
        put(&mut out, &RawVersion { major: self.major, minor: self.minor });
        out.extend_from_slice(text);
        out.push(0);
        out
    }
}

/// serde takes a list for a struct as well, which no other peer does: objects are checked first.
fn parse_json(text: &[u8]) -> Result<Capabilities, VersionError> {
    let json: serde_json::Value = serde_json::from_slice(text)?;
    let is_object = |pointer, name| match json.pointer(pointer) {
        None | Some(serde_json::Value::Object(_)) => Ok(()),
        Some(_) => Err(VersionError::NotAnObject(name)),
    };
    is_object("", "the text")?;
    is_object("/capabilities", "capabilities")?;
    is_object("/capabilities/migration", "migration")?;
    is_object("/capabilities/twin_socket", "twin_socket")?;
    Ok(serde_json::from_value::<Envelope>(json)?.capabilities)
}

fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str) -> Result<Version, VersionError> {
        let bare = Version { major: 0, minor: 1, capabilities: Capabilities::default() };
        Version::decode(&bare.encode_with_text(text.as_bytes()))
    }

    #[test]
    fn libvfio_users_capabilities_are_understood() {
        let text = r#"{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, "migration": { "pgsize": 4096 } } }"#;
        let version = decode(text).unwrap();
        assert_eq!(version.capabilities.max_msg_fds(), 8);
        assert_eq!(version.capabilities.max_data_xfer_bytes(), 1 << 20);
        assert_eq!(version.capabilities.migration().pgsize, Some(4096));
        assert_eq!(version.capabilities.migration().precopy_info_command(), None);
    }

    #[test]
    fn unknown_keys_are_ignored_and_missing_ones_have_defaults() {
        let version =
            decode(r#"{"capabilities":{"write_multiple":true,"new":{"a":[1]}}, "more":1}"#)
                .unwrap();
        assert_eq!(version.capabilities, Capabilities::default());
        assert_eq!(version.capabilities.max_msg_fds(), 1);
        assert_eq!(decode("{}").unwrap().capabilities, Capabilities::default());
        let short = Version::decode(&[0, 0, 1, 0]).unwrap();
        assert_eq!((short.minor, short.capabilities), (1, Capabilities::default()));
    }

    #[test]
    fn wrong_types_missing_nul_and_long_texts_are_refused() {
        for text in [
            r#"{"capabilities":{"max_msg_fds":"8"}}"#,
            r#"{"capabilities":{"max_data_xfer_size":-1}}"#,
            r#"{"capabilities":{"migration":true}}"#,
            r#"{"capabilities":{"migration":{"precopy_info_command":70000,"precopy_info":true}}}"#,
            r#"{"capabilities":[]}"#,
            "{",
            "",
        ] {
            assert!(decode(text).is_err(), "{text}");
        }
        assert!(matches!(Version::decode(b"\0\0\x01\0{}"), Err(VersionError::NotTerminated)));
        let long = format!("{{{}}}", " ".repeat(JSON_BYTES_MAX));
        assert!(matches!(decode(&long), Err(VersionError::TooLong(_))));
        let deep = "[".repeat(10_000);
        assert!(decode(&format!("{{\"x\":{deep}")).is_err());
    }
}
