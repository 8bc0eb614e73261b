//! A connection from VERSION to its end: takes commands in order, answers them, cleans up.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_migration::{DeviceError, DeviceState, IrqIndex};

use super::link::{Link, Message};
use super::logging::Logging;
use super::memory::ClientMemory;
use super::negotiate::{Agreed, Offered};
use super::options::ServerOptions;
use super::{Kept, ServedDevice};
use crate::codec::{Command, DecodeError, MessageKind};

/// Bytes before the payload of a reply that is built in place.
pub(super) const REPLY_HEAD_BYTES: usize = crate::codec::header::HEADER_BYTES;

/// Why a command is not answered with success.
#[derive(Debug)]
pub(super) enum Refusal {
    /// An error reply with this errno.
    Errno(i32),
    /// An error reply that carries the request's payload, as libvfio-user sends some.
    Echo(i32),
    /// The connection closes.
    Close(String),
}

impl From<DecodeError> for Refusal {
    fn from(error: DecodeError) -> Self {
        tracing::debug!(%error, "vfio-user server: malformed command");
        Self::Errno(libc::EINVAL)
    }
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        tracing::debug!(%error, "vfio-user server: the device refused");
        Self::Errno(errno_of(&error))
    }
}

/// The errno by which a device's error travels.
pub(super) fn errno_of(error: &DeviceError) -> i32 {
    let errno = match error {
        DeviceError::Unsupported { .. } => libc::ENOTTY,
        DeviceError::Gone { .. } => libc::ENODEV,
        DeviceError::TimedOut { .. } => libc::ETIMEDOUT,
        other => other.errno().unwrap_or(libc::EIO),
    };
    // 0 or a negative number would not be an error on the wire.
    if errno > 0 { errno } else { libc::EIO }
}

/// One mapping of the client's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) size: u64,
    pub(super) offset: u64,
    pub(super) flags: u32,
    pub(super) has_fd: bool,
}

