//! What the guest threads write, found by PAGEMAP_SCAN.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::{
    Completeness, DirtyBitmap, DirtyTracker, GuestMemory, PAGE_SIZE, RegionLayout, VmmError,
};

use crate::error::{Error, Result};
use crate::process::uffd::{AsyncWriteProtect, PageRegion, scan_written};
use crate::process::view::View;

/// Runs of pages that one scan takes at most.
const RUNS: usize = 4096;

/// Tracks the writes through one [`View`]. The one started last has the mapping; an earlier one fails from
/// then on, so a stopped log cannot pass for a quiet guest.
pub struct PagemapTracker {
    view: Arc<View>,
    slot: TrackingSlot,
    turn: Option<u64>,
}

/// A mapping can be registered once: this is where its trackers see each other.
#[derive(Clone, Debug, Default)]
pub struct TrackingSlot(Arc<Mutex<Slot>>);

#[derive(Debug, Default)]
struct Slot {
    turn: u64,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    /// The protection lasts as long as this lives.
    _protection: AsyncWriteProtect,
    pagemap: File,
    runs: Vec<PageRegion>,
}

impl TrackingSlot {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PagemapTracker {
    /// A tracker of `view`, not started.
    pub fn new(view: Arc<View>, slot: TrackingSlot) -> Self {
        Self { view, slot, turn: None }
    }

    fn try_start(&mut self) -> Result<()> {
        let mut slot = self.slot.lock();
        // Before the mapping is registered anew.
        slot.active = None;
        slot.turn += 1;
        let os = |(call, source)| Error::Os { call, source };
        let protection = AsyncWriteProtect::new().map_err(os)?;
        for (layout, addr) in self.view.ranges() {
            protection.protect(addr, layout.len).map_err(os)?;
        }
        let pagemap = File::open("/proc/self/pagemap")
            .map_err(|source| Error::Os { call: "open of /proc/self/pagemap", source })?;
        let runs = vec![PageRegion::default(); RUNS];
        slot.active = Some(Active { _protection: protection, pagemap, runs });
        self.turn = Some(slot.turn);
        Ok(())
    }

    fn scan(&mut self, into: &mut DirtyBitmap) -> Result<io::Result<()>> {
        let mut slot = self.slot.lock();
        let is_ours = self.turn == Some(slot.turn);
        let Some(active) = slot.active.as_mut().filter(|_| is_ours) else {
            let what = "this tracker of the guest's threads was stopped, or another one started";
            return Err(Error::State(what.into()));
        };
        let mut outcome = Ok(());
        for (layout, addr) in self.view.ranges() {
            // Every region is scanned, after an error too: what is found is not lost then.
            outcome = outcome.and(active.scan_region(layout, addr, into));
        }
        Ok(outcome)
    }

    fn end(&mut self) {
        let mut slot = self.slot.lock();
        if self.turn.take() == Some(slot.turn) {
            slot.active = None;
        }
    }
}

impl Drop for PagemapTracker {
    fn drop(&mut self) {
        self.end();
    }
}

impl Active {
    fn scan_region(
        &mut self,
        layout: RegionLayout,
        addr: u64,
        into: &mut DirtyBitmap,
    ) -> io::Result<()> {
        let end = addr + layout.len;
        let mut next = addr;
        while next < end {
            let (count, stopped) = scan_written(&self.pagemap, next..end, &mut self.runs)?;
            for run in self.runs.iter().take(count) {
                let start = run.start.clamp(addr, end);
                let len = run.end.clamp(start, end) - start;
                into.set_range(layout.gpa + (start - addr), len);
            }
            if stopped <= next {
                return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
            }
            next = stopped;
        }
        Ok(())
    }
}

impl DirtyTracker for PagemapTracker {
    fn name(&self) -> &'static str {
        "pagemap-scan"
    }

    fn start(&mut self) -> std::result::Result<(), VmmError> {
        Ok(self.try_start()?)
    }

