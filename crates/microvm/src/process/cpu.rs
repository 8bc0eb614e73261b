//! One vCPU of the process guest: the workload of docs/workload.md in steps.
//!
//! A step takes interrupts, ticks, does what the mailbox asks and writes pages. Between two steps
//! everything the guest knows is in guest memory, in the request bits, or in [`CpuState`].

use migration::{GuestMemory, PAGE_SIZE};

use crate::body::GuestBus;
use crate::layout::{FATAL_PORT, HEARTBEAT_PORT, POWER_OFF_PORT, RESET_PORT};
use crate::process::driver::{Driver, Source, VECTORS};
use crate::process::interrupts::ProcessInterrupts;
use crate::process::view::View;
use crate::workload::{
    MAILBOX, MAILBOX_MAGIC, STAMP_OFFSET, StartPage, WORKLOAD_DEVICES_MAX, WORKLOAD_VCPUS_MAX,
};

const MAGIC: u64 = MAILBOX;
const CMD_SEQ: u64 = MAILBOX + 0x04;
const CMD: u64 = MAILBOX + 0x08;
const ARGS: [u64; 3] = [MAILBOX + 0x0c, MAILBOX + 0x10, MAILBOX + 0x14];
const ACK_SEQ: u64 = MAILBOX + 0x20;
const RESULT: u64 = MAILBOX + 0x24;
const ERRORS: u64 = MAILBOX + 0x28;
const WRITES_LO: u64 = MAILBOX + 0x2c;
const WRITES_HI: u64 = MAILBOX + 0x30;
const BEATS: u64 = MAILBOX + 0x34;
const DEVICES: u64 = MAILBOX + 0x38;
const TICKS: u64 = MAILBOX + 0x3c;
const IRQS: u64 = MAILBOX + 0x40;
const VCPUS: u64 = MAILBOX + 0x200;

/// Where the guest keeps the page writes per second of all vCPUs.
const RATE: u64 = 0x3_2000;
const AS_FAST_AS_IT_CAN: u32 = u32::MAX;

const TICK_NS: u64 = 1_000_000;
/// Ticks that are made up for after a pause.
const TICKS_CREDITED_MAX: u64 = 100;
/// Page writes in one step.
const BATCH: u64 = 128;
/// How long a device may take to take a configuration over, in ticks.
pub const ACK_TICKS: u32 = 5_000;
/// How long a function-level reset may take, in ticks (PCI Express: 100 ms).
pub const RESET_TICKS: u32 = 110;

const RESULT_DONE: u32 = 0;
const RESULT_UNKNOWN: u32 = 1;
const RESULT_NO_SUCH: u32 = 2;
const RESULT_TIMEOUT: u32 = 3;
const RESULT_GONE: u32 = 4;

/// The start page makes no sense.
const FATAL_START_PAGE: u8 = 0xa2;

/// What the guest's code can reach.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Guest memory.
    pub view: &'a View,
    /// Ports and devices.
    pub bus: &'a dyn GuestBus,
    /// Interrupt requests.
    pub interrupts: &'a ProcessInterrupts,
    /// Guest memory, for reading the start page.
    pub memory: &'a GuestMemory,
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing yet.
    #[default]
    PowerOn,
    /// The workload.
    Running,
    /// Nothing any more.
    Halted,
}

/// A command that takes more than one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// None is under way.
    #[default]
    None,
    /// Waits until a configuration is in force.
    AwaitAck {
        /// Device index.
        device: u32,
        /// The generation.
        generation: u32,
        /// Ticks left.
        ticks: u32,
    },
    /// Waits until a reset is over.
    AwaitReset {
        /// Device index.
        device: u32,
        /// Ticks left.
        ticks: u32,
    },
}

/// The registers of a vCPU: what is neither in guest memory nor in the request bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// What it is doing.
    pub phase: Phase,
    /// The first vCPU's command under way.
    pub task: Task,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do now.
    Busy,
    /// Nothing to do before the next tick.
    Idle,
    /// The guest faults: it is dead.
    TripleFault,
}

/// One vCPU.
#[derive(Debug)]
pub struct Cpu {
    index: u32,
    /// Its registers.
    pub state: CpuState,
    start: Option<StartPage>,
    last_tick_ns: u64,
    /// Thousandths of page writes it may do now.
    credit: u64,
}

