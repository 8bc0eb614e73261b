//! The conformance check on the kernel's devices: what it finds is what is wrong, and nothing else.

use std::collections::BTreeSet;
use std::process::Output;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::case::{Case, Outcome};
use crate::lab::{Lab, Mdev, Parent};

/// State of a ferrydev that is checked, in bytes: enough for many records, little to emulate.
const STATE_BYTES: u64 = 384 << 10;

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("check-mtty-finds-what-is-wrong-with-it", mtty).limit_s(180),
        Case::new("check-ferrydev-fails-nothing", ferrydev).limit_s(180),
        Case::new("check-ferrydev-by-group-fails-nothing", ferrydev_by_group).limit_s(180),
        Case::new("check-ferrydev-of-each-shape-fails-nothing", shapes).limit_s(600),
        Case::new("check-finds-broken-discovery-and-states", broken_states).limit_s(600),
        Case::new("check-finds-broken-streams", broken_streams).limit_s(600),
        Case::new("check-finds-broken-precopy", broken_precopy).limit_s(600),
        Case::new("check-finds-broken-sizes-resets-and-logs", broken_rest).limit_s(600),
        Case::new("check-finds-what-real-drivers-do", real_drivers).limit_s(600),
        Case::new("check-names-as-proof-what-is-tried-here", proofs),
        Case::new("check-ends-on-a-device-that-hangs", hangs).limit_s(180),
        Case::new("device-info-save-and-load", save_and_load).limit_s(120),
    ]
}

/// Quirks, and exactly the rules that fail with them.
type Broken = (&'static str, &'static [&'static str]);

/// Runs the check; answers its report.
fn check(lab: &Lab, device: &str, more: &[&str]) -> anyhow::Result<Value> {
    let output = lab
        .vmferry(["device", "check", device, "--json", "--destructive"])
        .args(more)
        .output()
        .context("run the check")?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("the report of {device}: {}", text(&output)))?;
    let failed = report["summary"]["failed"].as_u64().context("no summary")?;
    let unusable = report["not-usable"].as_str();
    let expected = match (failed, unusable) {
        (0, None) => 0,
        (0, Some(_)) => 2,
        _ => 1,
    };
    ensure!(output.status.code() == Some(expected), "{failed} failed: {}", text(&output));
    Ok(report)
}

fn text(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{} {} {}", output.status, text(&output.stdout), text(&output.stderr))
}

fn failed(report: &Value) -> BTreeSet<&str> {
    let rules = report["rules"].as_array().into_iter().flatten();
    let failed = rules.filter(|rule| rule["verdict"] == "fail");
    failed.filter_map(|rule| rule["id"].as_str()).collect()
}

/// The verdicts that matter when a case fails.
fn verdicts(report: &Value) -> String {
    let mut lines = String::new();
    for rule in report["rules"].as_array().into_iter().flatten() {
        let verdict = rule["verdict"].as_str().unwrap_or("?");
        if !matches!(verdict, "pass" | "untestable") {
            let said = ["expected", "got", "why"].map(|key| rule[key].as_str().unwrap_or_default());
            lines += &format!(
                "  {} {verdict}: {}\n",
                rule["id"].as_str().unwrap_or("?"),
                said.join(" ")
            );
        }
    }
    lines + report["not-usable"].as_str().unwrap_or_default()
}

/// The check of a device finds exactly these rules broken, and leaves it usable.
fn finds(lab: &Lab, device: &str, more: &[&str], expected: &[&str]) -> anyhow::Result<Value> {
    let report = check(lab, device, more)?;
    let expected: BTreeSet<&str> = expected.iter().copied().collect();
    let found = failed(&report);
    ensure!(
        found == expected && report["not-usable"].is_null(),
        "{found:?} failed, not {expected:?}\n{}",
        verdicts(&report)
    );
    Ok(report)
}

fn make_ferrydev(lab: &Lab, quirks: &str) -> anyhow::Result<Mdev> {
    let device = lab.create(Parent::Ferrydev)?;
    device.set("state_bytes", STATE_BYTES)?;
    device.set("config_bytes", 64 << 10)?;
    device.set("quirks", quirks)?;
    Ok(device)
}

/// Checks under way at once: much of a check is waiting for nothing to happen.
const AT_ONCE: usize = 3;

/// Every one of them, on a device of its own; all that is wrong is told at once.
fn find_each(lab: &Lab, table: &[Broken]) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("ferrydev is not there".into()));
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut wrong = String::new();
        while let Some((quirks, expected)) = table.get(next.fetch_add(1, Ordering::Relaxed)) {
            match find(lab, quirks, expected) {
                Ok(()) => println!("{quirks}: {expected:?}"),
                Err(error) => wrong += &format!("{quirks}: {error:#}\n"),
            }
        }
        wrong
    };
    let wrong: String = std::thread::scope(|scope| {
        let threads = [(); AT_ONCE].map(|()| scope.spawn(work));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| "a panic\n".into()))
            .collect()
    });
    if wrong.is_empty() { Ok(Outcome::Passed) } else { bail!("{wrong}") }
}

