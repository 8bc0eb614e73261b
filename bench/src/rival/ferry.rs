//! vmferry: two daemons, driven over their control sockets.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migration::PAGE_SIZE;
use serde_json::{Value, json};

use super::{Guest, Measured, Outcome, Wish};
use crate::free::warm_up;
use crate::jsonl::Client;
use crate::process::Process;

const START_LIMIT: Duration = Duration::from_secs(20);

/// What is needed to move the guest by vmferry.
pub struct Ferry {
    /// The command.
    pub executable: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// Further arguments of `vmferry run`, on both sides.
    pub run_args: Vec<String>,
    /// Those of the source alone.
    pub source_args: Vec<String>,
    /// Those of the destination alone.
    pub destination_args: Vec<String>,
    /// Further arguments of the control socket's `migrate`.
    pub migrate_args: serde_json::Map<String, Value>,
}

struct Daemon {
    process: Process,
    api: Client,
}

impl Ferry {
    /// One migration.
    ///
    /// # Errors
    /// A process did not work as it should. A migration that does not end is not an error.
    pub fn migrate(&self, wish: &Wish) -> anyhow::Result<(Outcome, Value)> {
        let mut destination = self.start("ferry-destination", wish, true)?;
        let mut source = self.start("ferry-source", wish, false)?;
        wait(&mut source, "guest-up", START_LIMIT)?;
        let status = destination.api.call("status", json!({}))?;
        let listen = status.pointer("/incoming/listen").and_then(Value::as_str);
        let listen = listen.with_context(|| format!("no address in {status}"))?.to_owned();
        warm_up(self.guest.memory_bytes * 3)?;
        let dirty_pages_per_s = source.pages_per_s()?;

        let mut arguments = json!({ "destination": listen, "downtime-limit-ms": wish.limit_ms });
        for (key, value) in &self.migrate_args {
            arguments[key] = value.clone();
        }
        let cpu_before = source.process.cpu_time()? + destination.process.cpu_time()?;
        let start = Instant::now();
        source.api.call("migrate", arguments)?;
        let limit = wish.patience.as_millis() as u64;
        let wait_end = json!({ "for": "migration-end", "timeout-ms": limit });
        let patience = wish.patience + Duration::from_secs(10);
        let end = source.api.call_within("wait", wait_end, patience)?;
        let wall = start.elapsed();
        let cpu = source.process.cpu_time()? + destination.process.cpu_time()? - cpu_before;
        let completed = end["done"] == json!(true);
        let report = end["report"].clone();
        if completed && report["status"] != json!("completed") {
            bail!("the migration failed: {}", report["failure"]);
        }
        let report_or_progress = if completed { &report } else { &end["progress"] };
        let measured = Measured { completed, wall, cpu, dirty_pages_per_s };
        let outcome = measured.with(report_or_progress, "-ms");
        if completed {
            destination.runs_on(self.guest.pages_per_s > 0)?;
        }
        Ok((outcome, report))
    }

    fn start(&self, name: &str, wish: &Wish, incoming: bool) -> anyhow::Result<Daemon> {
        let socket = wish.dir.join(format!("{name}.api"));
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(&self.executable);
        command.args(["run", "--guest", "kvm", "--keep", "--memory"]);
        command.arg(self.guest.memory_bytes.to_string());
        command.arg("--api").arg(&socket);
        command.arg("--working-set");
        command.arg((u64::from(self.guest.working_set_pages) * PAGE_SIZE).to_string());
        command.arg("--dirty-rate").arg(match self.guest.pages_per_s {
            u32::MAX => "max".into(),
            rate => rate.to_string(),
        });
        match incoming {
            true => command.args(["--incoming", "tcp:127.0.0.1:0"]),
            false => {
                command.args(["--fill", "100", "--fill-seed"]).arg(self.guest.seed.to_string())
            }
        };
        command.args(&self.run_args);
        command.args(if incoming { &self.destination_args } else { &self.source_args });
        let mut process = Process::start(name, command, &wish.dir)?;
        match Client::connect(&socket, START_LIMIT) {
            Ok(api) => Ok(Daemon { process, api }),
            Err(error) => {
                process.check_alive()?;
                Err(error.context(process.log()))
            }
        }
    }
}

fn wait(daemon: &mut Daemon, event: &str, limit: Duration) -> anyhow::Result<Value> {
    let arguments = json!({ "for": event, "timeout-ms": limit.as_millis() as u64 });
    let answer = daemon.api.call_within("wait", arguments, limit + Duration::from_secs(5))?;
    if answer["done"] != json!(true) {
        bail!("vmferry: {event} did not come: {answer}");
    }
    Ok(answer)
}

impl Daemon {
    fn counters(&mut self) -> anyhow::Result<(u64, u64, u64)> {
        let counters = self.api.call("workload", json!({ "command": "counters" }))?;
        let number =
            |key: &str| counters[key].as_u64().with_context(|| format!("no {key} in {counters}"));
        Ok((number("beats")?, number("writes")?, number("errors")?))
    }

    fn pages_per_s(&mut self) -> anyhow::Result<f64> {
        let (before, start) = (self.counters()?.1, Instant::now());
        std::thread::sleep(Duration::from_millis(200));
        Ok((self.counters()?.1 - before) as f64 / start.elapsed().as_secs_f64())
    }

    fn runs_on(&mut self, writes: bool) -> anyhow::Result<()> {
        wait(self, "running", START_LIMIT)?;
        let before = self.counters()?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let now = self.counters()?;
            if now.2 > 0 {
                bail!("{} stamps of the guest are wrong after the migration", now.2);
            }
            if now.0 > before.0 + 20 && (!writes || now.1 > before.1) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the guest does not go on after the migration: {before:?}, then {now:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
