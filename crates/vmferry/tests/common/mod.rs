//! Real processes for the tests: device servers and daemons of the built executable, each ended by its
//! own id when it is dropped.

#![allow(dead_code, reason = "every test file uses its own part")]

pub mod relay;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry::api::{CallError, Client};

/// How long anything is waited for: only a hang takes that long.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Memory of the guests.
pub const MEMORY: &str = "64M";

/// A process; dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(dir: &Path, name: &str, args: &[String]) -> Self {
        let log = dir.join(format!("{name}.log"));
        let stderr = std::fs::File::create(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vmferry"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self { name: name.into(), child, log }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kill -9.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: our own child, which was not waited for yet.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    pub fn wait_ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end:\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * 4096
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}:\n{}", self.name, self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A place for a test's processes and sockets.
pub struct Lab {
    guest: &'static str,
    started: usize,
    dir: tempfile::TempDir,
}

impl Lab {
    /// Whose guests are of this kind.
    pub fn new(guest: &'static str) -> Self {
        Self { guest, started: 0, dir: tempfile::tempdir().unwrap() }
    }

    /// The kind of its guests.
    pub fn guest(&self) -> &'static str {
        self.guest
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A name that was not used before.
    fn name(&mut self, what: &str) -> String {
        self.started += 1;
        format!("{what}{}", self.started)
    }

    /// A device server of 4 MiB of state with the profile's own times cut short.
    pub fn device(&mut self, extra: &[&str]) -> Device {
        self.device_of("mlx5-vf", extra)
    }

    /// As [`device`](Self::device), of a profile.
    pub fn device_of(&mut self, profile: &str, extra: &[&str]) -> Device {
        let name = self.name("device");
        let socket = self.path(&format!("{name}.sock"));
        let mut args = strings(&["device", "serve", "--profile", profile, "--socket"]);
        args.push(shown(&socket));
        let defaults = [("--state-size", "4M"), ("--time-scale", "10")];
        for (option, value) in defaults {
            if !extra.contains(&option) {
                args.extend(strings(&[option, value]));
            }
        }
        args.extend(strings(extra));
        let process = Process::start(self.dir.path(), &name, &args);
        let mut device = Device { process, socket };
        wait_for_socket(&device.socket, &mut device.process);
        device
    }

    /// A daemon over `devices` (named nic0, nic1, …).
    pub fn daemon(&mut self, devices: &[&Device], extra: &[&str]) -> Daemon {
        let name = self.name("daemon");
        let api = self.path(&format!("{name}.api"));
        let mut args = strings(&["run", "--guest", self.guest, "--api"]);
        args.push(shown(&api));
        if !extra.contains(&"--memory") {
            args.extend(strings(&["--memory", MEMORY]));
        }
        for (place, device) in devices.iter().enumerate() {
            let argument = format!("vfio-user:{},id=nic{place}", shown(&device.socket));
            args.extend(["--device".into(), argument]);
        }
        args.extend(strings(extra));
        let mut process = Process::start(self.dir.path(), &name, &args);
        wait_for_socket(&api, &mut process);
        Daemon { process, api }
    }

    /// A daemon whose guest is up.
    pub fn source(&mut self, devices: &[&Device], extra: &[&str]) -> Daemon {
        let daemon =
            self.daemon(devices, &[&["--fill", "50", "--dma-rate", "200"], extra].concat());
        daemon.wait("guest-up");
        daemon
    }

    /// A daemon that waits for a guest, on a port or path of its own, and where it listens.
    pub fn destination(
        &mut self,
        transport: &str,
        devices: &[&Device],
        extra: &[&str],
    ) -> (Daemon, String) {
        let listen = match transport {
            "tcp" => "tcp:127.0.0.1:0".to_owned(),
            "unix" => {
                let name = self.name("move");
                format!("unix:{}", shown(&self.path(&format!("{name}.sock"))))
            }
            other => panic!("no transport {other}"),
        };
        let daemon = self.daemon(devices, &[&["--incoming", &listen], extra].concat());
        let address = daemon.status()["incoming"]["listen"].as_str().unwrap().to_owned();
        (daemon, address)
    }
}

/// A device server.
pub struct Device {
    /// Its process.
    pub process: Process,
    /// Its socket.
    pub socket: PathBuf,
}

/// A daemon.
pub struct Daemon {
    /// Its process.
    pub process: Process,
    /// Its control socket.
    pub api: PathBuf,
}

