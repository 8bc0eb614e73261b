//! A proxy that knows frames: it stands between source and destination and does one thing wrong, at the
//! k-th frame of a channel, or at the n-th of a kind.
//!
//! ```text
//!  source ──▶ listen ─┬─ Control ─▶ ── pump, looks at every frame ──▶ target ──▶ destination
//!                     └─ Data(i) ─▶
//! ```
//!
//! It recognises a channel by its first frame (Hello, or Attach with the channel's number). Frames are
//! counted from 0 for each connection and direction, the first frame included. Files that come along go on with
//! the frame they came with.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::channel::{
    Address, ChannelError, Listener, Stream, connect, receive_with_files, send_with_files,
};
use crate::wire::{HEADER_LEN, MAGIC, SECTION_MAX, kind};

const POLL: Duration = Duration::from_millis(20);
const CONNECT: Duration = Duration::from_secs(5);
/// Longer frames are no frames of ours.
const PAYLOAD_MAX: usize = 2 * SECTION_MAX;

/// Which channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// The control channel of any connection.
    Control,
    /// The data channel of this number.
    Data(u16),
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From the source to the destination.
    ToDestination,
    /// From the destination to the source.
    ToSource,
}

/// Which frame of a channel and direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// The k-th frame, from 0.
    Frame(u64),
    /// The n-th frame of a kind ([`kind`]), from 0.
    Kind(u16, u64),
    /// The same, counted over all connections of the channel.
    KindOfAll(u16, u64),
}

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The connection ends before the frame.
    Cut,
    /// The connection ends in the middle of the frame.
    CutWithin,
    /// The connection ends once the frame was passed on.
    CutAfter,
    /// Every connection ends once the frame was passed on: the link is down.
    LinkDownAfter,
    /// Every connection ends before the frame.
    LinkDown,
    /// The frame and those behind it wait so long.
    Delay(Duration),
    /// From here on nothing is passed on; the connection stays.
    Stall,
    /// From here on nothing is taken in, so that whoever sends fills the sockets and waits; the connection
    /// stays.
    Clog,
    /// The frame is left out.
    Drop,
    /// Bits of one byte of the frame are flipped; counted from its first byte, and round again when it is
    /// shorter.
    Corrupt {
        /// Which byte.
        byte: usize,
        /// What is xored onto it.
        mask: u8,
    },
}

/// A thing done wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// On this channel,
    pub channel: Channel,
    /// in this direction,
    pub direction: Direction,
    /// at this frame,
    pub at: At,
    /// this.
    pub action: Action,
}

