//! The hosts of the demonstration: a daemon and its device servers each.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use device_profile::Profile;
use serde_json::{Value, json};

use super::process::Process;
use crate::api::Client;
use crate::cli::{DemoArgs, Transport};
use crate::signals::Signals;
use crate::units::as_ms;

/// How long processes may take to come up, the filling of memory included.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long anything else is waited for.
const WAIT_LIMIT: Duration = Duration::from_secs(90);
/// How often what is waited for is looked at.
const POLL: Duration = Duration::from_millis(10);
/// The largest state a device gets unless another size is asked for.
const STATE_MAX_BYTES: u64 = 64 << 20;
/// DMA stamps per second of each device.
const DMA_RATE: u32 = 500;

/// Where the demonstration takes place; dropping it ends every process and removes every file.
pub struct Lab<'a> {
    args: &'a DemoArgs,
    guest: &'static str,
    devices: Vec<String>,
    signals: &'a Signals,
    hosts: usize,
    /// Last, so that processes end before their files go.
    dir: tempfile::TempDir,
}

/// A daemon and its device servers.
pub struct Host<'a> {
    signals: &'a Signals,
    client: Client,
    api: PathBuf,
    /// Before the device servers, so that it ends first.
    daemon: Process,
    _devices: Vec<Process>,
}

impl<'a> Lab<'a> {
    /// An empty lab.
    pub fn new(
        args: &'a DemoArgs,
        guest: &'static str,
        profiles: &[Profile],
        signals: &'a Signals,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("vmferry-demo-")
            .tempdir()
            .context("make a temporary directory")?;
        let devices = profiles.iter().map(|profile| profile.name.clone()).collect();
        Ok(Self { args, guest, devices, signals, hosts: 0, dir })
    }

    /// What was asked for.
    pub fn args(&self) -> &DemoArgs {
        self.args
    }

    /// By device: the profile it is served from.
    pub fn profiles(&self) -> Value {
        let ids = (0..self.devices.len()).map(|place| device_id(&self.devices, place));
        let both = ids.zip(&self.devices).map(|(id, profile)| (id, json!(profile)));
        Value::Object(both.collect())
    }

