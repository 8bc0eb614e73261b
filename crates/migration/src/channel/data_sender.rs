//! The source's end of a data channel: whole frames from many threads.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use switchover::Time;
use switchover::message::{Attempt, ChannelEnd, DeviceIndex, Features, Session};

use super::limit::BandwidthLimit;
use super::rate::{LinkMeter, RateSample, Sent};
use super::stream::IOVECS_MAX;
use super::{ChannelError, Stream};
use crate::clock;
use crate::ram::Codec;
use crate::vmm::Section;
use crate::wire::{DataClass, DeviceHead, FrameHeader, SectionHead, device_header, encode_section};
use crate::worth::Worth;

/// How long a destination may take nothing in from a data channel over TCP. Longer than on control: a
/// device that loads slowly holds its channel up, and whether the link is up is seen on control.
const STALL: Duration = Duration::from_secs(60);

/// Sends on one data channel; clones send on the same one.
#[derive(Clone, Debug)]
pub struct DataSender {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    stream: Stream,
    features: Features,
    /// Taken before `writing` and given back once that is held: whoever waits longest is next, and a
    /// thread that sends page after page cannot keep the others out.
    turn: Mutex<()>,
    /// Held while frames are written; false once a frame was cut short.
    writing: Mutex<Whole>,
    frames: AtomicU64,
    bytes: AtomicU64,
    link: LinkMeter,
    limit: BandwidthLimit,
    /// What compressing memory is worth here.
    worth: Mutex<Worth>,
    /// Its number among those that share the link.
    channel: u16,
}

#[derive(Debug)]
struct Whole(bool);

impl DataSender {
    /// Takes the sending direction of an attached stream; `features` are those both sides have.
    pub fn new(stream: Stream, features: Features) -> Self {
        Self::with_stall(stream, features, STALL)
    }

    /// As [`new`](Self::new): channel number `channel` of those that share `link`.
    pub fn sharing(stream: Stream, features: Features, link: &LinkMeter, channel: u16) -> Self {
        Self::build(stream, features, STALL, link.clone(), channel)
    }

