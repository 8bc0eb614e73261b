//! [`CountedDevice`]: the device in numbers, for simulators.
//!
//! The same states, arcs, times, quirks and habits as [`DeviceCore`](crate::DeviceCore), but its state is
//! amounts instead of bytes: a migration of gigabytes costs it microseconds. A test walks both through the
//! same histories and compares what they say.

use device_profile::{DirtyModel, Profile, ReinitPolicy};
use vfio_migration::arcs::{SessionEffect, next_hop, session_effect};
use vfio_migration::{DeviceState, MigrationFlags};

use crate::blocks::BLOCK_BYTES;
use crate::quirks::{Quirks, SizeClaim};
use crate::timing::Timing;

/// Records that end a stream, in bytes: registers and end mark.
const TAIL_BYTES: u64 = 256;

/// What PRECOPY_INFO answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountedInfo {
    /// Unread initial bytes.
    pub initial_bytes: u64,
    /// Unread dirty bytes.
    pub dirty_bytes: u64,
    /// New initial data was announced.
    pub reinit: bool,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountedRead {
    /// So many bytes, at least one.
    Data(u64),
    /// Nothing now, in PRE_COPY.
    NothingNow,
    /// The end, in STOP_COPY.
    End,
}

/// The device in numbers. See the [module](self).
#[derive(Clone, Debug)]
pub struct CountedDevice {
    flags: MigrationFlags,
    data_size: bool,
    quirks: Quirks,
    timing: Timing,
    reinit_policy: ReinitPolicy,
    reinit_in_p2p: bool,
    dirty_model: DirtyModel,
    reread_interval_ns: u64,
    config_bytes: u64,
    precopyable_bytes: u64,
    stop_only_bytes: u64,

    state: DeviceState,
    sets: u64,
    saving: bool,
    initial_unread: u64,
    /// Never read in this session, and read but changed since.
    unsent: u64,
    changed: u64,
    /// Readable without asking first, where asking drives the device.
    planned: u64,
    stop_only_unread: u64,
    /// Work of less than a block.
    worked_bytes: u64,
    reconfigured: bool,
    reinit_edge: bool,
    reads: u64,
    asked_when_read: u64,
    reread_at_ns: u64,
}

impl CountedDevice {
    /// A device of `profile` in RUNNING, with its typical sizes.
    pub fn new(profile: &Profile, quirks: Quirks, timing: Timing) -> Self {
        let features = &profile.features;
        let config_bytes = profile.sizes.initial_bytes.typical;
        let bulk = profile.sizes.total_bytes.typical.saturating_sub(config_bytes);
        let stop_only_bytes = match profile.precopy.dirty.value {
            DirtyModel::Never => bulk,
            _ => profile.sizes.stop_only_bytes.typical.min(bulk),
        };
        let reread = profile.precopy.reread_interval_us.as_ref();
        Self {
            flags: MigrationFlags::new(features.p2p.value, features.pre_copy.value),
            data_size: features.data_size.value,
            quirks,
            timing,
            reinit_policy: match features.precopy_info_v2.value {
                true => profile.precopy.reinit.value,
                false => ReinitPolicy::Never,
            },
            reinit_in_p2p: profile.precopy.reinit_in_p2p.value,
            dirty_model: profile.precopy.dirty.value,
            reread_interval_ns: reread.map_or(0, |us| us.typical.saturating_mul(1_000)),
            config_bytes,
            precopyable_bytes: bulk - stop_only_bytes,
            stop_only_bytes,
            state: DeviceState::Running,
            sets: 0,
            saving: false,
            initial_unread: 0,
            unsent: 0,
            changed: 0,
            planned: 0,
            stop_only_unread: 0,
            worked_bytes: 0,
            reconfigured: false,
            reinit_edge: false,
            reads: 0,
            asked_when_read: 0,
            reread_at_ns: 0,
        }
    }

    /// Where it is.
    pub fn state(&self) -> DeviceState {
        self.state
    }

    /// What it has.
    pub fn flags(&self) -> MigrationFlags {
        self.flags
    }

    /// Its deviations.
    pub fn quirks(&self) -> &Quirks {
        &self.quirks
    }

    /// How long it takes; a simulator draws anew for each call.
    pub fn timing_mut(&mut self) -> &mut Timing {
        &mut self.timing
    }

