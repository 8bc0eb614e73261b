//! The device side of migration v2: states, sessions, streams.

use vfio_migration::arcs::{SessionEffect, next_hop, session_effect};
use vfio_migration::{DeviceError, DeviceResult, DeviceState, PrecopyInfo, RawPrecopyInfo};

use super::DeviceCore;
use crate::internals::Internals;
use crate::precopy::{self, Report, VFIO_MIG_GET_PRECOPY_INFO};
use crate::quirks::SizeClaim;
use crate::stream::loader::Loader;
use crate::stream::saver::{Context, Found, Saver, whole_stream_bytes};

const INFO: &str = "PRECOPY_INFO";
const DATA_SIZE: &str = "MIG_DATA_SIZE";
const OPT_IN: &str = "MIG_PRECOPY_INFOv2";
const READ: &str = "read";
const WRITE: &str = "write";

/// What QEMU saw from mlx5 and from a vGPU (commit 7c20d5f31d).
const GARBAGE_STOP_COPY: u64 = 18_446_744_073_709_543_408;
const GARBAGE_INITIAL: u64 = 18_446_744_073_708_667_040;

/// Which way a session's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Out of the device; the fd is read-only.
    Saving,
    /// Into the device; the fd is write-only.
    Resuming,
}

/// A data session, where the kernel has a data_fd. Numbers never repeat on a device, so a session that
/// is kept over its end answers ENODEV (X4, X9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    /// From 1 on.
    pub number: u64,
    /// Which way its bytes go.
    pub direction: Direction,
}

/// One direct arc of a SET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    /// Where it begins.
    pub from: DeviceState,
    /// Where it leads.
    pub to: DeviceState,
    /// How long the device takes for it, in ns. It goes on working in `from` until then.
    pub took_ns: u64,
}

/// What a whole SET did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetOutcome {
    /// The session the SET handed out (X1).
    pub session: Option<Session>,
    /// How long the device takes for it, in ns.
    pub took_ns: u64,
}

/// What a read found, as the kernel's read() would tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawRead {
    /// So many bytes, at least one.
    Data(usize),
    /// -1, ENOMSG (S1).
    NoMessage,
    /// 0: the end in STOP_COPY (S3), and with `zero-at-temporary-end` nothing now in PRE_COPY.
    Zero,
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes taken.
    pub bytes: usize,
    /// How long the device takes for them, in ns.
    pub took_ns: u64,
}

/// What belongs to migrations and not to the state that migrates.
#[derive(Clone, Debug, Default)]
pub(super) struct Bookkeeping {
    pub(super) opted_in: bool,
    pub(super) wedged: bool,
    sessions: u64,
    live: Option<(Session, Live)>,
    /// SETs so far, and the one in which RESUMING was left.
    sets: u64,
    loaded_in_set: Option<u64>,
    /// Where the SET under way leads.
    target: Option<DeviceState>,
    /// Z4 broken: asking for the size left something behind.
    pub(super) left_object: bool,
    loaded_cold: bool,
    /// Writes to resuming sessions so far.
    writes: u64,
}

#[derive(Clone, Debug)]
enum Live {
    Saving(Box<Saver>),
    Resuming(Box<Loader>),
}

impl Bookkeeping {
    pub(super) fn end_session(&mut self) {
        self.live = None;
        self.loaded_in_set = None;
    }

    fn begin(&mut self, live: Live) -> Session {
        self.sessions += 1;
        let direction = match live {
            Live::Saving(_) => Direction::Saving,
            Live::Resuming(_) => Direction::Resuming,
        };
        let session = Session { number: self.sessions, direction };
        self.live = Some((session, live));
        session
    }
}

fn errno<T>(call: &'static str, errno: i32) -> DeviceResult<T> {
    Err(DeviceError::Errno { call, errno })
}

