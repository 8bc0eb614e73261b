//! The device behind vfio-user: what holds of it in process holds across the socket.
#![cfg(feature = "serve")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use device_model::regs;
use device_model::serve::{ServeOptions, run, served};
use vfio_migration::DeviceState::*;
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{
    DmaBacking, DmaPermissions, DmaRange, MigratableDevice, PciFunction, ReadOutcome,
};
use vfio_user::{Options, RunningServer, Server, VfioUserDevice, VfioUserMigration};

const RW: DmaPermissions = DmaPermissions { read: true, write: true };

struct Served {
    _server: RunningServer,
    _directory: tempfile::TempDir,
    pci: Arc<dyn PciFunction>,
    migration: VfioUserMigration,
    inside: device_model::SoftDevice,
}

fn serve(quirks: &[&str]) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("device.sock");
    let mut options = ServeOptions::new(socket.clone(), "mlx5-vf").unwrap();
    options.state_bytes = Some(1 << 20);
    options.timing_percent = 0;
    options.quirks = quirks.iter().map(|quirk| (*quirk).into()).collect();
    let (inside, server_options) = options.device().unwrap();
    let server = Server::bind(&socket, server_options).unwrap();
    let server = server.spawn(served(&inside)).unwrap();
    let client = VfioUserDevice::open(&socket, Options::default()).unwrap();
    let migration = client.migration().unwrap();
    Served { _server: server, _directory: directory, pci: client.pci(), migration, inside }
}

fn poke(function: &dyn PciFunction, register: u64, value: u32) {
    function.region_write(REGION_BAR0, register, &value.to_le_bytes()).unwrap();
}

fn memory() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 * 4096).unwrap();
    file
}

fn pump(from: &mut VfioUserMigration, to: &mut VfioUserMigration) {
    let mut buf = vec![0; 1 << 20];
    while let ReadOutcome::Data(len) = from.read(&mut buf).unwrap() {
        let mut data = &buf[..len];
        while !data.is_empty() {
            let taken = to.write(data).unwrap();
            data = &data[taken..];
        }
    }
}

#[test]
fn a_served_device_migrates_with_reinit_dma_log_and_equal_digests() {
    let (mut source, mut destination) = (serve(&[]), serve(&[]));
    let capabilities = source.migration.capabilities();
    assert!(capabilities.precopy_info_v2 && capabilities.data_size && capabilities.dma_logging);

    let file = memory();
    let backing = DmaBacking::Fd { fd: Arc::new(file.try_clone().unwrap().into()), offset: 0 };
    source.pci.dma_map(0, 16 * 4096, RW, backing).unwrap();
    source.pci.region_write(REGION_CONFIG, 4, &[6, 0]).unwrap();
    poke(&*source.pci, regs::DMA_PAGES, 16);
    let everything = DmaRange { iova: 0, length: 16 * 4096 };
    source.migration.start_dma_logging(&[everything], 4096).unwrap();
    poke(&*source.pci, regs::DOORBELL, 2);
    let mut stamp = [0; 16];
    file.read_exact_at(&mut stamp, 4096).unwrap();
    assert_eq!(stamp, regs::stamp(1));

    destination.migration.set_state(Resuming).unwrap();
    source.migration.set_state(PreCopy).unwrap();
    assert!(source.migration.precopy_info().unwrap().initial_bytes() > 0);
    pump(&mut source.migration, &mut destination.migration);
    assert!(!source.migration.precopy_info().unwrap().reinit());
    poke(&*source.pci, regs::CONFIG_KIB, 100);
    poke(&*source.pci, regs::CONFIG_GEN, 3);
    let info = source.migration.precopy_info().unwrap();
    assert!(info.reinit() && info.initial_bytes() > 100 << 10);
    source.migration.set_state(PreCopyP2p).unwrap();
    source.migration.set_state(StopCopy).unwrap();
    pump(&mut source.migration, &mut destination.migration);
    destination.migration.set_state(Stop).unwrap();

    let mut bitmap = [0];
    source.migration.report_dma_log(everything, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0b11]);
    let digest = source.migration.state_digest().unwrap();
    assert!(digest.is_some());
    assert_eq!(digest, destination.migration.state_digest().unwrap());
    assert_eq!(digest, Some(source.inside.with_core(|core| core.digest())));
}

