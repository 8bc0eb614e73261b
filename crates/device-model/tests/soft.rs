//! The running device: threads, eventfds, guest memory by file and by calls.

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use device_model::{SoftDevice, SoftOptions, Timing, regs};
use vfio_migration::DeviceState::*;
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{
    DeviceResult, DmaAccess, DmaBacking, DmaPermissions, DmaRange, IrqIndex, MigratableDevice,
    PciFunction, ReadOutcome,
};
use vmm_sys_util::eventfd::EventFd;

const RW: DmaPermissions = DmaPermissions { read: true, write: true };
const PAGES: u64 = 16;

fn device() -> SoftDevice {
    SoftDevice::new(SoftOptions::new(common::profile())).unwrap()
}

fn memory() -> (Arc<OwnedFd>, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * 4096).unwrap();
    (Arc::new(file.try_clone().unwrap().into()), file)
}

fn poke(function: &dyn PciFunction, register: u64, value: u32) {
    function.region_write(REGION_BAR0, register, &value.to_le_bytes()).unwrap();
}

fn peek(function: &dyn PciFunction, register: u64) -> u32 {
    let mut word = [0; 4];
    function.region_read(REGION_BAR0, register, &mut word).unwrap();
    u32::from_le_bytes(word)
}

/// Maps `backing` at 0 and makes it the ring of the device.
fn set_up(function: &dyn PciFunction, backing: DmaBacking) {
    function.dma_map(0, PAGES * 4096, RW, backing).unwrap();
    function.region_write(REGION_CONFIG, 4, &[6, 0]).unwrap();
    poke(function, regs::DMA_PAGES, PAGES as u32);
    poke(function, regs::CONTROL, regs::CONTROL_IRQ);
}

/// Waits until `condition` holds; a device that does not come to it fails the test.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

fn fd_of(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// Moves everything from one device to another; both end stopped.
fn migrate(source: &mut dyn MigratableDevice, destination: &mut dyn MigratableDevice) {
    let mut buf = vec![0; 1 << 20];
    destination.set_state(Resuming).unwrap();
    source.set_state(PreCopy).unwrap();
    while let ReadOutcome::Data(len) = source.read(&mut buf).unwrap() {
        assert_eq!(destination.write(&buf[..len]).unwrap(), len);
    }
    source.set_state(StopCopy).unwrap();
    loop {
        match source.read(&mut buf).unwrap() {
            ReadOutcome::Data(len) => assert_eq!(destination.write(&buf[..len]).unwrap(), len),
            ReadOutcome::End => break,
            ReadOutcome::NothingNow => panic!("STOP_COPY has no temporary end"),
        }
    }
    destination.set_state(Stop).unwrap();
}

#[test]
fn a_doorbell_writes_stamps_to_the_file_logs_them_and_signals() {
    let device = device();
    let (function, mut migration) = (device.function(), device.migration());
    let (fd, file) = memory();
    set_up(&*function, DmaBacking::Fd { fd, offset: 0 });
    let event = eventfd();
    function.set_irq_eventfds(IrqIndex::Msix, 2, &[Some(fd_of(&event))]).unwrap();
    let everything = DmaRange { iova: 0, length: PAGES * 4096 };
    migration.start_dma_logging(&[everything], 4096).unwrap();

    poke(&*function, regs::VECTOR, 2);
    poke(&*function, regs::DOORBELL, 3);

    assert_eq!(event.read().unwrap(), 1);
    for number in 0..3 {
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, number * 4096).unwrap();
        assert_eq!(bytes, regs::stamp(number));
    }
    let mut bitmap = [0];
    migration.report_dma_log(everything, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0b111]);
    // A file that ends before the mapping would.
    let (short, _) = memory();
    let too_long =
        function.dma_map(1 << 30, PAGES * 4096 + 1, RW, DmaBacking::Fd { fd: short, offset: 0 });
    assert_eq!(common::errno(too_long), libc::EINVAL);
}