impl DeviceCore {
    /// A SET begins: checks `target` (F4 to F7). The hops follow with [`next_hop`](Self::next_hop) and
    /// [`take_hop`](Self::take_hop).
    pub fn begin_set(&mut self, target: DeviceState) -> DeviceResult<()> {
        self.migration.sets += 1;
        self.migration.target = Some(target);
        if self.migration.left_object && self.state == DeviceState::Running && target != self.state
        {
            return self.refuse(target, libc::EBUSY);
        }
        match self.hop_towards(target) {
            Some(_) => Ok(()),
            None => self.refuse(target, libc::EINVAL),
        }
    }

    fn hop_towards(&self, target: DeviceState) -> Option<DeviceState> {
        if self.state == DeviceState::StopCopy
            && target.is_precopy()
            && self.quirks.breaks.has("F5")
        {
            return next_hop(self.state, DeviceState::Running, self.flags);
        }
        next_hop(self.state, target, self.flags)
    }

    /// How many SETs began so far.
    pub fn sets(&self) -> u64 {
        self.migration.sets
    }

    /// The next arc towards `target`; `None` when the device is there.
    pub fn next_hop(&self, target: DeviceState) -> DeviceResult<Option<Hop>> {
        let from = self.state;
        if from == target {
            return Ok(None);
        }
        match self.hop_towards(target) {
            Some(to) => Ok(Some(Hop { from, to, took_ns: self.hop_ns(from, to) })),
            None => self.refuse(target, libc::EINVAL),
        }
    }

    fn hop_ns(&self, from: DeviceState, to: DeviceState) -> u64 {
        let sets = self.migration.sets;
        let slow =
            self.quirks.slow_arcs.iter().filter(|s| s.to == to && sets.is_multiple_of(s.one_in));
        let extra = slow.map(|s| s.ms.saturating_mul(1_000_000)).sum::<u64>();
        self.timing.arc_ns(from, to).saturating_add(extra)
    }

    /// Takes one arc at time `now_ns`, after its time has passed. Answers the session it begins.
    ///
    /// # Errors
    /// [`DeviceError::Transition`]: EBUSY while a DMA write is under way that the new state forbids (finish
    /// it, then try again); EAGAIN when the device is not where the arc begins (a reset came between);
    /// EINVAL when loaded data does not validate (X8); any errno by `fail-arc`.
    pub fn take_hop(&mut self, hop: Hop, now_ns: u64) -> DeviceResult<Option<Session>> {
        let Hop { from, to, .. } = hop;
        if self.state != from {
            return self.refuse(to, libc::EAGAIN);
        }
        if self.deferred_forbids(to) {
            return self.refuse(to, libc::EBUSY);
        }
        if let Some((errno, to_error)) = self.injected_failure(from, to) {
            if to_error {
                self.fail();
            }
            return self.refuse(to, errno);
        }
        if from == DeviceState::Resuming {
            self.finish_loading(to)?;
        }
        if to == DeviceState::StopCopy
            && self.quirks.breaks.has("P8")
            && let Some((_, Live::Saving(saver))) = &self.migration.live
            && saver.initial_bytes() > 0
        {
            return self.refuse(to, libc::EBUSY);
        }
        if self.quirks.stay_in_resuming && from == DeviceState::Stop && to.is_active() {
            let loaded = self.migration.loaded_in_set.take();
            self.migration.wedged |= loaded.is_some_and(|set| set != self.migration.sets);
        }
        if to == DeviceState::StopCopy
            && let Some(kib) = self.quirks.grow_after_stop_kib
        {
            self.fill_bulk(kib);
        }
        self.state = to;
        self.work.restart_background();
        let session = self.session_of_arc(from, to, now_ns);
        self.deliver();
        Ok(session)
    }

    /// A whole SET at one moment (F1, F3).
    pub fn set_state(&mut self, target: DeviceState, now_ns: u64) -> DeviceResult<SetOutcome> {
        self.begin_set(target)?;
        let mut outcome = SetOutcome { session: None, took_ns: 0 };
        while let Some(hop) = self.next_hop(target)? {
            let session = self.take_hop(hop, now_ns).map_err(|error| towards(target, error))?;
            outcome.session = session.or(outcome.session);
            outcome.took_ns = outcome.took_ns.saturating_add(hop.took_ns);
        }
        Ok(outcome)
    }

