//! What is measured on the way: messages, calls, answers and bytes go by and are noted.

use super::*;

impl Source {
    pub(super) fn listen(&mut self, now: Time, message: &Message) {
        match message {
            Message::Accept { features, .. } => {
                if let Some(at) = self.hello_at.take() {
                    self.note_accept(now.since(at), features.echo);
                }
            }
            Message::Echoed { number } => self.note_echoed(now, *number),
            Message::Ready { window_ms, .. } => {
                self.answer_limit = Time::from_ms(window_ms.saturating_add(1_000));
                // What the devices still had to load is a part of the transfer, and would count twice.
                if let Some((at, loading)) = self.state_end_at.take() {
                    self.estimator.took(Step::Validate, now.since(at).since(loading));
                }
            }
            Message::Running { .. } => self.note_running(now),
            Message::Telemetry { devices, populated_bytes, populate_ns, .. } => {
                if let Some(bytes) = populated_bytes {
                    self.estimator.populated(*bytes, Time(*populate_ns));
                }
                for device in devices {
                    let known = self.devices.get(usize::from(device.device.0));
                    let initial = known.is_some_and(|d| device.loaded_bytes <= d.initial_end);
                    if self.estimator.telemetry(device) && initial {
                        self.comes_closer(now);
                    }
                }
                if !devices.is_empty() {
                    self.telemetry_at = now;
                }
            }
            _ => {}
        }
    }

    /// The guest runs there: what was expected of the blackout can be compared.
    pub(super) fn note_running(&mut self, now: Time) {
        let Some(sent) = self.promise.commit_sent_at.take() else { return };
        let (took, host) = (now.since(sent), self.host());
        let round_trip = self.estimator.round_trip();
        self.estimator.took(Step::Start, took.since(round_trip));
        let bound = self.estimator.commit_bound().since(host.record);
        self.check_bound("commit and start at the destination", None, took, Some(bound));
        // A verifying run stands still to be hashed, and one that absorbed waited for more than its terms.
        if !self.handover.features().verify {
            let stretches = std::mem::take(&mut self.promise.stretches);
            self.promise.ended = stretches
                .into_iter()
                .map(|(ahead, modelled, began)| Stretch { ahead, modelled, took: now.since(began) })
                .collect();
        }
    }

    /// A sync while the guest runs is the same work as one in the blackout, with the vCPUs and what a pass still has to
    /// do in its way: the quicker of two in a row says what it takes, before anything stands still.
    pub(super) fn note_pass_sync(&mut self, now: Time) {
        if let Pass::Syncing(since) = self.pass_step {
            let took = now.since(since);
            if let Some(before) = self.sync_took.replace(took) {
                self.estimator.took(Step::FinalSync, took.min(before));
            }
        }
    }

    pub(super) fn call_took(
        &mut self,
        device: DeviceIndex,
        call: DeviceCall,
        took: Time,
        done: bool,
    ) {
        let DeviceCall::SetState(target) = call else { return };
        let Some((step, bound)) = self.step_of(device, target) else { return };
        if done {
            self.estimator.took(step, took);
        }
        self.check_bound(&format!("{target:?}"), Some(device), took, bound);
    }

    /// How long a call on a device that is under way may take; `None` with the vCPUs running, and where nobody
    /// says.
    pub fn call_bound(&self, device: DeviceIndex, call: DeviceCall) -> Option<Time> {
        let DeviceCall::SetState(target) = call else { return None };
        self.step_of(device, target)?.1
    }

    /// The step of a blackout that a device's way to `target` is, and its bound.
    fn step_of(&self, device: DeviceIndex, target: DeviceState) -> Option<(Step, Option<Time>)> {
        self.pause_requested_at?;
        let back = !matches!(self.handover.state(), State::Quiesce | State::StopCopy);
        let declared = self.estimator.bounds(device);
        Some(match target {
            DeviceState::PreCopyP2p => (Step::Quiesce(device), declared.quiesce),
            DeviceState::RunningP2p if !back => (Step::Quiesce(device), declared.quiesce),
            DeviceState::StopCopy => (Step::Stop(device), declared.stop),
            DeviceState::PreCopy => (Step::Unquiesce(device), declared.unquiesce),
            DeviceState::RunningP2p | DeviceState::Running => (Step::Run(device), declared.run),
            _ => return None,
        })
    }

