//! The arguments of every command.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use microvm::DeviceBackend;
use migration::channel::Address;

pub use device::{CheckArgs, InfoArgs, LoadArgs, SaveArgs};

use crate::units::{parse_duration, parse_size};

mod plan;

pub use plan::{DowntimeMode, PlanArgs, PlannedDevice, PolicyChoice, Sweep};

mod device;

/// Moves a running VM with its VFIO devices to another host, and keeps a promise about how long the
/// guest stands still.
#[derive(Debug, Parser)]
#[command(name = "vmferry", version, max_term_width = 100)]
#[command(after_help = "Examples:
  vmferry demo              # a whole migration on this machine, explained
  vmferry device serve --profile mlx5-vf --socket /tmp/nic.sock
  vmferry run --memory 1G --device vfio-user:/tmp/nic.sock,id=nic0 --api /tmp/a.api
  vmferry migrate --api /tmp/a.api tcp:127.0.0.1:4444

Exit status: 0 done, 1 not done, 2 arguments refused. Logs go to standard error; VMFERRY_LOG sets their
level (error, warn, info, debug, trace).")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM here, or wait for one to arrive.
    Run(Box<RunArgs>),
    /// Move the VM behind a control socket to another process.
    Migrate(MigrateArgs),
    /// Show what a VM's daemon is doing.
    Status(StatusArgs),
    /// End the migration under way; the guest stays where it is.
    Cancel(CancelArgs),
    /// Change the migration under way.
    Set(SetArgs),
    /// Decide what two hosts that lost each other cannot: who runs the guest.
    Resolve(ResolveArgs),
    /// Devices: serve a software device, show, save, load or check any.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Simulate migrations: will the limit be kept, with what certainty, what dominates?
    Plan(Box<PlanArgs>),
    /// Show a whole migration on this machine: two VMs, their devices, and what happened.
    Demo(DemoArgs),
}

/// Devices.
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Serve a software device over vfio-user until interrupted.
    Serve(ServeArgs),
    /// Show what a device is and can do.
    Info(InfoArgs),
    /// Save a device's state to a file.
    Save(SaveArgs),
    /// Load a device's state from a file.
    Load(LoadArgs),
    /// Test a device's driver or server against the rules of VFIO migration.
    Check(Box<CheckArgs>),
}

/// Who executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum GuestChoice {
    /// KVM where it is available, else the process guest.
    #[default]
    Auto,
    /// vCPUs of KVM.
    Kvm,
    /// Threads of the process run the built-in workload; needs Linux 6.7, no KVM.
    Process,
}

/// How the writes of KVM's vCPUs are tracked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TrackingChoice {
    /// By KVM's dirty log: a bitmap of all memory.
    #[default]
    Log,
    /// By KVM's dirty rings: a list for each vCPU (Linux 5.11).
    Ring,
}

/// Which memory a destination populates before it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PopulateChoice {
    /// All of it.
    #[default]
    All,
    /// What arrives.
    Used,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialChoice {
    /// Nowhere.
    None,
    /// Standard input and output.
    Stdio,
    /// A file that is appended to.
    File(PathBuf),
}

/// A device as named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceArg {
    /// Who implements it.
    pub backend: DeviceBackend,
    /// The user's name for it; without one, `dev` and its place.
    pub id: Option<String>,
}

/// `vmferry run`
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  vmferry run --memory 1G --device vfio-user:/tmp/nic.sock,id=nic0 --api /tmp/a.api
  vmferry run --memory 1G --device vfio-user:/tmp/nic2.sock,id=nic0 --api /tmp/b.api \\
              --incoming tcp:127.0.0.1:4444
  vmferry run --memory 1G --device vfio:0000:65:00.1,id=nic0 --api /tmp/a.api
  vmferry run --kernel guest.elf --serial stdio