    fn collect(&mut self, into: &mut DirtyBitmap) -> std::result::Result<Completeness, VmmError> {
        match self.scan(into)? {
            Ok(()) => Ok(Completeness::Complete),
            Err(error) => {
                tracing::warn!(%error, "PAGEMAP_SCAN failed: all memory counts as written");
                Ok(Completeness::Incomplete)
            }
        }
    }

    fn stop(&mut self) -> std::result::Result<(), VmmError> {
        self.end();
        Ok(())
    }
}

/// Why PAGEMAP_SCAN cannot be used here: tried on a few pages, since only the attempt tells (kernel, seccomp
/// and sysctl all have a say).
pub fn pagemap_scan_available() -> std::result::Result<(), String> {
    let advice = "the process guest needs Linux 6.7 or later with userfaultfd allowed";
    let try_it = || -> Result<()> {
        let layout = [RegionLayout { gpa: 0, len: 4 * PAGE_SIZE }];
        let memory = GuestMemory::new(&layout)?;
        let view = Arc::new(View::new(&memory)?);
        view.store_u64(0, 1);
        let mut tracker = PagemapTracker::new(Arc::clone(&view), TrackingSlot::default());
        tracker.try_start()?;
        for (writes, expected) in [(vec![2], 0b100), (vec![], 0), (vec![0, 2, 3], 0b1101)] {
            for page in writes {
                view.store_u64(page * PAGE_SIZE, 1);
            }
            let mut found = DirtyBitmap::new(&layout);
            let scanned = |source| Error::Os { call: "PAGEMAP_SCAN", source };
            tracker.scan(&mut found)?.map_err(scanned)?;
            if found.region(0) != [expected] {
                return Err(Error::State("PAGEMAP_SCAN does not find what was written".into()));
            }
        }
        Ok(())
    };
    try_it().map_err(|error| format!("{error}; {advice}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn pages(bitmap: &DirtyBitmap) -> Vec<u64> {
        let runs = bitmap.runs(u64::MAX);
        runs.flat_map(|(region, first, count)| {
            (first..first + count).map(move |page| (region as u64) << 32 | page)
        })
        .collect()
    }

    fn is_skipped() -> bool {
        match pagemap_scan_available() {
            Ok(()) => false,
            Err(why) => {
                println!("skipped: {why}");
                true
            }
        }
    }

    fn bench(layout: &[RegionLayout]) -> (GuestMemory, Arc<View>, PagemapTracker) {
        let memory = GuestMemory::new(layout).unwrap();
        let view = Arc::new(View::new(&memory).unwrap());
        let tracker = PagemapTracker::new(Arc::clone(&view), TrackingSlot::default());
        (memory, view, tracker)
    }

    const LAYOUT: [RegionLayout; 2] = [
        RegionLayout { gpa: 0, len: 1024 * PAGE_SIZE },
        RegionLayout { gpa: 1 << 32, len: 100 * PAGE_SIZE },
    ];

    #[test]
    fn a_page_is_found_once_for_each_time_it_was_written_between_two_scans() {
        if is_skipped() {
            return;
        }
        let (_memory, view, mut tracker) = bench(&LAYOUT);
        view.store_u64(0, 1);
        tracker.start().unwrap();
        let mut collect = || {
            let mut found = DirtyBitmap::new(&LAYOUT);
            assert_eq!(tracker.collect(&mut found).unwrap(), Completeness::Complete);
            pages(&found)
        };
        assert_eq!(collect(), [0; 0], "written before the start");
        view.store_u64(0, 2);
        view.store_u64(1023 * PAGE_SIZE, 2);
        view.store_u64((1 << 32) + 7 * PAGE_SIZE, 2);
        assert_eq!(collect(), [0, 1023, 1 << 32 | 7]);
        assert_eq!(collect(), [0; 0]);
        view.store_u64(0, 3);
        assert_eq!(collect(), [0]);
        let _ = view.load_u64(512 * PAGE_SIZE);
        assert_eq!(collect(), [0; 0], "a read is no write");
    }

    #[test]
    fn more_runs_than_one_scan_takes_are_all_found() {
        if is_skipped() {
            return;
        }
        let layout = [RegionLayout { gpa: 0, len: (2 * RUNS as u64 + 100) * 2 * PAGE_SIZE }];
        let (_memory, view, mut tracker) = bench(&layout);
        tracker.start().unwrap();
        let written: Vec<_> = (0..layout[0].pages()).step_by(2).collect();
        written.iter().for_each(|page| view.store_u64(page * PAGE_SIZE, 1));
        let mut found = DirtyBitmap::new(&layout);
        assert_eq!(tracker.collect(&mut found).unwrap(), Completeness::Complete);
        assert_eq!(pages(&found), written);
    }

    #[test]
    fn the_vmms_own_mapping_is_not_seen() {
        if is_skipped() {
            return;
        }
        let (memory, view, mut tracker) = bench(&LAYOUT);
        tracker.start().unwrap();
        memory.write(PAGE_SIZE, &[1]).unwrap();
        view.store_u64(0, 1);
        let mut found = DirtyBitmap::new(&LAYOUT);
        let _ = tracker.collect(&mut found).unwrap();
        assert_eq!(pages(&found), [0], "this is why the VMM marks its writes itself");
    }

    #[test]
    fn the_tracker_started_last_has_the_mapping() {
        if is_skipped() {
            return;
        }
        let (_memory, view, mut first) = bench(&LAYOUT);
        let mut second = PagemapTracker::new(Arc::clone(&view), first.slot.clone());
        let mut found = DirtyBitmap::new(&LAYOUT);
        assert!(second.collect(&mut found).is_err(), "not started");
        first.start().unwrap();
        second.start().unwrap();
        assert!(first.collect(&mut found).is_err());
        first.stop().unwrap();
        drop(first);
        view.store_u64(0, 1);
        let _ = second.collect(&mut found).unwrap();
        assert_eq!(pages(&found), [0], "the first one's end does not stop the second");
        second.stop().unwrap();
        assert!(second.collect(&mut found).is_err());
        second.start().unwrap();
    }

    /// Writers at full speed while pages are collected and copied: what was copied last must be what is
    /// there in the end. A page that a scan forgot, or protected without reporting, would be stale.
    #[test]
    fn no_write_is_lost_between_scans_of_a_running_guest() {
        if is_skipped() {
            return;
        }
        let layout = [RegionLayout { gpa: 0, len: 512 * PAGE_SIZE }];
        let (memory, view, mut tracker) = bench(&layout);
        tracker.start().unwrap();
        let stop = AtomicBool::new(false);
        let mut copy = vec![0; layout[0].len as usize];
        let update = |tracker: &mut PagemapTracker, copy: &mut [u8]| {
            let mut found = DirtyBitmap::new(&layout);
            assert_eq!(tracker.collect(&mut found).unwrap(), Completeness::Complete);
            for page in pages(&found) {
                let at = (page * PAGE_SIZE) as usize;
                memory.read(page * PAGE_SIZE, &mut copy[at..at + PAGE_SIZE as usize]).unwrap();
            }
            found.count()
        };
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let (view, stop) = (&view, &stop);
                scope.spawn(move || {
                    let mut stamp: u64 = 1;
                    while !stop.load(Ordering::Relaxed) {
                        let page = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 511;
                        view.store_u64(page * PAGE_SIZE + 8 * writer, stamp);
                        stamp += 1;
                    }
                });
            }
            let mut seen = 0;
            while seen < 20_000 {
                seen += update(&mut tracker, &mut copy);
            }
            stop.store(true, Ordering::Relaxed);
        });
        update(&mut tracker, &mut copy);
        let mut now = vec![0; copy.len()];
        memory.read(0, &mut now).unwrap();
        assert!(copy == now, "a page was written and not reported");
    }
}
