//! Memory of the host for pages that will arrive, before they do.
//!
//! A page that is written for the first time costs a fault; a block that is populated at once costs a quarter
//! less, and none of it in the blackout. Two work on it:
//!
//! ```text
//!   receiving threads   the range they are about to write, unless it is there
//!   background thread   everything else, on cores that have nothing else to do (SCHED_IDLE)
//! ```
//!
//! A block of which nothing is there becomes a huge page where that is the cheaper way, as measured on the way (see
//! [`Worth`]): less than half of the CPU time for 512 pages, unless the host has to make or fetch such a block first.
//!
//! On a host whose cores are all busy the receiving threads do the work, each for what it writes; where one is
//! idle the background is ahead of them. Content never changes, so neither has to know of the other. While the
//! guest stands still only what is written is populated: a block of 2 MiB takes milliseconds.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::written::{Written, masks};
use crate::clock;
use crate::cost::{Account, Held, Work, own_cpu_ns};
use crate::memory::{GuestMemory, HugePages, MemoryError, PAGE_SIZE, RegionLayout};
use crate::wire::{RAM_BLOCK, RamRange};
use crate::worth::Worth;

/// Which memory is populated beforehand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Populate {
    /// All of it, as far as the host has memory to spare.
    #[default]
    All,
    /// Only what is about to be written: pages that were never used at the source stay holes.
    Used,
}

/// So many blocks in a row without a huge page, and it is not asked for any more.
const HUGE_MISSES_MAX: u32 = 8;
/// What a block counts for that was to be a huge page and cannot: more than one page by one takes anywhere.
const REFUSED_NS: u64 = 1_000_000_000;

/// Memory that is being populated.
#[derive(Debug)]
pub struct Population {
    memory: Arc<GuestMemory>,
    layout: Vec<RegionLayout>,
    populate: Populate,
    /// A bit for each page that is known to be there, by region.
    there: Vec<Vec<AtomicU64>>,
    /// What may be other than zero of it; populating changes nothing of that.
    written: Arc<Written>,
    pages: AtomicU64,
    spent_ns: AtomicU64,
    /// The kernel can.
    able: AtomicBool,
    /// What huge pages are worth here.
    huge: Mutex<Worth>,
    /// So often in a row the kernel had none for such memory.
    huge_misses: AtomicU32,
    /// The guest stands still.
    urgent: AtomicBool,
    control: Mutex<Control>,
    changed: Condvar,
    /// What both bitmaps take.
    held: Held,
}

#[derive(Debug, Default)]
struct Control {
    paused: bool,
    stopped: bool,
}

