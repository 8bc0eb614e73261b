//! What a migration costs its host: CPU time of the threads that work for it, and memory beyond the guest's.
//!
//! ```text
//!   a thread begins   join()   from now on its own clock is read: CLOCK_THREAD_CPUTIME_ID, kernel time included
//!   a buffer grows    Held     what is held now, and the most of it at once
//!   a thread ends              what it used stays
//! ```
//!
//! Counted are the engine's own threads, whatever they do: calls of the VMM and of devices made by them are among
//! it, what the VMM, a device's server or the kernel does in threads of its own is not. Of memory, everything counts
//! that grows with the guest, with devices, channels, or what the other side sends. [`source_bytes_max`] and
//! [`destination_bytes_max`] say how much that is at most.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use switchover::Time;
use switchover::message::Message;

use crate::memory::PAGE_SIZE;
use crate::report::CostReport;

/// A bitmap of all guest memory has a bit per page: 32 KiB per GiB.
const BITMAP_SHARE: u64 = PAGE_SIZE * 8;
const MIB: u64 = 1 << 20;
/// Control: messages on their way, the timeline, the queue of the driver, a Describe being compared.
const CONTROL_MAX: u64 = 8 * MIB;
/// Of a channel at the source: copies of a batch or what it is compressed to and from, and the codec's tables.
const SENDING_MAX: u64 = 4 * MIB;
/// Of a channel at the destination: what was read ahead, a block and what it is unpacked from, a frame, and up to 32
/// buffers of device data that wait to be used again.
const RECEIVING_MAX: u64 = 38 * MIB;
/// Of a device at the source: a read, and one that the device makes ahead of the next call.
const READING_MAX: u64 = 2 * MIB;
/// Of a device at the destination: what waits for it, with a frame that is just being added and one being loaded.
const LOADING_MAX: u64 = 10 * MIB;
/// Of a region: where it holds data.
const EXTENTS_MAX: u64 = MIB / 2;
/// Of a core that hashes: a chunk.
const HASHING_MAX: u64 = 2 * MIB;

/// What the size of a migration's needs depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Its regions.
    pub regions: u64,
    /// Data channels.
    pub channels: u64,
    /// Devices.
    pub devices: u64,
    /// The machine state as the VMM saves it, in bytes; a destination takes at most 128 MiB.
    pub machine_state_bytes: u64,
    /// Cores that hash, where everything is verified; else 0.
    pub hashing_cores: u64,
}

impl Size {
    fn bitmaps(&self, count: u64) -> u64 {
        count.saturating_mul(self.memory_bytes.div_ceil(BITMAP_SHARE) + 64 * self.regions)
    }

    /// Where memory holds data, and a digest for each 2 MiB.
    fn hashing(&self) -> u64 {
        match self.hashing_cores {
            0 => 0,
            cores => self.bitmaps(3) + (cores + 1) * HASHING_MAX,
        }
    }
}

/// The most memory beyond the guest's that a source takes, in bytes: pages to be sent, those of the attempt, those a
/// cancelled pass leaves, one bitmap of a tracker, and one per device for its DMA log.
pub fn source_bytes_max(size: &Size) -> u64 {
    let of_memory = size.bitmaps(4 + size.devices) + size.regions * EXTENTS_MAX;
    let of_channels = size.channels * SENDING_MAX + size.devices * READING_MAX;
    of_memory + of_channels + size.machine_state_bytes + CONTROL_MAX + size.hashing()
}

/// The same of a destination: which pages are populated, which were written, and what waits to be loaded. Machine
/// state is there twice while it is taken out of a frame.
pub fn destination_bytes_max(size: &Size) -> u64 {
    let of_memory = size.bitmaps(2);
    let of_channels = size.channels * RECEIVING_MAX + size.devices * LOADING_MAX;
    of_memory + of_channels + 2 * size.machine_state_bytes + CONTROL_MAX + size.hashing()
}

/// What a thread does for a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The driver and the control channel.
    Control,
    /// Memory and machine state: found, read, sent; received and written.
    Data,
    /// A device: its calls, reads and writes.
    Devices,
    /// Memory populated in the background.
    Populate,
}

const WORKS: usize = 4;

/// The account of one migration on one host; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Account(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    threads: Mutex<Threads>,
    bytes: AtomicU64,
    peak: AtomicU64,
}

#[derive(Debug, Default)]
struct Threads {
    at_work: Vec<AtWork>,
    /// By those that have ended.
    spent_ns: [u64; WORKS],
    closed: bool,
}

