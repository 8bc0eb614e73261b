//! Processes of the demonstration: each is ended by its own id, whatever happens to the demonstration.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

/// How long a process that was asked to end may take before it is killed.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Lines of a log that are shown when its process failed.
const TAIL_LINES: usize = 8;

/// A process of this very executable; dropping it ends it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it logs goes to a file in `dir`. Called from the main thread, whose end the kernel
    /// takes for the parent's death.
    pub fn start<S: AsRef<OsStr>>(name: &str, args: &[S], dir: &Path) -> anyhow::Result<Self> {
        let executable = std::env::current_exe().context("find the executable of vmferry")?;
        let log = dir.join(format!("{name}.log"));
        let stderr = std::fs::File::create(&log)
            .with_context(|| format!("make the log {}", log.display()))?;
        let mut command = Command::new(executable);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        // A ^C is for the demonstration, which then ends its processes in order.
        command.process_group(0);
        let parent = std::process::id();
        // SAFETY: prctl and getppid are async-signal-safe, and nothing else is done.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // The parent may have died before the line above.
                if libc::getppid() as u32 == parent {
                    Ok(())
                } else {
                    Err(std::io::Error::from_raw_os_error(libc::ESRCH))
                }
            });
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.into(), child, log })
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("look at {}", self.name))
    }

    /// The last lines it logged.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: our own child, which is not reaped yet, so the id is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        self.signal(libc::SIGTERM);
        let deadline = Instant::now() + END_LIMIT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.signal(libc::SIGKILL);
        // Reaps it; a killed process ends.
        let _ = self.child.wait();
    }
}
