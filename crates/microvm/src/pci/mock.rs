//! A PCI function and an interrupt controller for unit tests, without threads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vfio_migration::pci::{NUM_REGIONS, REGION_CONFIG};
use vfio_migration::{
    DeviceError, DeviceResult, DmaBacking, DmaPermissions, IrqIndex, IrqInfo, PciFunction,
    PciFunctionInfo, RegionFlags, RegionInfo,
};

use crate::body::{InterruptController, IrqConnection, MsiMessage};
use crate::error::Result;

/// Offset of the MSI-X capability.
pub const MSIX_AT: usize = 0x40;
/// Offset of the PCI Express capability.
pub const EXPRESS_AT: usize = 0x50;
/// Offset of the power management capability.
pub const POWER_AT: usize = 0x90;
/// Offset of the MSI capability.
pub const MSI_AT: usize = 0xa0;

/// Configuration space with BAR 0 (registers), BAR 2 (MSI-X, 4 vectors, PBA at 0x800), BAR 4 (64 bit),
/// and capabilities MSI-X, PCI Express with FLR, power management and MSI (4 vectors, maskable).
pub fn config() -> [u8; 256] {
    let mut config = [0; 256];
    config[..4].copy_from_slice(&[0x36, 0x1b, 0xf7, 0]);
    config[6] = 0x10;
    config[8..12].copy_from_slice(&[1, 0, 0x80, 8]);
    config[0x0e] = 0x80;
    config[0x20] = 0x0c;
    config[0x2c..0x30].copy_from_slice(&[0x36, 0x1b, 1, 0]);
    config[0x34] = MSIX_AT as u8;
    config[0x3d] = 1;
    config[MSIX_AT..MSIX_AT + 4].copy_from_slice(&[0x11, EXPRESS_AT as u8, 3, 0]);
    config[MSIX_AT + 4] = 2;
    config[MSIX_AT + 8..MSIX_AT + 10].copy_from_slice(&[0x02, 0x08]);
    config[EXPRESS_AT..EXPRESS_AT + 4].copy_from_slice(&[0x10, POWER_AT as u8, 2, 0]);
    config[EXPRESS_AT + 7] = 0x10;
    config[POWER_AT..POWER_AT + 4].copy_from_slice(&[1, MSI_AT as u8, 3, 0]);
    config[MSI_AT..MSI_AT + 4].copy_from_slice(&[5, 0, 0x84, 1]);
    config
}

/// Shape that goes with [`config`].
pub fn info() -> PciFunctionInfo {
    let mut regions = vec![RegionInfo::default(); NUM_REGIONS];
    let flags = RegionFlags { read: true, write: true, mmap: false };
    for (index, size) in [(0, 0x1000), (2, 0x1000), (4, 0x1_0000), (REGION_CONFIG as usize, 256)] {
        regions[index] = RegionInfo { size, flags, mmap: Vec::new() };
    }
    let irq = |count, intx| IrqInfo { count, eventfd: true, maskable: intx, automasked: intx };
    let irqs = vec![irq(1, true), irq(4, false), irq(4, false), irq(0, false), irq(0, false)];
    PciFunctionInfo { regions, irqs, reset: true }
}

/// BAR 0 registers of docs/workload.md that [`MockFunction::workload`] lives up to.
const REG_CONFIG_GEN: u64 = 0x14;
const REG_CONFIG_ACK: usize = 0x18;
const REG_DOORBELL: u64 = 0x2c;
const REG_VECTOR: usize = 0x38;

/// A device whose registers are memory.
pub struct MockFunction {
    info: PciFunctionInfo,
    regions: Mutex<BTreeMap<u32, Vec<u8>>>,
    wired: Mutex<BTreeMap<u32, Vec<File>>>,
    /// Every write: region, offset, bytes.
    pub writes: Mutex<Vec<(u32, u64, Vec<u8>)>>,
    /// Every DMA mapping by file: address and length.
    pub mapped: Mutex<Vec<(u64, u64)>>,
    /// Every call fails with `Gone`.
    pub gone: AtomicBool,
    /// SET_IRQS is refused, as libvfio-user does while the device is stopped.
    pub refuse_irqs: AtomicBool,
    /// Number of resets.
    pub resets: AtomicU32,
    /// Number of INTx unmasks.
    pub unmasks: AtomicU32,
    /// A configuration is in force at once; `false`: never.
    pub acknowledges: AtomicBool,
    is_workload: bool,
}