impl Daemon {
    /// One command over a connection of its own.
    pub fn try_call(&self, command: &str, arguments: Value) -> Result<Value, CallError> {
        let mut client = Client::connect(&self.api)?;
        client.set_timeout(Some(LIMIT))?;
        client.call(command, arguments)
    }

    /// As [`try_call`](Self::try_call); it must succeed.
    pub fn call(&self, command: &str, arguments: Value) -> Value {
        self.try_call(command, arguments.clone()).unwrap_or_else(|error| {
            panic!("{command} {arguments}: {error}\n{}", self.process.log())
        })
    }

    /// `status`.
    pub fn status(&self) -> Value {
        self.call("status", json!({}))
    }

    /// Waits for an event of the `wait` command.
    pub fn wait(&self, event: &str) -> Value {
        let limit_ms = LIMIT.as_millis() as u64;
        let answer = self.call("wait", json!({"for": event, "timeout-ms": limit_ms / 2}));
        assert_eq!(
            answer["done"],
            true,
            "no {event}: {answer}\n{}\n{}",
            self.status(),
            self.process.log()
        );
        answer
    }

    /// Starts a migration.
    pub fn migrate(&self, destination: &str, mut arguments: Value) {
        arguments["destination"] = json!(destination);
        self.call("migrate", arguments);
    }

    /// Waits for the end of the migration; answers its report.
    pub fn report(&self) -> Value {
        self.wait("migration-end")["report"].take()
    }

    /// A whole migration that must be completed with everything identical.
    pub fn migrate_verified(&self, destination: &str) -> Value {
        self.migrate(destination, json!({"verify": true}));
        let report = self.report();
        assert_eq!(report["status"], "completed", "{report:#}");
        assert_eq!(report["memory-identical"], true, "{report:#}");
        assert_eq!(report["device-state-identical"], true, "{report:#}");
        report
    }

    /// The guest's counters.
    pub fn counters(&self) -> Value {
        self.workload(json!({"command": "counters"}))
    }

    /// A command to the guest.
    pub fn workload(&self, command: Value) -> Value {
        self.call("workload", command)
    }

    /// The guest runs here: its heart beats, and its memory is as it left it.
    pub fn assert_guest_lives(&self) {
        let before = self.counters();
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = self.counters();
            assert_eq!(now["errors"], 0, "{now}");
            let lives =
                ["beats", "writes"].iter().all(|key| number(&now[*key]) > number(&before[*key]));
            if lives {
                return;
            }
            assert!(Instant::now() < deadline, "no heartbeat: {now}\n{}", self.process.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// An unsigned number of an answer.
pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Runs a client command to its end.
pub fn vmferry(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmferry")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// The guests this host can run; says which it cannot.
pub fn guests() -> Vec<&'static str> {
    let mut guests = Vec::new();
    for (name, available) in
        [("kvm", microvm::kvm::available()), ("process", microvm::process::available())]
    {
        match available {
            Ok(()) => guests.push(name),
            Err(why) => println!("skipped: {name} guest: {why}"),
        }
    }
    guests
}

/// One guest this host can run, for what does not depend on the kind.
pub fn any_guest() -> Option<&'static str> {
    guests().first().copied()
}

fn wait_for_socket(path: &Path, process: &mut Process) {
    let deadline = Instant::now() + LIMIT;
    while std::os::unix::net::UnixStream::connect(path).is_err() {
        if let Some(status) = process.ended() {
            panic!("{} ended early: {status}\n{}", process.name, process.log());
        }
        assert!(Instant::now() < deadline, "{} does not come up", process.name);
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn shown(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Waits until it is so.
pub fn until(what: &str, there: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !there() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A load on every core, until it is dropped.
pub struct Load {
    over: Arc<AtomicBool>,
    /// Rounds of each thread.
    threads: Vec<JoinHandle<u64>>,
}

impl Load {
    /// Starts it.
    pub fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let burn = |_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                let mut rounds = 0u64;
                while !over.load(Ordering::Relaxed) {
                    rounds = std::hint::black_box(rounds + 1);
                }
                rounds
            })
        };
        let threads = (0..cores).map(burn).collect();
        Self { over, threads }
    }

    /// Ends it: every thread of it got to run, far more than to see that it is over.
    pub fn assert_it_ran(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            let rounds = thread.join().unwrap();
            assert!(rounds > 1_000_000, "there was no load: {rounds} rounds");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
