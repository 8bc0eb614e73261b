//! A ferrydev device held by its bare file descriptors, as a driver author would try it: no layer of ours between
//! the test and the kernel's calls.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};
use vfio_kernel::raw::memory::FileMapping;
use vfio_kernel::raw::{self, group, iommufd, uapi};
use vfio_migration::DeviceState;

use crate::lab::{Lab, Mdev, Parent};

/// Where guest memory is mapped for the device.
pub const RAM_IOVA: u64 = 0x10_0000;
/// Its size in bytes.
pub const RAM_BYTES: u64 = 4 << 20;

/// Registers of BAR 0 that the cases use (docs/workload.md).
pub mod reg {
    pub const ID: u64 = 0x00;
    pub const CONTROL: u64 = 0x08;
    pub const STATUS: u64 = 0x0c;
    pub const CONFIG_KIB: u64 = 0x10;
    pub const CONFIG_GEN: u64 = 0x14;
    pub const DMA_LO: u64 = 0x1c;
    pub const DMA_PAGES: u64 = 0x24;
    pub const DMA_RATE: u64 = 0x28;
    pub const DOORBELL: u64 = 0x2c;
    pub const COMPLETED: u64 = 0x30;
    pub const VECTOR: u64 = 0x38;
    pub const RAISED: u64 = 0x3c;
    pub const FILL_KIB: u64 = 0x40;
    pub const SCRATCH: u64 = 0x44;
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `/dev/vfio/devices/vfioN`, bound to an iommufd.
    Cdev,
    /// Its group, in a container with type1.
    Group,
}

/// Both.
pub const WAYS: [Way; 2] = [Way::Cdev, Way::Group];

/// An open device with guest memory behind it. Fields are dropped in this order.
#[derive(Debug)]
pub struct Rig {
    device: OwnedFd,
    _owners: Vec<OwnedFd>,
    ram: File,
    _mapping: FileMapping,
    mdev: Mdev,
}

/// What PRECOPY_INFO answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub flags: u32,
    pub initial: u64,
    pub dirty: u64,
}

impl Info {
    /// New initial data is announced.
    pub fn reinit(self) -> bool {
        self.flags & 1 != 0
    }
}

/// The errno of what must fail; 0 for what did not.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}

impl Rig {
    /// A new device by cdev, with quirks.
    pub fn new(lab: &Lab, quirks: &str) -> anyhow::Result<Self> {
        Self::with(lab, Way::Cdev, &[("quirks", quirks)])
    }

    /// A new device with attributes set before it is opened.
    pub fn with(lab: &Lab, way: Way, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mdev = lab.create(Parent::Ferrydev)?;
        for (attribute, value) in settings {
            mdev.set(attribute, value)?;
        }
        Self::open(lab, way, mdev)
    }

    fn open(lab: &Lab, way: Way, mdev: Mdev) -> anyhow::Result<Self> {
        let path = lab.dir().join(format!("ram-{}", mdev.uuid()));
        let ram = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        ram.set_len(RAM_BYTES)?;
        let mapping = FileMapping::new(ram.as_fd(), 0, RAM_BYTES, true, true)?;
        let open = |path: &std::path::Path| {
            let file = File::options().read(true).write(true).open(path);
            file.map(OwnedFd::from).with_context(|| format!("open {}", path.display()))
        };
        let (device, owners) = match way {
            Way::Cdev => {
                let iommu = open("/dev/iommu".as_ref())?;
                let device = open(&mdev.cdev()?)?;
                raw::bind_iommufd(device.as_fd(), iommu.as_fd()).context("bind")?;
                let ioas = iommufd::ioas_alloc(iommu.as_fd())?;
                raw::attach_iommufd_pt(device.as_fd(), ioas).context("attach")?;
                let flags = uapi::IOMMU_IOAS_MAP_READABLE | uapi::IOMMU_IOAS_MAP_WRITEABLE;
                iommufd::ioas_map(iommu.as_fd(), ioas, flags, &mapping, RAM_IOVA)?;
                (device, vec![iommu])
            }
            Way::Group => {
                let container = open("/dev/vfio/vfio".as_ref())?;
                let group = open(&mdev.group()?)?;
                group::group_set_container(group.as_fd(), container.as_fd())?;
                group::set_iommu(container.as_fd(), uapi::VFIO_TYPE1V2_IOMMU)?;
                let flags = uapi::VFIO_DMA_MAP_FLAG_READ | uapi::VFIO_DMA_MAP_FLAG_WRITE;
                group::type1_map(container.as_fd(), flags, &mapping, RAM_IOVA)?;
                let name = CString::new(mdev.uuid())?;
                let device = group::group_device_fd(group.as_fd(), &name)?;
                (device, vec![group, container])
            }
        };
        Ok(Self { device, _owners: owners, ram, _mapping: mapping, mdev })
    }

    /// Closes the device and opens it again.
    pub fn reopen(self, lab: &Lab, way: Way) -> anyhow::Result<Self> {
        Self::open(lab, way, self.close())
    }

    /// Closes the device; what is left is the mediated device.
    pub fn close(self) -> Mdev {
        self.mdev
    }

    /// Its device fd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Its mediated device.
    pub fn mdev(&self) -> &Mdev {
        &self.mdev
    }

    /// SET of a state.
    pub fn set(&self, state: DeviceState) -> io::Result<Option<OwnedFd>> {
        raw::set_migration_state(self.fd(), state.as_raw()).map(|reply| reply.data_fd)
    }

