//! QEMU: two processes, driven over QMP.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use microvm::VmConfig;
use microvm::workload::mailbox::{self, Counters};
use microvm::workload::{self, StartPage};
use migration::{GuestMemory, PageSizes, RegionLayout};
use serde_json::{Value, json};

use super::{Guest, Measured, Outcome, Wish};
use crate::free::warm_up;
use crate::jsonl::Client;
use crate::process::Process;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A root with QEMU in it, as `bench/qemu.sh` makes it; its own loader and libraries run it.
#[derive(Clone, Debug)]
pub struct QemuRoot(pub PathBuf);

impl QemuRoot {
    fn command(&self) -> Command {
        let root = &self.0;
        let mut command = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(root.join("usr/lib/x86_64-linux-gnu"));
        command.arg(root.join("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(firmware));
        }
        command
    }

    /// Its version, as it says.
    ///
    /// # Errors
    /// It does not run.
    pub fn version(&self) -> anyhow::Result<String> {
        let output = self.command().arg("--version").output().context("run QEMU")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().next().context("QEMU says nothing")?;
        Ok(line.trim_start_matches("QEMU emulator version ").to_owned())
    }
}

/// What is needed to move the guest by QEMU again and again: its memory is filled once.
pub struct Qemu {
    root: QemuRoot,
    guest: Guest,
    memory: GuestMemory,
    pages: PageSizes,
}

impl Qemu {
    /// Fills the guest's memory.
    ///
    /// # Errors
    /// There is not enough of it.
    pub fn new(root: QemuRoot, guest: Guest, pages: PageSizes) -> anyhow::Result<Self> {
        let memory = memory(&guest, pages)?;
        microvm::contents::fill(&memory, guest.seed, 100)?;
        Ok(Self { root, guest, memory, pages })
    }

    /// Another rate of page writes, from the next migration on.
    pub fn set_pages_per_s(&mut self, pages_per_s: u32) {
        self.guest.pages_per_s = pages_per_s;
    }

    /// One migration, with `multifd` channels or without multifd.
    ///
    /// # Errors
    /// A process did not work as it should. A migration that does not end is not an error.
    pub fn migrate(&self, wish: &Wish, multifd: Option<u32>) -> anyhow::Result<Outcome> {
        let kernel = wish.dir.join("guest.elf");
        std::fs::write(&kernel, workload::elf_image())?;
        let mut config = VmConfig { memory_bytes: self.guest.memory_bytes, ..VmConfig::default() };
        config.workload.working_set_pages = Some(self.guest.working_set_pages);
        config.workload.dirty_pages_per_s = self.guest.pages_per_s;
        StartPage::of(&config, 0)?.install(&self.memory)?;
        let arriving = memory(&self.guest, self.pages)?;

        let mut destination = self.start("qemu-destination", wish, &kernel, &arriving, true)?;
        let mut source = self.start("qemu-source", wish, &kernel, &self.memory, false)?;
        for machine in [&mut source, &mut destination] {
            machine.set_up(wish, multifd)?;
        }
        let uri = destination.listen()?;
        source.wait_guest(&self.memory)?;
        warm_up(self.guest.memory_bytes * 3)?;
        let dirty_pages_per_s = pages_per_s(&self.memory)?;

        let cpu_before = source.process.cpu_time()? + destination.process.cpu_time()?;
        let start = Instant::now();
        source.qmp.call("migrate", json!({ "uri": uri }))?;
        let completed = source.wait_end(start + wish.patience)?;
        let wall = start.elapsed();
        let cpu = source.process.cpu_time()? + destination.process.cpu_time()? - cpu_before;
        let info = source.qmp.call("query-migrate", json!({}))?;
        let measured = Measured { completed, wall, cpu, dirty_pages_per_s };
        let outcome = measured.with(&info, "");
        if completed {
            destination.process.check_alive()?;
            runs_on(&arriving, self.guest.pages_per_s > 0)?;
        }
        Ok(outcome)
    }

