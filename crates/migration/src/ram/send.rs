//! Sends dirty pages over all data channels at once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::codec::{Codec, OVERHEAD_BYTES, Packer};
use super::zero::is_zero_page;
use super::{data_extents, next_data, within};
use crate::bitmap::DirtyBitmap;
use crate::channel::{Batch, ChannelError, DataSender};
use crate::clock;
use crate::cost::{Account, Held};
use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE, RegionLayout};
use crate::vmm::{DirtyClearer, VmmError};
use crate::wire::{
    HEADER_LEN, RAM_BLOCK, RamRange, ram_packed_header, ram_pages_header, ram_zero_header,
};
use switchover::Time;

/// Bytes sent in one go. Between two of them others get their turn on the channel, and a wish to stop is
/// heard: small enough for a slow link, large enough that calls do not count.
const BATCH_BYTES: u64 = 512 << 10;
/// Frames in one go; each has two iovecs.
const BATCH_FRAMES: usize = 256;
/// What a frame takes beside its pages: its header and two iovecs.
const FRAME_BYTES: usize = HEADER_LEN + 2 * size_of::<libc::iovec>();
/// What a codec's own tables take, at the most.
const TABLES_BYTES: usize = 1 << 20;
/// Pages that are compressed at once: they stay in the cache, and more at once does not make them smaller (measured).
const PACKED_BYTES: u64 = 128 << 10;
/// Most data extents of a region that are looked up; behind them everything is read.
const EXTENTS_MAX: usize = 16 << 10;
/// Of fewer dirty pages than this no threads are made: starting them would take longer, and the last pass
/// goes by while the guest stands still.
const PARALLEL_PAGES_MIN: u64 = (8 << 20) / PAGE_SIZE;

/// What a pass sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamStats {
    /// Pages sent with their bytes.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages sent compressed, which count as sent with their bytes too.
    pub packed_pages: u64,
    /// Bytes they were compressed to.
    pub packed_bytes: u64,
    /// Bytes sent, headers included.
    pub wire_bytes: u64,
}

/// Why a pass did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// As the caller wished.
    #[error("sending of memory cancelled after {} pages", stats.normal_pages + stats.zero_pages)]
    Cancelled {
        /// What was sent.
        stats: RamStats,
        /// The pages that were not: still dirty.
        remaining: Box<DirtyBitmap>,
    },
    /// A channel broke.
    #[error("sending memory: {0}")]
    Channel(#[from] ChannelError),
    /// A tracker of dirty pages failed.
    #[error("forgetting dirty pages before they are sent: {0}")]
    Tracker(#[from] VmmError),
    /// The bitmap does not belong to this memory.
    #[error("the bitmap of dirty pages has another layout than guest memory")]
    Layout,
    /// There is no channel.
    #[error("no data channel to send memory on")]
    NoChannel,
    /// A page is not memory.
    #[error("sending memory: {0}")]
    Memory(#[from] MemoryError),
}

/// Sends every page set in `dirty` once, on the channel its 2 MiB block belongs to, and returns when the
/// sockets took them. The writers of memory must be tracked already: a page written meanwhile may arrive
/// in either version. `progress` counts pages as they are sent.
pub fn send_pages(
    memory: &GuestMemory,
    dirty: &DirtyBitmap,
    channels: &[DataSender],
    cancel: &AtomicBool,
    progress: &AtomicU64,
) -> Result<RamStats, RamError> {
    RamPass { memory, dirty, channels, clearers: &[], cancel, progress }.send()
}

/// A pass over memory, as [`send_pages`] makes it.
pub struct RamPass<'a> {
    /// Whose pages.
    pub memory: &'a GuestMemory,
    /// Which of them.
    pub dirty: &'a DirtyBitmap,
    /// Where to.
    pub channels: &'a [DataSender],
    /// Who still reports them as dirty: told of each block right before it is looked at.
    pub clearers: &'a [Arc<dyn DirtyClearer>],
    /// Ends it early.
    pub cancel: &'a AtomicBool,
    /// Counts pages as they are sent.
    pub progress: &'a AtomicU64,
}

impl RamPass<'_> {
    /// Sends.
    pub fn send(self) -> Result<RamStats, RamError> {
        let Self { memory, dirty, channels, clearers, cancel, progress } = self;
        if dirty.layout() != memory.layout() {
            return Err(RamError::Layout);
        }
        if channels.is_empty() {
            return Err(RamError::NoChannel);
        }
        let pages = dirty.count();
        let data = find_data(memory, dirty, pages);
        let extents = data.iter().flatten().map(|region| size_of_val(region.as_slice()) as u64);
        let _held = Held::new(extents.sum());
        let mine = Account::mine();
        let broken = AtomicBool::new(false);
        let pass = Pass {
            memory,
            dirty,
            channels,
            clearers,
            data: data.as_deref(),
            cancel,
            broken: &broken,
            progress,
        };
        let ended = thread::scope(|scope| {
            let (pass, mine) = (&pass, &mine);
            // The first channel is served by this thread, and so is one for which there is no thread to be had.
            let start = |channel| {
                let name = format!("vmferry-ram{channel}");
                let builder = thread::Builder::new().name(name);
                let run = move || {
                    let _joined = mine.as_ref().map(|(account, work)| account.join(*work));
                    pass.run_channel(channel)
                };
                let worth = pages >= PARALLEL_PAGES_MIN;
                (channel, worth.then(|| builder.spawn_scoped(scope, run).ok()).flatten())
            };
            let others: Vec<_> = (1..channels.len()).map(start).collect();
            let mut ended = vec![pass.run_channel(0)];
            for (channel, thread) in others {
                ended.push(match thread.map(thread::ScopedJoinHandle::join) {
                    Some(Ok(ended)) => ended,
                    Some(Err(panic)) => std::panic::resume_unwind(panic),
                    None => pass.run_channel(channel),
                });
            }
            ended
        });
        pass.sum_up(ended)
    }
}