#[derive(Debug)]
struct AtWork {
    thread: libc::pid_t,
    work: Work,
    /// What it had used before it joined.
    before_ns: u64,
}

thread_local! {
    static MINE: RefCell<Option<(Account, Work)>> = const { RefCell::new(None) };
}

impl Account {
    /// Counts the calling thread until what is returned is dropped, and what it [holds](Held::new) from now on.
    #[must_use]
    pub fn join(&self, work: Work) -> Joined {
        let thread = this_thread();
        self.watch(thread, work);
        let before = MINE.replace(Some((self.clone(), work)));
        Joined { account: self.clone(), thread, before, own: PhantomData }
    }

    /// Counts `thread`, which outlives this account's last word ([`close`](Self::close)).
    pub(crate) fn watch(&self, thread: libc::pid_t, work: Work) {
        let mut threads = self.threads();
        if !threads.closed {
            let before_ns = cpu_ns(thread).unwrap_or(0);
            threads.at_work.push(AtWork { thread, work, before_ns });
        }
    }

    /// What the calling thread works for, for one that it starts.
    pub(crate) fn mine() -> Option<(Self, Work)> {
        MINE.with_borrow(Clone::clone)
    }

    /// The migration is over on this host: threads that go on work for something else.
    pub(crate) fn close(&self) {
        let mut threads = self.threads();
        threads.closed = true;
        for ended in std::mem::take(&mut threads.at_work) {
            threads.spend(&ended);
        }
    }

    /// What it cost so far.
    pub fn report(&self) -> CostReport {
        CostReport::of(self.spent_ns().map(Time), self.peak_bytes())
    }

    /// The same for the other side.
    pub(crate) fn message(&self) -> Message {
        let [control_ns, data_ns, devices_ns, populate_ns] = self.spent_ns();
        let memory_peak_bytes = self.peak_bytes();
        Message::Cost { control_ns, data_ns, devices_ns, populate_ns, memory_peak_bytes }
    }

    /// CPU time by [`Work`].
    fn spent_ns(&self) -> [u64; WORKS] {
        let threads = self.threads();
        let mut spent = threads.spent_ns;
        for at_work in &threads.at_work {
            spent[at_work.work as usize] += at_work.spent_ns();
        }
        spent
    }

    fn peak_bytes(&self) -> u64 {
        self.0.peak.load(Ordering::Relaxed)
    }

