//! A saving session: what is on the stream, in which order, and how it is counted.
//!
//! ```text
//!   guest reconfigures ─> queue: [header] [blocks] [configuration]     initial or dirty, planned
//!   guest fills ────────> changed ┐
//!   session begins ─────> unsent  ┴─ read when the queue is empty      dirty
//!                                     stop-copy: the rest, registers, END
//!   reader <── out: the rest of one record
//! ```
//!
//! Records are made one at a time as they are read, so memory stays at one record whatever the size
//! of the state, while every planned byte is counted exactly: initial bytes fall to zero as the stream
//! is read (P4, R5) because lengths are known before the bytes are.

use std::collections::VecDeque;

use device_profile::{DirtyModel, ReinitPolicy};

use super::record::{self, FORMAT_VERSION, HEADER_BYTES, Kind, PAYLOAD_MAX_BYTES};
use super::registers::{self, REGISTERS_BYTES};
use crate::blocks::{BLOCK_BYTES, BlockSet, GROUP_BLOCKS};
use crate::internals::{Configuration, Geometry, Internals};
use crate::precopy::Report;
use crate::quirks::Quirks;

/// How planned bytes are counted in PRE_COPY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Initial,
    Dirty,
}

#[derive(Clone, Debug)]
enum Item {
    Header,
    /// `next`: the offset to go on from; `None` while not even the CONFIG record is made.
    Config {
        config: Configuration,
        next: Option<u64>,
        class: Class,
    },
    Blocks {
        set: BlockSet,
        class: Class,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Precopy,
    /// The rest, then what is named.
    Registers,
    End,
    Done,
}

/// What a device does in its saving sessions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) reinit: ReinitPolicy,
    pub(crate) reinit_in_p2p: bool,
    pub(crate) dirty: DirtyModel,
    pub(crate) reread_interval_ns: u64,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Data(usize),
    NothingNow,
    End,
}

/// The circumstances of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    pub(crate) internals: &'a Internals,
    pub(crate) quirks: &'a Quirks,
    pub(crate) now_ns: u64,
    pub(crate) opted_in: bool,
    /// The device is in PRE_COPY_P2P.
    pub(crate) in_p2p: bool,
}

/// One saving session.
#[derive(Clone, Debug)]
pub(crate) struct Saver {
    habits: Habits,
    geometry: Geometry,
    queue: VecDeque<Item>,
    /// The rest of the record that is being read.
    out: Vec<u8>,
    out_at: usize,
    out_class: Class,
    sequence: u64,
    /// Blocks that this session has not carried since they last counted from zero.
    unsent: BlockSet,
    /// Blocks written since.
    changed: BlockSet,
    precopyable: BlockSet,
    /// The guest reconfigured the device; nothing of it is planned yet.
    reconfigured: bool,
    /// REINIT happened and was not reported yet (R10).
    reinit_edge: bool,
    stage: Stage,
    reads: u64,
    asked_when_read: u64,
    last_reread_ns: u64,
    corrupted: bool,
    /// REINITs that were reported, and whether a report without initial bytes was.
    reinits: u64,
    initial_was_read: bool,
}

/// Stream bytes after the state itself: registers and END.
const TAIL_BYTES: u64 = (2 * HEADER_BYTES + REGISTERS_BYTES) as u64;
const STREAM_HEADER_BYTES: u64 = HEADER_BYTES as u64 + 16;

/// The stream length of a whole session that carries everything once.
pub(crate) fn whole_stream_bytes(internals: &Internals) -> u64 {
    let geometry = internals.bulk.geometry();
    let blocks = BlockSet::full(geometry.blocks());
    STREAM_HEADER_BYTES
        + config_bytes(internals.config.size_bytes, None)
        + blocks_bytes(&blocks, geometry)
        + TAIL_BYTES
}

fn config_bytes(size_bytes: u64, next: Option<u64>) -> u64 {
    let rest = size_bytes - next.unwrap_or(0).min(size_bytes);
    let data = rest + rest.div_ceil(PAYLOAD_MAX_BYTES as u64) * HEADER_BYTES as u64;
    data + if next.is_none() { HEADER_BYTES as u64 + 4 } else { 0 }
}

