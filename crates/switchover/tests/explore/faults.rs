//! What may go wrong.

use super::*;
use crate::search::Kind;

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Cut(usize),
    CrashSource,
    CrashDestination,
    /// The guest reconfigures its device: new initial data.
    Reinit,
    /// The guest resets its device.
    Reset,
    Worker,
    Device,
    Disk,
    WorkerThere,
    DeviceThere,
    DiskThere,
    Limit(TimeLimit),
    Verdict,
    TakeBack,
    Cancel,
    CancelThere,
    Fail,
    FailThere,
    PowerOff,
    /// A poll whose answer may be under way when the vCPUs pause.
    IdlePoll,
    /// An acknowledgement of the session before.
    StaleAck,
    /// Somebody without a record answers a question.
    Unknown,
    /// A Commit that was sent once comes again, over this link.
    CommitAgain(usize),
    /// A Commit of the attempt before comes over the newest link.
    OldCommit,
}

/// Which faults there are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Faults {
    /// How many in all.
    pub left: u8,
    /// Links, processes, and words that come late, twice, or from somebody without a record.
    pub links: bool,
    /// The device, and the guest's doings with it.
    pub devices: bool,
    /// Disks, VMM calls, limits, people.
    pub hosts: bool,
}

impl Faults {
    /// So many of every kind.
    pub fn any(left: u8) -> Self {
        Self { left, links: true, devices: true, hosts: true }
    }

    fn has(self, fault: Fault) -> bool {
        use Fault::*;
        let of_kind = match fault {
            Cut(_) | CrashSource | CrashDestination | Unknown | CommitAgain(_) | OldCommit => {
                self.links
            }
            Reinit | Reset | Device | DeviceThere | IdlePoll | StaleAck => self.devices,
            // Whatever else goes wrong, it may be taken back for it.
            TakeBack | Verdict => true,
            _ => self.hosts,
        };
        self.left > 0 && of_kind
    }
}

impl Model {
    pub(super) fn cost(&self, out: &mut Vec<(Kind, Step)>, fault: Fault) {
        if self.faults.has(fault) {
            out.push((Kind::Fault, Step::Fault(fault)));
        }
    }