    fn start(
        &self,
        name: &str,
        wish: &Wish,
        kernel: &Path,
        memory: &GuestMemory,
        incoming: bool,
    ) -> anyhow::Result<Machine> {
        let socket = wish.dir.join(format!("{name}.qmp"));
        let _ = std::fs::remove_file(&socket);
        let file = format!("/proc/{}/fd/{}", std::process::id(), memory.region_fd(0).as_raw_fd());
        let bytes = self.guest.memory_bytes;
        let mut command = self.root.command();
        command.args(["-M", "microvm,pit=on,pic=on,rtc=on,memory-backend=ram"]);
        command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m"]);
        command.arg(format!("{}M", bytes >> 20));
        let backend = "memory-backend-file,id=ram,share=on";
        command.arg("-object").arg(format!("{backend},size={bytes},mem-path={file}"));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(kernel);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut process = Process::start(name, command, &wish.dir)?;
        let connect = || -> anyhow::Result<Client> {
            let mut qmp = Client::connect(&socket, START_LIMIT)?;
            qmp.greet_qmp()?;
            Ok(qmp)
        };
        match connect() {
            Ok(qmp) => Ok(Machine { process, qmp }),
            Err(error) => {
                process.check_alive()?;
                Err(error.context(process.log()))
            }
        }
    }
}

/// Memory as QEMU gets it: one file, empty.
fn memory(guest: &Guest, pages: PageSizes) -> anyhow::Result<GuestMemory> {
    let layout = [RegionLayout { gpa: 0, len: guest.memory_bytes }];
    Ok(GuestMemory::with_pages(&layout, pages)?)
}

struct Machine {
    process: Process,
    qmp: Client,
}

impl Machine {
    fn set_up(&mut self, wish: &Wish, multifd: Option<u32>) -> anyhow::Result<()> {
        let mut capabilities = vec![json!({"capability": "events", "state": true})];
        let mut parameters = json!({ "max-bandwidth": 0, "downtime-limit": wish.limit_ms });
        if let Some(channels) = multifd {
            capabilities.push(json!({"capability": "multifd", "state": true}));
            parameters["multifd-channels"] = channels.into();
        }
        self.qmp.call("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        self.qmp.call("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Listens on a free port; answers the URI.
    fn listen(&mut self) -> anyhow::Result<String> {
        self.qmp.call("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let info = self.qmp.call("query-migrate", json!({}))?;
        let port = info.pointer("/socket-address/0/port").and_then(Value::as_str);
        let port = port.with_context(|| format!("QEMU does not say where it listens: {info}"))?;
        Ok(format!("tcp:127.0.0.1:{port}"))
    }

    fn wait_guest(&mut self, memory: &GuestMemory) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let counters = mailbox::counters(memory)?;
            if counters.running && counters.beats > 20 {
                return Ok(());
            }
            self.process.check_alive()?;
            if Instant::now() >= deadline {
                bail!(
                    "the guest does not come up under QEMU: {counters:?}; {}",
                    self.process.log()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Completed in time, or cancelled because it was not.
    fn wait_end(&mut self, deadline: Instant) -> anyhow::Result<bool> {
        while let Some(event) = self.qmp.event(deadline)? {
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event.pointer("/data/status").and_then(Value::as_str) {
                Some("completed") => return Ok(true),
                Some("failed") => {
                    let info = self.qmp.call("query-migrate", json!({}))?;
                    bail!("QEMU's migration failed: {}", info["error-desc"]);
                }
                _ => {}
            }
        }
        Ok(false)
    }
}

/// Page writes per second of a guest that runs, seen for a moment.
fn pages_per_s(memory: &GuestMemory) -> anyhow::Result<f64> {
    let (before, start) = (mailbox::counters(memory)?, Instant::now());
    std::thread::sleep(Duration::from_millis(200));
    let after = mailbox::counters(memory)?;
    Ok((after.writes - before.writes) as f64 / start.elapsed().as_secs_f64())
}

/// The guest goes on where it is now, and all its stamps hold.
fn runs_on(memory: &GuestMemory, writes: bool) -> anyhow::Result<()> {
    let before = mailbox::counters(memory)?;
    let goes_on =
        |now: &Counters| now.beats > before.beats + 20 && (!writes || now.writes > before.writes);
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let now = mailbox::counters(memory)?;
        if now.errors > 0 {
            bail!("{} stamps of the guest are wrong after the migration", now.errors);
        }
        if goes_on(&now) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("the guest does not go on after the migration: {before:?}, then {now:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