fn blocks_bytes(set: &BlockSet, geometry: &Geometry) -> u64 {
    let last = geometry.blocks().saturating_sub(1);
    let short = if set.contains(last) { BLOCK_BYTES - geometry.block_len(last) } else { 0 };
    set.count() * BLOCK_BYTES - short + set.groups() * HEADER_BYTES as u64
}

impl Saver {
    /// A session that begins in PRE_COPY or PRE_COPY_P2P.
    pub(crate) fn begin_precopy(habits: Habits, internals: &Internals, now_ns: u64) -> Self {
        let mut saver = Self::new(habits, internals, now_ns, Stage::Precopy);
        saver.push_config(internals, Class::Initial);
        saver
    }

    /// A session that begins in STOP_COPY.
    pub(crate) fn begin_stop_copy(habits: Habits, internals: &Internals, now_ns: u64) -> Self {
        let mut saver = Self::new(habits, internals, now_ns, Stage::Registers);
        saver.push_config(internals, Class::Dirty);
        saver
    }

    fn new(habits: Habits, internals: &Internals, now_ns: u64, stage: Stage) -> Self {
        let geometry = *internals.bulk.geometry();
        let blocks = geometry.blocks();
        let mut precopyable = BlockSet::empty(blocks);
        precopyable.insert_range(0, geometry.first_stop_only_block());
        Self {
            habits,
            geometry,
            queue: VecDeque::from([Item::Header]),
            out: Vec::new(),
            out_at: 0,
            out_class: Class::Initial,
            sequence: 0,
            unsent: BlockSet::full(blocks),
            changed: BlockSet::empty(blocks),
            precopyable,
            reconfigured: false,
            reinit_edge: false,
            stage,
            reads: 0,
            asked_when_read: 0,
            last_reread_ns: now_ns,
            corrupted: false,
            reinits: 0,
            initial_was_read: false,
        }
    }

    fn push_config(&mut self, internals: &Internals, class: Class) {
        let config = internals.config.clone();
        self.queue.push_back(Item::Config { config, next: None, class });
    }

    /// The guest rewrote blocks `first..end`.
    pub(crate) fn note_fill(&mut self, first: u64, end: u64) {
        if self.habits.dirty != DirtyModel::Tracked && self.stage == Stage::Precopy {
            return;
        }
        let mut written = BlockSet::empty(self.geometry.blocks());
        written.insert_range(first, end);
        // Planned blocks are read as they are then: they did not change relative to anything read.
        for item in &self.queue {
            if let Item::Blocks { set, .. } = item {
                written.subtract(set);
            }
        }
        self.changed.union(&written);
    }

    /// The guest reconfigured the device.
    pub(crate) fn note_reconfiguration(&mut self) {
        self.reconfigured = true;
    }

    /// PRECOPY_INFO. As on real devices this is more than a query: it plans what is to be read next.
    pub(crate) fn info(&mut self, context: &Context<'_>) -> Report {
        if let Some(every) = context.quirks.reinit_when_read
            && self.stage == Stage::Precopy
            && self.initial_bytes() == 0
        {
            self.asked_when_read += 1;
            self.reconfigured |= self.asked_when_read.is_multiple_of(every);
        }
        self.plan(context);
        let drained = self.out_at == self.out.len() && self.queue.is_empty();
        if context.quirks.info_drives_device && drained && !context.in_p2p {
            self.plan_increment();
        }
        let mut reinit = context.opted_in && std::mem::take(&mut self.reinit_edge);
        let initial_bytes = self.initial_bytes();
        let dirty_bytes = self.dirty_bytes(initial_bytes);
        let breaks = &context.quirks.breaks;
        self.initial_was_read |= initial_bytes == 0;
        reinit &= !(breaks.has("R5") && self.reinits > 0);
        reinit &= !(breaks.has("R6") && self.initial_was_read && self.reinits == 0);
        self.reinits += u64::from(reinit);
        let mut report = Report { initial_bytes, dirty_bytes, reinit };
        if breaks.has("R4") && reinit {
            report.dirty_bytes = report.dirty_bytes.max(BLOCK_BYTES);
        }
        if breaks.has("R7") && reinit {
            report.initial_bytes /= 2;
        }
        if breaks.has("P5") && self.reads == 0 {
            report.dirty_bytes = report.dirty_bytes.max(BLOCK_BYTES);
        }
        report
    }

