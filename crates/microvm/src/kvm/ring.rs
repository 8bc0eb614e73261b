//! What the vCPUs write: KVM's dirty rings.
//!
//! ```text
//!   vCPU ──writes a protected page──> entry DIRTY ──harvest──> entry RESET ──KVM_RESET_DIRTY_RINGS──> free,
//!                                                                 │           the page is protected again
//!                                                                 └────then──> bitmap ──> collect
//! ```
//!
//! Each vCPU has a ring of its own, shared with KVM; an entry names a page. Whoever harvests (the tracker's
//! [`collect`](DirtyTracker::collect), the harvester, a vCPU whose ring is full) does all rings, one after the other, under
//! one lock, and pages are in the bitmap only after KVM protected them again: bytes that are read after a page was
//! reported, or forgotten, cannot change unnoticed. The lock is held over nothing but that, so a pause waits for no
//! more than one harvest.
//!
//! Each harvest makes the next write of a hot page fault again, so it is done when pages are asked for, and else
//! only when a ring fills up. A full ring stops its vCPU (KVM_EXIT_DIRTY_RING_FULL), which then harvests itself:
//! nothing is lost, it costs the guest the time.
//!
//! KVM stops a vCPU some entries before its ring ends, but a vCPU can write more pages than that without being asked
//! to stop (seen where a software hypervisor emulates instructions in batches). KVM fills on around the ring then,
//! entries are lost, and the answer is incomplete: all of memory is dirty and protected anew. The same goes for a reset
//! that stopped early and an entry that names no page.
//!
//! How far KVM is, is a matter of two counts that it keeps to itself (virt/kvm/dirty_ring.c): of entries filled and of
//! entries reset. It stops the vCPU by their difference, so an entry handed back that KVM never filled takes the second
//! past the first, and the ring is full for good. Hence each ring is reset alone: what KVM says it freed is that ring's
//! second count. The flags cannot tell it: an entry that is dirty may have been filled before KVM got there, or freed
//! and filled again.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use migration::{
    Completeness, DirtyBitmap, DirtyClearer, DirtyTracker, PAGE_SIZE, RegionLayout, VmmError,
};

use super::interrupts::os;
use super::ioctls;
use super::machine::{self, Slots};
use crate::config::DirtyRing;
use crate::error::{Error, Result};

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM filled the entry.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: it was read, KVM may protect the page again and reuse the entry.
const RESET: u32 = 2;
/// How often the harvester looks how full the rings are. A vCPU that fills a ring of 65536 entries in less
/// writes 50 GB/s.
const LOOK: Duration = Duration::from_millis(5);

/// Why this host's KVM has no dirty ring.
pub fn available() -> std::result::Result<(), String> {
    let kvm = machine::open().map_err(|error| error.to_string())?;
    capability(&kvm).map(drop).ok_or_else(|| LACKS.into())
}

const LACKS: &str = "KVM has no dirty ring here (KVM_CAP_DIRTY_LOG_RING, Linux 5.11 or later)";

/// The capability to enable, and the largest ring in bytes.
fn capability(kvm: &Kvm) -> Option<(u32, u64)> {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().find_map(|cap| {
        let bytes = kvm.check_extension_raw(cap.into());
        (bytes > 0).then_some((cap, bytes as u64))
    })
}

/// What was counted since the VM was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Entries harvested.
    pub harvested: u64,
    /// Times that a vCPU stood still since its ring was full.
    pub full_exits: u64,
}

/// The rings of all vCPUs.
pub(super) struct DirtyRings {
    vm: Arc<VmFd>,
    layout: Vec<RegionLayout>,
    config: DirtyRing,
    harvest: Mutex<Harvest>,
    /// Pages that were harvested and are protected again, by region.
    found: Vec<Vec<AtomicU64>>,
    harvested: AtomicU64,
    full_exits: AtomicU64,
    /// Every so many-th entry is dropped on purpose; 0: none.
    #[cfg(test)]
    drop_every: AtomicU64,
}

/// What a harvest holds.
#[derive(Default)]
struct Harvest {
    /// By vCPU.
    rings: Vec<Ring>,
    /// Pages (region, page) of the harvest under way.
    batch: Vec<(usize, u64)>,
    /// Not all written pages are known, or will be: until all of memory is protected anew.
    lost: bool,
}

