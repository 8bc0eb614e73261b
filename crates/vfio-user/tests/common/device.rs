//! A compact device: a BAR that starts DMA and interrupts, an image that migrates.
//!
//! BAR 0: 0x00 iova (u64), 0x08 command (u32): 1 write 16 bytes of 0xd5 at iova, 2 read 16 bytes at iova
//! to 0x20, 3 signal MSI-X vector 0; 0x0c result (u32): 0 or an errno. The rest is memory.
//! BAR 1: 16 KiB of a memfd, of which [4 KiB, 8 KiB) and [12 KiB, 16 KiB) may be mapped.
//!
//! Stream: records {tag u8, length u32, bytes}; `I` initial, `D` dirty, `F` the whole image, which must be
//! the last.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vfio_migration::arcs::{SessionEffect, session_effect};
use vfio_migration::precopy::{PrecopyInfoV1, PrecopyInfoV2};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaBacking, DmaPermissions,
    DmaRange, IrqIndex, IrqInfo, MigratableDevice, MigrationFlags, MmapArea, PciFunction,
    PciFunctionInfo, PrecopyInfo, RawPrecopyInfo, ReadOutcome, RegionFlags, RegionInfo, path,
};

pub const BAR0_SIZE: usize = 0x1000;
pub const BAR1_SIZE: u64 = 0x4000;

pub struct Inner {
    pub capabilities: DeviceCapabilities,
    pub state: DeviceState,
    pub image: Vec<u8>,
    pub initial: Vec<u8>,
    pub stream: Vec<u8>,
    pub at: usize,
    pub initial_end: usize,
    pub reinit: bool,
    pub opted_in: bool,
    pub loaded: Vec<u8>,
    /// Reads give at most so many bytes, writes take at most so many.
    pub read_max: usize,
    pub write_max: usize,
    /// Each read of the stream takes so long.
    pub read_delay: Duration,
    /// The next SET fails with this errno and leaves the device in the state.
    pub fail_set: Option<(i32, DeviceState)>,
    /// SET waits for DMA to the client: 16 bytes at this address.
    pub dma_in_set: Option<u64>,
    pub stop_copy_length: u64,
    pub bar: Vec<u8>,
    pub mappings: BTreeMap<u64, (u64, DmaPermissions, DmaBacking)>,
    pub eventfds: HashMap<(u32, u32), OwnedFd>,
    pub masked: HashSet<(u32, u32)>,
    pub logging: Option<(u64, Vec<DmaRange>)>,
    pub logged: HashSet<u64>,
    pub resets: usize,
    pub reads: usize,
    /// Each write of the stream takes so long.
    pub write_delay: Duration,
    pub writes: usize,
    /// The read, the write of this number, counted from 1, fails with this errno and takes nothing.
    pub fail_read: Option<(usize, i32)>,
    pub fail_write: Option<(usize, i32)>,
    /// The read of this number says that this is all, although it is not.
    pub false_end: Option<usize>,
}

impl Inner {
    /// New initial data, as after a reconfiguration by the guest.
    pub fn reconfigure(&mut self, bytes: usize) {
        self.initial = vec![0x1c; bytes];
        if self.state.is_precopy() {
            let initial = self.initial.clone();
            self.record(b'I', &initial);
            self.initial_end = self.stream.len();
            self.reinit = true;
        }
    }

    /// Dirty data, as after the guest used the device.
    pub fn dirty(&mut self, bytes: usize) {
        self.record(b'D', &vec![0xd1; bytes]);
    }

    fn record(&mut self, tag: u8, bytes: &[u8]) {
        self.stream.push(tag);
        self.stream.extend((bytes.len() as u32).to_le_bytes());
        self.stream.extend(bytes);
    }

    fn enter(&mut self, to: DeviceState) -> Result<(), i32> {
        match session_effect(self.state, to) {
            SessionEffect::BeginsSaving => {
                self.stream.clear();
                (self.at, self.initial_end, self.reinit) = (0, 0, false);
                if to.is_precopy() {
                    let initial = self.initial.clone();
                    self.record(b'I', &initial);
                    self.initial_end = self.stream.len();
                }
            }
            SessionEffect::BeginsResuming => self.loaded.clear(),
            SessionEffect::Ends if self.state == DeviceState::Resuming => {
                self.image = parse(&self.loaded).ok_or(libc::EINVAL)?;
            }
            SessionEffect::Ends | SessionEffect::Keeps => {}
        }
        if to == DeviceState::StopCopy {
            let image = self.image.clone();
            self.record(b'F', &image);
        }
        self.state = to;
        Ok(())
    }

