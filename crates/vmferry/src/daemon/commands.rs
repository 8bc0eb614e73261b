//! The commands of the control socket (docs/api.md).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_profile::Profile;
use microvm::vm::Lifecycle;
use microvm::workload::mailbox::Command;
use migration::channel::Address;
use migration::describe::CHANNELS_MAX;
use migration::ram::Codec;
use migration::source::{Controls, OutgoingConfig};
use migration::{GuestMemory, Vmm};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use switchover::Time;
use switchover::decide::Mode;
use switchover::estimate::DeviceKnowledge;
use switchover::handover::Resolve;
use switchover::policy::Policy;
use switchover::source::AutoConverge;

use super::state::{Daemon, State};
use crate::api::server::Handler;
use crate::api::{ApiError, ErrorClass};

/// How often a waiting command looks.
const WAIT_POLL: Duration = Duration::from_millis(5);
/// The longest wait, and the default one.
const WAIT_LIMIT: Duration = Duration::from_secs(3600);
/// How long a workload command may take by default.
const WORKLOAD_LIMIT: Duration = Duration::from_secs(10);
/// The most bytes of `peek` and `poke`.
const PEEK_MAX_BYTES: usize = 4096;
/// The phases an observer is told of.
const PHASES: [&str; 20] = [
    "setup",
    "precopy",
    "look",
    "quiesce",
    "stop-copy",
    "await-ready",
    "committed",
    "in-doubt",
    "done",
    "revoking",
    "rolling-back",
    "cancelling",
    "failed",
    "cancelled",
    "loading",
    "prepared",
    "expired",
    "starting",
    "running",
    "aborted",
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct MigrateArguments {
    destination: String,
    downtime_limit_ms: Option<f64>,
    downtime_mode: Option<String>,
    max_total_time_ms: Option<f64>,
    policy: Option<String>,
    #[serde(default)]
    rehearse: bool,
    #[serde(default)]
    auto_converge: bool,
    cpu_throttle_initial: Option<u8>,
    cpu_throttle_increment: Option<u8>,
    max_cpu_throttle: Option<u8>,
    /// By device: a profile's name, or its text.
    #[serde(default)]
    profiles: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    allow_unbounded: Vec<String>,
    channels: Option<u16>,
    /// A file here, by its whole path.
    record: Option<std::path::PathBuf>,
    max_bandwidth: Option<u64>,
    avail_switchover_bandwidth: Option<u64>,
    #[serde(default)]
    compression: CompressionArgument,
    #[serde(default)]
    verify: bool,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    local: bool,
    #[serde(default)]
    ram_checksum: bool,
    #[serde(default)]
    hold: Vec<String>,
    #[serde(default)]
    controls: ControlArguments,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct ControlArguments {
    ignore_dma_log: bool,
    ignore_vmm_writes: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WaitArguments {
    #[serde(rename = "for")]
    event: WaitFor,
    timeout_ms: Option<f64>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WaitFor {
    /// The outgoing migration is over.
    MigrationEnd,
    /// A phase is held.
    Held,
    /// The guest runs here.
    Running,
    /// The built-in workload is up.
    GuestUp,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CompressionArgument {
    #[default]
    None,
    Lz4,
    Zstd,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct SetArguments {
    downtime_limit_ms: Option<f64>,
    max_bandwidth: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct HoldArguments {
    phases: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct PokeArguments {
    gpa: u64,
    data: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct PeekArguments {
    gpa: u64,
    bytes: usize,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ResolveArguments {
    decision: ResolveDecision,
    #[serde(default)]
    force: bool,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ResolveDecision {
    /// Source in doubt: the guest runs here.
    ResumeHere,
    /// Source in doubt: it is given up.
    Abandon,
    /// Destination: it is started here.
    RunHere,
    /// Destination: it is thrown away.
    Discard,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// A device by its place or its id.
#[derive(Deserialize)]
#[serde(untagged)]
enum DeviceName {
    Place(u32),
    Id(String),
}

#[derive(Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
enum WorkloadCommand {
    Counters,
    Reconfigure {
        device: DeviceName,
        generation: u32,
        kib: u32,
    },
    DirtyRate {
        pages_per_s: u32,
    },
    Doorbell {
        device: DeviceName,
        stamps: u32,
        #[serde(default)]
        vector: u32,
    },
    ResetDevice {
        device: DeviceName,
    },
    Fill {
        device: DeviceName,
        kib: u32,
    },
    Mask {
        device: DeviceName,
        vector: u32,
        masked: bool,
    },
    DmaRate {
        device: DeviceName,
        stamps_per_s: u32,
    },
    InterruptMode {
        device: DeviceName,
        msix: bool,
    },
    PowerOff,
    TripleFault,
    ResetMachine,
}

impl Handler for Daemon {
    fn handle(
        &self,
        command: &str,
        arguments: Value,
        stop: &AtomicBool,
    ) -> Result<Value, ApiError> {
        match command {
            "status" => {
                parse::<NoArguments>(arguments)?;
                Ok(json!(self.status()))
            }
            "migrate" => self.start_migration(parse(arguments)?),
            "progress" => {
                parse::<NoArguments>(arguments)?;
                self.progress().ok_or_else(|| ApiError::refused("there was no migration"))
            }
            "wait" => self.wait(&parse(arguments)?, stop),
            "cancel" => {
                parse::<NoArguments>(arguments)?;
                self.cancel().map(|()| json!({}))
            }
            "take-back" => {
                parse::<NoArguments>(arguments)?;
                self.take_back().map(|()| json!({}))
            }
            "resolve" => {
                let ResolveArguments { decision, force } = parse(arguments)?;
                match decision {
                    ResolveDecision::ResumeHere => self.resolve_here(Resolve::RunHere { force }),
                    ResolveDecision::Abandon => self.resolve_here(Resolve::Discard),
                    ResolveDecision::RunHere => self.resolve_there(Resolve::RunHere { force }),
                    ResolveDecision::Discard => self.resolve_there(Resolve::Discard),
                }
                .map(|()| json!({}))
            }
            "set" => {
                let SetArguments { downtime_limit_ms, max_bandwidth } = parse(arguments)?;
                let limit = downtime_limit_ms.map(duration).transpose()?;
                if limit.is_none() && max_bandwidth.is_none() {
                    return Err(invalid("set: downtime-limit-ms or max-bandwidth"));
                }
                self.set_limits(limit, max_bandwidth).map(|()| json!({}))
            }
            "workload" => self.workload(arguments),
            "digest" => {
                parse::<NoArguments>(arguments)?;
                self.digest()
            }
            "hold" => {
                let HoldArguments { phases } = parse(arguments)?;
                self.arm(phases).map(|()| json!({}))
            }
            "release" => {
                parse::<NoArguments>(arguments)?;
                let held = self.gate.release();
                held.map(|held| json!(held)).ok_or_else(|| ApiError::refused("nothing is held"))
            }
            "poke" => self.poke(&parse(arguments)?),
            "peek" => self.peek(&parse(arguments)?),
            "quit" => {
                parse::<NoArguments>(arguments)?;
                self.quit();
                Ok(json!({}))
            }
            _ => {
                let desc = format!(
                    "there is no command {command:?}; there are status, migrate, progress, wait, \
                     cancel, take-back, resolve, set, workload, digest, hold, release, peek, poke, quit"
                );
                Err(ApiError::new(ErrorClass::UnknownCommand, desc))
            }
        }
    }
}

fn auto_converge(arguments: &MigrateArguments) -> Result<Option<AutoConverge>, ApiError> {
    let mut converge = AutoConverge::default();
    for (name, given, place) in [
        ("cpu-throttle-initial", arguments.cpu_throttle_initial, &mut converge.initial_percent),
        (
            "cpu-throttle-increment",
            arguments.cpu_throttle_increment,
            &mut converge.increment_percent,
        ),
        ("max-cpu-throttle", arguments.max_cpu_throttle, &mut converge.max_percent),
    ] {
        if let Some(percent) = given {
            if !(1..=99).contains(&percent) {
                return Err(invalid(format!("{name}: {percent} is not from 1 to 99 percent")));
            }
            *place = percent;
        }
    }
    Ok(arguments.auto_converge.then_some(converge))
}

/// What the caller says about devices.
fn known_devices(arguments: &MigrateArguments) -> Result<Vec<DeviceKnowledge>, ApiError> {
    let mut devices = Vec::new();
    for (id, profile) in &arguments.profiles {
        let parsed = match profile.contains('\n') {
            true => Profile::from_toml(profile),
            false => Profile::builtin(profile),
        };
        let profile = parsed.map_err(|error| invalid(format!("profiles, {id}: {error}")))?;
        devices.push(planner::scenario::knowledge(id, &profile));
    }
    for id in &arguments.allow_unbounded {
        match devices.iter_mut().find(|device| device.name == *id) {
            Some(device) => device.allow_unbounded = true,
            None => devices.push(DeviceKnowledge {
                name: id.clone(),
                allow_unbounded: true,
                ..DeviceKnowledge::default()
            }),
        }
    }
    Ok(devices)
}

impl Daemon {
    fn start_migration(&self, arguments: MigrateArguments) -> Result<Value, ApiError> {
        let destination: Address = arguments
            .destination
            .parse()
            .map_err(|error: _| invalid(format!("destination: {error}")))?;
        let mut config = OutgoingConfig::new(destination.clone());
        if let Some(ms) = arguments.downtime_limit_ms {
            config.brain.downtime_limit = Time(duration(ms)?.as_nanos() as u64);
        }
        let brain = &mut config.brain;
        brain.mode = match arguments.downtime_mode.as_deref() {
            None | Some("best-effort") => Mode::BestEffort,
            Some("strict") => Mode::Strict,
            Some(mode) => {
                return Err(invalid(format!(
                    "downtime-mode: {mode:?} is neither best-effort nor strict"
                )));
            }
        };
        if let Some(ms) = arguments.max_total_time_ms {
            brain.max_total_time = Some(Time(duration(ms)?.as_nanos() as u64));
        }
        if let Some(name) = &arguments.policy {
            brain.policy = Policy::from_name(name)
                .ok_or_else(|| invalid(format!("policy: there is none named {name:?}")))?;
        }
        brain.rehearse = arguments.rehearse;
        brain.auto_converge = auto_converge(&arguments)?;
        config.knowledge.devices = known_devices(&arguments)?;
        if let Some(channels) = arguments.channels {
            if !(1..=CHANNELS_MAX).contains(&channels) {
                return Err(invalid(format!(
                    "channels: {channels}, 1 to {CHANNELS_MAX} can be had"
                )));
            }
            config.channels = Some(channels);
        }
        if arguments.record.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(invalid("record: is no absolute path"));
        }
        config.trace = arguments.record;
        config.max_bandwidth_bytes_per_s = arguments.max_bandwidth.unwrap_or(0);
        config.compression = match arguments.compression {
            CompressionArgument::None => None,
            CompressionArgument::Lz4 => Some(Codec::Lz4),
            CompressionArgument::Zstd => Some(Codec::Zstd),
        };
        config.avail_switchover_bandwidth_bytes_per_s = arguments.avail_switchover_bandwidth;
        config.verify = arguments.verify;
        config.dry_run = arguments.dry_run;
        if arguments.local && !matches!(destination, Address::Unix(_)) {
            return Err(invalid(format!("local: {destination} is no UNIX socket")));
        }
        config.local = arguments.local;
        config.ram_checksum = arguments.ram_checksum;
        config.controls = Controls {
            ignore_dma_log: arguments.controls.ignore_dma_log,
            ignore_vmm_writes: arguments.controls.ignore_vmm_writes,
        };
        if config.controls != Controls::default() {
            tracing::warn!(controls = ?config.controls, "this migration is made wrong on purpose");
        }
        if !destination.is_loopback() {
            tracing::warn!(%destination, "the guest's memory leaves this host unencrypted");
        }
        self.arm(arguments.hold)?;
        self.migrate(config).inspect_err(|_| self.gate.disarm())?;
        Ok(json!({}))
    }

    fn arm(&self, phases: Vec<String>) -> Result<(), ApiError> {
        if let Some(unknown) = phases.iter().find(|phase| !PHASES.contains(&phase.as_str())) {
            let known = PHASES.join(", ");
            return Err(invalid(format!("there is no phase {unknown:?}; there are {known}")));
        }
        self.gate.arm(phases);
        Ok(())
    }

    /// Comes back when it happened, `{"done": false, …}` when the time is over.
    fn wait(&self, arguments: &WaitArguments, stop: &AtomicBool) -> Result<Value, ApiError> {
        let limit = arguments.timeout_ms.map_or(Ok(WAIT_LIMIT), duration)?.min(WAIT_LIMIT);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = self.happened(arguments.event)? {
                return Ok(value);
            }
            if Instant::now() >= deadline || stop.load(Ordering::Acquire) {
                // What there is by now is better than nothing.
                return Ok(match (arguments.event, self.progress()) {
                    (WaitFor::MigrationEnd, Some(progress)) => progress,
                    _ => json!({"done": false}),
                });
            }
            std::thread::sleep(WAIT_POLL);
        }
    }

    fn happened(&self, event: WaitFor) -> Result<Option<Value>, ApiError> {
        Ok(match event {
            WaitFor::MigrationEnd => {
                if self.migration_under_way() {
                    None
                } else {
                    let none = || ApiError::refused("there was no migration");
                    Some(self.progress().ok_or_else(none)?)
                }
            }
            WaitFor::Held => self.gate.held().map(|held| json!({"done": true, "held": held})),
            WaitFor::Running => {
                let state = self.state();
                let runs = matches!(state, State::Running | State::Migrating);
                (runs && self.vm.status().lifecycle == Lifecycle::Running)
                    .then(|| json!({"done": true}))
            }
            WaitFor::GuestUp => {
                let counters = self.vm.workload_counters().map_err(ApiError::failed)?;
                let up =
                    counters.running && counters.devices as usize >= self.vm.config().devices.len();
                up.then(|| json!({"done": true}))
            }
        })
    }

    fn workload(&self, mut arguments: Value) -> Result<Value, ApiError> {
        let limit = match arguments.as_object_mut().and_then(|map| map.remove("timeout-ms")) {
            Some(ms) => duration(
                serde_json::from_value(ms)
                    .map_err(|error| invalid(format!("timeout-ms: {error}")))?,
            )?,
            None => WORKLOAD_LIMIT,
        };
        if self.vm.config().kernel.is_some() {
            return Err(ApiError::refused("the guest is not the built-in workload"));
        }
        let command = match parse(arguments)? {
            WorkloadCommand::Counters => {
                let counters = self.vm.workload_counters().map_err(ApiError::failed)?;
                return Ok(json!(counters));
            }
            WorkloadCommand::Reconfigure { device, generation, kib } => {
                Command::Reconfigure { device: self.place(&device)?, generation, kib }
            }
            WorkloadCommand::DirtyRate { pages_per_s } => Command::SetDirtyRate { pages_per_s },
            WorkloadCommand::Doorbell { device, stamps, vector } => {
                Command::RingDoorbell { device: self.place(&device)?, stamps, vector }
            }
            WorkloadCommand::ResetDevice { device } => {
                Command::ResetDevice { device: self.place(&device)? }
            }
            WorkloadCommand::Fill { device, kib } => {
                Command::FillDevice { device: self.place(&device)?, kib }
            }
            WorkloadCommand::Mask { device, vector, masked } => {
                Command::MaskVector { device: self.place(&device)?, vector, masked }
            }
            WorkloadCommand::DmaRate { device, stamps_per_s } => {
                Command::SetDmaRate { device: self.place(&device)?, stamps_per_s }
            }
            WorkloadCommand::InterruptMode { device, msix } => {
                Command::SetInterruptMode { device: self.place(&device)?, msix }
            }
            WorkloadCommand::PowerOff => Command::PowerOff,
            WorkloadCommand::TripleFault => Command::TripleFault,
            WorkloadCommand::ResetMachine => Command::ResetMachine,
        };
        self.vm.workload_command(command, limit).map_err(ApiError::failed)?;
        Ok(json!({}))
    }

    fn place(&self, device: &DeviceName) -> Result<u32, ApiError> {
        let devices = &self.vm.config().devices;
        let found = match device {
            DeviceName::Place(place) => (*place as usize) < devices.len(),
            DeviceName::Id(id) => {
                if let Some(place) = devices.iter().position(|device| device.id == *id) {
                    return Ok(place as u32);
                }
                false
            }
        };
        match device {
            DeviceName::Place(place) if found => Ok(*place),
            DeviceName::Place(place) => Err(invalid(format!("there is no device {place}"))),
            DeviceName::Id(id) => Err(invalid(format!("there is no device {id:?}"))),
        }
    }

    /// Digests of memory and devices. A guest that runs is paused for it; a migration under way is left
    /// alone, so then it means something only where the migration is held with the guest stopped.
    fn digest(&self) -> Result<Value, ApiError> {
        let runs = self.vm.status().lifecycle == Lifecycle::Running;
        let pause = runs && !self.migration_under_way();
        if pause {
            self.vm.pause().map_err(ApiError::failed)?;
        }
        let digests = self.digests();
        if pause {
            self.vm.resume().map_err(ApiError::failed)?;
        }
        let paused = pause || !runs;
        let (memory, devices) = digests?;
        Ok(json!({"guest-paused": paused, "memory": memory, "devices": devices}))
    }

    fn digests(&self) -> Result<(String, Value), ApiError> {
        let memory = hex(&self.vm.memory_digest().map_err(ApiError::failed)?);
        let mut devices = serde_json::Map::new();
        for device in self.vm.devices() {
            let mut handle =
                device.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let digest = handle.state_digest().map_err(ApiError::failed)?;
            let id = device.description.id.clone();
            devices.insert(id, json!(digest.map(|digest| hex(&digest))));
        }
        Ok((memory, devices.into()))
    }

    fn poke(&self, arguments: &PokeArguments) -> Result<Value, ApiError> {
        let data = unhex(&arguments.data)
            .filter(|data| data.len() <= PEEK_MAX_BYTES)
            .ok_or_else(|| invalid(format!("data is hex of at most {PEEK_MAX_BYTES} bytes")))?;
        self.memory().write(arguments.gpa, &data).map_err(ApiError::failed)?;
        Ok(json!({}))
    }

    fn peek(&self, arguments: &PeekArguments) -> Result<Value, ApiError> {
        if arguments.bytes > PEEK_MAX_BYTES {
            return Err(invalid(format!("bytes is at most {PEEK_MAX_BYTES}")));
        }
        let mut data = vec![0; arguments.bytes];
        self.memory().read(arguments.gpa, &mut data).map_err(ApiError::failed)?;
        Ok(json!({"data": hex(&data)}))
    }

    fn memory(&self) -> std::sync::Arc<GuestMemory> {
        Vmm::memory(&*self.vm)
    }
}

fn parse<T: DeserializeOwned>(arguments: Value) -> Result<T, ApiError> {
    serde_json::from_value(arguments).map_err(|error| invalid(error.to_string()))
}

fn invalid(desc: impl Into<String>) -> ApiError {
    ApiError::new(ErrorClass::InvalidArguments, desc)
}

fn duration(ms: f64) -> Result<Duration, ApiError> {
    const MS_MAX: f64 = 86_400_000.0;
    if (0.0..=MS_MAX).contains(&ms) {
        Ok(Duration::from_nanos((ms * 1e6) as u64))
    } else {
        Err(invalid(format!("{ms:?} ms is not a time from 0 to a day")))
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_both_ways() {
        assert_eq!(hex(&[0, 0x7f, 0xff]), "007fff");
        assert_eq!(unhex("007fff"), Some(vec![0, 0x7f, 0xff]));
        for wrong in ["0", "zz", "ää", "+1"] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn workload_commands_are_strict() {
        let command = |value| parse::<WorkloadCommand>(value);
        assert!(command(json!({"command": "counters"})).is_ok());
        assert!(command(json!({"command": "doorbell", "device": "nic0", "stamps": 3})).is_ok());
        assert!(command(json!({"command": "dirty-rate", "pages-per-s": 10})).is_ok());
        for wrong in [
            json!({}),
            json!({"command": "explode"}),
            json!({"command": "dirty-rate"}),
            json!({"command": "dirty-rate", "pages-per-s": -1}),
            json!({"command": "dirty-rate", "pages-per-s": 1, "x": 1}),
            json!({"command": "fill", "device": [], "kib": 1}),
        ] {
            assert!(command(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_bounded() {
        assert_eq!(duration(1.5).unwrap(), Duration::from_micros(1500));
        for wrong in [-1.0, f64::NAN, f64::INFINITY, 1e12] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
