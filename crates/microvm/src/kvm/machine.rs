//! The VM of KVM: memory slots, in-kernel interrupt controllers and timer, vCPUs before they run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2, KVM_CAP_XSAVE2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use migration::{DirtyTracker, GuestMemory, RegionLayout};

use super::interrupts::{KvmInterrupts, os};
use super::state::{self, Abilities};
use super::{
    cpuid,
    dirty::KvmDirtyLog,
    ring::{DirtyRings, KvmDirtyRing},
};
use crate::config::DirtyTracking;
use crate::error::{Error, Result};

/// Where KVM keeps the pages it needs for itself on Intel, right below 4 GiB and never RAM.
const IDENTITY_MAP_ADDR: u64 = 0xfeff_c000;
const TSS_ADDR: usize = 0xfeff_d000;

/// Capabilities without which no guest runs.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqfdResample, "KVM_CAP_IRQFD_RESAMPLE"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
];

/// Memory slots: slot n is region n of guest memory.
pub(super) struct Slots {
    memory: Arc<GuestMemory>,
    layout: Vec<RegionLayout>,
    logging: Mutex<Logging>,
}

/// Who logs.
#[derive(Default)]
struct Logging {
    /// Number of the last tracker started.
    turn: u64,
    on: bool,
}

/// A VM whose vCPUs do not run yet.
pub(super) struct Machine {
    pub vm: Arc<VmFd>,
    pub slots: Arc<Slots>,
    pub interrupts: Arc<KvmInterrupts>,
    pub abilities: Abilities,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub tsc_khz: Option<u32>,
    pub tsc_scaling: bool,
    log: Log,
}

/// How the vCPUs' writes are logged.
enum Log {
    Bitmap { manual_protect: bool },
    Rings(Arc<DirtyRings>),
}