    fn backing(&self, iova: u64, len: u64, write: bool) -> Result<(u64, DmaBacking), i32> {
        let (start, (size, permissions, backing)) =
            self.mappings.range(..=iova).next_back().ok_or(libc::EFAULT)?;
        if iova + len > start + size {
            return Err(libc::EFAULT);
        }
        let allowed = if write { permissions.write } else { permissions.read };
        if allowed { Ok((*start, backing.clone())) } else { Err(libc::EACCES) }
    }

    fn log(&mut self, iova: u64) {
        if let Some((page_size, ranges)) = &self.logging
            && ranges.iter().any(|r| iova >= r.iova && iova - r.iova < r.length)
        {
            self.logged.insert(iova / page_size * page_size);
        }
    }
}

/// The image in a loaded stream.
fn parse(mut stream: &[u8]) -> Option<Vec<u8>> {
    loop {
        let (head, rest) = stream.split_at_checked(5)?;
        let len = u32::from_le_bytes(head[1..].try_into().ok()?) as usize;
        let (bytes, rest) = rest.split_at_checked(len)?;
        if head[0] == b'F' {
            return rest.is_empty().then(|| bytes.to_vec());
        }
        stream = rest;
    }
}

/// The device; clones are handles of one.
#[derive(Clone)]
pub struct TestDevice {
    inner: Arc<Mutex<Inner>>,
    info: Arc<PciFunctionInfo>,
    bar1: Arc<File>,
}

pub struct TestMigration(TestDevice);
pub struct TestPci(TestDevice);