    /// How long it takes.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// A whole SET at time `now_ns`: how long it takes, in ns, or `None` where it is refused (F4 to F7). Arcs
    /// that are slow once in many SETs are slow where `slow` says so.
    pub fn set_state(
        &mut self,
        target: DeviceState,
        now_ns: u64,
        mut slow: impl FnMut(u64) -> bool,
    ) -> Option<u64> {
        self.sets += 1;
        let mut took_ns = 0u64;
        next_hop(self.state, target, self.flags)?;
        while self.state != target {
            let (from, to) = (self.state, next_hop(self.state, target, self.flags)?);
            took_ns = took_ns.saturating_add(self.timing.arc_ns(from, to));
            for arc in self.quirks.slow_arcs.iter().filter(|arc| arc.to == to) {
                if slow(arc.one_in) {
                    took_ns = took_ns.saturating_add(arc.ms.saturating_mul(1_000_000));
                }
            }
            self.enter(from, to, now_ns);
        }
        Some(took_ns)
    }

    fn enter(&mut self, from: DeviceState, to: DeviceState, now_ns: u64) {
        self.state = to;
        match session_effect(from, to) {
            SessionEffect::BeginsSaving => {
                self.saving = true;
                self.initial_unread = self.config_bytes;
                self.unsent = self.precopyable_bytes;
                (self.changed, self.planned) = (0, 0);
                self.stop_only_unread = self.stop_only_bytes;
                (self.reconfigured, self.reinit_edge, self.reads) = (false, false, 0);
                (self.asked_when_read, self.reread_at_ns) = (0, now_ns);
            }
            SessionEffect::Ends => self.saving = false,
            SessionEffect::Keeps | SessionEffect::BeginsResuming => {}
        }
        if to == DeviceState::StopCopy {
            let whole = self.dirty_model == DirtyModel::Reread || self.quirks.hidden_save_failure;
            if whole && from != DeviceState::Stop {
                (self.unsent, self.changed) = (self.precopyable_bytes, 0);
            }
            if (whole && from != DeviceState::Stop) || self.reconfigured {
                self.initial_unread = self.initial_unread.max(self.config_bytes);
            }
            (self.reconfigured, self.reinit_edge) = (false, false);
            if let Some(kib) = self.quirks.grow_after_stop_kib {
                self.stop_only_unread = self.stop_only_unread.saturating_add(u64::from(kib) * 1024);
            }
            self.stop_only_unread += TAIL_BYTES;
        }
    }

    /// Reset: RUNNING, no session.
    pub fn reset(&mut self) {
        (self.state, self.saving) = (DeviceState::Running, false);
    }

    /// The guest's work changed so many bytes; what is offered again are whole blocks.
    pub fn dirty(&mut self, bytes: u64) {
        if self.saving && self.dirty_model == DirtyModel::Tracked {
            let worked = self.worked_bytes.saturating_add(bytes);
            self.worked_bytes = worked % BLOCK_BYTES;
            let bytes = worked - self.worked_bytes;
            let read =
                self.precopyable_bytes.saturating_sub(self.unsent).saturating_sub(self.planned);
            self.changed = self.changed.saturating_add(bytes).min(read);
        }
    }

    /// The guest reconfigured the device: `bytes` of configuration.
    pub fn reconfigure(&mut self, bytes: u64) {
        self.config_bytes = bytes;
        self.reconfigured = self.saving;
    }

    fn reinit(&mut self) {
        let rest = match self.initial_unread {
            0 => self.changed + self.unsent + self.planned,
            _ => self.changed + self.planned,
        };
        match self.reinit_policy {
            ReinitPolicy::Never => return,
            ReinitPolicy::Flush => {
                if self.initial_unread == 0 {
                    self.unsent = 0;
                }
                (self.changed, self.planned) = (0, 0);
                self.initial_unread += rest + self.config_bytes;
            }
            ReinitPolicy::Recount => {
                self.unsent += self.changed + self.planned;
                (self.changed, self.planned) = (0, 0);
                self.initial_unread = self.config_bytes;
            }
        }
        (self.reconfigured, self.reinit_edge) = (false, true);
    }

    fn plan(&mut self, now_ns: u64) {
        let in_p2p = self.state == DeviceState::PreCopyP2p;
        if self.reconfigured {
            if self.reinit_policy != ReinitPolicy::Never {
                if !in_p2p || self.reinit_in_p2p {
                    self.reinit();
                }
            } else if self.dirty_model == DirtyModel::Tracked {
                self.planned += self.config_bytes;
                self.reconfigured = false;
            }
        }
        let due = now_ns.saturating_sub(self.reread_at_ns) >= self.reread_interval_ns;
        let read = self.unsent + self.changed + self.planned == 0;
        if self.dirty_model == DirtyModel::Reread && due && read {
            self.unsent = self.precopyable_bytes;
            self.planned = self.config_bytes;
            (self.reconfigured, self.reread_at_ns) = (false, now_ns);
        }
    }