impl Cpu {
    /// vCPU `index`, as at power-on.
    pub fn new(index: u32) -> Self {
        Self { index, state: CpuState::default(), start: None, last_tick_ns: 0, credit: 0 }
    }

    /// Takes `state` over, from a reset or from another host.
    pub fn set_state(&mut self, state: CpuState) {
        *self = Self { state, ..Self::new(self.index) };
    }

    /// One step at `now_ns` of any steady clock.
    pub fn step(&mut self, around: Surroundings<'_>, now_ns: u64) -> Step {
        match self.state.phase {
            Phase::PowerOn => self.power_on(around),
            Phase::Halted => Step::Idle,
            Phase::Running => {
                let Some(start) = self.start.or_else(|| start_page(around)) else {
                    return self.fatal(around);
                };
                self.start = Some(start);
                self.run(around, &start, now_ns)
            }
        }
    }

    fn power_on(&mut self, around: Surroundings<'_>) -> Step {
        if self.index > 0 {
            // The first vCPU sets everything up.
            if around.view.load_u32(MAGIC) != MAILBOX_MAGIC {
                return Step::Idle;
            }
        } else {
            let Some(start) = start_page(around) else {
                return self.fatal(around);
            };
            around.view.store_u32(RATE, start.pages_per_s);
            around.view.store_u32(DEVICES, self.driver(around).find_devices(&start));
            around.view.store_u32(MAGIC, MAILBOX_MAGIC);
        }
        self.state.phase = Phase::Running;
        Step::Busy
    }

    fn fatal(&mut self, around: Surroundings<'_>) -> Step {
        self.state.phase = Phase::Halted;
        around.bus.port_write(FATAL_PORT, &[FATAL_START_PAGE]);
        Step::Idle
    }

