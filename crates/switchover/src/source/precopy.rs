//! What a migration does while the guest runs: passes over memory, polls, the dry look, the try.

use super::*;

/// How often, while the guest runs, old measurements of switchovers lose weight.
const FADE_INTERVAL: Time = Time::from_ms(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// Nothing under way; the next sync is due at this time.
    Idle(Time),
    /// Since this time.
    Syncing(Time),
    /// Collected: send, or try to switch over.
    Synced,
    /// The dry look, since this time.
    Looking(Time),
    Sending,
}

impl Source {
    pub(super) fn precopy_timer(&self) -> Option<Time> {
        let pass = match self.pass_step {
            Pass::Idle(at) => Some(at),
            Pass::Looking(since) => Some(since + self.config.look_limit),
            Pass::Syncing(_) | Pass::Synced | Pass::Sending => None,
        };
        let polls = self.devices.iter().enumerate().filter_map(|(index, device)| {
            let index = DeviceIndex(index as u16);
            let free = self.handover.can_ask(index) && !self.handover.is_calling(index);
            free.then_some(device.poll_at)
        });
        polls.chain(pass).chain(self.echo_timer()).min()
    }

    /// What a running guest's migration does next: polls, passes, the dry look, the try.
    pub(super) fn precopy(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.handover.state() != State::Precopy {
            return;
        }
        if let Some(failure) = self.hopeless(now, out) {
            return self.drive(now, handover::Event::Fail(failure), out);
        }
        self.send_echo(now, out);
        self.poll(now, out);
        let step = self.pass_step;
        match step {
            // The first pass takes all memory: there is nothing to sync yet.
            Pass::Idle(_) if self.pass == 0 => {
                self.synced_at = now;
                self.send_pass(now, out);
            }
            Pass::Idle(at) if at <= now => {
                self.pass_step = Pass::Syncing(now);
                out.push(Action::SyncPass);
            }
            Pass::Synced if self.rehearsal_due(now) => {
                self.promise.rehearsing = true;
                self.pass_step = Pass::Idle(now);
                self.tried = self.estimator.estimate(Ahead::All, now.since(self.synced_at));
                self.drive(now, handover::Event::Switchover, out);
            }
            Pass::Synced if self.worth_a_try(now) => self.dry_look(now, out),
            Pass::Synced => {
                self.slow_down(now, out);
                self.next_pass(now, out);
            }
            Pass::Looking(since) => {
                let looked = (0..self.devices.len()).all(|index| {
                    self.devices[index].looked || !self.handover.can_ask(DeviceIndex(index as u16))
                });
                if looked && self.worth_a_try(now) {
                    let unsynced = now.since(self.synced_at);
                    self.promise.odds = self.promise.settled.is_some().then(|| {
                        let limit = self.config.downtime_limit;
                        self.estimator.odds_permille(Ahead::All, unsynced, limit)
                    });
                    self.tried = self.estimator.estimate(Ahead::All, unsynced);
                    self.pass_step = Pass::Idle(now);
                    self.promise.looks_in_vain = 0;
                    self.drive(now, handover::Event::Switchover, out);
                } else if looked || since + self.config.look_limit <= now {
                    let unready = !self.handover.all_ready();
                    self.promise.looks_in_vain += u32::from(unready);
                    self.next_pass(now, out);
                }
            }
            Pass::Idle(_) | Pass::Syncing(_) | Pass::Sending => {}
        }
    }

    /// Every device is asked, and drained where it has something, while the guest runs.
    pub(super) fn dry_look(&mut self, now: Time, out: &mut Vec<Action>) {
        self.pass_step = Pass::Looking(now);
        for index in 0..self.devices.len() {
            self.devices[index].looked = false;
            self.ask(now, DeviceIndex(index as u16), out);
        }
        if self.devices.is_empty() {
            self.precopy(now, out);
        }
    }

    pub(super) fn poll(&mut self, now: Time, out: &mut Vec<Action>) {
        for index in 0..self.devices.len() {
            if self.devices[index].poll_at <= now {
                self.ask(now, DeviceIndex(index as u16), out);
            }
        }
    }