#[test]
fn x8_a_stream_cut_short_is_refused_by_the_server() {
    let (mut source, mut destination) = (serve(&[]), serve(&[]));
    destination.migration.set_state(Resuming).unwrap();
    source.migration.set_state(PreCopy).unwrap();
    pump(&mut source.migration, &mut destination.migration);
    assert_eq!(common::errno(destination.migration.set_state(Stop)), libc::EINVAL);
    destination.migration.reset().unwrap();
    assert_eq!(destination.migration.state().unwrap(), Running);
}

#[test]
fn a_libvfio_user_like_server_still_migrates() {
    let (mut source, mut destination) = (serve(&["libvfio-user"]), serve(&["libvfio-user"]));
    let capabilities = source.migration.capabilities();
    assert!(!capabilities.precopy_info && !capabilities.flags.p2p());
    poke(&*source.pci, regs::FILL_KIB, 64);
    destination.migration.set_state(Resuming).unwrap();
    source.migration.set_state(PreCopy).unwrap();
    pump(&mut source.migration, &mut destination.migration);
    source.migration.set_state(StopCopy).unwrap();
    pump(&mut source.migration, &mut destination.migration);
    destination.migration.set_state(Stop).unwrap();
    let digest = |served: &Served| served.inside.with_core(|core| core.digest());
    assert_eq!(digest(&source), digest(&destination));
}

#[test]
fn dma_by_messages_reaches_the_clients_memory() {
    struct Calls(std::sync::Mutex<Vec<(u64, Vec<u8>)>>);
    impl vfio_migration::DmaAccess for Calls {
        fn dma_read(&self, _: u64, data: &mut [u8]) -> vfio_migration::DeviceResult<()> {
            data.fill(0);
            Ok(())
        }
        fn dma_write(&self, iova: u64, data: &[u8]) -> vfio_migration::DeviceResult<()> {
            self.0.lock().unwrap().push((iova, data.to_vec()));
            Ok(())
        }
    }
    let mut served = serve(&[]);
    let calls = Arc::new(Calls(std::sync::Mutex::default()));
    served.pci.dma_map(0, 16 * 4096, RW, DmaBacking::Calls(calls.clone())).unwrap();
    served.pci.region_write(REGION_CONFIG, 4, &[6, 0]).unwrap();
    poke(&*served.pci, regs::DMA_PAGES, 16);
    poke(&*served.pci, regs::DOORBELL, 3);
    // STOP waits for the write under way; the rest is owed and done once the device runs again.
    served.migration.set_state(Stop).unwrap();
    served.migration.set_state(Running).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while calls.0.lock().unwrap().len() < 3 {
        assert!(std::time::Instant::now() < deadline, "the stamps did not come");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let expected: Vec<(u64, Vec<u8>)> =
        (0..3).map(|number| (number * 4096, regs::stamp(number).to_vec())).collect();
    assert_eq!(*calls.0.lock().unwrap(), expected);
}

#[test]
fn options_that_cannot_be_are_refused_by_name() {
    let error = ServeOptions::new("x".into(), "mlx9").unwrap_err().to_string();
    assert!(error.contains("mlx5-vf"), "{error}");
    let mut options = ServeOptions::new("x".into(), "qat").unwrap();
    options.quirks = vec!["as-driver".into(), "no-such".into()];
    let error = options.device().unwrap_err().to_string();
    assert!(error.contains("no-such") && error.contains("dma-log-blind"), "{error}");
}

#[test]
fn every_profile_can_be_served_as_its_driver_is() {
    for name in device_profile::BUILTIN_NAMES.iter().copied() {
        let mut options = ServeOptions::new("x".into(), name).unwrap();
        options.quirks = vec!["as-driver".into()];
        let (device, _) = options.device().unwrap();
        let deviates = !options.profile.deviations.is_empty();
        assert_eq!(
            deviates,
            device.with_core(|core| *core.quirks() != Default::default()),
            "{name}"
        );
    }
}

#[test]
fn run_serves_until_it_is_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("device.sock");
    let mut options = ServeOptions::new(socket.clone(), "virtio-vf").unwrap();
    options.quirks = vec!["no-migration".into()];
    let (started, handle) = std::sync::mpsc::channel();
    let serving = std::thread::spawn(move || run(&options, |stop| started.send(stop).unwrap()));
    let stop = handle.recv().unwrap();
    let client = VfioUserDevice::open(&socket, Options::default()).unwrap();
    assert!(client.migration().is_err(), "no-migration");
    let mut id = [0; 4];
    client.pci().region_read(REGION_BAR0, regs::ID, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), regs::ID_VALUE);
    stop.stop();
    serving.join().unwrap().unwrap();
    assert!(!socket.exists());
}
