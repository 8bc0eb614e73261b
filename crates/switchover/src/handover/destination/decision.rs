//! Whether the guest runs here: Commit, the operator, questions, and the record that comes before every answer.

use super::*;

impl Destination {
    pub(super) fn commit(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        let ours = attempt == self.attempt || !self.rules.commit_of_this_attempt;
        let reason = match (self.state, self.step) {
            _ if !ours => "another attempt is loaded here",
            (State::Prepared, Step::Prepared) => return self.start(out),
            (State::Expired, Step::Prepared) if !self.rules.commit_within_window => {
                return self.start(out);
            }
            (State::Running, _) | (_, Step::Wire | Step::RecordRunning | Step::P2p | Step::Run) => {
                return self.answer(connection, attempt, out);
            }
            // Not obeyed, and no `never` either: it was sent long ago, and if its source has died since, this
            // is the only copy. A source that lives asks, and then it is.
            (State::Expired, Step::Prepared) if self.rules.late_commit_is_kept => {
                let what = "Commit came after the window";
                let reason = Some(Failure::new(Side::Destination, what));
                return out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
            }
            _ => "Commit came to a destination that is not prepared",
        };
        let reason = Failure::new(Side::Destination, reason);
        if attempt == self.attempt {
            self.asks(connection);
            self.refuse_to_run(reason, out);
        } else {
            out.push(Action::Send(connection, Message::Unknown { attempt, reason: Some(reason) }));
        }
    }

    pub(super) fn start(&mut self, out: &mut Vec<Action>) {
        self.step = Step::Wire;
        self.enter(State::Starting, out);
        out.push(Action::Wire);
    }

    /// The guest could not be started, and nothing of it has. It is kept: whoever committed may have died
    /// since, and this may be the only copy. A source that lives hears of it and asks, and then it is
    /// `never`; an operator may try again.
    pub(super) fn not_started(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if self.queried || !self.rules.failed_start_is_kept {
            return self.never(failure, out);
        }
        self.step = Step::Prepared;
        self.enter(State::Expired, out);
        if std::mem::take(&mut self.by_operator) {
            let why = Err(failure.to_string());
            out.push(Action::Resolved(Resolve::RunHere { force: false }, why));
        }
        self.asked.clear();
        if let (true, Some(connection)) = (self.link, self.connection) {
            let (attempt, reason) = (self.attempt, Some(failure.in_phase("starting")));
            out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
        }
    }

    /// The operator says who runs the guest where no source is there to ask.
    pub(super) fn resolve(&mut self, resolve: Resolve, out: &mut Vec<Action>) {
        let complete =
            matches!(self.state, State::Prepared | State::Expired) && self.step == Step::Prepared;
        let refused = match (resolve, self.state) {
            _ if complete => None,
            (_, State::Starting | State::Running) => Some("the guest is started here already"),
            (_, State::Aborted) => Some("it is decided that the guest never runs here"),
            _ => Some("nothing complete is held here"),
        };
        if let Some(why) = refused {
            return out.push(Action::Resolved(resolve, Err(why.to_owned())));
        }
        out.push(Action::Resolved(resolve, Ok(())));
        match resolve {
            Resolve::RunHere { .. } => {
                self.by_operator = true;
                self.start(out);
            }
            Resolve::Discard => {
                let what = "discarded by the operator";
                self.never(Failure::new(Side::Destination, what), out);
            }
        }
    }

    pub(super) fn query(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        if attempt != self.attempt || attempt.0 == 0 {
            return out.push(Action::Send(connection, Message::Unknown { attempt, reason: None }));
        }
        match self.state {
            // The source asks because its Commit may be lost with an old connection. Whichever way the
            // window stands, an answer is owed, and only `never` is safe without a Commit.
            State::Prepared | State::Expired | State::Loading if self.step <= Step::Prepared => {
                self.asks(connection);
                let what = "no Commit came before the source asked";
                self.refuse_to_run(Failure::new(Side::Destination, what), out);
            }
            // It ended without a record: nothing will run here, so that can be written now.
            State::Aborted if self.decision != Some(Decision::Never) && !self.lost_guest() => {
                self.asks(connection);
                self.step = Step::RecordNever;
                if self.recording.is_empty() {
                    self.record(Decision::Never, out);
                }
            }
            _ => {
                self.queried |= self.state == State::Starting;
                self.answer(connection, attempt, out);
            }
        }
    }

    /// Is answered once there is a decision.
    pub(super) fn asks(&mut self, connection: Connection) {
        if !self.asked.contains(&connection) {
            self.asked.push(connection);
        }
    }

    /// Answers with the recorded decision, or once there is one.
    pub(super) fn answer(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        match (self.decision, self.state) {
            (Some(Decision::Never), _) => {
                let reason = self
                    .never_reason
                    .clone()
                    .unwrap_or_else(|| Failure::new(Side::Destination, "decided before"));
                out.push(Action::Send(connection, Message::Never { attempt, reason }));
            }
            (Some(Decision::Running), State::Running) => {
                out.push(Action::Send(connection, Message::Running { attempt }));
            }
            // It may have run and may not: the source's copy may be the only one.
            (Some(Decision::Running), State::Aborted) if self.rules.lost_guest_is_unknown => {
                let what = "the guest was started here, and lost with its process";
                let reason = Some(Failure::new(Side::Destination, what));
                out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
            }
            (Some(Decision::Running), State::Aborted) => {
                out.push(Action::Send(connection, Message::Running { attempt }));
            }
            _ => self.asks(connection),
        }
    }

