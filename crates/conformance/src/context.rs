//! What a rule's function works with: calls that are watched and end in time, and the way back.
//!
//! A call answers `Result<Result<T, Errno>, Stop>`: an errno is an answer, which the rule judges; what is
//! no answer (nothing in time, a device that is gone, a broken protocol) ends the rule at once.
//!
//! Where a rule needs a state, a session or an answer that another rule is about, and does not get it,
//! it is *skipped* and names that rule: one fault is one failure, not thirty.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{DeviceState, DmaRange, MigrationFlags, path};

use crate::errno::Errno;
use crate::guest::{Guest, ReinitWrite};
use crate::runner::Options;
use crate::stream::{self, Saved, Written};
use crate::subject::{Call, CallError, FdAnswer, Kind, StreamId, Subject, feature};

/// Why a rule's function ends before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The rule is broken.
    Fail {
        /// What it wants.
        expected: String,
        /// What came.
        got: String,
    },
    /// The rule is not about this device.
    NotApplicable(String),
    /// It cannot be tested here.
    Skipped(String),
}

/// An answer, or why there is none.
pub type Answer<T> = Result<Result<T, Errno>, Stop>;

/// The rule is broken.
pub fn fail<T>(expected: impl Into<String>, got: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Fail { expected: expected.into(), got: got.into() })
}

/// The rule is not about this device.
pub fn not_applicable<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::NotApplicable(why.into()))
}

/// The rule cannot be tested here.
pub fn skip<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Skipped(why.into()))
}

/// An answer in words.
pub fn show<T>(answer: &Result<T, Errno>) -> String {
    match answer {
        Ok(_) => "success".into(),
        Err(errno) => errno.to_string(),
    }
}

/// A state's name, or its number.
pub fn state_name(raw: u32) -> String {
    DeviceState::from_raw(raw).map_or_else(|| format!("state {raw}"), |state| state.name().into())
}

/// The call under way, for whoever waits.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<Option<(String, Instant)>>>);

impl Watch {
    /// The call under way and for how long.
    pub fn now(&self) -> Option<(String, Duration)> {
        let now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.as_ref().map(|(call, since)| (call.clone(), since.elapsed()))
    }

    fn set(&self, call: Option<&str>) {
        let now = call.map(|call| (call.to_owned(), Instant::now()));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

/// `struct vfio_precopy_info` without `argsz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Flags.
    pub flags: u32,
    /// Unread initial bytes.
    pub initial_bytes: u64,
    /// Unread dirty bytes.
    pub dirty_bytes: u64,
}

impl Info {
    /// REINIT is set.
    pub fn reinit(self) -> bool {
        self.flags & PRECOPY_INFO_REINIT != 0
    }
}

impl std::fmt::Display for Info {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { flags, initial_bytes, dirty_bytes } = self;
        write!(f, "flags {flags:#x}, initial_bytes {initial_bytes}, dirty_bytes {dirty_bytes}")
    }
}

/// What a device's migration looks like, asked once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) flags: MigrationFlags,
    pub(crate) data_size: bool,
    pub(crate) logging: bool,
}

/// See the module.
pub struct Context {
    subject: Box<dyn Subject>,
    kind: Kind,
    watch: Watch,
    deadline: Instant,
    limit: Duration,
    /// The most bytes of one stream that are read.
    pub(crate) stream_max_bytes: u64,
    /// Destructive tests are wanted.
    pub(crate) destructive: bool,
    reinit_write: Option<ReinitWrite>,
    shape: Option<Result<Shape, Stop>>,
    /// The state in which the device was opened first.
    opened_in: Option<u32>,
    /// A whole state to leave RESUMING with, where a reset does not.
    way_out: Option<Saved>,
    opted_in: bool,
    logging: bool,
    held: Vec<StreamId>,
    stream: Option<StreamId>,
    failed_fd: Option<FdAnswer>,
    guest: Option<Guest>,
}

