//! Processes that a benchmark starts: each is ended by its own id, whatever happens to the benchmark.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::cpu;

/// How long a process that was asked to end may take before it is killed.
const END_LIMIT: Duration = Duration::from_secs(3);

/// A process; dropping it ends it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it says goes to a file in `dir`. Called from the main thread, whose end the kernel takes
    /// for the parent's death.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: &str, mut command: Command, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = std::fs::File::create(&log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // A ^C is for the benchmark, which ends its processes in order.
        command.process_group(0);
        // SAFETY: prctl is async-signal-safe, and nothing else is done.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.into(), child, log })
    }

    /// As it was started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// CPU time so far; that of a process that has ended but was not waited for counts too.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(cpu::time_of(self.child.id())?)
    }

    /// Fails with what it said, if it has ended.
    ///
    /// # Errors
    /// It has ended.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early ({status}): {}", self.name, self.log()),
        }
    }

    /// What it said so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map_or_else(
            |error| error.to_string(),
            |text| String::from_utf8_lossy(&text).trim().to_owned(),
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // SAFETY: our own child, which is not reaped yet, so the id is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let deadline = Instant::now() + END_LIMIT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