    /// Sends no faster than `limit` says; before the first clone is made, else nothing happens.
    #[must_use]
    pub fn limited(mut self, limit: BandwidthLimit) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.limit = limit;
        }
        self
    }

    /// As [`new`](Self::new), with another limit than 60 s for a TCP peer that takes nothing in. On a UNIX
    /// socket there is no limit but [`shutdown`](Self::shutdown).
    pub fn with_stall(stream: Stream, features: Features, stall: Duration) -> Self {
        Self::build(stream, features, stall, LinkMeter::default(), 0)
    }

    fn build(
        stream: Stream,
        features: Features,
        stall: Duration,
        link: LinkMeter,
        channel: u16,
    ) -> Self {
        if let Err(error) = stream.set_user_timeout(stall) {
            // Writing will say what is wrong with the socket.
            tracing::debug!(channel = stream.label(), %error, "TCP_USER_TIMEOUT cannot be set");
        }
        let inner = Inner {
            stream,
            features,
            turn: Mutex::new(()),
            writing: Mutex::new(Whole(true)),
            frames: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            link,
            limit: BandwidthLimit::default(),
            worth: Mutex::default(),
            channel,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Sends `data` (at most [`FRAME_DEVICE_MAX`](crate::wire::FRAME_DEVICE_MAX) bytes) of a device's stream,
    /// which stands at `offset`. Blocks while the other side takes nothing in. Answers the checksum of `data`
    /// where one went along.
    pub fn send_device(
        &self,
        device: DeviceIndex,
        session: Session,
        class: DataClass,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<u32>, ChannelError> {
        let head = DeviceHead { device, session, class, offset };
        let header = device_header(&head, data, self.inner.features.device_checksum);
        let header = header.map_err(|e| self.inner.stream.wire_error(e))?;
        self.send_frame(&header, &[data])?;
        Ok(header.payload_checksum)
    }

    /// Sends one section of the machine state, with a checksum.
    pub fn send_section(
        &self,
        attempt: Attempt,
        index: u32,
        section: &Section,
    ) -> Result<(), ChannelError> {
        let encoded = encode_section(SectionHead { attempt, index }, section);
        let (header, names) = encoded.map_err(|e| self.inner.stream.wire_error(e))?;
        self.send_frame(&header, &[&names, &section.payload])
    }

    /// Frames and bytes sent so far, headers included.
    pub fn totals(&self) -> ChannelEnd {
        let frames = self.inner.frames.load(Ordering::Acquire);
        ChannelEnd { frames, bytes: self.inner.bytes.load(Ordering::Acquire) }
    }

    /// Takes the samples of the link's rate since the last call, oldest first. Channels that share a link share
    /// its samples.
    pub fn take_rate_samples(&self) -> Vec<RateSample> {
        self.inner.link.take()
    }

    /// What both sides can do.
    pub fn features(&self) -> Features {
        self.inner.features
    }

    /// How the next pages are to be compressed, if they are.
    pub(crate) fn codec(&self) -> Option<Codec> {
        let codec = Codec::of(self.inner.features)?;
        let worth = self.inner.worth.lock().unwrap_or_else(PoisonError::into_inner);
        worth.is_special(self.inner.limit.is_lifted()).then_some(codec)
    }

    /// So many bytes of pages took so long, compressing included where they were.
    pub(crate) fn note_pages(&self, packed: bool, bytes: u64, took: Time) {
        if Codec::of(self.inner.features).is_some() && !self.inner.limit.is_lifted() {
            let mut worth = self.inner.worth.lock().unwrap_or_else(PoisonError::into_inner);
            worth.note(packed, bytes, took.0);
        }
    }

    /// The channel's name, for messages.
    pub fn label(&self) -> &str {
        self.inner.stream.label()
    }

    /// Ends the channel; whoever is sending returns with an error.
    pub fn shutdown(&self) {
        self.inner.stream.shutdown();
    }

    fn send_frame(&self, header: &FrameHeader, payload: &[&[u8]]) -> Result<(), ChannelError> {
        let header = header.encode();
        let mut batch = Batch::default();
        batch.push_frame();
        batch.push(&header);
        payload.iter().for_each(|part| batch.push(part));
        // SAFETY: the slices are borrowed until after the call.
        unsafe { self.send(&mut batch) }
    }

    /// Sends whole frames, and empties the batch.
    ///
    /// # Safety
    ///
    /// Every range of the batch is mapped and readable until this returns. Its bytes may change meanwhile.
    pub(crate) unsafe fn send(&self, batch: &mut Batch) -> Result<(), ChannelError> {
        let inner = &*self.inner;
        // Before the turn: what has to wait for nothing is not kept behind.
        let began = clock::now();
        inner.limit.take(batch.bytes);
        let waited = clock::now().since(began);
        let turn = inner.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whole = inner.writing.lock().unwrap_or_else(PoisonError::into_inner);
        drop(turn);
        if !whole.0 {
            return Err(ChannelError::ShutDown { channel: inner.stream.label().to_owned() });
        }
        // Waiting for the limit is time of sending, waiting for others is not.
        let began = Time(clock::now().0.saturating_sub(waited.0));
        // SAFETY: the caller's promise.
        let full = match unsafe { inner.write_all(&mut batch.iovecs) } {
            Ok(full) => full,
            Err(source) => {
                whole.0 = false;
                return Err(inner.stream.io_error("write", source));
            }
        };
        inner.bytes.fetch_add(batch.bytes, Ordering::AcqRel);
        inner.frames.fetch_add(batch.frames, Ordering::AcqRel);
        let (channel, ended) = (inner.channel, clock::now());
        inner.link.note(Sent { channel, began, ended, bytes: batch.bytes, full });
        batch.clear();
        Ok(())
    }
}

impl Inner {
    /// Answers when the socket was full for the first time, and how many bytes went out after that.
    ///
    /// # Safety
    ///
    /// As [`DataSender::send`].
    unsafe fn write_all(&self, mut iovecs: &mut [libc::iovec]) -> io::Result<Option<(Time, u64)>> {
        let mut full: Option<(Time, u64)> = None;
        loop {
            iovecs = skip_empty(iovecs);
            if iovecs.is_empty() {
                break;
            }
            // Waits only once the socket said that it is full, so that this moment is known.
            let wait = if full.is_some() { 0 } else { libc::MSG_DONTWAIT };
            // SAFETY: msghdr is plain data, for which zeroes are valid.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs.as_mut_ptr();
            message.msg_iovlen = iovecs.len().min(IOVECS_MAX) as _;
            let flags = libc::MSG_NOSIGNAL | wait;
            // SAFETY: the caller's promise for the ranges; `message` lives across the call.
            let sent = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &raw const message, flags) };
            let Ok(sent) = usize::try_from(sent) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock if full.is_none() => {
                        full = Some((clock::now(), 0));
                        continue;
                    }
                    _ => return Err(error),
                }
            };
            if let Some((_, bytes)) = &mut full {
                *bytes += sent as u64;
            }
            iovecs = advance(iovecs, sent);
        }
        Ok(full)
    }
}

/// Whole frames that are sent together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    iovecs: Vec<libc::iovec>,
    frames: u64,
    bytes: u64,
}

// SAFETY: the pointers are only followed in `DataSender::send`, whose caller vouches for them.
unsafe impl Send for Batch {}

impl Batch {
    /// A frame begins with the next range.
    pub(crate) fn push_frame(&mut self) {
        self.frames += 1;
    }

    pub(crate) fn push(&mut self, part: &[u8]) {
        self.push_raw(part.as_ptr(), part.len());
    }

    pub(crate) fn push_raw(&mut self, address: *const u8, len: usize) {
        self.iovecs.push(libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len });
        self.bytes += len as u64;
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn clear(&mut self) {
        self.iovecs.clear();
        (self.frames, self.bytes) = (0, 0);
    }
}

fn skip_empty(iovecs: &mut [libc::iovec]) -> &mut [libc::iovec] {
    let empty = iovecs.iter().take_while(|iovec| iovec.iov_len == 0).count();
    &mut iovecs[empty..]
}

fn advance(iovecs: &mut [libc::iovec], mut sent: usize) -> &mut [libc::iovec] {
    let mut done = 0;
    for iovec in iovecs.iter_mut() {
        let part = sent.min(iovec.iov_len);
        iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(part).cast();
        iovec.iov_len -= part;
        sent -= part;
        if iovec.iov_len > 0 {
            break;
        }
        done += 1;
    }
    &mut iovecs[done..]
}