    fn driver<'a>(&self, around: Surroundings<'a>) -> Driver<'a> {
        Driver { view: around.view, bus: around.bus }
    }

    fn run(&mut self, around: Surroundings<'_>, start: &StartPage, now_ns: u64) -> Step {
        self.take_interrupts(around);
        if self.index >= start.vcpus {
            return Step::Idle;
        }
        let ticked = self.tick(around, start, now_ns);
        if self.index == 0 {
            let fault = self.serve_mailbox(around, start, ticked);
            if fault || self.state.phase == Phase::Halted {
                return if fault { Step::TripleFault } else { Step::Idle };
            }
        }
        self.write_pages(around, start)
    }

    // ------------------------------------------------------------------------------- interrupts

    fn take_interrupts(&self, around: Surroundings<'_>) {
        for (word, bits) in (0..).zip(around.interrupts.take(self.index as usize)) {
            let mut bits = bits;
            while bits != 0 {
                let vector = 64 * word + bits.trailing_zeros();
                bits &= bits - 1;
                self.interrupt(around, vector);
            }
        }
    }

    fn interrupt(&self, around: Surroundings<'_>, vector: u32) {
        let view = around.view;
        match Source::of(vector) {
            Some(Source::Msix { device, vector }) => {
                let record = IRQS + 32 * u64::from(device);
                view.add_u32(record, 1);
                view.add_u32(record + 4 + 4 * u64::from(vector), 1);
            }
            Some(Source::Intx { slot }) => {
                let driver = self.driver(around);
                if let Some(found) = driver.in_slot(slot, self.devices(view)) {
                    let record = IRQS + 32 * u64::from(found.index());
                    view.add_u32(record, 1);
                    view.add_u32(record + 20, 1);
                    driver.lower_intx(&found);
                }
                around.interrupts.end_of_interrupt(crate::layout::intx_gsi(slot as u8));
            }
            None => tracing::debug!(vector, "an interrupt nobody was given"),
        }
    }

    fn devices(&self, view: &View) -> u32 {
        view.load_u32(DEVICES).min(WORKLOAD_DEVICES_MAX as u32)
    }

    // --------------------------------------------------------------------------- time and rate

    /// Ticks at most once; time that passed is credited to the rate. Answers whether it ticked.
    fn tick(&mut self, around: Surroundings<'_>, start: &StartPage, now_ns: u64) -> bool {
        let elapsed = now_ns.saturating_sub(self.last_tick_ns) / TICK_NS;
        if elapsed == 0 {
            return false;
        }
        let first = self.last_tick_ns == 0;
        self.last_tick_ns = if first { now_ns } else { self.last_tick_ns + elapsed * TICK_NS };
        let view = around.view;
        view.add_u32(VCPUS + 16 * u64::from(self.index) + 8, 1);
        view.add_u32(TICKS, 1);
        if self.index == 0 {
            view.add_u32(BEATS, 1);
            around.bus.port_write(HEARTBEAT_PORT, &[0]);
        }
        let elapsed = if first { 1 } else { elapsed.min(TICKS_CREDITED_MAX) };
        self.credit += share_of_rate(view.load_u32(RATE), start.vcpus, self.index) * elapsed;
        true
    }

    // -------------------------------------------------------------------------------- dirtying

    fn write_pages(&mut self, around: Surroundings<'_>, start: &StartPage) -> Step {
        let view = around.view;
        let rate = view.load_u32(RATE);
        let unlimited = rate == AS_FAST_AS_IT_CAN;
        // What it could not do within a second is forgotten, and a lower rate takes effect at once.
        let credit_max = share_of_rate(rate, start.vcpus, self.index) * 1000;
        self.credit = self.credit.min(credit_max);
        let batch = if unlimited { BATCH } else { BATCH.min(self.credit / 1000) };
        let record = VCPUS + 16 * u64::from(self.index);
        let part = pages_of(start, self.index);
        for _ in 0..batch {
            let done = view.load_u64(record);
            let page = u64::from(self.index) + u64::from(start.vcpus) * (done % part);
            let stamp_at = start.working_set_base + PAGE_SIZE * page + STAMP_OFFSET;
            let expected = done.checked_sub(part).map_or(0, |earlier| earlier + 1);
            if view.load_u64(stamp_at) != expected {
                view.add_u32(ERRORS, 1);
            }
            view.store_u64(stamp_at, done + 1);
            view.store_u64(record, done + 1);
            if view.add_u32(WRITES_LO, 1) == u32::MAX {
                view.add_u32(WRITES_HI, 1);
            }
        }
        if !unlimited {
            self.credit -= 1000 * batch;
        }
        if unlimited || self.credit >= 1000 { Step::Busy } else { Step::Idle }
    }

    // -------------------------------------------------------------------------------- commands

    /// Answers whether the guest faults.
    fn serve_mailbox(&mut self, around: Surroundings<'_>, start: &StartPage, ticked: bool) -> bool {
        let view = around.view;
        if view.load_u32(CMD_SEQ) == view.load_u32(ACK_SEQ) {
            return false;
        }
        if self.state.task != Task::None {
            if let Some(result) = self.go_on(around, start, ticked) {
                self.state.task = Task::None;
                answer(view, result);
            }
            return false;
        }
        match view.load_u32(CMD) {
            5 => self.leave(around, POWER_OFF_PORT, 0),
            8 => self.leave(around, RESET_PORT, 6),
            7 => {
                answer(view, RESULT_DONE);
                self.state.phase = Phase::Halted;
                return true;
            }
            command => {
                if let Some(result) = self.command(around, start, command) {
                    answer(view, result);
                }
            }
        }
        false
    }

    fn leave(&mut self, around: Surroundings<'_>, port: u16, value: u8) {
        answer(around.view, RESULT_DONE);
        self.state.phase = Phase::Halted;
        around.bus.port_write(port, &[value]);
    }

    /// Does a command; `None`: it goes on as a task.
    fn command(
        &mut self,
        around: Surroundings<'_>,
        start: &StartPage,
        command: u32,
    ) -> Option<u32> {
        let view = around.view;
        let [arg0, arg1, arg2] = ARGS.map(|at| view.load_u32(at));
        if command == 2 {
            view.store_u32(RATE, arg0);
            return Some(RESULT_DONE);
        }
        if !(1..=11).contains(&command) {
            return Some(RESULT_UNKNOWN);
        }
        if arg0 >= self.devices(view) {
            return Some(RESULT_NO_SUCH);
        }
        let driver = self.driver(around);
        let found = driver.device(arg0);
        if command == 4 {
            driver.reset(&found);
            self.state.task = Task::AwaitReset { device: arg0, ticks: RESET_TICKS };
            return None;
        }
        if driver.is_gone(&found) {
            return Some(RESULT_GONE);
        }
        match command {
            1 => {
                driver.reconfigure(&found, arg1, arg2);
                let ticks = ACK_TICKS;
                self.state.task = Task::AwaitAck { device: arg0, generation: arg1, ticks };
                let at_once = self.go_on(around, start, false);
                if at_once.is_some() {
                    self.state.task = Task::None;
                }
                return at_once;
            }
            3 if arg2 >= VECTORS => return Some(RESULT_NO_SUCH),
            3 => driver.ring(&found, arg1, arg2),
            6 => driver.fill(&found, arg1),
            9 if arg1 >= VECTORS => return Some(RESULT_NO_SUCH),
            9 => driver.mask(&found, arg1, arg2 & 1 != 0),
            10 => driver.set_rate(&found, arg1),
            _ => driver.set_mode(&found, arg1 != 0),
        }
        Some(RESULT_DONE)
    }

    /// Looks after the task; answers its result when it is done.
    fn go_on(&mut self, around: Surroundings<'_>, start: &StartPage, ticked: bool) -> Option<u32> {
        let driver = self.driver(around);
        let passed = u32::from(ticked);
        match &mut self.state.task {
            Task::None => Some(RESULT_DONE),
            Task::AwaitAck { device, generation, ticks } => {
                if driver.generation(&driver.device(*device)) == *generation {
                    return Some(RESULT_DONE);
                }
                *ticks = ticks.saturating_sub(passed);
                (*ticks == 0).then_some(RESULT_TIMEOUT)
            }
            Task::AwaitReset { device, ticks } => {
                *ticks = ticks.saturating_sub(passed);
                if *ticks > 0 {
                    return None;
                }
                let is_up = driver.set_up(&driver.device(*device), start);
                Some(if is_up { RESULT_DONE } else { RESULT_TIMEOUT })
            }
        }
    }
}