impl Context {
    /// A context around `subject`.
    pub fn new(subject: Box<dyn Subject>, watch: Watch, options: &Options) -> Self {
        let kind = subject.about().kind;
        Self {
            subject,
            kind,
            watch,
            deadline: Instant::now(),
            limit: Duration::ZERO,
            stream_max_bytes: options.stream_max_bytes,
            destructive: options.destructive,
            reinit_write: options.reinit_write,
            shape: None,
            opened_in: None,
            way_out: None,
            opted_in: false,
            logging: false,
            held: Vec::new(),
            stream: None,
            failed_fd: None,
            guest: None,
        }
    }

    /// Everything from now on ends within `limit`.
    pub fn begin(&mut self, limit: Duration) {
        self.limit = limit;
        self.deadline = Instant::now() + limit;
        self.subject.set_deadline(self.deadline);
    }

    /// The device has no data fds.
    pub fn is_wire(&self) -> bool {
        self.kind == Kind::VfioUser
    }

    /// What is left of the rule's time.
    pub fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The limit in words.
    pub fn limit_text(&self) -> String {
        format!("{} s", self.limit.as_secs_f32())
    }

    /// One watched call.
    pub(crate) fn call<T>(
        &mut self,
        name: &str,
        call: impl FnOnce(&mut dyn Subject) -> Call<T>,
    ) -> Answer<T> {
        if self.time_left().is_zero() {
            let within = format!("the rule's calls return within {}", self.limit_text());
            return fail(within, format!("the time was over before {name}"));
        }
        self.watch.set(Some(name));
        let result = call(&mut *self.subject);
        self.watch.set(None);
        match result {
            Ok(value) => Ok(Ok(value)),
            Err(CallError::Errno(errno)) => Ok(Err(Errno(errno))),
            Err(CallError::TimedOut) => {
                let limit = self.limit_text();
                fail(format!("{name} returns"), format!("did not return within {limit}: {name}"))
            }
            Err(CallError::Gone(reason)) => {
                fail(format!("an answer to {name}"), format!("the device is gone: {reason}"))
            }
            Err(CallError::Protocol(what)) => {
                fail(format!("an answer to {name} that follows the protocol"), what)
            }
            Err(CallError::Unavailable(why)) => not_applicable(why),
        }
    }

    // ---- DEVICE_FEATURE ------------------------------------------------------------------------------

    /// DEVICE_FEATURE as given; answers the payload as it is afterwards.
    pub fn feature(&mut self, argsz: u32, flags: u32, payload: &[u8]) -> Answer<Vec<u8>> {
        let mut payload = payload.to_vec();
        let name = format!("DEVICE_FEATURE(argsz {argsz}, flags {flags:#x})");
        let answer = self.call(&name, |subject| subject.feature(argsz, flags, &mut payload))?;
        Ok(answer.map(|()| payload))
    }

    /// GET or SET with the right argsz.
    pub fn feature_sized(&mut self, flags: u32, payload: &[u8]) -> Answer<Vec<u8>> {
        self.feature(feature::HEADER_BYTES + payload.len() as u32, flags, payload)
    }

    /// PROBE of `operations` of a feature.
    pub fn probe(&mut self, index: u32, operations: u32) -> Answer<Vec<u8>> {
        self.feature(feature::HEADER_BYTES, index | operations | feature::PROBE, &[])
    }

    /// GET of a u64.
    pub fn get_u64(&mut self, index: u32) -> Answer<u64> {
        let answer = self.feature_sized(index | feature::GET, &[0; 8])?;
        Ok(answer.map(|payload| {
            u64::from_ne_bytes(payload.get(..8).and_then(|b| b.try_into().ok()).unwrap_or_default())
        }))
    }

    /// The device's migration, asked once. Flags that are not a valid set are taken by their known bits.
    pub(crate) fn shape(&mut self) -> Result<Shape, Stop> {
        if let Some(shape) = &self.shape {
            return shape.clone();
        }
        let shape = self.ask_shape();
        self.shape = Some(shape.clone());
        shape
    }

