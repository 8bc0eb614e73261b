//! What comes to a driver, and who acts on it.
//!
//! ```text
//!   device thread ─┐ send            ┌─ nobody at work: the sender drives, here and now
//!   control reader ┼──▶ queue ───────┤
//!   worker ────────┘                 └─ somebody at work: he takes it along before he leaves
//!   API, guest, … ── post ──▶ queue ──▶ the driver's own thread
//! ```
//!
//! A driver has a thread of its own for its timers, and for whoever must not be held up. Inside a blackout
//! that thread would cost a wake-up for each answer, in series: some 50 to 100 µs each where a core has to be
//! woken, several dozen times. So whoever brings an answer drives, unless somebody does already; then the
//! answer is taken along by that one. Whoever drives looks once more after he has let go, so nothing is left.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use switchover::Time;

use crate::clock;

/// What acts on inputs.
pub(crate) trait Hand: Send + Sync {
    /// Acts on everything that waits, unless somebody is at it.
    fn try_work(&self);
}

/// Where threads send inputs of type `T`; clones are the same one.
pub(crate) struct Mailbox<T>(Arc<Shared<T>>);

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    arrived: Condvar,
    hand: OnceLock<Weak<dyn Hand>>,
}

struct Queue<T> {
    inputs: VecDeque<(T, Time)>,
    /// The driver's own thread is to look at its timers anew.
    poked: bool,
}

