//! Memory arrives exactly, over real sockets.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::{Kind, Link, MIB, PAGE, allocated, bytes_of, memory, pair, region};
use migration::channel::{ChannelError, DataReceiver, DataSender};
use migration::hash::memory_digest;
use migration::ram::{RamError, RamPass, RamStats, send_pages};
use migration::wire::{FrameHeader, RAM_BLOCK, RamRange, kind, ram_pages_header, ram_zero_header};
use migration::{DirtyBitmap, DirtyClearer, GuestMemory, RegionLayout, VmmError};
use proptest::prelude::*;
use switchover::message::Features;

fn send(source: &GuestMemory, dirty: &DirtyBitmap, link: &Link) -> RamStats {
    let progress = AtomicU64::new(0);
    let stats =
        send_pages(source, dirty, &link.senders, &AtomicBool::new(false), &progress).unwrap();
    assert_eq!(progress.into_inner(), dirty.count(), "progress counts every page");
    assert_eq!(stats.normal_pages + stats.zero_pages, dirty.count());
    stats
}

/// Regions that begin and end inside blocks, with a gap.
fn odd_layout() -> Vec<RegionLayout> {
    vec![
        region(0, 640 << 10),
        region(MIB, 5 * MIB + 3 * PAGE),
        region(1 << 32, 4 * MIB),
        region((1 << 32) + 7 * MIB + PAGE, 3 * MIB),
    ]
}

/// What a page of the source holds.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Hole,
    Zero,
    Byte(u8, u16),
    Full(u8),
}

fn fill() -> impl Strategy<Value = Fill> {
    prop_oneof![
        3 => Just(Fill::Hole),
        1 => Just(Fill::Zero),
        2 => (1..=255u8, 0..4096u16).prop_map(|(byte, at)| Fill::Byte(byte, at)),
        3 => (1..=255u8).prop_map(Fill::Full),
    ]
}

fn put(memory: &GuestMemory, gpa: u64, fill: Fill) {
    match fill {
        Fill::Hole => {}
        Fill::Zero => memory.write(gpa, &[0; PAGE as usize]).unwrap(),
        Fill::Byte(byte, at) => memory.write(gpa + u64::from(at), &[byte]).unwrap(),
        Fill::Full(byte) => memory.write(gpa, &[byte; PAGE as usize]).unwrap(),
    }
}

fn page_addresses(layout: &[RegionLayout]) -> Vec<u64> {
    let pages = |r: &RegionLayout| (r.gpa..r.gpa + r.len).step_by(PAGE as usize);
    layout.iter().flat_map(pages).collect()
}

/// (first page, pages, what they hold): pages are counted through all regions.
type Runs = Vec<(usize, usize, Fill)>;