    fn ask_shape(&mut self) -> Result<Shape, Stop> {
        let flags = match self.get_u64(feature::MIGRATION)? {
            Ok(flags) => flags,
            Err(Errno(libc::ENOTTY | libc::EINVAL)) => {
                return not_applicable("the device has no migration support");
            }
            Err(errno) => return skip(format!("GET MIGRATION failed: {errno} (rules D1, D3)")),
        };
        let has = |bit| flags & bit != 0;
        let flags = MigrationFlags::new(has(MigrationFlags::P2P), has(MigrationFlags::PRE_COPY));
        let data_size = self.probe(feature::MIG_DATA_SIZE, feature::GET)?.is_ok();
        let logging = self.probe(feature::DMA_LOGGING_START, feature::SET)?.is_ok();
        Ok(Shape { flags, data_size, logging })
    }

    /// The migration flags; not applicable without migration.
    pub fn flags(&mut self) -> Result<MigrationFlags, Stop> {
        Ok(self.shape()?.flags)
    }

    /// Every state of the device but ERROR.
    pub fn states(&mut self) -> Result<Vec<DeviceState>, Stop> {
        let flags = self.flags()?;
        let all = DeviceState::ALL.into_iter().filter(|state| *state != DeviceState::Error);
        Ok(all.filter(|state| flags.has_state(*state)).collect())
    }

    /// Not applicable to a device without PRE_COPY.
    pub fn need_precopy(&mut self) -> Result<(), Stop> {
        match self.flags()?.pre_copy() {
            true => Ok(()),
            false => not_applicable("the device has no PRE_COPY"),
        }
    }

    /// Not applicable to a device without P2P.
    pub fn need_p2p(&mut self) -> Result<(), Stop> {
        match self.flags()?.p2p() {
            true => Ok(()),
            false => not_applicable("the device has no P2P states"),
        }
    }

    // ---- states --------------------------------------------------------------------------------------

    /// SET MIG_DEVICE_STATE of a raw number. What data_fd held after a failure is kept.
    pub fn set_raw(&mut self, state: u32) -> Answer<FdAnswer> {
        let name = format!("SET {}", state_name(state));
        let mut fd = FdAnswer::None;
        let answer = self.call(&name, |subject| {
            let (result, answer) = subject.set_state(state);
            fd = answer;
            result
        });
        if let FdAnswer::Stream(stream) = fd {
            self.held.push(stream);
        }
        let answer = answer?;
        match (&answer, fd) {
            (Ok(()), FdAnswer::Stream(stream)) => self.stream = Some(stream),
            (Ok(()), FdAnswer::Absent) => self.stream = Some(StreamId::WIRE),
            _ => {}
        }
        self.failed_fd = answer.is_err().then_some(fd);
        Ok(answer.map(|()| fd))
    }

    /// SET of a state.
    pub fn set(&mut self, state: DeviceState) -> Answer<FdAnswer> {
        self.set_raw(state.as_raw())
    }

    /// What data_fd held after the last failed SET.
    pub fn failed_fd(&self) -> Option<FdAnswer> {
        self.failed_fd
    }

    /// GET MIG_DEVICE_STATE.
    pub fn state(&mut self) -> Result<u32, Stop> {
        Ok(self.state_and_fd()?.0)
    }

    /// GET MIG_DEVICE_STATE with data_fd.
    pub fn state_and_fd(&mut self) -> Result<(u32, FdAnswer), Stop> {
        match self.call("GET MIG_DEVICE_STATE", |subject| subject.get_state())? {
            Ok((state, fd)) => {
                if let FdAnswer::Stream(stream) = fd {
                    self.held.push(stream);
                }
                Ok((state, fd))
            }
            Err(errno) => fail("GET MIG_DEVICE_STATE succeeds in every state", errno.to_string()),
        }
    }

