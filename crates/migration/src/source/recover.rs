//! A migration that an earlier process of this host left in doubt: it recorded `committing` and died, and the
//! guest's memory with it.
//!
//! There is nothing to migrate and nothing to resume any more. What is left is to hear from the destination
//! what was decided, or to be told by the operator, and to write that down. Nothing is asked: a question makes
//! a destination that holds the only copy say `never`. The operator there may start that copy.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use switchover::handover::Outcome;
use switchover::handover::source::{Action as Handover, Notice};
use switchover::message::{Connection, Failure, Message, Side};
use switchover::source::{Action, Config, Event, Setup, Source};

use super::driver::{REFRESH, failure_of};
use super::{Input, Mailbox, RecoverConfig, Shared, link};
use crate::channel::{Address, ControlSender};
use crate::cost::Account;
use crate::record::{Binding, Record, RecordStore};
use crate::report::{Progress, Report};
use crate::{clock, ids};

/// Connections of a process that died may have gone further than the last record says.
const CONNECTIONS_APART: u64 = 1 << 32;
/// Pause between two tries to reach the destination.
const RECONNECT: Duration = Duration::from_secs(1);

pub(super) fn run(record: Record, config: RecoverConfig, mailbox: Mailbox, shared: &Arc<Shared>) {
    let report = match Recovery::new(record, config, mailbox) {
        Ok(recovery) => recovery.run(shared),
        Err(failure) => Report { failure: Some(failure), ..Report::not_started(String::new()) },
    };
    shared.end(report);
}

struct Recovery {
    brain: Source,
    record: Record,
    records: RecordStore,
    destination: Address,
    config: RecoverConfig,
    mailbox: Mailbox,
    connection: Connection,
    control: Option<(Connection, ControlSender)>,
    resolving: Option<Sender<Result<(), String>>>,
    outcome: Option<Outcome>,
    no_answer: Option<Failure>,
}

impl Recovery {
    fn new(record: Record, config: RecoverConfig, mailbox: Mailbox) -> Result<Self, Failure> {
        let failed = |what: String| Failure::new(Side::Source, what);
        let Some(Binding { secret, connection, destination: Some(destination) }) = &record.binding
        else {
            return Err(failed("the record does not say where its migration went".into()));
        };
        let destination = destination
            .parse()
            .map_err(|error| failed(format!("the record's destination: {error}")))?;
        let setup = Setup {
            migration: record.migration,
            instance: ids::instance()
                .map_err(|error| failed(format!("no instance id: {error}")))?,
            features: Default::default(),
            description: String::new(),
            devices: Vec::new(),
            dry_run: false,
        };
        let newest = Connection(connection.0.saturating_add(CONNECTIONS_APART));
        let brain = Source::recovered(setup, Config::default(), *secret, record.attempt, newest);
        let records = RecordStore::new(config.state_dir.clone(), config.durable)
            .map_err(|error| failed(format!("records cannot be kept: {error}")))?;
        Ok(Self {
            brain,
            record,
            records,
            destination,
            config,
            mailbox,
            connection: newest,
            control: None,
            resolving: None,
            outcome: None,
            no_answer: None,
        })
    }

    fn run(mut self, shared: &Shared) -> Report {
        let begun = clock::now();
        tracing::warn!(migration = %self.record.migration, "left in doubt by an earlier process");
        self.dial(Duration::ZERO);
        while self.outcome.is_none() {
            let progress = Progress {
                status: "in-doubt".into(),
                state: self.brain.handover().state().name().into(),
                total_time_ms: clock::now().since(begun).as_ms(),
                failure: self.no_answer.clone(),
                ..Progress::default()
            };
            *shared.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = progress;
            match self.mailbox.take_within(REFRESH) {
                Some((input, _)) => self.take(input),
                None => self.feed(None),
            }
        }
        let (status, failure) = failure_of(self.outcome.take());
        if let Some((_, control)) = self.control.take() {
            control.abort();
        }
        Report {
            status: status.to_owned(),
            migration: self.record.migration.to_string(),
            total_time_ms: clock::now().since(begun).as_ms(),
            failure,
            ..Report::default()
        }
    }

    fn dial(&mut self, after: Duration) {
        self.connection.0 += 1;
        let (address, mailbox) = (self.destination.clone(), self.mailbox.clone());
        let limit = self.config.connect_limit;
        link::dial(address, self.connection, limit, after, mailbox, Account::default());
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Connected(connection, control) => {
                self.control = Some((connection, control));
                self.feed(Some(Event::LinkUp(connection)));
            }
            Input::NotConnected(_) => self.dial(RECONNECT),
            Input::Message(connection, message, ..) => {
                // One that refuses the connection may know later.
                if let Message::Refuse { reason } = &message {
                    self.no_answer = Some(reason.clone());
                }
                self.feed(Some(Event::Message(connection, message)));
            }
            Input::LinkDown(connection, what) => {
                self.control.take_if(|(c, _)| *c == connection);
                let failure = Failure::new(Side::Source, format!("the link is down: {what}"));
                self.feed(Some(Event::LinkDown(connection, failure)));
            }
            Input::Resolve(resolve, reply) => {
                self.resolving = Some(reply);
                self.feed(Some(Event::Operator(resolve)));
            }
            Input::Cancel => self.feed(Some(Event::Cancel)),
            _ => {}
        }
    }

    fn feed(&mut self, event: Option<Event>) {
        let mut next = vec![event];
        while let Some(event) = next.pop() {
            for action in self.brain.handle(clock::now(), event) {
                if let Action::Handover(action) = action {
                    next.extend(self.perform(action).map(Some));
                }
            }
        }
    }

    fn perform(&mut self, action: Handover) -> Option<Event> {
        match action {
            Handover::Send(message) => {
                if let Some((_, control)) = &self.control
                    && control.send(message).is_err()
                {
                    control.abort();
                }
            }
            Handover::Record(decision, attempt) => {
                let record = Record { attempt, decision, ..self.record.clone() };
                let written = self.records.write(&record).map_err(|error| {
                    let what = format!("the decision could not be recorded: {error}");
                    Failure::new(Side::Source, what).remedy("make --state-dir writable")
                });
                return Some(Event::Recorded(written));
            }
            Handover::Reconnect => self.dial(RECONNECT),
            Handover::Report(notice) => self.report(notice),
            Handover::Finish(outcome) => self.outcome = Some(outcome),
            _ => {}
        }
        None
    }

    fn report(&mut self, notice: Notice) {
        let answer = match notice {
            Notice::Resolved(_) => Ok(()),
            Notice::ResolveRefused(why) => Err(why),
            Notice::NoAnswer(reason) => {
                self.no_answer = reason;
                return;
            }
            _ => return,
        };
        if let Some(reply) = self.resolving.take() {
            let _ = reply.send(answer);
        }
    }
}