    /// The live session.
    pub fn session(&self) -> Option<Session> {
        self.migration.live.as_ref().map(|(session, _)| *session)
    }

    /// SET MIG_PRECOPY_INFOv2; lasts until [`close`](Self::close) (R1, R8).
    ///
    /// # Errors
    /// EINVAL without PRE_COPY; ENOTTY where the device does not offer it.
    pub fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        if !self.flags.pre_copy() {
            return errno(OPT_IN, libc::EINVAL);
        }
        if !self.offers_info_v2 {
            return errno(OPT_IN, libc::ENOTTY);
        }
        self.migration.opted_in = true;
        Ok(())
    }

    /// The last user closed the device: the opt-in is gone (R8).
    pub fn close(&mut self) {
        self.migration.opted_in = false;
    }

    /// PRECOPY_INFO as an engine asks it.
    pub fn precopy_info(&mut self, now_ns: u64) -> DeviceResult<PrecopyInfo> {
        let answer = self.precopy_info_raw(RawPrecopyInfo::request(), now_ns)?;
        let RawPrecopyInfo { flags, initial_bytes, dirty_bytes, .. } = answer;
        Ok(PrecopyInfo::from_raw(self.migration.opted_in, flags, initial_bytes, dirty_bytes))
    }

    /// PRECOPY_INFO with the caller's bytes, on the live session.
    ///
    /// # Errors
    /// EINVAL outside of PRE_COPY and PRE_COPY_P2P (P2) and for a short `argsz` (P3); EIO by quirk.
    pub fn precopy_info_raw(
        &mut self,
        request: RawPrecopyInfo,
        now_ns: u64,
    ) -> DeviceResult<RawPrecopyInfo> {
        let opted_in = self.migration.opted_in;
        let request = precopy::check_request(VFIO_MIG_GET_PRECOPY_INFO, request, opted_in)
            .or_else(|number| errno(INFO, number))?;
        let in_p2p = self.state == DeviceState::PreCopyP2p;
        if !self.state.is_precopy() || (in_p2p && self.quirks.no_info_in_p2p) {
            return errno(INFO, libc::EINVAL);
        }
        if self.quirks.info_fails {
            return errno(INFO, libc::EIO);
        }
        let Some((_, Live::Saving(saver))) = &mut self.migration.live else {
            return errno(INFO, libc::ENODEV);
        };
        let (internals, quirks) = (&self.internals, &self.quirks);
        let opted_in = opted_in || quirks.breaks.has("R3");
        let context = Context { internals, quirks, now_ns, opted_in, in_p2p };
        let mut report = saver.info(&context);
        if quirks.size == SizeClaim::Garbage {
            report = Report { initial_bytes: GARBAGE_INITIAL, ..report };
        }
        if quirks.hidden_save_failure && report.initial_bytes == 0 {
            report.dirty_bytes = 0;
        }
        let (flags_back, one_field) = (quirks.caller_flags_back, quirks.one_size_field);
        let mut answer = precopy::answer(request, report, opted_in, flags_back, one_field);
        if quirks.breaks.has("P6") && !opted_in {
            answer.flags |= 0x100;
        }
        Ok(answer)
    }

    /// MIG_DATA_SIZE: what completing stop-copy takes, unread PRE_COPY data included; without a saving
    /// session, the whole state. Valid in every state (Z1) and without effect (Z4).
    ///
    /// # Errors
    /// ENOTTY where the device does not offer it; EIO by quirk.
    pub fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        if !self.offers_data_size {
            return errno(DATA_SIZE, libc::ENOTTY);
        }
        self.migration.left_object |=
            self.state == DeviceState::Running && self.quirks.breaks.has("Z4");
        let honest = match &self.migration.live {
            Some((_, Live::Saving(saver))) => saver.remaining_bytes(&self.internals),
            _ => whole_stream_bytes(&self.internals),
        };
        match self.quirks.size {
            SizeClaim::Honest => Ok(honest),
            SizeClaim::Garbage => Ok(GARBAGE_STOP_COPY),
            SizeClaim::Zero => Ok(0),
            SizeClaim::Under => Ok(honest / 10),
            SizeClaim::Fails => errno(DATA_SIZE, libc::EIO),
        }
    }

    /// Reads the stream of `session` into `buf`, at most one record's rest, so that a caller's lock is
    /// held for a moment only; short reads are legal (S8). An empty `buf` reads nothing.
    ///
    /// # Errors
    /// EBADF for a resuming session (X5), ENODEV for one that ended (X4).
    pub fn read(&mut self, session: Session, buf: &mut [u8], now_ns: u64) -> DeviceResult<RawRead> {
        if session.direction != Direction::Saving {
            return errno(READ, libc::EBADF);
        }
        let Some((live, Live::Saving(saver))) = &mut self.migration.live else {
            return errno(READ, libc::ENODEV);
        };
        if *live != session {
            return errno(READ, libc::ENODEV);
        }
        if buf.is_empty() {
            return Ok(RawRead::Data(0));
        }
        let limit = self.quirks.short_reads.map_or(buf.len(), |limit| limit.min(buf.len()));
        let context = Context {
            internals: &self.internals,
            quirks: &self.quirks,
            now_ns,
            opted_in: self.migration.opted_in,
            in_p2p: self.state == DeviceState::PreCopyP2p,
        };
        let found = saver.read(&mut buf[..limit], &context);
        if matches!(found, Found::End) && self.quirks.breaks.has("F2") {
            self.state = DeviceState::Stop;
        }
        Ok(match found {
            Found::Data(len) => RawRead::Data(len),
            Found::NothingNow if self.quirks.zero_at_temporary_end => RawRead::Zero,
            Found::NothingNow => RawRead::NoMessage,
            Found::End => RawRead::Zero,
        })
    }

    /// How long reading `bytes` takes, in ns.
    pub fn read_ns(&self, bytes: u64) -> u64 {
        self.timing.read_ns(bytes)
    }

    /// Writes `data` to the stream of `session`. All of it is taken, or the data does not validate.
    ///
    /// # Errors
    /// EBADF for a saving session (X5), ENODEV for one that ended (X4), EINVAL for data that cannot be this
    /// device's state: then the SET out of RESUMING fails too (X8).
    pub fn write(&mut self, session: Session, data: &[u8]) -> DeviceResult<Written> {
        if session.direction != Direction::Resuming {
            return errno(WRITE, libc::EBADF);
        }
        let Some((live, Live::Resuming(loader))) = &mut self.migration.live else {
            return errno(WRITE, libc::ENODEV);
        };
        if *live != session {
            return errno(WRITE, libc::ENODEV);
        }
        if let Err(error) = loader.write(data, &mut self.internals) {
            tracing::warn!(%error, "device state refused");
            return errno(WRITE, libc::EINVAL);
        }
        let mut took_ns = self.timing.load_ns(data.len() as u64);
        if loader.has_config() && !self.migration.loaded_cold {
            // The first configuration makes the device allocate what it will need.
            self.migration.loaded_cold = true;
            took_ns = took_ns.saturating_add(self.timing.load_cold_ns);
        }
        self.migration.writes += 1;
        if let Some(slow) = self.quirks.slow_load
            && self.migration.writes.is_multiple_of(slow.one_in)
        {
            took_ns = took_ns.saturating_mul(slow.percent) / 100;
        }
        Ok(Written { bytes: data.len(), took_ns })
    }

    /// The guest rewrote blocks `first..end`.
    pub(super) fn note_fill(&mut self, first: u64, end: u64) {
        if let Some((_, Live::Saving(saver))) = &mut self.migration.live {
            saver.note_fill(first, end);
        }
    }

    /// The guest reconfigured the device.
    pub(super) fn note_reconfiguration(&mut self) {
        if let Some((_, Live::Saving(saver))) = &mut self.migration.live {
            saver.note_reconfiguration();
        }
    }

    /// The device was reset under a session that goes on: everything in it changed.
    pub(super) fn restart_session(&mut self) {
        match &mut self.migration.live {
            Some((_, Live::Saving(saver))) => {
                saver.note_reconfiguration();
                saver.note_fill(0, self.geometry.blocks());
            }
            Some((_, Live::Resuming(loader))) => **loader = Loader::begin(self.geometry),
            None => {}
        }
    }

    fn session_of_arc(
        &mut self,
        from: DeviceState,
        to: DeviceState,
        now_ns: u64,
    ) -> Option<Session> {
        match session_effect(from, to) {
            SessionEffect::Keeps
                if self.quirks.breaks.has("X2") && to == DeviceState::PreCopyP2p =>
            {
                self.migration.live = None;
                None
            }
            SessionEffect::Keeps => {
                let back = from == DeviceState::PreCopyP2p && to == DeviceState::PreCopy;
                if back
                    && self.quirks.breaks.has("F13")
                    && let Some((_, Live::Saving(saver))) = &mut self.migration.live
                {
                    **saver = Saver::begin_precopy(self.habits, &self.internals, now_ns);
                }
                if to == DeviceState::StopCopy
                    && let Some((_, Live::Saving(saver))) = &mut self.migration.live
                {
                    saver.enter_stop_copy(&self.internals, &self.quirks);
                }
                None
            }
            SessionEffect::BeginsSaving => {
                let begin = match to {
                    DeviceState::StopCopy => Saver::begin_stop_copy,
                    _ => Saver::begin_precopy,
                };
                let saver = begin(self.habits, &self.internals, now_ns);
                Some(self.migration.begin(Live::Saving(Box::new(saver))))
            }
            SessionEffect::BeginsResuming => {
                // What the device had is overwritten, so its memory need not be kept twice.
                self.internals = Internals::power_on(self.geometry);
                self.migration.loaded_cold = false;
                let loader = Loader::begin(self.geometry);
                Some(self.migration.begin(Live::Resuming(Box::new(loader))))
            }
            SessionEffect::Ends => {
                self.migration.live = None;
                None
            }
        }
    }

    /// RESUMING → STOP: the one place where loaded data is judged (X8, F14).
    fn finish_loading(&mut self, to: DeviceState) -> DeviceResult<()> {
        let Some((_, Live::Resuming(loader))) = &self.migration.live else {
            return self.refuse(to, libc::EINVAL);
        };
        let beyond = self.migration.target.is_some_and(|target| target != DeviceState::Stop);
        let breaks = &self.quirks.breaks;
        let unjudged = breaks.has("X8") || (breaks.has("F14") && beyond);
        if let Err(error) = loader.finish(&mut self.internals)
            && !unjudged
        {
            tracing::warn!(%error, "device state does not validate");
            if self.quirks.bad_load_errors {
                self.fail();
            } else if breaks.has("F10") {
                self.migration.end_session();
                self.state = DeviceState::Running;
            }
            return self.refuse(to, libc::EINVAL);
        }
        self.migration.loaded_in_set = Some(self.migration.sets);
        Ok(())
    }

    fn injected_failure(&mut self, from: DeviceState, to: DeviceState) -> Option<(i32, bool)> {
        let armed = |arc: &&mut crate::quirks::FailArc| {
            arc.from == from && arc.to == to && arc.times != Some(0)
        };
        let arc = self.quirks.fail_arcs.iter_mut().find(armed)?;
        arc.times = arc.times.map(|times| times - 1);
        Some((arc.errno, arc.to_error))
    }

    /// The device fails: only a reset leaves ERROR (F6).
    fn fail(&mut self) {
        self.state = DeviceState::Error;
        self.migration.end_session();
    }

    fn refuse<T>(&self, target: DeviceState, errno: i32) -> DeviceResult<T> {
        Err(DeviceError::Transition { target, state: Some(self.state), errno })
    }
}

/// Names the SET's own target in the failure of one of its hops.
pub(crate) fn towards(target: DeviceState, error: DeviceError) -> DeviceError {
    match error {
        DeviceError::Transition { state, errno, .. } => {
            DeviceError::Transition { target, state, errno }
        }
        other => other,
    }
}
