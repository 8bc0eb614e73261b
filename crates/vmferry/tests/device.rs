//! `vmferry device info`, `save`, `load` and `check` as a user runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a server may take to listen: only a hang takes that long.
const LIMIT: Duration = Duration::from_secs(60);

/// A device server of the built executable.
struct Server {
    child: std::process::Child,
    name: String,
}

impl Server {
    fn start(dir: &Path, file: &str, arguments: &[&str]) -> Self {
        let socket = dir.join(file);
        let child = Command::new(env!("CARGO_BIN_EXE_vmferry"))
            .args(["device", "serve", "--profile", "mlx5-vf", "--state-size", "1M"])
            .args(["--time-scale", "0", "--socket"])
            .arg(&socket)
            .args(arguments)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + LIMIT;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "{} does not listen", socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, name: format!("vfio-user:{}", socket.display()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn device(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmferry"));
    command.arg("device").args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn digest(device_name: &str) -> String {
    let output = device(&["info", device_name, "--json"]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["migration"]["state-digest"].as_str().unwrap().to_owned()
}

#[test]
fn info_shows_what_a_device_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "a.sock", &[]);
    let text = stdout(&device(&["info", &server.name]));
    for part in
        ["1b36:00f7", "PRE_COPY_P2P", "state           RUNNING", "MSI-X: 4", "BAR 0: 4.0 KiB"]
    {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    let none = Server::start(dir.path(), "b.sock", &["--quirk", "no-migration"]);
    let output = device(&["info", &none.name, "--json"]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(info["migration"].is_null() && output.status.success(), "{info}");
    let output = device(&["save", &none.name, dir.path().join("s").to_str().unwrap()]);
    assert!(stderr(&output).contains("no migration support"), "{}", stderr(&output));
}

/// A device whose state is not that after power-on, by the check that changes it.
fn used(server: &Server) -> String {
    let fresh = digest(&server.name);
    use vfio_user::{Options, VfioUserDevice};
    let path = server.name.strip_prefix("vfio-user:").unwrap();
    let opened = VfioUserDevice::open(Path::new(path), Options::default()).unwrap();
    // SCRATCH and a reconfiguration (docs/workload.md).
    for (offset, value) in [(0x44u64, 4711u32), (0x10, 64), (0x14, 9)] {
        opened.pci().region_write(0, offset, &value.to_le_bytes()).unwrap();
    }
    drop(opened);
    let changed = digest(&server.name);
    assert_ne!(fresh, changed);
    changed
}

#[test]
fn a_saved_state_is_loaded_by_file_and_by_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let source = Server::start(dir.path(), "a.sock", &[]);
    let by_file = Server::start(dir.path(), "b.sock", &[]);
    let by_pipe = Server::start(dir.path(), "c.sock", &[]);
    let state = used(&source);
    let file = dir.path().join("nic.state");
    let file = file.to_str().unwrap();
    assert!(device(&["save", &source.name, file]).status.success());
    assert_eq!(digest(&source.name), state, "saving changed the device");
    let output = device(&["load", &by_file.name, file]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(digest(&by_file.name), state);

    let mut saving = Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(["device", "save", &source.name, "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(["device", "load", &by_pipe.name, "-"])
        .stdin(saving.stdout.take().unwrap())
        .output()
        .unwrap();
    assert!(saving.wait().unwrap().success() && output.status.success(), "{}", stderr(&output));
    assert_eq!(digest(&by_pipe.name), state);
}

#[test]
fn what_is_damaged_or_of_another_device_is_refused_and_the_device_runs() {
    let dir = tempfile::tempdir().unwrap();
    let source = Server::start(dir.path(), "a.sock", &[]);
    let target = Server::start(dir.path(), "b.sock", &[]);
    let before = used(&target);
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    assert!(device(&["save", &source.name, &path("good")]).status.success());
    let good = std::fs::read(path("good")).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x10;
    let mut other = good.clone();
    let at = good.windows(9).position(|bytes| bytes == b"1b36:00f7").unwrap();
    other[at] = b'2';
    for (name, bytes, said) in [
        ("flipped", &flipped[..], "damaged"),
        ("cut", &good[..good.len() / 2], "cut off"),
        ("no-end", &good[..good.len() - 1], "cut off"),
        ("empty", &[], "not a saved device state"),
        ("text", b"a text that is long enough for a head", "not a saved device state"),
    ] {
        std::fs::write(path(name), bytes).unwrap();
        let output = device(&["load", &target.name, &path(name)]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(stderr(&output).contains(said), "{name}: {}", stderr(&output));
        // The device saw nothing of it.
        assert_eq!(digest(&target.name), before, "{name}");
    }
    // Through a pipe it is found at the end, and the device is reset.
    let output = Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(["device", "load", &target.name, "-"])
        .stdin(std::fs::File::open(path("flipped")).unwrap())
        .output()
        .unwrap();
    assert!(stderr(&output).contains("the device was reset"), "{}", stderr(&output));
    assert_eq!(digest(&target.name), digest(&source.name), "not as after power-on");
    // Another device's: its checksum is right, its ids are not. The byte above was for a damaged head.
    std::fs::write(path("other"), other).unwrap();
    assert_eq!(device(&["load", &target.name, &path("other")]).status.code(), Some(1));
}

#[test]
fn a_state_that_cannot_be_read_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "a.sock", &["--quirk", "fail-arc=stop-stop_copy"]);
    let file: PathBuf = dir.path().join("nic.state");
    std::fs::write(&file, "the old one").unwrap();
    let output = device(&["save", &server.name, file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("STOP_COPY"), "{}", stderr(&output));
    assert_eq!(std::fs::read(&file).unwrap(), b"the old one");
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn check_says_what_failed_and_how_to_fix_it_and_its_status_tells() {
    let dir = tempfile::tempdir().unwrap();
    let good = Server::start(dir.path(), "a.sock", &[]);
    let bad = Server::start(dir.path(), "b.sock", &["--quirk", "break-F5", "--quirk", "size=zero"]);
    let output = device(&["check", &good.name, "--destructive"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).contains(" 0 failed"), "{}", stdout(&output));

    let junit = dir.path().join("report.xml");
    let output = device(&["check", &bad.name, "--junit", junit.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let table = stdout(&output);
    for part in [
        "  F5   FAIL STOP_COPY to PRE_COPY",
        "expected  SET PRE_COPY in STOP_COPY: EINVAL",
        "got       SET PRE_COPY in STOP_COPY: success",
        "source    Linux uAPI",
        "to fix    ",
        " 2 failed",
    ] {
        assert!(table.contains(part), "{part:?} is not in\n{table}");
    }
    let xml = std::fs::read_to_string(&junit).unwrap();
    assert!(xml.contains("failures=\"2\""), "{xml}");

    let output = device(&["check", &bad.name, "--json", "--only", "F,Z", "--skip", "F5"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &report["summary"]["failed"]), (Some(1), &1.into()));
    assert_eq!(report["rules"].as_array().unwrap().len(), 14 - 1 + 4);

    let nowhere = format!("vfio-user:{}", dir.path().join("nobody").display());
    assert_eq!(device(&["check", &nowhere]).status.code(), Some(2));
    assert_eq!(device(&["check", &good.name, "--only", "Q7"]).status.code(), Some(2));
}

#[test]
fn a_check_that_is_interrupted_leaves_the_device_running() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    // Each step into STOP takes its time, so that the signal comes in the middle of one.
    let server = Server::start(dir.path(), "a.sock", &["--quirk", "slow-arc=stop:300"]);
    let mut check = Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(["device", "check", &server.name])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(check.stdout.take().unwrap()).lines();
    let began = lines.by_ref().map_while(Result::ok).any(|line| line.contains("D1 "));
    assert!(began, "no rule was tested");
    let pid = libc::pid_t::try_from(check.id()).unwrap();
    // SAFETY: our own child, which was not waited for yet.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    let output = check.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{rest:#?}");
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
    assert!(rest.iter().any(|line| line.trim() == "interrupted"), "{rest:#?}");
    let info = stdout(&device(&["info", &server.name]));
    assert!(info.contains("state           RUNNING"), "{info}");
}

#[test]
fn check_lists_every_rule_without_a_device() {
    let output = device(&["check", "--list", "--json"]);
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rules = list.as_array().unwrap();
    assert_eq!(rules.len(), conformance::rules::all().len());
    assert_eq!(rules[0]["fails-with"][0], "break-D1");
    let text = stdout(&device(&["check", "--list", "--only", "X7,F10"]));
    assert!(text.contains("untestable: ") && text.contains("destructive"), "{text}");
}
