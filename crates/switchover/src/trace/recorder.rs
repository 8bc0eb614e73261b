//! Events and actions become entries.

use std::collections::VecDeque;

use super::{ENTRIES_HALF, End, Entry, Header, Trace, VERSION, What};
use crate::handover::DeviceCall;
use crate::handover::source::{Action as Handover, Notice, Sync};
use crate::message::{DeviceIndex, Message};
use crate::source::{Action, Event, Info};
use crate::time::Time;

/// Reads of a device within this time are one entry, unless something happens to it between them.
const READS_JOIN: Time = Time::from_ms(20);

/// Makes a [`Trace`] of what goes by.
#[derive(Clone, Debug)]
pub struct Recorder {
    header: Header,
    begun: Time,
    head: Vec<Entry>,
    tail: VecDeque<Entry>,
    left: u64,
    /// Per device: reads that are no entry yet, since when.
    reads: Vec<Option<Reads>>,
    hello_at: Option<Time>,
    /// The echo under way.
    echo: Option<(u64, Time)>,
    pass_sync_at: Time,
}

#[derive(Clone, Copy, Debug)]
struct Reads {
    since: Time,
    bytes: u64,
    read: Time,
}

impl Recorder {
    /// A recorder of a migration that begins `now`.
    pub fn new(header: Header, now: Time) -> Self {
        Self {
            reads: vec![None; header.devices.len()],
            header: Header { version: VERSION, ..header },
            begun: now,
            head: Vec::new(),
            tail: VecDeque::new(),
            left: 0,
            hello_at: None,
            echo: None,
            pass_sync_at: Time(0),
        }
    }

    /// An event that the brain is told `now`.
    pub fn event(&mut self, now: Time, event: &Event) {
        let what = match event {
            Event::LinkUp(_) => {
                self.hello_at = Some(now);
                return;
            }
            Event::Message(_, message) => return self.message(now, message),
            Event::Info { device, info, stop_copy_bytes, offset, took } => {
                self.flush(now, *device);
                let (initial_bytes, dirty_bytes, reinit) = match info {
                    Info::Known { initial_bytes, dirty_bytes, reinit } => {
                        (Some(*initial_bytes), Some(*dirty_bytes), *reinit)
                    }
                    Info::Unknown => (None, None, false),
                };
                What::Info {
                    device: device.0,
                    initial_bytes,
                    dirty_bytes,
                    reinit,
                    stop_copy_bytes: *stop_copy_bytes,
                    offset: *offset,
                    took_us: us(*took),
                }
            }
            Event::CallDone { device, call, result, took } => {
                self.flush(now, *device);
                let call = match call {
                    DeviceCall::SetState(state) => format!("{state:?}"),
                    DeviceCall::Reset => "reset".to_owned(),
                    DeviceCall::Info => return,
                };
                let done = *result == crate::source::CallResult::Done;
                What::Call { device: device.0, call, done, took_us: us(*took) }
            }
            Event::Progress { device, bytes, read } => {
                return self.read(now, *device, *bytes, *read);
            }
            Event::NothingNow { device, .. } => {
                self.flush(now, *device);
                What::NothingNow { device: device.0 }
            }
            Event::StreamEnded { device } => {
                self.flush(now, *device);
                What::StreamEnds { device: device.0 }
            }
            Event::PauseRequested => What::PauseRequested,
            Event::Paused(Ok(())) => What::Paused,
            Event::Resumed(Ok(())) => What::Resumed,
            Event::PassSynced { dirty_bytes, exposed, answer: Ok(()) } => {
                let took_us = us(now.since(self.pass_sync_at));
                let exposed_us = exposed.map(us);
                What::PassSynced { dirty_bytes: *dirty_bytes, exposed_us, took_us }
            }
            Event::Synced { sync, dirty_bytes, took, answer: Ok(()) } => What::Synced {
                last: *sync == Sync::Final,
                dirty_bytes: *dirty_bytes,
                took_us: us(*took),
            },
            Event::PassSent(Ok(())) => What::PassSent,
            Event::LinkSample { bytes, busy } => What::Link { bytes: *bytes, busy_us: us(*busy) },
            Event::RamSent(Ok(())) => What::RamSent,
            Event::MachineStateSaved { took, answer: Ok(()) } => {
                What::MachineState { took_us: us(*took) }
            }
            _ => return,
        };
        self.note(now, what);
    }

    /// An action that the brain wants `now`.
    pub fn action(&mut self, now: Time, action: &Action) {
        let what = match action {
            Action::SyncPass => {
                self.pass_sync_at = now;
                return;
            }
            Action::Handover(Handover::Send(Message::Echo { number })) => {
                self.echo = Some((*number, now));
                return;
            }
            Action::SetThrottle { percent } => What::Throttle { percent: *percent },
            Action::Judged { point, verdict, estimate, elapsed } => What::Verdict {
                point: format!("{point:?}"),
                verdict: format!("{verdict:?}"),
                elapsed_us: us(*elapsed),
                expected_us: estimate.total().map(us),
                upper_us: estimate.upper().map(us),
            },
            Action::Handover(Handover::Enter(state)) => {
                (0..self.reads.len())
                    .for_each(|device| self.flush(now, DeviceIndex(device as u16)));
                What::State { name: state.name().to_owned() }
            }
            Action::Handover(Handover::Send(message)) => match message {
                Message::SessionBegin { device, .. } => {
                    self.flush(now, *device);
                    What::StreamBegins { device: device.0 }
                }
                Message::Pass { number, bytes } => What::Pass { number: *number, bytes: *bytes },
                Message::Commit { .. } => What::Commit,
                _ => return,
            },
            Action::Handover(Handover::SendStateEnd(_)) => What::StateEnd,
            Action::Handover(Handover::Report(notice)) => match notice {
                Notice::Reinit { device, late, .. } => {
                    What::Reinit { device: device.0, late: *late }
                }
                Notice::Acked { device, .. } => What::Acked { device: device.0 },
                _ => return,
            },
            _ => return,
        };
        self.note(now, what);
    }

