//! Any history of guest and migration saves and loads to an equal digest.

mod common;

use common::*;
use device_model::{DeviceCore, RawRead, Session, regs};
use device_profile::{DirtyModel, ReinitPolicy};
use proptest::prelude::*;
use vfio_migration::DeviceState::*;
use vfio_migration::IrqIndex;

#[derive(Clone, Debug)]
enum Op {
    Poke(u64, u32),
    Flr,
    Mask(u32, bool),
    Wire(u32, bool),
    Time(u64),
    Info,
    OptIn,
    Read(usize),
    Enter,
    Leave,
    P2p,
    Back,
    Log,
}

fn guest_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (0u32..4).prop_map(|bits| Op::Poke(regs::CONTROL, bits & 2)),
        3 => (0u32..4).prop_map(|vector| Op::Poke(regs::VECTOR, vector)),
        4 => (0u32..2000).prop_map(|n| Op::Poke(regs::DOORBELL, n)),
        2 => (0u32..20).prop_map(|n| Op::Poke(regs::DMA_PAGES, n)),
        4 => (0u32..300).prop_map(|kib| Op::Poke(regs::FILL_KIB, kib)),
        4 => (0u32..150).prop_map(|kib| Op::Poke(regs::CONFIG_KIB, kib)),
        4 => any::<u32>().prop_map(|generation| Op::Poke(regs::CONFIG_GEN, generation)),
        2 => any::<u32>().prop_map(|value| Op::Poke(regs::SCRATCH, value)),
        1 => Just(Op::Poke(regs::STATUS, 6)),
        1 => Just(Op::Flr),
    ]
}

fn host_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0u32..4, any::<bool>()).prop_map(|(vector, on)| Op::Mask(vector, on)),
        (0u32..4, any::<bool>()).prop_map(|(vector, on)| Op::Wire(vector, on)),
        (0u64..2000).prop_map(Op::Time),
        Just(Op::Info),
        Just(Op::OptIn),
        (1usize..200_000).prop_map(Op::Read),
        (1usize..200).prop_map(Op::Read),
        Just(Op::Enter),
        Just(Op::Leave),
        Just(Op::P2p),
        Just(Op::Back),
        Just(Op::Log),
    ]
}

/// Small devices of every habit.
fn device(kind: usize) -> DeviceCore {
    match kind {
        0 => core_with_reinit(ReinitPolicy::Flush),
        1 => core_with_reinit(ReinitPolicy::Recount),
        2 => core_with_reinit(ReinitPolicy::Never),
        3 => core_with_dirty(DirtyModel::Reread),
        4 => core_with_dirty(DirtyModel::Never),
        5 => core_with(&["info-drives-device", "one-size-field"]),
        6 => core_with(&["hidden-save-failure"]),
        7 => core_with(&["reinit-storm=3", "short-reads=999"]),
        8 => core_with(&["grow-after-stop=100", "enomsg-forever"]),
        _ => core_with(&["zero-at-temporary-end", "caller-flags-back"]),
    }
}

/// A device with what its session has carried so far.
struct Run {
    core: DeviceCore,
    ram: Ram,
    now_ns: u64,
    session: Option<Session>,
    carried: Vec<u8>,
    /// Initial bytes as they were last told, without the opt-in.
    initial: Option<u64>,
}

impl Run {
    fn new(kind: usize) -> Self {
        let mut core = device(kind);
        bus_master(&mut core);
        poke(&mut core, regs::CONTROL, regs::CONTROL_IRQ);
        poke(&mut core, regs::DMA_PAGES, 8);
        let (session, carried) = (None, Vec::new());
        Self { core, ram: Ram::new(16), now_ns: 0, session, carried, initial: None }
    }

