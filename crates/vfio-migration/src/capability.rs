//! What a device says it can do.

use crate::state::DeviceState;

/// The flags of `VFIO_DEVICE_FEATURE_MIGRATION`; only the four defined sets can be built (D1, D2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationFlags {
    p2p: bool,
    pre_copy: bool,
}

impl MigrationFlags {
    /// `VFIO_MIGRATION_STOP_COPY`.
    pub const STOP_COPY: u64 = 1;
    /// `VFIO_MIGRATION_P2P`.
    pub const P2P: u64 = 2;
    /// `VFIO_MIGRATION_PRE_COPY`.
    pub const PRE_COPY: u64 = 4;

    /// STOP_COPY, which every migratable device has, plus what is named.
    pub const fn new(p2p: bool, pre_copy: bool) -> Self {
        Self { p2p, pre_copy }
    }

    /// Parses the uAPI's word. `None` when STOP_COPY is missing or a reserved bit is set (D1, D2).
    pub fn from_raw(raw: u64) -> Option<Self> {
        let known = Self::STOP_COPY | Self::P2P | Self::PRE_COPY;
        if raw & Self::STOP_COPY == 0 || raw & !known != 0 {
            return None;
        }
        Some(Self::new(raw & Self::P2P != 0, raw & Self::PRE_COPY != 0))
    }

    /// The uAPI's word.
    pub fn as_raw(self) -> u64 {
        let mut raw = Self::STOP_COPY;
        if self.p2p {
            raw |= Self::P2P;
        }
        if self.pre_copy {
            raw |= Self::PRE_COPY;
        }
        raw
    }

    /// The device has the P2P states.
    pub fn p2p(self) -> bool {
        self.p2p
    }

    /// The device has PRE_COPY.
    pub fn pre_copy(self) -> bool {
        self.pre_copy
    }

    /// The device has `state` at all.
    pub fn has_state(self, state: DeviceState) -> bool {
        match state {
            DeviceState::RunningP2p => self.p2p,
            DeviceState::PreCopy => self.pre_copy,
            DeviceState::PreCopyP2p => self.p2p && self.pre_copy,
            _ => true,
        }
    }
}

/// Everything probed about a device before it is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceCapabilities {
    /// The migration states the device has.
    pub flags: MigrationFlags,
    /// PRECOPY_INFO can be asked. Always so for a kernel device with PRE_COPY (P1); a plain
    /// libvfio-user server lacks it.
    pub precopy_info: bool,
    /// INFOv2: flags are meaningful and REINIT can come (R3). Backends opt in when they open a device; a
    /// device that is served says here that its client may opt in.
    pub precopy_info_v2: bool,
    /// MIG_DATA_SIZE can be asked (Z1).
    pub data_size: bool,
    /// The device logs its DMA writes.
    pub dma_logging: bool,
    /// A reset leads to RUNNING (H5). Some vfio-user servers keep the migration state instead.
    pub reset_runs: bool,
    /// The largest single write the device's stream takes, in bytes; `None` = no limit known.
    pub max_write_bytes: Option<usize>,
}
