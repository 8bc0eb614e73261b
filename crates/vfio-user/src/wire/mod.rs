//! Messages on a UNIX stream socket: whole sends, whole receives, fds along.
//!
//! | module | holds |
//! |---|---|
//! | [`fds`] | sendmsg and recvmsg with SCM_RIGHTS; the crate's system calls |
//! | [`channel`] | [`Channel`]: one message at a time, with time limits |
//! | [`connect`] | connecting with a time limit |

mod channel;
mod connect;
mod fds;

pub(crate) use channel::{Channel, ReceiveError, SendError, gone_reason};
pub(crate) use connect::connect;