The source ends with status 0 once its guest runs elsewhere; --keep lets it stay, stopped.
A destination is made with the same memory, CPUs and devices (by id) as the source; what does not fit
is told, all of it, before a byte of the guest moves.")]
pub struct RunArgs {
    /// Who executes the guest.
    #[arg(long, value_enum, default_value_t)]
    pub guest: GuestChoice,
    /// RAM.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub memory: u64,
    /// RAM in pages of 2 MiB, from a tmpfs of its own (as root): the guest's first touch of a page costs less, and so does
    /// migrating it. What arrives at a destination gets such pages anyway where they cost less. A device server
    /// that gets memory of that tmpfs could shorten it, which ends this process; so only with servers you trust.
    #[arg(long)]
    pub hugepages: bool,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// How writes of the vCPUs are tracked while the guest is migrated. With rings each sync costs by what was written
    /// and not by how much memory there is, and the guest pays more for each page it writes.
    #[arg(long, value_enum, default_value_t)]
    pub dirty_tracking: TrackingChoice,
    /// A PVH ELF kernel to boot; without it, the built-in workload. A destination needs it as well, for a
    /// guest that resets itself.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "", requires = "kernel")]
    pub append: String,
    /// The serial console: stdio, none, or a file that is appended to.
    #[arg(long, value_name = "stdio|none|FILE", default_value = "none", value_parser = parse_serial)]
    pub serial: SerialChoice,
    /// A PCI device: behind a vfio-user socket, or of the kernel (/dev/vfio/devices/vfioN, a sysfs path, a PCI
    /// address or the UUID of a mediated device; cdev: or group: before it says how it is opened). The id
    /// pairs source and destination. Repeatable.
    #[arg(long = "device", value_name = "vfio-user:PATH|vfio:DEVICE[,id=NAME]", value_parser = parse_device)]
    pub devices: Vec<DeviceArg>,
    /// The control socket (docs/api.md).
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,
    /// Wait here for a guest to arrive instead of starting one.
    #[arg(long, value_name = "tcp:HOST:PORT|unix:PATH", conflicts_with = "fill")]
    pub incoming: Option<Address>,
    /// Allow --incoming on more than this host: whoever reaches the port sends or reads the guest's memory.
    #[arg(long)]
    pub insecure: bool,
    /// Where decisions that must outlive this process are recorded.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Records survive a crash of the host too (fdatasync).
    #[arg(long, requires = "state_dir")]
    pub durable: bool,
    /// Stay, stopped, after the guest has moved away.
    #[arg(long)]
    pub keep: bool,
    /// Which memory a destination populates before it is written: all of it as far as the host has memory to
    /// spare, or only pages that were used at the source.
    #[arg(long, value_enum, default_value_t, requires = "incoming")]
    pub populate: PopulateChoice,
    /// How long a destination that is ready obeys the source's Commit.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration, requires = "incoming")]
    pub window: Duration,
    /// How logs are written.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What the built-in workload does.
    #[command(flatten)]
    pub workload: WorkloadArgs,
}

/// What the built-in workload does.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Built-in workload")]
pub struct WorkloadArgs {
    /// Part of the memory that is filled before the guest starts, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub fill: u8,
    /// What the filling follows from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub fill_seed: u64,
    /// Memory the guest writes over and over; half of what there is if not given.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub working_set: Option<u64>,
    /// Page writes per second, or max.
    #[arg(long, value_name = "PAGES_PER_S", default_value = "2000", value_parser = parse_rate)]
    pub dirty_rate: u32,
    /// Pages each device writes per second by DMA.
    #[arg(long, value_name = "STAMPS_PER_S", default_value_t = 0)]
    pub dma_rate: u32,
    /// A shared file that is stamped at each heartbeat, for the proof that a guest never ran twice at once.
    #[arg(long, value_name = "FILE")]
    pub witness: Option<PathBuf>,
}

/// `vmferry migrate`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry migrate --api /tmp/a.api tcp:127.0.0.1:4444
  vmferry migrate --api /tmp/a.api unix:/tmp/move.sock --downtime-limit 100ms --verify --json
  vmferry migrate --api /tmp/a.api unix:/tmp/move.sock --local
  vmferry migrate --api /tmp/a.api tcp:127.0.0.1:4444 --dry-run
  vmferry migrate --api /tmp/a.api tcp:127.0.0.1:4444 --downtime-mode strict --profile nic0=mlx5-vf

