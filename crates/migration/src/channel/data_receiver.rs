//! The destination's end of a data channel.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use switchover::message::{Attempt, ChannelEnd, DeviceIndex, Features, Session};

use super::payload::{Payload, Payloads};
use super::reader::{FrameReader, READ_AHEAD_BYTES};
use super::{ChannelError, Stream};
use crate::cost::Held;
use crate::memory::GuestMemory;
use crate::ram::{Codec, Population, RamReceiver, Unpacker};
use crate::vmm::Section;
use crate::wire::{
    DataClass, DeviceHead, FrameHeader, HEADER_LEN, RamRange, WireError, decode_section, kind,
};

/// Takes in what is not RAM. Called from the threads of all data channels; an error ends the channel.
/// To block is back-pressure: the source's sending waits.
pub trait DataSink: Send + Sync {
    /// Bytes of a device's stream. A device's frames come in order, on one channel.
    fn device(&self, frame: DeviceFrame) -> Result<(), ChannelError>;
    /// A section of the machine state.
    fn section(&self, attempt: Attempt, index: u32, section: Section) -> Result<(), ChannelError>;
}

/// Bytes of a device's stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFrame {
    /// The device, as the peer claims it.
    pub device: DeviceIndex,
    /// Its session.
    pub session: Session,
    /// The source's class.
    pub class: DataClass,
    /// Where in the session's stream they belong.
    pub offset: u64,
    /// The checksum of the bytes, where the frame carried one and they have it.
    pub checksum: Option<u32>,
    /// The bytes.
    pub data: Payload,
}

/// What arrived on a channel. Counts a frame when its payload is in memory, or the sink has taken it.
#[derive(Debug, Default)]
pub struct ReceivedTotals {
    frames: AtomicU64,
    bytes: AtomicU64,
    ram_bytes: AtomicU64,
    /// Somebody waits in [`wait_for`](Self::wait_for): then every frame is told of.
    waiting: AtomicU64,
    lock: Mutex<()>,
    arrived: Condvar,
    /// Held while a frame is taken in; true once none is taken any more.
    sealed: Mutex<bool>,
    /// With so many frames here, `told` is called.
    awaited: AtomicU64,
    told: OnceLock<Told>,
}

/// Somebody who is told.
struct Told(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Told")
    }
}

impl ReceivedTotals {
    /// Who is told when what [`await_frames`](Self::await_frames) names is here; called from the thread of the
    /// channel, between two frames.
    pub(crate) fn on_arrival(&self, told: impl Fn() + Send + Sync + 'static) {
        // There is one per channel.
        let _ = self.told.set(Told(Box::new(told)));
    }

    /// From now on the arrival of so many frames is told of. Whoever asks looks himself whether they are here
    /// already.
    pub(crate) fn await_frames(&self, frames: u64) {
        self.awaited.store(frames.max(1), Ordering::SeqCst);
    }

    /// No frame is taken in from here on: nothing of this channel is written to memory any more. Waits for a
    /// frame that is just being taken in, which ends at once where the stream was shut down.
    pub(crate) fn seal(&self) {
        *self.sealed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Told outside of the frame: whoever is told may seal the channel.
    fn tell(&self) {
        let awaited = self.awaited.load(Ordering::SeqCst);
        if awaited != 0
            && self.frames.load(Ordering::SeqCst) >= awaited
            && self.awaited.swap(0, Ordering::SeqCst) != 0
            && let Some(told) = self.told.get()
        {
            told.0();
        }
    }

    /// Frames and bytes, headers included; what the source's StateEnd is compared with.
    pub fn end(&self) -> ChannelEnd {
        let frames = self.frames.load(Ordering::Acquire);
        ChannelEnd { frames, bytes: self.bytes.load(Ordering::Acquire) }
    }

    /// Frames.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Acquire)
    }

