//! Logs on standard error, as text or JSON. They are written by a thread of their own: a slow terminal
//! or pipe must not hold up whoever logs, in a blackout least of all.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::LogFormat;

/// Lines that wait to be written; what comes on top is dropped.
const QUEUE_LINES: usize = 4096;
/// How long the end waits for a slow sink.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Writes what was logged, until it is dropped.
pub struct Guard {
    queue: Queue,
    thread: Option<JoinHandle<()>>,
}

/// Where loggers put their lines; empty once the guard is gone.
type Queue = Arc<Mutex<Option<SyncSender<Vec<u8>>>>>;

#[derive(Clone)]
struct Writer(Queue);

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = &*queue
            && let Err(TrySendError::Disconnected(line)) = queue.try_send(line.to_vec())
        {
            io::stderr().write_all(&line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Starts logging in `format`; `VMFERRY_LOG` sets the level, `info` without it.
///
/// # Errors
/// It is set to what is no filter.
pub fn start(format: LogFormat) -> anyhow::Result<Guard> {
    let filter = match std::env::var("VMFERRY_LOG") {
        Ok(filter) => EnvFilter::try_new(&filter).with_context(|| {
            format!(
                "VMFERRY_LOG={filter:?} is no filter; use a level (error … trace) or CRATE=LEVEL, …"
            )
        })?,
        Err(_) => EnvFilter::new("info"),
    };
    let (sender, lines) = sync_channel(QUEUE_LINES);
    let queue: Queue = Arc::new(Mutex::new(Some(sender)));
    let thread =
        std::thread::Builder::new().name("log".into()).spawn(move || write_all(&lines)).ok();
    if thread.is_none() {
        *queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Writer(Arc::clone(&queue)));
    // A subscriber that is there already stays.
    let _ = match format {
        LogFormat::Text => subscriber.with_target(false).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    Ok(Guard { queue, thread })
}

fn write_all(lines: &Receiver<Vec<u8>>) {
    for line in lines {
        // Nobody reads the logs: nothing to be done about it.
        let _ = io::stderr().write_all(&line);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + FLUSH_LIMIT;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
