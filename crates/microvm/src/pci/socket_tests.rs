//! The function over a real vfio-user socket: wired, reset, lost.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::{GuestEvent, GuestMemory, RegionLayout};
use vfio_kernel::AddressSpaces;
use vfio_migration::{
    DeviceCapabilities, DeviceResult, DeviceState, IrqIndex, MigratableDevice, MigrationFlags,
    PciFunction, PrecopyInfo, ReadOutcome,
};
use vfio_user::{RunningServer, ServedDevice, Server, ServerOptions};

use crate::config::{DeviceBackend, DeviceConfig};
use crate::events::Events;
use crate::pci::mock::{EXPRESS_AT, MSIX_AT, MockFunction, MockInterrupts};
use crate::pci::{OpenDevice, PciHost, open};

/// The migration side of a mock: states only.
struct Plain(Arc<MockFunction>);

impl MigratableDevice for Plain {
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: MigrationFlags::new(false, false),
            precopy_info: false,
            precopy_info_v2: false,
            data_size: false,
            dma_logging: false,
            reset_runs: true,
            max_write_bytes: None,
        }
    }
    fn state(&mut self) -> DeviceResult<DeviceState> {
        Ok(DeviceState::Running)
    }
    fn set_state(&mut self, _: DeviceState) -> DeviceResult<()> {
        Ok(())
    }
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        Ok(PrecopyInfo::from_raw(false, 0, 0, 0))
    }
    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Ok(0)
    }
    fn read(&mut self, _: &mut [u8]) -> DeviceResult<ReadOutcome> {
        Ok(ReadOutcome::End)
    }
    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        Ok(buf.len())
    }
    fn reset(&mut self) -> DeviceResult<()> {
        self.0.reset_function()
    }
}

struct Bench {
    device: Arc<MockFunction>,
    server: RunningServer,
    opened: OpenDevice,
    memory: Arc<GuestMemory>,
    _directory: tempfile::TempDir,
}

fn bench(options: ServerOptions) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    let device = MockFunction::workload();
    let served =
        ServedDevice { migration: Some(Box::new(Plain(device.clone()))), pci: device.clone() };
    let server = Server::bind(&path, options).unwrap().spawn(served).unwrap();
    let layout = [RegionLayout { gpa: 0, len: 1 << 20 }, RegionLayout { gpa: 1 << 32, len: 4096 }];
    let memory = Arc::new(GuestMemory::new(&layout).unwrap());
    let opened = {
        let backend = DeviceBackend::VfioUser(path);
        let config = DeviceConfig { id: "nic0".into(), backend };
        open(&config, &memory, &AddressSpaces::new()).unwrap()
    };
    Bench { device, server, opened, memory, _directory: directory }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < limit, "{what} never came");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn write_config(host: &PciHost, at: usize, data: &[u8]) {
    let address = 1u32 << 31 | 1 << 11 | (at as u32 & 0xfc);
    host.port_write(0xcf8, &address.to_le_bytes());
    host.port_write(0xcfc + (at as u16 & 3), data);
}

fn with_each_server(test: impl Fn(Bench)) {
    test(bench(ServerOptions::default()));
    test(bench(ServerOptions { libvfio_user_compat: true, ..ServerOptions::default() }));
    test(bench(ServerOptions { max_msg_fds: 1, twin_socket: false, ..ServerOptions::default() }));
}

#[test]
fn opening_resets_maps_memory_and_describes() {
    with_each_server(|bench| {
        assert_eq!(bench.device.resets.load(Ordering::Relaxed), 1);
        let mapped: Vec<_> = bench.memory.layout().iter().map(|r| (r.gpa, r.len)).collect();
        assert_eq!(*bench.device.mapped.lock().unwrap(), mapped);
        let description = &bench.opened.device.description;
        assert_eq!((description.id.as_str(), description.backend.as_str()), ("nic0", "vfio-user"));
        assert_eq!(description.pci_ids, [0x1b36, 0x00f7, 0x1b36, 1]);
    });
}

#[test]
fn interrupts_come_through_before_and_after_a_reset_and_loss_is_noticed_by_itself() {
    with_each_server(|bench| {
        let interrupts = Arc::new(MockInterrupts::default());
        let events = Arc::new(Events::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        events.set_sink(Some(Arc::new(move |event| sink.lock().unwrap().push(event))));
        let mut host = PciHost::new(interrupts.clone(), events);
        host.add_device(&bench.opened).unwrap();
        assert_eq!(bench.device.wired(), [(IrqIndex::Msix as u32, 4)]);

        write_config(&host, 0x18, &0xd000_1000_u32.to_le_bytes());
        write_config(&host, 4, &[6, 4]);
        for vector in 0..4u32 {
            let entry = 0xd000_1000 + 16 * u64::from(vector);
            for (at, word) in (0..).step_by(4).zip([0xfee0_0000, 0, 0x40 + vector, 0]) {
                assert!(host.mmio_write(entry + at, &u32::to_le_bytes(word)));
            }
        }
        write_config(&host, MSIX_AT + 2, &[3, 0x80]);
        let taken = || interrupts.take().iter().map(|m| m.data).collect::<Vec<_>>();
        bench.device.raise(IrqIndex::Msix, 3);
        assert_eq!(taken(), [0x43]);

        write_config(&host, EXPRESS_AT + 8, &[0, 0x80]);
        assert_eq!(bench.device.resets.load(Ordering::Relaxed), 2);
        assert_eq!(*seen.lock().unwrap(), [GuestEvent::DeviceReset { id: "nic0".into() }]);
        assert_eq!(bench.device.config_bytes(4, 2), [6, 4]);
        bench.device.raise(IrqIndex::Msix, 1);
        assert_eq!(taken(), [0x41]);

        assert!(host.lost().is_empty());
        let _device = bench.server.stop().unwrap();
        until("the loss", || !host.lost().is_empty());
        assert_eq!(host.lost()[0].0, "nic0");
        let mut word = [0; 4];
        assert!(host.mmio_read(0xd000_1000, &mut word));
        assert_eq!(word, [0xff; 4]);
        assert_eq!(host.status()[0].failed_reads, 1);
    });
}