    /// Bytes, headers included.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Bytes of pages written to memory; zero pages are none.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes.load(Ordering::Acquire)
    }

    /// Waits for the end mark of a channel: true as soon as exactly so much has arrived, false when more
    /// has, or when `limit` passes.
    pub fn wait_for(&self, end: ChannelEnd, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.frames.load(Ordering::SeqCst) < end.frames {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let wait = self.arrived.wait_timeout(guard, left);
            guard = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(guard);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.end() == end
    }

    fn count(&self, header: &FrameHeader) {
        match header.kind {
            kind::RAM_PAGES => self.ram_bytes.fetch_add(header.length.into(), Ordering::AcqRel),
            kind::RAM_PACKED => self.ram_bytes.fetch_add(header.b, Ordering::AcqRel),
            _ => 0,
        };
        let bytes = HEADER_LEN as u64 + u64::from(header.length);
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        // Last: who sees all frames sees all bytes.
        self.frames.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // The lock: whoever waits has either seen the frame, or hears of it.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.arrived.notify_all();
        }
    }
}

/// Receives on one data channel.
#[derive(Debug)]
pub struct DataReceiver {
    reader: FrameReader,
    features: Features,
    ram: RamReceiver,
    unpacker: Unpacker,
    packed: Vec<u8>,
    payloads: Payloads,
    totals: Arc<ReceivedTotals>,
    /// What the frame that is taken in, and the buffers of those before, take.
    held: Held,
    buffers: u64,
}

impl DataReceiver {
    /// Takes the receiving direction of an attached stream; `features` are those both sides have.
    pub fn new(stream: Stream, features: Features, memory: Arc<GuestMemory>) -> Self {
        Self {
            reader: FrameReader::new(stream, None),
            features,
            ram: RamReceiver::new(memory),
            unpacker: Unpacker::default(),
            packed: Vec::new(),
            payloads: Payloads::default(),
            totals: Arc::default(),
            held: Held::default(),
            buffers: READ_AHEAD_BYTES as u64,
        }
    }

    /// Memory is populated by `population`, which the receivers of a migration share, before it is written.
    #[must_use]
    pub fn populating(mut self, population: Arc<Population>) -> Self {
        self.ram.populate(population);
        self
    }

    /// What arrived so far; stays readable while and after [`run`](Self::run).
    pub fn totals(&self) -> Arc<ReceivedTotals> {
        Arc::clone(&self.totals)
    }

    /// Receives until the source ends the channel between two frames (`Ok`), or an error. A clone of the
    /// stream, shut down, ends it too.
    pub fn run(mut self, sink: &dyn DataSink) -> Result<(), ChannelError> {
        let totals = Arc::clone(&self.totals);
        self.held = Held::new(self.buffers);
        self.payloads.count(Held::new(0));
        while let Some(header) = self.reader.header()? {
            let sealed = totals.sealed.lock().unwrap_or_else(PoisonError::into_inner);
            if *sealed {
                let channel = self.reader.stream().label().to_owned();
                return Err(ChannelError::ShutDown { channel });
            }
            match header.kind {
                // It is the source's own memory, in which its guest runs.
                kind @ (kind::RAM_PAGES | kind::RAM_ZERO | kind::RAM_PACKED)
                    if self.features.local =>
                {
                    let what = "memory that was handed over is not written";
                    return Err(self.wire(crate::wire::field(kind, what)));
                }
                kind::RAM_PAGES => self.ram_pages(&header)?,
                kind::RAM_ZERO => self.ram_zero(&header)?,
                kind::RAM_PACKED => self.ram_packed(&header)?,
                kind::DEVICE => self.device(&header, sink)?,
                kind::SECTION => self.section(&header, sink)?,
                _ if !header.is_known() => self.reader.skip(header.length as usize)?,
                kind => return Err(self.wire(WireError::WrongChannel { kind, channel: "data" })),
            }
            totals.count(&header);
            drop(sealed);
            totals.tell();
        }
        Ok(())
    }