impl MockFunction {
    /// A device with `config` and the usual shape.
    pub fn new(config: [u8; 256]) -> Arc<Self> {
        Arc::new(Self::of(config))
    }

    /// A device that answers the workload's driver: identity, configuration, doorbell.
    pub fn workload() -> Arc<Self> {
        let mut device = Self { is_workload: true, ..Self::of(config()) };
        // The driver places the BARs it knows where a third one would be.
        device.info.regions[4].size = 0;
        let magic = crate::workload::DEVICE_MAGIC.to_le_bytes();
        device.regions.lock().unwrap().get_mut(&0).unwrap()[..4].copy_from_slice(&magic);
        Arc::new(device)
    }

    fn of(config: [u8; 256]) -> Self {
        let info = info();
        let mut regions = BTreeMap::new();
        for (index, region) in (0..).zip(&info.regions) {
            regions.insert(index, vec![0; region.size as usize]);
        }
        regions.insert(REGION_CONFIG, config.to_vec());
        Self {
            info,
            regions: Mutex::new(regions),
            wired: Mutex::default(),
            writes: Mutex::default(),
            mapped: Mutex::default(),
            gone: AtomicBool::new(false),
            refuse_irqs: AtomicBool::new(false),
            resets: AtomicU32::new(0),
            unmasks: AtomicU32::new(0),
            acknowledges: AtomicBool::new(true),
            is_workload: false,
        }
    }

    fn register_written(&self, offset: u64, data: &[u8]) {
        if offset == REG_CONFIG_GEN && self.acknowledges.load(Ordering::Relaxed) {
            let mut regions = self.regions.lock().unwrap();
            regions.get_mut(&0).unwrap()[REG_CONFIG_ACK..][..4].copy_from_slice(data);
        }
        if offset == REG_DOORBELL {
            let vector = self.regions.lock().unwrap()[&0][REG_VECTOR];
            let is_intx = self.wired() == [(IrqIndex::Intx as u32, 1)];
            let (index, vector) =
                if is_intx { (IrqIndex::Intx, 0) } else { (IrqIndex::Msix, vector.into()) };
            self.raise(index, vector);
        }
    }