    pub(super) fn note_info(
        &mut self,
        now: Time,
        index: DeviceIndex,
        info: Info,
        stop_copy_bytes: Option<u64>,
        took: Time,
        out: &mut Vec<Action>,
    ) {
        self.estimator.took(Step::Look(index), took);
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        device.looked = true;
        device.stop_copy_bytes = stop_copy_bytes;
        let mut closer = false;
        let precopy = match info {
            Info::Known { initial_bytes, dirty_bytes, .. } => {
                if device.least_initial_bytes.is_none_or(|least| initial_bytes < least) {
                    (device.least_initial_bytes, closer) = (Some(initial_bytes), true);
                }
                device.status.initial_bytes = Some(initial_bytes);
                device.status.dirty_bytes = Some(dirty_bytes);
                Some(initial_bytes.saturating_add(dirty_bytes))
            }
            Info::Unknown => {
                (device.status.initial_bytes, device.status.dirty_bytes) = (None, None);
                None
            }
        };
        let remaining = estimate::remaining_bytes(stop_copy_bytes, precopy);
        device.status.remaining_bytes = remaining;
        self.estimator.device_remaining(index, remaining);
        // Data, or no way to know: read. With nothing there the next question can wait longer.
        // Not for an answer that a guest's reset overtook: the next session is read once it has begun.
        let readable = self.handover.state() == State::Precopy && self.handover.can_ask(index);
        // Where it claims data and a read finds none, the same.
        let (got, found_nothing) =
            (std::mem::take(&mut device.got), std::mem::take(&mut device.found_nothing));
        if precopy == Some(0) || (found_nothing && !got) {
            device.poll_interval = Time(device.poll_interval.0.saturating_mul(2));
        } else {
            device.poll_interval = self.config.poll_min;
        }
        if precopy != Some(0) && readable && !device.reading {
            device.reading = true;
            out.push(Action::Handover(handover::Action::Read(index)));
        }
        device.poll_interval =
            device.poll_interval.clamp(self.config.poll_min, self.config.poll_max);
        device.poll_at = now + device.poll_interval;
        if closer {
            self.comes_closer(now);
        }
    }

    pub(super) fn note_read(&mut self, index: DeviceIndex, bytes: u64) {
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        device.got |= bytes > 0;
        if let Some(remaining) = &mut device.status.remaining_bytes {
            *remaining = remaining.saturating_sub(bytes);
            self.estimator.device_remaining(index, device.status.remaining_bytes);
        }
        for left in
            [&mut device.status.initial_bytes, &mut device.status.dirty_bytes].into_iter().flatten()
        {
            *left = left.saturating_sub(bytes);
        }
    }

    pub(super) fn note_nothing_now(&mut self, index: DeviceIndex) {
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        (device.reading, device.found_nothing) = (false, true);
    }

    /// Sees the handover's own actions go by.
    pub(super) fn watch(&mut self, now: Time, action: &handover::Action) {
        match action {
            handover::Action::Read(index) => {
                if let Some(device) = self.devices.get_mut(usize::from(index.0)) {
                    device.reading = true;
                }
            }
            handover::Action::Send(Message::SessionBegin { device, .. }) => {
                self.estimator.stream_begins(*device);
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    (d.poll_interval, d.poll_at) = (self.config.poll_min, now);
                }
            }
            handover::Action::Send(Message::InitialDataSent { device, offset, .. }) => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.initial_end = *offset;
                }
            }
            handover::Action::Send(Message::Describe { .. }) => {
                self.estimator.expect_telemetry(self.handover.features().telemetry);
            }
            handover::Action::SendStateEnd(_) => {
                // They have gone on since it was told.
                let loading = self.estimator.loading().since(now.since(self.telemetry_at));
                self.state_end_at = Some((now, loading));
            }
            handover::Action::Send(Message::Commit { .. }) => {
                self.promise.commit_sent_at = Some(now);
            }
            handover::Action::Pause => self.promise.absorbed = 0,
            handover::Action::Resume => self.promise.resume_at = Some(now),
            handover::Action::Enter(State::Look) => {
                (self.promise.committing, self.promise.late_reinit) = (false, false);
                self.promise.stretches = vec![(Ahead::All, self.tried.modelled, now)];
            }
            handover::Action::Enter(State::Precopy) => {
                self.promise.begun_at.get_or_insert(now);
            }
            handover::Action::Report(notice) => self.count(now, notice),
            handover::Action::Finish(outcome) => self.blackouts.finished(outcome),
            _ => {}
        }
        if let handover::Action::Enter(state) = action {
            self.blackouts.entered(*state, self.promise.rehearsing);
        }
    }

    pub(super) fn count(&mut self, now: Time, notice: &Notice) {
        match notice {
            Notice::Reinit { device, late, .. } => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.status.reinits += 1;
                    d.status.late_reinits += u32::from(*late);
                }
                self.promise.late_reinit |= *late;
                self.promise.reinit_unready |= self.promise.unready.is_some();
            }
            Notice::Acked { device, .. } => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.status.acks += 1;
                    self.estimator.device_acked(*device, d.initial_end);
                }
                // Passes were few while nothing could come of them.
                let ready = self.handover.all_ready() && self.promise.looks_in_vain < 4;
                if let (Pass::Idle(at), true) = (self.pass_step, ready) {
                    let soon = (self.synced_at + self.config.pass_min).max(now);
                    self.pass_step = Pass::Idle(at.min(soon));
                }
            }
            Notice::Absorbing(_) => {
                self.absorptions += 1;
                self.promise.absorbed += 1;
                self.promise.stretches.clear();
            }
            Notice::RollingBack { reason, .. } => {
                self.blackouts.blame(|| reason.to_string());
                self.roll_backs += 1;
            }
            Notice::Revoked(_) | Notice::RolledBack(_) => {
                let back_off = self.config.back_off.0 << self.revocations.min(5);
                self.not_before = now + Time(back_off);
                self.revocations += 1;
                self.promise.rehearsed |= std::mem::take(&mut self.promise.rehearsing);
                self.pass_step = Pass::Idle(now);
            }
            _ => {}
        }
    }
}