/// One vCPU's ring.
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    len: u32,
    /// The first entry that KVM has not reset, which is where a harvest begins; modulo `len`.
    next: u32,
    /// It was overrun once: KVM may fill entries further on, and leave those before them free.
    overrun: bool,
    /// Where `next` was when the vCPU was last sent on after its ring was full.
    sent_on_at: Option<u32>,
}

/// What a harvest took from a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Taken {
    /// Entries that KVM had filled.
    filled: u32,
    /// Entries that are KVM's again once it resets them: those, and what lay between.
    handed_back: u32,
}

// SAFETY: the mapping may be used from any thread; it is reached under the lock of `DirtyRings` alone.
unsafe impl Send for Ring {}

impl DirtyRings {
    /// Gives every vCPU that is made from now on a ring.
    pub(super) fn enable(
        kvm: &Kvm,
        vm: &Arc<VmFd>,
        layout: &[RegionLayout],
        config: DirtyRing,
    ) -> Result<Self> {
        let (cap, bytes_max) = capability(kvm).ok_or_else(|| Error::Config(LACKS.into()))?;
        let entries_max = bytes_max / size_of::<kvm_dirty_gfn>() as u64;
        let entries_max = entries_max.min(DirtyRing::ENTRIES_MAX.into()) as u32;
        let allowed = DirtyRing::ENTRIES_MIN..=entries_max;
        let entries = config.entries;
        if !allowed.contains(&entries) || !entries.is_power_of_two() {
            return Err(Error::Config(format!(
                "a dirty ring of {entries} entries; KVM takes a power of two from {} to {entries_max}",
                DirtyRing::ENTRIES_MIN,
            )));
        }
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        vm.enable_cap(&enable).map_err(os("KVM_ENABLE_CAP of KVM_CAP_DIRTY_LOG_RING"))?;
        let words = |region: &RegionLayout| region.pages().div_ceil(64);
        let found = layout.iter().map(|region| (0..words(region)).map(|_| AtomicU64::new(0)));
        Ok(Self {
            vm: Arc::clone(vm),
            layout: layout.to_vec(),
            config,
            harvest: Mutex::default(),
            found: found.map(Iterator::collect).collect(),
            harvested: AtomicU64::new(0),
            full_exits: AtomicU64::new(0),
            #[cfg(test)]
            drop_every: AtomicU64::new(0),
        })
    }