fn find(lab: &Lab, quirks: &str, expected: &[&str]) -> anyhow::Result<()> {
    let device = make_ferrydev(lab, quirks)?;
    finds(lab, &format!("vfio:{}", device.uuid()), &[], expected).map(drop)
}

const MTTY: &[&str] = &["D7", "L4", "L8", "S1", "S2", "X8"];

/// Wrong with the sample driver: read() is 0 at the temporary end of PRE_COPY (S1), and there is no poll (S2);
/// it opens in the state in which it was closed (D7); data with a wrong magic is taken over although its write
/// failed, because only its size is looked at (X8); its DMA log is a stub (L4, L8).
fn mtty(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = lab.create(Parent::Mtty)?;
    let name = format!("vfio:{}", device.uuid());
    finds(lab, &name, &[], MTTY)?;
    Ok(Outcome::Passed)
}

fn ferrydev(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = make_ferrydev(lab, "")?;
    let report = finds(lab, &format!("vfio:{}", device.uuid()), &[], &[])?;
    // What could not be tested on this device at all is no pass.
    let skipped = report["rules"].as_array().into_iter().flatten();
    let skipped: Vec<_> = skipped.filter(|rule| rule["verdict"] == "skipped").collect();
    ensure!(skipped.is_empty(), "skipped: {}", verdicts(&report));
    Ok(Outcome::Passed)
}

fn ferrydev_by_group(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = make_ferrydev(lab, "")?;
    finds(lab, &format!("vfio:group:{}", device.uuid()), &[], &[])?;
    Ok(Outcome::Passed)
}

const SHAPES: &[Broken] = &[
    ("no-migration", &[]),
    ("no-p2p", &[]),
    ("no-precopy", &[]),
    ("no-p2p no-precopy", &[]),
    ("no-dma-logging", &[]),
    ("no-reinit", &[]),
    ("no-reinit-in-p2p", &[]),
    ("no-dirty-bytes", &[]),
    ("reinit-drops-unread", &[]),
];

fn shapes(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, SHAPES)
}

const BROKEN_STATES: &[Broken] = &[
    ("break-D1", &["D1", "D2"]),
    ("break-D2", &["D2"]),
    ("break-D6", &["D6"]),
    ("break-D7", &["D7"]),
    ("break-F1", &["F1"]),
    ("break-F2", &["F2"]),
    ("break-F3", &["F3"]),
    ("no-p2p break-F4", &["F4"]),
    ("break-F5", &["F5"]),
    ("break-F6", &["F6"]),
    ("break-F7", &["F7"]),
    ("break-F8", &["F8"]),
    ("no-p2p break-F9", &["F9"]),
    ("break-F10", &["F10"]),
    ("break-F12", &["F12"]),
    ("break-F13", &["F13"]),
    ("break-F14", &["F14"]),
    ("fail-arc=resuming-stop", &["F8", "S5"]),
    ("slow-arc=pre_copy_p2p:20", &[]),
];

fn broken_states(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, BROKEN_STATES)
}

