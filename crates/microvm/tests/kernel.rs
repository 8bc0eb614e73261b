//! A PVH kernel that is not the built-in one boots under `kernel`, and moves: segments, paging, SSE and debug
//! registers, PICs, PIT and the serial port come along.

use std::path::Path;
use std::time::{Duration, Instant};

use microvm::workload::pvh_elf;
use microvm::{SerialConfig, Vm, VmConfig};
use migration::{PAGE_SIZE, Vmm};

std::arch::global_asm!(include_str!("kernel.S"), options(att_syntax, raw));

unsafe extern "C" {
    static test_kernel_start: u8;
    static test_kernel_end: u8;
}

const PATIENCE: Duration = Duration::from_secs(60);
const BASE: u32 = 0x20_0000;

/// Writes the kernel as a file.
fn kernel_file(path: &Path) {
    let (start, end) = (&raw const test_kernel_start, &raw const test_kernel_end);
    // SAFETY: both symbols bound the read-only section of kernel.S.
    let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
    std::fs::write(path, pvh_elf(code, BASE)).unwrap();
}

/// Rounds, errors, ticks, bytes echoed.
fn counters(vm: &Vm) -> [u32; 4] {
    let mut words = [0; 16];
    vm.memory().read(0x30_0000, &mut words).unwrap();
    std::array::from_fn(|index| {
        u32::from_le_bytes(words[4 * index..4 * index + 4].try_into().unwrap())
    })
}

fn wait_for(vm: &Vm, what: &str, mut holds: impl FnMut([u32; 4]) -> bool) -> [u32; 4] {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = counters(vm);
        if holds(now) {
            return now;
        }
        let alive = vm.status().ended.is_none();
        assert!(alive && Instant::now() < deadline, "{what}: {now:?}, {:?}", vm.status());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Boots with `command_line` and moves three times.
fn boots_and_moves(command_line: &str) {
    if let Err(why) = microvm::kvm::available() {
        println!("skipped: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    kernel_file(&kernel);
    let config = |console: &str| VmConfig {
        memory_bytes: 16 << 20,
        kernel: Some(kernel.clone()),
        command_line: command_line.into(),
        serial: SerialConfig::File(dir.path().join(console)),
        ..VmConfig::default()
    };
    let console = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();

    let mut vm = Vm::new(config("console0")).unwrap();
    vm.start().unwrap();
    if command_line.starts_with('p') && !runs_paged_guests(&vm) {
        println!("skipped: KVM of this host runs no 32-bit guest with paging");
        return;
    }
    wait_for(&vm, "rounds and ticks", |now| now[0] > 20 && now[2] > 20);
    vm.serial_input(b"abc");
    wait_for(&vm, "echo", |now| now[3] == 3);
    assert_eq!(console("console0"), format!("{command_line}\nbcd"));

    for round in 1..4u32 {
        vm.pause().unwrap();
        // It arrives while the guest stands still, and is the other one's to answer.
        vm.serial_input(b"Z");
        let sections = vm.save_machine_state().unwrap();
        let before = counters(&vm);
        let name = format!("console{round}");
        let moved = Vm::new(config(&name)).unwrap();
        let (from, to) = (vm.memory(), moved.memory());
        let mut page = vec![0; PAGE_SIZE as usize];
        for gpa in (0..from.size_bytes()).step_by(page.len()) {
            from.read(gpa, &mut page).unwrap();
            to.write(gpa, &page).unwrap();
        }
        moved.load_machine_state(&sections).unwrap();
        vm.stop();
        moved.resume().unwrap();
        vm = moved;
        let now = wait_for(&vm, "goes on", |now| {
            now[0] > before[0] + 20 && now[2] > before[2] + 20 && now[3] == 3 + round
        });
        assert_eq!(now[1], 0, "errors after move {round}");
        assert_eq!(console(&name), "[");
    }
}

/// A software-only KVM may run guests in real and in flat protected mode alone: such a guest dies as it turns
/// paging on.
fn runs_paged_guests(vm: &Vm) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while counters(vm)[0] == 0 && vm.status().ended.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    vm.status().ended.is_none()
}

#[test]
fn a_kernel_of_its_own_boots_and_moves_with_all_it_uses() {
    boots_and_moves("console=test");
}

#[test]
fn a_kernel_with_paging_boots_and_moves() {
    boots_and_moves("paging");
}

#[test]
fn a_file_that_is_no_kernel_is_refused_by_name() {
    if let Err(why) = microvm::kvm::available() {
        println!("skipped: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    let config =
        VmConfig { memory_bytes: 16 << 20, kernel: Some(path.clone()), ..VmConfig::default() };
    let missing = Vm::new(config.clone()).unwrap().start().unwrap_err().to_string();
    assert!(missing.contains("notes.txt"), "{missing}");
    std::fs::write(&path, "not a kernel").unwrap();
    let refused = Vm::new(config).unwrap().start().unwrap_err().to_string();
    assert!(refused.contains("notes.txt") && refused.contains("ELF"), "{refused}");
}
