//! Calls under way, and those that take long.
//!
//! A call into a driver cannot be given a time limit: it returns when the driver is done, and some wait
//! uninterruptibly for a whole SAVE. What can be done is to say so while it lasts. One thread of the
//! process looks at the calls under way of all devices a few times a second, and logs each that
//! is older than a second, again whenever its age has doubled, and once more when it returns.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A call younger than this is nobody's concern.
const SLOW: Duration = Duration::from_secs(1);

/// How often the thread looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A call under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InCall {
    /// The call, in the uAPI's words.
    pub call: &'static str,
    /// For how long it has been under way, in ms.
    pub for_ms: u64,
}

/// The calls under way on one device.
#[derive(Debug)]
pub(crate) struct Watch {
    device: String,
    calls: Mutex<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    under_way: Vec<Call>,
}

#[derive(Debug)]
struct Call {
    id: u64,
    call: &'static str,
    since: Instant,
    /// The age at which it is told of next.
    tell_at: Duration,
}

impl Watch {
    /// The watch of a new device. The thread that looks is started with the first.
    pub(crate) fn new(device: &str) -> Arc<Self> {
        let watch = Arc::new(Self { device: device.into(), calls: Mutex::default() });
        watcher().enter(&watch);
        watch
    }

    /// A call begins; it ends when the answer is dropped.
    pub(crate) fn begin(&self, call: &'static str) -> UnderWay<'_> {
        let mut calls = self.lock();
        let id = calls.next;
        calls.next += 1;
        calls.under_way.push(Call { id, call, since: Instant::now(), tell_at: SLOW });
        UnderWay { watch: self, id }
    }

    /// The oldest call under way.
    pub(crate) fn oldest(&self, now: Instant) -> Option<InCall> {
        let calls = self.lock();
        let oldest = calls.under_way.iter().min_by_key(|call| call.since)?;
        Some(InCall { call: oldest.call, for_ms: age_ms(now, oldest.since) })
    }

    /// The calls that have to be told of now.
    fn slow(&self, now: Instant) -> Vec<InCall> {
        let mut slow = Vec::new();
        for call in &mut self.lock().under_way {
            let age = now.saturating_duration_since(call.since);
            if age >= call.tell_at {
                call.tell_at = age.saturating_mul(2);
                slow.push(InCall { call: call.call, for_ms: age_ms(now, call.since) });
            }
        }
        slow
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn age_ms(now: Instant, since: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct UnderWay<'a> {
    watch: &'a Watch,
    id: u64,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut calls = self.watch.lock();
        let Some(at) = calls.under_way.iter().position(|call| call.id == self.id) else { return };
        let call = calls.under_way.swap_remove(at);
        drop(calls);
        if call.tell_at > SLOW {
            let (device, ms) = (self.watch.device.as_str(), age_ms(Instant::now(), call.since));
            tracing::warn!(device, call = call.call, ms, "the call has returned");
        }
    }
}

/// The thread and what it looks at.
#[derive(Debug, Default)]
struct Watcher {
    watches: Mutex<Vec<Weak<Watch>>>,
    entered: Condvar,
}

fn watcher() -> &'static Watcher {
    static WATCHER: std::sync::OnceLock<&'static Watcher> = std::sync::OnceLock::new();
    WATCHER.get_or_init(|| {
        let watcher: &'static Watcher = Box::leak(Box::default());
        let thread = std::thread::Builder::new().name("vfio-watch".into());
        if let Err(error) = thread.spawn(move || watcher.run()) {
            tracing::warn!(%error, "calls that take long will not be told of");
        }
        watcher
    })
}

impl Watcher {
    fn enter(&self, watch: &Arc<Watch>) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.push(Arc::downgrade(watch));
        self.entered.notify_all();
    }

    fn run(&self) -> ! {
        loop {
            let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
            while watches.is_empty() {
                watches = self.entered.wait(watches).unwrap_or_else(PoisonError::into_inner);
            }
            let mut alive = Vec::new();
            watches.retain(|watch| watch.upgrade().map(|watch| alive.push(watch)).is_some());
            drop(watches);
            for watch in alive {
                for InCall { call, for_ms } in watch.slow(Instant::now()) {
                    tracing::warn!(device = watch.device, call, ms = for_ms, "a call takes long");
                }
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_told_of_after_a_second_and_whenever_its_age_doubled() {
        let watch = Watch { device: "nic0".into(), calls: Mutex::default() };
        let call = watch.begin("SET MIG_DEVICE_STATE");
        let since = watch.lock().under_way[0].since;
        let mut told = Vec::new();
        for ms in (0..10_000).step_by(100) {
            let slow = watch.slow(since + Duration::from_millis(ms));
            told.extend(slow.iter().map(|call| call.for_ms));
        }
        assert_eq!(told, [1000, 2000, 4000, 8000]);
        let _second = watch.begin("read");
        let oldest = watch.oldest(since + Duration::from_millis(1500)).unwrap();
        assert_eq!(oldest, InCall { call: "SET MIG_DEVICE_STATE", for_ms: 1500 });
        drop(call);
        assert_eq!(watch.oldest(since).unwrap().call, "read");
    }
}
