//! Passes over memory.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, bail};
use migration::channel::{
    ChannelError, DataReceiver, DataSender, DataSink, DeviceFrame, ReceivedTotals, Stream,
};
use migration::ram::send_pages;
use migration::wire::RAM_BLOCK;
use migration::{DirtyBitmap, GuestMemory, PAGE_SIZE, RegionLayout, Section};
use switchover::message::{Attempt, Features};

use super::{Pair, tcp_pair};
use crate::cpu;

/// Bytes the baseline sends in one go.
const WRITE_BYTES: u64 = 512 << 10;
/// Most iovecs of one call.
const IOVECS_MAX: usize = 512;

/// What a pass finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Everything, of what does not compress: a first pass.
    Full,
    /// So many pages of a hundred, scattered.
    Dirty(u64),
    /// Everything, and nine pages of ten are zero.
    ZeroHeavy,
    /// Nothing.
    Idle,
}

impl Load {
    /// Its name.
    pub fn name(self) -> String {
        match self {
            Self::Full => "all, incompressible".into(),
            Self::Dirty(percent) => format!("{percent} % dirty"),
            Self::ZeroHeavy => "all, 90 % zero pages".into(),
            Self::Idle => "nothing dirty".into(),
        }
    }
}

/// Two memories, the source's filled and the destination's populated.
pub struct Bench {
    source: Arc<GuestMemory>,
    /// Written before, unless zero pages are looked at: then fresh for each run.
    destination: Mutex<Arc<GuestMemory>>,
    dirty: DirtyBitmap,
    load: Load,
}

