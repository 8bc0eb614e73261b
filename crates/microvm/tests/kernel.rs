//! A PVH kernel that is not the built-in one boots under `kernel`, and moves: segments, paging, SSE and debug
//! registers, PICs, PIT and the serial port come along.

use std::path::Path;
use std::time::{Duration, Instant};

use microvm::workload::pvh_elf;
use microvm::{SerialConfig, Vm, VmConfig};
use migration::{GuestEvent, PAGE_SIZE, Vmm};

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

/// A new VM with memory and machine state of `vm`, which is paused.
fn move_to(vm: &Vm, config: VmConfig) -> Vm {
    let sections = vm.save_machine_state().unwrap();
    let moved = Vm::new(config).unwrap();
    let (from, to) = (vm.memory(), moved.memory());
    let mut page = vec![0; PAGE_SIZE as usize];
    for gpa in (0..from.size_bytes()).step_by(page.len()) {
        from.read(gpa, &mut page).unwrap();
        to.write(gpa, &page).unwrap();
    }
    moved.load_machine_state(&sections).unwrap();
    moved
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
    let said = format!("{command_line}\nbcd");
    wait_for(&vm, "the console", |_| console("console0") == said);

    for round in 1..4u32 {
        vm.pause().unwrap();
        // It arrives while the guest stands still, and is the other one's to answer.
        vm.serial_input(b"Z");
        let before = counters(&vm);
        let name = format!("console{round}");
        let moved = move_to(&vm, config(&name));
        vm.stop();
        moved.resume().unwrap();
        vm = moved;
        let now = wait_for(&vm, "goes on", |now| {
            now[0] > before[0] + 20 && now[2] > before[2] + 20 && now[3] == 3 + round
        });
        assert_eq!(now[1], 0, "errors after move {round}");
        wait_for(&vm, "the console", |_| console(&name) == "[");
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
fn the_guests_clock_includes_the_blackout() {
    if let Err(why) = microvm::kvm::available() {
        println!("skipped: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    kernel_file(&kernel);
    let config = VmConfig { memory_bytes: 16 << 20, kernel: Some(kernel), ..VmConfig::default() };
    let vm = Vm::new(config.clone()).unwrap();
    let Some(tsc_khz) = vm.description().tsc_khz else {
        println!("skipped: KVM of this host does not tell the frequency of the TSC");
        return;
    };
    let clock = |vm: &Vm| {
        let mut bytes = [0; 8];
        vm.memory().read(0x30_0018, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    vm.start().unwrap();
    wait_for(&vm, "rounds", |now| now[0] > 20);
    vm.pause().unwrap();
    let (before, paused) = (clock(&vm), counters(&vm)[0]);
    let sections = vm.save_machine_state().unwrap();
    let saved = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    let moved = Vm::new(config).unwrap();
    let mut memory = vec![0; vm.memory().size_bytes() as usize];
    vm.memory().read(0, &mut memory).unwrap();
    moved.memory().write(0, &memory).unwrap();
    let stood_still = saved.elapsed();
    moved.load_machine_state(&sections).unwrap();
    moved.resume().unwrap();
    wait_for(&moved, "a round", |now| now[0] > paused);
    let passed = clock(&moved).checked_sub(before).expect("the clock never goes back");
    // The blackout is measured on another clock: one part in a hundred for the difference.
    let least = stood_still.as_millis() as u64 * u64::from(tsc_khz) / 100 * 99;
    assert!(passed >= least, "{passed} ticks in {stood_still:?} at {tsc_khz} kHz");
}

#[test]
fn a_kernel_that_resets_is_booted_again_where_it_runs() {
    if let Err(why) = microvm::kvm::available() {
        println!("skipped: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    kernel_file(&kernel);
    let with = |kernel: Option<&Path>, command_line: &str, console: &str| VmConfig {
        memory_bytes: 16 << 20,
        kernel: kernel.map(Path::to_path_buf),
        command_line: command_line.into(),
        serial: SerialConfig::File(dir.path().join(console)),
        ..VmConfig::default()
    };
    let vm = Vm::new(with(Some(&kernel), "first", "console0")).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "rounds", |now| now[0] > 20);
    vm.pause().unwrap();

    // With the kernel: its own command line again, whatever this host was given.
    let moved = move_to(&vm, with(Some(&kernel), "other", "console1"));
    moved.resume().unwrap();
    let before = wait_for(&moved, "rounds", |now| now[0] > 50);
    moved.serial_input(b"R");
    wait_for(&moved, "anew", |now| now[0] > 0 && now[0] < before[0]);
    let again = wait_for(&moved, "rounds", |now| now[0] > 20);
    assert_eq!(again[1], 0);
    let said = || std::fs::read_to_string(dir.path().join("console1")).unwrap();
    wait_for(&moved, "the console", |_| said() == "first\n");

    // Without it, or with another one: the guest moves and runs, and its reset is its end, with the reason.
    let other = dir.path().join("other");
    std::fs::write(&other, pvh_elf(b"\xf4", BASE)).unwrap();
    let cases =
        [(None, "not given the guest's kernel"), (Some(&*other), "not the kernel the guest was")];
    for (kernel, reason) in cases {
        let moved = move_to(&vm, with(kernel, "", "console2"));
        moved.resume().unwrap();
        let before = counters(&moved);
        wait_for(&moved, "rounds", |now| now[0] > before[0] + 20);
        moved.serial_input(b"R");
        let deadline = Instant::now() + PATIENCE;
        while moved.status().ended.is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        match moved.status().ended {
            Some(GuestEvent::Crashed { reason: told }) => assert!(told.contains(reason), "{told}"),
            other => panic!("{other:?}"),
        }
    }
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