    fn message(&mut self, now: Time, message: &Message) {
        let what = match message {
            Message::Accept { .. } => match self.hello_at.take() {
                Some(at) => What::RoundTrip { took_us: us(now.since(at)) },
                None => return,
            },
            Message::Echoed { number } => match self.echo {
                Some((sent, at)) if sent == *number => {
                    self.echo = None;
                    What::Echo { took_us: us(now.since(at)) }
                }
                _ => return,
            },
            Message::Ready { .. } => What::Ready,
            Message::Running { .. } => What::Running,
            Message::Telemetry { devices, .. } => {
                for told in devices {
                    let device = told.device.0;
                    if told.validate_ns.is_some() || told.start_ns.is_some() {
                        let ns = |ns: Option<u64>| ns.map(|ns| us(Time(ns)));
                        let (validate_us, start_us) = (ns(told.validate_ns), ns(told.start_ns));
                        self.note(now, What::Started { device, validate_us, start_us });
                    } else {
                        let load_us = us(Time(told.load_ns));
                        let bytes = told.loaded_bytes;
                        self.note(now, What::Loaded { device, bytes, load_us });
                    }
                }
                return;
            }
            _ => return,
        };
        self.note(now, what);
    }

    fn read(&mut self, now: Time, device: DeviceIndex, bytes: u64, read: Time) {
        let Some(slot) = self.reads.get_mut(usize::from(device.0)) else { return };
        let reads = slot.get_or_insert(Reads { since: now, bytes: 0, read: Time(0) });
        reads.bytes = reads.bytes.saturating_add(bytes);
        reads.read = reads.read + read;
        if now.since(reads.since) >= READS_JOIN {
            self.flush(now, device);
        }
    }

    fn flush(&mut self, now: Time, device: DeviceIndex) {
        let slot = self.reads.get_mut(usize::from(device.0));
        if let Some(Reads { bytes, read, .. }) = slot.and_then(Option::take) {
            self.note(now, What::Read { device: device.0, bytes, read_us: us(read) });
        }
    }

    fn note(&mut self, now: Time, what: What) {
        let entry = Entry { at_us: us(now.since(self.begun)), what };
        if self.head.len() < ENTRIES_HALF {
            return self.head.push(entry);
        }
        if self.tail.len() == ENTRIES_HALF {
            self.tail.pop_front();
            self.left = self.left.saturating_add(1);
        }
        self.tail.push_back(entry);
    }

    /// The trace of a migration that is over.
    pub fn finish(mut self, end: End) -> Trace {
        if self.left > 0 {
            let at_us = self.tail.front().map_or(0, |entry| entry.at_us);
            self.head.push(Entry { at_us, what: What::Left { entries: self.left } });
        }
        self.head.extend(self.tail);
        Trace { header: self.header, entries: self.head, end }
    }
}

fn us(time: Time) -> u64 {
    // To the nearest: a queue of a few µs is not 0.
    time.0.saturating_add(500) / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::TracedDevice;

    fn recorder() -> Recorder {
        let devices = vec![TracedDevice { id: "nic0".into(), ..TracedDevice::default() }];
        Recorder::new(Header { devices, ..Header::default() }, Time::from_ms(1))
    }

    const NIC: DeviceIndex = DeviceIndex(0);

    #[test]
    fn reads_are_joined_until_something_happens_to_the_device() {
        let mut recorder = recorder();
        for ms in 1..=10 {
            let read = Event::Progress { device: NIC, bytes: 100, read: Time::from_us(2) };
            recorder.event(Time::from_ms(ms), &read);
        }
        recorder.event(Time::from_ms(11), &Event::NothingNow { device: NIC, offset: 1000 });
        let trace = recorder.finish(End::default());
        let read = What::Read { device: 0, bytes: 1000, read_us: 20 };
        let entry = |what| Entry { at_us: 10_000, what };
        assert_eq!(trace.entries, [entry(read), entry(What::NothingNow { device: 0 })]);
        assert_eq!(trace.header.version, VERSION);
    }

    #[test]
    fn of_a_migration_that_lasts_the_beginning_and_the_end_are_kept() {
        let mut recorder = recorder();
        let entries = 3 * ENTRIES_HALF as u64;
        for us in 0..entries {
            let sample = Event::LinkSample { bytes: us, busy: Time(1) };
            recorder.event(Time::from_ms(1) + Time::from_us(us), &sample);
        }
        let trace = recorder.finish(End::default());
        assert_eq!(trace.entries.len(), 2 * ENTRIES_HALF + 1);
        assert_eq!(trace.entries[ENTRIES_HALF].what, What::Left { entries: ENTRIES_HALF as u64 });
        let last = trace.entries.last().unwrap();
        assert_eq!(last.what, What::Link { bytes: entries - 1, busy_us: 0 });
        assert_eq!(last.at_us, entries - 1);
    }

    #[test]
    fn a_device_nobody_declared_is_no_panic() {
        let mut recorder = recorder();
        let far = DeviceIndex(u16::MAX);
        recorder.event(Time(0), &Event::Progress { device: far, bytes: 1, read: Time(1) });
        recorder.event(Time(0), &Event::NothingNow { device: far, offset: 0 });
        assert_eq!(recorder.finish(End::default()).entries.len(), 1);
    }
}