    /// The device raises `vector` of `index`, if it is wired.
    pub fn raise(&self, index: IrqIndex, vector: usize) {
        if let Some(events) = self.wired.lock().unwrap().get(&(index as u32)) {
            (&events[vector]).write_all(&1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Which indices are wired, and to how many vectors.
    pub fn wired(&self) -> Vec<(u32, usize)> {
        self.wired.lock().unwrap().iter().map(|(index, events)| (*index, events.len())).collect()
    }

    /// The device's own configuration space.
    pub fn config_bytes(&self, at: usize, len: usize) -> Vec<u8> {
        self.regions.lock().unwrap()[&REGION_CONFIG][at..at + len].to_vec()
    }

    fn check(&self, call: &'static str) -> DeviceResult<()> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(DeviceError::Gone { call, reason: "killed by a test".into() });
        }
        Ok(())
    }
}

impl PciFunction for MockFunction {
    fn info(&self) -> &PciFunctionInfo {
        &self.info
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        self.check("REGION_READ")?;
        let regions = self.regions.lock().unwrap();
        data.copy_from_slice(&regions[&region][offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()> {
        self.check("REGION_WRITE")?;
        self.writes.lock().unwrap().push((region, offset, data.to_vec()));
        let mut regions = self.regions.lock().unwrap();
        regions.get_mut(&region).unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        drop(regions);
        if self.is_workload && region == 0 {
            self.register_written(offset, data);
        }
        Ok(())
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        self.check("SET_IRQS")?;
        if self.refuse_irqs.load(Ordering::Relaxed) {
            return Err(DeviceError::Errno { call: "SET_IRQS", errno: libc::EINVAL });
        }
        let mut wired = self.wired.lock().unwrap();
        if eventfds.is_empty() {
            wired.remove(&(index as u32));
            return Ok(());
        }
        // As the kernel: one index at a time.
        assert!(wired.keys().all(|&other| other == index as u32), "{wired:?}");
        let own = |fd: &Option<BorrowedFd<'_>>| {
            File::from(fd.expect("every vector is wired").try_clone_to_owned().unwrap())
        };
        let events = wired.entry(index as u32).or_default();
        // A client may hand over a few at a time, in order; or all anew.
        events.truncate(start as usize);
        assert_eq!(events.len(), start as usize);
        events.extend(eventfds.iter().map(own));
        Ok(())
    }

    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        self.check("SET_IRQS")?;
        assert_eq!((index, vector, masked), (IrqIndex::Intx, 0, false));
        self.unmasks.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        self.check("DMA_MAP")?;
        assert!(permissions.read && permissions.write);
        assert!(matches!(backing, DmaBacking::Fd { offset: 0, .. }));
        self.mapped.lock().unwrap().push((iova, size));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> DeviceResult<()> {
        self.check("DMA_UNMAP")?;
        self.mapped.lock().unwrap().retain(|there| *there != (iova, size));
        Ok(())
    }

    /// As docs/workload.md: PCI_COMMAND and Message Control are 0, all eventfds unwired.
    fn reset_function(&self) -> DeviceResult<()> {
        self.check("DEVICE_RESET")?;
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.wired.lock().unwrap().clear();
        let mut regions = self.regions.lock().unwrap();
        let bytes = regions.get_mut(&REGION_CONFIG).unwrap();
        bytes[4..6].fill(0);
        bytes[MSIX_AT + 2..MSIX_AT + 4].copy_from_slice(&[3, 0]);
        Ok(())
    }
}

/// An interrupt controller that takes interrupts in when a test says so.
#[derive(Default)]
pub struct MockInterrupts {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    next: u64,
    connections: BTreeMap<u64, Connected>,
    taken: Vec<MsiMessage>,
    lines: Vec<u32>,
}

struct Connected {
    event: File,
    to: To,
}

enum To {
    Message(MsiMessage),
    Line(u32, File),
}

impl State {
    fn poll(&mut self, id: u64) {
        let Some(connected) = self.connections.get(&id) else { return };
        let mut count = [0; 8];
        if (&connected.event).read_exact(&mut count).is_err() {
            return;
        }
        match &connected.to {
            To::Message(message) => self.taken.push(*message),
            To::Line(gsi, _) => self.lines.push(*gsi),
        }
    }
}

impl MockInterrupts {
    /// Takes in what was raised since the last call: each vector once, as an edge.
    pub fn take(&self) -> Vec<MsiMessage> {
        let mut state = self.state.lock().unwrap();
        let ids: Vec<_> = state.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| state.poll(id));
        std::mem::take(&mut state.taken)
    }

    /// As [`take`](Self::take), for lines.
    pub fn take_lines(&self) -> Vec<u32> {
        self.take();
        std::mem::take(&mut self.state.lock().unwrap().lines)
    }

    /// The guest acknowledges line `gsi`.
    pub fn acknowledge(&self, acknowledged: u32) {
        for connected in self.state.lock().unwrap().connections.values() {
            if let To::Line(gsi, resample) = &connected.to
                && *gsi == acknowledged
            {
                (&*resample).write_all(&1u64.to_ne_bytes()).unwrap();
            }
        }
    }

    /// Number of standing connections.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections.len()
    }

    fn connect(&self, event: BorrowedFd<'_>, to: To) -> Result<Box<dyn IrqConnection>> {
        assert!(event.as_raw_fd() >= 0);
        let event = File::from(event.try_clone_to_owned().unwrap());
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        let id = state.next;
        state.connections.insert(id, Connected { event, to });
        state.poll(id);
        Ok(Box::new(MockConnection { id, state: Arc::clone(&self.state) }))
    }
}

impl InterruptController for MockInterrupts {
    fn connect_msi(&self, event: BorrowedFd<'_>, to: MsiMessage) -> Result<Box<dyn IrqConnection>> {
        self.connect(event, To::Message(to))
    }

    fn connect_intx(
        &self,
        event: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
        gsi: u32,
    ) -> Result<Box<dyn IrqConnection>> {
        let resample = File::from(resample.try_clone_to_owned().unwrap());
        self.connect(event, To::Line(gsi, resample))
    }

    fn inject_msi(&self, message: MsiMessage) -> Result<()> {
        self.state.lock().unwrap().taken.push(message);
        Ok(())
    }

    fn set_line(&self, _: u32, _: bool) -> Result<()> {
        Ok(())
    }
}

struct MockConnection {
    id: u64,
    state: Arc<Mutex<State>>,
}

impl IrqConnection for MockConnection {
    fn update_msi(&self, message: MsiMessage) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.poll(self.id);
        if let Some(connected) = state.connections.get_mut(&self.id) {
            connected.to = To::Message(message);
        }
        Ok(())
    }
}

impl Drop for MockConnection {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        state.poll(self.id);
        state.connections.remove(&self.id);
    }
}
