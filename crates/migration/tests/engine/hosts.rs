//! Source, destination and what stands between them, for tests of the engine with toy VMs.

#![allow(dead_code)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::channel::Address;
use migration::testing::proxy::{Action, At, Channel, Direction, Fault, Proxy};
use migration::{Incoming, IncomingConfig, Observer, Outgoing, OutgoingConfig, Report, Vmm};
use switchover::message::Side;

use crate::toy::ToyVm;

/// Nothing here takes long; this is for a test that hangs.
pub const LIMIT: Duration = Duration::from_secs(30);
pub const PAGES: u64 = 256;

/// Source, destination, and what stands between them.
pub struct Hosts {
    pub source: Arc<ToyVm>,
    pub destination: Arc<ToyVm>,
    pub incoming: Incoming,
    pub phases: Arc<Phases>,
    pub proxy: Proxy,
    pub dir: tempfile::TempDir,
    /// Memory is handed over.
    pub local: bool,
}

impl Hosts {
    pub fn new(pages: u64, devices: u64, tcp: bool) -> Self {
        Self::with(pages, devices, tcp, |_| ())
    }

    /// The same, with a destination as `set` wants it.
    pub fn with(
        pages: u64,
        devices: u64,
        tcp: bool,
        set: impl FnOnce(&mut IncomingConfig),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = |name: &str| match tcp {
            true => "tcp:127.0.0.1:0".parse().unwrap(),
            false => Address::Unix(dir.path().join(name)),
        };
        let source = ToyVm::new(true, pages, devices);
        let destination = ToyVm::new(false, pages, devices);
        let phases = Arc::new(Phases::default());
        let mut config = IncomingConfig::new(address("destination"));
        config.observer = Arc::clone(&phases) as Arc<dyn Observer>;
        config.state_dir = Some(dir.path().join("records-there"));
        set(&mut config);
        let vmm = Arc::clone(&destination) as Arc<dyn Vmm>;
        let incoming = Incoming::start(vmm, config).unwrap();
        let proxy = Proxy::start(&address("proxy"), &incoming.local_address()).unwrap();
        Self { source, destination, incoming, phases, proxy, dir, local: false }
    }

    pub fn small() -> Self {
        Self::new(PAGES, 2, false)
    }

    /// As [`small`](Self::small), for local moves.
    pub fn small_local() -> Self {
        Self { local: true, ..Self::small() }
    }

    pub fn config(&self) -> OutgoingConfig {
        let mut config = OutgoingConfig::new(self.proxy.address().clone());
        config.state_dir = Some(self.dir.path().join("records-here"));
        config.verify = true;
        config.local = self.local;
        config.observer = Arc::clone(&self.phases) as Arc<dyn Observer>;
        // What is tested here is not whether a promise fits.
        config.brain.downtime_limit = switchover::Time::from_ms(20_000);
        config
    }

    pub fn start(&self, config: OutgoingConfig) -> Outgoing {
        Outgoing::start(Arc::clone(&self.source) as Arc<dyn Vmm>, config)
    }

    pub fn migrate(&self) -> Report {
        report(&self.start(self.config()))
    }

    pub fn fault(&self, channel: Channel, direction: Direction, at: At, action: Action) {
        self.proxy.add(Fault { channel, direction, at, action });
    }

    /// The guest moved, whole.
    pub fn assert_moved(&self, report: &Report, what: &str) {
        let there = self.incoming.status();
        assert_eq!(report.status, "completed", "{what}: {:?}, there {there:?}", report.failure);
        assert_eq!(report.memory_identical, Some(true), "{what}");
        let devices = !report.devices.is_empty();
        assert_eq!(report.device_state_identical, devices.then_some(true), "{what}");
        self.assert_runs_there(what);
    }

    pub fn assert_runs_there(&self, what: &str) {
        self.incoming.wait_running().unwrap();
        assert!(!self.source.runs(), "{what}: runs twice");
        goes_on(&self.destination, what);
        self.assert_no_violations(what);
    }

