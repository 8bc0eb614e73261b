//! Local moves: whether the blackout depends on how much memory the guest has.
//!
//! Two guests that differ in nothing but their memory are handed on from process to process, in turn. All of their
//! memory is filled, and both write.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::{Value, json};

use crate::jsonl::Client;
use crate::process::Process;
use crate::stats::Summary;

/// Memory of the two guests, in bytes.
const SIZES: [u64; 2] = [1 << 30, 8 << 30];
/// Page writes per second of each guest.
const PAGES_PER_S: u32 = 20_000;
/// Filling memory is most of it.
const START_LIMIT: Duration = Duration::from_secs(120);
const MOVE_LIMIT: Duration = Duration::from_secs(30);

/// Moves of one guest.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Moves {
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// How long it stood still each time, in ms.
    pub downtime_ms: Summary,
    /// How long the destination took to map its memory before that, in ms.
    pub map_ms: Summary,
    /// From the start of the migration to its end, in ms.
    pub total_ms: Summary,
}

/// Moves of both guests.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Local {
    /// The guest with less memory, and the one with more.
    pub moves: [Moves; 2],
    /// Downtime of the one with more through that of the other, of each turn.
    pub ratio: Summary,
}

/// Moves both guests `turns` times each, in turn.
///
/// # Errors
/// A migration failed.
pub fn measure(vmferry: &Path, turns: usize) -> anyhow::Result<Local> {
    let dir = tempfile::tempdir()?;
    let guest = |bytes| Guest::start(vmferry, dir.path(), bytes);
    let mut guests = [guest(SIZES[0])?, guest(SIZES[1])?];
    let mut reports: [Vec<Value>; 2] = [Vec::new(), Vec::new()];
    for turn in 0..turns {
        // Whoever comes second finds the caches as the first left them: each is that as often as the other.
        for place in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
            reports[place].push(guests[place].hand_on(turn + 1)?);
        }
    }
    let number = |report: &Value, at: &str| {
        let number = report.pointer(at).and_then(Value::as_f64);
        number.with_context(|| format!("no {at} in {report}"))
    };
    let all = |place: usize, at: &str| -> anyhow::Result<Vec<f64>> {
        reports[place].iter().map(|report| number(report, at)).collect()
    };
    let moves = |place: usize| -> anyhow::Result<Moves> {
        Ok(Moves {
            memory_bytes: SIZES[place],
            downtime_ms: Summary::of(all(place, "/downtime-ms")?),
            map_ms: Summary::of(all(place, "/ram/map-time-ms")?),
            total_ms: Summary::of(all(place, "/total-time-ms")?),
        })
    };
    let (less, more) = (all(0, "/downtime-ms")?, all(1, "/downtime-ms")?);
    Ok(Local {
        moves: [moves(0)?, moves(1)?],
        ratio: Summary::of(less.iter().zip(&more).map(|(less, more)| more / less)),
    })
}

/// A guest, in whichever process it is.
struct Guest {
    vmferry: PathBuf,
    dir: PathBuf,
    bytes: u64,
    api: Client,
    process: Process,
}

impl Guest {
    fn start(vmferry: &Path, dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let (process, api) = daemon(vmferry, dir, bytes, 0, &["--fill", "100"])?;
        let mut guest = Self { vmferry: vmferry.into(), dir: dir.into(), bytes, api, process };
        wait(&mut guest.api, "guest-up", START_LIMIT)?;
        Ok(guest)
    }

    /// To a new process; answers the report.
    fn hand_on(&mut self, turn: usize) -> anyhow::Result<Value> {
        let socket = self.dir.join(format!("{}-{turn}.move", self.bytes));
        let listen = format!("unix:{}", socket.display());
        let incoming = ["--incoming", &listen];
        let (process, mut api) = daemon(&self.vmferry, &self.dir, self.bytes, turn, &incoming)?;
        self.api.call("migrate", json!({ "destination": listen, "local": true }))?;
        let end = wait(&mut self.api, "migration-end", MOVE_LIMIT)?;
        let report = end["report"].clone();
        if report["status"] != json!("completed") {
            bail!("the local move failed: {}", report["failure"]);
        }
        wait(&mut api, "running", MOVE_LIMIT)?;
        let before = counters(&mut api)?;
        // The one that is over unmaps its memory meanwhile.
        std::thread::sleep(Duration::from_millis(200));
        let now = counters(&mut api)?;
        if now.1 > 0 || now.0 <= before.0 {
            bail!("the guest does not go on: {before:?}, then {now:?}");
        }
        (self.process, self.api) = (process, api);
        Ok(report)
    }
}

fn daemon(
    vmferry: &Path,
    dir: &Path,
    bytes: u64,
    turn: usize,
    args: &[&str],
) -> anyhow::Result<(Process, Client)> {
    let socket = dir.join(format!("{bytes}-{turn}.api"));
    let mut command = Command::new(vmferry);
    command.args(["run", "--guest", "kvm", "--memory"]).arg(bytes.to_string());
    command.arg("--api").arg(&socket);
    command.arg("--dirty-rate").arg(PAGES_PER_S.to_string()).args(args);
    let mut process = Process::start(&format!("{bytes}-{turn}"), command, dir)?;
    match Client::connect(&socket, START_LIMIT) {
        Ok(api) => Ok((process, api)),
        Err(error) => {
            process.check_alive()?;
            Err(error.context(process.log()))
        }
    }
}

fn wait(api: &mut Client, event: &str, limit: Duration) -> anyhow::Result<Value> {
    let arguments = json!({ "for": event, "timeout-ms": limit.as_millis() as u64 });
    let answer = api.call_within("wait", arguments, limit + Duration::from_secs(5))?;
    if answer["done"] != json!(true) {
        bail!("{event} did not come: {answer}");
    }
    Ok(answer)
}

/// Pages written and wrong stamps.
fn counters(api: &mut Client) -> anyhow::Result<(u64, u64)> {
    let counters = api.call("workload", json!({ "command": "counters" }))?;
    let number =
        |key: &str| counters[key].as_u64().with_context(|| format!("no {key} in {counters}"));
    Ok((number("writes")?, number("errors")?))
}
