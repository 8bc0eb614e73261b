//! A device, a little guest memory, and the steps of a migration.
#![allow(dead_code)]

use std::collections::BTreeMap;

use device_model::core::{CoreOptions, Direction};
use device_model::regs;
use device_model::{DeviceCore, DmaFault, GuestDma, Profile, Quirks, RawRead, Session};
use device_profile::{DirtyModel, ReinitPolicy};
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{DeviceError, DeviceResult, DeviceState, MigrationFlags};

/// Guest memory of `pages` pages from 0 on, written stamps by address.
#[derive(Debug, Default)]
pub struct Ram {
    pub len: u64,
    pub written: BTreeMap<u64, Vec<u8>>,
    pub writes: u64,
}

impl Ram {
    pub fn new(pages: u64) -> Self {
        Self { len: pages * 4096, ..Self::default() }
    }
}

impl GuestDma for Ram {
    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), DmaFault> {
        if iova + data.len() as u64 > self.len {
            return Err(DmaFault::Failed);
        }
        self.writes += 1;
        self.written.insert(iova, data.to_vec());
        Ok(())
    }
}

/// A small mlx5-like device: 1 MiB of state, stop-only part, REINIT by flushing.
pub fn profile() -> Profile {
    Profile::builtin("mlx5-vf").unwrap().scaled_to(1 << 20)
}

pub fn core_of(profile: Profile) -> DeviceCore {
    DeviceCore::new(CoreOptions::new(profile)).unwrap()
}

pub fn core() -> DeviceCore {
    core_of(profile())
}

pub fn core_with(quirks: &[&str]) -> DeviceCore {
    let quirks = Quirks::from_names(quirks).unwrap();
    DeviceCore::new(CoreOptions { quirks, ..CoreOptions::new(profile()) }).unwrap()
}

pub fn core_with_reinit(policy: ReinitPolicy) -> DeviceCore {
    let mut profile = profile();
    profile.precopy.reinit.value = policy;
    profile.precopy.reinit_in_p2p.value = true;
    core_of(profile)
}

pub fn core_with_flags(p2p: bool, pre_copy: bool) -> DeviceCore {
    let mut profile = profile();
    profile.features.p2p.value = p2p;
    profile.features.pre_copy.value = pre_copy;
    profile.features.precopy_info_v2.value = pre_copy;
    core_of(profile)
}

pub fn core_with_dirty(dirty: DirtyModel) -> DeviceCore {
    let name = match dirty {
        DirtyModel::Tracked => "mlx5-vf",
        DirtyModel::Reread => "virtio-vf",
        DirtyModel::Never => "qat",
    };
    core_of(Profile::builtin(name).unwrap().scaled_to(256 << 10))
}

pub const ALL_FLAGS: [MigrationFlags; 4] = [
    MigrationFlags::new(false, false),
    MigrationFlags::new(true, false),
    MigrationFlags::new(false, true),
    MigrationFlags::new(true, true),
];

/// Writes a register without guest memory.
pub fn poke(core: &mut DeviceCore, register: u64, value: u32) {
    poke_ram(core, register, value, &mut Ram::default());
}

pub fn poke_ram(core: &mut DeviceCore, register: u64, value: u32, ram: &mut Ram) {
    core.region_write(REGION_BAR0, register, &value.to_le_bytes(), 0, ram).unwrap();
}

pub fn peek(core: &DeviceCore, register: u64) -> u32 {
    let mut word = [0; 4];
    core.region_read(REGION_BAR0, register, &mut word).unwrap();
    u32::from_le_bytes(word)
}

pub fn write_config(core: &mut DeviceCore, offset: u64, data: &[u8]) {
    core.region_write(REGION_CONFIG, offset, data, 0, &mut Ram::default()).unwrap();
}

/// Memory space and bus mastering on.
pub fn bus_master(core: &mut DeviceCore) {
    write_config(core, 4, &[6, 0]);
}

pub fn reconfigure(core: &mut DeviceCore, generation: u32, kib: u32) {
    poke(core, regs::CONFIG_KIB, kib);
    poke(core, regs::CONFIG_GEN, generation);
}

/// Sets `target` and answers the session of it.
pub fn set(core: &mut DeviceCore, target: DeviceState) -> Option<Session> {
    core.set_state(target, 0).unwrap().session
}

/// Reads what there is now.
pub fn drain(core: &mut DeviceCore, session: Session) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buf = vec![0; 10_000];
    while let RawRead::Data(len) = core.read(session, &mut buf, 0).unwrap() {
        all.extend_from_slice(&buf[..len]);
    }
    all
}

/// The rest of a migration of `source` whose stream began with `carried`: loads it all into `destination`.
pub fn finish_into(
    source: &mut DeviceCore,
    session: Session,
    mut carried: Vec<u8>,
    destination: &mut DeviceCore,
) -> DeviceResult<()> {
    if source.state() != DeviceState::StopCopy {
        source.set_state(DeviceState::StopCopy, 0)?;
    }
    carried.extend(drain(source, session));
    load(destination, &carried)
}

/// Loads a whole stream; the destination ends in STOP.
pub fn load(destination: &mut DeviceCore, stream: &[u8]) -> DeviceResult<()> {
    let session = destination.set_state(DeviceState::Resuming, 0)?.session.unwrap();
    assert_eq!(session.direction, Direction::Resuming);
    for part in stream.chunks(7_777) {
        destination.write(session, part)?;
    }
    destination.set_state(DeviceState::Stop, 0).map(|_| ())
}

/// A whole stream without precopy.
pub fn whole_stream(core: &mut DeviceCore) -> Vec<u8> {
    let session = set(core, DeviceState::StopCopy).unwrap();
    drain(core, session)
}

pub fn errno<T: std::fmt::Debug>(result: DeviceResult<T>) -> i32 {
    result.unwrap_err().errno().unwrap()
}

/// The state that a failed SET names.
pub fn state_of(error: &DeviceError) -> Option<DeviceState> {
    match error {
        DeviceError::Transition { state, .. } => *state,
        _ => None,
    }
}

/// A device that did a little of everything.
pub fn worked(mut core: DeviceCore, ram: &mut Ram) -> DeviceCore {
    bus_master(&mut core);
    for (register, value) in [
        (regs::CONTROL, regs::CONTROL_IRQ),
        (regs::SCRATCH, 0xdead_beef),
        (regs::DMA_LO, 0x2000),
        (regs::DMA_PAGES, 3),
        (regs::DMA_RATE, 1000),
        (regs::VECTOR, 2),
        (regs::FILL_KIB, 40),
        (regs::CONFIG_KIB, 96),
        (regs::CONFIG_GEN, 7),
        (regs::DOORBELL, 5),
    ] {
        poke_ram(&mut core, register, value, ram);
    }
    core
}