/// Where memory holds data, by region, in pages, ascending; `None`: everything is looked at.
///
/// Looked for once (see [`within`]). Only worth it where much of memory
/// is dirty, as in the first pass: a page written since is no hole.
fn find_data(
    memory: &GuestMemory,
    dirty: &DirtyBitmap,
    pages: u64,
) -> Option<Vec<Vec<Range<u64>>>> {
    if pages < memory.size_bytes() / PAGE_SIZE / 2 {
        return None;
    }
    let region = |(index, layout): (usize, &RegionLayout)| {
        let extents = data_extents(memory.region_fd(index), 0..layout.len);
        let mut data: Vec<_> = extents
            .take(EXTENTS_MAX)
            .map(|extent| extent.start / PAGE_SIZE..extent.end.div_ceil(PAGE_SIZE))
            .collect();
        if data.len() == EXTENTS_MAX
            && let Some(last) = data.last_mut()
        {
            last.end = layout.pages();
        }
        data
    };
    Some(dirty.layout().iter().enumerate().map(region).collect())
}

/// What all channels of a pass share.
struct Pass<'a> {
    memory: &'a GuestMemory,
    dirty: &'a DirtyBitmap,
    channels: &'a [DataSender],
    clearers: &'a [Arc<dyn DirtyClearer>],
    /// See [`find_data`].
    data: Option<&'a [Vec<Range<u64>>]>,
    cancel: &'a AtomicBool,
    /// Another channel broke.
    broken: &'a AtomicBool,
    progress: &'a AtomicU64,
}

/// How a channel's part ended.
struct Ended {
    stats: RamStats,
    /// First page (region, page) that was not sent; `None` when all were.
    stopped_at: Option<(usize, u64)>,
    error: Option<RamError>,
}

