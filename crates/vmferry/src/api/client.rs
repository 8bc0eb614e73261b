//! The client's end of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::protocol::ApiError;

/// The longest answer, in bytes.
const ANSWER_MAX_BYTES: u64 = 16 << 20;
/// How long a daemon may take to come up.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody answers at the socket.
    #[error(
        "no daemon answers at {}: {source}; is `vmferry run --api {}` running?",
        path.display(), path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon ended before it answered.
    #[error("the daemon at {} ended before it answered", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// What came is no answer.
    #[error("the answer from {} makes no sense: {what}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// The socket failed.
    #[error("the connection to {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon says no.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    next_id: u64,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`CallError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, CallError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| CallError::Connect { path: path.into(), source })?;
        Ok(Self { path: path.into(), stream: BufReader::new(stream), next_id: 1 })
    }

    /// As [`connect`](Self::connect), with a moment's patience for a daemon that was started just before.
    ///
    /// # Errors
    /// [`CallError::Connect`].
    pub fn connect_patiently(path: &Path) -> Result<Self, CallError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::connect(path) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome => return outcome,
            }
        }
    }

    /// Limits how long an answer may take; `None` = for ever, the default.
    ///
    /// # Errors
    /// The socket refuses.
    pub fn set_timeout(&self, limit: Option<Duration>) -> Result<(), CallError> {
        self.stream.get_ref().set_read_timeout(limit).map_err(|source| self.io(source))
    }

    /// Performs `command` and waits for its answer.
    ///
    /// # Errors
    /// What the daemon said, or why it said nothing.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value, CallError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        let line = format!("{request}\n");
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|source| self.io(source))?;
        loop {
            let mut answer = self.read_answer()?;
            // An answer without id speaks of a connection that is not taken.
            let own = answer.get("id").is_none_or(|answered| *answered == json!(id));
            if own {
                return self.outcome(&mut answer);
            }
        }
    }

    fn read_answer(&mut self) -> Result<Value, CallError> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(ANSWER_MAX_BYTES).read_until(b'\n', &mut line);
        read.map_err(|source| self.io(source))?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 >= ANSWER_MAX_BYTES {
                return Err(self.nonsense(format!("it is longer than {ANSWER_MAX_BYTES} bytes")));
            }
            return Err(CallError::Gone { path: self.path.clone() });
        }
        serde_json::from_slice(&line).map_err(|error| self.nonsense(error.to_string()))
    }

    fn outcome(&self, answer: &mut Value) -> Result<Value, CallError> {
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
        let error = answer.get_mut("error").map(Value::take).unwrap_or_default();
        match serde_json::from_value::<ApiError>(error) {
            Ok(error) => Err(error.into()),
            Err(error) => Err(self.nonsense(error.to_string())),
        }
    }

    fn nonsense(&self, what: String) -> CallError {
        CallError::Answer { path: self.path.clone(), what }
    }

    fn io(&self, source: io::Error) -> CallError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CallError::Gone { path },
            _ => CallError::Io { path, source },
        }
    }
}

/// One call over a connection of its own.
///
/// # Errors
/// As [`Client::call`].
pub fn call(path: &Path, command: &str, arguments: Value) -> Result<Value, CallError> {
    Client::connect_patiently(path)?.call(command, arguments)
}
