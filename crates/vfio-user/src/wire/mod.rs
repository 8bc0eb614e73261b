//! Messages on a UNIX stream socket: whole sends, whole receives, fds along.
//!
//! | module | holds |
//! |---|---|
//! | `buffer` | how much may be on its way |
//! | `fds` | sendmsg and recvmsg with SCM_RIGHTS |
//! | `channel` | [`Channel`]: one message at a time, with time limits |
//! | `connect` | connecting with a time limit |
//! | `poll` | waiting for several sockets |

mod buffer;
mod channel;
mod connect;
mod fds;
mod poll;

pub(crate) use channel::{Channel, ReceiveError, SendError, gone_reason};
pub(crate) use connect::connect;
pub(crate) use fds::{SCM_FDS_MAX, file_covers};
pub(crate) use poll::wait_readable;
