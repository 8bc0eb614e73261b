//! Hosts of migrations inside the lab: daemons of the command, with devices of the kernel.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use vmferry::api::Client;

use crate::lab::{Lab, Mdev, wait_until_for};

/// How long anything of a daemon is waited for; a case's own limit comes first where it is shorter.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Memory of the guests: an emulated machine hashes and copies it.
const MEMORY: &str = "32M";
/// Page writes per second of the guests.
const DIRTY_RATE: &str = "500";
/// DMA stamps per second of each device.
const DMA_RATE: &str = "100";
/// How many lines of a daemon's log an error shows.
const TAIL_LINES: usize = 12;

/// Who executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// vCPUs of KVM.
    Kvm,
    /// Threads.
    Process,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By its own node and iommufd.
    Cdev,
    /// By its group and a type1 container.
    Group,
}

/// A daemon; dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    api: PathBuf,
}

impl Guest {
    /// As `--guest` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }
}

impl Way {
    /// The device as `--device` takes it.
    pub fn device(self, device: &Mdev, id: &str) -> String {
        let uuid = device.uuid();
        match self {
            Self::Cdev => format!("vfio:cdev:{uuid},id={id}"),
            Self::Group => format!("vfio:group:{uuid},id={id}"),
        }
    }
}

impl Lab {
    /// A daemon whose guest is up. `devices` are as `--device` takes them.
    pub fn source(&self, name: &str, guest: Guest, devices: &[String]) -> anyhow::Result<Daemon> {
        let workload = ["--fill", "50", "--dirty-rate", DIRTY_RATE, "--dma-rate", DMA_RATE];
        let daemon = self.daemon(name, guest, devices, &workload)?;
        daemon.wait("guest-up").context("the guest does not come up")?;
        Ok(daemon)
    }

    /// A daemon that waits for a guest, and where it listens.
    pub fn destination(
        &self,
        name: &str,
        guest: Guest,
        devices: &[String],
    ) -> anyhow::Result<(Daemon, String)> {
        let daemon = self.daemon(name, guest, devices, &["--incoming", "tcp:127.0.0.1:0"])?;
        let status = daemon.call("status", json!({}))?;
        let address = status["incoming"]["listen"].as_str().context("it listens nowhere")?;
        Ok((daemon, address.to_owned()))
    }

    fn daemon(
        &self,
        name: &str,
        guest: Guest,
        devices: &[String],
        extra: &[&str],
    ) -> anyhow::Result<Daemon> {
        let api = self.dir().join(format!("{name}.api"));
        let log = self.dir().join(format!("{name}.log"));
        let mut command = self.vmferry(["run", "--guest", guest.name(), "--memory", MEMORY]);
        command.arg("--api").arg(&api).args(extra);
        for device in devices {
            command.args(["--device", device]);
        }
        command.stdout(Stdio::null()).stderr(File::create(&log)?).process_group(0);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let mut daemon = Daemon { name: name.into(), child, log, api };
        wait_until_for("the control socket is there", LIMIT, || {
            ensure!(daemon.ended()?.is_none(), "{name} ended early: {}", daemon.log_tail());
            Ok(Client::connect(&daemon.api).is_ok())
        })?;
        Ok(daemon)
    }
}

impl Daemon {
    /// One command.
    pub fn call(&self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let call = || {
            let mut client = Client::connect(&self.api)?;
            client.set_timeout(Some(LIMIT))?;
            client.call(command, arguments)
        };
        call()
            .with_context(|| format!("{command} of {}; it logged: {}", self.name, self.log_tail()))
    }

    /// Waits for an event of the `wait` command.
    pub fn wait(&self, event: &str) -> anyhow::Result<Value> {
        let limit_ms = LIMIT.as_millis() as u64 * 9 / 10;
        let answer = self.call("wait", json!({"for": event, "timeout-ms": limit_ms}))?;
        if answer["done"] != true {
            bail!(
                "no {event} of {} within {limit_ms} ms; progress: {}; it logged: {}",
                self.name,
                self.call("progress", json!({})).unwrap_or_default(),
                self.log_tail()
            );
        }
        Ok(answer)
    }

    /// Starts a migration.
    pub fn migrate(&self, to: &str, mut arguments: Value) -> anyhow::Result<()> {
        arguments["destination"] = json!(to);
        self.call("migrate", arguments).map(drop)
    }

    /// Starts a migration and waits until it is held in `phase`.
    pub fn migrate_and_hold(
        &self,
        to: &str,
        phase: &str,
        mut arguments: Value,
    ) -> anyhow::Result<()> {
        arguments["hold"] = json!([phase]);
        self.migrate(to, arguments)?;
        self.wait("held").map(drop)
    }

    /// Waits for the end of the migration; answers its report.
    pub fn report(&self) -> anyhow::Result<Value> {
        Ok(self.wait("migration-end")?["report"].take())
    }

    /// As [`report`](Self::report); the migration must be completed with everything identical.
    pub fn report_of_identical(&self) -> anyhow::Result<Value> {
        let report = self.report()?;
        ensure!(report["status"] == "completed", "not completed: {}", report["failure"]);
        ensure!(report["memory-identical"] == true, "memory is not identical: {report}");
        ensure!(
            report["device-state-identical"] == true,
            "device state is not identical: {report}"
        );
        Ok(report)
    }

    /// A command to the built-in guest.
    pub fn workload(&self, command: Value) -> anyhow::Result<Value> {
        self.call("workload", command)
    }

    /// The guest runs here: its heart beats, it writes, it takes interrupts where `interrupts` says so, and its
    /// memory is as it left it.
    pub fn ensure_guest_lives(&self) -> anyhow::Result<()> {
        let before = self.counters()?;
        wait_until_for("the guest's heart beats", LIMIT, || {
            let now = self.counters()?;
            ensure!(now["errors"] == 0, "the guest finds its memory changed: {now}");
            Ok(["beats", "writes"].iter().all(|key| now[*key].as_u64() > before[*key].as_u64()))
        })
    }

    /// What the guest counts.
    pub fn counters(&self) -> anyhow::Result<Value> {
        self.workload(json!({"command": "counters"}))
    }

    /// Kill -9.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("wait for the killed daemon")
    }

    /// Waits for its end.
    pub fn wait_ended(&mut self) -> anyhow::Result<ExitStatus> {
        let mut status = None;
        wait_until_for("the daemon ends", LIMIT, || {
            status = self.ended()?;
            Ok(status.is_some())
        })?;
        status.context("it has not ended")
    }

    fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("look at {}", self.name))
    }

    /// The last lines it logged.
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join(" | ")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