    /// Takes the ring of a vCPU that does not run yet.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<()> {
        self.lock().rings.push(Ring::map(vcpu, self.config.entries)?);
        Ok(())
    }

    /// This vCPU left the guest because its ring is full; it may go on then.
    pub(super) fn full(&self, vcpu: usize) {
        self.full_exits.fetch_add(1, Ordering::Relaxed);
        let mut harvest = self.lock();
        self.harvest(&mut harvest);
        harvest.send_on(vcpu, || self.reset());
    }

    pub(super) fn counters(&self) -> RingCounters {
        RingCounters {
            harvested: self.harvested.load(Ordering::Relaxed),
            full_exits: self.full_exits.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Harvest> {
        self.harvest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is in the rings. Once the vCPUs are paused nothing is left in them.
    fn harvest(&self, harvest: &mut Harvest) {
        let filled = harvest.take(|entry| self.page(entry), || self.reset());
        self.harvested.fetch_add(filled, Ordering::Relaxed);
        let batch = &mut harvest.batch;
        #[cfg(test)]
        self.drop_some(batch);
        for (region, page) in batch.drain(..) {
            if let Some(word) = self.found[region].get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    #[cfg(test)]
    fn drop_some(&self, batch: &mut Vec<(usize, u64)>) {
        let every = self.drop_every.load(Ordering::Relaxed);
        let mut number = 0;
        batch.retain(|_| {
            number += 1;
            every == 0 || number % every != 0
        });
    }

    /// Has KVM protect the pages again that were handed back; says how many entries it freed.
    fn reset(&self) -> Result<u64> {
        // A signal cuts the reset short, and some kernels (6.17) then free up to 64 entries without having
        // protected their pages.
        let _blocked = BlockedSignals::new()?;
        ioctls::reset_dirty_rings(&self.vm)
    }

    /// The page an entry names.
    fn page(&self, entry: Entry) -> Option<(usize, u64)> {
        // The upper half is the address space; we have one.
        let region = entry.slot as usize;
        (entry.offset < self.layout.get(region)?.pages()).then_some((region, entry.offset))
    }

    /// A ring that is filled to a quarter is harvested with all others.
    fn harvest_if_filling(&self) {
        let mut harvest = self.lock();
        if harvest.rings.iter().any(|ring| ring.is_filled(ring.len / 4)) {
            self.harvest(&mut harvest);
        }
    }

    /// Everything found so far is no write since now.
    fn forget(&self) {
        let mut harvest = self.lock();
        self.harvest(&mut harvest);
        self.found.iter().flatten().for_each(|word| word.store(0, Ordering::Release));
    }

    /// The log is off: what is still in the rings must not fill them up, and what was lost does not matter.
    fn end(&self) {
        self.forget();
        self.lock().lost = false;
    }

    /// Ors what was found into `into`, and forgets it where nobody else will. After an incomplete answer the log has
    /// to be started anew.
    fn report(&self, into: &mut DirtyBitmap, deferred: bool) -> Completeness {
        let mut harvest = self.lock();
        self.harvest(&mut harvest);
        for (region, found) in self.found.iter().enumerate() {
            for (word, found) in into.region_mut(region).iter_mut().zip(found) {
                if found.load(Ordering::Relaxed) != 0 {
                    *word |= match deferred {
                        true => found.load(Ordering::Acquire),
                        false => found.swap(0, Ordering::AcqRel),
                    };
                }
            }
        }
        match std::mem::take(&mut harvest.lost) {
            true => Completeness::Incomplete,
            false => Completeness::Complete,
        }
    }
}

impl Harvest {
    /// Takes what is in the rings, and has KVM protect it again; says how many entries were filled.
    fn take(
        &mut self,
        page: impl Fn(Entry) -> Option<(usize, u64)>,
        mut reset: impl FnMut() -> Result<u64>,
    ) -> u64 {
        let Self { rings, batch, lost } = self;
        let mut filled = 0;
        for ring in rings {
            let taken = ring.take(|entry| match page(entry) {
                Some(page) => batch.push(page),
                None => *lost = true,
            });
            filled += u64::from(taken.filled);
            // KVM stops a vCPU with some entries left.
            *lost |= taken.handed_back == ring.len;
            if taken.handed_back > 0 {
                let first = reset();
                // What was freed when it was cut short is not protected again.
                *lost |= !matches!(first, Ok(count) if count == u64::from(taken.handed_back));
                let count = first.map(|count| freed_in_all(taken.handed_back, count, &mut reset));
                ring.freed(taken.handed_back, count);
            }
        }
        filled
    }

    /// This vCPU's ring was full and is harvested: it is sent on. An overrun by more than a ring leaves one that is full
    /// for KVM and empty for us, with no entry to be found by.
    fn send_on(&mut self, vcpu: usize, reset: impl FnOnce() -> Result<u64>) {
        let Some(ring) = self.rings.get_mut(vcpu) else { return };
        // KVM was told as much before it sent the vCPU back, and found the ring full all the same: so it filled the
        // next entry.
        if ring.sent_on_at == Some(ring.next) {
            self.lost = true;
            ring.overrun = true;
            ring.flags(ring.next).store(RESET, Ordering::Release);
            ring.freed(1, reset());
        }
        ring.sent_on_at = Some(ring.next);
    }
}

/// A freezer or a debugger cuts a reset short whatever signals are blocked. It goes on until nothing is left, so that the
/// rest is not counted as what the next ring handed back.
fn freed_in_all(handed_back: u32, first: u64, mut reset: impl FnMut() -> Result<u64>) -> u64 {
    let mut count = first;
    while count < u64::from(handed_back) {
        match reset() {
            Ok(more @ 1..) => count += more,
            Ok(0) | Err(_) => break,
        }
    }
    count
}

/// What an entry says.
#[derive(Clone, Copy)]
struct Entry {
    slot: u32,
    offset: u64,
}

impl Ring {
    fn map(vcpu: &VcpuFd, len: u32) -> Result<Self> {
        let bytes = len as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = vcpu.as_raw_fd();
        // SAFETY: a fresh mapping, at an address the kernel chooses.
        let addr =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, fd, offset) };
        match NonNull::new(addr.cast()).filter(|_| addr != libc::MAP_FAILED) {
            Some(entries) => Ok(Self::new(entries, len)),
            None => Err(Error::last_os("mmap of a dirty ring")),
        }
    }

    /// A ring that KVM has filled nothing in, over a mapping that is its own from now on.
    fn new(entries: NonNull<kvm_dirty_gfn>, len: u32) -> Self {
        Self { entries, len, next: 0, overrun: false, sent_on_at: None }
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        // SAFETY: the mapping has `len` entries, a power of two.
        unsafe { self.entries.as_ptr().add((index & (self.len - 1)) as usize) }
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: the field lies in our mapping and is aligned; it is shared with KVM, hence atomic.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }

    /// At least `count` entries wait, in a ring of more.
    fn is_filled(&self, count: u32) -> bool {
        let last = self.next.wrapping_add(count.saturating_sub(1));
        self.flags(last).load(Ordering::Relaxed) & DIRTY != 0
    }

    /// Takes the entries that are filled, oldest first. Whether KVM frees as many has to be told by [`Self::freed`].
    fn take(&mut self, mut with: impl FnMut(Entry)) -> Taken {
        let gap_ends = self.gap_ends();
        let mut taken = Taken::default();
        // KVM reuses an entry only after a reset, so this ends even beside a vCPU that writes.
        while taken.handed_back < self.len {
            let index = self.next.wrapping_add(taken.handed_back);
            let flags = self.flags(index);
            // Acquire: the rest of the entry was written before its flag.
            match flags.load(Ordering::Acquire) & (DIRTY | RESET) {
                DIRTY => {
                    with(self.read(index));
                    taken.filled += 1;
                }
                0 if taken.handed_back >= gap_ends => return taken,
                // In a gap, or harvested before, in a reset that was cut short.
                _ => {}
            }
            // Release: KVM does not reuse the entry before it was read.
            flags.store(RESET, Ordering::Release);
            taken.handed_back += 1;
        }
        self.overrun = true;
        taken
    }

    /// After an overrun KVM goes on filling as many entries further on as it filled too many, and it frees entries
    /// one after the other: those in between have to be handed back like harvested ones. Says up to where there may
    /// be such, counted from the next entry: KVM filled all that lies before one that is filled. Whether that closes the
    /// gap is not known, for KVM may be around the ring already: a ring that was overrun is looked through every time.
    fn gap_ends(&self) -> u32 {
        if !self.overrun {
            return 0;
        }
        let is_filled = |ahead: &u32| {
            let flags = self.flags(self.next.wrapping_add(*ahead)).load(Ordering::Acquire);
            flags & (DIRTY | RESET) != 0
        };
        (0..self.len).rev().find(is_filled).map_or(0, |last| last + 1)
    }

    /// KVM freed so many entries where this ring, and no other, had handed back.
    fn freed(&mut self, handed_back: u32, count: Result<u64>) {
        let complete = matches!(count, Ok(count) if count == u64::from(handed_back));
        match &count {
            Ok(_) if complete => {}
            Ok(count) => tracing::warn!(
                "KVM_RESET_DIRTY_RINGS freed {count} of {handed_back} entries: all memory counts as written"
            ),
            Err(error) => {
                tracing::warn!(%error, "a dirty ring is not reset: all memory counts as written");
            }
        }
        self.next = self.next.wrapping_add(count.unwrap_or(0) as u32);
        // What is left was filled anew, or is handed back again.
        self.overrun |= !complete;
    }

    fn read(&self, index: u32) -> Entry {
        let entry = self.entry(index);
        // SAFETY: inside our mapping; KVM leaves an entry alone as long as it is dirty.
        let (slot, offset) = unsafe {
            (
                (&raw const (*entry).slot).read_volatile(),
                (&raw const (*entry).offset).read_volatile(),
            )
        };
        Entry { slot, offset }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.len as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: address and length are those of our own mmap.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) };
    }
}