    pub(super) fn aborted_by_source(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        if attempt == self.attempt && attempt.0 > 0 {
            self.asks(connection);
            let what = "the source took the attempt back";
            self.refuse_to_run(Failure::new(Side::Source, what), out);
        }
    }

    /// Ends in Aborted; where a Ready may have been sent, `never` is recorded first.
    pub(super) fn refuse_to_run(&mut self, reason: Failure, out: &mut Vec<Action>) {
        match self.state {
            State::Setup | State::Loading if self.step < Step::RecordPrepared => {
                if self.attempt.0 > 0 {
                    self.never(reason, out);
                } else {
                    self.abort(reason, out);
                }
            }
            State::Setup | State::Loading | State::Prepared | State::Expired => {
                self.never(reason, out);
            }
            // Wiring may still fail, but it is not asked to: a Commit was obeyed.
            State::Starting | State::Running => {}
            State::Aborted => self.answer_asked(out),
        }
    }

    pub(super) fn never(&mut self, reason: Failure, out: &mut Vec<Action>) {
        if self.decision == Some(Decision::Running) || self.step == Step::RecordNever {
            return;
        }
        self.never_reason.get_or_insert(reason.in_phase(self.state.name()));
        self.step = Step::RecordNever;
        self.record(Decision::Never, out);
    }

    pub(super) fn record(&mut self, decision: Decision, out: &mut Vec<Action>) {
        self.recording.push(decision);
        out.push(Action::Record(decision, self.attempt));
    }

    pub(super) fn recorded(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.recording.is_empty() {
            return;
        }
        // `never` may have overtaken `prepared` in the machine, not on the disk: the answer to one is
        // not taken for the answer to the other.
        let step = match self.recording.remove(0) {
            Decision::Prepared => Step::RecordPrepared,
            Decision::Running => Step::RecordRunning,
            Decision::Never | Decision::Committing | Decision::Gone => Step::RecordNever,
        };
        if step != self.step {
            return;
        }
        match (step, answer) {
            (Step::RecordPrepared, Ok(())) => {
                self.decision = Some(Decision::Prepared);
                self.step = Step::Prepared;
                self.enter(State::Prepared, out);
                out.push(Action::ArmWindow);
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let ready = Message::Ready { attempt: self.attempt, window_ms: self.window_ms };
                    out.push(Action::Send(connection, ready));
                }
            }
            (Step::RecordRunning, Ok(())) => {
                self.decision = Some(Decision::Running);
                self.step = Step::P2p;
                for index in self.indices() {
                    if self.devices[usize::from(index.0)].traits.p2p {
                        self.call(index, DeviceState::RunningP2p, out);
                    }
                }
            }
            (Step::RecordNever, Ok(())) => {
                self.decision = Some(Decision::Never);
                let reason = self
                    .never_reason
                    .clone()
                    .unwrap_or_else(|| Failure::new(Side::Destination, "decided before"));
                if let (true, Some(connection)) = (self.link, self.connection) {
                    self.asks(connection);
                }
                self.answer_asked(out);
                self.abort(reason, out);
            }
            // Without a record no step that it names: Prepared and Running do not happen.
            (Step::RecordPrepared, Err(failure)) => self.never(failure, out),
            (Step::RecordRunning, Err(failure)) => self.not_started(failure, out),
            (Step::RecordNever, Err(failure)) => {
                // Nothing can be promised, so nothing is answered; nothing will be started either. A
                // source that has not committed needs no promise to go on.
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let reason = failure.clone().in_phase(self.state.name());
                    out.push(Action::Send(connection, Message::Failed { reason }));
                }
                self.abort(failure, out);
            }
            _ => {}
        }
    }

    pub(super) fn started(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.step != Step::Vcpus {
            return;
        }
        if let Err(failure) = answer {
            out.push(Action::ReportDeviceLost(DeviceIndex(u16::MAX), failure));
        }
        self.enter(State::Running, out);
        if let (true, Some(connection)) = (self.link, self.connection) {
            self.asks(connection);
        }
        self.answer_asked(out);
        out.push(Action::Finish(Outcome::Completed));
    }

    pub(super) fn answer_asked(&mut self, out: &mut Vec<Action>) {
        let attempt = self.attempt;
        for connection in std::mem::take(&mut self.asked) {
            if self.decision.is_some() {
                self.answer(connection, attempt, out);
            }
        }
    }

    /// A failure here, told to the source; before Commit it ends the migration.
    pub(super) fn fail(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if matches!(self.state, State::Starting | State::Running | State::Aborted) {
            return;
        }
        let failure = failure.in_phase(self.state.name());
        if let (true, Some(connection)) = (self.link, self.connection) {
            out.push(Action::Send(connection, Message::Failed { reason: failure.clone() }));
        }
        self.refuse_to_run(failure, out);
    }

    pub(super) fn data_lost(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if !self.loading() {
            return;
        }
        let reason = failure.in_phase(self.state.name());
        match (self.link, self.connection) {
            (true, Some(connection)) => {
                out.push(Action::Send(connection, Message::Failed { reason }));
            }
            _ => self.refuse_to_run(reason, out),
        }
    }

    pub(super) fn abort(&mut self, reason: Failure, out: &mut Vec<Action>) {
        if self.state == State::Aborted {
            return;
        }
        let reason = reason.in_phase(self.state.name());
        self.enter(State::Aborted, out);
        out.push(Action::Finish(Outcome::Failed(reason)));
    }
}
