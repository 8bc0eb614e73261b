//! What a rule's function works with: calls that are watched and end in time, and the way back.
//!
//! A call answers `Result<Result<T, Errno>, Stop>`: an errno is an answer, which the rule judges; what is
//! no answer (nothing in time, a device that is gone, a broken protocol) ends the rule at once.
//!
//! Where a rule needs a state, a session or an answer that another rule is about, and does not get it,
//! it is *skipped* and names that rule: one fault is one failure, not thirty.
//!
//! | module | holds |
//! |---|---|
//! | `state` | DEVICE_FEATURE, what the device has, states |
//! | `session` | streams, PRECOPY_INFO, the opt-in |
//! | `log` | DMA logging |
//! | `restore` | before the first rule, and after each |

mod log;
mod restore;
mod session;
mod state;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{DeviceState, MigrationFlags};

use crate::errno::Errno;
use crate::guest::{Guest, ReinitWrite};
use crate::runner::Options;
use crate::stream::Saved;
use crate::subject::{Call, CallError, FdAnswer, Kind, StreamId, Subject};

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

/// What a call may take at least, however little is left of its rule's `limit`: only a call that took so long
/// can be said not to return.
pub fn call_grace(limit: Duration) -> Duration {
    limit.min(Duration::from_secs(5))
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
        // A rule that is merely long is no failure; a call that does not return is.
        if self.time_left().is_zero() {
            let limit = self.limit_text();
            return skip(format!(
                "not done within {limit}: the time was over before {name} (--time-limit)"
            ));
        }
        let grace = call_grace(self.limit);
        let (by, limit) = match Instant::now() + grace {
            late if late > self.deadline => (late, grace),
            _ => (self.deadline, self.limit),
        };
        self.subject.set_deadline(by);
        self.watch.set(Some(name));
        let result = call(&mut *self.subject);
        self.watch.set(None);
        match result {
            Ok(value) => Ok(Ok(value)),
            Err(CallError::Errno(errno)) => Ok(Err(Errno(errno))),
            Err(CallError::TimedOut) => {
                let limit = limit.as_secs_f32();
                fail(format!("{name} returns"), format!("did not return within {limit} s: {name}"))
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
}

/// A stop in one sentence.
fn why(stop: Stop) -> String {
    match stop {
        Stop::Fail { got, .. } => got,
        Stop::NotApplicable(why) | Stop::Skipped(why) => why,
    }
}
