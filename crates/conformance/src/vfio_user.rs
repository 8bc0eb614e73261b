//! [`Subject`] for a vfio-user server: raw messages over the client's connection.
//!
//! There is no data fd: a session is part of the connection, reading and writing are commands, and the
//! number in `data_fd` is unused. A size of 0 in a MIG_DATA_READ reply stands for 0 and for ENOMSG alike.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration::{DeviceError, DmaRange, PciFunction};
use vfio_user::codec::Command;
use vfio_user::codec::feature::{FixedData, LoggingReportData, LoggingStart};
use vfio_user::codec::migration::{MigData, decode_digest};
use vfio_user::{Options, RawDevice, VfioUserError};

use crate::subject::{
    About, Call, CallError, FdAnswer, Kind, StreamId, Subject, feature as features,
};

/// The most data of one MIG_DATA_WRITE that every known server survives, in bytes.
const FOREIGN_WRITE_BYTES: usize = 32_000;
/// Connecting, negotiating, reading the shape, and a region access.
const SETUP_TIMEOUT: Duration = Duration::from_secs(5);

/// A device behind a vfio-user socket.
pub struct VfioUserSubject {
    path: PathBuf,
    device: Option<RawDevice>,
    deadline: Instant,
}

impl VfioUserSubject {
    /// Connects to the server at `path`.
    pub fn open(path: &Path) -> Result<Self, VfioUserError> {
        let device = RawDevice::open(path, options())?;
        let deadline = Instant::now() + SETUP_TIMEOUT;
        Ok(Self { path: path.into(), device: Some(device), deadline })
    }

    fn device(&self) -> Call<&RawDevice> {
        self.device.as_ref().ok_or_else(|| CallError::Gone("the connection was closed".into()))
    }

    fn call(
        &self,
        call: &'static str,
        command: Command,
        fixed: &[u8],
        data: &[u8],
    ) -> Call<Vec<u8>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Some(left.max(Duration::from_millis(1)));
        self.device()?.call(call, command, fixed, data, timeout).map_err(of_device)
    }

    /// A feature with data of any length; answers the data of the reply.
    fn raw_feature(&self, argsz: u32, flags: u32, data: &[u8]) -> Call<Vec<u8>> {
        let mut fixed = Vec::with_capacity(8);
        fixed.extend_from_slice(&argsz.to_ne_bytes());
        fixed.extend_from_slice(&flags.to_ne_bytes());
        let mut reply = self.call("DEVICE_FEATURE", Command::DEVICE_FEATURE, &fixed, data)?;
        let echoed = reply.get(4..8).map(|bytes| bytes.try_into().map_or(0, u32::from_ne_bytes));
        if echoed != Some(flags) {
            let got = reply.get(..8).unwrap_or(&reply);
            let what = format!(
                "a DEVICE_FEATURE reply that begins with {got:02x?}, flags {flags:#x} asked"
            );
            return Err(CallError::Protocol(what));
        }
        reply.drain(..8);
        Ok(reply)
    }
}

fn options() -> Options {
    Options {
        setup_timeout: SETUP_TIMEOUT,
        region_timeout: SETUP_TIMEOUT,
        stall_timeout: SETUP_TIMEOUT,
        ..Options::default()
    }
}

/// A client's error as a raw call's.
fn of_device(error: DeviceError) -> CallError {
    match error {
        DeviceError::TimedOut { .. } => CallError::TimedOut,
        DeviceError::Gone { reason, .. } => CallError::Gone(reason),
        DeviceError::Protocol { what, .. } => CallError::Protocol(what),
        other => match other.errno() {
            Some(errno) => CallError::Errno(errno),
            None => CallError::Protocol(other.to_string()),
        },
    }
}

fn short(what: &str, got: usize, need: usize) -> CallError {
    CallError::Protocol(format!("{what} has {got} bytes, {need} are needed"))
}

impl Subject for VfioUserSubject {
    fn about(&self) -> About {
        let announced = match &self.device {
            Some(device) => device.announced(),
            None => Default::default(),
        };
        let own = if announced.whole_messages { "with" } else { "without" };
        About {
            kind: Kind::VfioUser,
            name: format!("vfio-user:{}", self.path.display()),
            opened: format!("vfio-user socket, server {own} the extension of docs/vfio-user.md"),
        }
    }

    fn set_deadline(&mut self, at: Instant) {
        self.deadline = at;
    }

    fn reopen(&mut self) -> Call<()> {
        // The server serves one client at a time.
        self.device = None;
        let opened = RawDevice::open(&self.path, options());
        self.device = Some(opened.map_err(|error| CallError::Gone(error.to_string()))?);
        Ok(())
    }

    fn feature(&mut self, argsz: u32, flags: u32, payload: &mut [u8]) -> Call<()> {
        // A GET of a migration feature carries nothing.
        let probe = flags & features::PROBE != 0;
        let carries = probe || flags & features::SET != 0;
        let reply = self.raw_feature(argsz, flags, if carries { payload } else { &[] })?;
        if carries {
            return Ok(());
        }
        let got = reply.len();
        let data =
            reply.get(..payload.len()).ok_or_else(|| short("a GET reply", got, payload.len()))?;
        payload.copy_from_slice(data);
        Ok(())
    }

