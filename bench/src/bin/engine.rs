//! The engine by itself, each part beside a baseline of the same run.

use std::path::PathBuf;

use bench::engine::Pair;
use bench::engine::compression::{self, Content};
use bench::engine::devices::{Reach, Setup, Stage};
use bench::engine::floor::{self, Floor};
use bench::engine::local::{self, Local};
use bench::engine::ram::{Bench, Load};
use bench::host::Host;
use bench::table::Table;
use clap::Parser;
use migration::ram::Codec;

/// Measures the engine beside baselines; a ratio of 1 is as fast as the baseline, less is slower.
#[derive(Debug, Parser)]
struct Args {
    /// What: ram, devices, floor, compression (beside the same without), local (blackouts of 8 GiB beside 1 GiB).
    #[arg(long, value_delimiter = ',', default_value = "ram,devices,floor")]
    parts: Vec<String>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// State of each device in MB; it is carried once while the guest runs, and once in the blackout.
    #[arg(long, default_value_t = 256)]
    device_mb: usize,
    /// Numbers of devices.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    devices: Vec<usize>,
    /// How the devices are reached.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "in-process,vfio-user")]
    reach: Vec<Reach>,
    /// When their state is carried.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "precopy,blackout")]
    stages: Vec<Stage>,
    /// Numbers of data channels.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    channels: Vec<usize>,
    /// Limits of the bandwidth under which compression is measured, in MB/s; 0 = none.
    #[arg(long, value_delimiter = ',', default_value = "0,1000,100")]
    limits: Vec<u64>,
    /// How often each is measured, in turn with its baseline.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// The command vmferry, for the floor of the blackout and local moves, which are measured between processes on KVM.
    #[arg(long)]
    vmferry: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut pairs: Vec<Pair> = Vec::new();
    let mut note = |pair: Pair| {
        eprintln!("{}", pair.cells().join(" | "));
        pairs.push(pair);
    };
    if args.parts.iter().any(|part| part == "ram") {
        let loads = [Load::Full, Load::Dirty(1), Load::Dirty(10), Load::Dirty(50), Load::ZeroHeavy];
        for load in loads {
            let bench = Bench::new(args.memory_mib << 20, load)?;
            for channels in &args.channels {
                note(Pair::watched(|| bench.measure(*channels, args.turns))?);
            }
        }
    }
    if args.parts.iter().any(|part| part == "devices") {
        let bytes = args.device_mb * 1_000_000;
        for stage in args.stages.iter().copied() {
            for reach in args.reach.iter().copied() {
                for devices in args.devices.iter().copied() {
                    let setup = Setup { devices, bytes, reach, stage };
                    note(Pair::watched(|| setup.measure(args.turns))?);
                }
            }
        }
    }
    if args.parts.iter().any(|part| part == "compression") {
        for content in [Content::Programs, Content::Noise] {
            let bench = compression::Bench::new(args.memory_mib << 20, content)?;
            for limit in args.limits.iter().map(|limit| limit * 1_000_000) {
                for codec in [Codec::Lz4, Codec::Zstd] {
                    note(Pair::watched(|| bench.measure(codec, limit, args.turns))?);
                }
            }
        }
    }
    let floors = floors(&args)?;
    let local = local(&args)?;
    if args.json {
        let json = serde_json::json!({ "host": Host::here(), "pairs": pairs, "floors": floors, "local": local });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    println!("Measured on {}.", Host::here());
    if !pairs.is_empty() {
        let mut table =
            Table::new(["what", "MB", "engine ms", "baseline ms", "MB/s", "ratio", "others"]);
        pairs.iter().for_each(|pair| table.row(pair.cells()));
        println!("\n{table}");
    }
    floors.iter().for_each(show_floor);
    local.iter().for_each(show_local);
    Ok(())
}

/// The floor of the blackout, where it can be measured.
fn floors(args: &Args) -> anyhow::Result<Vec<Floor>> {
    let Some(vmferry) = between_processes(args, "floor") else { return Ok(Vec::new()) };
    [0, 1].into_iter().map(|devices| floor::measure(vmferry, devices, args.turns)).collect()
}

/// Local moves, where they can be measured.
fn local(args: &Args) -> anyhow::Result<Option<Local>> {
    let Some(vmferry) = between_processes(args, "local") else { return Ok(None) };
    local::measure(vmferry, args.turns).map(Some)
}

/// The command to measure `part` with, if that is wished and possible.
fn between_processes<'a>(args: &'a Args, part: &str) -> Option<&'a PathBuf> {
    if !args.parts.iter().any(|wished| wished == part) {
        return None;
    }
    let Some(vmferry) = &args.vmferry else {
        eprintln!("skipped: {part}: --vmferry is not given");
        return None;
    };
    if let Err(why) = microvm::kvm_available() {
        eprintln!("skipped: {part}: {why}");
        return None;
    }
    Some(vmferry)
}

fn show_floor(floor: &Floor) {
    println!("\n{}: {} ms", floor.what, floor.downtime_ms.show(2));
    if let Some(percent) = &floor.explained_percent {
        println!("explained by its parts: {} %", percent.show(1));
    }
    if floor.parts_us.is_empty() {
        return;
    }
    let mut table = Table::new(["part", "µs"]);
    for (name, us) in &floor.parts_us {
        table.row([name.clone(), us.show(0)]);
    }
    println!("\n{table}");
}

fn show_local(local: &Local) {
    let mut table = Table::new(["memory MiB", "downtime ms", "mapped before in ms", "total ms"]);
    for moves in &local.moves {
        table.row([
            (moves.memory_bytes >> 20).to_string(),
            moves.downtime_ms.show(3),
            moves.map_ms.show(2),
            moves.total_ms.show(0),
        ]);
    }
    println!(
        "\nlocal moves in turn; downtimes, more memory through less: {}\n\n{table}",
        local.ratio.show(2)
    );
}