/// A connection.
pub(super) struct Session<'a> {
    pub(super) device: &'a mut ServedDevice,
    pub(super) kept: &'a mut Kept,
    pub(super) options: &'a ServerOptions,
    /// What of the device's migration is offered; `None`: nothing.
    pub(super) offered: Option<Offered>,
    pub(super) max_data_xfer_bytes: usize,
    pub(super) client_fds_max: usize,
    /// Memory without an fd.
    pub(super) memory: Arc<ClientMemory>,
    pub(super) mappings: BTreeMap<u64, Mapped>,
    pub(super) logging: Option<Logging>,
    /// The client opted in to INFOv2.
    pub(super) opted_in: bool,
    /// The reply under construction: room for the header, then the payload.
    pub(super) reply: Vec<u8>,
    /// How much of the kept read buffer goes with the reply.
    pub(super) reply_data_bytes: usize,
    /// The region whose fd goes with the reply.
    pub(super) reply_region_fd: Option<u32>,
    link: Arc<Link>,
    dma_link: Arc<Link>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        device: &'a mut ServedDevice,
        kept: &'a mut Kept,
        options: &'a ServerOptions,
        agreed: &Agreed,
        link: Arc<Link>,
        dma_link: Arc<Link>,
    ) -> Self {
        let memory = Arc::new(ClientMemory {
            link: Arc::clone(&dma_link),
            chunk_bytes: agreed.max_data_xfer_bytes,
            timeout: options.dma_timeout,
        });
        let capabilities = device.capabilities(options);
        Self {
            offered: capabilities.map(|capabilities| Offered::new(options, &capabilities)),
            device,
            kept,
            options,
            max_data_xfer_bytes: agreed.max_data_xfer_bytes,
            client_fds_max: agreed.client_fds_max,
            memory,
            mappings: BTreeMap::new(),
            logging: None,
            opted_in: false,
            reply: Vec::new(),
            reply_data_bytes: 0,
            reply_region_fd: None,
            link,
            dma_link,
        }
    }

    /// Serves commands until the connection ends; answers why it did.
    pub(super) fn run(mut self) -> String {
        let reason = loop {
            let message = match self.link.next_command() {
                Ok(message) => message,
                Err(reason) => break reason,
            };
            if let Err(reason) = self.serve(message) {
                break reason;
            }
        };
        // First, so that DMA of the device fails at once instead of waiting for nobody.
        self.link.end(&reason);
        self.dma_link.end(&reason);
        self.clean_up();
        reason
    }

    fn serve(&mut self, mut message: Message) -> Result<(), String> {
        let header = message.header;
        self.reply.clear();
        self.reply.resize(REPLY_HEAD_BYTES, 0);
        self.reply_data_bytes = 0;
        self.reply_region_fd = None;
        let answer = self.execute(&mut message);
        let no_reply = matches!(header.kind, MessageKind::Command { no_reply: true });
        if let Err(Refusal::Close(reason)) = answer {
            return Err(reason);
        }
        let sent = if no_reply { Ok(()) } else { self.answer(&message, answer) };
        self.link.recycle(message.body);
        sent
    }

    fn answer(&mut self, message: &Message, answer: Result<(), Refusal>) -> Result<(), String> {
        let (header, timeout) = (message.header, self.options.stall_timeout);
        let send_refusal = |errno, body: &[u8]| {
            let head = header.error_reply(errno, body.len()).encode();
            self.link.send(&head, body, &[], timeout)
        };
        match answer {
            Ok(()) => {
                let data = self.kept.read_buffer.get(..self.reply_data_bytes).unwrap_or_default();
                let fixed_bytes = self.reply.len().saturating_sub(REPLY_HEAD_BYTES);
                let payload_bytes = fixed_bytes + data.len();
                let head = header.reply(payload_bytes).encode();
                if let Some(place) = self.reply.get_mut(..REPLY_HEAD_BYTES) {
                    place.copy_from_slice(&head);
                }
                let fd = self.reply_region_fd.and_then(|region| self.device.pci.region_fd(region));
                let fds: Option<BorrowedFd<'_>> = fd.as_ref().map(|(fd, _)| fd.as_fd());
                self.link.send(&self.reply, data, fds.as_slice(), timeout)
            }
            Err(Refusal::Errno(errno)) => send_refusal(self.wire_errno(errno), &[]),
            Err(Refusal::Echo(errno)) => send_refusal(self.wire_errno(errno), message.body.bytes()),
            Err(Refusal::Close(reason)) => Err(reason),
        }
    }

    /// libvfio-user knows no ENOTTY.
    fn wire_errno(&self, errno: i32) -> i32 {
        match errno {
            libc::ENOTTY if self.options.libvfio_user_compat => libc::EINVAL,
            errno => errno,
        }
    }

    fn execute(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let command = message.header.command;
        if self.options.libvfio_user_compat {
            self.check_compat(command, message.body.bytes().len())?;
        }
        let fds = std::mem::take(&mut message.fds);
        let payload = message.body.bytes();
        match command {
            Command::DMA_MAP => self.dma_map(payload, fds),
            Command::DMA_UNMAP => self.dma_unmap(payload),
            Command::DEVICE_GET_INFO => self.device_info(payload),
            Command::GET_REGION_INFO => self.region_info(payload),
            Command::GET_IRQ_INFO => self.irq_info(payload),
            Command::SET_IRQS => self.set_irqs(payload, &fds),
            Command::REGION_READ => self.region_read(payload),
            Command::REGION_WRITE => self.region_write(payload),
            Command::DEVICE_RESET => self.reset(),
            Command::DEVICE_FEATURE => self.feature(payload),
            Command::MIG_DATA_READ => self.data_read(payload),
            Command::MIG_DATA_WRITE => self.data_write(payload),
            Command::PRECOPY_INFO => self.precopy_info(payload),
            Command::STATE_DIGEST => self.state_digest(),
            // VERSION comes once; the rest is not served or not known.
            other => {
                tracing::debug!(command = other.0, "vfio-user server: command refused");
                Err(Refusal::Errno(libc::EINVAL))
            }
        }
    }

    /// libvfio-user's filter in STOP and STOP_COPY, and its failure on large commands.
    fn check_compat(&mut self, command: Command, payload_bytes: usize) -> Result<(), Refusal> {
        if payload_bytes > super::COMPAT_PAYLOAD_BYTES_MAX {
            return Err(Refusal::Close(format!(
                "{} of {payload_bytes} bytes: the body is not received whole",
                command.name()
            )));
        }
        let Ok(migration) = self.migration() else { return Ok(()) };
        let stopped = matches!(migration.state()?, DeviceState::Stop | DeviceState::StopCopy);
        let allowed = matches!(
            command,
            Command::REGION_READ
                | Command::REGION_WRITE
                | Command::DEVICE_FEATURE
                | Command::MIG_DATA_READ
        );
        if stopped && !allowed { Err(Refusal::Errno(libc::EINVAL)) } else { Ok(()) }
    }

    /// The client is gone: its memory is unmapped, its eventfds are dropped, its log is closed. The
    /// device's state stays.
    fn clean_up(&mut self) {
        if self.logging.take().is_some_and(|logging| logging.on_device)
            && let Some(migration) = &mut self.device.migration
            && let Err(error) = migration.stop_dma_logging()
        {
            tracing::warn!(%error, "vfio-user server: stopping DMA logging");
        }
        for (iova, mapped) in std::mem::take(&mut self.mappings) {
            if let Err(error) = self.device.pci.dma_unmap(iova, mapped.size) {
                tracing::warn!(%error, iova, "vfio-user server: unmapping the client's memory");
            }
        }
        let irqs = &self.device.pci.info().irqs;
        for (index, irq) in IrqIndex::ALL.into_iter().zip(irqs) {
            if irq.count == 0 {
                continue;
            }
            if let Err(error) = self.device.pci.set_irq_eventfds(index, 0, &[]) {
                tracing::warn!(%error, ?index, "vfio-user server: dropping interrupts");
            }
        }
    }
}