impl TestDevice {
    pub fn new() -> Self {
        let memory = |size, mmap: Vec<MmapArea>| RegionInfo {
            size,
            flags: RegionFlags { read: size > 0, write: size > 0, mmap: !mmap.is_empty() },
            mmap,
        };
        let sparse = [0x1000, 0x3000].map(|offset| MmapArea { offset, size: 0x1000 }).to_vec();
        let mut regions = vec![memory(0, vec![]); 9];
        regions[0] = memory(BAR0_SIZE as u64, vec![]);
        regions[1] = memory(BAR1_SIZE, sparse);
        regions[7] = memory(256, vec![]);
        let irq =
            |count| IrqInfo { count, eventfd: count > 0, maskable: count > 0, automasked: false };
        let irqs = vec![irq(1), irq(0), irq(100), irq(0), irq(0)];
        let capabilities = DeviceCapabilities {
            flags: MigrationFlags::new(true, true),
            precopy_info: true,
            precopy_info_v2: true,
            data_size: true,
            dma_logging: true,
            reset_runs: true,
            max_write_bytes: None,
        };
        let inner = Inner {
            capabilities,
            state: DeviceState::Running,
            image: (0..100_000u32).map(|i| (i * 7 / 3) as u8).collect(),
            initial: vec![0x1a; 5000],
            stream: Vec::new(),
            at: 0,
            initial_end: 0,
            reinit: false,
            opted_in: false,
            loaded: Vec::new(),
            read_max: usize::MAX,
            write_max: usize::MAX,
            read_delay: Duration::ZERO,
            fail_set: None,
            dma_in_set: None,
            stop_copy_length: 123_456,
            bar: vec![0; BAR0_SIZE],
            mappings: BTreeMap::new(),
            eventfds: HashMap::new(),
            masked: HashSet::new(),
            logging: None,
            logged: HashSet::new(),
            resets: 0,
            reads: 0,
            write_delay: Duration::ZERO,
            writes: 0,
            fail_read: None,
            fail_write: None,
            false_end: None,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            info: Arc::new(PciFunctionInfo { regions, irqs, reset: true }),
            bar1: Arc::new(super::memfd(BAR1_SIZE + 0x1000)),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn migration(&self) -> TestMigration {
        TestMigration(self.clone())
    }

    pub fn pci(&self) -> TestPci {
        TestPci(self.clone())
    }

    /// DMA by the device; the lock is not held while it waits for the client.
    pub fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), i32> {
        let (start, backing) = self.lock().backing(iova, data.len() as u64, true)?;
        match backing {
            DmaBacking::Fd { fd, offset } => {
                let file = File::from(fd.try_clone().unwrap());
                file.write_all_at(data, offset + iova - start).unwrap();
                self.lock().log(iova);
                Ok(())
            }
            DmaBacking::Calls(access) => access.dma_write(iova, data).map_err(errno),
        }
    }

    pub fn dma_read(&self, iova: u64, data: &mut [u8]) -> Result<(), i32> {
        let (start, backing) = self.lock().backing(iova, data.len() as u64, false)?;
        match backing {
            DmaBacking::Fd { fd, offset } => {
                let file = File::from(fd.try_clone().unwrap());
                file.read_exact_at(data, offset + iova - start).unwrap();
                Ok(())
            }
            DmaBacking::Calls(access) => access.dma_read(iova, data).map_err(errno),
        }
    }

    /// Raises a vector, as far as it is wired and not masked.
    pub fn raise(&self, index: IrqIndex, vector: u32) {
        let inner = self.lock();
        let key = (index as u32, vector);
        if inner.masked.contains(&key) {
            return;
        }
        if let Some(fd) = inner.eventfds.get(&key) {
            let file = File::from(fd.try_clone().unwrap());
            std::io::Write::write_all(&mut &file, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

fn errno(error: DeviceError) -> i32 {
    error.errno().unwrap_or(libc::EIO)
}

fn refuse<T>(call: &'static str, errno: i32) -> DeviceResult<T> {
    Err(DeviceError::Errno { call, errno })
}

impl MigratableDevice for TestMigration {
    fn capabilities(&self) -> DeviceCapabilities {
        self.0.lock().capabilities
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        Ok(self.0.lock().state)
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        let dma = self.0.lock().dma_in_set;
        if let Some(iova) = dma {
            self.0.dma_write(iova, &[0x5e; 16]).unwrap();
        }
        let mut inner = self.0.lock();
        if let Some((errno, state)) = inner.fail_set.take() {
            inner.state = state;
            return Err(DeviceError::Transition { target, state: Some(state), errno });
        }
        let hops = path(inner.state, target, inner.capabilities.flags);
        let failed = |inner: &Inner, errno| DeviceError::Transition {
            target,
            state: Some(inner.state),
            errno,
        };
        for hop in hops.ok_or_else(|| failed(&inner, libc::EINVAL))? {
            if let Err(errno) = inner.enter(hop) {
                inner.state = DeviceState::Error;
                return Err(failed(&inner, errno));
            }
        }
        Ok(())
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        let mut inner = self.0.lock();
        if !inner.state.is_precopy() {
            return refuse("PRECOPY_INFO", libc::EINVAL);
        }
        let initial_bytes = inner.initial_end.saturating_sub(inner.at) as u64;
        let dirty_bytes = (inner.stream.len() - inner.at) as u64 - initial_bytes;
        if !inner.opted_in {
            return Ok(PrecopyInfo::V1(PrecopyInfoV1 { initial_bytes, dirty_bytes }));
        }
        let reinit = std::mem::take(&mut inner.reinit);
        Ok(PrecopyInfo::V2(PrecopyInfoV2 { initial_bytes, dirty_bytes, reinit }))
    }

    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        self.0.lock().opted_in = true;
        Ok(())
    }

    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        // As the kernel's drivers: without the opt-in the caller's flags come back (P6), and with it a
        // careless device gives them back too, so that tests see what reaches it.
        let info = self.precopy_info()?;
        Ok(RawPrecopyInfo {
            argsz: request.argsz,
            flags: request.flags | u32::from(info.reinit()),
            initial_bytes: info.initial_bytes(),
            dirty_bytes: info.dirty_bytes(),
        })
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Ok(self.0.lock().stop_copy_length)
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        let delay = self.0.lock().read_delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let mut inner = self.0.lock();
        if !inner.state.is_saving() {
            return refuse("read", libc::ENODEV);
        }
        inner.reads += 1;
        if let Some((_, errno)) = inner.fail_read.filter(|(number, _)| *number == inner.reads) {
            return refuse("read", errno);
        }
        if inner.false_end == Some(inner.reads) {
            return Ok(ReadOutcome::End);
        }
        let left = inner.stream.len() - inner.at;
        if left == 0 {
            return Ok(match inner.state.is_precopy() {
                true => ReadOutcome::NothingNow,
                false => ReadOutcome::End,
            });
        }
        let count = left.min(buf.len()).min(inner.read_max);
        buf[..count].copy_from_slice(&inner.stream[inner.at..][..count]);
        inner.at += count;
        Ok(ReadOutcome::Data(count))
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        let delay = self.0.lock().write_delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let mut inner = self.0.lock();
        if inner.state != DeviceState::Resuming {
            return refuse("write", libc::ENODEV);
        }
        inner.writes += 1;
        if let Some((_, errno)) = inner.fail_write.filter(|(number, _)| *number == inner.writes) {
            return refuse("write", errno);
        }
        let count = buf.len().min(inner.write_max);
        inner.loaded.extend(&buf[..count]);
        Ok(count)
    }

    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        let used = page_size.max(4096);
        self.0.lock().logging = Some((used, ranges.to_vec()));
        Ok(used)
    }

    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        let mut inner = self.0.lock();
        if inner.logging.is_none() {
            return refuse("DMA_LOGGING_REPORT", libc::EINVAL);
        }
        for page in std::mem::take(&mut inner.logged) {
            if page < range.iova || page >= range.iova + range.length {
                inner.logged.insert(page);
                continue;
            }
            let bit = ((page - range.iova) / page_size) as usize;
            bitmap[bit / 64] |= 1 << (bit % 64);
        }
        Ok(())
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        self.0.lock().logging = None;
        Ok(())
    }

    fn reset(&mut self) -> DeviceResult<()> {
        let mut inner = self.0.lock();
        inner.state = DeviceState::Running;
        inner.bar.fill(0);
        inner.stream.clear();
        inner.at = 0;
        inner.resets += 1;
        Ok(())
    }

    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        let mut digest = [0; 32];
        for (i, byte) in self.0.lock().image.iter().enumerate() {
            digest[i % 32] ^= byte.rotate_left(i as u32 % 7);
        }
        Ok(Some(digest))
    }
}