impl Pass<'_> {
    fn run_channel(&self, channel: usize) -> Ended {
        let mut lane = Lane::new(self, channel);
        let result = lane.run();
        let (stopped_at, error) = match result {
            Ok(()) => (None, None),
            Err(Stop::Wished) => (Some(lane.unsent), None),
            Err(Stop::Error(error)) => {
                self.broken.store(true, Ordering::Relaxed);
                (Some(lane.unsent), Some(error))
            }
        };
        Ended { stats: lane.stats, stopped_at, error }
    }

    fn sum_up(&self, mut ended: Vec<Ended>) -> Result<RamStats, RamError> {
        if let Some(error) = ended.iter_mut().find_map(|ended| ended.error.take()) {
            return Err(error);
        }
        let mut stats = RamStats::default();
        for ended in &ended {
            stats.normal_pages += ended.stats.normal_pages;
            stats.zero_pages += ended.stats.zero_pages;
            stats.packed_pages += ended.stats.packed_pages;
            stats.packed_bytes += ended.stats.packed_bytes;
            stats.wire_bytes += ended.stats.wire_bytes;
        }
        if ended.iter().all(|ended| ended.stopped_at.is_none()) {
            return Ok(stats);
        }
        let mut remaining = DirtyBitmap::new(self.dirty.layout());
        for (channel, ended) in ended.iter().enumerate() {
            if let Some(from) = ended.stopped_at {
                self.add_from(channel, from, &mut remaining);
            }
        }
        Err(RamError::Cancelled { stats, remaining: Box::new(remaining) })
    }

    /// The blocks of `channel` in sending order: region, and pages of the region.
    fn blocks(&self, channel: usize) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let (channel, channels) = (channel as u64, self.channels.len() as u64);
        self.dirty.layout().iter().enumerate().flat_map(move |(index, region)| {
            let blocks = region.gpa / RAM_BLOCK..(region.gpa + region.len).div_ceil(RAM_BLOCK);
            blocks.filter(move |block| block % channels == channel).map(move |block| {
                let first = (block * RAM_BLOCK).max(region.gpa) - region.gpa;
                let end = (block * RAM_BLOCK).saturating_add(RAM_BLOCK) - region.gpa;
                (index, first / PAGE_SIZE..end.min(region.len) / PAGE_SIZE)
            })
        })
    }

    fn add_from(&self, channel: usize, from: (usize, u64), into: &mut DirtyBitmap) {
        for (region, pages) in self.blocks(channel) {
            let gpa = self.dirty.layout()[region].gpa;
            for (first, count) in self.dirty.runs_in(region, pages) {
                for page in (first..first + count).filter(|page| (region, *page) >= from) {
                    into.set_range(gpa + page * PAGE_SIZE, PAGE_SIZE);
                }
            }
        }
    }
}

/// The words that hold the bits of `pages`.
fn words_of(pages: &Range<u64>) -> Range<usize> {
    (pages.start / 64) as usize..pages.end.div_ceil(64) as usize
}

enum Stop {
    Wished,
    Error(RamError),
}

impl<E: Into<RamError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// One channel's part of a pass.
struct Lane<'a> {
    pass: &'a Pass<'a>,
    channel: usize,
    sender: &'a DataSender,
    batch: Batch,
    /// Headers of the batch; never grows beyond its first capacity, so that they stay where they are.
    headers: Vec<[u8; HEADER_LEN]>,
    /// With checksums: copies of the batch's pages, since the guest would change them after their checksum
    /// was made. Never grows beyond its first capacity either.
    copies: Vec<u8>,
    /// How the batch is compressed, if it is, and the time it took so far.
    codec: Option<Codec>,
    packer: Option<Packer>,
    packing: Time,
    /// Pages as they are being compressed: the guest would change them meanwhile.
    unpacked: Vec<u8>,
    /// Compressed pages of the batch, and how much of it is used. Never grows either, once it is there.
    packed: Vec<u8>,
    packed_len: usize,
    batch_pages: RamStats,
    /// First page that is not sent.
    unsent: (usize, u64),
    /// Which pages of the block are not holes, where that was looked for, ascending.
    data: Vec<Range<u64>>,
    /// Which of its dirty pages are to be forgotten, as words of the region's bitmap.
    words: Vec<u64>,
    stats: RamStats,
    /// What its buffers take.
    held: Held,
}

impl<'a> Lane<'a> {
    fn new(pass: &'a Pass<'a>, channel: usize) -> Self {
        let sender = &pass.channels[channel];
        let copies = if sender.features().ram_checksum { BATCH_BYTES as usize } else { 0 };
        Self {
            pass,
            channel,
            sender,
            batch: Batch::default(),
            headers: Vec::with_capacity(BATCH_FRAMES),
            copies: Vec::with_capacity(copies),
            codec: sender.codec(),
            packer: None,
            packing: Time(0),
            unpacked: Vec::new(),
            packed: Vec::new(),
            packed_len: 0,
            batch_pages: RamStats::default(),
            unsent: (0, 0),
            data: Vec::new(),
            words: Vec::new(),
            stats: RamStats::default(),
            held: Held::new((BATCH_FRAMES * FRAME_BYTES + copies) as u64),
        }
    }

    fn run(&mut self) -> Result<(), Stop> {
        let pass = self.pass;
        for (region, pages) in pass.blocks(self.channel) {
            self.begin_block(region, pages.clone())?;
            for (first, count) in pass.dirty.runs_in(region, pages) {
                // Also here: many zero pages are looked at before there is a batch to send.
                self.check_wish()?;
                self.run_of_pages(region, first, count)?;
            }
        }
        self.flush((usize::MAX, 0))
    }