fn runs(pages: usize) -> impl Strategy<Value = Runs> {
    prop::collection::vec((0..pages, 1..200usize, fill()), 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The dirty pages, and only they, are the source's afterwards, whatever either side held.
    #[test]
    fn exactly_the_dirty_pages_arrive(
        source_runs in runs(3200),
        destination_runs in runs(3200),
        dirty_runs in prop::collection::vec((0..3200usize, 1..400usize), 0..16),
        everything in any::<bool>(),
        channels in 1..5usize,
        tcp in any::<bool>(),
        ram_checksum in any::<bool>(),
    ) {
        let layout = odd_layout();
        let pages = page_addresses(&layout);
        let (source, destination) = (memory(&layout), memory(&layout));
        for (memory, runs) in [(&source, &source_runs), (&destination, &destination_runs)] {
            for (first, count, fill) in runs {
                for page in pages.iter().skip(*first).take(*count) {
                    put(memory, *page, *fill);
                }
            }
        }
        let mut dirty = DirtyBitmap::new(&layout);
        for (first, count) in dirty_runs {
            for page in pages.iter().skip(first).take(count) {
                dirty.set_range(*page, 1);
            }
        }
        if everything {
            dirty.set_all();
        }
        let mut expected = bytes_of(&destination);
        let wanted = bytes_of(&source);
        for (i, page) in pages.iter().enumerate() {
            let (region, offset) = source.locate(*page, PAGE).unwrap();
            let bit = offset / PAGE;
            if dirty.region(region)[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                let bytes = i * PAGE as usize..(i + 1) * PAGE as usize;
                expected[bytes.clone()].copy_from_slice(&wanted[bytes]);
            }
        }
        let kind = if tcp { Kind::Tcp } else { Kind::Unix };
        let features = Features { ram_checksum, ..Features::default() };
        let link = Link::new(kind, channels, features, &destination);
        send(&source, &dirty, &link);
        link.finish_well();
        prop_assert!(bytes_of(&destination) == expected, "memory differs");
    }
}

#[test]
fn holes_are_neither_read_nor_filled() {
    let layout = [region(0, 64 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    source.write(20 * MIB + 5, b"x").unwrap();
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let link = Link::new(Kind::Unix, 3, Features::default(), &destination);
    let stats = send(&source, &dirty, &link);
    link.finish_well();
    assert_eq!(stats.normal_pages, 1);
    assert_eq!(allocated(&source), PAGE);
    assert_eq!(allocated(&destination), PAGE);
    assert_eq!(memory_digest(&source), memory_digest(&destination));
    assert!(stats.wire_bytes < 2 * PAGE, "a zero run per block, and one page: {stats:?}");
}

#[test]
fn a_page_that_became_zero_is_zeroed() {
    let layout = [region(0, 4 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    destination.write(MIB, &[7; 3 * PAGE as usize]).unwrap();
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_range(MIB + PAGE, PAGE);
    let link = Link::new(Kind::Unix, 1, Features::default(), &destination);
    assert_eq!(send(&source, &dirty, &link).zero_pages, 1);
    link.finish_well();
    let mut bytes = vec![0; 3 * PAGE as usize];
    destination.read(MIB, &mut bytes).unwrap();
    let (page, rest) = (PAGE as usize, 2 * PAGE as usize);
    assert!(bytes[..page].iter().chain(&bytes[rest..]).all(|byte| *byte == 7));
    assert!(bytes[page..rest].iter().all(|byte| *byte == 0));
}

#[test]
fn later_versions_of_a_page_win() {
    let layout = [region(0, 16 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    let link = Link::new(Kind::Tcp, 4, Features::default(), &destination);
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    for version in [9u8, 0, 3, 0, 200] {
        for page in page_addresses(&layout) {
            source.write(page, &[version; PAGE as usize]).unwrap();
        }
        send(&source, &dirty, &link);
    }
    source.write(5 * MIB, b"last").unwrap();
    dirty.clear();
    dirty.set_range(5 * MIB, 4);
    send(&source, &dirty, &link);
    link.finish_well();
    assert_eq!(memory_digest(&source), memory_digest(&destination));
}

/// Ends the threads that look at it, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// With checksums the guest may write while its pages are sent: a damaged frame must not be claimed.
#[test]
fn writing_meanwhile_is_no_checksum_error() {
    let layout = [region(0, 8 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    let features = Features { ram_checksum: true, ..Features::default() };
    let link = Link::new(Kind::Unix, 2, features, &destination);
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = 1u64;
            while !stop.load(Ordering::Relaxed) {
                for page in page_addresses(&layout) {
                    source.write(page + count % 512 * 8, &count.to_le_bytes()).unwrap();
                    count += 1;
                }
            }
        });
        let _stop = Stop(&stop);
        for _ in 0..10 {
            send(&source, &dirty, &link);
        }
    });
    send(&source, &dirty, &link);
    link.finish_well();
    assert_eq!(memory_digest(&source), memory_digest(&destination));
}

#[test]
fn a_pass_cancelled_before_it_began_sends_nothing() {
    let layout = odd_layout();
    let (source, destination) = (memory(&layout), memory(&layout));
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let link = Link::new(Kind::Unix, 2, Features::default(), &destination);
    let (cancel, progress) = (AtomicBool::new(true), AtomicU64::new(0));
    let result = send_pages(&source, &dirty, &link.senders, &cancel, &progress);
    let Err(RamError::Cancelled { stats, remaining }) = result else { panic!("{result:?}") };
    assert_eq!((stats, &*remaining), (RamStats::default(), &dirty));
    assert!(link.senders.iter().all(|sender| sender.totals().frames == 0));
    link.finish_well();
}

#[test]
fn a_cancelled_pass_names_the_pages_it_did_not_send() {
    let layout = odd_layout();
    let (source, destination) = (memory(&layout), memory(&layout));
    for page in page_addresses(&layout) {
        source.write(page, &[1; PAGE as usize]).unwrap();
    }
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    // Nobody reads before the wish to cancel is there, and sockets do not hold that much.
    let ends: Vec<_> = (0..2).map(|_| pair(Kind::Unix)).collect();
    let (senders, receivers): (Vec<_>, Vec<_>) = ends
        .into_iter()
        .map(|(source, end)| {
            let features = Features::default();
            let receiver = DataReceiver::new(end, features, Arc::clone(&destination));
            (DataSender::new(source, features), receiver)
        })
        .unzip();
    let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let pass = scope.spawn(|| send_pages(&source, &dirty, &senders, &cancel, &progress));
        while progress.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        cancel.store(true, Ordering::Relaxed);
        let receiving: Vec<_> = receivers
            .into_iter()
            .map(|receiver| scope.spawn(move || receiver.run(&common::Kept::default())))
            .collect();
        let result = pass.join().unwrap();
        let Err(RamError::Cancelled { stats, remaining }) = result else { panic!("{result:?}") };
        assert!(stats.normal_pages > 0 && !remaining.is_empty());
        assert_eq!(stats.normal_pages + remaining.count(), dirty.count());
        cancel.store(false, Ordering::Relaxed);
        let rest = send_pages(&source, &remaining, &senders, &cancel, &progress).unwrap();
        assert_eq!(rest.normal_pages, remaining.count());
        senders.iter().for_each(DataSender::shutdown);
        receiving.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    assert_eq!(memory_digest(&source), memory_digest(&destination));
}

/// docs/wire.md: block i goes over channel i mod n, by guest physical address, whatever the regions are.
#[test]
fn a_block_keeps_its_channel() {
    let layout = odd_layout();
    let (source, destination) = (memory(&layout), memory(&layout));
    for channels in 1..5usize {
        for page in [0, 639 << 10, MIB, 2 * MIB, 5 * MIB, 1 << 32, (1 << 32) + 3 * MIB] {
            let link = Link::new(Kind::Unix, channels, Features::default(), &destination);
            let mut dirty = DirtyBitmap::new(&layout);
            dirty.set_range(page, 1);
            send(&source, &dirty, &link);
            let frames: Vec<_> = link.senders.iter().map(|s| s.totals().frames).collect();
            let mut expected = vec![0; channels];
            expected[(page / RAM_BLOCK) as usize % channels] = 1;
            assert_eq!(frames, expected, "{page:#x}");
            link.finish_well();
        }
    }
}

#[test]
fn a_broken_channel_ends_the_pass_on_all() {
    let layout = [region(0, 32 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    source.write(0, &vec![1; 32 * MIB as usize]).unwrap();
    let link = Link::new(Kind::Unix, 2, Features::default(), &destination);
    link.senders[1].shutdown();
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    let error = send_pages(&source, &dirty, &link.senders, &cancel, &progress).unwrap_err();
    assert!(matches!(error, RamError::Channel(ChannelError::Io { call: "write", .. })), "{error}");
}

#[test]
fn another_layout_or_no_channel_is_refused() {
    let source = memory(&[region(0, MIB)]);
    let other = DirtyBitmap::new(&[region(0, 2 * MIB)]);
    let (cancel, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    let error = send_pages(&source, &other, &[], &cancel, &progress).unwrap_err();
    assert!(matches!(error, RamError::Layout));
    let fits = DirtyBitmap::new(&source.layout());
    let error = send_pages(&source, &fits, &[], &cancel, &progress).unwrap_err();
    assert!(matches!(error, RamError::NoChannel));
}

/// Sends raw bytes to a receiver of `layout`; returns how it ended, and its memory.
fn receive(
    layout: &[RegionLayout],
    features: Features,
    bytes: &[u8],
) -> (Result<(), ChannelError>, Arc<GuestMemory>) {
    use std::io::Write;
    let memory = memory(layout);
    let (mut source, destination) = pair(Kind::Unix);
    let receiver = DataReceiver::new(destination, features, Arc::clone(&memory));
    let end = thread::scope(|scope| {
        let thread = scope.spawn(move || receiver.run(&common::Kept::default()));
        // The receiver may be gone before it has all.
        let _ = source.write_all(bytes);
        source.shutdown();
        thread.join().unwrap()
    });
    (end, memory)
}

const LZ4: Features = Features {
    lz4: true,
    zstd: false,
    verify: false,
    ram_checksum: false,
    device_checksum: false,
    telemetry: false,
    local: false,
    echo: false,
};
const ZSTD: Features = Features { lz4: false, zstd: true, ..LZ4 };

/// Memory of two kinds, zero pages between, over a socket that takes both ways: every page arrives, whatever way it went.
#[test]
fn compressed_pages_arrive_like_others() {
    let layout = [region(0, MIB), region(4 * MIB, 9 * MIB)];
    let source = memory(&layout);
    let mut random = 1u64;
    for (number, gpa) in
        layout.iter().flat_map(|r| (r.gpa..r.gpa + r.len).step_by(PAGE as usize)).enumerate()
    {
        let page: Vec<u8> = match number % 5 {
            0 => continue,
            1 => (0..PAGE)
                .map(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (random >> 56) as u8
                })
                .collect(),
            _ => vec![number as u8 | 1; PAGE as usize],
        };
        source.write(gpa, &page).unwrap();
    }
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    for features in [LZ4, ZSTD, Features { ram_checksum: true, ..ZSTD }] {
        let destination = memory(&layout);
        let link = Link::new(Kind::Unix, 2, features, &destination);
        let stats = send(&source, &dirty, &link);
        link.finish_well();
        assert!(bytes_of(&destination) == bytes_of(&source), "{features:?}");
        // Each channel begins by trying it, and four pages of five shrink.
        assert!(stats.packed_pages > 0, "{features:?}: {stats:?}");
        assert!(stats.packed_bytes < stats.packed_pages * PAGE / 2, "{features:?}: {stats:?}");
        let plain = (stats.normal_pages - stats.packed_pages) * PAGE;
        assert!(stats.wire_bytes < plain + stats.packed_bytes + stats.zero_pages * 64 + MIB / 2);
    }
}

/// What was not agreed on, is not whole pages, is garbage, or becomes more than it says: an error, and memory is as it was.
#[test]
fn packed_garbage_is_refused_and_touches_no_memory() {
    let layout = [region(0, 4 * MIB)];
    let packed = zstd::bulk::compress(&vec![7; 2 * MIB as usize], 1).unwrap();
    let len = packed.len() as u64;
    let frame = |b: u64, c: u32, payload: &[u8]| {
        let kind = kind::RAM_PACKED;
        let length = payload.len() as u32;
        let header = FrameHeader { kind, length, a: 0, b, c, ..Default::default() };
        [&header.encode()[..], payload].concat()
    };
    let ok = receive(&layout, ZSTD, &frame(2 * MIB, 2, &packed));
    assert!(ok.0.is_ok() && bytes_of(&ok.1)[..2 * MIB as usize] == vec![7; 2 * MIB as usize]);
    let table = [
        ("not agreed on", Features::default(), 2 * MIB, 2, &packed[..], "agreed"),
        ("the other one", LZ4, 2 * MIB, 2, &packed, "agreed"),
        ("an unknown one", ZSTD, 2 * MIB, 9, &packed, "agreed"),
        ("less than it is", ZSTD, MIB, 2, &packed, "pages at 0x0, zstd"),
        (
            "more than it is",
            ZSTD,
            2 * MIB,
            2,
            &zstd::bulk::compress(&[7; 4096], 1).unwrap(),
            "announced",
        ),
        ("garbage", LZ4, PAGE, 1, &[0xff; 100], "pages at 0x0, lz4"),
        ("cut short", ZSTD, 2 * MIB, 2, &packed[..packed.len() - 1], "zstd"),
        ("larger than its pages", ZSTD, PAGE, 2, &[0; 4096], "for 4096 of pages"),
        ("of nothing", ZSTD, PAGE, 2, &[], "0 bytes for 4096"),
        ("no whole pages", ZSTD, len + 1, 2, &packed, "whole pages"),
        ("more than a block", ZSTD, 4 * MIB, 2, &packed, "one 2 MiB block"),
        ("more than there is", ZSTD, u64::MAX - 4095, 2, &packed, "one 2 MiB block"),
    ];
    for (what, features, b, c, payload, expected) in table {
        let (end, memory) = receive(&layout, features, &frame(b, c, payload));
        let error = std::error::Error::source(&end.unwrap_err()).unwrap().to_string();
        assert!(error.contains(expected), "{what}: {error}");
        assert!(bytes_of(&memory).iter().all(|byte| *byte == 0), "{what}");
    }
}

#[test]
fn pages_outside_of_memory_are_refused() {
    let layout = [region(MIB, MIB), region(4 * MIB, 64 * PAGE)];
    // (address, length): before, after, in the gap, across an end, at the top of the address space.
    let outside = [
        (0, PAGE),
        (2 * MIB, PAGE),
        (3 * MIB, PAGE),
        (2 * MIB - PAGE, PAGE),
        (4 * MIB + 63 * PAGE, 2 * PAGE),
        (4 * MIB + 64 * PAGE, PAGE),
        (u64::MAX - PAGE + 1, PAGE),
    ];
    for (gpa, len) in outside {
        let inside = gpa == 2 * MIB - PAGE;
        let range = RamRange { gpa, len };
        let mut pages = ram_pages_header(range, None).encode().to_vec();
        pages.resize(pages.len() + len as usize, 0xaa);
        let zero = ram_zero_header(range).encode().to_vec();
        for bytes in [pages, zero] {
            let (end, memory) = receive(&layout, Features::default(), &bytes);
            match end {
                Ok(()) => assert!(inside, "{range:x?}"),
                Err(error) => {
                    assert!(matches!(error, ChannelError::Memory { .. }), "{range:x?}: {error}");
                    assert!(!inside);
                    assert_eq!(allocated(&memory), 0, "nothing was written");
                }
            }
        }
    }
}

#[test]
fn ranges_that_are_not_whole_pages_of_one_block_are_refused() {
    let layout = [region(0, 8 * MIB)];
    let cases: [(u64, u64); 6] =
        [(1, PAGE), (0, PAGE - 1), (0, 0), (RAM_BLOCK - PAGE, 2 * PAGE), (PAGE, RAM_BLOCK), (8, 8)];
    for (gpa, len) in cases {
        let header =
            FrameHeader { kind: kind::RAM_PAGES, length: len as u32, a: gpa, ..Default::default() };
        let zero = ram_zero_header(RamRange { gpa, len });
        for header in [header, zero] {
            let mut bytes = header.encode().to_vec();
            bytes.resize(bytes.len() + header.length as usize, 0);
            let (end, memory) = receive(&layout, Features::default(), &bytes);
            let error = end.unwrap_err();
            assert!(matches!(error, ChannelError::Wire { .. }), "{gpa:#x} {len:#x}: {error}");
            assert_eq!(allocated(&memory), 0);
        }
    }
    // A zero run as long as the address space.
    let zero = ram_zero_header(RamRange { gpa: 0, len: u64::MAX - PAGE + 1 }).encode();
    assert!(receive(&layout, Features::default(), &zero).0.is_err());
}

#[test]
fn a_flipped_byte_of_a_page_is_seen_with_checksums_and_only_with_them() {
    let layout = [region(0, MIB)];
    let page = [5; PAGE as usize];
    let range = RamRange { gpa: 3 * PAGE, len: PAGE };
    for ram_checksum in [true, false] {
        let features = Features { ram_checksum, ..Features::default() };
        let checksum = ram_checksum.then(|| crc32fast::hash(&page));
        let mut bytes = ram_pages_header(range, checksum).encode().to_vec();
        bytes.extend_from_slice(&page);
        let (end, memory) = receive(&layout, features, &bytes);
        end.unwrap();
        assert_eq!(allocated(&memory), PAGE);
        let last = bytes.len() - 1;
        bytes[last] ^= 0x10;
        let (end, memory) = receive(&layout, features, &bytes);
        assert_eq!(end.is_err(), ram_checksum);
        assert_eq!(allocated(&memory), if ram_checksum { 0 } else { PAGE });
    }
    // Agreed on, and left out.
    let mut bytes = ram_pages_header(range, None).encode().to_vec();
    bytes.extend_from_slice(&page);
    let features = Features { ram_checksum: true, ..Features::default() };
    let error = receive(&layout, features, &bytes).0.unwrap_err();
    assert!(error.to_string().contains("without the payload checksum"), "{error}");
}

#[test]
fn device_data_gets_its_turn_while_memory_is_sent() {
    use migration::channel::DataClass;
    use switchover::message::{DeviceIndex, Session};
    const FRAMES: u64 = 32;
    let layout = [region(0, 64 * MIB)];
    let (source, destination) = (memory(&layout), memory(&layout));
    source.write(0, &vec![3; 64 * MIB as usize]).unwrap();
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let link = Link::new(Kind::Unix, 1, Features::default(), &destination);
    let (sending, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let count = AtomicU64::new(0);
    let sender: &DataSender = &link.senders[0];
    let mut waited = thread::scope(|scope| {
        let device = scope.spawn(|| {
            while sending.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            let mut waited = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let (device, session) = (DeviceIndex(0), Session(1));
                let (sent, began) = (waited.len() as u64, sending.load(Ordering::Relaxed));
                sender.send_device(device, session, DataClass::Dirty, sent, &[sent as u8]).unwrap();
                waited.push(sending.load(Ordering::Relaxed) - began);
                count.store(waited.len() as u64, Ordering::Relaxed);
            }
            waited
        });
        let stop = Stop(&done);
        // A busy host may leave the device's thread aside for more than a pass.
        for _ in 0..64 {
            send_pages(&source, &dirty, &link.senders, &AtomicBool::new(false), &sending).unwrap();
            if count.load(Ordering::Relaxed) > FRAMES {
                break;
            }
        }
        drop(stop);
        device.join().unwrap()
    });
    let kept = link.finish_well();
    let frames = kept.frames.lock().unwrap();
    assert_eq!(frames.len(), waited.len());
    assert!(waited.len() as u64 > FRAMES, "starved: {} frames beside 64 passes", waited.len());
    waited.sort_unstable();
    let batches = waited[waited.len() / 2] * PAGE / (512 << 10);
    assert!(batches <= 4, "a frame waits for {batches} batches of memory");
    assert!(frames.iter().enumerate().all(|(i, frame)| frame.offset == i as u64));
    assert_eq!(memory_digest(&source), memory_digest(&destination));
}

/// Reports pages until it is told to forget them, and writes one right then.
struct Tracker {
    memory: Arc<GuestMemory>,
    forgotten: std::sync::Mutex<DirtyBitmap>,
}

impl DirtyClearer for Tracker {
    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), VmmError> {
        assert!(first.is_multiple_of(64));
        let mut forgotten = self.forgotten.lock().unwrap();
        let all = &mut forgotten.region_mut(region)[first as usize / 64..][..words.len()];
        for (there, words) in all.iter_mut().zip(words) {
            assert_eq!(*there & words, 0, "a page is forgotten once");
            *there |= words;
        }
        drop(forgotten);
        let layout = self.memory.layout()[region];
        let bits =
            (0..words.len() as u64 * 64).filter(|i| words[*i as usize / 64] >> (i % 64) & 1 == 1);
        for page in bits.step_by(97).map(|bit| layout.gpa + (first + bit) * PAGE) {
            self.memory.write(page + 5, &[0xee]).unwrap();
        }
        Ok(())
    }
}

/// A guest that writes right after its page was forgotten is not reported by the next sync as having written
/// before, so these very bytes must be sent; also where a hole was.
#[test]
fn pages_are_forgotten_once_and_looked_at_after_that() {
    let layout = odd_layout();
    for (everything, channels) in [(true, 1), (true, 3), (false, 1), (false, 3)] {
        let (source, destination) = (memory(&layout), memory(&layout));
        let mut dirty = DirtyBitmap::new(&layout);
        let pages = page_addresses(&layout);
        for page in pages.iter().step_by(3) {
            dirty.set_range(*page, 1);
        }
        if everything {
            dirty.set_all();
        }
        let forgotten = std::sync::Mutex::new(DirtyBitmap::new(&layout));
        let tracker = Arc::new(Tracker { memory: Arc::clone(&source), forgotten });
        let link = Link::new(Kind::Unix, channels, Features::default(), &destination);
        let clearers = [Arc::clone(&tracker) as Arc<dyn DirtyClearer>];
        let stats = RamPass {
            memory: &source,
            dirty: &dirty,
            channels: &link.senders,
            clearers: &clearers,
            cancel: &AtomicBool::new(false),
            progress: &AtomicU64::new(0),
        }
        .send()
        .unwrap();
        link.finish_well();
        let what = format!("everything {everything}, {channels} channels");
        assert_eq!(*tracker.forgotten.lock().unwrap(), dirty, "{what}");
        assert!(stats.normal_pages > 10, "{what}: {stats:?}");
        assert_eq!(memory_digest(&source), memory_digest(&destination), "{what}");
    }
}

/// A tracker that fails ends the pass: what it reports is not known any more.
#[test]
fn a_tracker_that_fails_ends_the_pass() {
    struct Broken;
    impl DirtyClearer for Broken {
        fn clear(&self, _: usize, _: u64, _: &[u64]) -> Result<(), VmmError> {
            Err(VmmError::new("the log is gone"))
        }
    }
    let layout = odd_layout();
    let (source, destination) = (memory(&layout), memory(&layout));
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let link = Link::new(Kind::Unix, 2, Features::default(), &destination);
    let clearers = [Arc::new(Broken) as Arc<dyn DirtyClearer>];
    let (cancel, progress) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let (memory, dirty, channels) = (&source, &dirty, &link.senders[..]);
    let pass = RamPass { memory, dirty, channels, clearers: &clearers, cancel, progress };
    let error = pass.send().unwrap_err();
    assert!(matches!(error, RamError::Tracker(_)), "{error}");
}
