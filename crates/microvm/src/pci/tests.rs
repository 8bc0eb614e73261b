//! The guest's view of a function, against a device that is memory and a controller without threads.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use migration::{GuestEvent, Section};
use vfio_migration::IrqIndex;

use crate::body::MsiMessage;
use crate::events::Events;
use crate::pci::PciHost;
use crate::pci::mock::{
    EXPRESS_AT, MSI_AT, MSIX_AT, MockFunction, MockInterrupts, POWER_AT, config,
};

const BAR0: u64 = 0xd000_0000;
const BAR2: u64 = 0xd000_1000;
const PBA: u64 = BAR2 + 0x800;

struct Bench {
    host: PciHost,
    device: Arc<MockFunction>,
    interrupts: Arc<MockInterrupts>,
    events: Arc<Mutex<Vec<GuestEvent>>>,
}

impl Bench {
    fn new() -> Self {
        Self::with_config(config())
    }

    fn with_config(config: [u8; 256]) -> Self {
        let interrupts = Arc::new(MockInterrupts::default());
        let events = Arc::new(Events::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        events.set_sink(Some(Arc::new(move |event| sink.lock().unwrap().push(event))));
        let mut host = PciHost::new(interrupts.clone(), events);
        let device = MockFunction::new(config);
        host.add("nic0", device.clone()).unwrap();
        let told = std::mem::take(&mut *device.writes.lock().unwrap());
        assert_eq!(told, [(7, 4, vec![0, 0])], "bus mastering off, and nothing else");
        Self { host, device, interrupts, events: seen }
    }

    /// Memory on, BARs placed.
    fn awake() -> Self {
        let bench = Self::new();
        bench.write(0x10, &(BAR0 as u32).to_le_bytes());
        bench.write(0x18, &(BAR2 as u32).to_le_bytes());
        bench.write(4, &[6, 4]);
        bench
    }

    /// [`awake`](Self::awake), MSI-X on, vector v programmed to data 0x40 + v and unmasked.
    fn with_msix() -> Self {
        let bench = Self::awake();
        for vector in 0..4 {
            bench.program(vector);
            bench.mask(vector, false);
        }
        bench.write(MSIX_AT + 2, &[3, 0x80]);
        bench
    }

    fn program(&self, vector: u64) {
        let entry = BAR2 + 16 * vector;
        assert!(self.host.mmio_write(entry, &0xfee0_0000_u64.to_le_bytes()));
        assert!(self.host.mmio_write(entry + 8, &(0x40 + vector as u32).to_le_bytes()));
    }

    fn mask(&self, vector: u64, masked: bool) {
        assert!(self.host.mmio_write(BAR2 + 16 * vector + 12, &u32::from(masked).to_le_bytes()));
    }

    fn address(&self, slot: u32, at: usize) {
        let address = 1 << 31 | slot << 11 | (at as u32 & 0xfc);
        self.host.port_write(0xcf8, &address.to_le_bytes());
    }

    fn write(&self, at: usize, data: &[u8]) {
        self.address(1, at);
        assert!(self.host.port_write(0xcfc + (at as u16 & 3), data));
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        self.address(1, at);
        let mut data = [0; N];
        assert!(self.host.port_read(0xcfc + (at as u16 & 3), &mut data));
        data
    }

    fn read_dword(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.read(at))
    }

    fn pending(&self) -> u64 {
        let mut data = [0; 8];
        assert!(self.host.mmio_read(PBA, &mut data));
        u64::from_le_bytes(data)
    }

    fn taken(&self) -> Vec<u32> {
        self.interrupts.take().iter().map(|message| message.data).collect()
    }

    fn save(&self) -> Vec<Section> {
        self.host.detach();
        self.host.save().unwrap()
    }
}