    fn check_wish(&self) -> Result<(), Stop> {
        let wished = self.pass.cancel.load(Ordering::Relaxed);
        // Nothing more is of use once one channel is gone.
        if wished || self.pass.broken.load(Ordering::Relaxed) { Err(Stop::Wished) } else { Ok(()) }
    }

    /// A run inside one block: cut into runs of zero pages and runs of others.
    fn run_of_pages(&mut self, region: usize, first: u64, count: u64) -> Result<(), Stop> {
        let gpa = self.pass.dirty.layout()[region].gpa;
        let end = first + count;
        let mut page = first;
        let mut is_zero = self.is_zero(region, page)?;
        while page < end {
            let mut next = page + 1;
            let mut next_is_zero = is_zero;
            while next < end {
                next_is_zero = self.is_zero(region, next)?;
                let full = !is_zero && (next - page) * PAGE_SIZE >= self.run_bytes_max();
                if next_is_zero != is_zero || full {
                    break;
                }
                next += 1;
            }
            let range = RamRange { gpa: gpa + page * PAGE_SIZE, len: (next - page) * PAGE_SIZE };
            if !self.fits(range, is_zero) {
                self.flush((region, page))?;
            }
            if is_zero {
                self.push_zero(range)
            } else {
                self.push_pages(range)?
            }
            (page, is_zero) = (next, next_is_zero);
        }
        Ok(())
    }

    fn run_bytes_max(&self) -> u64 {
        if self.codec.is_some() { PACKED_BYTES } else { BATCH_BYTES }
    }

    fn is_zero(&self, region: usize, page: u64) -> Result<bool, MemoryError> {
        if self.is_hole(page) {
            return Ok(true);
        }
        let gpa = self.pass.dirty.layout()[region].gpa + page * PAGE_SIZE;
        let page = self.pass.memory.untracked_addr(gpa, PAGE_SIZE)?;
        // SAFETY: a whole page of guest memory.
        Ok(unsafe { is_zero_page(page) })
    }

    /// Whoever reports the block's pages as dirty forgets them before they are looked at, and holes are looked
    /// for after that: what is written later is reported again.
    fn begin_block(&mut self, region: usize, pages: Range<u64>) -> Result<(), Stop> {
        let pass = self.pass;
        let words = &pass.dirty.region(region)[words_of(&pages)];
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        if !pass.clearers.is_empty() {
            self.check_wish()?;
            let first = pages.start / 64 * 64;
            self.words.clear();
            self.words.extend_from_slice(words);
            // The words at both ends may be those of other blocks too.
            if let Some(word) = self.words.first_mut() {
                *word &= !0 << (pages.start - first);
            }
            let rest = pages.end % 64;
            if let (Some(word), 1..) = (self.words.last_mut(), rest) {
                *word &= (1 << rest) - 1;
            }
            for clearer in pass.clearers {
                clearer.clear(region, first, &self.words).map_err(RamError::from)?;
            }
        }
        self.find_block_data(region, &pages);
        Ok(())
    }

    fn find_block_data(&mut self, region: usize, pages: &Range<u64>) {
        let Some(data) = self.pass.data.and_then(|data| data.get(region)) else { return };
        self.data.clear();
        self.data.extend(within(data, pages.clone()));
        if self.pass.clearers.is_empty() {
            return;
        }
        // What was a hole when the pass began may have been filled before its block was forgotten.
        let fd = self.pass.memory.region_fd(region);
        let mut page = pages.start;
        let mut known = 0;
        while page < pages.end {
            match self.data.get(known) {
                Some(extent) if extent.contains(&page) => {
                    (page, known) = (extent.end, known + 1);
                    continue;
                }
                _ => {}
            }
            let hole_end = self.data.get(known).map_or(pages.end, |extent| extent.start);
            match next_data(fd, page * PAGE_SIZE).map(|at| at / PAGE_SIZE) {
                Some(found) if found < hole_end => {
                    self.data.insert(known, found..found + 1);
                    (page, known) = (found + 1, known + 1);
                }
                _ => page = hole_end,
            }
        }
    }

    fn is_hole(&self, page: u64) -> bool {
        if self.pass.data.is_none() {
            return false;
        }
        let behind = self.data.partition_point(|extent| extent.end <= page);
        !self.data.get(behind).is_some_and(|extent| extent.contains(&page))
    }

    fn fits(&self, range: RamRange, is_zero: bool) -> bool {
        let payload = if is_zero { 0 } else { range.len };
        let pages = self.batch_pages.normal_pages * PAGE_SIZE;
        self.headers.len() < BATCH_FRAMES && pages + payload <= BATCH_BYTES
    }

