//! VERSION, the server's side.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vfio_migration::DeviceCapabilities;

use super::options::ServerOptions;
use crate::codec::header::{CONTROL_BYTES_MAX, HEADER_BYTES};
use crate::codec::version::{
    Capabilities, MAJOR, MAX_DATA_XFER_BYTES, MINOR, MigrationCapabilities, TwinSocket, Version,
};
use crate::codec::{Command, Header, MessageKind};
use crate::wire::{Channel, SCM_FDS_MAX, SendError};

/// The most DMA mappings of a client.
pub(super) const DMA_MAPS_MAX: usize = 65535;

/// What libvfio-user says of itself, to the letter.
const COMPAT_TEXT: &str = r#"{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, "migration": { "pgsize": 4096 } } }"#;
const COMPAT_TEXT_NO_MIGRATION: &str =
    r#"{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576 } }"#;
const COMPAT_MAX_DATA_XFER_BYTES: usize = 1 << 20;
const COMPAT_MAX_MSG_FDS: usize = 8;

/// The most fds of one message of the client's. One that is not told of a number takes it to be one.
pub(super) fn fds_max(options: &ServerOptions) -> usize {
    match options.libvfio_user_compat {
        true => COMPAT_MAX_MSG_FDS,
        false => options.max_msg_fds.clamp(1, SCM_FDS_MAX),
    }
}

/// The result.
pub(super) struct Agreed {
    /// The most data of one message, in bytes.
    pub(super) max_data_xfer_bytes: usize,
    /// The most fds of one message to the client.
    pub(super) client_fds_max: usize,
    /// Our end of the twin socket.
    pub(super) twin: Option<Channel>,
}

/// Waits for the client's VERSION and answers it. The reason, where the connection is to be closed.
pub(super) fn negotiate(
    channel: &Channel,
    options: &ServerOptions,
    device: Option<&DeviceCapabilities>,
) -> Result<Agreed, String> {
    let mut fds = Vec::new();
    let header = channel
        .receive_header_now(CONTROL_BYTES_MAX + HEADER_BYTES, &mut fds)
        .map_err(|error| error.to_string())?;
    let mut payload = vec![0; header.payload_bytes];
    channel.receive_body(&mut payload, &mut fds).map_err(|error| error.to_string())?;
    match parse(&header, &payload, fds.is_empty()) {
        Ok(version) => answer(channel, options, device, &header, &version),
        Err(reason) => {
            // The client gets a refusal where it understands one; the connection closes either way.
            let refusal = header.error_reply(libc::EINVAL, 0).encode();
            let _ = channel.send(&refusal, &[], &[], deadline(options));
            Err(reason)
        }
    }
}

fn parse(header: &Header, payload: &[u8], no_fds: bool) -> Result<Version, String> {
    let is_command = matches!(header.kind, MessageKind::Command { no_reply: false });
    if header.command != Command::VERSION || !is_command || !no_fds {
        return Err("the first message is not VERSION".into());
    }
    let version = Version::decode(payload).map_err(|error| error.to_string())?;
    if version.major != MAJOR {
        return Err(format!("the client speaks major version {}", version.major));
    }
    Ok(version)
}