    fn ram_pages(&mut self, header: &FrameHeader) -> Result<(), ChannelError> {
        let range = RamRange::decode(header).map_err(|e| self.wire(e))?;
        let target = self.ram.target(range).map_err(|source| self.memory(source))?;
        let len = range.len as usize;
        if header.payload_checksum.is_none() && !self.features.ram_checksum {
            // SAFETY: `target` is a whole range of guest memory, which nobody holds references into; a
            // guest that is being loaded does not run.
            return unsafe { self.reader.payload_to(target, len) };
        }
        // Checked before it touches memory.
        let mut pages = self.ram.take_buffer(len);
        self.grew();
        self.reader.payload_into(&mut pages)?;
        header.check_payload(&pages, self.features.ram_checksum).map_err(|e| self.wire(e))?;
        self.ram.write(range, &pages).map_err(|source| self.memory(source))?;
        self.ram.keep_buffer(pages);
        Ok(())
    }

    /// Unpacked whole before it touches memory: into no more than the header says, which is at most a block.
    fn ram_packed(&mut self, header: &FrameHeader) -> Result<(), ChannelError> {
        let range = RamRange::decode(header).map_err(|e| self.wire(e))?;
        let agreed = Codec::of(self.features);
        let Some(codec) = Codec::numbered(header.c).filter(|codec| agreed == Some(*codec)) else {
            let what = format!("compression number {} was not agreed on", header.c);
            return Err(self.wire(crate::wire::field(header.kind, what)));
        };
        self.packed.resize(header.length as usize, 0);
        self.grew();
        self.reader.payload_into(&mut self.packed)?;
        let checksum = self.features.ram_checksum;
        header.check_payload(&self.packed, checksum).map_err(|e| self.wire(e))?;
        let mut pages = self.ram.take_buffer(range.len as usize);
        self.grew();
        self.unpacker.unpack(codec, &self.packed, &mut pages).map_err(|what| {
            let what = format!("pages at {:#x}, {}: {what}", range.gpa, codec.name());
            self.wire(crate::wire::field(header.kind, what))
        })?;
        self.ram.target(range).map_err(|source| self.memory(source))?;
        self.ram.write(range, &pages).map_err(|source| self.memory(source))?;
        self.ram.keep_buffer(pages);
        Ok(())
    }

    fn ram_zero(&mut self, header: &FrameHeader) -> Result<(), ChannelError> {
        let range = RamRange::decode(header).map_err(|e| self.wire(e))?;
        self.ram.zero(range).map_err(|source| self.memory(source))
    }

    fn device(&mut self, header: &FrameHeader, sink: &dyn DataSink) -> Result<(), ChannelError> {
        let head = DeviceHead::decode(header).map_err(|e| self.wire(e))?;
        let mut data = self.payloads.take(header.length as usize);
        self.reader.payload_into(data.as_mut())?;
        header.check_payload(&data, self.features.device_checksum).map_err(|e| self.wire(e))?;
        let DeviceHead { device, session, class, offset } = head;
        let checksum = header.payload_checksum;
        sink.device(DeviceFrame { device, session, class, offset, checksum, data })
    }

    fn section(&mut self, header: &FrameHeader, sink: &dyn DataSink) -> Result<(), ChannelError> {
        self.held.set(self.buffers + u64::from(header.length));
        let payload = self.reader.payload(header.length as usize)?;
        let (head, section) = decode_section(header, payload).map_err(|e| self.wire(e))?;
        let taken = sink.section(head.attempt, head.index, section);
        self.held.set(self.buffers);
        taken
    }

    /// Buffers that are kept only grow.
    fn grew(&mut self) {
        let kept = (self.packed.capacity() + self.ram.buffer_bytes()) as u64;
        self.buffers = READ_AHEAD_BYTES as u64 + kept;
        self.held.set(self.buffers);
    }

    fn wire(&self, error: WireError) -> ChannelError {
        self.reader.stream().wire_error(error)
    }

    fn memory(&self, source: crate::MemoryError) -> ChannelError {
        let channel = self.reader.stream().label().to_owned();
        ChannelError::Memory { channel, source }
    }
}
