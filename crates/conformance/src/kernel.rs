//! [`Subject`] for a device of the kernel: ioctls on the device and on its data fd, as they are.
//!
//! A call that does not return cannot be given up: the runner leaves its thread alone with it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use vfio_kernel::raw::uapi::{DmaLoggingRange, VFIO_MIG_GET_PRECOPY_INFO, vfio_io};
use vfio_kernel::{KernelDevice, KernelError, Options, raw};
use vfio_migration::{DmaRange, PciFunction};

use crate::subject::{About, Call, CallError, FdAnswer, FdFlags, Kind, StreamId, Subject};

/// An ioctl of VFIO's type that no data fd knows.
const OTHER_COMMAND: u32 = vfio_io(27);
/// Where the lab's test driver shows its digest, in the device's folder of sysfs.
const DIGEST_FILE: &str = "ferrydev/state_digest";

/// A device of the kernel.
pub struct KernelSubject {
    spec: String,
    device: Option<KernelDevice>,
    about: About,
    streams: BTreeMap<u32, OwnedFd>,
    next_stream: u32,
}

impl KernelSubject {
    /// Opens the device that `spec` names, see [`vfio_kernel::DeviceSpec`].
    pub fn open(spec: &str) -> Result<Self, KernelError> {
        let device = KernelDevice::open(spec, Options::default())?;
        let name = format!("vfio:{spec}");
        let about = About { kind: Kind::Kernel, name, opened: device.opened().to_string() };
        Ok(Self {
            spec: spec.into(),
            device: Some(device),
            about,
            streams: BTreeMap::new(),
            next_stream: 1,
        })
    }

    fn device(&self) -> Call<&KernelDevice> {
        self.device.as_ref().ok_or_else(|| CallError::Gone("it is not open".into()))
    }

    fn stream(&self, stream: StreamId) -> Call<BorrowedFd<'_>> {
        let fd = self.streams.get(&stream.0);
        // A rule that uses a stream after it was closed here is wrong, and must not look like the device.
        fd.map(AsFd::as_fd).ok_or_else(|| CallError::Gone("the data fd was closed here".into()))
    }

    fn keep(&mut self, fd: OwnedFd) -> FdAnswer {
        let stream = self.next_stream;
        self.next_stream += 1;
        self.streams.insert(stream, fd);
        FdAnswer::Stream(StreamId(stream))
    }
}

/// An answer of `raw`; no errno is no answer of the kernel's.
fn answer<T>(result: io::Result<T>) -> Call<T> {
    result.map_err(|error| match error.raw_os_error() {
        Some(errno) => CallError::Errno(errno),
        None => CallError::Protocol(error.to_string()),
    })
}

/// A signal is no answer either.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> Call<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return answer(result),
        }
    }
}

impl Subject for KernelSubject {
    fn about(&self) -> About {
        self.about.clone()
    }

    fn set_deadline(&mut self, _at: Instant) {}

    fn reopen(&mut self) -> Call<()> {
        self.streams.clear();
        self.device = None;
        let opened = KernelDevice::open(&self.spec, Options::default());
        self.device = Some(opened.map_err(|error| CallError::Gone(error.to_string()))?);
        Ok(())
    }

    fn feature(&mut self, argsz: u32, flags: u32, payload: &mut [u8]) -> Call<()> {
        answer(raw::feature(self.device()?.fd(), argsz, flags, payload))
    }

    fn set_state(&mut self, state: u32) -> (Call<()>, FdAnswer) {
        let device = match self.device() {
            Ok(device) => device,
            Err(gone) => return (Err(gone), FdAnswer::None),
        };
        let (result, data_fd) = raw::set_migration_state_fd(device.fd(), state);
        match answer(result) {
            Ok(Some(fd)) => (Ok(()), self.keep(fd)),
            Ok(None) => (Ok(()), fd_number(data_fd)),
            Err(error) => (Err(error), fd_number(data_fd)),
        }
    }

    fn get_state(&mut self) -> Call<(u32, FdAnswer)> {
        let reply = answer(raw::migration_state(self.device()?.fd()))?;
        let fd = reply.data_fd.map_or(FdAnswer::None, |fd| self.keep(fd));
        Ok((reply.device_state, fd))
    }