#[test]
fn configuration_mechanism_1_finds_bridge_and_device_and_nobody_else() {
    let bench = Bench::new();
    bench.address(0, 8);
    let mut dword = [0; 4];
    bench.host.port_read(0xcfc, &mut dword);
    assert_eq!(u32::from_le_bytes(dword) >> 16, 0x0600);
    assert_eq!(bench.read_dword(0), 0x00f7_1b36);
    assert_eq!(bench.read::<2>(2), [0xf7, 0]);
    for absent in [1u32 << 31 | 2 << 11, 1 << 31 | 1 << 16, 1 << 31 | 1 << 11 | 1 << 8, 1 << 11] {
        bench.host.port_write(0xcf8, &absent.to_le_bytes());
        bench.host.port_read(0xcfc, &mut dword);
        assert_eq!(dword, [0xff; 4], "{absent:#x}");
    }
    // A byte to 0xcf9 is a machine reset and not ours.
    assert!(!bench.host.port_write(0xcf9, &[6]));
    assert!(!bench.host.port_read(0x3f8, &mut [0]));
}

#[test]
fn bars_answer_the_sizing_write_and_keep_their_type() {
    let bench = Bench::new();
    for (at, mask) in [(0x10, 0xffff_f000), (0x18, 0xffff_f000), (0x20, 0xffff_000c), (0x14, 0)] {
        bench.write(at, &[0xff; 4]);
        assert_eq!(bench.read_dword(at), mask, "{at:#x}");
    }
    // The upper half of the 64-bit BAR.
    bench.write(0x24, &[0xff; 4]);
    assert_eq!(bench.read_dword(0x24), 0xffff_ffff);
    // No expansion ROM.
    bench.write(0x30, &[0xff; 4]);
    assert_eq!(bench.read_dword(0x30), 0);
    // Nothing of this is the device's business.
    assert!(bench.device.writes.lock().unwrap().is_empty());
}

#[test]
fn bars_decode_only_while_memory_is_on_and_where_the_guest_put_them() {
    let bench = Bench::new();
    let mut data = [0; 4];
    bench.write(0x10, &(BAR0 as u32).to_le_bytes());
    assert!(!bench.host.mmio_read(BAR0, &mut data));
    bench.write(4, &[2, 0]);
    assert!(bench.host.mmio_write(BAR0 + 8, &[1, 2, 3, 4]));
    assert!(bench.host.mmio_read(BAR0 + 8, &mut data));
    assert_eq!(data, [1, 2, 3, 4]);
    assert!(!bench.host.mmio_read(BAR0 + 0xffe, &mut data), "across the end");
    bench.write(0x10, &0xd800_0000_u32.to_le_bytes());
    assert!(!bench.host.mmio_read(BAR0, &mut data));
    assert!(bench.host.mmio_read(0xd800_0008, &mut data));
    // Above 4 GiB.
    bench.write(0x20, &0u32.to_le_bytes());
    bench.write(0x24, &1u32.to_le_bytes());
    assert!(bench.host.mmio_read(0x1_0000_fff0, &mut data));
}

