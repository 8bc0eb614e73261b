//! Connections and messages.

use super::*;

impl Destination {
    pub(super) fn link_up(
        &mut self,
        connection: Connection,
        features: Features,
        out: &mut Vec<Action>,
    ) {
        if self.connection.is_some_and(|newest| newest >= connection) {
            return;
        }
        if self.connection.is_none() {
            self.features = self.features.intersect(features);
        }
        self.connection = Some(connection);
        self.link = true;
        let accept = Message::Accept {
            features: self.features,
            instance: self.instance,
            secret: self.secret,
        };
        out.push(Action::Send(connection, accept));
        // A source that lost its guest does not ask, so what is decided is said without being asked.
        let decided = match self.decision {
            Some(Decision::Running) => self.state == State::Running || self.lost_guest(),
            Some(Decision::Never) => true,
            _ => false,
        };
        if decided {
            self.answer(connection, self.attempt, out);
        }
    }

    /// `running` is recorded, and the guest died with the process that recorded it.
    pub(super) fn lost_guest(&self) -> bool {
        self.decision == Some(Decision::Running) && self.state == State::Aborted
    }

    pub(super) fn link_down(
        &mut self,
        connection: Connection,
        failure: Failure,
        out: &mut Vec<Action>,
    ) {
        if self.connection != Some(connection) {
            return;
        }
        self.link = false;
        // Before Ready nothing can come of it: the source goes on at once. From Prepared on only the
        // window, the source's next connection or the operator decide.
        if matches!(self.state, State::Setup | State::Loading) && self.step < Step::RecordPrepared {
            self.abort(failure, out);
        }
    }

    pub(super) fn message(
        &mut self,
        connection: Connection,
        message: Message,
        out: &mut Vec<Action>,
    ) {
        if let Message::Query { attempt } = message {
            return self.query(connection, attempt, out);
        }
        if self.connection != Some(connection) {
            match message {
                Message::Commit { attempt } if !self.rules.commit_on_newest_connection => {
                    self.commit(connection, attempt, out);
                }
                _ => {}
            }
            return;
        }
        match message {
            Message::Describe { body } if self.state == State::Setup && !self.compared => {
                self.compared = true;
                out.push(Action::Compare(body));
            }
            Message::SessionBegin { device, session } => self.session_begin(device, session, out),
            Message::InitialDataSent { device, session, offset } => {
                let Some(d) = self.device_mut(device) else {
                    return self.unknown_device(device, out);
                };
                if session == d.session {
                    d.unacked = Some((session, offset));
                }
            }
            Message::Reinit { device, session, .. } => {
                let Some(d) = self.device_mut(device) else {
                    return self.unknown_device(device, out);
                };
                if session > d.session {
                    d.session = session;
                    d.unacked = None;
                }
            }
            Message::StopCopyBegin { attempt } if self.loading() && attempt > self.attempt => {
                self.attempt = attempt;
            }
            Message::StateEnd { attempt, .. } if self.loading() && attempt == self.attempt => {
                self.ended = Some(attempt);
                out.push(Action::AwaitState(message));
            }
            Message::HashRequest { attempt }
                if self.state == State::Prepared && attempt == self.attempt =>
            {
                out.push(Action::Hash(connection, attempt));
            }
            Message::Commit { attempt } => self.commit(connection, attempt, out),
            Message::RollBack { attempt } => self.roll_back(connection, attempt, out),
            Message::Abort { attempt } => self.aborted_by_source(connection, attempt, out),
            Message::Cancel => {
                let reason = Failure::new(Side::Source, "cancelled at the source");
                self.refuse_to_run(reason, out);
            }
            Message::Failed { reason } => self.refuse_to_run(reason, out),
            _ => {}
        }
    }

    pub(super) fn loading(&self) -> bool {
        self.loads(Step::Load)
    }

    pub(super) fn loads(&self, step: Step) -> bool {
        self.state == State::Loading && self.step == step
    }

    pub(super) fn unknown_device(&mut self, device: DeviceIndex, out: &mut Vec<Action>) {
        let what =
            format!("the source spoke of device number {}, which Describe did not", device.0);
        self.fail(Failure::new(Side::Source, what), out);
    }

    pub(super) fn compared(
        &mut self,
        result: Result<Vec<DeviceTraits>, Vec<String>>,
        out: &mut Vec<Action>,
    ) {
        let (State::Setup, Some(connection)) = (self.state, self.connection) else { return };
        match result {
            Ok(traits) => {
                let device = |traits| Device {
                    traits,
                    state: DeviceState::Running,
                    pending: None,
                    stream: Session(0),
                    next_stream: None,
                    loaded: 0,
                    unacked: None,
                    session: Session(0),
                    lost: false,
                };
                self.devices = traits.into_iter().map(device).collect();
                self.enter(State::Loading, out);
                out.push(Action::Send(connection, Message::DescribeOk));
            }
            Err(list) => {
                let what = format!("the source does not fit: {}", list.join("; "));
                out.push(Action::Send(connection, Message::Mismatch { list }));
                self.abort(Failure::new(Side::Destination, what), out);
            }
        }
    }

    pub(super) fn session_begin(
        &mut self,
        index: DeviceIndex,
        session: Session,
        out: &mut Vec<Action>,
    ) {
        if !self.loading() {
            return;
        }
        let Some(device) = self.device_mut(index) else { return self.unknown_device(index, out) };
        if session <= device.session {
            return;
        }
        device.session = session;
        device.unacked = None;
        device.next_stream = Some(session);
    }
}