impl<T> Mailbox<T> {
    pub(crate) fn new() -> Self {
        // Room for what comes in a blackout, so that it is not allocated there.
        let queue = Queue { inputs: VecDeque::with_capacity(256), poked: false };
        Self(Arc::new(Shared {
            queue: Mutex::new(queue),
            arrived: Condvar::new(),
            hand: OnceLock::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on whoever [`send`](Self::send)s may drive.
    pub(crate) fn set_hand(&self, hand: Weak<dyn Hand>) {
        // There is one per driver.
        let _ = self.0.hand.set(hand);
    }

    /// Brings an answer; the caller may act on it, and on whatever follows, before this returns. So nothing may
    /// be locked here that a driver wants.
    pub(crate) fn send(&self, input: T) {
        match self.0.hand.get().and_then(Weak::upgrade) {
            Some(hand) => {
                self.lock().inputs.push_back((input, clock::now()));
                hand.try_work();
            }
            None => self.post(input),
        }
    }

    /// Leaves it for whoever drives next. What is sent or posted right behind it makes sure that somebody does.
    pub(crate) fn leave(&self, input: T) {
        self.lock().inputs.push_back((input, clock::now()));
    }

    /// Leaves it to the driver's own thread.
    pub(crate) fn post(&self, input: T) {
        self.lock().inputs.push_back((input, clock::now()));
        self.0.arrived.notify_one();
    }

    /// The driver's own thread looks at its timers anew.
    pub(crate) fn poke(&self) {
        self.lock().poked = true;
        self.0.arrived.notify_one();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().inputs.is_empty()
    }

    /// The next input, with the moment it was sent.
    pub(crate) fn take(&self) -> Option<(T, Time)> {
        self.lock().inputs.pop_front()
    }

    /// Waits until something is there, or a [`poke`](Self::poke), or for so long.
    pub(crate) fn wait(&self, limit: Duration) {
        let idle = |queue: &mut Queue<T>| queue.inputs.is_empty() && !queue.poked;
        let waited = self.0.arrived.wait_timeout_while(self.lock(), limit, idle);
        waited.unwrap_or_else(PoisonError::into_inner).0.poked = false;
    }

    /// The next input within `limit`.
    pub(crate) fn take_within(&self, limit: Duration) -> Option<(T, Time)> {
        let deadline = Instant::now() + limit;
        loop {
            let input = self.take();
            let left = deadline.saturating_duration_since(Instant::now());
            if input.is_some() || left.is_zero() {
                return input;
            }
            self.wait(left);
        }
    }
}

/// A driver that several threads drive in turn.
pub(crate) trait Driven: Send {
    /// What comes to it.
    type Input: Send;

    /// Acts on one input, and on what follows at once.
    fn act(&mut self, input: Self::Input, at: Time);

    /// The queue is empty for now.
    fn settled(&mut self) {}

    /// How long it may be left alone.
    fn patience(&self) -> Duration;

    /// It acts on nothing any more; its own thread takes it out.
    fn ended(&self) -> bool;
}

/// A driver, and the lock that whoever drives holds.
pub(crate) struct Seat<D: Driven> {
    driver: Mutex<Option<D>>,
    mailbox: Mailbox<D::Input>,
    /// When its own thread looks at it again.
    due: Mutex<Time>,
}

/// A driver panicked under another thread's hands.
#[derive(Debug)]
pub(crate) struct BrokeOff;

impl<D: Driven + 'static> Seat<D> {
    /// `driver` acts on what comes into `mailbox` from now on.
    pub(crate) fn new(driver: D, mailbox: Mailbox<D::Input>) -> Arc<Self> {
        let due = Mutex::new(Time(0));
        let seat = Arc::new(Self { driver: Mutex::new(Some(driver)), mailbox, due });
        let hand: Arc<dyn Hand> = Arc::<Self>::clone(&seat);
        seat.mailbox.set_hand(Arc::downgrade(&hand));
        seat
    }

    /// The driver's own thread: acts, and waits for as long as the driver may be left alone. `watch` is called
    /// each time it wakes. Answers with the driver once that has ended.
    pub(crate) fn run(&self, mut watch: impl FnMut(&mut D)) -> Result<D, BrokeOff> {
        loop {
            let patience = {
                let mut seat = self.driver.lock().map_err(|_| BrokeOff)?;
                let Some(driver) = seat.as_mut() else { return Err(BrokeOff) };
                self.drain(driver);
                watch(driver);
                if driver.ended() {
                    return seat.take().ok_or(BrokeOff);
                }
                let patience = driver.patience();
                self.set_due(patience);
                patience
            };
            self.mailbox.wait(patience);
        }
    }

    fn drain(&self, driver: &mut D) {
        while !driver.ended()
            && let Some((input, at)) = self.mailbox.take()
        {
            driver.act(input, at);
        }
        driver.settled();
    }

    fn set_due(&self, patience: Duration) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = from_now(patience);
    }
}

fn from_now(patience: Duration) -> Time {
    clock::now() + Time(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX))
}

impl<D: Driven + 'static> Hand for Seat<D> {
    fn try_work(&self) {
        // Whoever holds the seat looks at the queue once more after he has left it.
        while !self.mailbox.is_empty() {
            let mut seat = match self.driver.try_lock() {
                Ok(seat) => seat,
                Err(TryLockError::WouldBlock) => return,
                Err(TryLockError::Poisoned(_)) => return self.mailbox.poke(),
            };
            // Taken out by its own thread, which reads on alone.
            let Some(driver) = seat.as_mut() else { return self.mailbox.poke() };
            self.drain(driver);
            if driver.ended() {
                return self.mailbox.poke();
            }
            let wanted = from_now(driver.patience());
            drop(seat);
            let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
            if wanted < due {
                self.mailbox.poke();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    /// Counts; an input of `Nested` sends another one while it is acted on.
    struct Counter {
        seen: Arc<AtomicU64>,
        inside: bool,
        mailbox: Mailbox<Input>,
        ended: bool,
    }

    enum Input {
        One,
        Nested,
        End,
        Panic,
    }

    impl Driven for Counter {
        type Input = Input;

        fn act(&mut self, input: Input, _: Time) {
            assert!(!std::mem::replace(&mut self.inside, true), "one at a time");
            self.seen.fetch_add(1, Ordering::SeqCst);
            match input {
                Input::One => {}
                Input::Nested => self.mailbox.send(Input::One),
                Input::End => self.ended = true,
                Input::Panic => panic!("a bug"),
            }
            self.inside = false;
        }

        fn patience(&self) -> Duration {
            Duration::from_secs(3600)
        }

        fn ended(&self) -> bool {
            self.ended
        }
    }

    fn rig() -> (Arc<Seat<Counter>>, Mailbox<Input>, Arc<AtomicU64>) {
        let (mailbox, seen) = (Mailbox::new(), Arc::new(AtomicU64::new(0)));
        let counter = Counter {
            seen: Arc::clone(&seen),
            inside: false,
            mailbox: mailbox.clone(),
            ended: false,
        };
        (Seat::new(counter, mailbox.clone()), mailbox, seen)
    }

    #[test]
    fn whoever_sends_drives_and_what_that_brings_about_is_taken_along() {
        let (_seat, mailbox, seen) = rig();
        mailbox.send(Input::Nested);
        assert_eq!(seen.load(Ordering::SeqCst), 2, "without any thread of the driver's own");
        mailbox.post(Input::One);
        assert_eq!(seen.load(Ordering::SeqCst), 2, "posted is left to that thread");
        mailbox.send(Input::One);
        assert_eq!(seen.load(Ordering::SeqCst), 4, "in order");
    }

    #[test]
    fn nothing_is_left_and_the_end_wakes_the_drivers_own_thread() {
        let (seat, mailbox, seen) = rig();
        let own = thread::spawn(move || seat.run(|_| ()).map(drop));
        let senders: Vec<_> = (0..4)
            .map(|number| {
                let mailbox = mailbox.clone();
                thread::spawn(move || {
                    for round in 0..5_000 {
                        match (number + round) % 3 {
                            0 => mailbox.post(Input::One),
                            1 => mailbox.send(Input::One),
                            _ => mailbox.send(Input::Nested),
                        }
                    }
                })
            })
            .collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        mailbox.send(Input::End);
        // Its patience is an hour: it ends because it was woken.
        own.join().unwrap().unwrap();
        let nested =
            (0..4).flat_map(|n| (0..5_000).map(move |r| (n + r) % 3)).filter(|k| *k == 2).count();
        assert_eq!(seen.load(Ordering::SeqCst), 20_001 + nested as u64);
        // Nobody drives any more; what comes is kept for whoever reads on.
        mailbox.send(Input::One);
        assert!(matches!(mailbox.take_within(Duration::from_secs(60)), Some((Input::One, _))));
    }

    #[test]
    fn a_panic_under_foreign_hands_ends_the_driver() {
        let (seat, mailbox, _) = rig();
        let other = mailbox.clone();
        assert!(thread::spawn(move || other.send(Input::Panic)).join().is_err());
        assert!(seat.run(|_| ()).is_err());
        mailbox.send(Input::One);
    }
}
