//! SIGINT, SIGTERM and SIGHUP as a counter: who works in steps looks at it between them.
//!
//! The signals are blocked in every thread and taken by one that waits for them, so no system call of
//! another thread is interrupted by them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, bail};

/// Counts the signals that ask for an end.
#[derive(Clone, Debug, Default)]
pub struct Signals(Arc<AtomicU32>);

impl Signals {
    /// From now on signals are counted instead of ending the process. Comes before any other thread is
    /// started, because threads inherit what is blocked.
    pub fn take() -> anyhow::Result<Self> {
        let signals = Self::default();
        let set = set();
        // SAFETY: `set` is initialised; the old mask is not asked for.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } != 0 {
            bail!("signals cannot be blocked");
        }
        let count = Arc::clone(&signals.0);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                loop {
                    let mut signal = 0;
                    // SAFETY: both places are valid, and the set is blocked in this thread.
                    if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                        count.fetch_add(1, Ordering::AcqRel);
                    }
                }
            })
            .context("no thread for signals")?;
        Ok(signals)
    }

    /// How many have come.
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// One has come.
    pub fn any(&self) -> bool {
        self.count() > 0
    }
}

fn set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, the rest works on an initialised one; the numbers are
    // valid.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}
