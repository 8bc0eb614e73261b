//! `vmferry plan`, and what `migrate` and `plan` share about the promise.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::units::{parse_duration, parse_link, parse_size};

/// How hard the downtime limit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DowntimeMode {
    /// Keep the limit if it can be kept, complete anyway.
    #[default]
    BestEffort,
    /// Keep the limit, or leave the guest where it is and say why.
    Strict,
}

impl From<DowntimeMode> for switchover::decide::Mode {
    fn from(mode: DowntimeMode) -> Self {
        match mode {
            DowntimeMode::BestEffort => Self::BestEffort,
            DowntimeMode::Strict => Self::Strict,
        }
    }
}

/// Whose rule decides when to switch over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PolicyChoice {
    /// Ours: all terms, at an upper quantile, and another look after the pause.
    #[default]
    Bounded,
    /// QEMU 11.1: RAM and device bytes over the bandwidth; new initial data after the decision fails it.
    #[value(name = "qemu-11")]
    Qemu11,
    /// QEMU up to 10.2: the same without another look.
    #[value(name = "qemu-10")]
    Qemu10,
    /// Cloud Hypervisor: dirty RAM over the bandwidth, devices only when stopped.
    RamOnly,
}

impl From<PolicyChoice> for switchover::policy::Policy {
    fn from(policy: PolicyChoice) -> Self {
        match policy {
            PolicyChoice::Bounded => Self::Bounded,
            PolicyChoice::Qemu11 => Self::Qemu11,
            PolicyChoice::Qemu10 => Self::Qemu10,
            PolicyChoice::RamOnly => Self::RamOnly,
        }
    }
}

/// A device to plan with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedDevice {
    /// A profile's name, or a TOML file.
    pub profile: String,
    /// Its state, in bytes; the profile's own without.
    pub size: Option<u64>,
    /// Its id; without one, `dev` and its place.
    pub id: Option<String>,
}

/// What is varied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// Downtime limits.
    Limit(Vec<Duration>),
    /// Link rates in bytes per second.
    Link(Vec<u64>),
    /// Sizes of every device's state in bytes.
    DeviceSize(Vec<u64>),
}

/// `vmferry plan`
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  vmferry plan --device mlx5-vf
  vmferry plan --memory 64G --dirty-rate 200M --device mlx5-vf --device virtio-vf --link 25G --downtime-mode strict
  vmferry plan --device mlx5-vf --compare --svg /tmp/plan.svg
  vmferry plan --device mlx5-vf --sweep limit=100ms,300ms,1s --json
  vmferry plan --trace /tmp/vm.trace --sweep link=10G,25G   # after migrate --record /tmp/vm.trace

Every migration is simulated with the code that decides in a real one, against modelled guests, devices and
links; the same seed gives the same result. ^C gives what is there.
Exit status 0 when the limit was kept and the guest moved in --confidence of all simulated migrations.")]
pub struct PlanArgs {
    /// The guest, devices, hosts and limit of a migration that was recorded with migrate --record.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "dirty_rate", "working_set", "burst", "devices", "reconfigure", "late_reinit"])]
    pub trace: Option<PathBuf>,
    /// RAM.
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    pub memory: u64,
    /// What the guest writes per second.
    #[arg(long, value_name = "SIZE", default_value = "50M", value_parser = parse_size)]
    pub dirty_rate: u64,
    /// Memory it writes over and over; a sixteenth of all if not given.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub working_set: Option<u64>,
    /// A workload that breathes: every PERIOD it writes TIMES as much for LASTS.
    #[arg(long, value_name = "PERIOD,LASTS,TIMES", value_parser = parse_burst)]
    pub burst: Option<(Duration, Duration, u32)>,
    /// A device, by a profile's name or file. Repeatable.
    #[arg(long = "device", value_name = "PROFILE[,size=SIZE][,id=NAME]", value_parser = parse_planned)]
    pub devices: Vec<PlannedDevice>,
    /// The guest reconfigures each device about so often.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub reconfigure: Option<Duration>,
    /// In so many of 100 switchovers the guest reconfigures a device just before it stands.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub late_reinit: u8,
    /// The link's rate in bits per second: 10G, 2500M. The trace's, or 10G, if not given.
    #[arg(long, value_name = "RATE", value_parser = parse_link)]
    pub link: Option<u64>,
    /// The link's round trip. The trace's, or 100us, if not given.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub round_trip: Option<Duration>,
    /// Slow the guest down while memory alone keeps the limit out of reach.
    #[arg(long)]
    pub auto_converge: bool,
    /// How long the guest may stand still. The trace's, or 300ms, if not given.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// How hard that limit is.
    #[arg(long, value_enum, default_value_t)]
    pub downtime_mode: DowntimeMode,
    /// How long a migration may take.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub max_total_time: Duration,
    /// Whose rule decides.
    #[arg(long, value_enum, default_value_t)]
    pub policy: PolicyChoice,
    /// All policies side by side, on the same seeds.
    #[arg(long, conflicts_with = "policy")]
    pub compare: bool,
    /// Vary one thing: limit=…, link=… or device-size=…, values separated by commas.
    #[arg(long, value_name = "WHAT=VALUE,…", value_parser = parse_sweep)]
    pub sweep: Option<Sweep>,
    /// Rehearse the devices' way into their P2P states before the first switchover.
    #[arg(long)]
    pub rehearse: bool,
    /// Migrations to simulate.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub runs: u64,
    /// The first seed; the others follow.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// The hosts have moved so many such guests before, and learnt from it.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pub history: u64,
    /// What is asked of the plan, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 99.0, value_parser = parse_percent)]
    pub confidence: f64,
    /// Draw the distribution against the limit, and the terms.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent: Option<f64> = text.parse().ok().filter(|percent| (0.0..=100.0).contains(percent));
    percent.ok_or_else(|| format!("{text:?} is no percentage"))
}