    /// The guest stayed, nothing is left of the migration on either side.
    pub fn assert_stayed(&self, what: &str) {
        goes_on(&self.source, what);
        assert!(self.source.is_untracked(), "{what}: the source still tracks");
        let begin = Instant::now();
        loop {
            let (there, empty) = (self.incoming.status(), self.destination.is_empty());
            if there.state == "listening" && empty {
                break;
            }
            assert!(begin.elapsed() < LIMIT, "{what}: something is left; empty {empty}, {there:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.assert_no_violations(what);
    }

    pub fn assert_no_violations(&self, what: &str) {
        for vm in [&self.source, &self.destination] {
            assert_eq!(vm.violations(), Vec::<String>::new(), "{what}");
        }
    }
}

pub fn report(outgoing: &Outgoing) -> Report {
    let begin = Instant::now();
    loop {
        if let Some(report) = outgoing.report() {
            return report;
        }
        let progress = outgoing.progress();
        assert!(begin.elapsed() < LIMIT, "the migration does not end: {progress:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn until(what: &str, there: impl Fn() -> bool) {
    let begin = Instant::now();
    while !there() {
        assert!(begin.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn goes_on(vm: &ToyVm, what: &str) {
    assert!(vm.runs(), "{what}: the guest does not run");
    let (steps, counter) = (vm.steps(), vm.guest_counter());
    until(&format!("{what}: the guest goes on"), || {
        vm.steps() > steps + 3 && vm.guest_counter() > counter
    });
}

/// Every phase of both sides, in order.
#[derive(Default)]
pub struct Phases(pub Mutex<Vec<(Side, &'static str)>>);

impl Observer for Phases {
    fn entered(&self, side: Side, phase: &'static str) {
        self.0.lock().unwrap().push((side, phase));
    }
}

impl Hosts {
    /// The source had come to its end before the destination gave up, as it does after ten silent seconds.
    pub fn assert_ended_by_itself(&self) {
        let phases = self.phases.0.lock().unwrap();
        let place = |wanted| phases.iter().position(|phase| *phase == wanted);
        let ended = place((Side::Source, "cancelled")).unwrap();
        let gave_up = place((Side::Destination, "aborted"));
        assert!(gave_up.is_none_or(|gave_up| ended < gave_up), "{phases:?}");
    }
}

/// Holds the source when it first enters a phase.
pub struct Hold {
    phase: &'static str,
    phases: Arc<Phases>,
    reached: Mutex<Sender<()>>,
    go: Mutex<Receiver<()>>,
}

impl Observer for Hold {
    fn entered(&self, side: Side, phase: &'static str) {
        self.phases.entered(side, phase);
        if side == Side::Source && phase == self.phase {
            let _ = self.reached.lock().unwrap().send(());
            // Ends also when the test lets go.
            let _ = self.go.lock().unwrap().recv();
        }
    }
}

/// The observer, what says that the phase is reached, and what lets it go on.
pub fn hold(hosts: &Hosts, phase: &'static str) -> (Arc<Hold>, Receiver<()>, Sender<()>) {
    let (reached, is_reached) = channel();
    let (let_go, go) = channel();
    let phases = Arc::clone(&hosts.phases);
    let hold = Hold { phase, phases, reached: Mutex::new(reached), go: Mutex::new(go) };
    (Arc::new(hold), is_reached, let_go)
}

impl Hosts {
    /// Migrates, and does something while the source stands at the door of a phase.
    pub fn migrate_holding(&self, phase: &'static str, act: impl FnOnce(&Outgoing)) -> Report {
        let (observer, reached, let_go) = hold(self, phase);
        let outgoing = self.start(OutgoingConfig { observer, ..self.config() });
        reached.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{phase} was not reached"));
        act(&outgoing);
        drop(let_go);
        report(&outgoing)
    }
}

/// Whatever happened, exactly one runs; one that stayed moves with the next try.
pub fn assert_one_runs(hosts: &Hosts, report: &Report, what: &str) {
    if report.status == "completed" {
        return hosts.assert_runs_there(what);
    }
    assert_eq!(report.status, "failed", "{what}");
    assert!(report.failure.is_some(), "{what}");
    if hosts.incoming.status().state == "prepared" {
        // Complete, and without an answer: kept until its own source comes back, which never committed.
        goes_on(&hosts.source, what);
        assert!(!hosts.destination.runs(), "{what}: runs twice");
        assert!(hosts.source.is_untracked(), "{what}: the source still tracks");
    } else {
        hosts.assert_stayed(what);
    }
    hosts.assert_moved(&hosts.migrate(), what);
}

/// Cuts at frame k, for every k there is, while `migrate` runs.
pub fn cut_everywhere_of(
    (channel, direction, action): (Channel, Direction, Action),
    step: u64,
    migrate: impl Fn(&Hosts) -> Report,
) {
    let frames = (0..).step_by(step as usize);
    cut_at((channel, direction, action), frames, Hosts::small, migrate);
}

/// Cuts at each of `frames` that there is, between hosts that `make` makes, while `migrate` runs.
pub fn cut_at(
    (channel, direction, action): (Channel, Direction, Action),
    frames: impl Iterator<Item = u64>,
    make: impl Fn() -> Hosts,
    migrate: impl Fn(&Hosts) -> Report,
) {
    let mut failed = 0;
    for k in frames {
        let what = format!("{action:?} of {channel:?} {direction:?} at frame {k}");
        let hosts = make();
        hosts.fault(channel, direction, At::Frame(k), action);
        let report = migrate(&hosts);
        if hosts.proxy.struck().is_empty() {
            assert!(k > 0, "{what}: no frame at all");
            hosts.assert_moved(&report, &what);
            break;
        }
        failed += u32::from(report.status == "failed");
        assert_one_runs(&hosts, &report, &what);
    }
    assert!(failed > 0, "no cut of {channel:?} made a migration fail");
}

/// The same of a plain migration.
pub fn cut_everywhere(channel: Channel, direction: Direction, action: Action, step: u64) {
    cut_everywhere_of((channel, direction, action), step, Hosts::migrate);
}