#[test]
fn odd_lengths_reach_the_device_in_whole_registers() {
    let bench = Bench::awake();
    bench.device.writes.lock().unwrap().clear();
    assert!(bench.host.mmio_write(BAR0 + 5, &[1, 2, 3, 4, 5, 6, 7]));
    let lens: Vec<_> = bench.device.writes.lock().unwrap().iter().map(|w| w.2.len()).collect();
    assert_eq!(lens, [4, 2, 1]);
    let mut back = [0; 7];
    assert!(bench.host.mmio_read(BAR0 + 5, &mut back));
    assert_eq!(back, [1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn pci_command_goes_to_the_device_and_reads_as_written() {
    let bench = Bench::new();
    bench.write(4, &[0xff, 0xff]);
    // No I/O BAR: I/O decoding stays off.
    assert_eq!(bench.read::<2>(4), [0x46, 0x05]);
    assert_eq!(bench.device.config_bytes(4, 2), [0x46, 0x05]);
}

#[test]
fn vendor_capabilities_are_the_devices_own() {
    let bench = Bench::new();
    bench.write(0xf4, &[1, 2, 3, 4]);
    assert_eq!(bench.device.config_bytes(0xf4, 4), [1, 2, 3, 4]);
    assert_eq!(bench.read::<4>(0xf4), [1, 2, 3, 4]);
}

#[test]
fn msix_is_wired_at_the_opening_and_stays_wired_when_the_guest_turns_it_on() {
    let bench = Bench::new();
    assert_eq!(bench.device.wired(), [(IrqIndex::Msix as u32, 4)]);
    bench.device.refuse_irqs.store(true, Ordering::Relaxed);
    bench.write(4, &[6, 4]);
    bench.write(MSIX_AT + 2, &[3, 0x80]);
    assert_eq!(bench.device.wired(), [(IrqIndex::Msix as u32, 4)]);
    assert_eq!(bench.device.config_bytes(MSIX_AT + 3, 1), [0x80], "the device sees it enabled");
}

#[test]
fn every_raised_vector_arrives_once_with_its_message() {
    let bench = Bench::with_msix();
    bench.device.raise(IrqIndex::Msix, 2);
    assert_eq!(bench.interrupts.take(), [MsiMessage { addr: 0xfee0_0000, data: 0x42 }]);
    bench.device.raise(IrqIndex::Msix, 0);
    bench.device.raise(IrqIndex::Msix, 3);
    assert_eq!(bench.taken(), [0x40, 0x43]);
    assert_eq!(bench.taken(), [0; 0]);
}

#[test]
fn a_masked_vector_is_pending_and_delivered_once_when_unmasked() {
    let bench = Bench::with_msix();
    bench.mask(1, true);
    assert_eq!(bench.pending(), 0);
    bench.device.raise(IrqIndex::Msix, 1);
    bench.device.raise(IrqIndex::Msix, 1);
    bench.device.raise(IrqIndex::Msix, 0);
    assert_eq!(bench.taken(), [0x40]);
    assert_eq!(bench.pending(), 0b10);
    assert_eq!(bench.pending(), 0b10, "reading does not clear");
    bench.mask(1, false);
    assert_eq!(bench.taken(), [0x41]);
    assert_eq!(bench.pending(), 0);
    bench.mask(1, true);
    bench.mask(1, false);
    assert_eq!(bench.taken(), [0; 0]);
}

#[test]
fn the_function_mask_holds_all_vectors_back() {
    let bench = Bench::with_msix();
    bench.write(MSIX_AT + 2, &[3, 0xc0]);
    assert_eq!(bench.interrupts.connections(), 0);
    (0..4).for_each(|vector| bench.device.raise(IrqIndex::Msix, vector));
    assert_eq!(bench.taken(), [0; 0]);
    assert_eq!(bench.pending(), 0b1111);
    bench.mask(2, true);
    bench.write(MSIX_AT + 2, &[3, 0x80]);
    assert_eq!(bench.taken(), [0x40, 0x41, 0x43]);
    assert_eq!(bench.pending(), 0b100);
}

#[test]
fn a_new_message_takes_effect_for_what_comes_after_it() {
    let bench = Bench::with_msix();
    bench.device.raise(IrqIndex::Msix, 0);
    bench.host.mmio_write(BAR2 + 8, &0x77_u32.to_le_bytes());
    bench.device.raise(IrqIndex::Msix, 0);
    assert_eq!(bench.taken(), [0x40, 0x77]);
}

#[test]
fn msi_replaces_msix_with_as_many_vectors_as_the_guest_turned_on() {
    let bench = Bench::awake();
    bench.write(MSI_AT + 4, &0xfee0_1000_u32.to_le_bytes());
    bench.write(MSI_AT + 12, &[0x50, 0]);
    bench.write(MSI_AT + 2, &[0x01 | 1 << 4, 0]);
    assert_eq!(bench.device.wired(), [(IrqIndex::Msi as u32, 4)]);
    (0..4).for_each(|vector| bench.device.raise(IrqIndex::Msi, vector));
    assert_eq!(bench.taken(), [0x50, 0x51]);
    bench.write(MSI_AT + 16, &[1, 0, 0, 0]);
    bench.device.raise(IrqIndex::Msi, 0);
    assert_eq!(bench.taken(), [0; 0]);
    assert_eq!(bench.read_dword(MSI_AT + 20) & 1, 1, "pending");
    bench.write(MSI_AT + 16, &[0; 4]);
    assert_eq!(bench.taken(), [0x50]);
}

/// Waits for what another thread does; the test fails if it never comes.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < limit, "{what} never came");
        std::thread::yield_now();
    }
}

fn with_intx() -> Bench {
    let bench = Bench::awake();
    bench.write(4, &[6, 0]);
    bench
}

#[test]
fn intx_is_a_level_until_the_guest_acknowledges_it() {
    let bench = with_intx();
    assert_eq!(bench.device.wired(), [(IrqIndex::Intx as u32, 1)]);
    let unmasked = bench.device.unmasks.load(Ordering::SeqCst);
    bench.device.raise(IrqIndex::Intx, 0);
    let mut lines = Vec::new();
    until("the line", || {
        lines.extend(bench.interrupts.take_lines());
        !lines.is_empty()
    });
    assert_eq!(lines, [16]);
    assert_eq!(bench.device.unmasks.load(Ordering::SeqCst), unmasked);
    bench.interrupts.acknowledge(16);
    until("the unmasking", || bench.device.unmasks.load(Ordering::SeqCst) == unmasked + 1);
}

#[test]
fn an_intx_that_the_guest_has_not_acknowledged_is_high_on_the_other_side() {
    let source = with_intx();
    source.device.raise(IrqIndex::Intx, 0);
    until("the line", || !source.interrupts.take_lines().is_empty());
    let sections = source.save();
    let destination = Bench::new();
    destination.host.load(&sections).unwrap();
    destination.host.rearm("nic0").unwrap();
    assert_eq!(destination.device.wired(), [(IrqIndex::Intx as u32, 1)]);
    assert!(destination.interrupts.take_lines().is_empty());
    destination.host.reattach().unwrap();
    assert_eq!(destination.interrupts.take_lines(), [16]);
    destination.interrupts.acknowledge(16);
    until("the unmasking", || destination.device.unmasks.load(Ordering::SeqCst) == 1);
}

#[test]
fn a_low_intx_stays_low_and_the_device_is_unmasked() {
    let source = with_intx();
    let sections = source.save();
    let destination = Bench::new();
    destination.host.load(&sections).unwrap();
    destination.host.reattach().unwrap();
    assert!(destination.interrupts.take_lines().is_empty());
    assert_eq!(destination.device.unmasks.load(Ordering::SeqCst), 1);
}

#[test]
fn state_survives_with_bars_table_masks_and_pending_bits() {
    let source = Bench::with_msix();
    source.write(0x3c, &[0x2a]);
    source.mask(3, true);
    source.device.raise(IrqIndex::Msix, 3);
    source.host.detach();
    // In the last moment before STOP, and already detached.
    source.device.raise(IrqIndex::Msix, 1);
    let sections = source.host.save().unwrap();
    assert_eq!(
        sections.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
        ["pci-host", "pci:nic0"]
    );
    let told = source.host.sections();
    assert!(told.iter().zip(&sections).all(|(t, s)| (&t.name, t.version) == (&s.name, s.version)));

    let destination = Bench::new();
    destination.host.load(&sections).unwrap();
    assert_eq!(destination.interrupts.connections(), 0);
    destination.host.rearm("nic0").unwrap();
    assert_eq!(destination.device.config_bytes(4, 2), [6, 4]);
    assert_eq!(destination.device.config_bytes(MSIX_AT + 2, 2), [3, 0x80]);
    assert_eq!(destination.taken(), [0; 0]);
    destination.host.reattach().unwrap();
    assert_eq!(destination.taken(), [0x41], "the unmasked one, once");
    assert_eq!(destination.taken(), [0; 0]);
    // The masked one, with its pending bit.
    assert_eq!(destination.pending(), 0b1000);
    destination.mask(3, false);
    assert_eq!(destination.taken(), [0x43]);
    assert_eq!(destination.read::<1>(0x3c), [0x2a]);
    let mut dword = [0; 4];
    assert!(destination.host.mmio_read(BAR0, &mut dword));
}

#[test]
fn a_pause_between_address_and_data_register_is_not_seen() {
    let source = Bench::new();
    source.address(1, 0x2c);
    let destination = Bench::new();
    destination.host.load(&source.save()).unwrap();
    let mut dword = [0; 4];
    destination.host.port_read(0xcfc, &mut dword);
    assert_eq!(dword, [0x36, 0x1b, 1, 0]);
}

#[test]
fn a_source_that_goes_on_loses_nothing() {
    let bench = Bench::with_msix();
    bench.mask(2, true);
    bench.device.raise(IrqIndex::Msix, 2);
    bench.host.detach();
    bench.device.raise(IrqIndex::Msix, 0);
    bench.device.raise(IrqIndex::Msix, 0);
    bench.host.save().unwrap();
    bench.device.raise(IrqIndex::Msix, 1);
    assert_eq!(bench.taken(), [0; 0]);
    bench.host.reattach().unwrap();
    assert_eq!(bench.taken(), [0x40, 0x41]);
    assert_eq!(bench.pending(), 0b100);
    bench.host.reattach().unwrap();
    bench.device.raise(IrqIndex::Msix, 3);
    assert_eq!(bench.taken(), [0x43]);
}

#[test]
fn saving_with_interrupts_attached_is_refused() {
    assert!(Bench::with_msix().host.save().is_err());
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let source = Bench::with_msix();
    let good = source.save();
    let payload = &good[1].payload;
    type Spoil = Box<dyn Fn(&mut Section)>;
    let cases: [(&str, Spoil); 11] = [
        ("cut short", Box::new(|s| s.payload.truncate(s.payload.len() - 1))),
        ("too long", Box::new(|s| s.payload.push(0))),
        ("empty", Box::new(|s| s.payload.clear())),
        ("another version", Box::new(|s| s.version = 2)),
        ("another kind", Box::new(|s| s.kind = "x".into())),
        ("another vendor", Box::new(|s| s.payload[4] ^= 1)),
        ("a BAR off its size", Box::new(|s| s.payload[4 + 0x11] ^= 1)),
        ("another capability", Box::new(|s| s.payload[4 + MSIX_AT] = 9)),
        ("absurd vectors", Box::new(|s| s.payload[260..264].fill(0xff))),
        ("unknown flags", Box::new(|s| s.payload[264 + 12] = 0x80)),
        ("a level of 2", Box::new(|s| *s.payload.last_mut().unwrap() = 2)),
    ];
    for (what, spoil) in cases {
        let destination = Bench::new();
        let mut sections = good.clone();
        spoil(&mut sections[1]);
        assert!(destination.host.load(&sections).is_err(), "{what}");
        assert_eq!(destination.read::<2>(4), [0, 0], "{what}");
    }
    for cut in 0..payload.len() {
        let mut sections = good.clone();
        sections[1].payload.truncate(cut);
        assert!(Bench::new().host.load(&sections).is_err(), "cut at {cut}");
    }
    assert!(Bench::new().host.load(&good[..1]).is_err(), "a missing function");
    assert!(Bench::new().host.load(&good[1..]).is_err(), "a missing host");
}

#[test]
fn h6_an_flr_resets_the_device_and_sets_it_up_again() {
    let bench = Bench::with_msix();
    bench.mask(0, true);
    let control = EXPRESS_AT + 8;
    bench.write(control, &[0, 0x80]);
    assert_eq!(bench.device.resets.load(Ordering::Relaxed), 1);
    assert_eq!(bench.device.config_bytes(4, 2), [6, 4]);
    assert_eq!(bench.device.config_bytes(MSIX_AT + 2, 2), [3, 0x80]);
    assert_eq!(
        bench.device.config_bytes(control + 1, 1),
        [0],
        "the device is reset by one way only"
    );
    assert_eq!(bench.device.wired(), [(IrqIndex::Msix as u32, 4)]);
    assert_eq!(*bench.events.lock().unwrap(), [GuestEvent::DeviceReset { id: "nic0".into() }]);
    bench.device.raise(IrqIndex::Msix, 1);
    assert_eq!(bench.taken(), [0x41]);
}

#[test]
fn leaving_d3hot_resets_and_d3hot_itself_stops_the_function() {
    let bench = Bench::with_msix();
    bench.write(POWER_AT + 4, &[3, 0]);
    assert_eq!(bench.read::<1>(POWER_AT + 4), [3]);
    assert_eq!(bench.device.config_bytes(POWER_AT + 4, 1), [0], "the device stays awake");
    assert_eq!(bench.device.config_bytes(4, 2), [2, 4], "without bus mastering");
    assert!(!bench.host.mmio_read(BAR0, &mut [0; 4]));
    bench.write(POWER_AT + 4, &[0, 0]);
    assert_eq!(bench.device.resets.load(Ordering::Relaxed), 1);
    assert_eq!(bench.device.config_bytes(4, 2), [6, 4]);
    assert_eq!(bench.events.lock().unwrap().len(), 1);
    // D1 is not there: the write is discarded.
    bench.write(POWER_AT + 4, &[1, 0]);
    assert_eq!(bench.read::<1>(POWER_AT + 4), [0]);
}

#[test]
fn a_function_without_a_reset_on_d3hot_is_not_reset() {
    let mut config = config();
    config[POWER_AT + 4] = 8;
    let bench = Bench::with_config(config);
    bench.write(POWER_AT + 4, &[3, 0]);
    bench.write(POWER_AT + 4, &[0, 0]);
    assert_eq!(bench.device.resets.load(Ordering::Relaxed), 0);
    assert!(bench.events.lock().unwrap().is_empty());
}

#[test]
fn a_reset_that_the_function_does_not_claim_neither_happens_nor_reaches_the_device() {
    let mut config = config();
    config[EXPRESS_AT + 7] = 0;
    let bench = Bench::with_config(config);
    bench.write(EXPRESS_AT + 8, &[0x10, 0x80]);
    assert_eq!(bench.device.resets.load(Ordering::Relaxed), 0);
    assert_eq!(bench.device.config_bytes(EXPRESS_AT + 8, 2), [0x10, 0]);
}

#[test]
fn a_machine_reset_leads_back_to_power_on() {
    let fresh = Bench::new().save();
    let bench = Bench::with_msix();
    bench.mask(2, true);
    bench.device.raise(IrqIndex::Msix, 2);
    bench.host.reset().unwrap();
    assert_eq!(bench.device.resets.load(Ordering::Relaxed), 1);
    assert_eq!(bench.interrupts.connections(), 0);
    assert_eq!(bench.save(), fresh);
}

#[test]
fn all_ones_come_from_a_device_whose_server_is_gone_and_are_counted() {
    let bench = Bench::with_msix();
    bench.device.gone.store(true, Ordering::Relaxed);
    let mut data = [0; 4];
    assert!(bench.host.mmio_read(BAR0, &mut data));
    assert_eq!(data, [0xff; 4]);
    assert_eq!(bench.read_dword(0), 0xffff_ffff);
    assert_eq!(bench.pending(), u64::MAX);
    assert!(bench.host.mmio_write(BAR0, &data));
    let status = bench.host.status().remove(0);
    assert_eq!((status.failed_reads, status.failed_writes), (3, 1));
    let lost = bench.host.lost();
    assert_eq!(lost[0].0, "nic0");
    assert!(lost[0].1.contains("killed by a test"), "{lost:?}");
    // Nothing hangs or panics on what comes after.
    bench.write(EXPRESS_AT + 8, &[0, 0x80]);
    bench.host.reset().unwrap();
    assert!(bench.host.rearm("nic0").is_err());
}

#[test]
fn a_refused_wiring_of_a_stopped_device_is_made_up_for_before_the_guest_runs() {
    let sections = with_intx().save();
    let destination = Bench::new();
    destination.device.refuse_irqs.store(true, Ordering::Relaxed);
    destination.host.load(&sections).unwrap();
    destination.host.rearm("nic0").unwrap();
    assert_eq!(destination.device.wired(), [(IrqIndex::Msix as u32, 4)]);
    destination.device.refuse_irqs.store(false, Ordering::Relaxed);
    destination.host.reattach().unwrap();
    assert_eq!(destination.device.wired(), [(IrqIndex::Intx as u32, 1)]);
}

#[test]
fn what_cannot_be_passed_through_is_refused_by_name() {
    type Spoil = fn(&mut [u8; 256]);
    let spoil: [(&str, Spoil); 4] = [
        ("header type", |c| c[0x0e] = 1),
        ("vendor id", |c| c[..2].fill(0xff)),
        ("loops", |c| c[MSI_AT + 1] = MSIX_AT as u8),
        ("outside of their BAR", |c| c[MSIX_AT + 9] = 0x20),
    ];
    for (expected, spoil) in spoil {
        let mut config = config();
        spoil(&mut config);
        let events = Arc::new(Events::default());
        let mut host = PciHost::new(Arc::new(MockInterrupts::default()), events);
        let error = host.add("nic0", MockFunction::new(config)).unwrap_err().to_string();
        assert!(error.contains("nic0") && error.contains(expected), "{error}");
    }
}

#[test]
fn ids_are_unique_and_slots_are_bounded() {
    let mut host = PciHost::new(Arc::new(MockInterrupts::default()), Arc::default());
    for slot in 0..8 {
        host.add(&format!("nic{slot}"), MockFunction::new(config())).unwrap();
    }
    assert!(
        host.add("nic8", MockFunction::new(config())).unwrap_err().to_string().contains("nic8")
    );
    let mut host = PciHost::new(Arc::new(MockInterrupts::default()), Arc::default());
    host.add("a", MockFunction::new(config())).unwrap();
    assert!(host.add("a", MockFunction::new(config())).unwrap_err().to_string().contains("twice"));
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// What a guest, or its device, can do.
    #[derive(Clone, Debug)]
    enum Act {
        Config(u8, Vec<u8>),
        Memory(u64, Vec<u8>),
        Raise(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        let data = || prop::collection::vec(any::<u8>(), 1..=8);
        // Registers that matter are hit more often than by chance.
        let at = prop_oneof![
            any::<u8>(),
            0u8..0x40,
            MSIX_AT as u8..MSIX_AT as u8 + 4,
            MSI_AT as u8..MSI_AT as u8 + 24,
            POWER_AT as u8 + 4..POWER_AT as u8 + 6,
        ];
        let addr = prop_oneof![Just(BAR0), Just(BAR2), Just(PBA), Just(BAR2 + 64)]
            .prop_flat_map(|base| (0..80u64).prop_map(move |offset| base + offset));
        prop_oneof![
            (at, data()).prop_map(|(at, data)| Act::Config(at, data)),
            (addr, data()).prop_map(|(addr, data)| Act::Memory(addr, data)),
            (0..4usize).prop_map(Act::Raise),
        ]
    }

    fn perform(bench: &Bench, act: &Act) {
        match act {
            Act::Config(at, data) => {
                let at = usize::from(*at);
                let len = data.len().min(4 - at % 4);
                bench.write(at, &data[..len]);
                let mut back = [0; 4];
                bench.host.port_read(0xcfc + (at as u16 & 3), &mut back[..len]);
            }
            Act::Memory(addr, data) => {
                bench.host.mmio_write(*addr, data);
                bench.host.mmio_read(*addr, &mut data.clone());
            }
            Act::Raise(vector) => bench.device.raise(IrqIndex::Msix, *vector),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn any_history_survives_saving_and_loading(acts in prop::collection::vec(act(), 0..40)) {
            let source = Bench::with_msix();
            acts.iter().for_each(|act| perform(&source, act));
            let saved = source.save();
            // These reached the guest before it was saved.
            source.taken();
            let destination = Bench::new();
            destination.host.load(&saved).unwrap();
            destination.host.rearm("nic0").unwrap();
            prop_assert_eq!(&destination.host.save().unwrap(), &saved);
            // Both go on in the same way.
            source.host.reattach().unwrap();
            destination.host.reattach().unwrap();
            prop_assert_eq!(source.taken(), destination.taken());
        }

        #[test]
        fn any_payload_is_loaded_or_refused(payload in prop::collection::vec(any::<u8>(), 0..400)) {
            let bench = Bench::new();
            let mut sections = bench.save();
            sections[1].payload = payload;
            let _ = bench.host.load(&sections);
        }

        #[test]
        fn any_configuration_space_is_taken_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 256),
            acts in prop::collection::vec(act(), 0..10),
        ) {
            let mut config = config();
            // The shape of the header stays, or nearly every case would end there.
            for (at, byte) in bytes.into_iter().enumerate() {
                if at >= 0x34 || (0x10..0x28).contains(&at) {
                    config[at] = byte;
                }
            }
            let mut host = PciHost::new(Arc::new(MockInterrupts::default()), Arc::default());
            let device = MockFunction::new(config);
            if host.add("nic0", device.clone()).is_ok() {
                let (interrupts, events) = Default::default();
                let bench = Bench { host, device, interrupts, events };
                acts.iter().for_each(|act| perform(&bench, act));
                bench.save();
            }
        }
    }
}