    fn set_state(&mut self, state: u32) -> (Call<()>, FdAnswer) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&state.to_ne_bytes());
        let flags = features::MIG_DEVICE_STATE | features::SET;
        (self.feature(16, flags, &mut payload), FdAnswer::Absent)
    }

    fn get_state(&mut self) -> Call<(u32, FdAnswer)> {
        let mut payload = [0; 8];
        self.feature(16, features::MIG_DEVICE_STATE | features::GET, &mut payload)?;
        let [a, b, c, d, ..] = payload;
        Ok((u32::from_ne_bytes([a, b, c, d]), FdAnswer::Absent))
    }

    fn read(&mut self, _stream: StreamId, buf: &mut [u8]) -> Call<usize> {
        let size = buf.len().min(self.device()?.max_data_xfer_bytes());
        let mut fixed = Vec::with_capacity(MigData::SIZE);
        MigData::new(size as u32).encode(&mut fixed);
        let reply = self.call("MIG_DATA_READ", Command::MIG_DATA_READ, &fixed, &[])?;
        let data =
            MigData::decode(&reply).map_err(|error| CallError::Protocol(error.to_string()))?;
        let got = data.size as usize;
        if got > size {
            let what = format!("a MIG_DATA_READ of {size} bytes is answered with {got}");
            return Err(CallError::Protocol(what));
        }
        let bytes = reply.get(MigData::SIZE..MigData::SIZE + got);
        let bytes = bytes
            .ok_or_else(|| short("a MIG_DATA_READ reply", reply.len(), MigData::SIZE + got))?;
        if let Some(room) = buf.get_mut(..got) {
            room.copy_from_slice(bytes);
        }
        Ok(got)
    }

    fn write(&mut self, _stream: StreamId, data: &[u8]) -> Call<usize> {
        let data = data.get(..self.write_bytes_max()).unwrap_or(data);
        let mut fixed = Vec::with_capacity(MigData::SIZE);
        MigData::new(data.len() as u32).encode(&mut fixed);
        self.call("MIG_DATA_WRITE", Command::MIG_DATA_WRITE, &fixed, data)?;
        Ok(data.len())
    }

    fn close(&mut self, _stream: StreamId) {}

    fn precopy_info(&mut self, _stream: StreamId, info: &mut [u8; 24]) -> Call<()> {
        let command = self.device()?.announced().precopy_info_command();
        let command = command.ok_or(CallError::Unavailable(
            "vfio-user has no PRECOPY_INFO, and the server does not announce the extension",
        ))?;
        let reply = self.call("PRECOPY_INFO", command, info, &[])?;
        let answer =
            reply.get(..24).ok_or_else(|| short("a PRECOPY_INFO reply", reply.len(), 24))?;
        info.copy_from_slice(answer);
        Ok(())
    }

    fn logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Call<u64> {
        if ranges.is_empty() {
            return Err(CallError::Unavailable("on vfio-user no ranges mean everything"));
        }
        let mut data = Vec::new();
        LoggingStart { page_size, ranges: ranges.to_vec() }.encode(&mut data);
        let argsz = 8 + data.len() as u32;
        let flags = features::DMA_LOGGING_START | features::SET;
        let reply = self.raw_feature(argsz, flags, &data)?;
        let used = reply.get(..8).and_then(|bytes| bytes.try_into().ok());
        used.map(u64::from_ne_bytes)
            .ok_or_else(|| short("a DMA_LOGGING_START reply", reply.len(), 8))
    }

    fn logging_report(&mut self, range: DmaRange, page_size: u64, bitmap: &mut [u64]) -> Call<()> {
        let mut data = Vec::new();
        let ask = LoggingReportData { iova: range.iova, length: range.length, page_size };
        ask.encode(&mut data);
        let argsz = 8 + data.len() + bitmap.len() * 8;
        let flags = features::DMA_LOGGING_REPORT | features::GET;
        let reply = self.raw_feature(argsz as u32, flags, &data)?;
        let words = reply.get(data.len()..).unwrap_or_default().chunks_exact(8);
        for (word, bytes) in bitmap.iter_mut().zip(words) {
            *word |= u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
        }
        Ok(())
    }

    fn logging_stop(&mut self) -> Call<()> {
        self.raw_feature(8, features::DMA_LOGGING_STOP | features::SET, &[]).map(drop)
    }

    fn reset(&mut self) -> Call<()> {
        self.call("DEVICE_RESET", Command::DEVICE_RESET, &[], &[]).map(drop)
    }

    fn digest(&mut self) -> Call<Option<[u8; 32]>> {
        if !self.device()?.announced().state_digest {
            return Ok(None);
        }
        let reply = self.call("STATE_DIGEST", Command::STATE_DIGEST, &[], &[])?;
        decode_digest(&reply).map(Some).map_err(|error| CallError::Protocol(error.to_string()))
    }

    fn pci(&self) -> Option<Arc<dyn PciFunction>> {
        let pci = self.device.as_ref()?.pci();
        // A device whose shape cannot be asked has no guest's part.
        pci.inspect_err(|error| tracing::debug!(%error, "no regions")).ok()
    }

    fn write_bytes_max(&self) -> usize {
        match &self.device {
            Some(device) if device.announced().whole_messages => device.max_data_xfer_bytes(),
            Some(device) => device.max_data_xfer_bytes().min(FOREIGN_WRITE_BYTES),
            None => FOREIGN_WRITE_BYTES,
        }
    }
}
