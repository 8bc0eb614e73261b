//! [`DeviceCore`]: the whole device, without I/O.
//!
//! ```text
//!   guest     region_read, region_write ──┐                 ┌──> GuestDma::write   stamps
//!   time      advance(now) ───────────────┤   DeviceCore    ├──> take_fired        interrupts
//!   VMM       wire, mask, reset ──────────┤                 └──> digest
//!   engine    hops, read, write, info ────┘
//! ```
//!
//! Every method is short and none waits. What takes time on a real device is told in ns ([`Hop`],
//! [`Written`], [`DeviceCore::read_ns`]) for the caller to let pass: a thread sleeps, a simulator moves
//! its clock.
//!
//! | module | holds |
//! |---|---|
//! | `guest` | regions and registers |
//! | `work` | stamps, doorbells, background DMA, interrupts |
//! | `migration` | states, sessions, streams, PRECOPY_INFO, sizes |

mod guest;
mod migration;
mod work;

use device_profile::{DirtyModel, Profile};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, IrqIndex, IrqInfo,
    MigrationFlags, PciFunctionInfo, RegionFlags, RegionInfo,
};

pub(crate) use migration::towards;
pub use migration::{Direction, Hop, RawRead, Session, SetOutcome, Written};
pub use work::{DeferredWrite, DmaFault, GuestDma};

use crate::blocks::BLOCK_BYTES;
use crate::dma_log::DmaLog;
use crate::error::ModelError;
use crate::internals::{Geometry, Internals};
use crate::irq::{Fired, MSIX_MASK, Wiring};
use crate::pci_config::PciConfig;
use crate::quirks::Quirks;
use crate::regs;
use crate::stream::saver::Habits;
use crate::timing::Timing;

/// Most state a device keeps, in bytes.
const TOTAL_MAX_BYTES: u64 = 64 << 30;
/// Largest configuration, in bytes.
const CONFIG_MAX_BYTES: u64 = 8 << 30;

/// What a device is made from.
#[derive(Clone, Debug)]
pub struct CoreOptions {
    /// The kind of device.
    pub profile: Profile,
    /// Its deviations.
    pub quirks: Quirks,
    /// How long it takes.
    pub timing: Timing,
}

impl CoreOptions {
    /// A device of `profile` that takes no time and has no deviations.
    pub fn new(profile: Profile) -> Self {
        Self { profile, quirks: Quirks::default(), timing: Timing::OFF }
    }
}

/// A software device.
#[derive(Clone, Debug)]
pub struct DeviceCore {
    geometry: Geometry,
    habits: Habits,
    flags: MigrationFlags,
    offers_info_v2: bool,
    offers_data_size: bool,
    offers_dma_log: bool,
    p2p_stops_dma: bool,
    timing: Timing,
    quirks: Quirks,

    internals: Internals,
    config_space: PciConfig,
    msix_table: [u8; regs::MSIX_VECTORS as usize * 16],
    wiring: Wiring,
    fired: Fired,
    work: work::Work,
    dma_log: DmaLog,

    state: DeviceState,
    migration: migration::Bookkeeping,
    resets: u64,
}

impl DeviceCore {
    /// A device as it is after power-on, in RUNNING (D7).
    ///
    /// # Errors
    /// [`ModelError::TooLarge`] for a profile with more state than a software device keeps.
    pub fn new(options: CoreOptions) -> Result<Self, ModelError> {
        let CoreOptions { profile, quirks, timing } = options;
        let geometry = geometry(&profile)?;
        let reread = profile.precopy.reread_interval_us.as_ref();
        let habits = Habits {
            reinit: profile.precopy.reinit.value,
            reinit_in_p2p: profile.precopy.reinit_in_p2p.value,
            dirty: profile.precopy.dirty.value,
            reread_interval_ns: reread.map_or(0, |us| us.typical.saturating_mul(1000)),
        };
        let features = &profile.features;
        Ok(Self {
            geometry,
            habits,
            flags: MigrationFlags::new(features.p2p.value, features.pre_copy.value),
            offers_info_v2: features.pre_copy.value && features.precopy_info_v2.value,
            offers_data_size: features.data_size.value,
            offers_dma_log: features.dma_logging.value,
            p2p_stops_dma: profile.precopy.p2p_stops_dma.value,
            timing,
            quirks,
            internals: Internals::power_on(geometry),
            config_space: PciConfig::new(),
            msix_table: masked_table(),
            wiring: Wiring::default(),
            fired: Fired::default(),
            work: work::Work::default(),
            dma_log: DmaLog::default(),
            state: DeviceState::Running,
            migration: migration::Bookkeeping::default(),
            resets: 0,
        })
    }

