//! A TCP relay that a test puts between source and destination: it can be cut, and delay a connection.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The relay; it works until the test's process ends.
pub struct Relay {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    open: Mutex<Vec<TcpStream>>,
    /// Which connection (from 0, in the order they come) is delayed, and by how much.
    delay: Option<(usize, Duration)>,
    /// New connections are closed at once.
    refusing: AtomicBool,
}

impl Relay {
    /// A relay to `target` (`tcp:HOST:PORT`).
    pub fn start(target: &str, delay: Option<(usize, Duration)>) -> Self {
        let target = target.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let shared =
            Arc::new(Shared { open: Mutex::default(), delay, refusing: AtomicBool::new(false) });
        let relay = Self { address, shared: Arc::clone(&shared) };
        std::thread::spawn(move || {
            for (number, source) in listener.incoming().enumerate() {
                let source = source.unwrap();
                if shared.refusing.load(Ordering::Acquire) {
                    continue;
                }
                let Ok(destination) = TcpStream::connect(&target) else { continue };
                let delay = shared.delay.filter(|(which, _)| *which == number);
                let delay = delay.map_or(Duration::ZERO, |(_, delay)| delay);
                for end in [&source, &destination] {
                    end.set_nodelay(true).unwrap();
                    shared.open.lock().unwrap().push(end.try_clone().unwrap());
                }
                let back = (destination.try_clone().unwrap(), source.try_clone().unwrap());
                carry(source, destination, delay);
                carry(back.0, back.1, delay);
            }
        });
        relay
    }

    /// Where the source connects to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Connections made so far.
    pub fn connections(&self) -> usize {
        self.shared.open.lock().unwrap().len() / 2
    }

    /// Takes no new connection any more.
    pub fn refuse(&self) {
        self.shared.refusing.store(true, Ordering::Release);
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        for end in self.shared.open.lock().unwrap().iter() {
            // One that has ended cannot be cut any more.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// Carries bytes one way, each `delay` after it came. Order is kept.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, queue): (Sender<(Instant, Vec<u8>)>, Receiver<_>) = channel();
    std::thread::spawn(move || {
        for (at, bytes) in queue {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now() + delay, buffer[..count].to_vec())).is_err() {
                return;
            }
        }
    });
}
