//! Two hosts as a system of states and steps: both machines, one device, memory, links, disks, and everything
//! that may go wrong. Time is not in it: a limit strikes whenever it may.
//!
//! What is abstract: memory is one page (dirty, collected, sent, fresh at the destination); a device's stream
//! counts its bytes; every owning thread takes its commands in order and answers each at once, except a
//! question to a device, whose answer may be under way. A process that dies takes its guest, its device and
//! its end of every link along and leaves its records.

#[path = "destination.rs"]
mod destination;
#[path = "faults.rs"]
mod faults;
#[path = "source.rs"]
mod source;
#[path = "steps.rs"]
mod steps;

use std::collections::VecDeque;

use switchover::handover::destination::{self as dst, Destination};
use switchover::handover::source::{
    self as src, CallResult, InfoAnswer, Point, Source, Sync, TimeLimit, Verdict,
};
use switchover::handover::{
    Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve, Rules,
};
use switchover::message::{
    Attempt, Connection, DeviceEnd, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

use super::search::System;
pub use faults::{Fault, Faults};
pub use steps::Step;

const NIC: DeviceIndex = DeviceIndex(0);
const RUN_HERE: Resolve = Resolve::RunHere { force: false };
#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Link {
    up: bool,
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    told_source: bool,
    told_destination: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    Track,
    Pause,
    Resume,
    Sync(Sync),
    Restore,
    FinalRam,
    Save(Attempt),
    Reattach,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum DeviceWork {
    Call(DeviceCall),
    Begin(Session),
    Read,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct DeviceHere {
    traits: DeviceTraits,
    state: DeviceState,
    stream: Session,
    offset: u64,
    /// Where the initial data of the newest session ends.
    initial_end: u64,
    unread: u64,
    reinit: bool,
    ended: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct DeviceThere {
    state: DeviceState,
    stream: Session,
    loaded: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum WorkThere {
    Compare,
    Apply,
    Wire,
    Start,
    Unload,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Frame {
    /// A page as it was when it was sent; of the last memory of an attempt, or of a pass.
    Page {
        stale: bool,
        last: bool,
    },
    Device(Session, u64),
    Section(Attempt),
}

/// The page that stands for memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Page {
    dirty: bool,
    /// Collected and not sent.
    collected: bool,
    /// Sent as the last memory of the attempt.
    in_attempt: bool,
    /// The destination has it as it is here.
    fresh: bool,
}

/// Two hosts.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Model {
    rules: Rules,
    faults: Faults,
    links: Vec<Link>,
    data: VecDeque<Frame>,
    /// The source has closed the data channels, and the destination has not noticed.
    data_closed: bool,
    page: Page,

    /// `None` = the process is dead.
    source: Option<Source>,
    /// It has finished and hears nothing any more.
    over: bool,
    /// The guest's memory is here.
    guest_here: bool,
    runs_here: bool,
    device: Option<DeviceHere>,
    work: VecDeque<Work>,
    device_work: VecDeque<DeviceWork>,
    answers: VecDeque<src::Event>,
    disk: VecDeque<(Decision, Attempt)>,
    record: Option<(Decision, Attempt)>,
    judging: Option<Point>,
    limits: Vec<TimeLimit>,
    reconnect: bool,

    destination: Option<Destination>,
    runs_there: bool,
    /// The process that loaded the guest lives, and has not thrown it away.
    memory_there: bool,
    device_there: Option<DeviceThere>,
    work_there: VecDeque<WorkThere>,
    device_work_there: VecDeque<DeviceCall>,
    disk_there: VecDeque<(Decision, Attempt)>,
    /// The decision of each attempt.
    records_there: Vec<(Decision, Attempt)>,
    sections: Option<Attempt>,
    applied: Option<Attempt>,
    awaited: Option<(Attempt, u64)>,
    window: bool,

    // What the checks need to know beyond that.
    /// The newest connection whose Hello arrived.
    heard: u64,
    committed: Option<Attempt>,
    /// Unread initial data that the source was told of.
    known_unread: bool,
    /// A question was asked after the vCPUs had paused.
    asked_paused: bool,
    /// A source with its guest told the destination that it goes on.
    took_back: bool,
    crashed: bool,
    /// The guest or its device ran here since the vCPUs paused last.
    ran_on: bool,
    /// The guest's memory here died with its process.
    died_here: bool,
    /// The guest ended with the host that was its home.
    excused: bool,
    wrong: Option<&'static str>,
}

fn failure() -> Failure {
    Failure::new(Side::Source, "x")
}

fn features() -> Features {
    Features::default()
}

fn setup(devices: Vec<DeviceTraits>) -> src::Setup {
    src::Setup {
        migration: Id(1),
        instance: Id(2),
        features: features(),
        description: String::new(),
        devices,
        dry_run: false,
    }
}

impl Model {
    /// Two hosts before the first connection, and so many faults to come.
    pub fn new(traits: Option<DeviceTraits>, rules: Rules, faults: Faults) -> Self {
        let device = |traits| DeviceHere {
            traits,
            state: DeviceState::Running,
            stream: Session(0),
            offset: 0,
            initial_end: 0,
            unread: 0,
            reinit: false,
            ended: false,
        };
        let there = DeviceThere { state: DeviceState::Running, stream: Session(0), loaded: 0 };
        Self {
            rules,
            faults,
            links: Vec::new(),
            data: VecDeque::new(),
            data_closed: false,
            page: Page { dirty: false, collected: true, in_attempt: false, fresh: false },
            source: Some(Source::with_rules(setup(traits.into_iter().collect()), rules)),
            over: false,
            guest_here: true,
            runs_here: true,
            device: traits.map(device),
            work: VecDeque::new(),
            device_work: VecDeque::new(),
            answers: VecDeque::new(),
            disk: VecDeque::new(),
            record: None,
            judging: None,
            limits: Vec::new(),
            reconnect: true,
            destination: Some(Destination::with_rules(
                Id(1),
                Id(3),
                Id(4),
                features(),
                5_000,
                rules,
            )),
            runs_there: false,
            memory_there: true,
            device_there: traits.map(|_| there),
            work_there: VecDeque::new(),
            device_work_there: VecDeque::new(),
            disk_there: VecDeque::new(),
            records_there: Vec::new(),
            sections: None,
            applied: None,
            awaited: None,
            window: false,
            heard: 0,
            committed: None,
            known_unread: false,
            asked_paused: false,
            took_back: false,
            crashed: false,
            ran_on: true,
            died_here: false,
            excused: false,
            wrong: None,
        }
    }

    /// The same once precopy has come to rest: the way there is the same for all.
    pub fn in_precopy(traits: Option<DeviceTraits>, rules: Rules, faults: Faults) -> Self {
        let mut model = Self::new(traits, rules, Faults::any(0));
        while let Some((_, step)) = model
            .steps()
            .into_iter()
            .find(|(_, step)| !matches!(step, Step::Write | Step::Switchover))
        {
            model = model.after(step);
        }
        assert!(model.source().is_some_and(|s| s.state() == src::State::Precopy && s.all_ready()));
        model.faults = faults;
        model
    }

    fn source(&self) -> Option<&Source> {
        self.source.as_ref().filter(|_| !self.over)
    }

    fn state(&self) -> Option<src::State> {
        self.source().map(Source::state)
    }

    fn state_there(&self) -> Option<dst::State> {
        self.destination.as_ref().map(Destination::state)
    }

    fn wrong(&mut self, what: &'static str) {
        self.wrong.get_or_insert(what);
    }

    fn require(&mut self, holds: bool, what: &'static str) {
        if !holds {
            self.wrong(what);
        }
    }

    /// The destination holds a complete guest, or runs it.
    fn guest_there(&self) -> bool {
        use dst::State::*;
        matches!(self.state_there(), Some(Prepared | Expired | Starting | Running))
    }

    // --- links and processes ------------------------------------------------------------------

    pub(super) fn connect(&mut self) {
        self.reconnect = false;
        self.links.push(Link { up: true, ..Link::default() });
        self.tell_source(src::Event::LinkUp(Connection(self.links.len() as u64)));
    }

    pub(super) fn crash_source(&mut self) {
        // A guest or device that ran on here ended with its home: what the destination may hold is older.
        self.excused |= self.guest_here && (self.ran_on || !self.guest_there());
        self.crashed = true;
        self.died_here |= self.guest_here;
        (self.source, self.over) = (None, false);
        (self.guest_here, self.runs_here) = (false, false);
        self.device = None;
        self.forget_source();
        self.check();
    }

    /// Nobody drives the source any more: what was under way there is gone.
    pub(super) fn forget_source(&mut self) {
        self.work.clear();
        self.device_work.clear();
        self.answers.clear();
        self.disk.clear();
        self.limits.clear();
        (self.judging, self.reconnect) = (None, false);
        for link in &mut self.links {
            (link.up, link.told_source) = (false, true);
            link.to_source.clear();
        }
        self.lost();
    }

    pub(super) fn restart_source(&mut self) {
        let Some((_, attempt)) = self.record else { return };
        let newest = Connection(self.links.len() as u64);
        let (setup, secret) = (setup(Vec::new()), Id(4));
        self.source =
            Some(Source::recovered_with_rules(setup, secret, attempt, newest, self.rules));
        self.reconnect = true;
    }

    pub(super) fn crash_destination(&mut self) {
        // A guest that ran there ended with its home; one that had not started is the source's still.
        self.excused |= self.runs_there || !self.guest_here;
        self.crashed = true;
        self.destination = None;
        self.runs_there = false;
        self.disk_there.clear();
        for link in &mut self.links {
            (link.up, link.told_destination) = (false, true);
            link.to_destination.clear();
        }
        self.nothing_there();
        self.check();
    }

    pub(super) fn restart_destination(&mut self) {
        let Some((decision, attempt)) = self.records_there.last().copied() else { return };
        let (migration, instance, secret) = (Id(1), Id(33), Id(4));
        self.destination = Some(Destination::recovered_with_rules(
            migration, instance, secret, attempt, decision, self.rules,
        ));
    }

    /// Nobody has the guest any more: that may only be because its home died.
    pub(super) fn lost(&mut self) {
        if self.guest_here || self.guest_there() || self.excused {
            return;
        }
        // The living source had said that it goes on: the guest was its own again when it died.
        if self.took_back && self.died_here {
            self.excused = true;
            return;
        }
        self.wrong("invariant 2: nobody has the guest any more");
    }

    // --- invariants ---------------------------------------------------------------------------

    pub(super) fn check(&mut self) {
        let twice = self.runs_here && self.runs_there;
        self.require(!twice, "invariant 1: the guest runs twice");
        self.lost();
        let runs = |state| matches!(state, DeviceState::Running | DeviceState::RunningP2p);
        let active_there =
            self.device_there.as_ref().is_some_and(|d| d.loaded > 0 && runs(d.state));
        let active_here = self.guest_here && self.device.as_ref().is_some_and(|d| !d.is_still());
        let both = (active_there || self.runs_there) && active_here;
        self.require(!both, "invariant 1: a device runs on both sides");
        let recorded = self.destination.as_ref().and_then(Destination::decision);
        let early = active_there && recorded != Some(Decision::Running);
        self.require(!early, "a device runs before `running` is recorded");
    }
}
