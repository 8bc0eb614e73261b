//! Where the guest threads park.
//!
//! A thread runs in *steps*, the instructions of this machine: between two of them its state is whole, and
//! only there does it look whether it should park.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    End,
}

#[derive(Debug)]
struct State {
    want: Want,
    parked: usize,
}

/// Parks a fixed number of threads.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// `want` is Run, for a look without the lock.
    open: AtomicBool,
    threads: usize,
}

impl Gate {
    /// A closed gate for `threads` threads.
    pub fn new(threads: usize) -> Self {
        Self {
            state: Mutex::new(State { want: Want::Park, parked: 0 }),
            changed: Condvar::new(),
            open: AtomicBool::new(false),
            threads,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, want: Want) {
        let mut state = self.lock();
        if state.want != Want::End {
            state.want = want;
            self.open.store(want == Want::Run, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Lets the threads run.
    pub fn open(&self) {
        self.want(Want::Run);
    }

    /// Asks the threads to park, without waiting.
    pub fn close(&self) {
        self.want(Want::Park);
    }

    /// Asks the threads to end, for good.
    pub fn end(&self) {
        self.want(Want::End);
    }

    /// Returns when every thread is parked or has ended. Something has closed the gate.
    pub fn wait_parked(&self) {
        let mut state = self.lock();
        while state.parked < self.threads && state.want != Want::Run {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Called by a thread, which is not parked before the first call: parks it until the gate opens.
    /// `false`: the thread must end; it counts as parked then.
    pub fn park(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.want == Want::Park {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let run = state.want == Want::Run;
        if run {
            state.parked -= 1;
        }
        run
    }

    /// Called by a thread that ends without having been told to: nobody waits for it any more.
    pub fn leave(&self) {
        self.lock().parked += 1;
        self.changed.notify_all();
    }

    /// The gate is open: the next step may be taken.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Sleeps for `limit`, or until the gate closes.
    pub fn sleep(&self, limit: Duration) {
        let state = self.lock();
        let is_open = |state: &mut State| state.want == Want::Run;
        let _ = self.changed.wait_timeout_while(state, limit, is_open);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn parked_threads_take_no_step_and_go_on_when_the_gate_opens() {
        let gate = Gate::new(2);
        let steps = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while gate.park() {
                        while gate.is_open() {
                            steps.fetch_add(1, Ordering::SeqCst);
                            gate.sleep(Duration::from_micros(10));
                        }
                    }
                });
            }
            gate.wait_parked();
            assert_eq!(steps.load(Ordering::SeqCst), 0);
            for _ in 0..20 {
                let before = steps.load(Ordering::SeqCst);
                gate.open();
                while steps.load(Ordering::SeqCst) < before + 2 {
                    std::thread::yield_now();
                }
                gate.close();
                gate.wait_parked();
                let parked = steps.load(Ordering::SeqCst);
                std::thread::yield_now();
                assert_eq!(steps.load(Ordering::SeqCst), parked);
            }
            gate.end();
            gate.wait_parked();
            gate.open();
            assert!(!gate.is_open(), "an end is for good");
        });
    }
}