/// No signal interrupts this thread as long as it lives.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn new() -> Result<Self> {
        // SAFETY: plain data, for which all zeros is valid, and both calls only fill it.
        let (all, mut before) = unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            (all, std::mem::zeroed())
        };
        // SAFETY: both sets live over the call.
        match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, &raw mut before) } {
            0 => Ok(Self { before }),
            errno => Err(Error::Os {
                call: "pthread_sigmask",
                source: std::io::Error::from_raw_os_error(errno),
            }),
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// Looks after the rings while a tracker is on.
struct Harvester {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: JoinHandle<()>,
}

impl Harvester {
    fn start(rings: Arc<DirtyRings>) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&stop);
        let run = move || {
            let (stop, changed) = &*told;
            let mut stop = stop.lock().unwrap_or_else(PoisonError::into_inner);
            while !*stop {
                let waited = changed.wait_timeout(stop, LOOK);
                stop = waited.unwrap_or_else(PoisonError::into_inner).0;
                rings.harvest_if_filling();
            }
        };
        let thread = std::thread::Builder::new().name("dirty-ring".into()).spawn(run)?;
        Ok(Self { stop, thread })
    }

    fn end(self) {
        let (stop, changed) = &*self.stop;
        *stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
        // One that panicked has ended as well.
        let _ = self.thread.join();
    }
}

