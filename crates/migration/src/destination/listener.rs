//! Accepts connections. Whoever connects has little time to say what it is, and few may be at it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{Input, Mailbox, Shared};
use crate::channel::{Listener, OpeningFrame, Stream, read_opening};

/// Connections that have not said yet what they are.
const OPENINGS_MAX: usize = 32;
/// How long they may take to.
const OPENING_LIMIT: Duration = Duration::from_secs(10);
/// How often the listener looks whether it is to stop.
const PATIENCE: Duration = Duration::from_millis(200);

pub(super) fn run(listener: &Listener, mailbox: &Mailbox, shared: &Shared) {
    let openings = Arc::new(AtomicUsize::new(0));
    while !shared.stopping.load(Ordering::Acquire) {
        match listener.accept_timeout(PATIENCE) {
            Ok(Some(stream)) => open(stream, &openings, mailbox),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                std::thread::sleep(PATIENCE);
            }
        }
    }
}

fn open(mut stream: Stream, openings: &Arc<AtomicUsize>, mailbox: &Mailbox) {
    if openings.fetch_add(1, Ordering::AcqRel) >= OPENINGS_MAX {
        openings.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!("too many connections that say nothing: one more was closed");
        return stream.shutdown();
    }
    let (mailbox, count) = (mailbox.clone(), Arc::clone(openings));
    let run = move || {
        let opening = read_opening(&mut stream, OPENING_LIMIT);
        count.fetch_sub(1, Ordering::AcqRel);
        match opening {
            Ok(OpeningFrame::Hello(hello)) => mailbox.post(Input::Hello(stream, hello)),
            Ok(OpeningFrame::Attach(attach)) => mailbox.post(Input::Attach(stream, attach)),
            Err(error) => {
                tracing::warn!(%error, "a connection that is no migration was closed");
                stream.shutdown();
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("dst-opening".into()).spawn(run) {
        openings.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!(%error, "no thread for a connection");
    }
}
