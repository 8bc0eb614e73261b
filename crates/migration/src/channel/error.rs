//! What goes wrong between the hosts.

use std::io;
use std::time::Duration;

use switchover::message::{Failure, Side};

use crate::memory::MemoryError;
use crate::wire::WireError;

/// What went wrong, on which channel, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// Not an address.
    #[error("`{text}` is not an address: {why}; write tcp:HOST:PORT or unix:PATH")]
    Address {
        /// As given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nobody there, or not within the limit.
    #[error("cannot connect to {address}: {source}; is the destination listening there?")]
    Connect {
        /// Where.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{channel}: {call}: {source}")]
    Io {
        /// Which channel.
        channel: String,
        /// The call.
        call: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The other side closed the channel.
    #[error("{channel}: closed by the other side; see its log")]
    Closed {
        /// Which channel.
        channel: String,
    },
    /// The other side ended in the middle of a frame.
    #[error("{channel}: ended in the middle of a frame; see the other side's log")]
    Truncated {
        /// Which channel.
        channel: String,
    },
    /// This side closed the channel, or it broke before.
    #[error("{channel}: already closed here")]
    ShutDown {
        /// Which channel.
        channel: String,
    },
    /// Nothing came, not even a keep-alive.
    #[error("{channel}: silent for {} ms; the other host or the link is down", limit.as_millis())]
    Silent {
        /// Which channel.
        channel: String,
        /// How long silence is borne.
        limit: Duration,
    },
    /// An answer did not come in time.
    #[error("{channel}: no {what} within {} ms", limit.as_millis())]
    Late {
        /// Which channel.
        channel: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The other side does not take in what is sent.
    #[error("{channel}: {queued} messages wait to be sent; the other side does not read")]
    Congested {
        /// Which channel.
        channel: String,
        /// How many.
        queued: usize,
    },
    /// The bytes are not what the protocol says.
    #[error("{channel}: {source}")]
    Wire {
        /// Which channel.
        channel: String,
        /// What is wrong.
        source: WireError,
    },
    /// The destination does not take this data channel.
    #[error("{channel}: the destination refused it: {reason}")]
    Refused {
        /// Which channel.
        channel: String,
        /// Its words.
        reason: String,
    },
    /// A RAM frame points outside of guest memory.
    #[error("{channel}: {source}")]
    Memory {
        /// Which channel.
        channel: String,
        /// What is wrong.
        source: MemoryError,
    },
    /// Whoever takes the frames in does not take this one.
    #[error("{what}")]
    Sink {
        /// Why.
        what: String,
    },
}

impl ChannelError {
    /// An error of a [`DataSink`](super::DataSink).
    pub fn sink(what: impl Into<String>) -> Self {
        Self::Sink { what: what.into() }
    }

    /// The same as a failure that travels and is reported.
    pub fn failure(&self, side: Side) -> Failure {
        let mut failure = Failure::new(side, self.to_string());
        if let Self::Connect { source, .. } | Self::Listen { source, .. } = self {
            failure.errno = source.raw_os_error();
        }
        if let Self::Io { call, source, .. } = self {
            failure.call = Some((*call).to_owned());
            failure.errno = source.raw_os_error();
        }
        failure
    }
}
