//! `vmferry run`: one VM, its control socket, and the migrations it takes part in.
//!
//! ```text
//!   incoming ──(guest arrives)──▶ running ──migrate──▶ migrating ──▶ migrated ──▶ exit 0 (--keep: stays)
//!                                    ▲                    │
//!                                    └──(anything fails)──┘          ended: the guest powered off or died
//! ```

mod commands;
mod config;
mod gate;
mod state;

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use microvm::{DeviceBackend, Vm, VmConfig};
use migration::destination::{Incoming, IncomingConfig};
use migration::ram::Populate;
use migration::record::RecordStore;
use migration::{GuestEvent, Vmm};

use crate::api::server::Server;
use crate::cli::{PopulateChoice, RunArgs, SerialChoice};
use crate::signals::Signals;
use gate::Gate;
use state::{Daemon, State};

pub use config::choose_guest;
pub use state::guest_name;

/// How often the main loop looks around.
const TICK: Duration = Duration::from_millis(20);
/// How long a source that is done waits for whoever asked for the migration to take the report.
const REPORT_LIMIT: Duration = Duration::from_secs(3);
/// How long a device server's socket is waited for.
const DEVICE_LIMIT: Duration = Duration::from_secs(2);
/// How long an end that was asked for waits for a migration to be cancelled.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// Runs a VM until its guest ends, has moved away, or somebody asks for the end.
pub fn run(args: RunArgs, signals: &Signals) -> anyhow::Result<bool> {
    check_exposure(&args)?;
    if let Some(dir) = &args.state_dir {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("make the state directory {}", dir.display()))?;
    }
    warn_of_doubt(&args);
    let vm_config = config::vm_config(&args)?;
    wait_for_devices(&vm_config);
    let vm = Arc::new(Vm::new(vm_config).context("the VM cannot be made")?);
    let gate = Arc::new(Gate::default());
    let incoming = match &args.incoming {
        Some(address) => {
            let mut config = IncomingConfig::new(address.clone());
            config.state_dir = args.state_dir.clone();
            config.durable = args.durable;
            config.window = args.window;
            config.populate = match args.populate {
                PopulateChoice::All => Populate::All,
                PopulateChoice::Used => Populate::Used,
            };
            config.observer = Arc::clone(&gate) as _;
            let vmm = Arc::clone(&vm) as Arc<dyn Vmm>;
            let incoming = Incoming::start(vmm, config)
                .with_context(|| format!("wait for a migration on {address}"))?;
            tracing::info!(address = %incoming.local_address(), "waiting for a migration");
            Some(incoming)
        }
        None => None,
    };
    let daemon = Arc::new(Daemon::new(Arc::clone(&vm), gate, incoming, &args));
    let server = match &args.api {
        Some(path) => Some(Server::start(path, Arc::clone(&daemon) as _)?),
        None => None,
    };
    if args.incoming.is_none() {
        vm.start().context("the guest cannot be started")?;
        tracing::info!(guest = daemon.guest_name(), "the guest runs");
    }
    if args.serial == SerialChoice::Stdio {
        forward_stdin(&vm)?;
    }
    let outcome = serve(&daemon, server.as_ref(), signals);
    daemon.close();
    drop(server);
    vm.stop();
    outcome
}

/// An earlier process may have died in doubt: what it ran may run elsewhere by now.
fn warn_of_doubt(args: &RunArgs) {
    let Some(dir) = args.state_dir.as_ref().filter(|_| args.incoming.is_none()) else { return };
    let doubtful = RecordStore::new(dir.clone(), false).and_then(|store| store.in_doubt());
    match doubtful {
        Ok(doubtful) => {
            for record in doubtful {
                tracing::warn!(
                    migration = %record.migration,
                    "an earlier process died in doubt whether its guest runs elsewhere; vmferry resolve \
                     --state-dir {} --ask says what is known",
                    dir.display()
                );
            }
        }
        Err(error) => tracing::warn!(%error, "the records cannot be read"),
    }
}

