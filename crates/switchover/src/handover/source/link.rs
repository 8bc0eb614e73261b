//! Connections and messages.

use super::*;

impl Source {
    pub(super) fn link_up(&mut self, connection: Connection, out: &mut Vec<Action>) {
        if self.state.is_end() || self.seen >= connection {
            return;
        }
        (self.connection, self.seen) = (Some(connection), connection);
        out.push(Action::Send(Message::Hello {
            features: self.setup.features,
            migration: self.setup.migration,
            instance: self.setup.instance,
            connection,
            secret: self.secret,
        }));
        if self.state == State::Setup {
            out.push(Action::Arm(TimeLimit::Setup));
        }
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
        self.connection = None;
        match self.state {
            State::Committed => self.doubt(out),
            State::InDoubt => out.push(Action::Reconnect),
            _ => self.fail(failure, out),
        }
    }

    pub(super) fn doubt(&mut self, out: &mut Vec<Action>) {
        self.enter(State::InDoubt, out);
        out.push(Action::Reconnect);
    }

    pub(super) fn message(
        &mut self,
        connection: Connection,
        message: Message,
        out: &mut Vec<Action>,
    ) {
        // A recorded decision never changes, so its answers count over any connection.
        match message {
            Message::Running { attempt } => return self.running(attempt, out),
            Message::Never { attempt, reason } => return self.never(attempt, reason, out),
            Message::Unknown { reason, .. } if self.state.is_committed() => {
                return self.unknown(connection, reason, out);
            }
            _ => {}
        }
        if self.connection != Some(connection) {
            return;
        }
        match message {
            Message::Accept { features, secret, .. } => self.accepted(features, secret, out),
            Message::DescribeOk if self.at_setup(SetupStep::Describe) => {
                out.push(Action::Disarm(TimeLimit::Setup));
                if self.setup.dry_run {
                    self.ending = Some(Outcome::DryRun);
                } else {
                    self.setup_step = SetupStep::Tracking;
                    self.tracking_asked = true;
                    out.push(Action::StartTracking);
                }
            }
            Message::Mismatch { list } if self.at_setup(SetupStep::Describe) => {
                let what = format!("the destination does not fit: {}", list.join("; "));
                let remedy = "start the destination with what the source has";
                self.fail(Failure::new(Side::Destination, what).remedy(remedy), out);
            }
            Message::Refuse { reason } if !self.state.is_committed() => self.fail(reason, out),
            Message::SwitchoverAck { device, session } => self.acked(device, session, out),
            Message::Ready { attempt, .. } => self.ready(attempt, out),
            Message::RolledBack { attempt } => self.rolled_back(attempt, out),
            // A destination that saw its data channels end says so; here it is known why. One that cannot
            // roll back says Never. What fails after it has rolled back is a failure.
            Message::Failed { .. }
                if self.state == State::RollingBack && !self.rolled_back_there => {}
            Message::Failed { reason } => self.fail(reason, out),
            Message::Cancel => self.cancel(out),
            _ => {}
        }
    }

    pub(super) fn ask_destination(&mut self, out: &mut Vec<Action>) {
        out.push(Action::Send(Message::Query { attempt: self.attempt }));
        out.push(Action::Arm(TimeLimit::Query));
    }

    pub(super) fn at_setup(&self, step: SetupStep) -> bool {
        self.state == State::Setup && self.setup_step == step && self.ending.is_none()
    }

    pub(super) fn accepted(&mut self, features: Features, secret: Id, out: &mut Vec<Action>) {
        if self.state.is_committed() {
            let asks = match self.vcpus {
                Vcpus::Gone => !self.rules.without_guest_no_query,
                _ => self.rules.query_in_doubt,
            };
            if asks && self.secret == Some(secret) {
                self.ask_destination(out);
            }
        } else if self.at_setup(SetupStep::Hello) {
            self.features = self.setup.features.intersect(features);
            self.secret = Some(secret);
            self.setup_step = SetupStep::Describe;
            let body = self.setup.description.clone();
            out.push(Action::Send(Message::Describe { body }));
        }
    }
}
