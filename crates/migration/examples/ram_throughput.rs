//! How fast memory is sent, found to be zero, and hashed, in this process alone: a sanity check, not a benchmark.
//!
//! `cargo run --release -p migration --example ram_throughput [MiB] [channels]`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::{Duration, Instant};

use migration::channel::{
    Address, ChannelError, DataReceiver, DataSender, DataSink, DeviceFrame, Listener, connect,
};
use migration::hash::{hex, memory_digest};
use migration::ram::{RamStats, send_pages};
use migration::{DirtyBitmap, GuestMemory, PAGE_SIZE, RegionLayout, Section};
use switchover::message::{Attempt, Features};

const LIMIT: Duration = Duration::from_secs(10);

struct NoSink;

impl DataSink for NoSink {
    fn device(&self, _: DeviceFrame) -> Result<(), ChannelError> {
        Err(ChannelError::sink("only memory is sent here"))
    }
    fn section(&self, _: Attempt, _: u32, _: Section) -> Result<(), ChannelError> {
        Err(ChannelError::sink("only memory is sent here"))
    }
}

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let mib = arguments.next().transpose()?.unwrap_or(512);
    let channels = arguments.next().transpose()?.unwrap_or(1);
    let dir = std::env::temp_dir().join(format!("vmferry-throughput-{}", std::process::id()));
    let addresses = [Address::Unix(dir), "tcp:127.0.0.1:0".parse()?];
    for address in addresses {
        for ram_checksum in [false, true] {
            let features = Features { ram_checksum, ..Features::default() };
            println!("{address}, {mib} MiB, {channels} channels, checksums: {ram_checksum}");
            measure(&address, mib << 20, channels, features)?;
        }
    }
    Ok(())
}

fn measure(address: &Address, bytes: u64, channels: u64, features: Features) -> Result<(), Error> {
    let layout = [RegionLayout { gpa: 0, len: bytes }];
    let source = GuestMemory::new(&layout)?;
    let destination = Arc::new(GuestMemory::new(&layout)?);
    let listener = Listener::bind(address)?;
    let (mut senders, mut receivers) = (vec![], vec![]);
    for _ in 0..channels {
        senders.push(DataSender::new(connect(listener.local_address(), LIMIT)?, features));
        let stream = listener.accept_timeout(LIMIT)?.ok_or("nobody connected")?;
        let receiver = DataReceiver::new(stream, features, Arc::clone(&destination));
        receivers.push(thread::spawn(move || receiver.run(&NoSink)));
    }
    let mut all = DirtyBitmap::new(&layout);
    all.set_all();
    let mut scattered = DirtyBitmap::new(&layout);
    (0..bytes / PAGE_SIZE).step_by(2).for_each(|page| {
        scattered.set_range(page * PAGE_SIZE, PAGE_SIZE);
    });
    pass("holes", &source, &all, &senders)?;
    let block: Vec<u8> =
        (0..2 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    (0..bytes).step_by(2 << 20).try_for_each(|gpa| source.write(gpa, &block))?;
    pass("first time (destination allocates)", &source, &all, &senders)?;
    pass("all pages again", &source, &all, &senders)?;
    pass("every other page", &source, &scattered, &senders)?;
    let start = Instant::now();
    let digest = memory_digest(&source);
    rate("digest", bytes, start);
    if digest != memory_digest(&destination) {
        return Err(format!("memory differs from {}", hex(&digest)).into());
    }
    (0..bytes).step_by(2 << 20).try_for_each(|gpa| source.write(gpa, &vec![0; 2 << 20]))?;
    pass("zero pages (destination writes zeroes)", &source, &all, &senders)?;
    pass("zero pages again", &source, &all, &senders)?;
    senders.iter().for_each(DataSender::shutdown);
    for receiver in receivers {
        receiver.join().map_err(|_| "a receiver panicked")??;
    }
    Ok(())
}

fn pass(
    what: &str,
    memory: &GuestMemory,
    dirty: &DirtyBitmap,
    senders: &[DataSender],
) -> Result<RamStats, Error> {
    let start = Instant::now();
    let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    let stats = send_pages(memory, dirty, senders, &cancel, &progress)?;
    rate(what, dirty.count() * PAGE_SIZE, start);
    Ok(stats)
}

fn rate(what: &str, bytes: u64, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    println!("  {what:<42} {:>8.2} GB/s", bytes as f64 / seconds / 1e9);
}