/// Gives device servers that were started just before a moment to come up; whether they did is found out
/// by whoever opens them.
fn wait_for_devices(config: &VmConfig) {
    let deadline = Instant::now() + DEVICE_LIMIT;
    for device in &config.devices {
        let DeviceBackend::VfioUser(path) = &device.backend else { continue };
        while !path.exists() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
    }
}

/// Whoever reaches the migration port can read and replace the guest, so it stays on this host unless the
/// user says otherwise.
fn check_exposure(args: &RunArgs) -> anyhow::Result<()> {
    let Some(address) = &args.incoming else { return Ok(()) };
    if address.is_loopback() {
        return Ok(());
    }
    if !args.insecure {
        bail!(
            "--incoming {address} can be reached from other hosts, without encryption or \
             authentication; use tcp:127.0.0.1:PORT or unix:PATH through a tunnel, or add --insecure"
        );
    }
    tracing::warn!(
        %address,
        "the migration port is neither encrypted nor authenticated: whoever reaches it can send a guest"
    );
    Ok(())
}

/// The main loop; answers whether the end is a good one.
fn serve(daemon: &Daemon, server: Option<&Server>, signals: &Signals) -> anyhow::Result<bool> {
    let mut over_since = None;
    let mut announced = false;
    loop {
        if signals.any() || daemon.quit_asked() {
            return end_early(daemon, signals);
        }
        if let Some(incoming) = daemon.incoming() {
            if incoming.is_running() {
                if !std::mem::replace(&mut announced, true) {
                    tracing::info!(guest = daemon.guest_name(), "the guest runs here");
                }
            } else if let Some(failure) = daemon.incoming_outcome() {
                bail!("this side will never run the guest: {failure}");
            }
        }
        let state = daemon.state();
        let over = match state {
            State::Migrated => !daemon.keep,
            // The migration hears of it too, and ends by itself.
            State::Ended => !daemon.migration_under_way(),
            _ => false,
        };
        if over && !report_is_wanted(daemon, server, *over_since.get_or_insert_with(Instant::now)) {
            return end_of(daemon, state);
        }
        std::thread::sleep(TICK);
    }
}

/// Somebody is connected who may not have taken the report of the last migration yet.
fn report_is_wanted(daemon: &Daemon, server: Option<&Server>, since: Instant) -> bool {
    daemon.has_untaken_report()
        && server.is_some_and(|server| server.clients() > 0)
        && since.elapsed() < REPORT_LIMIT
}

/// The end that came by itself.
fn end_of(daemon: &Daemon, state: State) -> anyhow::Result<bool> {
    match (state, daemon.vm.status().ended) {
        (State::Migrated, _) => {
            tracing::info!("the guest runs at the destination, this process ends");
        }
        (_, Some(GuestEvent::Crashed { reason })) => bail!("the guest died: {reason}"),
        _ => tracing::info!("the guest powered off"),
    }
    Ok(true)
}

/// Somebody asked for the end: a migration under way is cancelled first, so that the other side knows.
fn end_early(daemon: &Daemon, signals: &Signals) -> anyhow::Result<bool> {
    let asked = signals.count();
    daemon.open_gate();
    if daemon.migration_under_way() {
        tracing::info!("asked to end: the migration under way is cancelled");
        daemon.cancel_for_end();
        let deadline = Instant::now() + CANCEL_LIMIT;
        while daemon.migration_under_way() {
            if signals.count() > asked || Instant::now() >= deadline {
                bail!(
                    "ended although a migration was under way ({}); look at the destination before \
                     the guest is started again",
                    daemon.migration_state()
                );
            }
            std::thread::sleep(TICK);
        }
    }
    tracing::info!("asked to end");
    Ok(true)
}

/// Standard input becomes serial input. The thread ends with the process.
fn forward_stdin(vm: &Arc<Vm>) -> anyhow::Result<()> {
    let vm = Arc::downgrade(vm);
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut bytes = [0; 256];
            let mut stdin = std::io::stdin().lock();
            while let Ok(count @ 1..) = stdin.read(&mut bytes) {
                let Some(vm) = vm.upgrade() else { return };
                vm.serial_input(&bytes[..count]);
            }
        })
        .context("no thread for the serial console")?;
    Ok(())
}