    pub(super) fn ask(&mut self, now: Time, index: DeviceIndex, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.handover.ask(index, &mut actions);
        out.extend(actions.into_iter().map(Action::Handover));
        if let Some(device) = self.devices.get_mut(usize::from(index.0)) {
            device.poll_at = now + self.config.poll_max;
        }
    }

    pub(super) fn next_pass(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.estimator.ram_remaining_bytes() == 0 {
            self.pass_step = Pass::Idle(now + self.pass_interval(now));
        } else {
            self.send_pass(now, out);
        }
    }

    /// When to collect again after a pass of `bytes`. At once, where less was dirtied meanwhile than was sent, and what
    /// is left takes a good part of the limit: a wait would bring it back. Not where no memory at all would not do
    /// either, or a device is not ready: each pass costs the guest write faults.
    pub(super) fn next_sync(&self, now: Time, bytes: u64) -> Time {
        const GOOD_PART: u64 = 16;
        /// Less than that is gained by no pass.
        const LEAST: Time = Time::from_us(250);
        let took = now.since(self.synced_at);
        let dirtied = u128::from(self.estimator.ram_dirty_bytes_per_s()) * u128::from(took.0);
        let shrinks = dirtied / 1_000_000_000 < u128::from(bytes - bytes / 8);
        let good_part = Time(self.config.downtime_limit.0 / GOOD_PART);
        let much = self.estimator.link_time(bytes) > good_part.max(LEAST);
        let hopeless = self.promise.floor_over && self.promise.settled.is_none();
        let in_vain = hopeless || !self.handover.all_ready();
        match shrinks && much && !in_vain {
            true => now,
            false => (self.synced_at + self.pass_interval(now)).max(now),
        }
    }

    /// How soon the next pass may follow. Each costs the guest write faults, and while nothing can come of them,
    /// since a device is not ready or the limit out of reach, they come less and less often.
    pub(super) fn pass_interval(&self, now: Time) -> Time {
        let (min, max) = (self.config.pass_min, self.config.pass_max);
        let in_vain = match (self.promise.unready, self.promise.hopeless_since) {
            (Some((since, _)), _) if !self.handover.all_ready() => Some(since),
            (_, Some((since, _))) if self.promise.settled.is_none() => Some(since),
            // Held back by a limit of nothing, until it is raised.
            _ if self.config.downtime_limit == Time(0) => self.promise.begun_at,
            _ => None,
        };
        let longer = in_vain.map_or(Time(0), |since| Time(now.since(since).0 / 4));
        let doubled = Time(min.0.saturating_mul(1 << self.promise.looks_in_vain.min(16)));
        longer.max(doubled).clamp(min, max.max(min))
    }

    pub(super) fn send_pass(&mut self, now: Time, out: &mut Vec<Action>) {
        self.pass += 1;
        self.pass_begins(now);
        self.pass_step = Pass::Sending;
        let bytes = self.estimator.ram_remaining_bytes();
        let message = Message::Pass { number: self.pass, bytes };
        out.push(Action::Handover(handover::Action::Send(message)));
        out.push(Action::SendPass(self.pass));
    }

    pub(super) fn pass_synced(&mut self, now: Time, dirty_bytes: u64, exposed: Option<Time>) {
        self.note_pass_sync(now);
        let interval = exposed.unwrap_or(now.since(self.synced_at)).0.max(1);
        let rate = u128::from(dirty_bytes) * 1_000_000_000 / u128::from(interval);
        self.estimator.ram_dirty(dirty_bytes, rate.min(u128::from(u64::MAX)) as u64);
        self.synced_at = now;
        if let Some(config) = self.config.auto_converge {
            self.converge.synced(dirty_bytes, config);
        }
        if now.since(self.faded_at) >= FADE_INTERVAL {
            self.estimator.fade();
            self.faded_at = now;
        }
        self.pass_step = Pass::Synced;
    }
}
