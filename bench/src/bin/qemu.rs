//! vmferry beside QEMU: the same guest, moved by both in turn. `bench/qemu.sh` calls it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bench::free::Ballast;
use bench::host::Host;
use bench::rival::{Ferry, Guest, Outcome, Qemu, QemuRoot, Wish};
use bench::stats::Summary;
use bench::table::Table;
use clap::Parser;
use migration::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// Moves the same guest by vmferry and by QEMU, in turn, and prints a table.
#[derive(Debug, Parser)]
struct Args {
    /// The root with QEMU.
    #[arg(long)]
    qemu_root: PathBuf,
    /// The command vmferry.
    #[arg(long)]
    vmferry: PathBuf,
    /// RAM of the guest in MiB, all filled with what does not compress.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// What the guest writes over and over, in MiB.
    #[arg(long, default_value_t = 62)]
    working_set_mib: u64,
    /// Page writes per second of the guest that dirties memory.
    #[arg(long, default_value_t = 200_000)]
    dirty_rate: u32,
    /// Downtime limits in ms.
    #[arg(long, value_delimiter = ',', default_value = "300,50,10")]
    limits: Vec<u32>,
    /// Guests: idle, dirty.
    #[arg(long, value_delimiter = ',', default_value = "idle,dirty")]
    loads: Vec<String>,
    /// Who: vmferry, off, 2, 4 (QEMU's multifd channels).
    #[arg(long, value_delimiter = ',', default_value = "vmferry,off,2,4")]
    rivals: Vec<String>,
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// A migration that takes longer is given up, in s.
    #[arg(long, default_value_t = 20)]
    patience_s: u64,
    /// Results are kept here, with those that are there already.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Free memory that is held, touched, while all are measured, in MiB: the destination then gets pages that were in
    /// use a moment ago, as all do. 0 = none; all but three times the guest's memory and 1 GiB otherwise.
    #[arg(long)]
    ballast_mib: Option<u64>,
    /// A further argument of vmferry run, on both sides. Repeatable.
    #[arg(long, allow_hyphen_values = true)]
    run_arg: Vec<String>,
}

/// What was measured, by load, limit and rival.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Results {
    host: String,
    qemu: String,
    cells: BTreeMap<String, Vec<Outcome>>,
}

fn key(load: &str, limit: u32, rival: &str) -> String {
    format!("{load} {limit} {rival}")
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let root = QemuRoot(args.qemu_root.clone());
    let guest = Guest {
        memory_bytes: args.memory_mib << 20,
        working_set_pages: ((args.working_set_mib << 20) / PAGE_SIZE) as u32,
        pages_per_s: 0,
        seed: 1,
    };
    let mut results = Results::default();
    if let Some(path) = args.results.as_ref().filter(|path| path.exists()) {
        results = serde_json::from_slice(&std::fs::read(path)?).context("results so far")?;
    }
    results.host = Host::here().to_string();
    results.qemu = root.version()?;
    let dir = tempfile::tempdir()?;
    let leave_bytes = 3 * guest.memory_bytes + (1 << 30);
    let most_bytes = args.ballast_mib.map_or(u64::MAX, |mib| mib << 20);
    let mut qemu = Qemu::new(root, guest.clone())?;
    let _ballast = Ballast::new(leave_bytes, most_bytes)?;
    let mut ferry = Ferry {
        executable: args.vmferry.clone(),
        guest,
        run_args: args.run_arg.clone(),
        source_args: Vec::new(),
        destination_args: Vec::new(),
        migrate_args: Default::default(),
    };
    for _ in 0..args.rounds {
        for load in &args.loads {
            let rate = if load == "idle" { 0 } else { args.dirty_rate };
            qemu.set_pages_per_s(rate);
            ferry.guest.pages_per_s = rate;
            for limit in &args.limits {
                let wish = Wish {
                    limit_ms: *limit,
                    patience: Duration::from_secs(args.patience_s),
                    dir: dir.path().into(),
                };
                for rival in &args.rivals {
                    let outcome = match rival.as_str() {
                        "vmferry" => ferry.migrate(&wish).map(|(outcome, _)| outcome),
                        "off" => qemu.migrate(&wish, None),
                        channels => qemu.migrate(&wish, Some(channels.parse()?)),
                    };
                    let outcome = outcome.with_context(|| key(load, *limit, rival))?;
                    eprintln!(
                        "{:<16} {:8.1} ms, down {:7.2} ms, {:.2} CPU s, {} passes{}",
                        key(load, *limit, rival),
                        outcome.wall_ms,
                        outcome.downtime_ms,
                        outcome.cpu_s,
                        outcome.passes,
                        if outcome.completed { "" } else { ", given up" },
                    );
                    results.cells.entry(key(load, *limit, rival)).or_default().push(outcome);
                }
            }
        }
        if let Some(path) = &args.results {
            std::fs::write(path, serde_json::to_vec_pretty(&results)?)?;
        }
    }
    print!("{}", show(&args, &results));
    Ok(())
}

/// The table of docs/performance.md.
fn show(args: &Args, results: &Results) -> String {
    let mut table = Table::new([
        "guest",
        "limit ms",
        "by",
        "runs",
        "total ms",
        "downtime ms",
        "MB/s",
        "CPU s",
        "passes",
        "total / QEMU's best",
    ]);
    for load in &args.loads {
        for limit in &args.limits {
            let cell = |rival: &str| results.cells.get(&key(load, *limit, rival));
            let wall = |rival: &str| {
                let done: Vec<_> = cell(rival)?.iter().filter(|run| run.completed).collect();
                (!done.is_empty()).then(|| Summary::of(done.iter().map(|run| run.wall_ms)).median)
            };
            let best = args.rivals.iter().filter(|rival| *rival != "vmferry");
            let best = best.filter_map(|rival| wall(rival)).min_by(f64::total_cmp);
            for rival in &args.rivals {
                let Some(runs) = cell(rival) else { continue };
                let name = match rival.as_str() {
                    "vmferry" => "vmferry".into(),
                    "off" => "QEMU".to_owned(),
                    channels => format!("QEMU, multifd {channels}"),
                };
                table.row(row(load, *limit, &name, runs, best, rival == "vmferry"));
            }
        }
    }
    format!("Measured on {}; QEMU {}.\n\n{table}", results.host, results.qemu)
}

fn row(
    load: &str,
    limit: u32,
    name: &str,
    runs: &[Outcome],
    best: Option<f64>,
    ours: bool,
) -> Vec<String> {
    let done: Vec<_> = runs.iter().filter(|run| run.completed).collect();
    let given_up = runs.len() - done.len();
    let mut cells = vec![load.to_owned(), limit.to_string(), name.to_owned()];
    cells.push(match given_up {
        0 => runs.len().to_string(),
        _ => format!("{}, {given_up} given up", runs.len()),
    });
    let of = |value: fn(&Outcome) -> f64| Summary::of(done.iter().map(|run| value(run)));
    let wall = of(|run| run.wall_ms);
    if done.is_empty() {
        cells.extend(std::iter::repeat_n("–".to_owned(), 6));
        return cells;
    }
    cells.push(wall.show(0));
    cells.push(of(|run| run.downtime_ms).show(1));
    cells.push(of(|run| run.transferred_bytes as f64 / 1e3 / run.wall_ms).show(0));
    cells.push(of(|run| run.cpu_s).show(2));
    cells.push(of(|run| run.passes as f64).show(0));
    cells.push(match best.filter(|_| ours) {
        Some(best) => format!("{:.2}", wall.median / best),
        None => String::new(),
    });
    cells
}