    /// A host whose guest runs.
    pub fn start_source(&mut self) -> anyhow::Result<Host<'a>> {
        let mut host = self.start_host(None)?;
        host.wait("guest-up", START_LIMIT).context("the guest did not come up")?;
        Ok(host)
    }

    /// A host that waits for a guest, and where it listens.
    pub fn start_destination(&mut self) -> anyhow::Result<(Host<'a>, String)> {
        let listen = match self.args.transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Transport::Unix => {
                let path = self.path(&format!("move{}.sock", self.hosts));
                format!("unix:{}", path.display())
            }
        };
        let mut host = self.start_host(Some(&listen))?;
        let status = host.call("status", json!({}))?;
        let address = status["incoming"]["listen"].as_str().unwrap_or(&listen).to_owned();
        Ok((host, address))
    }

    fn start_host(&mut self, incoming: Option<&str>) -> anyhow::Result<Host<'a>> {
        let number = self.hosts;
        self.hosts += 1;
        let mut servers = Vec::new();
        let mut sockets = Vec::new();
        for (place, profile) in self.devices.iter().enumerate() {
            let socket = self.path(&format!("device{number}.{place}.sock"));
            let state_size = self.state_size(profile)?.to_string();
            let shown = socket.to_string_lossy().into_owned();
            let args = [
                "device",
                "serve",
                "--profile",
                profile,
                "--state-size",
                &state_size,
                "--socket",
                &shown,
            ];
            let name = format!("device{number}.{place}");
            let mut server = Process::start(&name, &args, self.dir.path())?;
            self.wait_for_file(&socket, &mut server)?;
            servers.push(server);
            sockets.push(shown);
        }
        let api = self.path(&format!("host{number}.api"));
        let mut args: Vec<String> =
            ["run", "--guest", self.guest, "--memory"].map(String::from).into();
        args.push(self.args.memory.to_string());
        args.extend(["--cpus".into(), self.args.cpus.to_string()]);
        args.extend(["--api".into(), api.to_string_lossy().into_owned()]);
        for (place, socket) in sockets.iter().enumerate() {
            let device = format!("vfio-user:{socket},id={}", device_id(&self.devices, place));
            args.extend(["--device".into(), device]);
        }
        match incoming {
            Some(address) => args.extend(["--incoming".into(), address.into()]),
            None => {
                args.extend(["--fill", "100", "--dma-rate"].map(String::from));
                args.push(DMA_RATE.to_string());
            }
        }
        let mut daemon = Process::start(&format!("host{number}"), &args, self.dir.path())?;
        self.wait_for_file(&api, &mut daemon)?;
        let client = Client::connect(&api)?;
        Ok(Host { signals: self.signals, client, api, daemon, _devices: servers })
    }

    /// What is asked for; else the profile's own, within what a demonstration has time for.
    fn state_size(&self, profile: &str) -> anyhow::Result<u64> {
        if let Some(bytes) = self.args.state_size {
            return Ok(bytes);
        }
        let profile = Profile::builtin(profile)?;
        Ok(profile.sizes.total_bytes.typical.min(STATE_MAX_BYTES))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wait_for_file(&self, path: &Path, process: &mut Process) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while std::os::unix::net::UnixStream::connect(path).is_err() {
            check_alive(process)?;
            check_time(self.signals, deadline, process.name())?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

/// `mlx5-vf`, or `mlx5-vf-1` for a second one of the kind.
fn device_id(profiles: &[String], place: usize) -> String {
    let name = &profiles[place];
    match profiles[..place].iter().filter(|before| *before == name).count() {
        0 => name.clone(),
        count => format!("{name}-{count}"),
    }
}

impl Host<'_> {
    /// One command.
    pub fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let answer = self.client.call(command, arguments);
        answer.map_err(|error| match check_alive(&mut self.daemon) {
            Ok(()) => {
                anyhow::Error::new(error).context(format!("{command} of {}", self.daemon.name()))
            }
            Err(ended) => ended,
        })
    }

    /// Waits for an event of the `wait` command; answers what it said.
    pub fn wait(&mut self, event: &str, limit: Duration) -> anyhow::Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let arguments = json!({"for": event, "timeout-ms": as_ms(POLL)});
            let answer = self.call("wait", arguments)?;
            if answer["done"] == json!(true) {
                return Ok(answer);
            }
            check_time(self.signals, deadline, event)?;
        }
    }

    /// As [`wait`](Self::wait), for as long as anything is waited for.
    pub fn wait_long(&mut self, event: &str) -> anyhow::Result<Value> {
        self.wait(event, WAIT_LIMIT)
    }

    /// Waits until the migration is held; false when it ended instead.
    pub fn wait_held_or_ended(&mut self) -> anyhow::Result<bool> {
        let deadline = Instant::now() + WAIT_LIMIT;
        loop {
            let answer = self.call("wait", json!({"for": "held", "timeout-ms": as_ms(POLL)}))?;
            if answer["done"] == json!(true) {
                return Ok(true);
            }
            if self.call("progress", json!({}))?["done"] == json!(true) {
                return Ok(false);
            }
            check_time(self.signals, deadline, "held")?;
        }
    }

    /// Waits until the migration has got as far as `reached` says of its progress; fails if it is over
    /// before.
    pub fn wait_progress(
        &mut self,
        what: &str,
        reached: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + WAIT_LIMIT;
        loop {
            let answer = self.call("progress", json!({}))?;
            if reached(&answer["progress"]) {
                return Ok(());
            }
            if answer["done"] == json!(true) {
                let why = &answer["report"]["failure"]["what"];
                bail!("the migration was over before {what}: {why}");
            }
            check_time(self.signals, deadline, what)?;
            std::thread::sleep(POLL);
        }
    }

    /// Waits for the daemon to end by itself.
    pub fn wait_ended(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + WAIT_LIMIT;
        loop {
            if let Some(status) = self.daemon.ended()? {
                return Ok(status);
            }
            check_time(self.signals, deadline, "the end of the source")?;
            std::thread::sleep(POLL);
        }
    }

    /// A second connection, for a command that must not wait behind another.
    pub fn second_client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(&self.api)?)
    }
}

fn check_alive(process: &mut Process) -> anyhow::Result<()> {
    match process.ended()? {
        None => Ok(()),
        Some(status) => {
            bail!("{} ended early ({status}); it logged:\n{}", process.name(), process.log_tail())
        }
    }
}

fn check_time(signals: &Signals, deadline: Instant, what: &str) -> anyhow::Result<()> {
    if signals.any() {
        bail!("interrupted");
    }
    if Instant::now() >= deadline {
        bail!("waited too long for {what}");
    }
    Ok(())
}
