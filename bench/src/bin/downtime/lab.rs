//! Real processes: device servers and daemons, and a guest that moves from one daemon to the next.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bench::process::Process;
use serde_json::{Value, json};
use vmferry::api::{CallError, Client};

use crate::Setting;

/// How long processes may take to come up, the filling of memory included.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a state other than the end of a migration is waited for.
pub const WAIT_LIMIT: Duration = Duration::from_secs(30);
/// How often what is waited for is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Who executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// vCPUs of KVM.
    Kvm,
    /// Threads of the process.
    Process,
}

impl Guest {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }
}

/// A device of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Its profile.
    pub profile: &'static str,
    /// Size of its state, as on the command line.
    pub size: &'static str,
}

/// A guest and its devices.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// RAM, as on the command line; all of it is filled.
    pub memory: &'static str,
    /// What it writes over and over.
    pub working_set: &'static str,
    /// Pages it writes per second.
    pub dirty_rate: &'static str,
    /// Pages each device writes per second by DMA.
    pub dma_rate: &'static str,
    /// Its devices.
    pub devices: &'static [Device],
}

fn start_process(
    setting: &Setting<'_>,
    dir: &Path,
    name: &str,
    args: &[String],
    socket: &Path,
) -> anyhow::Result<Process> {
    let mut command = Command::new(&setting.vmferry);
    command.args(args);
    let mut process = Process::start(name, command, dir)?;
    let deadline = Instant::now() + START_LIMIT;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        process.check_alive()?;
        anyhow::ensure!(Instant::now() < deadline, "{name} does not come up");
        std::thread::sleep(POLL);
    }
    Ok(process)
}

/// A daemon and its device servers.
pub struct Host {
    client: Client,
    api: PathBuf,
    daemon: Process,
    _devices: Vec<Process>,
}

impl Host {
    /// One command.
    pub fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let answer = self.client.call(command, arguments);
        answer.map_err(|error| match self.daemon.check_alive() {
            Ok(()) => {
                anyhow::Error::new(error).context(format!("{command} of {}", self.daemon.name()))
            }
            Err(ended) => ended,
        })
    }

    /// A command to the guest.
    pub fn workload(&mut self, command: Value) -> anyhow::Result<()> {
        self.call("workload", command).map(drop)
    }

    /// A command to the guest that may wait until it runs again, somewhere: nobody waits for its end.
    pub fn workload_aside(
        &self,
        mut command: Value,
    ) -> anyhow::Result<std::thread::JoinHandle<Result<Value, CallError>>> {
        let mut client = Client::connect(&self.api)?;
        client.set_timeout(Some(WAIT_LIMIT))?;
        command["timeout-ms"] = json!(1_000);
        Ok(std::thread::spawn(move || client.call("workload", command)))
    }

    /// Waits for an event of the `wait` command.
    pub fn wait(&mut self, event: &str) -> anyhow::Result<Value> {
        let limit_ms = WAIT_LIMIT.as_millis() as u64;
        let answer = self.call("wait", json!({"for": event, "timeout-ms": limit_ms}))?;
        anyhow::ensure!(answer["done"] == true, "waited too long for {event}: {answer}");
        Ok(answer)
    }

    /// Waits until the migration stands at a door where it is held; false when it ended before.
    pub fn wait_held(&mut self) -> anyhow::Result<bool> {
        let deadline = Instant::now() + WAIT_LIMIT;
        loop {
            if self.call("wait", json!({"for": "held", "timeout-ms": 20}))?["done"] == true {
                return Ok(true);
            }
            if self.progress()?["done"] == true {
                return Ok(false);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the migration does not come to where it is held"
            );
        }
    }

    /// How the outgoing migration stands.
    pub fn progress(&mut self) -> anyhow::Result<Value> {
        self.call("progress", json!({}))
    }

    /// Waits until the progress says so; false when the migration ended before.
    pub fn wait_progress(&mut self, reached: impl Fn(&Value) -> bool) -> anyhow::Result<bool> {
        let deadline = Instant::now() + WAIT_LIMIT;
        loop {
            let answer = self.progress()?;
            if reached(&answer["progress"]) {
                return Ok(true);
            }
            if answer["done"] == true {
                return Ok(false);
            }
            anyhow::ensure!(Instant::now() < deadline, "waited too long: {}", answer["progress"]);
            std::thread::sleep(POLL);
        }
    }

    /// The guest's own counters.
    pub fn counters(&mut self) -> anyhow::Result<Value> {
        self.call("workload", json!({"command": "counters"}))
    }
}

