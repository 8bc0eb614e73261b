//! The device as the engine drives it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_migration::arcs::{SessionEffect, session_effect};
use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    PrecopyInfo, RawPrecopyInfo, ReadOutcome, path,
};

use super::ahead::ReadAhead;
use super::behind::WriteBehind;
use super::connection::{Connection, Reply, Request, broke};
use super::options::Options;
use super::pci::malformed;
use super::stream::{self, PIPELINE_DEPTH, Pace, ReadResult};
use super::{feature, logging};
use crate::codec::Command;
use crate::codec::feature::{
    DataSizeData, DeviceStateData, FixedData, MIG_DATA_SIZE, MIG_DEVICE_STATE,
};
use crate::codec::migration::{decode_digest, decode_precopy_info, encode_precopy_info};
use crate::codec::version::MigrationCapabilities;

/// The migration side of a device; see [`VfioUserDevice::migration`](super::VfioUserDevice::migration).
///
/// There is no data fd on vfio-user, but the session rules of one hold: it begins and ends with the
/// arcs of the protocol, and after a failed SET, a failed write, a read that ran into its time limit
/// or a reset it is dropped here, so that nothing is read from or written to a stream whose place is
/// not known (X9, X10). Calls without a session fail with ENODEV, as on a dead fd (X4).
pub struct VfioUserMigration {
    connection: Arc<Connection>,
    options: Options,
    announced: MigrationCapabilities,
    capabilities: DeviceCapabilities,
    /// The state, as far as known; `None` after anything that may have changed it unseen.
    state: Option<DeviceState>,
    /// There is a data session that can be trusted.
    session: bool,
    /// A failure that came after data of the same read.
    deferred: Option<DeviceError>,
    ahead: ReadAhead,
    behind: WriteBehind,
    resets_seen: u64,
    reinit: Reinit,
    pace: Pace,
}

/// What the next precopy information has to say of REINIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reinit {
    /// Nothing beyond the server's flag.
    Idle,
    /// A session of an earlier connection goes on: an edge may have been missed, so assume one.
    Assume,
    /// The last reply had REINIT: the next request acknowledges it.
    Acknowledge,
}

impl VfioUserMigration {
    pub(super) fn open(
        connection: Arc<Connection>,
        options: Options,
        announced: MigrationCapabilities,
    ) -> DeviceResult<Self> {
        let timeout = options.query_timeout;
        let capabilities = feature::probe_all(&connection.shared, &announced, timeout)?;
        let resets_seen = connection.shared.resets.load(Ordering::Acquire);
        let mut device = Self {
            connection,
            options,
            announced,
            capabilities,
            state: None,
            session: false,
            deferred: None,
            ahead: ReadAhead::default(),
            behind: WriteBehind::default(),
            resets_seen,
            reinit: Reinit::Idle,
            pace: Pace::default(),
        };
        // The server keeps the device's state between connections, a session included.
        let state = device.state()?;
        if state.is_saving() || state == DeviceState::Resuming {
            device.session = true;
            device.reinit = Reinit::Assume;
        }
        Ok(device)
    }

    /// Sees resets that came through the function side.
    fn notice_resets(&mut self) {
        let resets = self.connection.shared.resets.load(Ordering::Acquire);
        if resets != self.resets_seen {
            self.resets_seen = resets;
            self.drop_session();
            self.state = None;
        }
    }

    fn drop_session(&mut self) {
        self.session = false;
        self.deferred = None;
        self.ahead.clear();
        self.behind.abandon();
        self.reinit = Reinit::Idle;
    }

    fn begin_session(&mut self) {
        self.drop_session();
        self.behind.clear();
        self.session = true;
    }

    /// The state, asked where it is not known.
    fn known_state(&mut self) -> DeviceResult<DeviceState> {
        self.notice_resets();
        match self.state {
            Some(state) => Ok(state),
            None => self.state(),
        }
    }

    fn check_session(&self, call: &'static str) -> DeviceResult<()> {
        if self.session { Ok(()) } else { Err(DeviceError::Errno { call, errno: libc::ENODEV }) }
    }

    /// What a completed transition did to the session.
    fn follow(&mut self, from: Option<DeviceState>, to: DeviceState) {
        let flags = self.capabilities.flags;
        let hops = from.and_then(|from| Some((from, path(from, to, flags)?)));
        match hops {
            Some((from, hops)) => {
                let mut at = from;
                for hop in hops {
                    match session_effect(at, hop) {
                        SessionEffect::Keeps => {}
                        SessionEffect::BeginsSaving | SessionEffect::BeginsResuming => {
                            self.begin_session();
                        }
                        SessionEffect::Ends => self.drop_session(),
                    }
                    at = hop;
                }
            }
            // The way is not known: only a state without a session is certain.
            None if to.is_saving() => self.drop_session(),
            None if to == DeviceState::Resuming => self.begin_session(),
            None => self.drop_session(),
        }
        self.state = Some(to);
    }