fn answer(
    channel: &Channel,
    options: &ServerOptions,
    device: Option<&DeviceCapabilities>,
    header: &Header,
    client: &Version,
) -> Result<Agreed, String> {
    let proposed = &client.capabilities;
    let client_fds_max = proposed.max_msg_fds();
    let minor = client.minor.min(MINOR);
    if options.libvfio_user_compat {
        let text = if device.is_some() { COMPAT_TEXT } else { COMPAT_TEXT_NO_MIGRATION };
        let reply = Version { major: MAJOR, minor, capabilities: Capabilities::default() };
        let payload = reply.encode_with_text(text.as_bytes());
        send(channel, options, header, &payload, None)?;
        return Ok(Agreed {
            max_data_xfer_bytes: proposed.max_data_xfer_bytes().min(COMPAT_MAX_DATA_XFER_BYTES),
            client_fds_max,
            twin: None,
        });
    }
    let max_data_xfer_bytes = options
        .max_data_xfer_bytes
        .clamp(1, MAX_DATA_XFER_BYTES)
        .min(proposed.max_data_xfer_bytes());
    let twin_wanted = proposed.twin_socket.is_some_and(|twin| twin.supported);
    let twin = match twin_wanted && options.twin_socket && client_fds_max > 0 {
        true => Some(UnixStream::pair().map_err(|error| format!("twin socket: {error}"))?),
        false => None,
    };
    // The list must be a subset of what the client proposed.
    let capabilities = Capabilities {
        max_msg_fds: proposed.max_msg_fds.map(|_| fds_max(options) as u64),
        max_data_xfer_size: proposed.max_data_xfer_size.map(|_| max_data_xfer_bytes as u64),
        max_dma_maps: proposed.max_dma_maps.map(|_| DMA_MAPS_MAX as u64),
        twin_socket: twin.is_some().then_some(TwinSocket { supported: true, fd_index: Some(0) }),
        migration: proposed.migration.zip(device).map(|(p, d)| offer(options, &p, d)),
    };
    let payload = Version { major: MAJOR, minor, capabilities }.encode();
    let (ours, theirs) = twin.unzip();
    send(channel, options, header, &payload, theirs.as_ref())?;
    // Nothing that comes there has an fd.
    let twin = ours.map(|ours| Channel::new(ours, 0, options.stall_timeout));
    Ok(Agreed {
        max_data_xfer_bytes,
        client_fds_max,
        twin: twin.transpose().map_err(|error| format!("twin socket: {error}"))?,
    })
}

/// Our extension, as far as the client knows it and the device has it.
fn offer(
    options: &ServerOptions,
    proposed: &MigrationCapabilities,
    device: &DeviceCapabilities,
) -> MigrationCapabilities {
    let offered = Offered::new(options, device);
    MigrationCapabilities {
        pgsize: proposed.pgsize.map(|_| 4096),
        precopy_info: proposed.precopy_info && offered.precopy_info,
        precopy_info_command: None,
        reinit: proposed.reinit && offered.reinit,
        data_size: proposed.data_size && offered.data_size,
        state_digest: proposed.state_digest && options.state_digest,
        whole_messages: proposed.whole_messages,
        reset_runs: proposed.reset_runs && device.reset_runs,
    }
}

/// What is offered of the device's optional features.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offered {
    pub(super) pre_copy: bool,
    pub(super) p2p: bool,
    pub(super) precopy_info: bool,
    pub(super) reinit: bool,
    pub(super) data_size: bool,
    pub(super) dma_logging: bool,
}

impl Offered {
    pub(super) fn new(options: &ServerOptions, device: &DeviceCapabilities) -> Self {
        let own = !options.libvfio_user_compat;
        let pre_copy = options.pre_copy && device.flags.pre_copy();
        let precopy_info = own && options.precopy_info && pre_copy && device.precopy_info;
        Self {
            pre_copy,
            p2p: own && options.p2p && device.flags.p2p(),
            precopy_info,
            reinit: precopy_info && options.reinit && device.precopy_info_v2,
            data_size: own && options.data_size && device.data_size,
            dma_logging: options.dma_logging && device.dma_logging,
        }
    }
}

fn send(
    channel: &Channel,
    options: &ServerOptions,
    header: &Header,
    payload: &[u8],
    fd: Option<&UnixStream>,
) -> Result<(), String> {
    let fds = fd.map(AsFd::as_fd);
    let head = header.reply(payload.len()).encode();
    channel.send(&head, payload, fds.as_slice(), deadline(options)).map_err(|error| match error {
        SendError::TimedOut => "the client takes no messages".into(),
        SendError::Broken(error) => error.to_string(),
    })
}

fn deadline(options: &ServerOptions) -> Option<Instant> {
    Instant::now().checked_add(options.stall_timeout)
}