#[test]
fn background_dma_runs_until_stop_and_not_after() {
    let device = device();
    let (function, mut migration) = (device.function(), device.migration());
    let (fd, _file) = memory();
    set_up(&*function, DmaBacking::Fd { fd, offset: 0 });
    poke(&*function, regs::DMA_RATE, 10_000);
    poke(&*function, regs::CONTROL, regs::CONTROL_DMA);
    wait_until("background DMA", || peek(&*function, regs::COMPLETED) > 20);
    migration.set_state(PreCopyP2p).unwrap();
    let at = peek(&*function, regs::COMPLETED);
    wait_until("DMA in PRE_COPY_P2P", || peek(&*function, regs::COMPLETED) > at);
    migration.set_state(StopCopy).unwrap();
    let at = peek(&*function, regs::COMPLETED);
    let digest = migration.state_digest().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(peek(&*function, regs::COMPLETED), at);
    assert_eq!(migration.state_digest().unwrap(), digest);
}

#[test]
fn two_devices_hand_over_and_the_pending_interrupt_fires_there() {
    let (source, destination) = (device(), device());
    let (function, mut saving) = (source.function(), source.migration());
    let (fd, _file) = memory();
    set_up(&*function, DmaBacking::Fd { fd, offset: 0 });
    let event = eventfd();
    function.set_irq_eventfds(IrqIndex::Msix, 0, &[Some(fd_of(&event))]).unwrap();
    function.set_irq_masked(IrqIndex::Msix, 0, true).unwrap();
    poke(&*function, regs::FILL_KIB, 100);
    poke(&*function, regs::DOORBELL, 5000);
    wait_until("the doorbell", || peek(&*function, regs::RAISED) == 1);
    assert!(event.read().is_err(), "masked");

    let mut loading = destination.migration();
    let other = eventfd();
    let there = destination.function();
    there.set_irq_eventfds(IrqIndex::Msix, 0, &[Some(fd_of(&other))]).unwrap();
    migrate(&mut saving, &mut loading);
    assert_eq!(saving.state_digest().unwrap(), loading.state_digest().unwrap());
    assert!(other.read().is_err(), "stopped");
    loading.set_state(Running).unwrap();
    assert_eq!(other.read().unwrap(), 1);
    assert_eq!(peek(&*there, regs::COMPLETED), 5000);
}

/// Memory by calls, whose writes wait for a gate.
#[derive(Default)]
struct Gated {
    open: Mutex<bool>,
    opened: Condvar,
    entered: AtomicBool,
    written: Mutex<Vec<u64>>,
}

