//! vmferry beside QEMU: the same guest, moved by both in turn. `bench/qemu.sh` calls it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use bench::free::Ballast;
use bench::host::Host;
use bench::rival::{Ferry, Guest, Outcome, Qemu, QemuRoot, Wish};
use bench::stats::Summary;
use bench::table::Table;
use clap::Parser;
use migration::{PAGE_SIZE, PageSizes};
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
    /// Who: vmferry, vmferry:2 (data channels), off, 2, 4 (QEMU's multifd channels), each with +huge for guest memory in
    /// huge pages on both sides.
    #[arg(long, value_delimiter = ',', default_value = "vmferry,off,2,4")]
    rivals: Vec<Rival>,
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// A migration that takes longer is given up, in s.
    #[arg(long, default_value_t = 20)]
    patience_s: u64,
    /// Results are kept here, with those that are there already.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Free memory that is held, touched, while all are measured, in MiB; three times the guest's memory and 1 GiB are
    /// left. The destination then gets pages that were in use a moment ago.
    #[arg(long, default_value_t = 0)]
    ballast_mib: u64,
    /// A further argument of vmferry run, on both sides. Repeatable.
    #[arg(long, allow_hyphen_values = true)]
    run_arg: Vec<String>,
}

/// One who moves the guest, and in what kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rival {
    who: Who,
    pages: PageSizes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Ferry { channels: Option<u32> },
    Qemu { multifd: Option<u32> },
}

impl Rival {
    fn is_ours(self) -> bool {
        matches!(self.who, Who::Ferry { .. })
    }
}

impl FromStr for Rival {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (name, pages) = match text.strip_suffix("+huge") {
            Some(name) => (name, PageSizes::Huge),
            None => (text, PageSizes::Kernels),
        };
        let number =
            |text: &str| text.parse().with_context(|| format!("{text:?} is no number of channels"));
        let who = match (name, name.strip_prefix("vmferry:")) {
            ("vmferry", _) => Who::Ferry { channels: None },
            ("off", _) => Who::Qemu { multifd: None },
            (_, Some(channels)) => Who::Ferry { channels: Some(number(channels)?) },
            (channels, None) => Who::Qemu { multifd: Some(number(channels)?) },
        };
        Ok(Self { who, pages })
    }
}

impl std::fmt::Display for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.who {
            Who::Ferry { channels: None } => f.write_str("vmferry")?,
            Who::Ferry { channels: Some(channels) } => write!(f, "vmferry, {channels} channels")?,
            Who::Qemu { multifd: None } => f.write_str("QEMU")?,
            Who::Qemu { multifd: Some(channels) } => write!(f, "QEMU, multifd {channels}")?,
        }
        f.write_str(if self.pages == PageSizes::Huge { ", huge pages" } else { "" })
    }
}

/// What was measured, by load, limit and rival.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Results {
    host: String,
    qemu: String,
    cells: BTreeMap<String, Vec<Outcome>>,
}

fn key(load: &str, limit: u32, rival: Rival) -> String {
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
    let mut qemus = Vec::new();
    for pages in [PageSizes::Kernels, PageSizes::Huge] {
        if args.rivals.iter().any(|rival| rival.pages == pages && !rival.is_ours()) {
            qemus.push((pages, Qemu::new(root.clone(), guest.clone(), pages)?));
        }
    }
    let _ballast = Ballast::new(leave_bytes, args.ballast_mib << 20)?;
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
            qemus.iter_mut().for_each(|(_, qemu)| qemu.set_pages_per_s(rate));
            ferry.guest.pages_per_s = rate;
            for limit in &args.limits {
                let wish = Wish {
                    limit_ms: *limit,
                    patience: Duration::from_secs(args.patience_s),
                    dir: dir.path().into(),
                };
                for rival in args.rivals.iter().copied() {
                    let outcome = match rival.who {
                        Who::Ferry { channels } => {
                            let channels =
                                channels.map(|channels| ("channels".to_owned(), channels.into()));
                            ferry.migrate_args = channels.into_iter().collect();
                            ferry.run_args = args.run_arg.clone();
                            let huge = rival.pages == PageSizes::Huge;
                            ferry.run_args.extend(huge.then(|| "--hugepages".to_owned()));
                            ferry.migrate(&wish).map(|(outcome, _)| outcome)
                        }
                        Who::Qemu { multifd } => {
                            let qemu = qemus.iter().find(|(pages, _)| *pages == rival.pages);
                            qemu.context("no QEMU with such memory")?.1.migrate(&wish, multifd)
                        }
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
            let cell = |rival: Rival| results.cells.get(&key(load, *limit, rival));
            let wall = |rival: Rival| {
                let done: Vec<_> = cell(rival)?.iter().filter(|run| run.completed).collect();
                (!done.is_empty()).then(|| Summary::of(done.iter().map(|run| run.wall_ms)).median)
            };
            for rival in args.rivals.iter().copied() {
                let Some(runs) = cell(rival) else { continue };
                let theirs = args.rivals.iter().filter(|r| !r.is_ours() && r.pages == rival.pages);
                let best = theirs.filter_map(|rival| wall(*rival)).min_by(f64::total_cmp);
                table.row(row(load, *limit, &rival.to_string(), runs, best, rival.is_ours()));
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