/// The proxy; ends with all its connections when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: Address,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: Address,
    stop: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    struck: Vec<Fault>,
    seen: BTreeMap<(Channel, Direction, u16), u64>,
    open: Vec<Stream>,
    refusing: bool,
    /// Refuses from the moment so many faults have struck.
    refuse_after: Option<usize>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on `listen`; passes on to `target`.
    pub fn start(listen: &Address, target: &Address) -> Result<Self, ChannelError> {
        let listener = Listener::bind(listen)?;
        let address = listener.local_address().clone();
        let shared = Arc::new(Shared {
            target: target.clone(),
            stop: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// Where the source should connect to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Does one more thing wrong.
    pub fn add(&self, fault: Fault) {
        self.shared.state().faults.push(fault);
    }

    /// The faults that struck, in their order.
    pub fn struck(&self) -> Vec<Fault> {
        self.shared.state().struck.clone()
    }

    /// How many frames of a kind were seen, over all connections.
    pub fn seen(&self, channel: Channel, direction: Direction, kind: u16) -> u64 {
        self.shared.state().seen.get(&(channel, direction, kind)).copied().unwrap_or(0)
    }

    /// Every kind of frame that was seen, and how often, over all connections.
    pub fn all_seen(&self) -> BTreeMap<(Channel, Direction, u16), u64> {
        self.shared.state().seen.clone()
    }

    /// Waits until that many were seen; false when `limit` passes first.
    pub fn wait_seen(
        &self,
        channel: Channel,
        direction: Direction,
        kind: u16,
        count: u64,
        limit: Duration,
    ) -> bool {
        let few = |state: &mut State| {
            state.seen.get(&(channel, direction, kind)).copied().unwrap_or(0) < count
        };
        let wait = self.shared.changed.wait_timeout_while(self.shared.state(), limit, few);
        !wait.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Ends every connection.
    pub fn link_down(&self) {
        self.shared.link_down();
    }

    /// New connections are closed at once, or taken again.
    pub fn refuse(&self, refusing: bool) {
        let mut state = self.shared.state();
        state.refusing = refusing;
        state.refuse_after = None;
    }

    /// Takes no new connection any more from the moment so many faults have struck: the link stays down.
    pub fn refuse_after(&self, struck: usize) {
        self.shared.state().refuse_after = Some(struck);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.link_down();
        if let Some(acceptor) = self.acceptor.take() {
            // A panic there was printed there.
            let _ = acceptor.join();
        }
        self.shared.link_down();
        let threads = std::mem::take(&mut self.shared.state().threads);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link_down(&self) {
        let mut state = self.state();
        state.open.drain(..).for_each(|stream| stream.shutdown());
        self.changed.notify_all();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Counts a frame and says what is to be done with it.
    fn look(&self, place: Place, number: u64, kind: u16, of_kind: u64) -> Option<Action> {
        let mut state = self.state();
        let seen = state.seen.entry((place.channel, place.direction, kind)).or_default();
        let of_all = *seen;
        *seen += 1;
        self.changed.notify_all();
        let strikes = |fault: &Fault| {
            let at = match fault.at {
                At::Frame(k) => k == number,
                At::Kind(wanted, n) => wanted == kind && n == of_kind,
                At::KindOfAll(wanted, n) => wanted == kind && n == of_all,
            };
            at && fault.channel == place.channel && fault.direction == place.direction
        };
        let index = state.faults.iter().position(strikes)?;
        let fault = state.faults.remove(index);
        state.struck.push(fault);
        state.refusing |= state.refuse_after.is_some_and(|count| state.struck.len() >= count);
        Some(fault.action)
    }
}

#[derive(Clone, Copy)]
struct Place {
    channel: Channel,
    direction: Direction,
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    while !shared.stopped() {
        let Ok(Some(source)) = listener.accept_timeout(POLL) else { continue };
        if shared.state().refusing {
            source.shutdown();
            continue;
        }
        let serving = Arc::clone(shared);
        let thread = thread::spawn(move || serve(source, &serving));
        shared.state().threads.push(thread);
    }
}

fn serve(mut source: Stream, shared: &Arc<Shared>) {
    let Ok(kept) = source.try_clone() else { return };
    shared.state().open.push(kept);
    if shared.stopped() {
        source.shutdown();
    }
    let Some(first) = read_frame(&mut source) else { return source.shutdown() };
    let channel = match kind_of(&first.0) {
        kind::ATTACH => Channel::Data(u16::from_le_bytes([first.0[32], first.0[33]])),
        _ => Channel::Control,
    };
    let Ok(destination) = connect(&shared.target, CONNECT) else { return source.shutdown() };
    let clones = (source.try_clone(), destination.try_clone(), destination.try_clone());
    let (Ok(source_out), Ok(destination_in), Ok(kept)) = clones else {
        return source.shutdown();
    };
    shared.state().open.push(kept);
    if shared.stopped() {
        destination.shutdown();
    }
    let back_shared = Arc::clone(shared);
    let back = thread::spawn(move || {
        let place = Place { channel, direction: Direction::ToSource };
        pump(place, None, destination_in, source_out, &back_shared);
    });
    let place = Place { channel, direction: Direction::ToDestination };
    pump(place, Some(first), source, destination, shared);
    // A panic there was printed there.
    let _ = back.join();
}

/// Passes frames on until `from` closes, or a fault says so; then both are closed.
fn pump(
    place: Place,
    first: Option<Frame>,
    mut from: Stream,
    mut to: Stream,
    shared: &Arc<Shared>,
) {
    let mut number = 0;
    let mut kinds: BTreeMap<u16, u64> = BTreeMap::new();
    let mut next = first.or_else(|| read_frame(&mut from));
    while let Some((mut frame, files)) = next {
        let kind = kind_of(&frame);
        let of_kind = kinds.entry(kind).or_default();
        let action = shared.look(place, number, kind, *of_kind);
        *of_kind += 1;
        number += 1;
        match action {
            Some(Action::Cut) => break,
            Some(Action::LinkDown) => {
                shared.link_down();
                break;
            }
            Some(Action::CutWithin) => frame.truncate(frame.len() / 2),
            Some(Action::Delay(time)) => thread::sleep(time),
            Some(Action::Stall) => {
                stall(&mut from);
                break;
            }
            Some(Action::Clog) => {
                clog(&from);
                break;
            }
            Some(Action::Drop) => frame.clear(),
            Some(Action::Corrupt { byte, mask }) => {
                let len = frame.len();
                frame[byte % len] ^= mask;
            }
            Some(Action::CutAfter | Action::LinkDownAfter) | None => {}
        }
        if write_frame(&mut to, &frame, &files).is_err() {
            // It has closed. What it said before that is still on its way in the other direction, whose end ends both.
            return;
        }
        match action {
            Some(Action::CutWithin | Action::CutAfter) => break,
            Some(Action::LinkDownAfter) => {
                shared.link_down();
                break;
            }
            _ => {}
        }
        next = read_frame(&mut from);
    }
    from.shutdown();
    to.shutdown();
}

/// Takes in without passing on, until the connection ends.
fn stall(from: &mut Stream) {
    let mut waste = [0; 4096];
    while matches!(from.read(&mut waste), Ok(n) if n > 0) {}
}

/// Reads nothing until the connection ends.
fn clog(from: &Stream) {
    let mut poll = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    loop {
        // SAFETY: one pollfd of our own, of a stream that is held across the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
        // Only a signal is no end.
        if ready > 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// A frame's bytes, and the files that came with them.
type Frame = (Vec<u8>, Vec<OwnedFd>);

/// A whole frame as it is, damaged or not; `None` at the end, or where it cannot be a frame.
fn read_frame(from: &mut Stream) -> Option<Frame> {
    let mut files = Vec::new();
    let mut frame = vec![0; HEADER_LEN];
    fill(from, &mut frame, &mut files)?;
    let len = u32::from_le_bytes([frame[8], frame[9], frame[10], frame[11]]) as usize;
    if frame[..4] != MAGIC || len > PAYLOAD_MAX {
        return None;
    }
    frame.resize(HEADER_LEN + len, 0);
    fill(from, &mut frame[HEADER_LEN..], &mut files)?;
    Some((frame, files))
}

/// Never reads ahead: files of the next frame would come with this one.
fn fill(from: &mut Stream, mut target: &mut [u8], files: &mut Vec<OwnedFd>) -> Option<()> {
    if !from.carries_files() {
        return from.read_exact(target).ok();
    }
    while !target.is_empty() {
        let base = target.as_mut_ptr().cast();
        let mut part = [libc::iovec { iov_base: base, iov_len: target.len() }];
        // SAFETY: the range is borrowed for the call.
        match unsafe { receive_with_files(from, &mut part, files) } {
            Ok(0) => return None,
            Ok(read) => target = &mut target[read..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    Some(())
}

fn write_frame(to: &mut Stream, frame: &[u8], files: &[OwnedFd]) -> std::io::Result<()> {
    let mut sent = 0;
    if !files.is_empty() && !frame.is_empty() {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        sent = send_with_files(to, frame, &files, true)?;
    }
    to.write_all(&frame[sent..])
}

fn kind_of(frame: &[u8]) -> u16 {
    u16::from_le_bytes([frame[4], frame[5]])
}
