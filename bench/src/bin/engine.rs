//! The engine by itself, each part beside a baseline of the same run.

use bench::engine::Pair;
use bench::engine::devices::{Reach, Setup};
use bench::engine::ram::{Bench, Load};
use bench::host::Host;
use bench::table::Table;
use clap::Parser;

/// Measures the engine beside baselines; a ratio of 1 is as fast as the baseline, less is slower.
#[derive(Debug, Parser)]
struct Args {
    /// What: ram, devices.
    #[arg(long, value_delimiter = ',', default_value = "ram,devices")]
    parts: Vec<String>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// State of each device in MB.
    #[arg(long, default_value_t = 256)]
    device_mb: usize,
    /// Numbers of devices.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    devices: Vec<usize>,
    /// Numbers of data channels.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    channels: Vec<usize>,
    /// How often each is measured, in turn with its baseline.
    #[arg(long, default_value_t = 5)]
    turns: usize,
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
        for reach in [Reach::InProcess, Reach::VfioUser] {
            for devices in &args.devices {
                let setup = Setup { devices: *devices, bytes: args.device_mb * 1_000_000, reach };
                note(Pair::watched(|| setup.measure(args.turns))?);
            }
        }
    }
    if args.json {
        let json = serde_json::json!({ "host": Host::here(), "pairs": pairs });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    let mut table =
        Table::new(["what", "MB", "engine ms", "baseline ms", "MB/s", "ratio", "others"]);
    pairs.iter().for_each(|pair| table.row(pair.cells()));
    println!("Measured on {}.\n\n{table}", Host::here());
    Ok(())
}