    fn read(&mut self, stream: StreamId, buf: &mut [u8]) -> Call<usize> {
        let fd = self.stream(stream)?;
        uninterrupted(|| raw::read(fd, buf))
    }

    fn write(&mut self, stream: StreamId, data: &[u8]) -> Call<usize> {
        let fd = self.stream(stream)?;
        uninterrupted(|| raw::write(fd, data))
    }

    fn close(&mut self, stream: StreamId) {
        self.streams.remove(&stream.0);
    }

    fn precopy_info(&mut self, stream: StreamId, info: &mut [u8; 24]) -> Call<()> {
        let fd = self.stream(stream)?;
        answer(raw::precopy_info(fd, VFIO_MIG_GET_PRECOPY_INFO, info))
    }

    fn logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Call<u64> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| DmaLoggingRange { iova: range.iova, length: range.length })
            .collect();
        answer(raw::dma_logging_start(self.device()?.fd(), page_size, &ranges))
    }

    fn logging_report(&mut self, range: DmaRange, page_size: u64, bitmap: &mut [u64]) -> Call<()> {
        let DmaRange { iova, length } = range;
        let device = self.device()?.fd();
        answer(raw::dma_logging_report(device, 40, iova, length, page_size, bitmap))
    }

    fn logging_stop(&mut self) -> Call<()> {
        answer(raw::dma_logging_stop(self.device()?.fd()))
    }

    fn reset(&mut self) -> Call<()> {
        answer(raw::reset(self.device()?.fd()))
    }

    fn digest(&mut self) -> Call<Option<[u8; 32]>> {
        let path = self.device()?.sysfs().join(DIGEST_FILE);
        let Ok(file) = File::open(path) else { return Ok(None) };
        let mut text = String::new();
        answer(file.take(128).read_to_string(&mut text))?;
        let digest = parse_digest(text.trim());
        let wrong = || CallError::Protocol(format!("{text:?} is not a digest"));
        digest.map(Some).ok_or_else(wrong)
    }

    fn pci(&self) -> Option<Arc<dyn PciFunction>> {
        let pci = self.device.as_ref()?.pci();
        pci.inspect_err(|error| tracing::debug!(%error, "no regions")).ok()
    }

    fn fd_flags(&mut self, stream: StreamId) -> Call<FdFlags> {
        let fd = self.stream(stream)?;
        let access = answer(raw::file_flags(fd))? & libc::O_ACCMODE;
        let cloexec = answer(raw::fd_flags(fd))? & libc::FD_CLOEXEC != 0;
        Ok(FdFlags { cloexec, access })
    }

    fn positioned(&mut self, stream: StreamId, write: bool) -> Call<usize> {
        let fd = self.stream(stream)?;
        uninterrupted(|| match write {
            true => raw::pwrite(fd, &[0], 0),
            false => raw::pread(fd, &mut [0], 0),
        })
    }

    fn poll(&mut self, stream: StreamId, timeout_ms: u32) -> Call<bool> {
        let fd = self.stream(stream)?;
        let timeout_ms = i32::try_from(timeout_ms).unwrap_or(i32::MAX);
        Ok(uninterrupted(|| raw::poll(fd, libc::POLLIN, timeout_ms))? != 0)
    }

    fn other_ioctl(&mut self, stream: StreamId) -> Call<()> {
        let mut info = [0; 24];
        info[0] = 24;
        answer(raw::precopy_info(self.stream(stream)?, OTHER_COMMAND, &mut info))
    }

    fn precopy_info_nowhere(&mut self, stream: StreamId) -> Call<()> {
        answer(raw::precopy_info_bad_pointer(self.stream(stream)?))
    }
}

/// A data_fd that is no fd of ours.
fn fd_number(data_fd: i32) -> FdAnswer {
    if data_fd == -1 { FdAnswer::None } else { FdAnswer::Wrong(data_fd) }
}

fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_64_hex_digits() {
        let digest = parse_digest(&"0f".repeat(32));
        assert_eq!(digest, Some([0x0f; 32]));
        for text in ["", "0f", &"0g".repeat(32), &"0f".repeat(33), &"é".repeat(32)] {
            assert_eq!(parse_digest(text), None, "{text}");
        }
    }

    #[test]
    fn minus_one_is_no_fd() {
        assert_eq!(fd_number(-1), FdAnswer::None);
        assert_eq!(fd_number(7), FdAnswer::Wrong(7));
    }
}