const BROKEN_STREAMS: &[Broken] = &[
    ("break-X1", &["X1"]),
    ("break-X2", &["X2"]),
    ("break-X3", &["X3"]),
    ("break-X3-seek", &["X3"]),
    ("break-X4", &["X4"]),
    ("break-X5", &["X5"]),
    ("break-X6", &["X6"]),
    ("break-X8", &["F14", "X8"]),
    ("break-X9", &["X9"]),
    ("zero-at-temporary-end", &["S1"]),
    ("no-poll", &["S2"]),
    ("break-S3", &["S3"]),
    ("break-S3-poll", &["S3"]),
    ("break-S4", &["S4"]),
    ("break-S5", &["S5"]),
    ("corrupt-save", &["S5"]),
    ("lose-interrupts", &["S5"]),
    ("break-S8", &["S8"]),
    ("short-reads=512", &[]),
];

fn broken_streams(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, BROKEN_STREAMS)
}

const BROKEN_PRECOPY: &[Broken] = &[
    ("break-P1", &["P1"]),
    ("no-precopy-info", &["P1"]),
    ("info-fails", &["P1"]),
    ("break-P2", &["P2"]),
    ("no-info-in-p2p", &["P2"]),
    ("break-P3", &["P3"]),
    ("break-P4", &["P4"]),
    ("break-P4-zero", &["P4"]),
    ("enomsg-forever", &["P4"]),
    ("break-P5", &["P5"]),
    ("break-P6", &["P6"]),
    ("break-P8", &["P8"]),
    ("one-size-field", &["P9"]),
    ("break-R2", &["R2"]),
    ("break-R3", &["R3"]),
    ("break-R4", &["R4"]),
    ("break-R5", &["R5"]),
    ("break-R6", &["R6"]),
    ("break-R7", &["R7"]),
    ("break-R8", &["R8"]),
];

fn broken_precopy(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, BROKEN_PRECOPY)
}

const BROKEN_REST: &[Broken] = &[
    ("break-Z1", &["Z1"]),
    ("size=fails", &["Z1"]),
    ("size=under", &["Z2"]),
    ("size=zero", &["Z3"]),
    ("size=garbage", &["P4", "R5", "Z3"]),
    ("break-Z4", &["Z4"]),
    ("break-H3", &["H3"]),
    ("reset-keeps-state", &["H5", "X9"]),
    ("break-L1", &["L1"]),
    ("break-L3", &["L3"]),
    ("break-L4", &["L4"]),
    ("break-L5", &["L5"]),
    ("break-L7", &["L7"]),
    ("break-L7-shift", &["L10", "L7"]),
    ("break-L8", &["L8"]),
    ("break-L10", &["L10"]),
    ("dma-log-blind", &["L10"]),
];

fn broken_rest(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, BROKEN_REST)
}

const REAL_DRIVERS: &[Broken] = &[
    ("caller-flags-back", &[]),
    ("info-drives-device", &[]),
    ("hidden-save-failure", &[]),
    ("stay-in-resuming", &[]),
    ("sticky-reinit", &[]),
    ("bad-load-errors", &[]),
    ("grow-after-stop=64", &[]),
    ("one-size-field caller-flags-back info-drives-device no-reinit-in-p2p", &["P9"]),
    ("no-p2p zero-at-temporary-end no-poll no-dirty-bytes no-info-in-p2p", &["S1", "S2"]),
];

fn real_drivers(lab: &Lab) -> anyhow::Result<Outcome> {
    find_each(lab, REAL_DRIVERS)
}