impl Gated {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl DmaAccess for Gated {
    fn dma_read(&self, _iova: u64, data: &mut [u8]) -> DeviceResult<()> {
        data.fill(0);
        Ok(())
    }
    fn dma_write(&self, iova: u64, _data: &[u8]) -> DeviceResult<()> {
        self.entered.store(true, Ordering::Release);
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
        self.written.lock().unwrap().push(iova);
        Ok(())
    }
}

#[test]
fn h1_stop_waits_for_a_write_under_way_and_registers_answer_meanwhile() {
    let device = device();
    let function = device.function();
    let memory = Arc::new(Gated::default());
    set_up(&*function, DmaBacking::Calls(Arc::clone(&memory) as Arc<dyn DmaAccess>));
    poke(&*function, regs::DOORBELL, 2);
    wait_until("the write", || memory.entered.load(Ordering::Acquire));
    // The lock is free although the write hangs.
    assert_eq!(peek(&*function, regs::COMPLETED), 0);

    let mut migration = device.migration();
    let stopped = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stopped);
    let stopping = std::thread::spawn(move || {
        migration.set_state(Stop).unwrap();
        told.store(true, Ordering::Release);
        migration
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!stopped.load(Ordering::Acquire), "SET returned before the write was done");
    memory.open();
    let mut migration = stopping.join().unwrap();
    let done = memory.written.lock().unwrap().len() as u32;
    assert!(done >= 1);
    assert_eq!(peek(&*function, regs::COMPLETED), done);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(memory.written.lock().unwrap().len() as u32, done, "nothing after STOP");
    migration.set_state(Running).unwrap();
    wait_until("the rest", || peek(&*function, regs::RAISED) == 1);
    assert_eq!(*memory.written.lock().unwrap(), [0, 4096]);
}

#[test]
fn unmapping_waits_for_a_write_under_way_and_what_is_unmapped_fails() {
    let device = device();
    let function = device.function();
    let memory = Arc::new(Gated::default());
    set_up(&*function, DmaBacking::Calls(Arc::clone(&memory) as Arc<dyn DmaAccess>));
    poke(&*function, regs::DOORBELL, 3);
    wait_until("the write", || memory.entered.load(Ordering::Acquire));
    let unmapping = {
        let function = device.function();
        std::thread::spawn(move || function.dma_unmap(0, PAGES * 4096).unwrap())
    };
    std::thread::sleep(Duration::from_millis(10));
    memory.open();
    unmapping.join().unwrap();
    wait_until("the failure", || peek(&*function, regs::RAISED) == 1);
    assert!(peek(&*function, regs::STATUS) & regs::STATUS_DMA_FAILED != 0);
    assert_eq!(memory.written.lock().unwrap().len() as u32, peek(&*function, regs::COMPLETED));
}

#[test]
fn h6_a_function_level_reset_unwires_and_ends_the_session() {
    let device = device();
    let (function, mut migration) = (device.function(), device.migration());
    let event = eventfd();
    function.set_irq_eventfds(IrqIndex::Msix, 0, &[Some(fd_of(&event))]).unwrap();
    migration.set_state(PreCopy).unwrap();
    function.region_write(REGION_CONFIG, 0x58, &0x8000u16.to_le_bytes()).unwrap();
    assert_eq!(migration.state().unwrap(), Running);
    assert_eq!(common::errno(migration.read(&mut [0; 8])), libc::ENODEV);
    poke(&*function, regs::CONTROL, regs::CONTROL_IRQ);
    poke(&*function, regs::DOORBELL, 0);
    assert!(event.read().is_err());
    migration.set_state(PreCopy).unwrap();
    assert!(matches!(migration.read(&mut [0; 8]).unwrap(), ReadOutcome::Data(8)));
}

#[test]
fn x10_after_a_failed_set_the_handle_has_no_session() {
    let device = device();
    let mut migration = device.migration();
    migration.set_state(PreCopy).unwrap();
    device.with_core(|core| {
        core.quirks_mut().switch_on("fail-arc=pre_copy_p2p-stop_copy:5:1").unwrap();
    });
    let error = migration.set_state(StopCopy).unwrap_err();
    assert_eq!(error.errno(), Some(5));
    assert_eq!(common::state_of(&error), Some(PreCopyP2p));
    assert!(migration.read(&mut [0; 8]).is_err());
    let recovered = vfio_migration::recovery::recover(&mut migration, Running);
    assert!(matches!(recovered, vfio_migration::recovery::Recovery::Recovered));
}

#[test]
fn a_transition_takes_its_time_and_a_reset_may_come_in_the_middle() {
    let timing = Timing { to_p2p_ns: 200_000_000, ..Timing::OFF };
    let options = SoftOptions { timing, ..SoftOptions::new(common::profile()) };
    let device = SoftDevice::new(options).unwrap();
    let mut migration = device.migration();
    let (began, function) = (Instant::now(), device.function());
    let quiescing = std::thread::spawn(move || {
        let result = migration.set_state(RunningP2p);
        (migration, result, began.elapsed())
    });
    // The device works on, and answers.
    poke(&*function, regs::SCRATCH, 5);
    assert_eq!(device.with_core(|core| core.state()), Running);
    let (mut migration, result, took) = quiescing.join().unwrap();
    result.unwrap();
    assert!(took >= Duration::from_millis(200));

    migration.set_state(PreCopy).unwrap();
    let sets = device.with_core(|core| core.sets());
    let quiescing = std::thread::spawn(move || (migration.set_state(PreCopyP2p), migration));
    wait_until("the SET", || device.with_core(|core| core.sets()) > sets);
    function.reset_function().unwrap();
    let (result, mut migration) = quiescing.join().unwrap();
    assert_eq!(common::errno(result), libc::EAGAIN);
    assert_eq!(migration.state().unwrap(), Running);
}

#[test]
fn handles_keep_the_device_alive_and_the_last_one_ends_it() {
    let device = device();
    let (function, mut migration) = (device.function(), device.migration());
    let memory = Arc::new(Gated::default());
    function.dma_map(0, 4096, RW, DmaBacking::Calls(memory.clone())).unwrap();
    drop(device);
    drop(function);
    migration.set_state(PreCopy).unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(migration);
    assert_eq!(Arc::strong_count(&memory), 1, "thread and mappings are gone");
}