    /// The function's regions and interrupts.
    pub fn info() -> PciFunctionInfo {
        let rw = RegionFlags { read: true, write: true, mmap: false };
        let region = |size| RegionInfo { size, flags: rw, mmap: Vec::new() };
        let mut regions = vec![RegionInfo::default(); vfio_migration::pci::NUM_REGIONS];
        regions[0] = region(regs::BAR0_BYTES);
        regions[2] = region(regs::BAR2_BYTES);
        regions[vfio_migration::pci::REGION_CONFIG as usize] = region(regs::CONFIG_SPACE_BYTES);
        let mut irqs = vec![IrqInfo::default(); IrqIndex::ALL.len()];
        irqs[IrqIndex::Intx as usize] =
            IrqInfo { count: 1, eventfd: true, maskable: true, automasked: true };
        irqs[IrqIndex::Msix as usize] =
            IrqInfo { count: regs::MSIX_VECTORS, eventfd: true, maskable: true, automasked: false };
        PciFunctionInfo { regions, irqs, reset: true }
    }

    /// What a migration engine probes.
    pub fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: self.flags,
            precopy_info: self.flags.pre_copy(),
            precopy_info_v2: self.migration.opted_in,
            data_size: self.offers_data_size,
            dma_logging: self.offers_dma_log,
            reset_runs: !self.quirks.reset_keeps_state,
            max_write_bytes: None,
        }
    }

    /// The INFOv2 opt-in is offered.
    pub fn offers_precopy_info_v2(&self) -> bool {
        self.offers_info_v2
    }

    /// The migration state.
    pub fn state(&self) -> DeviceState {
        self.state
    }

    /// The switches in force.
    pub fn quirks(&self) -> &Quirks {
        &self.quirks
    }

    /// The switches, to change while the device lives.
    pub fn quirks_mut(&mut self) -> &mut Quirks {
        &mut self.quirks
    }

    /// How long the device takes.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Digest of the whole internal state, from scratch; streams and sessions do not enter it.
    pub fn digest(&self) -> [u8; 32] {
        self.internals.digest()
    }

    /// Device reset: power-on state, RUNNING, session dead (H5, X9). The opt-in and DMA logging stay.
    ///
    /// # Errors
    /// With `reset-keeps-state`, EINVAL in STOP and STOP_COPY.
    pub fn reset(&mut self) -> DeviceResult<()> {
        if self.quirks.reset_keeps_state && self.state != DeviceState::Error {
            if matches!(self.state, DeviceState::Stop | DeviceState::StopCopy) {
                let call = "DEVICE_RESET";
                return Err(DeviceError::Errno { call, errno: libc::EINVAL });
            }
            self.internals = Internals::power_on(self.geometry);
            self.restart_session();
        } else {
            self.internals = Internals::power_on(self.geometry);
            self.migration.end_session();
            self.state = DeviceState::Running;
        }
        self.config_space = PciConfig::new();
        self.msix_table = masked_table();
        self.wiring = Wiring::default();
        self.fired = Fired::default();
        self.work = work::Work::default();
        self.migration.wedged = false;
        self.migration.left_object = false;
        self.resets += 1;
        Ok(())
    }

    /// How often the device was reset; eventfds are unwired by each.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// Wires or unwires a vector of MSI-X, or INTx.
    ///
    /// # Errors
    /// EINVAL for a vector the device does not have.
    pub fn set_wired(&mut self, index: IrqIndex, vector: u32, wired: bool) -> DeviceResult<()> {
        let bit = vector_bit(index, vector)?;
        match index {
            IrqIndex::Intx => self.wiring.intx_wired = wired,
            _ if wired => self.wiring.msix_wired |= bit,
            _ => self.wiring.msix_wired &= !bit,
        }
        self.deliver();
        Ok(())
    }

    /// Unwires a whole index and forgets its masks.
    pub fn unwire(&mut self, index: IrqIndex) {
        match index {
            IrqIndex::Intx => (self.wiring.intx_wired, self.wiring.intx_masked) = (false, false),
            IrqIndex::Msix => (self.wiring.msix_wired, self.wiring.msix_masked) = (0, 0),
            _ => {}
        }
    }

    /// Masks or unmasks a vector of MSI-X, or INTx.
    ///
    /// # Errors
    /// EINVAL for a vector the device does not have.
    pub fn set_masked(&mut self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        let bit = vector_bit(index, vector)?;
        match index {
            IrqIndex::Intx => self.wiring.intx_masked = masked,
            _ if masked => self.wiring.msix_masked |= bit,
            _ => self.wiring.msix_masked &= !bit,
        }
        self.deliver();
        Ok(())
    }

    /// Takes what is to be signalled. The caller signals it before the call that caused it returns.
    pub fn take_fired(&mut self) -> Fired {
        std::mem::take(&mut self.fired)
    }

    /// The pending MSI-X vectors, bit v for vector v, and the INTx line.
    pub fn pending(&self) -> Fired {
        Fired { msix: self.internals.pending.msix, intx: self.internals.pending.intx }
    }

    /// DMA_LOGGING_START, see [`DmaLog::start`].
    pub fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        self.check_dma_log("DMA_LOGGING_START")?;
        let everything = [DmaRange { iova: 0, length: 1 << 40 }];
        let lax = self.quirks.breaks.has("L2") && !ranges.is_empty();
        let used = self.dma_log.start(if lax { &everything } else { ranges }, page_size)?;
        Ok(if self.quirks.breaks.has("L3") { 0 } else { used })
    }

    /// DMA_LOGGING_REPORT, see [`DmaLog::report`].
    pub fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        self.check_dma_log("DMA_LOGGING_REPORT")?;
        let before = self.quirks.breaks.has("L7").then(|| self.dma_log.clone());
        let result = self.dma_log.report(range, page_size, bitmap);
        if let Some(before) = before {
            self.dma_log = before;
        }
        result
    }

    /// DMA_LOGGING_STOP, see [`DmaLog::stop`].
    pub fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        self.check_dma_log("DMA_LOGGING_STOP")?;
        self.dma_log.stop()
    }

    fn check_dma_log(&self, call: &'static str) -> DeviceResult<()> {
        match self.offers_dma_log {
            true => Ok(()),
            false => Err(DeviceError::Errno { call, errno: libc::ENOTTY }),
        }
    }
}