    pub(super) fn faults(&self, out: &mut Vec<(Kind, Step)>) {
        use src::State::*;
        let mut can = |enabled: bool, fault| {
            if enabled {
                self.cost(out, fault);
            }
        };
        for (at, link) in self.links.iter().enumerate() {
            can(link.up, Fault::Cut(at));
            let again = self.committed.is_some() && !link.told_destination;
            can(again, Fault::CommitAgain(at));
        }
        can(
            self.source.is_some() && self.guest_here
                || self.record.is_some() && self.source().is_some(),
            Fault::CrashSource,
        );
        can(self.destination.is_some(), Fault::CrashDestination);
        let precopy =
            |d: &DeviceHere| matches!(d.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        let device = self.device.as_ref().filter(|_| self.source().is_some());
        can(device.is_some_and(precopy), Fault::Reinit);
        can(device.is_some() && self.runs_here, Fault::Reset);
        can(device.is_some() && self.runs_here, Fault::IdlePoll);
        let fails = matches!(
            self.work.front(),
            Some(Work::Track | Work::Sync(_) | Work::Save(_) | Work::Reattach)
        );
        can(fails, Fault::Worker);
        let called = matches!(self.device_work.front(), Some(DeviceWork::Call(_)));
        can(called && self.answers.is_empty(), Fault::Device);
        can(!self.disk.is_empty(), Fault::Disk);
        let fails = matches!(
            self.work_there.front(),
            Some(WorkThere::Apply | WorkThere::Wire | WorkThere::Unload)
        );
        can(fails, Fault::WorkerThere);
        can(!self.device_work_there.is_empty(), Fault::DeviceThere);
        can(!self.disk_there.is_empty(), Fault::DiskThere);
        for limit in &self.limits {
            let free = matches!(limit, TimeLimit::Answer | TimeLimit::Query);
            can(!free, Fault::Limit(*limit));
        }
        let state = self.state();
        let switching = matches!(state, Some(Look | Quiesce | StopCopy | AwaitReady));
        can(switching, Fault::TakeBack);
        can(state.is_some(), Fault::Cancel);
        can(state.is_some(), Fault::Fail);
        can(state.is_some() && self.runs_here, Fault::PowerOff);
        let waits = self.state_there().is_some_and(|s| s != dst::State::Aborted);
        can(waits && self.guest_here && state.is_some(), Fault::CancelThere);
        can(waits && self.guest_here && state.is_some(), Fault::FailThere);
        let newest = self.source().and_then(Source::connection);
        let session = self.source().map_or(0, |s| s.session(NIC).0);
        let unready = self.source().is_some_and(|s| !s.all_ready());
        let early = state.is_some_and(|s| s <= Quiesce);
        can(newest.is_some() && session > 1 && unready && early, Fault::StaleAck);
        can(newest.is_some() && state == Some(InDoubt), Fault::Unknown);
        let second = self.destination.as_ref().is_some_and(|d| d.attempt().0 > 1);
        can(second && self.heard > 0, Fault::OldCommit);
    }

    pub(super) fn suffer(&mut self, fault: Fault) {
        let newest = Connection(self.links.len() as u64);
        match fault {
            Fault::Cut(at) => self.links[at].up = false,
            Fault::CrashSource => self.crash_source(),
            Fault::CrashDestination => self.crash_destination(),
            Fault::Reinit => {
                if let Some(device) = &mut self.device {
                    (device.unread, device.reinit) = (device.unread + 1, true);
                    device.initial_end = device.offset + device.unread;
                }
            }
            Fault::Reset => {
                if let Some(device) = &mut self.device {
                    (device.state, device.unread, device.reinit) = (DeviceState::Running, 0, false);
                    self.answers.push_back(src::Event::DeviceReset(NIC));
                }
            }
            Fault::Worker => self.work(true),
            Fault::Device => self.device_works(true),
            Fault::Disk => self.write_record(true),
            Fault::WorkerThere => self.work_there(true),
            Fault::DeviceThere => self.device_works_there(true),
            Fault::DiskThere => self.write_record_there(true),
            Fault::Limit(limit) => self.strike(limit),
            Fault::Verdict => {
                self.judging = None;
                self.tell_source(src::Event::Verdict(Verdict::Revoke));
            }
            Fault::TakeBack => self.tell_source(src::Event::TakeBack(failure())),
            Fault::Cancel => self.tell_source(src::Event::Cancel),
            Fault::CancelThere => self.tell_destination(dst::Event::Cancel),
            Fault::Fail => self.tell_source(src::Event::Fail(failure())),
            Fault::FailThere => self.tell_destination(dst::Event::Fail(failure())),
            Fault::PowerOff => self.tell_source(src::Event::GuestEnded(failure())),
            Fault::IdlePoll => self.poll(),
            Fault::StaleAck => {
                let session = self.source().map_or(0, |s| s.session(NIC).0);
                let ack = Message::SwitchoverAck { device: NIC, session: Session(session - 1) };
                self.tell_source(src::Event::Message(newest, ack));
            }
            Fault::Unknown => {
                let attempt = self.source().map_or(Attempt(0), Source::attempt);
                let unknown = Message::Unknown { attempt, reason: None };
                self.tell_source(src::Event::Message(newest, unknown));
            }
            Fault::CommitAgain(at) => {
                let Some(attempt) = self.committed else { return };
                let connection = Connection(at as u64 + 1);
                self.tell_destination(dst::Event::Message(connection, Message::Commit { attempt }));
            }
            Fault::OldCommit => {
                let attempt = self.destination.as_ref().map_or(0, |d| d.attempt().0);
                let commit = Message::Commit { attempt: Attempt(attempt - 1) };
                self.tell_destination(dst::Event::Message(Connection(self.heard), commit));
            }
        }
    }
}