    /// Reads at most one record's rest into `buf`.
    pub(crate) fn read(&mut self, buf: &mut [u8], context: &Context<'_>) -> Found {
        let precopy = self.stage == Stage::Precopy;
        if precopy {
            self.reads += 1;
            if context.quirks.reinit_storm.is_some_and(|every| self.reads.is_multiple_of(every)) {
                self.reconfigured = true;
            }
            if context.quirks.enomsg_forever {
                return Found::NothingNow;
            }
        }
        if self.out_at == self.out.len() && !self.produce(context) {
            return if precopy { Found::NothingNow } else { Found::End };
        }
        let rest = self.out.get(self.out_at..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.out_at += len;
        Found::Data(len)
    }

    /// The device is stopped: what was not read yet follows, then everything that can only be read now.
    pub(crate) fn enter_stop_copy(&mut self, internals: &Internals, quirks: &Quirks) {
        if self.stage != Stage::Precopy {
            return;
        }
        if quirks.breaks.has("S4") {
            self.queue.clear();
            (self.out, self.out_at) = (Vec::new(), 0);
        }
        let whole = self.habits.dirty == DirtyModel::Reread || quirks.hidden_save_failure;
        if whole {
            self.unsent = BlockSet::full(self.geometry.blocks());
        }
        if whole || self.reconfigured {
            self.queue.retain(|item| !matches!(item, Item::Config { next: None, .. }));
            self.push_config(internals, Class::Dirty);
        }
        self.reconfigured = false;
        self.reinit_edge = false;
        self.stage = Stage::Registers;
    }

    /// Estimated bytes until the end of STOP_COPY, unread PRE_COPY data included.
    pub(crate) fn remaining_bytes(&self, internals: &Internals) -> u64 {
        let mut blocks = self.unsent.clone();
        blocks.union(&self.changed);
        let planned = self.planned_bytes(Class::Initial) + self.planned_bytes(Class::Dirty);
        let config = match self.reconfigured {
            true => config_bytes(internals.config.size_bytes, None),
            false => 0,
        };
        let tail = match self.stage {
            Stage::Precopy | Stage::Registers => TAIL_BYTES,
            Stage::End => HEADER_BYTES as u64,
            Stage::Done => 0,
        };
        planned + config + blocks_bytes(&blocks, &self.geometry) + tail
    }

    pub(crate) fn initial_bytes(&self) -> u64 {
        self.planned_bytes(Class::Initial)
    }

    fn dirty_bytes(&self, initial_bytes: u64) -> u64 {
        if self.habits.dirty == DirtyModel::Never {
            return 0;
        }
        let mut blocks = self.changed.clone();
        if initial_bytes == 0 {
            blocks.union(&self.unsent);
        }
        blocks.intersect(&self.precopyable);
        self.planned_bytes(Class::Dirty) + blocks_bytes(&blocks, &self.geometry)
    }

    /// Unread bytes of one class that are planned.
    fn planned_bytes(&self, wanted: Class) -> u64 {
        let out = if self.out_class == wanted { self.out.len() - self.out_at } else { 0 };
        let items = self.queue.iter().map(|item| match item {
            Item::Header if wanted == Class::Initial => STREAM_HEADER_BYTES,
            Item::Config { config, next, class } if *class == wanted => {
                config_bytes(config.size_bytes, *next)
            }
            Item::Blocks { set, class } if *class == wanted => blocks_bytes(set, &self.geometry),
            _ => 0,
        });
        out as u64 + items.sum::<u64>()
    }

    /// Takes notice of what the guest did since, in PRE_COPY.
    fn plan(&mut self, context: &Context<'_>) {
        if self.stage != Stage::Precopy {
            return;
        }
        if self.reconfigured {
            let reinit = context.opted_in && self.habits.reinit != ReinitPolicy::Never;
            if reinit && (!context.in_p2p || self.habits.reinit_in_p2p) {
                self.reinit(context.internals);
            } else if !reinit && self.habits.dirty == DirtyModel::Tracked {
                // Initial data cannot grow (P4), so a new configuration is ordinary change.
                let stale = |item: &Item| {
                    matches!(item, Item::Config { next: None, class: Class::Dirty, .. })
                };
                self.queue.retain(|item| !stale(item));
                self.push_config(context.internals, Class::Dirty);
                self.reconfigured = false;
            }
        }
        let due = context.now_ns.saturating_sub(self.last_reread_ns);
        if self.habits.dirty == DirtyModel::Reread
            && due >= self.habits.reread_interval_ns
            && self.queue.is_empty()
            && self.unsent.first_group_of_union(&self.changed, Some(&self.precopyable)).is_none()
        {
            self.unsent.union(&self.precopyable);
            self.push_config(context.internals, Class::Dirty);
            self.reconfigured = false;
            self.last_reread_ns = context.now_ns;
        }
    }

    /// New initial data: the one place that knows what becomes of unread data (R4, R7).
    fn reinit(&mut self, internals: &Internals) {
        let initial_bytes = self.initial_bytes();
        // A record that is being read must be read to its end.
        self.out_class = Class::Initial;
        match self.habits.reinit {
            ReinitPolicy::Never => return,
            ReinitPolicy::Flush => {
                // Everything counted as unread so far comes first. A configuration that was not begun is
                // replaced by the new one, which bounds the queue whatever the guest does.
                let mut blocks = self.changed.clone();
                if initial_bytes == 0 {
                    blocks.union(&self.unsent);
                }
                blocks.intersect(&self.precopyable);
                self.queue.retain_mut(|item| match item {
                    Item::Header => true,
                    Item::Config { next, class, .. } => {
                        *class = Class::Initial;
                        next.is_some()
                    }
                    Item::Blocks { set, .. } => {
                        blocks.union(set);
                        false
                    }
                });
                self.unsent.subtract(&blocks);
                self.changed.subtract(&blocks);
                if !blocks.is_empty() {
                    self.queue.push_back(Item::Blocks { set: blocks, class: Class::Initial });
                }
            }
            ReinitPolicy::Recount => {
                // Unread data is dropped: blocks are still to be carried, but count from zero.
                let unsent = &mut self.unsent;
                self.queue.retain(|item| match item {
                    Item::Header => true,
                    Item::Config { .. } => false,
                    Item::Blocks { set, .. } => {
                        unsent.union(set);
                        false
                    }
                });
                self.unsent.union(&self.changed);
                self.changed.clear();
            }
        }
        self.push_config(internals, Class::Initial);
        self.reconfigured = false;
        self.reinit_edge = true;
    }

    /// Plans all change as one piece (mlx5: starts the next SAVE).
    fn plan_increment(&mut self) {
        if self.habits.dirty == DirtyModel::Never {
            return;
        }
        let mut set = self.unsent.clone();
        set.union(&self.changed);
        set.intersect(&self.precopyable);
        self.unsent.subtract(&set);
        self.changed.subtract(&set);
        if !set.is_empty() {
            self.queue.push_back(Item::Blocks { set, class: Class::Dirty });
        }
    }

    /// Makes the next record; `false` where there is none (now).
    fn produce(&mut self, context: &Context<'_>) -> bool {
        self.out.clear();
        self.out_at = 0;
        if self.produce_planned(context) {
            return true;
        }
        match self.stage {
            Stage::Precopy => {
                let quirks = context.quirks;
                if quirks.info_drives_device || quirks.hidden_save_failure {
                    return false;
                }
                self.plan(context);
                if self.produce_planned(context) {
                    return true;
                }
                self.habits.dirty != DirtyModel::Never && self.produce_blocks(context, true)
            }
            Stage::Registers => {
                if self.produce_blocks(context, false) {
                    return true;
                }
                let Internals { regs, pending, .. } = context.internals;
                let pending =
                    if context.quirks.lose_interrupts { Default::default() } else { *pending };
                self.record(Kind::Registers, 0, 0, |out| registers::encode(out, regs, pending));
                self.stage = Stage::End;
                true
            }
            Stage::End => {
                self.record(Kind::End, 0, self.sequence, |_| ());
                self.stage = Stage::Done;
                true
            }
            Stage::Done => false,
        }
    }

    fn produce_planned(&mut self, context: &Context<'_>) -> bool {
        loop {
            match self.queue.front_mut() {
                None => return false,
                Some(Item::Header) => {
                    let geometry = record::encode_geometry(&self.geometry);
                    self.out_class = Class::Initial;
                    self.queue.pop_front();
                    self.record(Kind::Header, 0, FORMAT_VERSION, |out| {
                        out.extend_from_slice(&geometry);
                    });
                    return true;
                }
                Some(Item::Config { config, next: next @ None, class }) => {
                    let (generation, size_bytes) = (config.generation, config.size_bytes);
                    self.out_class = *class;
                    *next = Some(0);
                    if size_bytes == 0 {
                        self.queue.pop_front();
                    }
                    self.record(Kind::Config, 0, size_bytes, |out| {
                        out.extend_from_slice(&generation.to_le_bytes());
                    });
                    return true;
                }
                Some(Item::Config { config, next: Some(next), class }) => {
                    let config = config.clone();
                    let offset = *next;
                    let len = (config.size_bytes - offset).min(PAYLOAD_MAX_BYTES as u64);
                    self.out_class = *class;
                    *next += len;
                    if *next == config.size_bytes {
                        self.queue.pop_front();
                    }
                    self.record(Kind::ConfigData, 0, offset, |out| {
                        let start = out.len();
                        out.resize(start + len as usize, 0);
                        config.read(offset, &mut out[start..]);
                    });
                    return true;
                }
                Some(Item::Blocks { set, class }) => {
                    let class = *class;
                    if let Some((group, mask)) = set.first_group() {
                        set.remove_group(group);
                        self.out_class = class;
                        self.record_group(context, group, mask);
                        return true;
                    }
                    self.queue.pop_front();
                }
            }
        }
    }

    /// Makes a record of the next group that is not planned.
    fn produce_blocks(&mut self, context: &Context<'_>, precopy: bool) -> bool {
        let within = precopy.then_some(&self.precopyable);
        let found = self.unsent.first_group_of_union(&self.changed, within);
        let Some((group, mask)) = found else { return false };
        for bit in (0..GROUP_BLOCKS).filter(|bit| mask >> bit & 1 != 0) {
            let block = group * GROUP_BLOCKS + bit;
            self.unsent.remove_range(block, block + 1);
            self.changed.remove_range(block, block + 1);
        }
        self.out_class = Class::Dirty;
        self.record_group(context, group, mask);
        true
    }

    fn record_group(&mut self, context: &Context<'_>, group: u64, mask: u16) {
        let corrupt = context.quirks.corrupt_save && !self.corrupted;
        self.corrupted |= corrupt;
        self.record(Kind::Bulk, mask, group, |out| {
            let start = out.len();
            for bit in (0..GROUP_BLOCKS).filter(|bit| mask >> bit & 1 != 0) {
                let at = out.len();
                out.resize(at + BLOCK_BYTES as usize, 0);
                let block = group * GROUP_BLOCKS + bit;
                let len = context.internals.bulk.read_block(block, &mut out[at..]);
                out.truncate(at + len);
            }
            if let (true, Some(byte)) = (corrupt, out.get_mut(start)) {
                *byte ^= 1;
            }
        });
    }

    fn record(&mut self, kind: Kind, arg: u16, value: u64, payload: impl FnOnce(&mut Vec<u8>)) {
        record::encode(&mut self.out, kind, arg, self.sequence, value, payload);
        self.sequence += 1;
    }
}