    fn push_zero(&mut self, range: RamRange) {
        self.push_header(ram_zero_header(range).encode());
        self.batch_pages.zero_pages += range.len / PAGE_SIZE;
    }

    fn push_pages(&mut self, range: RamRange) -> Result<(), MemoryError> {
        if let Some(codec) = self.codec {
            let begun = clock::now();
            let packed = self.push_packed(range, codec)?;
            self.packing = self.packing + clock::now().since(begun);
            if packed {
                return Ok(());
            }
        }
        let address = self.pass.memory.untracked_addr(range.gpa, range.len)?;
        let len = range.len as usize;
        if self.sender.features().ram_checksum {
            let start = self.copies.len();
            debug_assert!(start + len <= self.copies.capacity());
            self.copies.resize(start + len, 0);
            let copy = &mut self.copies[start..];
            self.pass.memory.read(range.gpa, copy)?;
            let checksum = crc32fast::hash(copy);
            let copy = copy.as_ptr();
            self.push_header(ram_pages_header(range, Some(checksum)).encode());
            self.batch.push_raw(copy, len);
        } else {
            self.push_header(ram_pages_header(range, None).encode());
            self.batch.push_raw(address.as_ptr(), len);
        }
        self.batch_pages.normal_pages += range.len / PAGE_SIZE;
        Ok(())
    }

    /// Answers false where the pages do not get smaller.
    fn push_packed(&mut self, range: RamRange, codec: Codec) -> Result<bool, MemoryError> {
        // A run that was cut before the channel turned to compressing.
        if range.len > PACKED_BYTES {
            return Ok(false);
        }
        if self.packer.is_none() {
            self.packer = Packer::new(codec);
            self.packed.resize(BATCH_BYTES as usize + OVERHEAD_BYTES, 0);
            let frames = BATCH_FRAMES * FRAME_BYTES + self.copies.capacity();
            let packing = self.packed.len() + PACKED_BYTES as usize + TABLES_BYTES;
            self.held.set((frames + packing) as u64);
        }
        let (Some(packer), Some(into)) = (&mut self.packer, self.packed.get_mut(self.packed_len..))
        else {
            return Ok(false);
        };
        self.unpacked.resize(range.len as usize, 0);
        self.pass.memory.read(range.gpa, &mut self.unpacked)?;
        let Some(len) = packer.pack(&self.unpacked, into) else { return Ok(false) };
        let Some(packed) = into.get(..len) else { return Ok(false) };
        let checksum = self.sender.features().ram_checksum.then(|| crc32fast::hash(packed));
        let packed = packed.as_ptr();
        self.packed_len += len;
        self.push_header(ram_packed_header(range, len as u32, codec, checksum).encode());
        self.batch.push_raw(packed, len);
        self.batch_pages.normal_pages += range.len / PAGE_SIZE;
        self.batch_pages.packed_pages += range.len / PAGE_SIZE;
        self.batch_pages.packed_bytes += len as u64;
        Ok(true)
    }

    fn push_header(&mut self, header: [u8; HEADER_LEN]) {
        debug_assert!(self.headers.len() < self.headers.capacity());
        self.headers.push(header);
        self.batch.push_frame();
        if let Some(header) = self.headers.last() {
            self.batch.push(header);
        }
    }

    /// Sends the batch; `next` is the first page that is not in it.
    fn flush(&mut self, next: (usize, u64)) -> Result<(), Stop> {
        self.check_wish()?;
        let bytes = self.batch.bytes();
        let begun = clock::now();
        // SAFETY: headers, copies and packed pages stay in place until they are cleared below; the rest is guest
        // memory.
        unsafe { self.sender.send(&mut self.batch) }?;
        let pages = std::mem::take(&mut self.batch_pages);
        let took = std::mem::take(&mut self.packing) + clock::now().since(begun);
        self.sender.note_pages(self.codec.is_some(), pages.normal_pages * PAGE_SIZE, took);
        self.codec = self.sender.codec();
        self.packed_len = 0;
        self.headers.clear();
        self.copies.clear();
        self.stats.normal_pages += pages.normal_pages;
        self.stats.zero_pages += pages.zero_pages;
        self.stats.packed_pages += pages.packed_pages;
        self.stats.packed_bytes += pages.packed_bytes;
        self.stats.wire_bytes += bytes;
        self.unsent = next;
        self.pass.progress.fetch_add(pages.normal_pages + pages.zero_pages, Ordering::Relaxed);
        Ok(())
    }
}
