//! Work in a process of its own.
//!
//! A process ends only when the last of its threads does, and a thread that hangs in a driver may not be
//! killed. Whoever must end whatever a driver does leaves the device to a child, waits for the child's
//! word, and not for its end.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;

use crate::signals::Signals;

/// How often a signal is looked for, in ms.
const TICK_MS: i32 = 50;

/// Runs `work` in a child process and answers its exit status; `None` where the child ended without one.
///
/// Only before any thread is started: a child has the thread that made it alone.
pub(super) fn run(work: impl FnOnce() -> u8) -> anyhow::Result<Option<u8>> {
    let mut ends = [0; 2];
    // SAFETY: the place for both ends is valid.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(std::io::Error::last_os_error()).context("make a pipe");
    }
    // SAFETY: two new fds that nobody else owns.
    let (reader, writer) =
        unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: no argument.
    let parent = unsafe { libc::getpid() };
    // SAFETY: this process has one thread, by this function's own rule, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("start a process for the check"),
        0 => {
            drop(reader);
            // SAFETY: numbers only. A parent that ended before this is seen by its id.
            let orphan = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Signals of a terminal come through the parent, once.
                libc::setpgid(0, 0);
                libc::getppid() != parent
            };
            let status = if orphan { 2 } else { work() };
            // A parent that is gone does not care.
            let _ = File::from(writer).write_all(&[status]);
            std::process::exit(status.into());
        }
        child => {
            drop(writer);
            wait(&reader, child)?;
            let mut status = [0; 1];
            let got = File::from(reader).read(&mut status).context("hear from the check")?;
            Ok((got == 1).then_some(status[0]))
        }
    }
}

/// Waits for the child's word, and passes signals on.
fn wait(reader: &OwnedFd, child: libc::pid_t) -> anyhow::Result<()> {
    let signals = Signals::take()?;
    let mut passed_on = 0;
    loop {
        let mut entry = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry is passed and counted.
        match unsafe { libc::poll(&mut entry, 1, TICK_MS) } {
            1.. => return Ok(()),
            -1 if std::io::Error::last_os_error().kind() != ErrorKind::Interrupted => {
                return Err(std::io::Error::last_os_error()).context("wait for the check");
            }
            _ => {}
        }
        while passed_on < signals.count() {
            passed_on += 1;
            // SAFETY: numbers; our own child, which is not waited for before it has said its word.
            unsafe { libc::kill(child, libc::SIGTERM) };
        }
    }
}
