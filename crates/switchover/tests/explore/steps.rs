//! What may happen next, and what then is.

use super::*;
use crate::search::{Kind, Owes, System};

#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// The next message of a link arrives.
    ToDestination(usize),
    ToSource(usize),
    /// A side hears that a link is down; what was on its way to it is lost.
    DownAtSource(usize),
    DownAtDestination(usize),
    Connect,
    /// A thread does the next thing it was told.
    Worker,
    Device,
    /// The answer to a question arrives.
    Answer,
    Disk,
    WorkerThere,
    DeviceThere,
    DiskThere,
    /// The next frame of the data channel arrives.
    Data,
    /// The destination sees that the data channels are closed.
    DataEnds,
    StateComplete,
    Verdict(Verdict),
    Switchover,
    Poll,
    /// The guest, or its device, writes memory.
    Write,
    /// A pass over memory.
    Pass,
    WindowEnds,
    /// The destination's window is over, and the source's own limit says so.
    AnswerLimit,
    /// A question was not answered in time.
    QueryLimit,
    RestartSource,
    RestartDestination,
    Operator(Resolve),
    OperatorThere(Resolve),
    /// One of the things that cost one of the faults there are.
    Fault(Fault),
}

impl System for Model {
    type Step = Step;

    fn steps(&self) -> Vec<(Kind, Step)> {
        let mut out = Vec::new();
        if self.wrong.is_some() || self.excused {
            return out;
        }
        // A verdict is given at once, by the same call.
        if self.judging.is_some() {
            out.push((Kind::Plain, Step::Verdict(Verdict::Go)));
            if self.source().is_some_and(Source::unread_initial) {
                out.push((Kind::Plain, Step::Verdict(Verdict::Absorb)));
            }
            self.cost(&mut out, Fault::Verdict);
            return out;
        }
        self.steps_of_links(&mut out);
        self.steps_of_hosts(&mut out);
        self.steps_of_people(&mut out);
        if self.faults.left > 0 {
            self.faults(&mut out);
        }
        out
    }

    fn after(&self, step: Step) -> Self {
        let mut next = self.clone();
        next.take(step);
        next
    }

    fn violation(&self) -> Option<&'static str> {
        self.wrong
    }

    fn owes(&self) -> Owes {
        // Once the source has said that the guest is its own again, it goes with the source.
        let home_died = self.excused || self.took_back && self.died_here;
        match (home_died, self.crashed) {
            (true, _) => Owes::Nothing,
            (false, true) => Owes::WithOperator,
            (false, false) => Owes::ByItself,
        }
    }

    fn is_good(&self) -> bool {
        self.runs_here != self.runs_there
    }
}

impl Model {
    pub(super) fn steps_of_links(&self, out: &mut Vec<(Kind, Step)>) {
        for (at, link) in self.links.iter().enumerate() {
            let mut can = |step| out.push((Kind::Plain, step));
            if !link.to_destination.is_empty() && !link.told_destination {
                can(Step::ToDestination(at));
            }
            if !link.to_source.is_empty() && !link.told_source {
                can(Step::ToSource(at));
            }
            if !link.up && !link.told_source {
                can(Step::DownAtSource(at));
            }
            if !link.up && !link.told_destination {
                can(Step::DownAtDestination(at));
            }
        }
        if self.reconnect && self.source().is_some() && self.destination.is_some() {
            out.push((Kind::Plain, Step::Connect));
        }
    }

    pub(super) fn steps_of_hosts(&self, out: &mut Vec<(Kind, Step)>) {
        use src::State::*;
        let mut can = |enabled: bool, step| {
            if enabled {
                out.push((Kind::Plain, step));
            }
        };
        let reset_untold = self.answers.iter().any(|e| matches!(e, src::Event::DeviceReset(_)));
        let pauses = self.work.front() == Some(&Work::Pause);
        can(!(self.work.is_empty() || pauses && reset_untold), Step::Worker);
        can(!self.device_work.is_empty() && self.answers.is_empty(), Step::Device);
        can(!self.answers.is_empty(), Step::Answer);
        can(!self.disk.is_empty(), Step::Disk);
        can(!self.work_there.is_empty(), Step::WorkerThere);
        can(!self.device_work_there.is_empty(), Step::DeviceThere);
        can(!self.disk_there.is_empty(), Step::DiskThere);
        can(self.data_is_due(), Step::Data);
        can(self.data_closed, Step::DataEnds);
        can(self.state_complete().is_some(), Step::StateComplete);
        let precopy = self.state() == Some(Precopy);
        let source = self.source();
        can(precopy && source.is_some_and(Source::all_ready), Step::Switchover);
        let news = self.device.as_ref().is_some_and(|d| d.reinit || d.unread > 0);
        can(precopy && news && self.can_poll(), Step::Poll);
        can(self.can_write(), Step::Write);
        let in_data = self.data.iter().any(|f| matches!(f, Frame::Page { .. }));
        can(precopy && !in_data && (self.page.dirty || self.page.collected), Step::Pass);
        can(self.window, Step::WindowEnds);
        let answer = self.limits.contains(&TimeLimit::Answer) && !self.window;
        can(answer, Step::AnswerLimit);
        // Asked again where no word of it is under way.
        let idle = |link: &Link| link.to_destination.is_empty() && link.to_source.is_empty();
        let quiet = self.links.iter().all(idle) && self.disk_there.is_empty();
        can(self.limits.contains(&TimeLimit::Query) && quiet, Step::QueryLimit);
        let doubtful = matches!(self.record, Some((Decision::Committing, _)));
        can(self.source.is_none() && doubtful, Step::RestartSource);
        let recorded = !self.records_there.is_empty();
        can(self.destination.is_none() && recorded, Step::RestartDestination);
    }