impl Machine {
    /// A VM over `memory`, with `vcpus` vCPUs at power-on, whose writes can be tracked by `tracking`.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        vcpus: u32,
        tracking: DirtyTracking,
    ) -> Result<(Self, Vec<VcpuFd>)> {
        let kvm = open()?;
        let vcpus_max = kvm.get_max_vcpus().min(kvm.get_max_vcpu_id());
        if vcpus == 0 || vcpus as usize > vcpus_max {
            return Err(Error::Config(format!("{vcpus} vCPUs; KVM takes 1 to {vcpus_max}")));
        }
        let vm = Arc::new(kvm.create_vm().map_err(os("KVM_CREATE_VM"))?);
        vm.set_identity_map_address(IDENTITY_MAP_ADDR).map_err(os("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(TSS_ADDR).map_err(os("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(os("KVM_CREATE_IRQCHIP"))?;
        let pit =
            kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(os("KVM_CREATE_PIT2"))?;
        let interrupts = Arc::new(KvmInterrupts::new(Arc::clone(&vm))?);

        // Before the first vCPU. Rings do without manual protection: a slot whose bits begin set protects nothing
        // when the log is switched on.
        let log = match tracking {
            DirtyTracking::Log => Log::Bitmap { manual_protect: enable_manual_protect(&vm) },
            DirtyTracking::Ring(ring) => {
                Log::Rings(Arc::new(DirtyRings::enable(&kvm, &vm, &memory.layout(), ring)?))
            }
        };
        let slots = Arc::new(Slots { layout: memory.layout(), memory, logging: Mutex::default() });
        slots.install(&vm)?;

        let supported = cpuid::supported(&kvm)?;
        let mut fds = Vec::with_capacity(vcpus as usize);
        for index in 0..vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(os("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::of_vcpu(&supported, index, vcpus)?;
            vcpu.set_cpuid2(&cpuid).map_err(os("KVM_SET_CPUID2"))?;
            if let Log::Rings(rings) = &log {
                rings.add(&vcpu)?;
            }
            fds.push(vcpu);
        }
        let first = &fds[0];
        let xsave2 = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
        let listed = kvm.get_msr_index_list().map_err(os("KVM_GET_MSR_INDEX_LIST"))?;
        let abilities = Abilities {
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            xsave_bytes: xsave2.max(4096) as usize,
            xsave2: xsave2 > 0,
            xcrs: vm.check_extension(Cap::Xcrs),
            msrs: state::usable_msrs(first, listed.as_slice()),
        };
        let cpuid = cpuid::of_vcpu(&supported, 0, vcpus)?.as_slice().to_vec();
        let machine = Self {
            tsc_khz: first.get_tsc_khz().ok(),
            tsc_scaling: vm.check_extension(Cap::TscControl),
            vm,
            slots,
            interrupts,
            abilities,
            cpuid,
            log,
        };
        Ok((machine, fds))
    }

    /// A new tracker of what the vCPUs write.
    pub(super) fn dirty_tracker(&self) -> Box<dyn DirtyTracker> {
        let (vm, slots) = (Arc::clone(&self.vm), Arc::clone(&self.slots));
        match &self.log {
            Log::Bitmap { manual_protect } => {
                Box::new(KvmDirtyLog::new(vm, slots, *manual_protect))
            }
            Log::Rings(rings) => Box::new(KvmDirtyRing::new(slots, Arc::clone(rings))),
        }
    }

    /// The dirty rings, where vCPUs have them.
    pub(super) fn rings(&self) -> Option<&Arc<DirtyRings>> {
        match &self.log {
            Log::Bitmap { .. } => None,
            Log::Rings(rings) => Some(rings),
        }
    }
}

impl Slots {
    pub(super) fn layout(&self) -> &[RegionLayout] {
        &self.layout
    }

    /// Puts the slots in place.
    pub(super) fn install(&self, vm: &VmFd) -> Result<()> {
        self.set(vm, false)
    }

    /// Switches the dirty log on and gives the caller the turn.
    pub(super) fn start_logging(&self, vm: &VmFd) -> Result<u64> {
        let mut logging = self.logging();
        if !logging.on {
            self.set(vm, true)?;
            logging.on = true;
        }
        logging.turn += 1;
        Ok(logging.turn)
    }

    /// Switches the dirty log off, if it is still the turn of who asks, and says whether it was.
    pub(super) fn stop_logging(&self, vm: &VmFd, turn: u64) -> Result<bool> {
        let mut logging = self.logging();
        let is_turn = logging.on && logging.turn == turn;
        if is_turn {
            // First: where it fails halfway, nobody takes the log for one that is on in all slots.
            logging.on = false;
            self.set(vm, false)?;
        }
        Ok(is_turn)
    }

    /// Has a log that is on begin anew, with all of memory protected.
    pub(super) fn restart_logging(&self, vm: &VmFd) -> Result<()> {
        let mut logging = self.logging();
        if std::mem::take(&mut logging.on) {
            self.set(vm, false)?;
            self.set(vm, true)?;
            logging.on = true;
        }
        Ok(())
    }

    /// Refuses any tracker but the one with the turn: a stopped log must not pass for a quiet guest.
    pub(super) fn check_turn(&self, turn: Option<u64>) -> Result<()> {
        let logging = self.logging();
        if logging.on && turn == Some(logging.turn) {
            return Ok(());
        }
        Err(Error::State("this dirty log was stopped, or another one started".into()))
    }

    fn logging(&self) -> MutexGuard<'_, Logging> {
        self.logging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, vm: &VmFd, on: bool) -> Result<()> {
        for (slot, region) in self.layout.iter().enumerate() {
            let addr = self.memory.untracked_addr(region.gpa, region.len)?;
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: addr.as_ptr() as u64,
            };
            // SAFETY: the mapping belongs to `self.memory`, which lives as long as the slots, and the VM is
            // closed no later than they are dropped; guest memory is only reached by raw copies.
            unsafe { vm.set_user_memory_region(slot) }.map_err(os("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}

/// /dev/kvm, with everything a guest needs.
pub(super) fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(os("open of /dev/kvm"))?;
    let version = kvm.get_api_version();
    if version != kvm_bindings::KVM_API_VERSION as i32 {
        return Err(Error::Config(format!("/dev/kvm has API version {version}")));
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(Error::Config(format!("/dev/kvm lacks {name}")));
        }
    }
    Ok(kvm)
}

/// Switches manual protection on, if the host has it.
fn enable_manual_protect(vm: &VmFd) -> bool {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let flags = wanted & offered.max(0) as u32;
    if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return false;
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = flags.into();
    vm.enable_cap(&cap).is_ok()
}