fn parse_burst(text: &str) -> Result<(Duration, Duration, u32), String> {
    let parts: Vec<_> = text.split(',').collect();
    let [period, lasts, times] = parts[..] else {
        return Err("write PERIOD,LASTS,TIMES, as in 2s,200ms,10".into());
    };
    let (period, lasts) = (parse_duration(period)?, parse_duration(lasts)?);
    let times = times.parse().ok().filter(|times| (1..=10_000).contains(times));
    let times = times.ok_or_else(|| format!("{text:?}: TIMES is a number from 1 to 10000"))?;
    if period.is_zero() || lasts > period {
        return Err(format!("{text:?}: a burst lasts no longer than its period"));
    }
    Ok((period, lasts, times))
}

fn parse_planned(text: &str) -> Result<PlannedDevice, String> {
    let mut parts = text.split(',');
    let profile = parts.next().filter(|profile| !profile.is_empty());
    let profile = profile.ok_or("write PROFILE[,size=SIZE][,id=NAME]")?.to_owned();
    let mut device = PlannedDevice { profile, size: None, id: None };
    for part in parts {
        match part.split_once('=') {
            Some(("size", size)) => device.size = Some(parse_size(size)?),
            Some(("id", id)) if !id.is_empty() && id.len() <= 64 => device.id = Some(id.to_owned()),
            _ => return Err(format!("{part:?} is not size=SIZE or id=NAME")),
        }
    }
    Ok(device)
}

fn parse_sweep(text: &str) -> Result<Sweep, String> {
    fn each<T>(values: &str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
        let values: Vec<T> = values.split(',').map(parse).collect::<Result<_, _>>()?;
        if values.len() > 100 { Err("at most 100 values".into()) } else { Ok(values) }
    }
    match text.split_once('=') {
        Some(("limit", values)) => Ok(Sweep::Limit(each(values, parse_duration)?)),
        Some(("link", values)) => Ok(Sweep::Link(each(values, parse_link)?)),
        Some(("device-size", values)) => Ok(Sweep::DeviceSize(each(values, parse_size)?)),
        _ => Err("write limit=100ms,300ms or link=10G,25G or device-size=64M,300M".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_planned_with_parses() {
        let device = parse_planned("mlx5-vf,size=64M,id=nic0").unwrap();
        assert_eq!((device.size, device.id.as_deref()), (Some(64 << 20), Some("nic0")));
        assert_eq!(parse_burst("2s,200ms,10").unwrap().2, 10);
        assert_eq!(parse_sweep("link=10G"), Ok(Sweep::Link(vec![1_250_000_000])));
        for wrong in ["", ",size=1G", "x,size", "x,id="] {
            assert!(parse_planned(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "1s", "1s,2s,3", "1s,1ms,0", "0s,0s,1"] {
            assert!(parse_burst(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "limit", "limit=", "limit=5", "memory=1G"] {
            assert!(parse_sweep(wrong).is_err(), "{wrong}");
        }
        assert!(parse_percent("101").is_err() && parse_percent("NaN").is_err());
    }
}