fn answer(view: &View, result: u32) {
    view.store_u32(RESULT, result);
    view.store_u32(ACK_SEQ, view.load_u32(CMD_SEQ));
}

/// The start page, if it fits this machine.
fn start_page(around: Surroundings<'_>) -> Option<StartPage> {
    StartPage::read(around.memory).ok().filter(|start| fits(start, around))
}

fn fits(start: &StartPage, around: Surroundings<'_>) -> bool {
    let bytes = PAGE_SIZE * u64::from(start.working_set_pages);
    (1..=WORKLOAD_VCPUS_MAX).contains(&start.vcpus)
        && start.working_set_pages >= start.vcpus
        && start.working_set_base.is_multiple_of(PAGE_SIZE)
        && around.view.contains(start.working_set_base, bytes)
}

/// Pages of the working set that belong to vCPU `index`: at least one, since there are enough.
fn pages_of(start: &StartPage, index: u32) -> u64 {
    let vcpus = start.vcpus.max(1);
    u64::from((start.working_set_pages.saturating_sub(index)).div_ceil(vcpus)).max(1)
}

/// Page writes per second of vCPU `index`.
fn share_of_rate(rate: u32, vcpus: u32, index: u32) -> u64 {
    const RATE_MAX: u64 = 2_000_000;
    let vcpus = u64::from(vcpus.max(1));
    ((u64::from(rate) + vcpus - 1).saturating_sub(u64::from(index)) / vcpus).min(RATE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(pages: u32, vcpus: u32) -> StartPage {
        StartPage {
            working_set_base: 0x80_0000,
            working_set_pages: pages,
            pages_per_s: 0,
            devices: 0,
            ring_pages: 1,
            ring_base: 0x40_0000,
            vcpus,
            dma_rate: 0,
        }
    }

    #[test]
    fn vcpus_share_the_working_set_and_the_rate() {
        for (pages, vcpus) in [(7, 1), (7, 2), (8, 3), (16, 16)] {
            let start = start(pages, vcpus);
            let parts: u64 = (0..vcpus).map(|index| pages_of(&start, index)).sum();
            assert_eq!(parts, u64::from(pages), "{pages} pages, {vcpus} vCPUs");
            for index in 0..vcpus {
                let last = u64::from(index) + u64::from(vcpus) * (pages_of(&start, index) - 1);
                assert!(last < u64::from(pages));
            }
            let rates: u64 = (0..vcpus).map(|index| share_of_rate(1000, vcpus, index)).sum();
            assert_eq!(rates, 1000, "{vcpus} vCPUs");
        }
    }
}
