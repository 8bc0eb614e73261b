//! Small parts by themselves: wall clock and instruction counts.
//!
//! Where the CPU has no instruction counter for us (many VMs), `micro --callgrind` runs each part under
//! valgrind, if that is there, and counts with it: instructions in user space, of AVX2 at most.

use std::hint::black_box;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use bench::engine::bulk::{Bulk, Function};
use bench::host::Host;
use bench::perf::Instructions;
use bench::stats::Summary;
use bench::table::Table;
use clap::Parser;
use migration::wire::{FrameHeader, RAM_BLOCK, RamRange, ram_pages_header};
use migration::{DirtyBitmap, GuestMemory, HugePages, PAGE_SIZE, RegionLayout};
use vfio_migration::{DeviceState, MigratableDevice, ReadOutcome};
use vfio_user::{Options, ServedDevice, Server, ServerOptions, VfioUserDevice};

/// Measures small parts of the data path.
#[derive(Debug, Parser)]
struct Args {
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// Runs of each part.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Only parts with this in their name.
    #[arg(long, default_value = "")]
    filter: String,
    /// Count instructions by valgrind where the CPU's counter cannot be had.
    #[arg(long)]
    callgrind: bool,
    /// The part runs so often and nothing is printed: what valgrind counts.
    #[arg(long, hide = true)]
    only_times: Option<usize>,
}

impl Args {
    /// Of guest memory.
    fn gibs(&self) -> u64 {
        (self.memory_mib / 1024).max(1)
    }
}

/// The part with a table of its own.
const TRACKING: &str = "dirty tracking";

/// A part: does `times` things of the kind `per` in one go.
struct Part<'a> {
    what: &'a str,
    per: &'a str,
    times: u64,
    run: Box<dyn FnMut() + 'a>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut table = Table::new(["part", "per", "ns", "instructions"]);
    let mut show = |part: Part<'_>| measure(&mut table, &args, part);
    bitmaps(&args, &mut show)?;
    pages(&args, &mut show)?;
    population(&args, &mut show)?;
    frames(&mut show)?;
    vfio_user_reads(&args, &mut show)?;
    if args.only_times.is_none() {
        println!("Measured on {}.\n\n{table}", Host::here());
        if TRACKING.contains(&args.filter) {
            println!("\n{}", bench::tracking::table(args.memory_mib, args.runs.min(5))?);
        }
    }
    Ok(())
}

type Show<'s> = dyn FnMut(Part<'_>) -> anyhow::Result<()> + 's;

fn bitmaps(args: &Args, show: &mut Show<'_>) -> anyhow::Result<()> {
    let layout = [RegionLayout { gpa: 0, len: args.memory_mib << 20 }];
    let pages = layout[0].pages();
    let every = |step: usize| {
        let mut bitmap = DirtyBitmap::new(&layout);
        for page in (0..pages).step_by(step) {
            bitmap.set_range(page * PAGE_SIZE, PAGE_SIZE);
        }
        bitmap
    };
    let (sparse, mut union) = (every(64), DirtyBitmap::new(&layout));
    let gib = "GiB of guest memory";
    let whole = args.gibs();
    show(Part {
        what: "bitmaps: union of two",
        per: gib,
        times: whole,
        run: Box::new(|| black_box(&mut union).union(black_box(&sparse))),
    })?;
    let empty = DirtyBitmap::new(&layout);
    for (what, bitmap, per, times) in [
        ("bitmaps: walk, nothing dirty", &empty, gib, whole),
        ("bitmaps: walk, every 64th page dirty", &sparse, "dirty page", pages.div_ceil(64)),
        ("bitmaps: walk, every 2nd page dirty", &every(2), "dirty page", pages / 2),
    ] {
        let run = Box::new(move || _ = black_box(black_box(bitmap).runs(u64::MAX).count()));
        show(Part { what, per, times, run })?;
    }
    Ok(())
}

fn pages(args: &Args, show: &mut Show<'_>) -> anyhow::Result<()> {
    let len = args.memory_mib << 20;
    let memory = GuestMemory::new(&[RegionLayout { gpa: 0, len }])?;
    let first = memory.untracked_addr(0, len)?;
    let scan = |count: u64, again: u64, expected: bool| {
        for _ in 0..again {
            for page in 0..count {
                // SAFETY: a whole page of the memory, aligned, that nobody writes meanwhile.
                let zero =
                    unsafe { migration::ram::is_zero_page(first.add((page * PAGE_SIZE) as usize)) };
                assert_eq!(black_box(zero), expected);
            }
        }
    };
    fill(&memory, first, len, 0);
    let all = len / PAGE_SIZE;
    let hot = all.min(16);
    let mut part = |what, count, again, zero| {
        let (per, times, run) = ("page", count * again, Box::new(move || scan(count, again, zero)));
        show(Part { what, per, times, run })
    };
    part("zero scan: zero pages in memory", all, 1, true)?;
    part("zero scan: zero pages in the cache", hot, 1000, true)?;
    fill(&memory, first, len, 1);
    part("zero scan: pages with content", all, 1, false)
}

/// Every page begins with `value`; the rest is zero, and all pages are there.
fn fill(memory: &GuestMemory, first: NonNull<u8>, len: u64, value: u8) {
    for at in (0..memory.size_bytes().min(len)).step_by(PAGE_SIZE as usize) {
        // SAFETY: the first byte of a page of the memory.
        unsafe { first.add(at as usize).write_volatile(value) };
    }
}

