//! What the source's actions do.

use device_model::counted::CountedRead;
use switchover::handover::DeviceCall;
use switchover::handover::source::{Action as Do, CallResult, State, Sync};
use switchover::message::DeviceEnd;
use switchover::source::Info;

use super::*;
use crate::scenario::LOOK;

/// So little is what the guest did to the device during the read before. A reader that went on would find a
/// little again and again; here it waits for the next question.
const LITTLE_BYTES: u64 = 256 << 10;

impl World<'_> {
    pub(super) fn source_does(&mut self, action: src::Action) {
        match action {
            src::Action::OutOfReach(why) => self.result.out_of_reach = Some(why),
            src::Action::Judged { .. } => {}
            src::Action::SetThrottle { percent } => {
                self.memory.set_throttle(percent, self.now);
                self.result.throttle_percent = self.result.throttle_percent.max(percent);
                self.at(self.now, What::Source(src::Event::Throttled(Ok(()))));
            }
            src::Action::SyncPass => {
                let took = self.draw(self.scenario.hosts.final_sync);
                let at = self.worker(took);
                // What the guest writes until then is in the next one.
                let dirty_bytes = self.memory.collect(self.now);
                self.at(
                    at,
                    What::Source(src::Event::PassSynced {
                        dirty_bytes,
                        exposed: None,
                        answer: Ok(()),
                    }),
                );
            }
            src::Action::SendPass(_) => {
                let bytes = self.memory.collected_bytes;
                let busy = self.link_time(bytes);
                let at = self.worker(busy);
                (self.passing, self.pass_extra, self.pass_segment) = (true, Time(0), busy);
                self.at(at, What::PassDone { bytes, busy });
            }
            src::Action::Handover(action) => self.handover_does(action),
        }
    }

    fn handover_does(&mut self, action: Do) {
        let hosts = &self.scenario.hosts;
        match action {
            Do::Enter(State::RollingBack) if std::mem::take(&mut self.final_ram) => {
                // The last memory is not sent to its end.
                self.worker_free_at = self.now;
                self.at(self.now, What::Source(src::Event::RamSent(Ok(()))));
            }
            Do::Enter(State::Look) => {
                let estimate = self.source.status().estimate;
                self.result.tried(&estimate);
            }
            Do::Enter(_) => {}
            Do::Send(message) => {
                if let Message::SessionBegin { device, session } = &message
                    && let Some(here) = self.here.get_mut(Self::index(*device))
                {
                    (here.stream, here.offset) = (*session, 0);
                }
                let commit = matches!(message, Message::Commit { .. });
                self.send(false, self.connection, message);
                if commit {
                    let cut = self.scenario.faults.cut_after_commit_permille;
                    if self.random.below(1000) < cut {
                        // Before the Commit arrives, or after.
                        let at = self.now + Time(self.random.below(4_000_000));
                        self.at(at, What::Cut);
                    }
                }
            }
            Do::StartTracking => {
                self.memory.collect(self.now);
                self.at(
                    self.now + Time::from_ms(1),
                    What::Source(src::Event::TrackingStarted(Ok(()))),
                );
            }
            Do::Call(device, call) => self.begin_call(Self::index(device), call),
            Do::Read(device) => {
                let device = Self::index(device);
                if let Some(here) = self.here.get_mut(device) {
                    here.reading = true;
                    self.next_read(device);
                }
            }
            Do::StopReading(device) => {
                let device = Self::index(device);
                self.interrupt(device);
                if let Some(here) = self.here.get_mut(device) {
                    here.reading = false;
                }
            }
            Do::Pause => {
                self.pause_requested = Some(self.now);
                self.tell_source(Some(src::Event::PauseRequested));
                for device in 0..self.here.len() {
                    let late = self.scenario.devices[device].late_permille;
                    if self.random.below(1000) < late {
                        self.reconfigure(device);
                    }
                }
                let took = self.draw(self.scenario.hosts.pause);
                let at = self.worker(took);
                self.at(at, What::Source(src::Event::Paused(Ok(()))));
            }
            Do::Resume => {
                let took = self.draw(hosts.pause);
                let at = self.worker(took);
                self.at(at, What::Source(src::Event::Resumed(Ok(()))));
            }
            Do::Sync(sync) => {
                let took = self.draw(hosts.final_sync);
                let at = self.worker(took);
                let dirty_bytes = self.memory.collect(self.now);
                if sync == Sync::Provisional {
                    self.attempt_bytes = dirty_bytes;
                }
                let event = src::Event::Synced { sync, dirty_bytes, took, answer: Ok(()) };
                self.at(at, What::Source(event));
            }
            Do::RestoreDirty => self.memory.restore(self.attempt_bytes),
            Do::SendFinalRam => {
                let bytes = self.memory.collected_bytes;
                self.attempt_bytes = self.attempt_bytes.max(bytes);
                let busy = self.link_time(bytes);
                let at = self.worker(busy);
                self.final_ram = true;
                let attempt = self.source.handover().attempt();
                self.at(at, What::FinalRamDone { bytes, busy, attempt });
            }
            Do::SaveMachineState => {
                let took = self.draw(hosts.machine_state);
                let at = self.worker(took);
                self.at(at, What::Source(src::Event::MachineStateSaved { took, answer: Ok(()) }));
            }
            Do::Reattach => {
                let took = Time(self.random.below(hosts.bounds.reattach.0));
                let at = self.worker(took);
                self.at(at, What::Source(src::Event::Reattached(Ok(()))));
            }
            Do::SendStateEnd(attempt) => {
                let end = |(index, here): (usize, &Here)| DeviceEnd {
                    device: DeviceIndex(index as u16),
                    bytes: here.offset,
                    checksum: 0,
                };
                let devices = self.here.iter().enumerate().map(end).collect();
                let channels = Vec::new();
                let message = Message::StateEnd { attempt, channels, devices, sections: 0 };
                self.send(false, self.connection, message);
            }
            Do::Verify(_) => self.at(self.now, What::Source(src::Event::Verified(Ok(())))),
            Do::Record(..) => {
                let took = Time(self.random.below(hosts.bounds.record.0));
                self.at(self.now + took, What::Source(src::Event::Recorded(Ok(()))));
            }
            Do::Reconnect => {
                let after = self.scenario.faults.cut_lasts.max(Time::from_ms(1));
                self.at(self.now + after, What::LinkUp);
            }
            Do::Finish(outcome) => self.end(outcome),
            Do::StopTracking | Do::Report(_) | Do::Judge(_) | Do::Arm(_) | Do::Disarm(_) => {}
        }
    }

    /// Sees what happens on the source before the brain hears of it.
    pub(super) fn before_source(&mut self, event: &src::Event) {
        match event {
            src::Event::Paused(Ok(())) => {
                self.source_runs = false;
                self.memory.set_runs(false, self.now);
                self.work();
            }
            src::Event::Resumed(Ok(())) => {
                self.work();
                self.source_runs = true;
                self.memory.set_runs(true, self.now);
                if let Some(requested) = self.pause_requested.take() {
                    self.result.blackouts.push(self.now.since(requested));
                }
            }
            _ => {}
        }
    }

    fn work(&mut self) {
        let (now, runs) = (self.now, self.source_runs);
        self.here.iter_mut().for_each(|here| here.work(now, runs));
    }

    /// The worker does one thing at a time; when this one is done.
    fn worker(&mut self, took: Time) -> Time {
        self.worker_free_at = self.worker_free_at.max(self.now) + took;
        self.worker_free_at
    }

    /// How long bytes take on the link, at a rate near this migration's.
    fn link_time(&mut self, bytes: u64) -> Time {
        let part = 0.9 + 0.1 * self.random.part();
        Time(device::per(bytes, (self.link_bytes_per_s as f64 * part) as u64))
    }

    pub(super) fn pass_done(&mut self, bytes: u64, busy: Time) {
        // Device data took its share meanwhile, which is half of the link at most.
        let extra = std::mem::take(&mut self.pass_extra).min(Time(self.pass_segment.0 / 2));
        if extra > Time::from_us(10) {
            self.pass_segment = extra;
            let at = self.worker(extra);
            return self.at(at, What::PassDone { bytes, busy });
        }
        self.passing = false;
        self.memory.sent(bytes);
        if bytes >= 1 << 20 {
            self.tell_source(Some(src::Event::LinkSample { bytes, busy }));
        }
        self.tell_source(Some(src::Event::PassSent(Ok(()))));
    }

    pub(super) fn final_ram_done(&mut self, bytes: u64, busy: Time, attempt: Attempt) {
        if !self.final_ram || attempt != self.source.handover().attempt() {
            return;
        }
        self.final_ram = false;
        self.memory.sent(bytes);
        if bytes >= 1 << 20 {
            self.tell_source(Some(src::Event::LinkSample { bytes, busy }));
        }
        self.tell_source(Some(src::Event::RamSent(Ok(()))));
    }

    // --- devices ------------------------------------------------------------------------------

    /// Gives up the read under way; what it has counts.
    fn interrupt(&mut self, device: usize) {
        let (now, runs) = (self.now, self.source_runs);
        let Some(here) = self.here.get_mut(device) else { return };
        here.work(now, runs);
        if let Some((bytes, took)) = here.interrupt(now) {
            self.read_bytes(device, bytes, took);
        }
    }

    fn begin_call(&mut self, device: usize, call: DeviceCall) {
        self.interrupt(device);
        let now = self.now;
        let Some(here) = self.here.get_mut(device) else { return };
        here.calling = true;
        let free_at = here.free_at.max(now);
        let took = match device::state(call) {
            Some(target) => {
                let timing = scenario::draw_timing(&here.profile, &mut self.random);
                *here.counted.timing_mut() = timing;
                let random = &mut self.random;
                let mut next = here.counted.clone();
                next.set_state(target, now.0, |one_in| random.once_in(one_in)).map(Time)
            }
            None if call == DeviceCall::Info => Some(Time(self.random.within(LOOK))),
            None => Some(Time(scenario::draw_timing(&here.profile, &mut self.random).reset_ns)),
        };
        let took = took.unwrap_or_default();
        self.at(free_at + took, What::CallHere { device, call, began: free_at });
    }

    pub(super) fn call_here(&mut self, device: usize, call: DeviceCall, began: Time) {
        let (now, runs) = (self.now, self.source_runs);
        let index = DeviceIndex(device as u16);
        let took = now.since(began);
        let Some(here) = self.here.get_mut(device) else { return };
        here.work(now, runs);
        here.calling = false;
        let event = match device::state(call) {
            Some(target) => match here.counted.set_state(target, now.0, |_| false) {
                Some(_) => {
                    src::Event::CallDone { device: index, call, result: CallResult::Done, took }
                }
                None => {
                    let failure = Failure::new(Side::Source, "the device refused a state");
                    self.broken.get_or_insert(format!("device {device} refused {call:?}"));
                    let result = CallResult::Failed { state: None, failure };
                    src::Event::CallDone { device: index, call, result, took }
                }
            },
            None if call == DeviceCall::Info => {
                let info = here.counted.info(now.0).map_or(Info::Unknown, |info| Info::Known {
                    initial_bytes: info.initial_bytes,
                    dirty_bytes: info.dirty_bytes,
                    reinit: info.reinit,
                });
                let stop_copy_bytes = here.counted.stop_copy_length();
                let offset = here.offset;
                src::Event::Info { device: index, info, stop_copy_bytes, offset, took }
            }
            None => {
                here.counted.reset();
                src::Event::CallDone { device: index, call, result: CallResult::Done, took }
            }
        };
        self.tell_source(Some(event));
        self.next_read(device);
    }

    fn next_read(&mut self, device: usize) {
        let (now, runs) = (self.now, self.source_runs);
        let share = if self.passing { 2 } else { 1 };
        let Some(here) = self.here.get_mut(device) else { return };
        if !here.reading || here.calling || here.job.is_some() {
            return;
        }
        if !here.counted.state().is_saving() {
            here.reading = false;
            return;
        }
        here.work(now, runs);
        let readable = here.counted.readable_bytes();
        let bytes = (readable / 8).clamp(1 << 20, 256 << 20).min(readable);
        let link = Time(device::per(bytes, self.link_bytes_per_s / share));
        let little = Time::from_us(20);
        let took = Time(here.read_ns(bytes)).max(link).max(little);
        here.jobs += 1;
        let began = here.free_at.max(now);
        let job = device::Job { number: here.jobs, bytes, began, ends: began + took };
        here.job = Some(job);
        self.at(job.ends, What::Read(device, job.number));
    }

    pub(super) fn read_done(&mut self, device: usize, number: u64) {
        let (now, runs) = (self.now, self.source_runs);
        let index = DeviceIndex(device as u16);
        let Some(here) = self.here.get_mut(device) else { return };
        let Some(job) = here.job.take_if(|job| job.number == number) else { return };
        here.work(now, runs);
        match here.counted.read(job.bytes, now.0) {
            CountedRead::Data(bytes) => {
                here.offset += bytes;
                let read = Time(here.read_ns(bytes)).min(job.ends.since(job.began));
                let rest = here.counted.readable_bytes();
                let caught_up = runs && here.counted.initial_unread_bytes() == 0;
                let nothing = caught_up && (1..LITTLE_BYTES).contains(&rest);
                here.reading = !nothing;
                let offset = here.offset;
                self.read_bytes(device, bytes, read);
                if nothing {
                    return self
                        .tell_source(Some(src::Event::NothingNow { device: index, offset }));
                }
                self.next_read(device);
            }
            CountedRead::NothingNow => {
                here.reading = false;
                let offset = here.offset;
                self.tell_source(Some(src::Event::NothingNow { device: index, offset }));
            }
            CountedRead::End => {
                here.reading = false;
                self.tell_source(Some(src::Event::StreamEnded { device: index }));
            }
        }
    }

    /// Bytes were read and go out.
    fn read_bytes(&mut self, device: usize, bytes: u64, read: Time) {
        if self.passing {
            self.pass_extra = self.pass_extra + Time(device::per(bytes, self.link_bytes_per_s));
        }
        let (stream, life) = (self.here[device].stream.0, self.there[device].life);
        let at = self.now + self.one_way();
        self.at(at, What::Arrived { device, stream, bytes, life });
        let index = DeviceIndex(device as u16);
        self.tell_source(Some(src::Event::Progress { device: index, bytes, read }));
    }
}
