//! A device that is nothing but a block of memory: what it costs to read or load it is a copy.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaBacking, DmaPermissions,
    IrqIndex, IrqInfo, MigratableDevice, MigrationFlags, PciFunction, PciFunctionInfo, PrecopyInfo,
    ReadOutcome, RegionFlags, RegionInfo, pci,
};

/// The device. Clones are the same one.
#[derive(Clone)]
pub struct Bulk {
    inner: Arc<Mutex<Inner>>,
    flags: MigrationFlags,
}

struct Inner {
    state: DeviceState,
    memory: Vec<u8>,
    /// How far the stream is, and where it ends for now.
    at: usize,
    /// Bytes that are read while the device runs.
    precopy: usize,
    /// When the stream's first call began and its last one returned.
    streamed: Option<(Instant, Instant)>,
}

/// What a device holds, lent to a baseline: nobody else reaches the device meanwhile.
pub struct Lent<'a>(MutexGuard<'a, Inner>);

impl Lent<'_> {
    /// The memory, to read from.
    pub fn bytes(&self) -> &[u8] {
        &self.0.memory
    }

    /// The memory, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0.memory
    }
}

impl Bulk {
    /// A device of `bytes`, of which `precopy` are read while it runs; filled from `seed`.
    pub fn new(bytes: usize, precopy: usize, seed: u64) -> Self {
        let mut random = seed | 1;
        let mut memory = vec![0; bytes];
        for word in memory.chunks_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes()[..word.len()]);
        }
        let precopy = precopy.min(bytes);
        let inner = Inner { state: DeviceState::Running, memory, at: 0, precopy, streamed: None };
        let flags = MigrationFlags::new(true, precopy > 0);
        Self { inner: Arc::new(Mutex::new(inner)), flags }
    }

    /// What it holds is what `other` holds.
    pub fn equals(&self, other: &Self) -> bool {
        self.with(|inner| other.with(|other| inner.memory == other.memory))
    }

    /// Its memory, which stays where it is: engine and baseline work on the same.
    pub fn lend(&self) -> Lent<'_> {
        Lent(self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// As new, before another migration; `spoiled` also in its content, so that what is not carried shows.
    pub fn renew(&self, spoiled: bool) {
        self.with(|inner| {
            (inner.state, inner.at, inner.streamed) = (DeviceState::Running, 0, None);
            if spoiled {
                inner.memory.fill(0xa5);
            }
        });
    }

    /// When the first call of its stream began, and when the last one returned.
    pub fn streamed(&self) -> Option<(Instant, Instant)> {
        self.with(|inner| inner.streamed)
    }

    fn with<T>(&self, call: impl FnOnce(&mut Inner) -> T) -> T {
        call(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Inner {
    /// A call that began at `began` has brought the stream on.
    fn streams(&mut self, len: usize, began: Instant) {
        self.at += len;
        let first = self.streamed.map_or(began, |(first, _)| first);
        self.streamed = Some((first, Instant::now()));
    }
}

fn refused<T>(call: &'static str) -> DeviceResult<T> {
    Err(DeviceError::Errno { call, errno: libc::EINVAL })
}

impl MigratableDevice for Bulk {
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: self.flags,
            precopy_info: self.flags.pre_copy(),
            precopy_info_v2: self.flags.pre_copy(),
            data_size: true,
            dma_logging: true,
            reset_runs: true,
            max_write_bytes: None,
        }
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        Ok(self.with(|inner| inner.state))
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        self.with(|inner| {
            let pre_copies = [DeviceState::PreCopy, DeviceState::PreCopyP2p];
            match target {
                DeviceState::StopCopy if pre_copies.contains(&inner.state) => {}
                DeviceState::PreCopy | DeviceState::PreCopyP2p
                    if pre_copies.contains(&inner.state) => {}
                DeviceState::PreCopy | DeviceState::StopCopy | DeviceState::Resuming => {
                    inner.at = 0
                }
                DeviceState::Stop
                    if inner.state == DeviceState::Resuming && inner.at != inner.memory.len() =>
                {
                    return refused("SET STOP");
                }
                _ => {}
            }
            inner.state = target;
            Ok(())
        })
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        let unread = self.with(|inner| inner.precopy.saturating_sub(inner.at));
        // All of it initial, so that a migration does not go on before it is loaded.
        Ok(PrecopyInfo::from_raw(true, 0, unread as u64, 0))
    }

    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        Ok(())
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Ok(self.with(|inner| (inner.memory.len() - inner.at.min(inner.memory.len())) as u64))
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        self.with(|inner| {
            let (end, nothing) = match inner.state {
                DeviceState::StopCopy => (inner.memory.len(), ReadOutcome::End),
                _ => (inner.precopy, ReadOutcome::NothingNow),
            };
            let len = buf.len().min(end.saturating_sub(inner.at));
            if len == 0 {
                return Ok(nothing);
            }
            let began = Instant::now();
            buf[..len].copy_from_slice(&inner.memory[inner.at..inner.at + len]);
            inner.streams(len, began);
            Ok(ReadOutcome::Data(len))
        })
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.with(|inner| {
            let began = Instant::now();
            let Some(target) = inner.memory.get_mut(inner.at..inner.at + buf.len()) else {
                return refused("write");
            };
            target.copy_from_slice(buf);
            inner.streams(buf.len(), began);
            Ok(buf.len())
        })
    }

    fn start_dma_logging(
        &mut self,
        _ranges: &[vfio_migration::DmaRange],
        page_size: u64,
    ) -> DeviceResult<u64> {
        Ok(page_size)
    }

    fn report_dma_log(
        &mut self,
        _range: vfio_migration::DmaRange,
        _page_size: u64,
        _bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        Ok(())
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        Ok(())
    }

    fn reset(&mut self) -> DeviceResult<()> {
        self.with(|inner| (inner.state, inner.at) = (DeviceState::Running, 0));
        Ok(())
    }
}

/// A function without registers, for a server of the device.
pub struct Function {
    info: PciFunctionInfo,
}

impl Default for Function {
    fn default() -> Self {
        let mut regions = vec![RegionInfo::default(); pci::NUM_REGIONS];
        let config = RegionInfo {
            size: 256,
            flags: RegionFlags { read: true, write: true, mmap: false },
            mmap: Vec::new(),
        };
        if let Some(region) = regions.get_mut(pci::REGION_CONFIG as usize) {
            *region = config;
        }
        Self { info: PciFunctionInfo { regions, irqs: vec![IrqInfo::default(); 5], reset: true } }
    }
}

impl PciFunction for Function {
    fn info(&self) -> &PciFunctionInfo {
        &self.info
    }

    fn region_read(&self, _region: u32, _offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        data.fill(0);
        Ok(())
    }

    fn region_write(&self, _region: u32, _offset: u64, _data: &[u8]) -> DeviceResult<()> {
        Ok(())
    }

    fn set_irq_eventfds(
        &self,
        _index: IrqIndex,
        _start: u32,
        _eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        Ok(())
    }

    fn set_irq_masked(&self, _index: IrqIndex, _vector: u32, _masked: bool) -> DeviceResult<()> {
        Ok(())
    }

    fn dma_map(
        &self,
        _iova: u64,
        _size: u64,
        _permissions: DmaPermissions,
        _backing: DmaBacking,
    ) -> DeviceResult<()> {
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _size: u64) -> DeviceResult<()> {
        Ok(())
    }

    fn reset_function(&self) -> DeviceResult<()> {
        Ok(())
    }
}