    /// SET of a state that hands out a data fd.
    pub fn begin(&self, state: DeviceState) -> anyhow::Result<OwnedFd> {
        let data = self.set(state).with_context(|| format!("SET {state}"))?;
        data.with_context(|| format!("SET {state} handed out no data fd"))
    }

    /// SET of states, one after the other, none of which hands out a data fd.
    pub fn walk(&self, states: &[DeviceState]) -> anyhow::Result<()> {
        for state in states {
            let data = self.set(*state).with_context(|| format!("SET {state}"))?;
            ensure!(data.is_none(), "SET {state} handed out a data fd");
        }
        Ok(())
    }

    /// GET of the state.
    pub fn state(&self) -> anyhow::Result<DeviceState> {
        let raw = raw::migration_state(self.fd())?.device_state;
        DeviceState::from_raw(raw).with_context(|| format!("state {raw}"))
    }

    /// VFIO_DEVICE_RESET.
    pub fn reset(&self) -> anyhow::Result<()> {
        raw::reset(self.fd()).context("reset")
    }

    /// The device's own digest of its state.
    pub fn digest(&self) -> anyhow::Result<String> {
        self.mdev.get("state_digest")
    }

    fn file(&self) -> io::Result<File> {
        self.device.try_clone().map(File::from)
    }

    /// Writes to configuration space.
    pub fn write_config(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file()?.write_all_at(bytes, (7 << 40) + offset)
    }

    /// Reads configuration space.
    pub fn read_config(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file()?.read_exact_at(bytes, (7 << 40) + offset)
    }

    /// Reads a register of BAR 0.
    pub fn read(&self, register: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.file()?.read_exact_at(&mut bytes, register)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a register of BAR 0.
    pub fn write(&self, register: u64, value: u32) -> io::Result<()> {
        self.file()?.write_all_at(&value.to_le_bytes(), register)
    }

    /// Writes registers, one after the other.
    pub fn program(&self, registers: &[(u64, u32)]) -> io::Result<()> {
        registers.iter().try_for_each(|(register, value)| self.write(*register, *value))
    }

    /// Bus mastering on, a ring of `pages` pages at the start of guest memory, interrupts on.
    pub fn set_up_dma(&self, pages: u32) -> io::Result<()> {
        self.write_config(4, &6u16.to_le_bytes())?;
        self.program(&[(reg::DMA_LO, RAM_IOVA as u32), (reg::DMA_PAGES, pages), (reg::CONTROL, 2)])
    }

    /// Bus mastering on, for registers that were loaded.
    pub fn set_up_dma_only(&self) -> io::Result<()> {
        self.write_config(4, &6u16.to_le_bytes())
    }

    /// The stamp number at a page of the ring, where a whole stamp is.
    pub fn stamp_at(&self, page: u64) -> io::Result<Option<u64>> {
        let mut bytes = [0; 16];
        self.ram.read_exact_at(&mut bytes, page * 4096)?;
        let (number, check) = (u128::from_le_bytes(bytes) as u64, u128::from_le_bytes(bytes) >> 64);
        let whole = check as u64 == number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Ok(whole.then_some(number))
    }
}

/// PRECOPY_INFO with zeroed sizes.
pub fn info(data: &OwnedFd) -> io::Result<Info> {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&24u32.to_ne_bytes());
    raw::precopy_info(data.as_fd(), uapi::VFIO_MIG_GET_PRECOPY_INFO, &mut bytes)?;
    let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
    Ok(Info { flags: (long(0) >> 32) as u32, initial: long(8), dirty: long(16) })
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// ENOMSG: nothing now.
    Now,
    /// 0: nothing more.
    Whole,
}

/// Reads until there is nothing (now).
pub fn drain(data: &OwnedFd, into: &mut Vec<u8>) -> anyhow::Result<End> {
    let mut buf = vec![0; 1 << 20];
    loop {
        match raw::read(data.as_fd(), &mut buf) {
            Ok(0) => return Ok(End::Whole),
            Ok(len) => into.extend_from_slice(&buf[..len]),
            Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => return Ok(End::Now),
            Err(error) => return Err(error).context("read the stream"),
        }
    }
}

/// Reads exactly `len` bytes.
pub fn read_exactly(data: &OwnedFd, len: u64, into: &mut Vec<u8>) -> anyhow::Result<()> {
    let mut left = usize::try_from(len)?;
    let mut buf = vec![0; 1 << 20];
    while left > 0 {
        let most = left.min(buf.len());
        let got = raw::read(data.as_fd(), &mut buf[..most]).context("read the stream")?;
        ensure!(got > 0, "the stream ended {left} bytes early");
        into.extend_from_slice(&buf[..got]);
        left -= got;
    }
    Ok(())
}

/// Writes all of `stream`, in segments of `segment` bytes.
pub fn load(data: &OwnedFd, stream: &[u8], segment: usize) -> io::Result<()> {
    for part in stream.chunks(segment) {
        let mut rest = part;
        while !rest.is_empty() {
            let taken = raw::write(data.as_fd(), rest)?;
            rest = rest.get(taken..).unwrap_or_default();
        }
    }
    Ok(())
}

/// The events of a poll that does not wait.
pub fn poll(data: &OwnedFd) -> io::Result<i16> {
    raw::poll(data.as_fd(), libc::POLLIN | libc::POLLRDHUP | libc::POLLOUT, 0)
}