^C asks for the guest to stay; a second ^C leaves the migration alone and ends this command.
Exit status 0 only when the guest runs at the destination (and, with --verify, memory and device state
were identical), or when a dry run found that everything fits.")]
pub struct MigrateArgs {
    /// Where the destination listens.
    #[arg(value_name = "DEST")]
    pub destination: Address,
    /// The control socket of the source.
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// How long the guest may stand still.
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = parse_duration)]
    pub downtime_limit: Duration,
    /// How hard that limit is. Strict needs to know how long calls on each device may take: from its profile,
    /// or from earlier migrations (--state-dir of vmferry run).
    #[arg(long, value_enum, default_value_t)]
    pub downtime_mode: DowntimeMode,
    /// After so long strict ends, and best effort switches over whatever the limit.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_total_time: Option<Duration>,
    /// Whose rule decides when to switch over: ours, or a peer's for comparison.
    #[arg(long, value_enum, default_value_t)]
    pub policy: PolicyChoice,
    /// Before the first switchover, let the devices go into their P2P states and back in one short pause.
    #[arg(long)]
    pub rehearse: bool,
    /// Slow the vCPUs down, step by step (cpu-throttle-percentage 20 to 99), while memory alone keeps the limit out of reach.
    #[arg(long)]
    pub auto_converge: bool,
    /// What a device is like: a profile's name or file. Repeatable.
    #[arg(long = "profile", value_name = "ID=NAME|FILE", value_parser = parse_profile)]
    pub profiles: Vec<(String, String)>,
    /// Migrate this device in strict mode although nobody says how long its calls may take. Repeatable.
    #[arg(long, value_name = "ID")]
    pub allow_unbounded: Vec<String>,
    /// Data channels; if not given, half as many as the host has cores, but two, and one for each device, where
    /// there are as many cores; at most 4, and 1 on a link that is known to be slower than a core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub channels: Option<u16>,
    /// Write a trace of this migration, for vmferry plan --trace. The source's daemon writes it, when the migration
    /// is over.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// The most bytes per second, over all data channels together, while the guest runs; no limit if not given. While
    /// the guest stands still nothing is limited.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_bandwidth: Option<u64>,
    /// Compress memory on its way. Channels find out whether it pays, and do without it where it does not.
    #[arg(long, value_enum, default_value_t)]
    pub compression: Compression,
    /// Bytes per second that the link carries while the guest stands still; measured if not given. With a limit of the
    /// bandwidth no more than the limit is seen, and so no more is reckoned with: this says that there is more.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub avail_switchover_bandwidth: Option<u64>,
    /// Hand the guest's memory over instead of sending it: to another process of this host, which listens on unix:PATH.
    /// How long the guest stands still does not depend on how much memory it has.
    #[arg(long)]
    pub local: bool,
    /// Only compare both sides; nothing moves.
    #[arg(long)]
    pub dry_run: bool,
    /// Hash memory and devices on both sides before the guest starts there. The guest stands still
    /// meanwhile.
    #[arg(long)]
    pub verify: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// How memory is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Less, and faster.
    Lz4,
    /// More, for slow links.
    Zstd,
}

/// `vmferry status`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry status --api /tmp/a.api
  vmferry status --api /tmp/a.api --json")]