    /// PRECOPY_INFO; `None` where it fails.
    pub fn info(&mut self, now_ns: u64) -> Option<CountedInfo> {
        let in_p2p = self.state == DeviceState::PreCopyP2p;
        if !self.state.is_precopy()
            || self.quirks.info_fails
            || (in_p2p && self.quirks.no_info_in_p2p)
        {
            return None;
        }
        if let Some(every) = self.quirks.reinit_when_read
            && self.initial_unread == 0
        {
            self.asked_when_read += 1;
            self.reconfigured |= self.asked_when_read.is_multiple_of(every);
        }
        self.plan(now_ns);
        if self.quirks.info_drives_device && self.initial_unread + self.planned == 0 && !in_p2p {
            self.planned = self.unsent + self.changed;
            (self.unsent, self.changed) = (0, 0);
        }
        let unsent = if self.initial_unread == 0 { self.unsent } else { 0 };
        let mut dirty_bytes = self.changed + self.planned + unsent;
        if self.dirty_model == DirtyModel::Never
            || (self.quirks.hidden_save_failure && self.initial_unread == 0)
        {
            dirty_bytes = 0;
        }
        let initial_bytes = match self.quirks.size {
            SizeClaim::Garbage => u64::MAX - 884_575,
            _ => self.initial_unread,
        };
        let reinit = std::mem::take(&mut self.reinit_edge);
        Some(CountedInfo { initial_bytes, dirty_bytes, reinit })
    }

    /// MIG_DATA_SIZE; `None` where it fails.
    pub fn stop_copy_length(&self) -> Option<u64> {
        if !self.data_size {
            return None;
        }
        let honest = match self.saving {
            true => self.remaining_bytes(),
            false => self.config_bytes + self.precopyable_bytes + self.stop_only_bytes + TAIL_BYTES,
        };
        match self.quirks.size {
            SizeClaim::Honest => Some(honest),
            SizeClaim::Garbage => Some(u64::MAX - 8_207),
            SizeClaim::Zero => Some(0),
            SizeClaim::Under => Some(honest / 10),
            SizeClaim::Fails => None,
        }
    }

    /// What is still to be read of this session until the end of STOP_COPY, in bytes.
    pub fn remaining_bytes(&self) -> u64 {
        let tail = if self.state == DeviceState::StopCopy { 0 } else { TAIL_BYTES };
        let config = if self.reconfigured { self.config_bytes } else { 0 };
        self.initial_unread
            + self.unsent
            + self.changed
            + self.planned
            + self.stop_only_unread
            + config
            + tail
    }

    /// Unread initial data, in bytes.
    pub fn initial_unread_bytes(&self) -> u64 {
        self.initial_unread
    }

    /// How much could be read now, in bytes.
    pub fn readable_bytes(&self) -> u64 {
        match self.state {
            DeviceState::StopCopy => self.remaining_bytes(),
            _ if self.quirks.enomsg_forever => 0,
            _ if self.initial_unread > 0 => self.initial_unread,
            _ if self.dirty_model == DirtyModel::Never => 0,
            _ if self.quirks.info_drives_device || self.quirks.hidden_save_failure => self.planned,
            _ => self.planned + self.changed + self.unsent,
        }
    }

    /// Reads at most `max` bytes; how long that takes is [`Timing::read_ns`].
    pub fn read(&mut self, max: u64, now_ns: u64) -> CountedRead {
        let precopy = self.state.is_precopy();
        if precopy {
            self.reads += 1;
            self.reconfigured |=
                self.quirks.reinit_storm.is_some_and(|every| self.reads.is_multiple_of(every));
            self.plan(now_ns);
        }
        let bytes = self.readable_bytes().min(max.max(1));
        if bytes == 0 {
            return if precopy { CountedRead::NothingNow } else { CountedRead::End };
        }
        let mut left = bytes;
        let parts = [
            &mut self.initial_unread,
            &mut self.planned,
            &mut self.changed,
            &mut self.unsent,
            &mut self.stop_only_unread,
        ];
        for part in parts {
            let taken = left.min(*part);
            *part -= taken;
            left -= taken;
        }
        CountedRead::Data(bytes)
    }
}