impl PciFunction for TestPci {
    fn info(&self) -> &PciFunctionInfo {
        &self.0.info
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        match region {
            0 => data.copy_from_slice(&self.0.lock().bar[offset as usize..][..data.len()]),
            1 => self.0.bar1.read_exact_at(data, 0x1000 + offset).unwrap(),
            _ => data.fill(0x36),
        }
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()> {
        match region {
            0 => self.0.lock().bar[offset as usize..][..data.len()].copy_from_slice(data),
            1 => self.0.bar1.write_all_at(data, 0x1000 + offset).unwrap(),
            _ => return refuse("region write", libc::EPERM),
        }
        if (region, offset, data.len()) == (0, 8, 4) {
            let iova = u64::from_le_bytes(self.0.lock().bar[..8].try_into().unwrap());
            let mut got = [0; 16];
            let result = match data[0] {
                1 => self.0.dma_write(iova, &[0xd5; 16]),
                2 => self.0.dma_read(iova, &mut got),
                _ => {
                    self.0.raise(IrqIndex::Msix, 0);
                    Ok(())
                }
            };
            let mut inner = self.0.lock();
            inner.bar[0x20..0x30].copy_from_slice(&got);
            let result = result.err().unwrap_or(0) as u32;
            inner.bar[0x0c..0x10].copy_from_slice(&result.to_le_bytes());
        }
        Ok(())
    }

    fn region_fd(&self, region: u32) -> Option<(BorrowedFd<'_>, u64)> {
        (region == 1).then(|| (self.0.bar1.as_fd(), 0x1000))
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        let mut inner = self.0.lock();
        let index = index as u32;
        if eventfds.is_empty() {
            inner.eventfds.retain(|(i, _), _| *i != index);
        }
        for (vector, fd) in (start..).zip(eventfds) {
            match fd {
                Some(fd) => {
                    let fd = fd.try_clone_to_owned().unwrap();
                    inner.eventfds.insert((index, vector), fd);
                }
                None => drop(inner.eventfds.remove(&(index, vector))),
            }
        }
        Ok(())
    }

    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        let mut inner = self.0.lock();
        match masked {
            true => inner.masked.insert((index as u32, vector)),
            false => inner.masked.remove(&(index as u32, vector)),
        };
        Ok(())
    }

    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        self.0.lock().mappings.insert(iova, (size, permissions, backing));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, _size: u64) -> DeviceResult<()> {
        self.0.lock().mappings.remove(&iova);
        Ok(())
    }

    fn reset_function(&self) -> DeviceResult<()> {
        self.0.migration().reset()
    }
}