    /// Brings the device to `state` for what follows.
    pub fn go(&mut self, state: DeviceState) -> Result<(), Stop> {
        match self.set(state)? {
            Ok(_) => match self.state()? {
                at if at == state.as_raw() => Ok(()),
                at => {
                    let at = state_name(at);
                    skip(format!("SET {state} succeeded and the device is in {at} (rule F1)"))
                }
            },
            Err(_) if self.walk(state)? => Ok(()),
            Err(errno) => {
                let at = self.state().map_or_else(|_| "?".into(), state_name);
                skip(format!(
                    "the device did not go to {state}: {errno}, it is in {at} (rules F8, F9)"
                ))
            }
        }
    }

    /// Arc by arc, where a combination was refused (rule F8).
    fn walk(&mut self, state: DeviceState) -> Result<bool, Stop> {
        let flags = self.flags()?;
        let Some(from) = DeviceState::from_raw(self.state()?) else { return Ok(false) };
        for hop in path(from, state, flags).unwrap_or_default() {
            if self.set(hop)?.is_err() {
                return Ok(false);
            }
        }
        Ok(self.state()? == state.as_raw())
    }

    /// A SET that succeeded led to `state`; if only a moment later, that is another rule's.
    pub fn expect_reached(&mut self, state: DeviceState, after: &str) -> Result<(), Stop> {
        if self.state()? == state.as_raw() {
            return Ok(());
        }
        for _ in 0..20 {
            self.wait(50);
            if self.state()? == state.as_raw() {
                break;
            }
        }
        self.expect_state(state, after)?;
        skip(format!("{state} was reached after {after} returned (rule F1)"))
    }

    /// Brings the device to `state` from RUNNING, whichever state it is in.
    pub fn go_anew(&mut self, state: DeviceState) -> Result<(), Stop> {
        self.come_to_running()?;
        if state == DeviceState::Running { Ok(()) } else { self.go(state) }
    }

    /// The state must be `state`.
    pub fn expect_state(&mut self, state: DeviceState, after: &str) -> Result<(), Stop> {
        let at = self.state()?;
        if at == state.as_raw() {
            return Ok(());
        }
        fail(format!("{state} {after}"), state_name(at))
    }

    // ---- streams -------------------------------------------------------------------------------------

    /// The stream of the last session that a SET handed out.
    pub fn stream(&mut self) -> Result<StreamId, Stop> {
        match self.stream {
            Some(stream) => Ok(stream),
            None if self.is_wire() => Ok(StreamId::WIRE),
            None => skip("no data_fd was handed out (rule X1)"),
        }
    }

    /// Reads the current stream.
    pub fn read(&mut self, buf: &mut [u8]) -> Answer<usize> {
        let stream = self.stream()?;
        self.read_of(stream, buf)
    }

    /// Reads a stream.
    pub fn read_of(&mut self, stream: StreamId, buf: &mut [u8]) -> Answer<usize> {
        let (name, room) = (self.name_of_read(), buf.len());
        match self.call(name, |subject| subject.read(stream, buf))? {
            Ok(got) if got > room => {
                fail(format!("at most {room} bytes of a read"), format!("{got} bytes"))
            }
            answer => Ok(answer),
        }
    }

    /// Writes to the current stream.
    pub fn write(&mut self, data: &[u8]) -> Answer<usize> {
        let stream = self.stream()?;
        self.write_to(stream, data)
    }

    /// Writes to a stream.
    pub fn write_to(&mut self, stream: StreamId, data: &[u8]) -> Answer<usize> {
        let name = if self.is_wire() { "MIG_DATA_WRITE" } else { "write()" };
        match self.call(name, |subject| subject.write(stream, data))? {
            Ok(taken) if taken > data.len() => {
                let most = data.len();
                fail(format!("at most {most} bytes taken"), format!("{taken} bytes"))
            }
            answer => Ok(answer),
        }
    }