    fn query(&self, call: &'static str, command: Command, fixed: &[u8]) -> DeviceResult<Reply> {
        let timeout = self.options.query_timeout;
        let request = Request { call, command, fixed, data: &[], fds: &[], timeout };
        self.connection.shared.call(request)
    }

    fn depth(&self) -> usize {
        if self.announced.whole_messages { PIPELINE_DEPTH } else { 1 }
    }

    /// Nothing is under way any more; answers how many bytes of the stream are here and not read.
    fn wait_ahead(&mut self) -> DeviceResult<usize> {
        let waited = self.ahead.wait(&self.connection.shared);
        if waited.is_err() {
            self.drop_session();
        }
        waited
    }

    /// What a read in `state` found.
    fn found(&mut self, state: DeviceState, result: ReadResult) -> DeviceResult<ReadOutcome> {
        // A read is an acknowledgement of its own: the server forgets the flag with it.
        if self.reinit == Reinit::Acknowledge {
            self.reinit = Reinit::Idle;
        }
        if result.error.as_ref().is_some_and(DeviceError::is_time_out) {
            // The data that comes too late is lost, and with it the place in the stream.
            self.drop_session();
        }
        let nothing_now = |error: &DeviceError| {
            state.is_precopy() && matches!(error, DeviceError::Errno { errno: libc::ENOMSG, .. })
        };
        match (result.filled, result.error) {
            (0, Some(error)) if nothing_now(&error) => Ok(ReadOutcome::NothingNow),
            (0, Some(error)) => Err(error),
            (0, None) if state.is_precopy() => Ok(ReadOutcome::NothingNow),
            (0, None) => {
                let ended = self.ahead.end(&self.connection.shared);
                if ended.is_err() {
                    self.drop_session();
                }
                ended.map(|()| ReadOutcome::End)
            }
            (filled, error) => {
                self.deferred = error.filter(|error| !nothing_now(error) && self.session);
                Ok(ReadOutcome::Data(filled))
            }
        }
    }
}