/// The dirty rings of all vCPUs, as a tracker.
pub(super) struct KvmDirtyRing {
    slots: Arc<Slots>,
    rings: Arc<DirtyRings>,
    /// Forgetting is left to a [`Clearer`].
    deferred: bool,
    /// Our number among the trackers of these slots, once started: only the last one started counts.
    turn: Option<u64>,
    harvester: Option<Harvester>,
}

impl KvmDirtyRing {
    pub(super) fn new(slots: Arc<Slots>, rings: Arc<DirtyRings>) -> Self {
        Self { slots, rings, deferred: false, turn: None, harvester: None }
    }

    fn try_start(&mut self) -> Result<()> {
        self.turn = Some(self.slots.start_logging(&self.rings.vm)?);
        self.rings.forget();
        if self.rings.config.harvester && self.harvester.is_none() {
            match Harvester::start(Arc::clone(&self.rings)) {
                Ok(harvester) => self.harvester = Some(harvester),
                Err(error) => tracing::warn!(%error, "no harvester: vCPUs with full rings harvest"),
            }
        }
        Ok(())
    }

    fn try_stop(&mut self) -> Result<()> {
        if let Some(harvester) = self.harvester.take() {
            harvester.end();
        }
        let Some(turn) = self.turn.take() else { return Ok(()) };
        if self.slots.stop_logging(&self.rings.vm, turn)? {
            self.rings.end();
        }
        Ok(())
    }
}

/// Forgets pages for [`KvmDirtyRing::defer`]. They are protected already.
struct Clearer(Arc<DirtyRings>);

impl DirtyClearer for Clearer {
    fn clear(&self, region: usize, first: u64, words: &[u64]) -> std::result::Result<(), VmmError> {
        let Some(found) = self.0.found.get(region) else { return Ok(()) };
        let found = found.iter().skip((first / 64) as usize);
        for (found, word) in found.zip(words) {
            if *word != 0 {
                found.fetch_and(!word, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}

impl DirtyTracker for KvmDirtyRing {
    fn defer(&mut self) -> Option<Arc<dyn DirtyClearer>> {
        if self.turn.is_some() {
            return None;
        }
        self.deferred = true;
        Some(Arc::new(Clearer(Arc::clone(&self.rings))))
    }

    fn name(&self) -> &'static str {
        "kvm-dirty-ring"
    }

    fn start(&mut self) -> std::result::Result<(), VmmError> {
        Ok(self.try_start()?)
    }

    fn collect(&mut self, into: &mut DirtyBitmap) -> std::result::Result<Completeness, VmmError> {
        self.slots.check_turn(self.turn)?;
        let completeness = self.rings.report(into, self.deferred);
        if completeness == Completeness::Incomplete {
            tracing::warn!("a dirty ring lost pages: all memory counts as written");
            self.slots.restart_logging(&self.rings.vm)?;
        }
        Ok(completeness)
    }

    fn stop(&mut self) -> std::result::Result<(), VmmError> {
        Ok(self.try_stop()?)
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        if let Err(error) = self.try_stop() {
            tracing::warn!(%error, "the dirty log stays on");
        }
    }
}

#[cfg(test)]
mod tests;