pub struct StatusArgs {
    /// The control socket.
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `vmferry cancel`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  vmferry cancel --api /tmp/a.api

Accepted on either side in every state before Commit; afterwards the guest belongs to the destination.")]
pub struct CancelArgs {
    /// The control socket.
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
}

/// `vmferry set`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("limit").required(true).multiple(true))]
#[command(after_help = "Examples:
  vmferry set --api /tmp/a.api --downtime-limit 500ms
  vmferry set --api /tmp/a.api --max-bandwidth 200M

A downtime limit counts from the next decision on. A best-effort migration with a limit of 0ms makes everything ready
and waits until it is raised. A limit of the bandwidth counts at once.")]
pub struct SetArgs {
    /// The control socket of the source.
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// How long the guest may stand still.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, group = "limit")]
    pub downtime_limit: Option<Duration>,
    /// The most bytes per second while the guest runs; 0 for no limit.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "limit")]
    pub max_bandwidth: Option<u64>,
}

/// `vmferry resolve`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("decision").required(true))]
#[command(after_help = "Examples:
  vmferry resolve --api /tmp/a.api --resume-here    # source in doubt, and the guest does not run there
  vmferry resolve --api /tmp/a.api --abandon        # source in doubt, and the guest runs there or is gone
  vmferry resolve --api /tmp/b.api --run-here       # destination prepared or expired, and the source is dead
  vmferry resolve --api /tmp/b.api --discard        # destination prepared or expired, and not wanted
  vmferry resolve --state-dir /var/lib/vmferry --ask # what an earlier process on this host left in doubt

Look at the other side first. Two hosts that are both told to run the guest run it twice: --resume-here is
wrong where the destination has obeyed the Commit whose answer was lost, and --run-here where the source
lives, or took the switchover back and let the guest run on before it died.")]
pub struct ResolveArgs {
    /// The control socket of the source in doubt, or of the destination that holds the guest.
    #[arg(long, value_name = "PATH", required_unless_present = "state_dir")]
    pub api: Option<PathBuf>,
    /// Records of a source whose process died in doubt, instead of a daemon that lives.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["api", "resume_here", "run_here", "discard"])]
    pub state_dir: Option<PathBuf>,
    /// Source in doubt: the guest runs here. Refused until the destination's window is surely over.
    #[arg(long, group = "decision")]
    pub resume_here: bool,
    /// Do not wait for the window.
    #[arg(long, requires = "resume_here")]
    pub force: bool,
    /// Source in doubt: the guest is given up here.
    #[arg(long, group = "decision")]
    pub abandon: bool,
    /// Destination that holds all of a guest: it is started here.
    #[arg(long, group = "decision")]
    pub run_here: bool,
    /// Destination that holds all of a guest: it is thrown away.
    #[arg(long, group = "decision")]
    pub discard: bool,
    /// Records in doubt: hear what the destination decided; it is asked for nothing.
    #[arg(long, group = "decision", requires = "state_dir")]
    pub ask: bool,
}

/// `vmferry device serve`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry device serve --profile mlx5-vf --socket /tmp/nic.sock
  vmferry device serve --profile mlx5-vf --state-size 64M --quirk short-reads=512 --socket /tmp/nic.sock
  vmferry device serve --list-profiles
  vmferry device serve --list-quirks")]
pub struct ServeArgs {
    /// Which kind of device: a name of --list-profiles, or a TOML file.
    #[arg(long, value_name = "NAME|FILE", required_unless_present_any = ["list_profiles", "list_quirks"])]
    pub profile: Option<String>,
    /// Where to listen.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["list_profiles", "list_quirks"])]
    pub socket: Option<PathBuf>,
    /// Size of the device's state; without it, the profile's.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub state_size: Option<u64>,
    /// Times of the profile in percent; 0 = as fast as it can.
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    pub time_scale: u32,
    /// A deviation to switch on; as-driver stands for those of the profile's real driver. Repeatable.
    #[arg(long = "quirk", value_name = "NAME[=ARGUMENT]")]
    pub quirks: Vec<String>,
    /// Show the profiles that come along.
    #[arg(long)]
    pub list_profiles: bool,
    /// Show the deviations.
    #[arg(long)]
    pub list_quirks: bool,
    /// How logs are written.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// What the demonstration shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// The guest reconfigures its device during precopy.
    #[default]
    Plain,
    /// The guest reconfigures its device after the switchover was decided: once with too much new initial
    /// data, once with little.
    LateReinit,
}

/// Which sockets the demonstration uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP on the loopback interface.
    #[default]
    Tcp,
    /// UNIX sockets.
    Unix,
}

/// `vmferry demo`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmferry demo
  vmferry demo --scenario late-reinit
  vmferry demo --downtime-mode strict --downtime-limit 1s
  vmferry demo --scenario late-reinit --policy qemu-11
  vmferry demo --guest process --memory 512M --profile mlx5-vf --profile virtio-vf --json

Exit status 0 only when every migration was completed, memory and device state were identical, and what
the scenario is about did happen. In strict mode nothing is hashed, since the guest would stand still for
that, and no blackout may be longer than the limit; a limit that cannot be kept is refused, with the reason.")]
pub struct DemoArgs {
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// Who executes the guest.
    #[arg(long, value_enum, default_value_t)]
    pub guest: GuestChoice,
    /// RAM, all of it filled.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub cpus: u32,
    /// Which kind of device; repeat it for several devices. mlx5-vf if not given.
    #[arg(long = "profile", value_name = "NAME")]
    pub profiles: Vec<String>,
    /// Size of each device's state; the profile's own, but at most 64M, if not given
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub state_size: Option<u64>,
    /// How long the guest may stand still.
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = parse_duration)]
    pub downtime_limit: Duration,
    /// How hard that limit is. Strict knows the devices by their profiles.
    #[arg(long, value_enum, default_value_t)]
    pub downtime_mode: DowntimeMode,
    /// After so long strict ends, and best effort switches over whatever the limit.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_total_time: Option<Duration>,
    /// Whose rule decides when to switch over: ours, or a peer's for comparison.
    #[arg(long, value_enum, default_value_t)]
    pub policy: PolicyChoice,
    /// Slow the vCPUs down while memory alone keeps the limit out of reach.
    #[arg(long)]
    pub auto_converge: bool,
    /// What to show.
    #[arg(long, value_enum, default_value_t)]
    pub scenario: Scenario,
    /// Which sockets the migration uses.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
}

