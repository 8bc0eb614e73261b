//! Against a real foreign server, such as libvfio-user's sample: `VFIO_USER_SERVER` names a program
//! that serves a migratable device at the socket path given as its last argument (further arguments
//! may follow the program, separated by blanks). Skipped when it is not set.

mod common;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PATIENCE, memfd, options, socket};
use vfio_migration::DeviceState::*;
use vfio_migration::pci::REGION_CONFIG;
use vfio_migration::{DmaBacking, DmaPermissions, DmaRange, MigratableDevice, ReadOutcome};
use vfio_user::VfioUserDevice;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The server at `path`, once it listens; `None` where none is named.
fn start(path: &Path) -> Option<Server> {
    let Ok(line) = std::env::var("VFIO_USER_SERVER") else {
        println!("skipped: VFIO_USER_SERVER is not set");
        return None;
    };
    let mut words = line.split_whitespace();
    let program = words.next().expect("VFIO_USER_SERVER names a program");
    let server = Server(Command::new(program).args(words).arg(path).spawn().expect(program));
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < PATIENCE, "{line}: no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(server)
}

fn drain(device: &mut dyn MigratableDevice, into: &mut Vec<u8>) -> ReadOutcome {
    let mut buf = vec![0; 1 << 20];
    loop {
        match device.read(&mut buf).unwrap() {
            ReadOutcome::Data(count) => into.extend(&buf[..count]),
            other => return other,
        }
    }
}

#[test]
fn a_foreign_server_shows_its_function_and_keeps_its_protocol() {
    let (_dir, path) = socket();
    let Some(_server) = start(&path) else { return };
    let device = VfioUserDevice::open(&path, options()).unwrap();
    let pci = device.pci();
    let mut id = [0; 4];
    pci.region_read(REGION_CONFIG, 0, &mut id).unwrap();
    println!("vendor and device: {id:02x?}; {:?}", pci.info());
    assert_ne!(id, [0xff; 4]);

    let fd = Arc::new(OwnedFd::from(memfd(1 << 20)));
    let rw = DmaPermissions { read: true, write: true };
    pci.dma_map(0, 1 << 20, rw, DmaBacking::Fd { fd, offset: 0 }).unwrap();
    let mut engine = device.migration().unwrap();
    println!("{:?}", engine.capabilities());
    if engine.capabilities().dma_logging {
        let range = DmaRange { iova: 0, length: 1 << 20 };
        let page_size = engine.start_dma_logging(&[range], 4096).unwrap();
        engine.report_dma_log(range, page_size, &mut [0; 4]).unwrap();
        engine.stop_dma_logging().unwrap();
    }
    pci.dma_unmap(0, 1 << 20).unwrap();
    assert_eq!(device.connection_lost(), None);
}

#[test]
fn a_foreign_devices_state_moves_to_another_instance() {
    let (_from_dir, from_path) = socket();
    let (_to_dir, to_path) = socket();
    let (Some(_from), Some(_to)) = (start(&from_path), start(&to_path)) else { return };
    let from = VfioUserDevice::open(&from_path, options()).unwrap();
    let to = VfioUserDevice::open(&to_path, options()).unwrap();
    let (mut from, mut to) = (from.migration().unwrap(), to.migration().unwrap());
    let mut data = Vec::new();
    if from.capabilities().flags.pre_copy() {
        from.set_state(PreCopy).unwrap();
        assert_eq!(drain(&mut from, &mut data), ReadOutcome::NothingNow);
    }
    from.set_state(StopCopy).unwrap();
    assert_eq!(drain(&mut from, &mut data), ReadOutcome::End);
    println!("{} bytes of state", data.len());
    to.set_state(Resuming).unwrap();
    let mut rest = &data[..];
    while !rest.is_empty() {
        let taken = to.write(rest).unwrap();
        rest = &rest[taken..];
    }
    to.set_state(Stop).unwrap();
    from.set_state(Stop).unwrap();
    // What is read back from the destination is what was loaded.
    let mut again = Vec::new();
    to.set_state(StopCopy).unwrap();
    assert_eq!(drain(&mut to, &mut again), ReadOutcome::End);
    assert!(!again.is_empty());
}