    fn set(&mut self, target: vfio_migration::DeviceState) {
        // Not every device has every state.
        if let Ok(outcome) = self.core.set_state(target, self.now_ns) {
            if outcome.session.is_some() {
                self.carried.clear();
                self.initial = None;
                self.session = outcome.session;
            }
            if !self.core.state().is_saving() {
                self.session = None;
            }
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Poke(register, value) => poke_ram(&mut self.core, register, value, &mut self.ram),
            Op::Flr => {
                write_config(&mut self.core, 0x58, &0x8000u16.to_le_bytes());
                bus_master(&mut self.core);
                self.session = None;
            }
            Op::Mask(vector, on) => self.core.set_masked(IrqIndex::Msix, vector, on).unwrap(),
            Op::Wire(vector, on) => self.core.set_wired(IrqIndex::Msix, vector, on).unwrap(),
            Op::Time(ms) => {
                self.now_ns += ms * 1_000_000;
                self.core.advance(self.now_ns, u64::MAX, &mut self.ram);
            }
            Op::Info if self.core.state().is_precopy() => {
                let info = self.core.precopy_info(self.now_ns).unwrap();
                if !self.core.capabilities().precopy_info_v2 {
                    let grown = self.initial.is_some_and(|before| info.initial_bytes() > before);
                    assert!(!grown, "P4: initial bytes grew");
                    self.initial = Some(info.initial_bytes());
                }
            }
            Op::Info | Op::Back => self.set(PreCopy),
            Op::OptIn => self.core.opt_in_precopy_info_v2().unwrap(),
            Op::Read(len) => self.read(len),
            Op::Enter => self.set(PreCopy),
            Op::Leave => self.set(Running),
            Op::P2p => self.set(PreCopyP2p),
            Op::Log => {
                let range = vfio_migration::DmaRange { iova: 0, length: 1 << 16 };
                // Refused the second time.
                let _ = self.core.start_dma_logging(&[range], 4096);
                self.core.report_dma_log(range, 4096, &mut [0]).unwrap();
            }
        }
    }

    fn read(&mut self, len: usize) {
        let Some(session) = self.session else { return };
        let mut buf = vec![0; len];
        let mut got = 0;
        while got < len {
            match self.core.read(session, &mut buf[got..], self.now_ns).unwrap() {
                RawRead::Data(len) => got += len,
                _ => break,
            }
        }
        self.carried.extend_from_slice(&buf[..got]);
    }

    /// STOP_COPY to the end, and into another device.
    fn migrate(&mut self, kind: usize) -> DeviceCore {
        let expected = self.core.stop_copy_length().unwrap();
        self.set(StopCopy);
        let session = self.session.unwrap();
        let grown = self.core.stop_copy_length().unwrap();
        let rest = drain(&mut self.core, session);
        assert_eq!(rest.len() as u64, grown, "once stopped, the length is exact");
        // A doorbell's work before the stop is the only thing between the two questions.
        assert!(expected > 0);
        self.carried.extend(rest);
        let mut destination = device(kind);
        load(&mut destination, &self.carried).unwrap();
        destination
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn any_history_saves_and_loads_to_an_equal_digest(
        kind in 0usize..10,
        ops in prop::collection::vec(prop_oneof![guest_op(), host_op()], 0..60),
    ) {
        let mut run = Run::new(kind);
        for op in &ops {
            run.step(op);
        }
        let destination = run.migrate(kind);
        prop_assert_eq!(destination.digest(), run.core.digest());
        prop_assert_eq!(destination.pending(), run.core.pending());
    }

    /// The guest's history alone decides, however often the device was migrated in the middle of it.
    #[test]
    fn migrations_leave_no_trace_in_the_digest(
        kind in 0usize..8,
        parts in prop::collection::vec(prop::collection::vec(guest_op(), 0..15), 1..5),
        noise in prop::collection::vec(host_op(), 0..20),
    ) {
        let mut still = Run::new(kind);
        let mut moved = Run::new(kind);
        for part in &parts {
            for op in part {
                still.step(op);
                still.step(&Op::Time(0));
                moved.step(op);
                moved.step(&Op::Time(0));
            }
            // What wires or masks decides which interrupts are pending, and time brings no stamps here.
            let harmless = |op: &&Op| !matches!(op, Op::Mask(..) | Op::Wire(..));
            for op in noise.iter().filter(harmless) {
                moved.step(op);
            }
            moved.core = moved.migrate(kind);
            bus_master(&mut moved.core);
            moved.session = None;
            moved.set(Running);
        }
        prop_assert_eq!(still.core.digest(), moved.core.digest());
    }

    /// Whatever is written to a resuming session: no panic, and no state but a whole one is taken.
    #[test]
    fn garbage_is_never_loaded(
        prefix in 0usize..40_000,
        garbage in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut source = core_of(profile().scaled_to(24 << 10));
        let stream = whole_stream(&mut source);
        let mut bytes = stream[..prefix.min(stream.len())].to_vec();
        bytes.extend_from_slice(&garbage);
        let mut destination = core_of(profile().scaled_to(24 << 10));
        let loaded = load(&mut destination, &bytes);
        prop_assert_eq!(loaded.is_ok(), bytes == stream);
    }
}