    /// How reading is called.
    pub fn name_of_read(&self) -> &'static str {
        if self.is_wire() { "MIG_DATA_READ" } else { "read()" }
    }

    /// The most bytes of one write.
    pub fn write_bytes_max(&self) -> usize {
        self.subject.write_bytes_max().max(1)
    }

    // ---- PRECOPY_INFO --------------------------------------------------------------------------------

    /// PRECOPY_INFO with the caller's bytes.
    pub fn info_raw(&mut self, argsz: u32, info: Info) -> Answer<Info> {
        let stream = self.stream()?;
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        bytes[4..8].copy_from_slice(&info.flags.to_ne_bytes());
        bytes[8..16].copy_from_slice(&info.initial_bytes.to_ne_bytes());
        bytes[16..].copy_from_slice(&info.dirty_bytes.to_ne_bytes());
        let answer =
            self.call("PRECOPY_INFO", |subject| subject.precopy_info(stream, &mut bytes))?;
        let word = |at: usize| {
            u64::from_ne_bytes(
                bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]),
            )
        };
        let flags = (word(0) >> if cfg!(target_endian = "little") { 32 } else { 0 }) as u32;
        Ok(answer.map(|()| Info { flags, initial_bytes: word(8), dirty_bytes: word(16) }))
    }

    /// PRECOPY_INFO of a zeroed struct.
    pub fn info(&mut self) -> Answer<Info> {
        self.info_raw(24, Info { flags: 0, initial_bytes: 0, dirty_bytes: 0 })
    }

    /// PRECOPY_INFO where a rule needs it and is not about whether it works.
    pub fn need_info(&mut self) -> Result<Info, Stop> {
        match self.info()? {
            Ok(info) => Ok(info),
            Err(errno) => skip(format!("PRECOPY_INFO failed: {errno} (rules P1, P2)")),
        }
    }

    /// A handle without the INFOv2 opt-in: opens the device anew if need be.
    pub fn without_opt_in(&mut self) -> Result<(), Stop> {
        if self.opted_in { self.reopen() } else { Ok(()) }
    }

    /// Opts in to INFOv2; not applicable where that is not offered.
    pub fn opt_in(&mut self) -> Result<(), Stop> {
        self.need_precopy()?;
        match self.set_opt_in(&[])? {
            Ok(_) => Ok(()),
            Err(Errno(libc::ENOTTY | libc::EINVAL)) => {
                not_applicable("INFOv2 is not offered (Linux before 7.1, or a server without it)")
            }
            Err(errno) => skip(format!("the INFOv2 opt-in failed: {errno} (rule R1)")),
        }
    }

    /// SET MIG_PRECOPY_INFOv2 with a payload that does not matter.
    pub fn set_opt_in(&mut self, payload: &[u8]) -> Answer<Vec<u8>> {
        let answer = self.feature_sized(feature::MIG_PRECOPY_INFO_V2 | feature::SET, payload)?;
        self.opted_in |= answer.is_ok();
        Ok(answer)
    }

    // ---- DMA logging ---------------------------------------------------------------------------------

    /// Not applicable to a device that does not log.
    pub fn need_logging(&mut self) -> Result<(), Stop> {
        match self.shape()?.logging {
            true => Ok(()),
            false => not_applicable("the device does not log its DMA"),
        }
    }

    /// DMA_LOGGING_START; answers the page size in use.
    pub fn log_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Answer<u64> {
        let name = "DMA_LOGGING_START";
        let answer = self.call(name, |subject| subject.logging_start(page_size, ranges))?;
        self.logging |= answer.is_ok();
        Ok(answer)
    }

    /// Starts logging where a rule needs it and is not about that.
    pub fn need_log(&mut self, ranges: &[DmaRange]) -> Result<u64, Stop> {
        match self.log_start(4096, ranges)? {
            Ok(used) => Ok(used),
            Err(errno) => skip(format!("DMA_LOGGING_START failed: {errno} (rule L1)")),
        }
    }

    /// DMA_LOGGING_REPORT into a bitmap that is large enough and holds `before`.
    pub fn log_report(&mut self, range: DmaRange, page_size: u64, before: u64) -> Answer<Vec<u64>> {
        // Room for every bit that a malformed page size could mean; ranges of rules are small.
        let words = range.length.div_ceil(page_size.max(1)).div_ceil(64);
        let mut bitmap = vec![before; words.clamp(1, 1 << 16) as usize];
        let name = "DMA_LOGGING_REPORT";
        let answer =
            self.call(name, |subject| subject.logging_report(range, page_size, &mut bitmap))?;
        Ok(answer.map(|()| bitmap))
    }

    /// DMA_LOGGING_STOP.
    pub fn log_stop(&mut self) -> Answer<()> {
        let answer = self.call("DMA_LOGGING_STOP", |subject| subject.logging_stop())?;
        self.logging &= answer.is_err();
        Ok(answer)
    }

    // ---- the device ----------------------------------------------------------------------------------

    /// DEVICE_RESET.
    pub fn reset(&mut self) -> Answer<()> {
        self.call("DEVICE_RESET", |subject| subject.reset())
    }

    /// The digest of the device's state, where there is a side door.
    pub fn digest(&mut self) -> Result<Option<[u8; 32]>, Stop> {
        Ok(self.call("the state digest", |subject| subject.digest())?.unwrap_or(None))
    }

    /// Closes the device and opens it again.
    pub fn reopen(&mut self) -> Result<(), Stop> {
        self.guest = None;
        self.held.clear();
        self.stream = None;
        match self.call("closing and opening the device", |subject| subject.reopen())? {
            Ok(()) => {
                (self.opted_in, self.logging) = (false, false);
                Ok(())
            }
            Err(errno) => fail("the device opens again", errno.to_string()),
        }
    }

    /// What plays the guest's part on this device.
    pub fn guest(&mut self) -> Result<&mut Guest, Stop> {
        if self.guest.is_none() {
            self.watch.set(Some("reading the configuration space"));
            let guest = Guest::find(self.subject.pci(), self.reinit_write);
            self.watch.set(None);
            self.guest = Some(guest);
        }
        match &mut self.guest {
            Some(guest) => Ok(guest),
            None => skip("no guest"),
        }
    }

    /// A region access by the guest's part, watched.
    pub fn as_guest<T>(
        &mut self,
        name: &str,
        act: impl FnOnce(&mut Guest) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        self.guest()?;
        self.watch.set(Some(name));
        let result = match &mut self.guest {
            Some(guest) => act(guest),
            None => skip("no guest"),
        };
        self.watch.set(None);
        result
    }

    /// Lets time pass, within the rule's.
    pub fn wait(&self, ms: u64) {
        std::thread::sleep(Duration::from_millis(ms).min(self.time_left()));
    }

    // ---- more of the data fd -------------------------------------------------------------------------

    /// Something that only a data fd has.
    pub fn on_fd<T>(
        &mut self,
        name: &str,
        act: impl FnOnce(&mut dyn Subject, StreamId) -> Call<T>,
    ) -> Answer<T> {
        if self.is_wire() {
            return not_applicable("vfio-user has no data_fd");
        }
        let stream = self.stream()?;
        self.call(name, |subject| act(subject, stream))
    }

    // ---- the way back --------------------------------------------------------------------------------

    fn close_streams(&mut self) {
        for stream in std::mem::take(&mut self.held) {
            self.subject.close(stream);
        }
        self.stream = None;
    }

    /// A device in RUNNING, reset if that leads there.
    fn come_to_running(&mut self) -> Result<(), Stop> {
        let running = DeviceState::Running.as_raw();
        self.close_streams();
        let reset = self.reset()?;
        let mut at = self.state()?;
        if at == DeviceState::Resuming.as_raw() && self.way_out.is_some() {
            self.leave_resuming()?;
            at = self.state()?;
        }
        if at != running {
            // A reset that keeps the migration state (libvfio-user) is rule H5's; SET helps there.
            if self.set_raw(running)?.is_err() {
                // A device that failed to load is left by a reset alone.
                let _ = self.reset()?;
            }
            at = self.state()?;
        }
        if at == running {
            return Ok(());
        }
        let (reset, at) = (show(&reset), state_name(at));
        skip(format!("the device does not come back to RUNNING: reset: {reset}, it is in {at}"))
    }

    /// Skips where a reset does not lead out of a failed load.
    pub fn need_reset(&mut self) -> Result<(), Stop> {
        match self.way_out {
            None => Ok(()),
            Some(_) => {
                skip("a reset does not lead to RUNNING, so that a failed load would stay (rule H5)")
            }
        }
    }

    /// Loads a whole state, where neither SET nor reset leads out of RESUMING.
    fn leave_resuming(&mut self) -> Result<(), Stop> {
        let Some(mut saved) = self.way_out.take() else { return Ok(()) };
        let written = stream::write(self, &mut saved, u64::MAX, |_| usize::MAX);
        self.way_out = Some(saved);
        if written? == Written::All {
            let _ = self.set(DeviceState::Running)?;
        }
        Ok(())
    }

    /// Before the first rule: asks what the device is, and sees to it that RESUMING can be left.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub fn prepare(&mut self, limit: Duration) -> Result<(), String> {
        self.begin(limit);
        let prepared = self.try_prepare();
        let restored = self.restore(limit);
        match prepared {
            Ok(()) | Err(Stop::NotApplicable(_) | Stop::Skipped(_)) => restored,
            // What is wrong is found again by a rule, unless the device is gone.
            Err(Stop::Fail { .. }) => restored,
        }
    }

    /// The state in which the device was found before anything was done to it.
    pub fn opened_in(&self) -> Option<u32> {
        self.opened_in
    }

    fn try_prepare(&mut self) -> Result<(), Stop> {
        self.flags()?;
        self.opened_in = Some(self.state()?);
        self.come_to_running()?;
        self.go(DeviceState::Stop)?;
        let _ = self.reset()?;
        if self.state()? == DeviceState::Running.as_raw() {
            return Ok(());
        }
        self.come_to_running()?;
        self.way_out = Some(stream::save(self)?);
        Ok(())
    }

    /// Undoes what a rule did: streams closed, logging off, device in RUNNING. Takes up to twice `limit`.
    ///
    /// # Errors
    /// Why the device is not usable.
    pub fn restore(&mut self, limit: Duration) -> Result<(), String> {
        self.failed_fd = None;
        self.begin(limit);
        let first = match self.try_restore() {
            Ok(()) => {
                // Some servers take memory away from a running device only.
                if let Some(mut guest) = self.guest.take() {
                    guest.leave();
                }
                return Ok(());
            }
            Err(stop) => why(stop),
        };
        // The connection may be out of step, or gone: a new one tells whether the device is.
        self.begin(limit);
        match self.reopen().and_then(|()| self.try_restore()) {
            Ok(()) => Ok(()),
            Err(stop) if why(stop.clone()) == first => Err(first),
            Err(stop) => Err(format!("{first}; opened again: {}", why(stop))),
        }
    }

    fn try_restore(&mut self) -> Result<(), Stop> {
        if self.logging && self.log_stop()?.is_err() {
            // It ends with the handle.
            self.reopen()?;
        }
        match &self.shape {
            // Without migration there are no states.
            Some(Err(Stop::NotApplicable(_))) => self.reset().map(drop),
            _ => self.come_to_running(),
        }
    }
}

/// A stop in one sentence.
fn why(stop: Stop) -> String {
    match stop {
        Stop::Fail { got, .. } => got,
        Stop::NotApplicable(why) | Stop::Skipped(why) => why,
    }
}