fn parse_profile(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(id, name)| !id.is_empty() && !name.is_empty());
    let (id, name) = pair.ok_or_else(|| format!("{text:?}: write ID=NAME or ID=FILE"))?;
    Ok((id.to_owned(), name.to_owned()))
}

fn parse_serial(text: &str) -> Result<SerialChoice, String> {
    match text {
        "" => Err("write stdio, none or a file".into()),
        "none" => Ok(SerialChoice::None),
        "stdio" => Ok(SerialChoice::Stdio),
        file => Ok(SerialChoice::File(file.into())),
    }
}

fn parse_rate(text: &str) -> Result<u32, String> {
    match text {
        "max" => Ok(u32::MAX),
        number => number.parse().map_err(|_| format!("{text:?} is neither a number nor max")),
    }
}

fn parse_device(text: &str) -> Result<DeviceArg, String> {
    const FORM: &str = "write vfio-user:PATH or vfio:DEVICE, and perhaps ,id=NAME after it";
    let mut parts = text.split(',');
    let backend = parse_backend(parts.next().unwrap_or_default(), FORM)?;
    let mut id = None;
    for part in parts {
        let name = part.strip_prefix("id=");
        let name = name.ok_or_else(|| format!("{part:?} is not an option of a device; {FORM}"))?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
            return Err(format!(
                "{name:?} is not an id: 1 to 64 letters, digits, dashes, dots and underscores"
            ));
        }
        id = Some(name.to_owned());
    }
    Ok(DeviceArg { backend, id })
}

fn parse_backend(text: &str, form: &str) -> Result<DeviceBackend, String> {
    if let Some(path) = text.strip_prefix("vfio-user:") {
        return match path {
            "" => Err(format!("{text:?} has no path; {form}")),
            path => Ok(DeviceBackend::VfioUser(path.into())),
        };
    }
    let spec = text.strip_prefix("vfio:");
    let spec = spec.ok_or_else(|| format!("{text:?} names no backend; {form}"))?;
    spec.parse::<vfio_kernel::DeviceSpec>()?;
    Ok(DeviceBackend::Vfio(spec.into()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_device_has_a_backend_and_perhaps_an_id() {
        let device = |backend, id: Option<&str>| DeviceArg { backend, id: id.map(str::to_owned) };
        let server = |path: &str| DeviceBackend::VfioUser(path.into());
        let kernel = |spec: &str| DeviceBackend::Vfio(spec.into());
        let cases = [
            ("vfio-user:/a/b", device(server("/a/b"), None)),
            ("vfio-user:/a,id=nic0", device(server("/a"), Some("nic0"))),
            ("vfio:0000:65:00.1", device(kernel("0000:65:00.1"), None)),
            ("vfio:group:65:00.1,id=nic0", device(kernel("group:65:00.1"), Some("nic0"))),
            ("vfio:/dev/vfio/devices/vfio0", device(kernel("/dev/vfio/devices/vfio0"), None)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_device(text), Ok(expected), "{text}");
        }
        for wrong in [
            "/a",
            "vfio-user:",
            "vfio-user:,id=x",
            "vfio-user:/a,id=",
            "vfio-user:/a,name=x",
            "vfio-user:/a,id=a b",
            "vfio-pci:0000:01:00.0",
            "vfio:",
            "vfio:nic0",
            "vfio:65:00.1,id=",
        ] {
            assert!(parse_device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_example_of_the_help_parses() {
        let mut commands = vec![Cli::command()];
        let mut examples = 0;
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands().cloned());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let help = help.replace("\\\n", " ");
            for line in help.lines().map(str::trim).filter(|line| line.starts_with("vmferry ")) {
                let words = line.split_whitespace().take_while(|word| *word != "#");
                Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
                examples += 1;
            }
        }
        assert!(examples > 15, "{examples}");
    }
}