/// What `--list` says fails a rule in the lab is tried in the lab.
fn proofs(lab: &Lab) -> anyhow::Result<Outcome> {
    let output = lab.vmferry(["device", "check", "--list", "--json"]).output()?;
    let list: Value = serde_json::from_slice(&output.stdout).with_context(|| text(&output))?;
    let tables = [BROKEN_STATES, BROKEN_STREAMS, BROKEN_PRECOPY, BROKEN_REST, REAL_DRIVERS];
    let tried = |quirk: &str, id: &str| {
        let mut cases = tables.into_iter().flatten();
        cases.any(|(quirks, rules)| quirks.split(' ').any(|q| q == quirk) && rules.contains(&id))
    };
    let mut unproven = Vec::new();
    for rule in list.as_array().context("no list")? {
        let id = rule["id"].as_str().context("a rule without id")?;
        for proof in rule["fails-with"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let holds = match proof.strip_prefix("ferrydev ") {
                Some(quirk) => tried(quirk, id),
                None if proof == "mtty" => MTTY.contains(&id),
                // Over vfio-user, and tried in the tests of the check.
                None => true,
            };
            ensure!(holds, "{id}: {proof} is not tried");
        }
        if rule["testing"] == "unproven" {
            unproven.push(id);
        }
    }
    ensure!(unproven == ["F11"], "unproven: {unproven:?}");
    Ok(Outcome::Passed)
}

/// A call that hangs fails its rule by name, the rest is skipped while it does, and the command ends.
fn hangs(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = make_ferrydev(lab, "slow-arc=pre_copy:4000")?;
    let name = format!("vfio:{}", device.uuid());
    let report = check(lab, &name, &["--only", "P1,P5,Z1", "--time-limit", "500ms"])?;
    let got = |id: &str| {
        let mut rules = report["rules"].as_array().into_iter().flatten();
        rules
            .find(|rule| rule["id"] == id)
            .and_then(|rule| rule["got"].as_str())
            .unwrap_or_default()
    };
    for id in ["P1", "P5"] {
        let got = got(id);
        ensure!(got == "did not return within 0.5 s: SET PRE_COPY", "{id}: {got:?}");
    }
    // A call that lasts longer than anybody waits: the rest is skipped, and the command ends before the call.
    device.set("quirks", "slow-arc=pre_copy:60000")?;
    let start = Instant::now();
    let report = check(lab, &name, &["--only", "P1,P5,Z1", "--time-limit", "500ms"])?;
    let why = report["not-usable"].as_str().unwrap_or_default();
    ensure!(why.contains("stuck in SET PRE_COPY") && why.contains("rule P1"), "{why:?}");
    ensure!(start.elapsed() < Duration::from_secs(55), "it waited for the call");
    Ok(Outcome::Passed)
}

fn save_and_load(lab: &Lab) -> anyhow::Result<Outcome> {
    let (source, destination) = (make_ferrydev(lab, "")?, make_ferrydev(lab, "")?);
    let (from, to) = (format!("vfio:{}", source.uuid()), format!("vfio:{}", destination.uuid()));
    let run = |arguments: &[&str]| -> anyhow::Result<Output> {
        lab.vmferry(["device"]).args(arguments).output().context("run vmferry device")
    };
    let info = run(&["info", &from, "--json"])?;
    let shown: Value = serde_json::from_slice(&info.stdout).with_context(|| text(&info))?;
    ensure!(
        shown["migration"]["flags"] == 7
            && shown["ids"].as_str().is_some_and(|ids| ids.starts_with("1b36:00f7")),
        "{shown}"
    );
    let done = |arguments: &[&str]| -> anyhow::Result<()> {
        let output = run(arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {}", text(&output));
        Ok(())
    };
    done(&["save", &from, "nic.state"])?;
    done(&["load", &to, "nic.state"])?;
    // One flipped bit, and a device of another kind: the device sees neither.
    let path = lab.dir().join("nic.state");
    let mut bytes = std::fs::read(&path)?;
    let middle = bytes.len() / 2;
    *bytes.get_mut(middle).context("an empty state")? ^= 1;
    std::fs::write(lab.dir().join("bad.state"), &bytes)?;
    let mtty = lab.create(Parent::Mtty)?;
    let other = format!("vfio:{}", mtty.uuid());
    for (device, file, said) in
        [(&to, "bad.state", "damaged"), (&other, "nic.state", "another device")]
    {
        let output = run(&["load", device, file])?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1) && stderr.contains(said),
            "{file}: {}",
            text(&output)
        );
    }
    Ok(Outcome::Passed)
}
