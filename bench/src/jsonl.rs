//! A client of a socket that speaks one JSON object per line: QEMU's QMP and vmferry's control socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// A connection.
pub struct Client {
    stream: BufReader<UnixStream>,
    /// A line that has not come whole yet.
    partial: Vec<u8>,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

impl Client {
    /// Connects; waits up to `patience` for the socket to appear.
    ///
    /// # Errors
    /// Nobody listens there in time.
    pub fn connect(path: &Path, patience: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    return Ok(Self {
                        stream: BufReader::new(stream),
                        partial: Vec::new(),
                        events: Vec::new(),
                    });
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("connect to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The greeting of QMP, and out of its negotiation.
    ///
    /// # Errors
    /// It is no QMP.
    pub fn greet_qmp(&mut self) -> anyhow::Result<()> {
        let greeting = self.read(Instant::now() + Duration::from_secs(10))?;
        if greeting.as_ref().is_none_or(|line| line.get("QMP").is_none()) {
            bail!("no QMP greeting: {greeting:?}");
        }
        self.call("qmp_capabilities", json!({})).map(drop)
    }

    /// Performs a command; answers what it returned.
    ///
    /// # Errors
    /// The command failed, or the connection did.
    pub fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.call_within(command, arguments, Duration::from_secs(60))
    }

    /// As [`call`](Self::call), with a time limit of its own.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_within(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> anyhow::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).with_context(|| command.to_owned())?;
        let deadline = Instant::now() + limit;
        loop {
            let Some(mut answer) = self.read(deadline).with_context(|| command.to_owned())? else {
                bail!("{command}: no answer within {} s", limit.as_secs());
            };
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.events.push(answer);
        }
    }

    /// The next event that was not taken yet; `None` when the time is over.
    ///
    /// # Errors
    /// The connection failed.
    pub fn event(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        if !self.events.is_empty() {
            return Ok(Some(self.events.remove(0)));
        }
        self.read(deadline)
    }

    fn read(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        loop {
            let Some(left) =
                deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())
            else {
                return Ok(None);
            };
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Ok(_) => bail!("the other side closed the socket"),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
