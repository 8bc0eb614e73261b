//! Is memory sooner there when it is compressed? The engine beside itself, without.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migration::channel::{
    BandwidthLimit, ChannelError, DataReceiver, DataSender, DataSink, DeviceFrame, Stream,
};
use migration::ram::{Codec, send_pages};
use migration::{DirtyBitmap, GuestMemory, RegionLayout, Section};
use switchover::message::{Attempt, Features};

use super::{Pair, tcp_pair};

/// What memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What does not compress.
    Noise,
    /// Programs and their data: this one's own file, again and again.
    Programs,
}

/// One kind of memory.
pub struct Bench {
    source: GuestMemory,
    dirty: DirtyBitmap,
    content: Content,
}

impl Bench {
    /// Memory of `bytes`.
    ///
    /// # Errors
    /// There is not enough memory, or the own program cannot be read.
    pub fn new(bytes: u64, content: Content) -> anyhow::Result<Self> {
        let layout = [RegionLayout { gpa: 0, len: bytes }];
        let source = GuestMemory::new(&layout)?;
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let block = match content {
            Content::Programs => std::fs::read(std::env::current_exe()?).context("own program")?,
            Content::Noise => (0..1 << 20)
                .flat_map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random.to_le_bytes()
                })
                .collect(),
        };
        for gpa in (0..bytes).step_by(block.len()) {
            let len = (block.len() as u64).min(bytes - gpa) as usize;
            source.write(gpa, &block[..len])?;
        }
        let mut dirty = DirtyBitmap::new(&layout);
        dirty.set_all();
        Ok(Self { source, dirty, content })
    }

    /// Compressed and not, in turn, `turns` times, over one channel of at most `limit` bytes per second (0: no limit).
    ///
    /// # Errors
    /// A socket failed, or what arrived is not what was sent.
    pub fn measure(&self, codec: Codec, limit: u64, turns: usize) -> anyhow::Result<Pair> {
        let destination = Arc::new(GuestMemory::new(&self.source.layout())?);
        for region in destination.layout() {
            destination.populate(region.gpa, region.len)?;
        }
        let mut times = Vec::new();
        let mut packed = 0.0;
        for _ in 0..turns {
            let (compressed, share) = self.run(&destination, Some(codec), limit)?;
            packed += share / turns as f64;
            times.push((compressed, self.run(&destination, None, limit)?.0));
        }
        let content = match self.content {
            Content::Noise => "noise",
            Content::Programs => "programs",
        };
        let limit = match limit {
            0 => "no limit".into(),
            limit => format!("{} MB/s", limit / 1_000_000),
        };
        let what = format!("{content}, {}, {limit}: {packed:.0} % compressed", codec.name());
        Ok(Pair::of(what, self.source.size_bytes(), &times))
    }

    /// A pass's time in ms until all of it is in memory there, and the percentage of pages that went compressed.
    fn run(
        &self,
        destination: &Arc<GuestMemory>,
        codec: Option<Codec>,
        limit: u64,
    ) -> anyhow::Result<(f64, f64)> {
        let features = Features {
            lz4: codec == Some(Codec::Lz4),
            zstd: codec == Some(Codec::Zstd),
            ..Features::default()
        };
        let (sending, receiving) = tcp_pair()?;
        let bandwidth = BandwidthLimit::default();
        bandwidth.set(limit);
        let sender = DataSender::new(Stream::from_tcp(sending, "source")?, features);
        let sender = sender.limited(bandwidth);
        let stream = Stream::from_tcp(receiving, "destination")?;
        let receiver = DataReceiver::new(stream, features, Arc::clone(destination));
        let totals = receiver.totals();
        let receiving = thread::spawn(move || receiver.run(&Nowhere));
        let start = Instant::now();
        let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let senders = std::slice::from_ref(&sender);
        let stats = send_pages(&self.source, &self.dirty, senders, &cancel, &progress)?;
        if !totals.wait_for(sender.totals(), Duration::from_secs(60)) {
            bail!("not everything that was sent arrived");
        }
        let took = start.elapsed();
        sender.shutdown();
        let _ = receiving.join();
        if migration::hash::memory_digest(&self.source)
            != migration::hash::memory_digest(destination)
        {
            bail!("what arrived is not what was sent");
        }
        let share = stats.packed_pages as f64 * 100.0 / stats.normal_pages.max(1) as f64;
        Ok((took.as_secs_f64() * 1e3, share))
    }
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
