//! The arguments of `vmferry device info|save|load|check`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use conformance::Selection;
use conformance::guest::ReinitWrite;
use microvm::DeviceBackend;

use super::parse_backend;
use crate::units::{parse_duration, parse_size};

fn parse_name(text: &str) -> Result<DeviceBackend, String> {
    parse_backend(text, "write vfio-user:PATH or vfio:DEVICE")
}

fn parse_limit(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        limit if limit < Duration::from_millis(100) => {
            Err("no rule is done in less than 100ms".into())
        }
        limit => Ok(limit),
    }
}

/// `vmferry device info`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry device info vfio-user:/tmp/nic.sock
  vmferry device info vfio:0000:65:00.1 --json

A device of the kernel is reset when it is opened; it must not be in use.")]
pub struct InfoArgs {
    /// The device.
    #[arg(value_name = "vfio-user:PATH|vfio:DEVICE", value_parser = parse_name)]
    pub device: DeviceBackend,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `vmferry device save`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry device save vfio-user:/tmp/nic.sock nic.state
  vmferry device save vfio-user:/tmp/nic.sock -     # to standard output

The device is stopped, its whole state is read, and it runs again. A file under the name is replaced only
once everything is in the new one.")]
pub struct SaveArgs {
    /// The device.
    #[arg(value_name = "vfio-user:PATH|vfio:DEVICE", value_parser = parse_name)]
    pub device: DeviceBackend,
    /// Where the state goes; - is standard output.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// `vmferry device load`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry device load vfio-user:/tmp/nic2.sock nic.state
  vmferry device load vfio-user:/tmp/nic2.sock -     # from standard input

A file is checked as a whole before the device sees a byte of it; what comes through a pipe is checked
before the device takes it over. Where loading fails the device is reset.")]
pub struct LoadArgs {
    /// The device.
    #[arg(value_name = "vfio-user:PATH|vfio:DEVICE", value_parser = parse_name)]
    pub device: DeviceBackend,
    /// Where the state comes from; - is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Leave the device in STOP instead of RUNNING.
    #[arg(long)]
    pub stop: bool,
}

/// `vmferry device check`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry device check vfio-user:/tmp/nic.sock
  vmferry device check vfio:0000:65:00.1 --only F,X1-X5 --destructive
  vmferry device check vfio-user:/tmp/nic.sock --junit report.xml --json
  vmferry device check vfio:0000:65:00.1 --reinit-write 0:0x14:1
  vmferry device check --list

The rules are those of docs/conformance.md. The device must be a spare one: it is reset before each rule,
its state is lost, and it is left in RUNNING.
Exit status: 0 no rule failed, 1 a rule failed, 2 the check could not run.")]
pub struct CheckArgs {
    /// The device.
    #[arg(
        value_name = "vfio-user:PATH|vfio:DEVICE",
        value_parser = parse_name,
        required_unless_present = "list"
    )]
    pub device: Option<DeviceBackend>,
    /// Only these rules: letters, ids and ranges, as in F,D1-D4.
    #[arg(long, value_name = "RULES", value_parser = Selection::parse)]
    pub only: Option<Selection>,
    /// Without these rules.
    #[arg(long, value_name = "RULES", value_parser = Selection::parse)]
    pub skip: Option<Selection>,
    /// Also rules that give the device data that is no device's state.
    #[arg(long)]
    pub destructive: bool,
    /// Show all rules, and what is known to fail each.
    #[arg(long)]
    pub list: bool,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
    /// Write a JUnit report as well.
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    pub junit: Option<PathBuf>,
    /// A 32-bit write to a BAR that makes the device reconfigure itself (new initial data: REINIT).
    #[arg(long, value_name = "BAR:OFFSET:VALUE", value_parser = ReinitWrite::parse)]
    pub reinit_write: Option<ReinitWrite>,
    /// The most that is read of one stream.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub stream_limit: u64,
    /// Every rule's time limit, instead of its own (10 to 120 s).
    #[arg(long, value_name = "DURATION", value_parser = parse_limit)]
    pub time_limit: Option<Duration>,
}