fn vector_bit(index: IrqIndex, vector: u32) -> DeviceResult<u8> {
    match (index, vector) {
        (IrqIndex::Intx, 0) => Ok(1),
        (IrqIndex::Msix, 0..regs::MSIX_VECTORS) => Ok(1 << vector & MSIX_MASK),
        _ => Err(DeviceError::Errno { call: "SET_IRQS", errno: libc::EINVAL }),
    }
}

/// A table as after reset: every vector masked.
fn masked_table() -> [u8; regs::MSIX_VECTORS as usize * 16] {
    let mut table = [0; regs::MSIX_VECTORS as usize * 16];
    table.iter_mut().skip(12).step_by(16).for_each(|control| *control = 1);
    table
}

fn geometry(profile: &Profile) -> Result<Geometry, ModelError> {
    let sizes = &profile.sizes;
    let kib = |bytes: u64| bytes.div_ceil(1024);
    for (what, bytes, max_bytes) in [
        ("state", sizes.total_bytes.typical, TOTAL_MAX_BYTES),
        ("a configuration", sizes.initial_max_bytes.typical, CONFIG_MAX_BYTES),
    ] {
        if bytes > max_bytes {
            let profile = profile.name.clone();
            return Err(ModelError::TooLarge { profile, what, bytes, max_bytes });
        }
    }
    let initial_kib = kib(sizes.initial_bytes.typical);
    let bulk_bytes = sizes.total_bytes.typical.saturating_sub(initial_kib * 1024);
    let stop_only_bytes = match profile.precopy.dirty.value {
        DirtyModel::Never => bulk_bytes,
        _ => sizes.stop_only_bytes.typical.min(bulk_bytes),
    };
    debug_assert!(bulk_bytes / BLOCK_BYTES <= TOTAL_MAX_BYTES / BLOCK_BYTES);
    Ok(Geometry {
        initial_kib: initial_kib as u32,
        initial_max_kib: kib(sizes.initial_max_bytes.typical).max(initial_kib) as u32,
        bulk_bytes,
        stop_only_bytes,
    })
}