impl Population {
    /// Nothing of `memory` is known to be populated.
    pub fn new(memory: Arc<GuestMemory>, populate: Populate) -> Self {
        let layout = memory.layout();
        let words = |region: &RegionLayout| {
            (0..region.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
        };
        Self {
            there: layout.iter().map(words).collect(),
            written: Arc::new(Written::of(&memory)),
            layout,
            memory,
            populate,
            pages: AtomicU64::new(0),
            spent_ns: AtomicU64::new(0),
            able: AtomicBool::new(true),
            huge: Mutex::default(),
            huge_misses: AtomicU32::new(0),
            urgent: AtomicBool::new(false),
            control: Mutex::default(),
            changed: Condvar::new(),
            held: Held::default(),
        }
    }

    /// What it takes of memory counts for a migration.
    #[must_use]
    pub(crate) fn counted(mut self, account: &Account) -> Self {
        let words: usize = self.there.iter().map(|words| size_of_val(words.as_slice())).sum();
        self.held = Held::of(account, 2 * words as u64);
        self
    }

    /// Bytes that are populated.
    pub fn bytes(&self) -> u64 {
        self.pages.load(Ordering::Relaxed) * PAGE_SIZE
    }

    /// Time that all threads spent on it, in ns.
    pub fn spent_ns(&self) -> u64 {
        self.spent_ns.load(Ordering::Relaxed)
    }

    /// Which pages may be other than zero.
    pub(crate) fn written(&self) -> Arc<Written> {
        Arc::clone(&self.written)
    }

    /// Memory may have been written by others than the data channels: a zero page that arrives is looked at where
    /// there is memory.
    pub(crate) fn look_again(&self) {
        self.written.look_again(&self.memory);
    }

    /// Before pages are written: sees that they are there.
    pub(crate) fn before_write(&self, range: RamRange) -> Result<(), MemoryError> {
        let (region, offset) = self.memory.locate(range.gpa, range.len)?;
        let pages = offset / PAGE_SIZE..(offset + range.len) / PAGE_SIZE;
        if self.is_there(region, pages.start, pages.end) {
            return Ok(());
        }
        match self.populate {
            Populate::All if !self.urgent.load(Ordering::Relaxed) => {
                let (first, end) = self.block_of(region, pages.start);
                self.fill(region, first, end.max(pages.end))
            }
            Populate::All | Populate::Used => self.fill(region, pages.start, pages.end),
        }
    }

    /// The pages of the 2 MiB block that `page` of `region` belongs to.
    fn block_of(&self, region: usize, page: u64) -> (u64, u64) {
        let layout = self.layout[region];
        let gpa = (layout.gpa + page * PAGE_SIZE) / RAM_BLOCK * RAM_BLOCK;
        let first = gpa.max(layout.gpa) - layout.gpa;
        let end = gpa.saturating_add(RAM_BLOCK) - layout.gpa;
        (first / PAGE_SIZE, end.min(layout.len) / PAGE_SIZE)
    }

    /// The pages `[first, end)` of `region` are populated for certain.
    pub(crate) fn is_there(&self, region: usize, first: u64, end: u64) -> bool {
        let words = &self.there[region];
        masks(first, end).all(|(word, mask)| words[word].load(Ordering::Relaxed) & mask == mask)
    }

    fn fill(&self, region: usize, first: u64, end: u64) -> Result<(), MemoryError> {
        if !self.able.load(Ordering::Relaxed) {
            return Ok(());
        }
        let begun = clock::now();
        let gpa = self.layout[region].gpa + first * PAGE_SIZE;
        let len = (end - first) * PAGE_SIZE;
        // Time of this thread, where the block may be either.
        let judged = self.may_be_huge(region, first, end).then(own_cpu_ns);
        let huge = judged.is_some() && self.huge().is_special(false);
        let came = if huge { self.memory.populate_huge(gpa, len)? } else { HugePages::Unknown };
        if came != HugePages::There && !self.memory.populate(gpa, len)? {
            tracing::info!("the kernel cannot populate memory ahead of its use");
            self.able.store(false, Ordering::Relaxed);
            return Ok(());
        }
        let words = &self.there[region];
        let fresh: u32 = masks(first, end)
            .map(|(word, mask)| {
                (mask & !words[word].fetch_or(mask, Ordering::Relaxed)).count_ones()
            })
            .sum();
        self.pages.fetch_add(fresh.into(), Ordering::Relaxed);
        self.spent_ns.fetch_add(clock::now().since(begun).0, Ordering::Relaxed);
        // Of a block that another thread was at as well, the time says nothing.
        if let Some(before_ns) = judged
            && u64::from(fresh) * PAGE_SIZE == RAM_BLOCK
        {
            self.learn(huge, came, own_cpu_ns().saturating_sub(before_ns));
        }
        Ok(())
    }

    fn huge(&self) -> MutexGuard<'_, Worth> {
        self.huge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages are a whole block, as the region's file has blocks, nothing of it is there, and the guest runs.
    fn may_be_huge(&self, region: usize, first: u64, end: u64) -> bool {
        let words = &self.there[region];
        self.huge_misses.load(Ordering::Relaxed) < HUGE_MISSES_MAX
            && !self.urgent.load(Ordering::Relaxed)
            && (end - first) * PAGE_SIZE == RAM_BLOCK
            && (first * PAGE_SIZE).is_multiple_of(RAM_BLOCK)
            && masks(first, end).all(|(word, mask)| words[word].load(Ordering::Relaxed) & mask == 0)
    }

    /// A fresh block took so long, with a wish for a huge page or without.
    fn learn(&self, huge: bool, came: HugePages, took_ns: u64) {
        match (huge, came) {
            (false, _) => self.huge().note(false, RAM_BLOCK, took_ns),
            (true, HugePages::There) => {
                self.huge_misses.store(0, Ordering::Relaxed);
                self.huge().note(true, RAM_BLOCK, took_ns);
            }
            // Looking for such a page was in vain, however soon that was known.
            (true, HugePages::Refused) => self.huge().note(true, RAM_BLOCK, REFUSED_NS),
            (true, HugePages::Busy) => {}
            (true, HugePages::Unknown) => _ = self.huge_misses.fetch_add(1, Ordering::Relaxed),
        }
    }

    // --- in the background --------------------------------------------------------------------

    /// Starts the thread that populates everything in the background, where that is wished and the host has the
    /// memory. It ends with what is returned.
    pub fn start(self: &Arc<Self>) -> std::io::Result<Background> {
        self.start_for(&Account::default())
    }

    /// As [`start`](Self::start), and the thread works for a migration.
    pub(crate) fn start_for(self: &Arc<Self>, account: &Account) -> std::io::Result<Background> {
        let (available, size) = (available_bytes(), self.memory.size_bytes());
        let fits = available.is_none_or(|available| size <= available / 10 * 9);
        let thread = if self.populate == Populate::All && fits {
            let population = Arc::clone(self);
            let builder = std::thread::Builder::new().name("dst-populate".into());
            let account = account.clone();
            Some(builder.spawn(move || {
                let _joined = account.join(Work::Populate);
                population.run();
            })?)
        } else {
            if self.populate == Populate::All {
                tracing::info!(
                    available,
                    size,
                    "only what arrives is populated: all of guest memory is more than this host has to spare"
                );
            }
            None
        };
        Ok(Background { population: Arc::clone(self), thread })
    }

    fn run(&self) {
        yield_to_everybody();
        for region in 0..self.layout.len() {
            let mut page = 0;
            while page < self.layout[region].pages() {
                if !self.may_go_on() {
                    return;
                }
                let (first, end) = self.block_of(region, page);
                if !self.is_there(region, first, end)
                    && let Err(error) = self.fill(region, first, end)
                {
                    // Whoever writes there will say so as well, and that counts.
                    return tracing::warn!(%error, "guest memory is not populated ahead");
                }
                if !self.able.load(Ordering::Relaxed) {
                    return;
                }
                page = end;
            }
        }
    }

    /// Waits while it is paused; false once it is over.
    fn may_go_on(&self) -> bool {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        while control.paused && !control.stopped {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        !control.stopped
    }

    fn set(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.control.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

/// The background thread, from outside.
#[derive(Debug)]
pub struct Background {
    population: Arc<Population>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Holds it while the guest stands still, when those who receive have no time for more than they write
    /// either, or lets it go on.
    pub fn pause(&self, paused: bool) {
        self.population.urgent.store(paused, Ordering::Relaxed);
        self.population.set(|control| control.paused = paused);
    }

    /// Tells it to end; it does after at most a block, once it gets to run.
    pub fn stop(&self) {
        self.population.set(|control| control.stopped = true);
    }

    /// As [`stop`](Self::stop), and nobody waits for it.
    pub fn detach(mut self) {
        self.thread = None;
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

/// This thread runs where nobody else wants to.
fn yield_to_everybody() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: thread 0 is this one, and the parameters live across the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "memory is populated at ordinary priority");
    }
}

/// What the host could give without swapping, in bytes, as far as it says.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory() -> Arc<GuestMemory> {
        let layout = [
            RegionLayout { gpa: 0, len: 640 << 10 },
            RegionLayout { gpa: MIB, len: 6 * MIB + PAGE_SIZE },
        ];
        Arc::new(GuestMemory::new(&layout).unwrap())
    }

    /// What the host has given, in bytes.
    fn allocated(memory: &GuestMemory) -> u64 {
        let blocks = (0..memory.layout().len()).map(|region| {
            let fd = memory.region_fd(region).try_clone_to_owned().unwrap();
            std::fs::File::from(fd).metadata().unwrap().blocks()
        });
        blocks.sum::<u64>() * 512
    }

    #[test]
    fn what_is_about_to_be_written_is_there_and_nothing_else_where_that_is_wished() {
        let memory = memory();
        let population = Population::new(Arc::clone(&memory), Populate::Used);
        for _ in 0..2 {
            population.before_write(RamRange { gpa: 2 * MIB, len: 3 * PAGE_SIZE }).unwrap();
            assert_eq!((population.bytes(), allocated(&memory)), (3 * PAGE_SIZE, 3 * PAGE_SIZE));
        }
        // A range half of which is there counts once.
        population.before_write(RamRange { gpa: 2 * MIB + PAGE_SIZE, len: 3 * PAGE_SIZE }).unwrap();
        assert_eq!((population.bytes(), allocated(&memory)), (4 * PAGE_SIZE, 4 * PAGE_SIZE));
        let outside = RamRange { gpa: 800 << 10, len: PAGE_SIZE };
        assert!(population.before_write(outside).is_err());
    }

    #[test]
    fn a_block_is_populated_at_once_within_its_region() {
        let memory = memory();
        let population = Population::new(Arc::clone(&memory), Populate::All);
        let blocks = [(0, 640 << 10), (MIB, MIB), (3 * MIB, 2 * MIB), (7 * MIB, MIB + PAGE_SIZE)];
        let mut all = 0;
        for (gpa, bytes) in blocks {
            population.before_write(RamRange { gpa, len: PAGE_SIZE }).unwrap();
            all += bytes;
            assert_eq!((population.bytes(), allocated(&memory)), (all, all), "{gpa:#x}");
        }
    }

    #[test]
    fn while_the_guest_stands_still_only_what_is_written_is_populated() {
        let memory = memory();
        let population = Arc::new(Population::new(Arc::clone(&memory), Populate::All));
        let background = Background { population: Arc::clone(&population), thread: None };
        let range = RamRange { gpa: 4 * MIB, len: PAGE_SIZE };
        background.pause(true);
        population.before_write(range).unwrap();
        assert_eq!((population.bytes(), allocated(&memory)), (PAGE_SIZE, PAGE_SIZE));
        background.pause(false);
        population.before_write(RamRange { gpa: 4 * MIB, len: 2 * PAGE_SIZE }).unwrap();
        assert_eq!(population.bytes(), 2 * MIB);
    }

    #[test]
    fn the_background_populates_everything_and_changes_nothing() {
        let memory = memory();
        memory.write(5 * MIB + 17, b"here before").unwrap();
        let population = Arc::new(Population::new(Arc::clone(&memory), Populate::All));
        let mut background = population.start().unwrap();
        background.thread.take().unwrap().join().unwrap();
        assert_eq!(population.bytes(), memory.size_bytes());
        assert_eq!(allocated(&memory), memory.size_bytes());
        let mut there = [0; 11];
        memory.read(5 * MIB + 17, &mut there).unwrap();
        assert_eq!(&there, b"here before");
    }

    #[test]
    fn a_background_that_is_paused_or_stopped_does_nothing() {
        let memory = memory();
        let population = Arc::new(Population::new(Arc::clone(&memory), Populate::All));
        population.set(|control| control.paused = true);
        let background = population.start().unwrap();
        background.stop();
        drop(background);
        assert_eq!((population.bytes(), allocated(&memory)), (0, 0));
    }
}