impl Bench {
    /// Fills and populates.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(bytes: u64, load: Load) -> anyhow::Result<Self> {
        let layout = [RegionLayout { gpa: 0, len: bytes }];
        let source = Arc::new(GuestMemory::new(&layout)?);
        let destination = Arc::new(GuestMemory::new(&layout)?);
        let mut dirty = DirtyBitmap::new(&layout);
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut page = vec![0u8; PAGE_SIZE as usize];
        let zeros = page.clone();
        for gpa in (0..bytes).step_by(PAGE_SIZE as usize) {
            let is_zero = load == Load::ZeroHeavy && next() % 10 != 0;
            if !is_zero {
                page.chunks_exact_mut(8)
                    .for_each(|word| word.copy_from_slice(&next().to_le_bytes()));
            }
            source.write(gpa, if is_zero { &zeros } else { &page })?;
            if load != Load::ZeroHeavy {
                destination.write(gpa, &[1; 8])?;
            }
            let is_dirty = match load {
                Load::Full | Load::ZeroHeavy => true,
                Load::Dirty(percent) => next() % 100 < percent,
                Load::Idle => false,
            };
            if is_dirty {
                dirty.set_range(gpa, PAGE_SIZE);
            }
        }
        Ok(Self { source, destination: Mutex::new(destination), dirty, load })
    }

    /// Both in turn, `turns` times, over `channels` connections.
    ///
    /// # Errors
    /// A socket failed, or what arrived is not what was sent.
    pub fn measure(&self, channels: usize, turns: usize) -> anyhow::Result<Pair> {
        let runs = self.runs(channels);
        let bytes = runs.iter().flatten().map(|run| run.1).sum();
        // Once each, unmeasured: sockets and tables grow to their size.
        self.engine(channels)?;
        self.baseline(&runs)?;
        let mut times = Vec::new();
        for _ in 0..turns {
            let engine = self.engine(channels)?;
            self.check()?;
            times.push((engine, self.baseline(&runs)?));
        }
        let channels = if channels == 1 { "1 channel" } else { &format!("{channels} channels") };
        Ok(Pair::of(format!("{}, {channels}", self.load.name()), bytes, &times))
    }

    /// The engine's pass, in ms: from the start of sending until all of it is in memory there.
    fn engine(&self, channels: usize) -> anyhow::Result<f64> {
        self.spoil()?;
        let features = Features { device_checksum: true, telemetry: true, ..Features::default() };
        let (mut senders, mut totals, mut receivers) = (Vec::new(), Vec::new(), Vec::new());
        for channel in 0..channels {
            let (sending, receiving) = tcp_pair()?;
            senders.push(DataSender::new(Stream::from_tcp(sending, "source")?, features));
            let stream = Stream::from_tcp(receiving, "destination")?;
            let receiver = DataReceiver::new(stream, features, self.destination());
            totals.push(receiver.totals());
            receivers.push(thread::spawn(move || {
                pin_receiver(channels, channel);
                receiver.run(&Nowhere)
            }));
        }
        // After the receivers have seen what was fresh, as at a destination.
        self.populate()?;
        let start = Instant::now();
        let sent = thread::scope(|scope| {
            let pass = scope.spawn(|| {
                pin_sender(channels, 0);
                let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
                send_pages(&self.source, &self.dirty, &senders, &cancel, &progress)
            });
            pass.join()
        });
        match sent {
            Ok(stats) => drop(stats?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let ends: Vec<_> = senders.iter().map(DataSender::totals).collect();
        let arrived = |(totals, end): (&Arc<ReceivedTotals>, _)| {
            totals.wait_for(end, std::time::Duration::from_secs(30))
        };
        if !totals.iter().zip(ends).all(arrived) {
            bail!("not everything that was sent arrived");
        }
        let took = start.elapsed();
        senders.iter().for_each(DataSender::shutdown);
        for receiver in receivers {
            let _ = receiver.join();
        }
        Ok(took.as_secs_f64() * 1e3)
    }

    /// What is to be sent on each connection: runs (offset, bytes), as the engine divides memory.
    fn runs(&self, channels: usize) -> Vec<Vec<(u64, u64)>> {
        let mut runs = vec![Vec::new(); channels];
        for (_, first, pages) in self.dirty.runs(RAM_BLOCK / PAGE_SIZE) {
            for page in first..first + pages {
                let gpa = page * PAGE_SIZE;
                let mut word = [0; 8];
                let is_zero = self.load == Load::ZeroHeavy
                    && self.source.read(gpa, &mut word).is_ok()
                    && word == [0; 8];
                if is_zero {
                    continue;
                }
                let list = &mut runs[(gpa / RAM_BLOCK) as usize % channels];
                match list.last_mut() {
                    Some((start, len))
                        if *start + *len == gpa && !gpa.is_multiple_of(RAM_BLOCK) =>
                    {
                        *len += PAGE_SIZE;
                    }
                    _ => list.push((gpa, PAGE_SIZE)),
                }
            }
        }
        runs
    }

    /// The baseline's time in ms.
    fn baseline(&self, runs: &[Vec<(u64, u64)>]) -> anyhow::Result<f64> {
        self.spoil()?;
        self.populate()?;
        let channels = runs.len();
        let mut ends = Vec::new();
        for _ in 0..channels {
            ends.push(tcp_pair()?);
        }
        let start = Instant::now();
        thread::scope(|scope| -> anyhow::Result<()> {
            let mut threads = Vec::new();
            for (channel, (sending, receiving)) in ends.into_iter().enumerate() {
                let runs = &runs[channel];
                threads.push(scope.spawn(move || {
                    pin_sender(channels, channel);
                    self.send_runs(channel, channels, runs, sending)
                }));
                threads.push(scope.spawn(move || {
                    pin_receiver(channels, channel);
                    self.receive_runs(runs, receiving)
                }));
            }
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    fn send_runs(
        &self,
        channel: usize,
        channels: usize,
        runs: &[(u64, u64)],
        socket: TcpStream,
    ) -> anyhow::Result<()> {
        if self.load == Load::ZeroHeavy {
            self.read_all(channel, channels)?;
        }
        let mut batch: Vec<libc::iovec> = Vec::new();
        let mut bytes = 0;
        for (gpa, len) in runs {
            let mut done = 0;
            while done < *len {
                let part = (len - done).min(WRITE_BYTES - bytes);
                let address = self.source.untracked_addr(gpa + done, part)?;
                batch.push(libc::iovec {
                    iov_base: address.as_ptr().cast(),
                    iov_len: part as usize,
                });
                done += part;
                bytes += part;
                if bytes == WRITE_BYTES || batch.len() == IOVECS_MAX {
                    all(&mut batch, |iov| vector(libc::SYS_writev, &socket, iov))?;
                    bytes = 0;
                }
            }
        }
        all(&mut batch, |iov| vector(libc::SYS_writev, &socket, iov))?;
        Ok(())
    }

    /// To know a zero page one has to read it: that much the baseline does too, at the speed of memory.
    fn read_all(&self, channel: usize, channels: usize) -> anyhow::Result<()> {
        let size = self.source.size_bytes();
        for gpa in (0..size).step_by(RAM_BLOCK as usize) {
            if (gpa / RAM_BLOCK) as usize % channels != channel {
                continue;
            }
            let len = RAM_BLOCK.min(size - gpa);
            let words = self.source.untracked_addr(gpa, len)?.cast::<u64>();
            // SAFETY: whole words of a mapping that nobody writes meanwhile.
            let words = unsafe { std::slice::from_raw_parts(words.as_ptr(), len as usize / 8) };
            std::hint::black_box(words.iter().fold(0, |all, word| all | word));
        }
        Ok(())
    }

    fn receive_runs(&self, runs: &[(u64, u64)], socket: TcpStream) -> anyhow::Result<()> {
        let destination = self.destination();
        let mut batch: Vec<libc::iovec> = Vec::new();
        for (gpa, len) in runs {
            let address = destination.untracked_addr(*gpa, *len)?;
            batch.push(libc::iovec { iov_base: address.as_ptr().cast(), iov_len: *len as usize });
            if batch.len() == IOVECS_MAX {
                all(&mut batch, |iov| vector(libc::SYS_readv, &socket, iov))?;
            }
        }
        all(&mut batch, |iov| vector(libc::SYS_readv, &socket, iov))
    }

    fn destination(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.destination.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Pages of the destination that are wrong, so that a pass that did nothing would show; or fresh memory, where it
    /// matters that zero pages are zero already, which differs from the source as well.
    fn spoil(&self) -> anyhow::Result<()> {
        if self.load == Load::ZeroHeavy {
            let mut destination = self.destination.lock().unwrap_or_else(PoisonError::into_inner);
            let layout = destination.layout();
            // The old goes first: both may be more than there is.
            *destination = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, len: PAGE_SIZE }])?);
            *destination = Arc::new(GuestMemory::new(&layout)?);
            return Ok(());
        }
        let destination = self.destination();
        for (_, first, _) in self.dirty.runs(64) {
            destination.write(first * PAGE_SIZE + 16, &[0xa5; 8])?;
        }
        Ok(())
    }

    /// Fresh memory becomes memory that the host has given; the content stays.
    fn populate(&self) -> anyhow::Result<()> {
        if self.load == Load::ZeroHeavy {
            let destination = self.destination();
            for region in destination.layout() {
                destination.populate(region.gpa, region.len)?;
            }
        }
        Ok(())
    }

    /// Every page that was dirty is the source's.
    fn check(&self) -> anyhow::Result<()> {
        let destination = self.destination();
        let (mut here, mut there) = (vec![0u8; PAGE_SIZE as usize], vec![0u8; PAGE_SIZE as usize]);
        for (_, page, _) in self.dirty.runs(1) {
            self.source.read(page * PAGE_SIZE, &mut here)?;
            destination.read(page * PAGE_SIZE, &mut there)?;
            if here != there {
                bail!("page {page} is not what was sent");
            }
        }
        Ok(())
    }
}

/// With one channel, sender and receiver have a CPU each; with more, the kernel places them, as it does
/// for the engine's own threads.
fn pin_sender(channels: usize, _channel: usize) {
    if channels == 1 {
        let _ = cpu::pin(0);
    }
}

fn pin_receiver(channels: usize, _channel: usize) {
    if channels == 1 {
        let _ = cpu::pin(1);
    }
}

fn vector(call: libc::c_long, socket: &TcpStream, iovecs: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the iovecs are ranges of mapped guest memory.
    let done = unsafe { libc::syscall(call, socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len()) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Everything that the iovecs name, in as many calls as it takes.
fn all(
    iovecs: &mut Vec<libc::iovec>,
    mut call: impl FnMut(&[libc::iovec]) -> io::Result<usize>,
) -> anyhow::Result<()> {
    let mut first = 0;
    while first < iovecs.len() {
        let mut done = call(&iovecs[first..]).context("baseline")?;
        if done == 0 {
            bail!("baseline: the connection ended early");
        }
        while done > 0 {
            let iovec = &mut iovecs[first];
            let part = done.min(iovec.iov_len);
            // SAFETY: stays inside the range, or right behind its end.
            iovec.iov_base = unsafe { iovec.iov_base.cast::<u8>().add(part).cast() };
            iovec.iov_len -= part;
            done -= part;
            if iovec.iov_len == 0 {
                first += 1;
            }
        }
    }
    iovecs.clear();
    Ok(())
}

/// There is nothing but RAM.
struct Nowhere;

impl DataSink for Nowhere {
    fn device(&self, _: DeviceFrame) -> Result<(), ChannelError> {
        Ok(())
    }

    fn section(&self, _: Attempt, _: u32, _: Section) -> Result<(), ChannelError> {
        Ok(())
    }
}