impl MigratableDevice for VfioUserMigration {
    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        self.notice_resets();
        let call = "GET MIG_DEVICE_STATE";
        let (shared, timeout) = (&self.connection.shared, self.options.query_timeout);
        let expected = size_of::<DeviceStateData>();
        let data = feature::get(shared, call, MIG_DEVICE_STATE, &[], expected, timeout)?;
        let raw = feature::parse::<DeviceStateData>(call, &data)?.device_state;
        self.state = DeviceState::from_raw(raw);
        if !self.state.is_some_and(|state| state.is_saving() || state == DeviceState::Resuming) {
            // The device may have been reset by its guest.
            self.drop_session();
        }
        // Future states are tolerated (F10), but have no name here.
        self.state.ok_or_else(|| broke(call, format!("state {raw} is not known")))
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        let call = "SET MIG_DEVICE_STATE";
        let connection = Arc::clone(&self.connection);
        // A write that failed must not end in a state that says that all was loaded. And what is under way is
        // answered first, though the server works in order: nothing of it may come out after the change.
        self.settle()?;
        self.wait_ahead()?;
        let _one_at_a_time = connection.shared.reset_or_change();
        let from = self.known_state();
        if let Err(DeviceError::Gone { .. }) = from {
            return from.map(drop);
        }
        let mut data = Vec::new();
        DeviceStateData { device_state: target.as_raw(), data_fd: 0 }.encode(&mut data);
        let (shared, timeout) = (&self.connection.shared, self.options.state_timeout);
        match feature::set(shared, call, MIG_DEVICE_STATE, &data, timeout) {
            Ok(_) => {
                self.follow(from.ok(), target);
                Ok(())
            }
            Err(error) => {
                self.drop_session();
                self.state = None;
                match error {
                    DeviceError::Errno { errno, .. } => {
                        let state = self.state().ok();
                        Err(DeviceError::Transition { target, state, errno })
                    }
                    other => Err(other),
                }
            }
        }
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        let call = "PRECOPY_INFO";
        if self.known_state()?.is_precopy() {
            self.check_session(call)?;
        }
        let opted_in = self.capabilities.precopy_info_v2;
        let mut request = RawPrecopyInfo::request();
        if opted_in && self.reinit == Reinit::Acknowledge {
            request.flags = PRECOPY_INFO_REINIT;
        }
        let raw = self.precopy_info_raw(request)?;
        let mut flags = raw.flags;
        if opted_in && self.reinit == Reinit::Assume {
            flags |= PRECOPY_INFO_REINIT;
        }
        let seen = opted_in && raw.flags & PRECOPY_INFO_REINIT != 0;
        self.reinit = if seen { Reinit::Acknowledge } else { Reinit::Idle };
        Ok(PrecopyInfo::from_raw(opted_in, flags, raw.initial_bytes, raw.dirty_bytes))
    }

    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        // Done when the device was opened, where the server offers it.
        match self.capabilities.precopy_info_v2 {
            true => Ok(()),
            false => Err(DeviceError::Unsupported { call: "MIG_PRECOPY_INFOv2" }),
        }
    }

    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        let call = "PRECOPY_INFO";
        let command = self.announced.precopy_info_command();
        let command = command.filter(|_| self.capabilities.precopy_info);
        let command = command.ok_or(DeviceError::Unsupported { call })?;
        let mut fixed = Vec::new();
        encode_precopy_info(&request, &mut fixed);
        let reply = self.query(call, command, &fixed)?;
        decode_precopy_info(&reply.payload).map_err(|error| malformed(call, error))
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        let call = "MIG_DATA_SIZE";
        if !self.capabilities.data_size {
            return Err(DeviceError::Unsupported { call });
        }
        self.notice_resets();
        let held = self.wait_ahead()? as u64;
        let (shared, timeout) = (&self.connection.shared, self.options.query_timeout);
        let expected = size_of::<DataSizeData>();
        let data = feature::get(shared, call, MIG_DATA_SIZE, &[], expected, timeout)?;
        // What was read ahead is still to be read, for the caller.
        Ok(feature::parse::<DataSizeData>(call, &data)?.stop_copy_length.saturating_add(held))
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        let call = "MIG_DATA_READ";
        let state = self.known_state()?;
        self.check_session(call)?;
        if let Some(error) = self.deferred.take() {
            return Err(error);
        }
        if buf.is_empty() {
            return Err(DeviceError::Errno { call, errno: libc::EINVAL });
        }
        let shared = &self.connection.shared;
        if !self.ahead.is_empty() {
            let result = self.ahead.read(shared, buf);
            return self.found(state, result);
        }
        let (limit, depth) = (shared.limits.max_data_xfer_bytes, self.depth());
        let chunk = match state.is_precopy() {
            true => self.pace.chunk_bytes(limit, depth),
            false => limit,
        };
        let timeout = self.options.data_timeout;
        let (result, took) = stream::timed(|| stream::read(shared, buf, chunk, depth, timeout));
        self.pace.record(result.filled, took);
        self.found(state, result)
    }

    fn read_ahead(&mut self, buf: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
        let state = self.known_state()?;
        let ahead = state == DeviceState::StopCopy && self.announced.whole_messages;
        if !ahead || buf.is_empty() || self.deferred.is_some() || !self.ahead.fits(buf.len()) {
            return self.read(buf);
        }
        self.check_session("MIG_DATA_READ")?;
        let shared = &self.connection.shared;
        let chunk = shared.limits.max_data_xfer_bytes;
        let result = self.ahead.exchange(shared, buf, chunk, self.options.data_timeout);
        self.found(state, result)
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        let taken = self.write_behind(buf)?;
        self.settle()?;
        Ok(taken)
    }

    fn write_behind(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        let call = "MIG_DATA_WRITE";
        self.known_state()?;
        self.check_session(call)?;
        if buf.is_empty() {
            return Err(DeviceError::Errno { call, errno: libc::EINVAL });
        }
        let (shared, depth) = (&self.connection.shared, self.depth());
        let limit = shared.limits.max_data_xfer_bytes;
        let chunk = self.capabilities.max_write_bytes.unwrap_or(limit);
        let sent = self.behind.write(shared, buf, chunk, depth, self.options.data_timeout);
        if sent.is_err() {
            self.drop_session();
        }
        sent?;
        if !self.announced.whole_messages {
            self.settle()?;
        }
        Ok(buf.len())
    }

    fn unsettled_bytes(&self) -> u64 {
        self.behind.bytes() as u64
    }

    fn settle(&mut self) -> DeviceResult<()> {
        self.notice_resets();
        let settled = self.behind.settle(&self.connection.shared);
        if settled.is_err() {
            self.drop_session();
        }
        settled
    }

    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        let timeout = self.options.query_timeout;
        let own_server = self.announced.whole_messages;
        logging::start(&self.connection.shared, ranges, page_size, own_server, timeout)
    }

    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        let own_server = self.announced.whole_messages;
        let (shared, timeout) = (&self.connection.shared, self.options.query_timeout);
        logging::report(shared, range, page_size, bitmap, own_server, timeout)
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        logging::stop(&self.connection.shared, self.options.query_timeout)
    }

    fn reset(&mut self) -> DeviceResult<()> {
        let (call, command) = ("DEVICE_RESET", Command::DEVICE_RESET);
        let timeout = self.options.state_timeout;
        let shared = &self.connection.shared;
        // What becomes of what is under way does not matter any more: a stream that hangs is a reason for a reset.
        self.ahead.clear();
        self.behind.clear();
        let reset =
            shared.call(Request { call, command, fixed: &[], data: &[], fds: &[], timeout });
        self.drop_session();
        self.state = None;
        reset.map(drop)
    }

    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        let call = "STATE_DIGEST";
        if !self.announced.state_digest {
            return Ok(None);
        }
        match self.query(call, Command::STATE_DIGEST, &[]) {
            Ok(reply) => {
                decode_digest(&reply.payload).map(Some).map_err(|error| malformed(call, error))
            }
            Err(error) if feature::is_unsupported(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