/// A guest, where it is, and what the hosts have learnt of its moves.
pub struct Chain<'a> {
    setting: &'a Setting<'a>,
    spec: Spec,
    source: Host,
    started: usize,
    /// Last, so that processes end before their files go.
    dir: tempfile::TempDir,
}

impl<'a> Chain<'a> {
    /// Its guest runs.
    pub fn start(setting: &'a Setting<'a>, spec: Spec) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("vmferry-downtime-").tempdir()?;
        let mut source = start_host(setting, &spec, dir.path(), 0, false)?;
        source.wait("guest-up")?;
        Ok(Self { setting, spec, source, started: 1, dir })
    }

    /// Moves the guest on to a new daemon. `during` acts while it is on its way; a migration that is not over by
    /// `limit` is cancelled. Answers the report.
    pub fn migrate(
        &mut self,
        mut arguments: Value,
        limit: Duration,
        during: impl FnOnce(&mut Host, &mut Host) -> anyhow::Result<()>,
    ) -> anyhow::Result<Value> {
        let number = self.started;
        self.started += 1;
        let mut next = start_host(self.setting, &self.spec, self.dir.path(), number, true)?;
        let address = next.call("status", json!({}))?["incoming"]["listen"].clone();
        arguments["destination"] = address;
        let begin = Instant::now();
        self.source.call("migrate", arguments)?;
        during(&mut self.source, &mut next)?;
        let mut cancelled = false;
        let mut report = loop {
            let wait = json!({"for": "migration-end", "timeout-ms": 100});
            let mut answer = self.source.call("wait", wait)?;
            if answer["done"] == true {
                break answer["report"].take();
            }
            let over = begin.elapsed() > limit || self.setting.signals.any();
            if over && !std::mem::replace(&mut cancelled, true) {
                // Too late after Commit, and then it is over in a moment.
                let _ = self.source.call("cancel", json!({}));
            }
        };
        if report["status"] == "completed" {
            next.wait("running")?;
            self.source = next;
        }
        let counters = self.source.counters()?;
        anyhow::ensure!(counters["errors"] == 0, "the guest found its memory damaged: {counters}");
        if cancelled {
            report["gave-up"] = json!(true);
        }
        Ok(report)
    }

    /// Where the guest is now.
    pub fn here(&mut self) -> &mut Host {
        &mut self.source
    }
}

fn start_host(
    setting: &Setting<'_>,
    spec: &Spec,
    dir: &Path,
    number: usize,
    incoming: bool,
) -> anyhow::Result<Host> {
    let (mut devices, mut sockets) = (Vec::new(), Vec::new());
    for (place, device) in spec.devices.iter().enumerate() {
        let socket = dir.join(format!("d{number}.{place}"));
        let args = [
            "device",
            "serve",
            "--profile",
            device.profile,
            "--state-size",
            device.size,
            "--quirk",
            "as-driver",
            "--socket",
        ];
        let args = args.map(String::from).into_iter().chain([socket.display().to_string()]);
        let args: Vec<String> = args.collect();
        let name = format!("device{number}.{place}");
        devices.push(start_process(setting, dir, &name, &args, &socket)?);
        sockets.push(socket);
    }
    let api = dir.join(format!("a{number}"));
    let mut args: Vec<String> =
        ["run", "--guest", setting.guest.name(), "--memory", spec.memory].map(String::from).into();
    args.extend(["--api".into(), api.display().to_string()]);
    // One folder for all of them, as if each host had made all the moves: what one learns the next knows.
    args.extend(["--state-dir".into(), dir.join("state").display().to_string()]);
    for (place, socket) in sockets.iter().enumerate() {
        args.extend(["--device".into(), format!("vfio-user:{},id=nic{place}", socket.display())]);
    }
    let more = match incoming {
        true => vec!["--incoming", "tcp:127.0.0.1:0"],
        false => vec![
            "--fill",
            "100",
            "--working-set",
            spec.working_set,
            "--dirty-rate",
            spec.dirty_rate,
            "--dma-rate",
            spec.dma_rate,
        ],
    };
    args.extend(more.into_iter().map(String::from));
    let daemon = start_process(setting, dir, &format!("host{number}"), &args, &api)?;
    let client = Client::connect(&api)?;
    client.set_timeout(Some(START_LIMIT * 2))?;
    Ok(Host { client, api, daemon, _devices: devices })
}
