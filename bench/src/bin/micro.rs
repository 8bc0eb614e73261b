//! Small parts by themselves: wall clock and instruction counts.

use std::hint::black_box;
use std::time::Instant;

use bench::perf::Instructions;
use bench::stats::Summary;
use bench::table::Table;
use clap::Parser;
use migration::{DirtyBitmap, PAGE_SIZE, RegionLayout};

/// Measures small parts of the data path.
#[derive(Debug, Parser)]
struct Args {
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// Runs of each part.
    #[arg(long, default_value_t = 15)]
    runs: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let layout = [RegionLayout { gpa: 0, len: args.memory_mib << 20 }];
    let pages = layout[0].pages();
    let mut table = Table::new(["part", "per", "ns", "instructions"]);
    let mut sparse = DirtyBitmap::new(&layout);
    for page in (0..pages).step_by(64) {
        sparse.set_range(page * PAGE_SIZE, PAGE_SIZE);
    }
    let mut union = DirtyBitmap::new(&layout);
    measure(
        &mut table,
        &args,
        "union of two bitmaps",
        "MiB of guest memory",
        args.memory_mib,
        || {
            black_box(&mut union).union(black_box(&sparse));
        },
    );
    measure(&mut table, &args, "walk, one page of 64 dirty", "dirty page", pages / 64, || {
        black_box(black_box(&sparse).runs(u64::MAX).count());
    });
    print!("{table}");
    Ok(())
}

/// One row: `part`, which does `times` things each time it runs.
fn measure(
    table: &mut Table,
    args: &Args,
    what: &str,
    per: &str,
    times: u64,
    mut part: impl FnMut(),
) {
    part();
    let ns = Summary::of((0..args.runs).map(|_| {
        let start = Instant::now();
        part();
        start.elapsed().as_nanos() as f64 / times.max(1) as f64
    }));
    let counted = Instructions::open().and_then(|mut counter| counter.count(&mut part));
    let counted = counted.map_or_else(
        |_| "not available".into(),
        |count| format!("{:.1}", count as f64 / times.max(1) as f64),
    );
    table.row([what.to_owned(), per.to_owned(), ns.show(2), counted]);
}
