//! VERSION: what client and server agree on before anything else.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::Limits;
use super::options::Options;
use crate::codec::header::{CONTROL_BYTES_MAX, HEADER_BYTES, message_limit_bytes};
use crate::codec::version::{
    Capabilities, MAJOR, MAX_DATA_XFER_BYTES, MINOR, MigrationCapabilities, TwinSocket, Version,
};
use crate::codec::{Command, Header, MessageKind};
use crate::error::VfioUserError;
use crate::wire::{Channel, SCM_FDS_MAX, SendError};

/// The most fds of one message that this client takes.
pub(super) const MAX_MSG_FDS: usize = 16;

/// The result of the negotiation.
pub(crate) struct Agreed {
    pub(crate) limits: Limits,
    pub(crate) migration: MigrationCapabilities,
    pub(crate) twin: Option<Channel>,
}

/// Negotiates on a fresh connection, whose stall timeout is that of the set-up.
pub(crate) fn negotiate(channel: &Channel, options: &Options) -> Result<Agreed, VfioUserError> {
    let refused = |what: String| VfioUserError::Version(what);
    let proposed = proposal(options);
    let version = Version { major: MAJOR, minor: MINOR, capabilities: proposed.clone() };
    let payload = version.encode();
    let header = Header::command(0, Command::VERSION, payload.len());
    let deadline = Some(Instant::now() + options.setup_timeout);
    channel.send(&header.encode(), &payload, &[], deadline).map_err(|error| match error {
        SendError::TimedOut => refused("the server takes no message".into()),
        SendError::Broken(error) => refused(error.to_string()),
    })?;

    let mut fds = Vec::new();
    let header = channel
        .receive_header_now(CONTROL_BYTES_MAX + HEADER_BYTES, &mut fds)
        .map_err(|error| refused(error.to_string()))?;
    let mut payload = vec![0; header.payload_bytes];
    channel.receive_body(&mut payload, &mut fds).map_err(|error| refused(error.to_string()))?;
    if (header.msg_id, header.command) != (0, Command::VERSION) {
        return Err(refused("the first message of the server is not the reply to VERSION".into()));
    }
    match header.kind {
        MessageKind::Reply => {}
        MessageKind::ErrorReply { errno } => {
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(refused(format!("the server refused it: {error}")));
        }
        MessageKind::Command { .. } => {
            return Err(refused("the server sent a command before its VERSION".into()));
        }
    }
    let version = Version::decode(&payload).map_err(|error| refused(error.to_string()))?;
    if version.major != MAJOR || version.minor > MINOR {
        let (major, minor) = (version.major, version.minor);
        return Err(refused(format!("the server answers version {major}.{minor}")));
    }
    agree(&proposed, &version.capabilities, fds, options)
}

fn proposal(options: &Options) -> Capabilities {
    Capabilities {
        max_msg_fds: Some(MAX_MSG_FDS as u64),
        max_data_xfer_size: Some(options.max_data_xfer_bytes.clamp(1, MAX_DATA_XFER_BYTES) as u64),
        max_dma_maps: None,
        twin_socket: options.twin_socket.then_some(TwinSocket { supported: true, fd_index: None }),
        migration: Some(MigrationCapabilities {
            pgsize: Some(4096),
            precopy_info: true,
            precopy_info_command: None,
            reinit: true,
            data_size: true,
            state_digest: true,
            whole_messages: true,
            reset_runs: true,
        }),
    }
}

fn agree(
    proposed: &Capabilities,
    granted: &Capabilities,
    fds: Vec<OwnedFd>,
    options: &Options,
) -> Result<Agreed, VfioUserError> {
    let max_data_xfer_bytes = granted.max_data_xfer_bytes().min(proposed.max_data_xfer_bytes());
    let limits = Limits {
        max_data_xfer_bytes,
        message_bytes: message_limit_bytes(max_data_xfer_bytes),
        max_msg_fds: granted.max_msg_fds().min(SCM_FDS_MAX),
    };
    let twin = granted.twin_socket.filter(|twin| twin.supported && options.twin_socket);
    let twin = match twin {
        None => None,
        Some(twin) => {
            let index = twin.fd_index.and_then(|index| usize::try_from(index).ok());
            let fd = index.and_then(|index| fds.into_iter().nth(index)).ok_or_else(|| {
                VfioUserError::Version("the server grants a twin socket but sends none".into())
            })?;
            // DMA commands have no fds.
            let channel = Channel::new(UnixStream::from(fd), 0, options.stall_timeout);
            Some(channel.map_err(|source| VfioUserError::Io { what: "twin socket", source })?)
        }
    };
    Ok(Agreed { limits, migration: granted.migration(), twin })
}