    pub(super) fn can_poll(&self) -> bool {
        let free = |s: &Source| s.can_ask(NIC) && !s.is_calling(NIC);
        self.source().is_some_and(free)
    }

    /// The guest writes while it runs, the device while it may; once where that changes nothing more.
    pub(super) fn can_write(&self) -> bool {
        use DeviceState::*;
        let active =
            |d: &DeviceHere| matches!(d.state, Running | RunningP2p | PreCopy | PreCopyP2p);
        let writer = self.runs_here || self.device.as_ref().is_some_and(active);
        let tracked = self.state().is_some_and(|s| s >= src::State::Precopy);
        let whole = |f: &Frame| matches!(f, Frame::Page { stale: false, .. });
        let changes = self.page.fresh || self.data.iter().any(whole);
        self.guest_here && writer && tracked && changes
    }

    /// What people do who know what the two hosts show.
    pub(super) fn steps_of_people(&self, out: &mut Vec<(Kind, Step)>) {
        use dst::State::*;
        let mut can = |enabled: bool, step| {
            if enabled {
                out.push((Kind::Operator, step));
            }
        };
        let doubt = self.state() == Some(src::State::InDoubt);
        let starts = matches!(self.state_there(), Some(Starting | Running));
        can(doubt && self.guest_here && !starts, Step::Operator(RUN_HERE));
        // Nothing runs there any more, whatever was obeyed.
        let nothing_there = !self.memory_there && !starts;
        let force = Resolve::RunHere { force: true };
        can(doubt && self.guest_here && nothing_there, Step::Operator(force));
        can(doubt && self.runs_there, Step::Operator(Resolve::Discard));
        let complete = matches!(self.state_there(), Some(Prepared | Expired));
        can(complete && !self.guest_here, Step::OperatorThere(RUN_HERE));
        can(complete && self.runs_here, Step::OperatorThere(Resolve::Discard));
    }

    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::ToDestination(at) => self.deliver_there(at),
            Step::ToSource(at) => {
                if let Some(message) = self.links[at].to_source.pop_front() {
                    self.tell_source(src::Event::Message(Connection(at as u64 + 1), message));
                }
            }
            Step::DownAtSource(at) => {
                self.links[at].told_source = true;
                self.links[at].to_source.clear();
                self.tell_source(src::Event::LinkDown(Connection(at as u64 + 1), failure()));
            }
            Step::DownAtDestination(at) => {
                self.links[at].told_destination = true;
                self.links[at].to_destination.clear();
                self.tell_destination(dst::Event::LinkDown(Connection(at as u64 + 1), failure()));
            }
            Step::Connect => self.connect(),
            Step::Worker => self.work(false),
            Step::Device => self.device_works(false),
            Step::Answer => {
                if let Some(answer) = self.answers.pop_front() {
                    self.tell_source(answer);
                }
            }
            Step::Disk => self.write_record(false),
            Step::WorkerThere => self.work_there(false),
            Step::DeviceThere => self.device_works_there(false),
            Step::DiskThere => self.write_record_there(false),
            Step::Data => self.deliver_data(),
            Step::DataEnds => {
                self.data_closed = false;
                self.tell_destination(dst::Event::DataLost(failure()));
            }
            Step::StateComplete => {
                if let Some(attempt) = self.state_complete() {
                    self.awaited = None;
                    self.tell_destination(dst::Event::StateComplete(attempt));
                }
            }
            Step::Verdict(verdict) => {
                self.judging = None;
                self.tell_source(src::Event::Verdict(verdict));
            }
            Step::Switchover => self.tell_source(src::Event::Switchover),
            Step::Poll => self.poll(),
            Step::Write => {
                (self.page.dirty, self.page.fresh) = (true, false);
                for frame in &mut self.data {
                    if let Frame::Page { stale, .. } = frame {
                        *stale = true;
                    }
                }
            }
            Step::Pass => {
                (self.page.dirty, self.page.collected) = (false, false);
                self.data.push_back(Frame::Page { stale: false, last: false });
            }
            Step::WindowEnds => {
                self.window = false;
                self.tell_destination(dst::Event::WindowEnded);
            }
            Step::AnswerLimit => self.strike(TimeLimit::Answer),
            Step::QueryLimit => self.strike(TimeLimit::Query),
            Step::RestartSource => self.restart_source(),
            Step::RestartDestination => self.restart_destination(),
            Step::Operator(resolve) => self.tell_source(src::Event::Operator(resolve)),
            Step::OperatorThere(resolve) => self.tell_destination(dst::Event::Operator(resolve)),
            Step::Fault(fault) => {
                self.faults.left -= 1;
                self.suffer(fault);
            }
        }
    }

    pub(super) fn strike(&mut self, limit: TimeLimit) {
        self.limits.retain(|armed| *armed != limit);
        self.tell_source(src::Event::Timeout(limit));
    }

    pub(super) fn poll(&mut self) {
        if !self.can_poll() {
            return;
        }
        let mut actions = Vec::new();
        if let Some(source) = &mut self.source {
            source.ask(NIC, &mut actions);
        }
        actions.into_iter().for_each(|action| self.source_does(action));
        self.device_work.push_back(DeviceWork::Read);
    }

    pub(super) fn deliver_there(&mut self, at: usize) {
        let Some(message) = self.links[at].to_destination.pop_front() else { return };
        let connection = Connection(at as u64 + 1);
        let event = match message {
            Message::Hello { features, .. } => {
                self.heard = self.heard.max(connection.0);
                dst::Event::LinkUp(connection, features)
            }
            message => dst::Event::Message(connection, message),
        };
        self.tell_destination(event);
    }
}