    /// Bytes held now.
    pub fn held_bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.0.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: u64) {
        let now = self.0.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.peak.fetch_max(now, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: u64) {
        self.0.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl CostReport {
    /// CPU time by [`Work`], and the most memory.
    pub(crate) fn of([control, data, devices, populate]: [Time; WORKS], memory_peak: u64) -> Self {
        Self {
            cpu_time_ms: (control + data + devices + populate).as_ms(),
            control_ms: control.as_ms(),
            data_ms: data.as_ms(),
            devices_ms: devices.as_ms(),
            populate_ms: populate.as_ms(),
            memory_peak,
        }
    }
}

impl Threads {
    fn spend(&mut self, ended: &AtWork) {
        self.spent_ns[ended.work as usize] += ended.spent_ns();
    }
}

impl AtWork {
    fn spent_ns(&self) -> u64 {
        cpu_ns(self.thread).unwrap_or(0).saturating_sub(self.before_ns)
    }
}

/// A thread that is counted; it stays where it joined.
#[derive(Debug)]
pub struct Joined {
    account: Account,
    thread: libc::pid_t,
    before: Option<(Account, Work)>,
    own: PhantomData<*const ()>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut threads = self.account.threads();
        if let Some(at) = threads.at_work.iter().rposition(|one| one.thread == self.thread) {
            let ended = threads.at_work.swap_remove(at);
            threads.spend(&ended);
        }
        drop(threads);
        MINE.set(self.before.take());
    }
}

/// Memory beyond the guest's that somebody holds for a migration.
#[derive(Debug, Default)]
pub struct Held {
    account: Option<Account>,
    bytes: u64,
}

impl Held {
    /// `bytes`, for what the calling thread works for; of a thread that works for no migration nothing is counted.
    pub fn new(bytes: u64) -> Self {
        let mut held = Self { account: Account::mine().map(|(account, _)| account), bytes: 0 };
        held.set(bytes);
        held
    }

    pub(crate) fn of(account: &Account, bytes: u64) -> Self {
        let mut held = Self { account: Some(account.clone()), bytes: 0 };
        held.set(bytes);
        held
    }

    /// It is so many bytes now.
    pub fn set(&mut self, bytes: u64) {
        let before = std::mem::replace(&mut self.bytes, bytes);
        let Some(account) = &self.account else { return };
        match bytes.checked_sub(before) {
            Some(0) => {}
            Some(more) => account.take(more),
            None => account.give_back(before - bytes),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(0);
    }
}

pub(crate) fn this_thread() -> libc::pid_t {
    // SAFETY: has no arguments and cannot fail.
    unsafe { libc::gettid() }
}

/// CPU time of a thread of this process, user and kernel, in ns; `None` where it has ended.
fn cpu_ns(thread: libc::pid_t) -> Option<u64> {
    // As pthread_getcpuclockid makes it: the thread's number inverted, and CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED.
    spent_ns((!thread << 3) | 4 | 2)
}

/// CPU time of the calling thread, in ns.
pub(crate) fn own_cpu_ns() -> u64 {
    spent_ns(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0)
}

fn spent_ns(clock: libc::clockid_t) -> Option<u64> {
    let mut spent = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `spent` is a valid place for the answer; a clock that is none is an error.
    let told = unsafe { libc::clock_gettime(clock, &raw mut spent) } == 0;
    told.then(|| (spent.tv_sec as u64).saturating_mul(1_000_000_000) + spent.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// Works until so much CPU time has gone.
    fn burn(limit: Duration) {
        let begin = cpu_ns(this_thread()).unwrap();
        while cpu_ns(this_thread()).unwrap() - begin < limit.as_nanos() as u64 {
            std::hint::black_box(());
        }
    }

    #[test]
    fn threads_are_counted_from_joining_to_leaving_by_what_they_do_and_not_for_sleeping() {
        let account = Account::default();
        let (go, wait) = channel::<()>();
        let (at_work, here) = channel();
        let living = account.clone();
        let thread = std::thread::spawn(move || {
            burn(Duration::from_millis(20));
            let joined = living.join(Work::Devices);
            burn(Duration::from_millis(5));
            at_work.send(()).unwrap();
            wait.recv().unwrap();
            drop(joined);
            burn(Duration::from_millis(20));
        });
        here.recv().unwrap();
        let alive = account.report();
        assert!((5.0..15.0).contains(&alive.devices_ms), "while it lives: {alive:?}");
        std::thread::sleep(Duration::from_millis(20));
        let slept = account.report();
        assert!(slept.devices_ms - alive.devices_ms < 5.0, "for sleeping: {alive:?}, {slept:?}");
        go.send(()).unwrap();
        thread.join().unwrap();
        let ended = account.report();
        assert!((5.0..15.0).contains(&ended.devices_ms), "after it ended: {ended:?}");
        assert_eq!((ended.control_ms, ended.data_ms, ended.populate_ms), (0.0, 0.0, 0.0));
        assert_eq!(ended.cpu_time_ms, ended.devices_ms);
    }

    #[test]
    fn what_is_closed_counts_nothing_more_of_threads_that_go_on() {
        let account = Account::default();
        account.watch(this_thread(), Work::Control);
        burn(Duration::from_millis(2));
        account.close();
        let closed = account.report();
        assert!(closed.control_ms >= 2.0, "{closed:?}");
        let joined = account.join(Work::Data);
        burn(Duration::from_millis(2));
        assert_eq!(account.report(), closed);
        drop(joined);
        assert_eq!(account.report(), closed);
    }

    #[test]
    fn memory_is_what_is_held_at_once_at_the_most_by_whoever_works_for_it() {
        let account = Account::default();
        assert!(Account::mine().is_none());
        let nobodys = Held::new(1 << 30);
        {
            let _joined = account.join(Work::Data);
            let mut buffer = Held::new(100);
            buffer.set(300);
            buffer.set(50);
            let (inherited, work) = Account::mine().unwrap();
            assert_eq!(work, Work::Data);
            let other = Held::of(&inherited, 200);
            assert_eq!(account.held_bytes(), 250);
            drop((buffer, other, nobodys));
        }
        assert!(Account::mine().is_none());
        assert_eq!((account.held_bytes(), account.report().memory_peak), (0, 300));
    }

    #[test]
    fn what_is_needed_grows_with_memory_by_bitmaps_alone() {
        let small =
            Size { memory_bytes: 1 << 30, regions: 2, channels: 4, devices: 8, ..Size::default() };
        let large = Size { memory_bytes: 1 << 40, ..small };
        let more = (large.memory_bytes - small.memory_bytes) / BITMAP_SHARE;
        assert_eq!(source_bytes_max(&large) - source_bytes_max(&small), 12 * more);
        assert_eq!(destination_bytes_max(&large) - destination_bytes_max(&small), 2 * more);
    }
}
