//! KVM's dirty log beside its dirty rings: what a sync costs, and what the guest pays.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use microvm::{DirtyRing, DirtyTracking, GuestKind, Vm, VmConfig};
use migration::wire::RAM_BLOCK;
use migration::{Completeness, DirtyBitmap, DirtyClearer, DirtyTracker, PAGE_SIZE, Vmm};

use crate::stats::Summary;
use crate::table::Table;

/// Pages that are forgotten at once, as the engine does it: one block of 2 MiB.
const BLOCK_PAGES: u64 = RAM_BLOCK / PAGE_SIZE;
/// How long the guest is watched, tracked and not, and how often it is synced meanwhile.
const WATCHED: Duration = Duration::from_millis(400);
const SYNC_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for the guest.
const PATIENCE: Duration = Duration::from_secs(30);

/// One row per tracker and part of memory that is written over and over.
pub fn table(memory_mib: u64, runs: usize) -> anyhow::Result<Table> {
    let mut table = Table::new([
        "tracked by",
        "dirty",
        "a sync, µs",
        "pages found",
        "ns per page",
        "guest's speed, tracked / not",
        "vCPU exits, ring full",
        "incomplete",
    ]);
    if let Err(why) = microvm::kvm_available() {
        eprintln!("skipped: dirty tracking: {why}");
        return Ok(table);
    }
    let ring = |entries, harvester| DirtyTracking::Ring(DirtyRing { entries, harvester });
    let mut trackers = vec![("log", DirtyTracking::Log)];
    match microvm::dirty_ring_available() {
        Ok(()) => trackers.extend([
            ("ring of 65536", ring(1 << 16, true)),
            ("ring of 65536, no harvester", ring(1 << 16, false)),
            ("ring of 4096", ring(1 << 12, true)),
            ("ring of 4096, no harvester", ring(1 << 12, false)),
        ]),
        Err(why) => eprintln!("skipped: dirty rings: {why}"),
    }
    for percent in [0, 1, 10] {
        for (name, tracking) in &trackers {
            let row = Bench::new(memory_mib, percent, *tracking)?.measure(runs);
            let row = row.with_context(|| format!("{name}, {percent} % dirty"))?;
            let mut cells = vec![(*name).to_owned(), format!("{percent} %")];
            cells.extend(row);
            table.row(cells);
        }
    }
    Ok(table)
}

struct Bench {
    vm: Vm,
    pages: u64,
    incomplete: u32,
}

impl Bench {
    fn new(memory_mib: u64, percent: u64, dirty_tracking: DirtyTracking) -> anyhow::Result<Self> {
        let pages = (memory_mib << 20) / PAGE_SIZE * percent / 100;
        let mut config = VmConfig {
            guest: GuestKind::Kvm,
            memory_bytes: memory_mib << 20,
            dirty_tracking,
            ..VmConfig::default()
        };
        config.workload.working_set_pages = Some(pages.max(1) as u32);
        config.workload.dirty_pages_per_s = if pages > 0 { u32::MAX } else { 0 };
        let bench = Self { vm: Vm::new(config)?, pages, incomplete: 0 };
        bench.vm.start()?;
        let begun = Instant::now();
        while !bench.vm.workload_counters()?.running {
            if begun.elapsed() > PATIENCE {
                bail!("the guest does not start");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Its pages are there.
        bench.round()?;
        Ok(bench)
    }

    /// Until the guest wrote all of its pages once more.
    fn round(&self) -> anyhow::Result<()> {
        let writes = || anyhow::Ok(self.vm.workload_counters()?.writes);
        let (before, begun) = (writes()?, Instant::now());
        while writes()? < before + self.pages {
            if begun.elapsed() > PATIENCE {
                bail!("the guest wrote less than {} pages in {PATIENCE:?}", self.pages);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn measure(mut self, runs: usize) -> anyhow::Result<Vec<String>> {
        let mut dirty = DirtyBitmap::new(&self.vm.memory().layout());
        let (mut us, mut ns_per_page, mut found) = (Vec::new(), Vec::new(), Vec::new());
        let mut tracker = self.tracker()?;
        for _ in 0..runs {
            self.round()?;
            let begun = Instant::now();
            let pages = self.sync(&mut tracker, &mut dirty)?;
            let took = begun.elapsed().as_nanos() as f64;
            us.push(took / 1000.0);
            found.push(pages as f64);
            ns_per_page.push(took / pages.max(1) as f64);
        }
        tracker.0.stop()?;
        let mut speed = Vec::new();
        for _ in 0..if self.pages > 0 { runs } else { 0 } {
            let free = self.watch(None, &mut dirty)?;
            let mut tracker = self.tracker()?;
            let tracked = self.watch(Some(&mut tracker), &mut dirty)?;
            tracker.0.stop()?;
            speed.push(tracked / free);
        }
        let full = self.vm.ring_counters().map_or("".into(), |rings| rings.full_exits.to_string());
        let [speed, ns_per_page] =
            [(speed, 2), (ns_per_page, 0)].map(|(values, decimals)| match self.pages {
                0 => String::new(),
                _ => Summary::of(values).show(decimals),
            });
        Ok(vec![
            Summary::of(us).show(0),
            format!("{:.0}", Summary::of(found).median),
            ns_per_page,
            speed,
            full,
            self.incomplete.to_string(),
        ])
    }

    /// A tracker that is on and has forgotten all of memory, as after a first pass.
    fn tracker(&mut self) -> anyhow::Result<Tracker> {
        let mut tracker = self.vm.dirty_trackers()?.remove(0);
        let clearer = tracker.defer();
        tracker.start()?;
        let mut tracker = (tracker, clearer);
        let mut all = DirtyBitmap::new(&self.vm.memory().layout());
        self.sync(&mut tracker, &mut all)?;
        Ok(tracker)
    }

    /// What was written since the last sync, forgotten in blocks as a pass does; answers how many pages.
    fn sync(&mut self, tracker: &mut Tracker, dirty: &mut DirtyBitmap) -> anyhow::Result<u64> {
        dirty.clear();
        if tracker.0.collect(dirty)? == Completeness::Incomplete {
            self.incomplete += 1;
            dirty.set_all();
        }
        let Some(clearer) = &tracker.1 else { return Ok(dirty.count()) };
        for region in 0..dirty.layout().len() {
            let words = dirty.region(region).chunks(BLOCK_PAGES as usize / 64);
            for (block, words) in (0..).zip(words) {
                if words.iter().any(|word| *word != 0) {
                    clearer.clear(region, block * BLOCK_PAGES, words)?;
                }
            }
        }
        Ok(dirty.count())
    }

    /// Page writes per second.
    fn watch(
        &mut self,
        mut tracker: Option<&mut Tracker>,
        dirty: &mut DirtyBitmap,
    ) -> anyhow::Result<f64> {
        let (before, begun) = (self.vm.workload_counters()?.writes, Instant::now());
        while begun.elapsed() < WATCHED {
            std::thread::sleep(SYNC_EVERY);
            if let Some(tracker) = &mut tracker {
                self.sync(tracker, dirty)?;
            }
        }
        let writes = self.vm.workload_counters()?.writes - before;
        Ok(writes as f64 / begun.elapsed().as_secs_f64())
    }
}

type Tracker = (Box<dyn DirtyTracker>, Option<Arc<dyn DirtyClearer>>);