/// Fresh memory each time, block by block as a destination does it, and given back.
fn population(args: &Args, show: &mut Show<'_>) -> anyhow::Result<()> {
    let len = (args.memory_mib << 20).next_multiple_of(RAM_BLOCK);
    let layout = [RegionLayout { gpa: 0, len }];
    for (what, huge) in [("population: pages of 4 KiB", false), ("population: huge pages", true)] {
        let populate = || -> anyhow::Result<bool> {
            let memory = GuestMemory::new(&layout)?;
            for gpa in (0..len).step_by(RAM_BLOCK as usize) {
                let done = match huge {
                    true => memory.populate_huge(gpa, RAM_BLOCK)? == HugePages::There,
                    false => memory.populate(gpa, RAM_BLOCK)?,
                };
                if !done {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if !populate()? {
            eprintln!("skipped: {what}: the kernel has none to give");
            continue;
        }
        let run = Box::new(|| _ = black_box(populate()));
        show(Part { what, per: "GiB of guest memory", times: args.gibs(), run })?;
    }
    Ok(())
}

fn frames(show: &mut Show<'_>) -> anyhow::Result<()> {
    const FRAMES: u64 = 10_000;
    let header =
        |frame: u64| ram_pages_header(RamRange { gpa: frame * PAGE_SIZE, len: PAGE_SIZE }, None);
    let run = || {
        for frame in 0..FRAMES {
            black_box(header(black_box(frame)).encode());
        }
    };
    show(Part {
        what: "framing: encode a header",
        per: "frame",
        times: FRAMES,
        run: Box::new(run),
    })?;
    let encoded = header(7).encode();
    let run = || {
        for _ in 0..FRAMES {
            let header = FrameHeader::decode(black_box(&encoded));
            _ = black_box(header.and_then(|header| RamRange::decode(&header)));
        }
    };
    show(Part { what: "framing: decode a header", per: "frame", times: FRAMES, run: Box::new(run) })
}

/// Reads of a device's stream from its server: one MiB at a time.
fn vfio_user_reads(args: &Args, show: &mut Show<'_>) -> anyhow::Result<()> {
    let bytes = (args.memory_mib as usize).min(64) << 20;
    let device = Bulk::new(bytes, 0, 3);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("device");
    let served =
        ServedDevice { migration: Some(Box::new(device)), pci: Arc::new(Function::default()) };
    let server = Server::bind(&path, ServerOptions::default())?.spawn(served)?;
    {
        let client = VfioUserDevice::open(&path, Options::default())?;
        let mut device = client.migration()?;
        let mut buffer = vec![0; 1 << 20];
        let mut read_all = || -> anyhow::Result<()> {
            device.set_state(DeviceState::StopCopy)?;
            let mut all = 0;
            while let ReadOutcome::Data(read) = device.read(&mut buffer)? {
                all += read;
            }
            if all != bytes {
                bail!("{all} of {bytes} bytes were read");
            }
            Ok(device.set_state(DeviceState::Running)?)
        };
        read_all()?;
        let run = Box::new(|| {
            if let Err(error) = read_all() {
                eprintln!("vfio-user: {error}");
            }
        });
        let what = "vfio-user: read a device's stream";
        show(Part { what, per: "MiB", times: bytes as u64 >> 20, run })?;
    }
    drop(server);
    Ok(())
}

/// One row.
fn measure(table: &mut Table, args: &Args, part: Part<'_>) -> anyhow::Result<()> {
    let Part { what, per, times, mut run } = part;
    let one = times.max(1) as f64;
    if let Some(runs) = args.only_times {
        if what == args.filter {
            (0..runs).for_each(|_| run());
        }
        return Ok(());
    }
    if !what.contains(&args.filter) {
        return Ok(());
    }
    run();
    let ns = Summary::of((0..args.runs).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_nanos() as f64 / one
    }));
    let counted = Instructions::open().and_then(|mut counter| counter.count(&mut run));
    let counted = match counted {
        Ok(count) => format!("{:.1}", count as f64 / one),
        Err(_) if args.callgrind => {
            format!("{:.1}", callgrind(args, what)? / one)
        }
        Err(_) => "no counter".into(),
    };
    table.row([what.to_owned(), per.to_owned(), ns.show(1), counted]);
    Ok(())
}

/// Instructions of one run of a part: what two runs take more than one.
fn callgrind(args: &Args, what: &str) -> anyhow::Result<f64> {
    let dir = tempfile::tempdir()?;
    let count = |times: usize| -> anyhow::Result<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe()?)
            .args(["--memory-mib", &args.memory_mib.min(64).to_string()])
            .args(["--filter", what, "--only-times", &times.to_string()])
            .current_dir(dir.path())
            .output()
            .context("run valgrind")?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let collected = text.lines().find_map(|line| line.split_once("Collected :"));
        let number = collected.and_then(|(_, number)| number.trim().parse().ok());
        number.with_context(|| format!("valgrind does not say what it counted: {text}"))
    };
    let scale = args.memory_mib as f64 / args.memory_mib.min(64) as f64;
    let scale = if what.starts_with("framing") || what.contains("cache") { 1.0 } else { scale };
    let scale = if what.starts_with("vfio-user") { 1.0 } else { scale };
    Ok((count(2)? - count(1)?) * scale)
}
