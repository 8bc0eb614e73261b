//! Clients of the control socket, each on its own thread. Everything a client can send is answered,
//! bounded and never fatal.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use super::protocol::{ApiError, CLIENTS_MAX, ErrorClass, LINE_MAX_BYTES, answer, parse_request};
use super::socket;

/// How often a waiting thread looks whether the server ends.
const STOP_POLL: Duration = Duration::from_millis(100);
/// A client that does not take its answer for so long is disconnected.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How long the end waits for requests under way.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Performs commands; called from several threads at once.
pub trait Handler: Send + Sync + 'static {
    /// Performs `command`. A call that waits looks at `stop` and comes back early when it is set.
    ///
    /// # Errors
    /// What the client is told.
    fn handle(&self, command: &str, arguments: Value, stop: &AtomicBool)
    -> Result<Value, ApiError>;
}

/// A server on its own threads; dropping it ends it and removes the socket.
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    clients: AtomicUsize,
    /// Requests that are not answered yet.
    busy: AtomicUsize,
}

impl Server {
    /// Serves `handler` at `path`.
    ///
    /// # Errors
    /// The path cannot be listened on.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> anyhow::Result<Self> {
        let listener = socket::listen(path)?;
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || accept(&listener, &handler, &shared)
            })
            .context("no thread for the control socket")?;
        Ok(Self { path: path.into(), shared, thread: Some(thread) })
    }

    /// Clients connected now.
    pub fn clients(&self) -> usize {
        self.shared.clients.load(Ordering::Acquire)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // Wakes the thread that accepts; if that fails it has ended already.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
        // Gone already: somebody tidied up.
        let _ = std::fs::remove_file(&self.path);
        let deadline = Instant::now() + END_LIMIT;
        while self.shared.busy.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn accept(listener: &UnixListener, handler: &Arc<dyn Handler>, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, say: it may pass.
                tracing::warn!(%error, "control socket: a client could not be accepted");
                std::thread::sleep(STOP_POLL);
                continue;
            }
        };
        let slot = Slot::take(shared);
        if slot.number > CLIENTS_MAX {
            let error = ApiError::refused(format!(
                "{CLIENTS_MAX} clients are connected already; close one of them"
            ));
            // A client that is gone misses nothing.
            let _ = stream.write_all(&answer(Err(error), None));
            continue;
        }
        let handler = Arc::clone(handler);
        let serve = move || {
            if let Err(error) = serve(stream, &*handler, &slot.shared) {
                tracing::debug!(%error, "control socket: client disconnected");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("api-client".into()).spawn(serve) {
            tracing::warn!(%error, "control socket: no thread for a client");
        }
    }
}

/// A client's place; free again when it is dropped.
struct Slot {
    shared: Arc<Shared>,
    number: usize,
}

impl Slot {
    fn take(shared: &Arc<Shared>) -> Self {
        let number = shared.clients.fetch_add(1, Ordering::AcqRel) + 1;
        Self { shared: Arc::clone(shared), number }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(mut stream: UnixStream, handler: &dyn Handler, shared: &Shared) -> std::io::Result<()> {
    stream.set_read_timeout(Some(STOP_POLL))?;
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut lines = Lines::default();
    while let Some(line) = lines.next(&mut stream, &shared.stop)? {
        shared.busy.fetch_add(1, Ordering::AcqRel);
        let answered = respond(&line, handler, &shared.stop)
            .map_or(Ok(()), |answer| stream.write_all(&answer));
        shared.busy.fetch_sub(1, Ordering::AcqRel);
        answered?;
    }
    Ok(())
}

/// The answer to a line; none to an empty one.
fn respond(line: &Line, handler: &dyn Handler, stop: &AtomicBool) -> Option<Vec<u8>> {
    let Line::Whole(line) = line else {
        let desc = format!("the line is longer than {LINE_MAX_BYTES} bytes; it was skipped");
        return Some(answer(Err(ApiError::new(ErrorClass::InvalidRequest, desc)), None));
    };
    if line.iter().all(u8::is_ascii_whitespace) {
        return None;
    }
    Some(match parse_request(line) {
        Ok(request) => {
            let result = handler.handle(&request.execute, request.arguments, stop);
            answer(result, request.id)
        }
        Err((error, id)) => answer(Err(error), id),
    })
}

/// A line of a client.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// Without its newline.
    Whole(Vec<u8>),
    /// One that was longer than allowed and was skipped.
    TooLong,
}

/// Cuts a byte stream into lines; never holds more than the longest line and one read.
#[derive(Default)]
struct Lines {
    pending: Vec<u8>,
    /// The line under way is too long: skip to its end.
    skipping: bool,
}

impl Lines {
    /// The next line; `None` at the end of the stream or of the server. An unfinished line at the end is
    /// dropped.
    fn next(&mut self, stream: &mut impl Read, stop: &AtomicBool) -> std::io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.cut() {
                return Ok(Some(line));
            }
            if stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.pending.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::TimedOut => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn cut(&mut self) -> Option<Line> {
        let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') else {
            if self.skipping || self.pending.len() > LINE_MAX_BYTES {
                self.skipping = true;
                self.pending.clear();
            }
            return None;
        };
        let mut line: Vec<u8> = self.pending.drain(..=end).collect();
        line.pop();
        if std::mem::take(&mut self.skipping) || line.len() > LINE_MAX_BYTES {
            return Some(Line::TooLong);
        }
        Some(Line::Whole(line))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Cursor};

