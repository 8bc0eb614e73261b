//! What the tests share: a compact device, guest memory, raw messages, a scripted server.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod device;
pub mod raw;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use vfio_migration::{DeviceError, DeviceResult, DmaAccess};
use vfio_user::{Options, RunningServer, ServedDevice, Server, ServerOptions, VfioUserDevice};

use device::{Inner, TestDevice};

/// Long enough for a loaded machine; tests that expect it to pass are broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory for sockets, and a path in it.
pub fn socket() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    (dir, path)
}

/// A served test device.
pub struct Served {
    _dir: TempDir,
    pub path: PathBuf,
    pub device: TestDevice,
    pub server: RunningServer,
}

/// Serves a test device after `set_up` changed it.
pub fn serve(options: ServerOptions, set_up: impl FnOnce(&mut Inner)) -> Served {
    let (dir, path) = socket();
    let device = TestDevice::new();
    set_up(&mut device.lock());
    let served =
        ServedDevice { migration: Some(Box::new(device.migration())), pci: Arc::new(device.pci()) };
    let server = Server::bind(&path, options).unwrap().spawn(served).unwrap();
    Served { _dir: dir, path, device, server }
}

/// A client of it.
pub fn open(served: &Served) -> VfioUserDevice {
    VfioUserDevice::open(&served.path, options()).unwrap()
}

/// Options without a time limit that a loaded machine could run into.
pub fn options() -> Options {
    Options {
        setup_timeout: PATIENCE,
        region_timeout: PATIENCE,
        query_timeout: Some(PATIENCE),
        data_timeout: Some(PATIENCE),
        stall_timeout: PATIENCE,
        ..Options::default()
    }
}

/// Guest memory behind calls, with a note of what was written.
#[derive(Debug)]
pub struct Ram {
    pub base: u64,
    pub bytes: Mutex<Vec<u8>>,
    pub written: Mutex<Vec<(u64, usize)>>,
}

impl Ram {
    pub fn new(base: u64, size: usize) -> Arc<Self> {
        let (bytes, written) = (Mutex::new(vec![0; size]), Mutex::default());
        Arc::new(Self { base, bytes, written })
    }

    pub fn peek(&self, iova: u64, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[(iova - self.base) as usize..][..len].to_vec()
    }
}

impl DmaAccess for Ram {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()> {
        let fault = DeviceError::Errno { call: "test memory", errno: libc::EFAULT };
        let at = iova.checked_sub(self.base).ok_or(fault)? as usize;
        data.copy_from_slice(&self.bytes.lock().unwrap()[at..at + data.len()]);
        Ok(())
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()> {
        let at = (iova - self.base) as usize;
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        self.written.lock().unwrap().push((iova, data.len()));
        Ok(())
    }
}

/// A memfd of `size` bytes.
pub fn memfd(size: u64) -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a NUL-terminated constant; the fd is new.
    let file = unsafe {
        let fd = libc::memfd_create(c"vfio-user-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

/// Waits until `done`; the limit is only there so that a broken test ends.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
