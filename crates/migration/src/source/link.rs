//! Connections of the source: control, and the data channels of a migration that was accepted.

use std::time::Duration;

use switchover::message::{Connection, Id};

use super::{Input, Mailbox};
use crate::channel::{
    Address, Attach, BandwidthLimit, ControlReceiver, ControlSender, DataSender, LinkMeter,
    connect, read_attach_ok, send_attach,
};
use crate::cost::{Account, Work};
use crate::gate::Gate;
use switchover::message::Features;

/// Messages that wait for the driver; then their reader waits.
const MESSAGES_MAX: usize = 256;

/// Connects in a thread of its own and goes on as the connection's reader.
pub(super) fn dial(
    address: Address,
    connection: Connection,
    limit: Duration,
    after: Duration,
    mailbox: Mailbox,
    account: Account,
) {
    let name = format!("src-control{}", connection.0);
    let failed = mailbox.clone();
    let run = move || {
        let _joined = account.join(Work::Control);
        std::thread::sleep(after);
        let stream = match connect(&address, limit) {
            Ok(stream) => stream,
            Err(error) => return mailbox.send(Input::NotConnected(error.to_string())),
        };
        let (sender, mut receiver) = match split(stream) {
            Ok(parts) => parts,
            Err(error) => return mailbox.send(Input::NotConnected(error)),
        };
        mailbox.send(Input::Connected(connection, sender));
        let gate = Gate::new(MESSAGES_MAX);
        loop {
            match receiver.recv() {
                Ok(message) => {
                    let now = crate::clock::now();
                    mailbox.send(Input::Message(connection, message, now, gate.enter()));
                }
                Err(error) => return mailbox.send(Input::LinkDown(connection, error.to_string())),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name(name).spawn(run) {
        failed.send(Input::NotConnected(format!("no thread for a connection: {error}")));
    }
}

fn split(stream: crate::channel::Stream) -> Result<(ControlSender, ControlReceiver), String> {
    let other = stream.try_clone().map_err(|error| error.to_string())?;
    Ok((ControlSender::new(stream), ControlReceiver::new(other)))
}

/// What binds data channels to their migration.
#[derive(Clone)]
pub(super) struct Binding {
    pub(super) migration: Id,
    pub(super) secret: Id,
    pub(super) connection: Connection,
    pub(super) features: Features,
    pub(super) limit: BandwidthLimit,
}

/// Attaches `channels` data channels in a thread of its own.
pub(super) fn attach(
    address: Address,
    binding: Binding,
    channels: u16,
    limit: Duration,
    mailbox: Mailbox,
) {
    let failed = mailbox.clone();
    let run = move || {
        let link = LinkMeter::default();
        let attach = |channel| attach_one(&address, &binding, channel, &link, limit);
        let channels: Result<Vec<_>, String> = (0..channels).map(attach).collect();
        mailbox.send(Input::Attached(channels));
    };
    if let Err(error) = std::thread::Builder::new().name("src-attach".into()).spawn(run) {
        failed.send(Input::Attached(Err(format!("no thread for a connection: {error}"))));
    }
}

fn attach_one(
    address: &Address,
    binding: &Binding,
    channel: u16,
    link: &LinkMeter,
    limit: Duration,
) -> Result<DataSender, String> {
    let &Binding { migration, secret, connection, features, .. } = binding;
    let mut stream = connect(address, limit).map_err(|error| error.to_string())?;
    let attach = Attach { migration, secret, channel, connection };
    send_attach(&mut stream, &attach).map_err(|error| error.to_string())?;
    read_attach_ok(&mut stream, &attach, limit).map_err(|error| error.to_string())?;
    let sender = DataSender::sharing(stream, features, link, channel);
    Ok(sender.limited(binding.limit.clone()))
}