    use serde_json::json;

    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(
            &self,
            command: &str,
            arguments: Value,
            _: &AtomicBool,
        ) -> Result<Value, ApiError> {
            match command {
                "echo" => Ok(arguments),
                other => Err(ApiError::new(ErrorClass::UnknownCommand, other)),
            }
        }
    }

    #[test]
    fn lines_are_bounded_and_a_long_one_does_not_take_the_next_with_it() {
        let stop = AtomicBool::new(false);
        let mut text = b"a\n\nb\n".to_vec();
        text.extend(vec![b'x'; LINE_MAX_BYTES]);
        text.extend(b"\n");
        text.extend(vec![b'y'; 3 * LINE_MAX_BYTES]);
        text.extend(b"\nc\nrest");
        let mut stream = Cursor::new(text);
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        while let Some(line) = lines.next(&mut stream, &stop).unwrap() {
            assert!(lines.pending.len() <= LINE_MAX_BYTES + 4096);
            seen.push(line);
        }
        let whole = |text: &[u8]| Line::Whole(text.to_vec());
        let expected = [
            whole(b"a"),
            whole(b""),
            whole(b"b"),
            whole(&vec![b'x'; LINE_MAX_BYTES]),
            Line::TooLong,
            whole(b"c"),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn several_clients_get_their_own_answers_and_garbage_gets_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let server = Server::start(&path, Arc::new(Echo)).unwrap();
        let mut clients: Vec<_> =
            (0..3).map(|_| BufReader::new(UnixStream::connect(&path).unwrap())).collect();
        for round in 0..2 {
            for (number, client) in clients.iter_mut().enumerate() {
                let request = json!({"execute": "echo", "arguments": {"n": number}, "id": round});
                writeln!(client.get_mut(), "{request}").unwrap();
            }
            for (number, client) in clients.iter_mut().enumerate() {
                let mut line = String::new();
                client.read_line(&mut line).unwrap();
                let answer: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(answer, json!({"return": {"n": number}, "id": round}));
            }
        }
        let client = &mut clients[0];
        let mut ask = |bytes: &[u8]| -> Value {
            client.get_mut().write_all(bytes).unwrap();
            let mut line = String::new();
            client.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        };
        assert_eq!(ask(b"\xff\xff\x00\n")["error"]["class"], "invalid-request");
        assert_eq!(ask(b"{\"execute\":\"x\"}\n")["error"]["class"], "unknown-command");
        let mut long = vec![b'{'; 1 << 20];
        long.push(b'\n');
        assert_eq!(ask(&long)["error"]["class"], "invalid-request");
        assert_eq!(ask(b"{\"execute\":\"echo\"}\n"), json!({"return": {}}));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn there_is_a_limit_to_clients_and_a_place_becomes_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let server = Server::start(&path, Arc::new(Echo)).unwrap();
        let ask = |stream: &UnixStream| -> Option<Value> {
            let mut stream = stream;
            // The server closes the ones it does not take.
            let _ = stream.write_all(b"{\"execute\":\"echo\"}\n");
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).ok()?;
            serde_json::from_str(&line).ok()
        };
        let mut streams: Vec<_> =
            (0..CLIENTS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for stream in &streams {
            assert_eq!(ask(stream), Some(json!({"return": {}})));
        }
        let answer = ask(&UnixStream::connect(&path).unwrap());
        assert!(answer.is_none_or(|answer| answer["error"]["class"] == "refused"));
        streams.clear();
        while server.clients() > 0 {
            std::thread::yield_now();
        }
        assert_eq!(ask(&UnixStream::connect(&path).unwrap()), Some(json!({"return": {}})));
    }
}
