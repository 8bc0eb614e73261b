//! The state of one vCPU, saved and loaded.
//!
//! The orders matter (Linux `arch/x86/kvm`):
//!
//! - Saving begins with MP_STATE, because asking for it makes KVM accept pending INIT and SIPI, which
//!   changes registers.
//! - Loading sets SREGS first (they carry the APIC base, and a reset-like SREGS would make the vCPU
//!   runnable), then MP_STATE; the LAPIC before MSRs, because TSC_DEADLINE is only taken while
//!   the timer is in deadline mode; TSC before TSC_DEADLINE; events last, because registers clear them.

use std::ops::RangeInclusive;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::interrupts::os;
use super::ioctls::{self, Sregs2};
use super::lapic_timer;
use crate::error::{Error, Result};
use crate::pvh::Boot;
use crate::section::{Reader, Writer};
use crate::time::realtime_ns;

/// Kind of a vCPU's section.
pub(super) const KIND: &str = "kvm-vcpu";
/// Version of [`KIND`].
pub(super) const VERSION: u32 = 1;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Setting these makes KVM write the wall clock into guest memory: the guest asked for it once, and
/// asks again when it wants it again.
const MSR_KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// MSRs that KVM keeps and older kernels do not list: variable and fixed MTRRs with their default type, and
/// the banks of machine checks.
const UNLISTED_MSRS: [RangeInclusive<u32>; 6] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff, 0x400..=0x47f];
/// Most MSRs in a section.
const MSRS_MAX: usize = 1024;
/// Largest XSAVE area in a section, in bytes.
const XSAVE_MAX_BYTES: usize = 64 << 10;

/// What of a vCPU's state this host can give.
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    /// KVM_CAP_SREGS2.
    pub sregs2: bool,
    /// Size of the XSAVE area in bytes (KVM_CAP_XSAVE2, else 4096).
    pub xsave_bytes: usize,
    /// KVM_CAP_XSAVE2.
    pub xsave2: bool,
    /// KVM_CAP_XCRS.
    pub xcrs: bool,
    /// MSRs that can be read and written back.
    pub msrs: Vec<u32>,
}

/// Special registers, in the best form the host has.
#[derive(Clone, Debug, PartialEq)]
enum SpecialRegs {
    V1(kvm_sregs),
    V2(Sregs2),
}

/// The state of one vCPU.
#[derive(Clone, Debug)]
pub(super) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: SpecialRegs,
    xsave: Vec<u64>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// TSC and TSC_DEADLINE are not among them.
    msrs: Vec<kvm_msr_entry>,
    tsc_deadline: Option<u64>,
    events: kvm_vcpu_events,
    /// The TSC at `taken_ns`.
    tsc: u64,
    /// CLOCK_REALTIME of the moment the TSC was read, in ns.
    taken_ns: u64,
    tsc_khz: u32,
}

/// How far the guest's clocks move on while its state is on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advance {
    /// By the time that passed since it was saved.
    Elapsed {
        /// CLOCK_REALTIME now, in ns.
        now_ns: u64,
    },
    /// Not at all (a reset to the power-on state).
    None,
}

impl VcpuState {
    /// Saves a paused vCPU.
    pub(super) fn save(vcpu: &VcpuFd, abilities: &Abilities) -> Result<Self> {
        let mp_state = vcpu.get_mp_state().map_err(os("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(os("KVM_GET_REGS"))?;
        let sregs = if abilities.sregs2 {
            SpecialRegs::V2(ioctls::sregs2(vcpu)?)
        } else {
            SpecialRegs::V1(vcpu.get_sregs().map_err(os("KVM_GET_SREGS"))?)
        };
        let xsave = if abilities.xsave2 {
            ioctls::xsave2(vcpu, abilities.xsave_bytes)?
        } else {
            let xsave = vcpu.get_xsave().map_err(os("KVM_GET_XSAVE"))?;
            words(xsave.as_bytes())
        };
        let xcrs = match abilities.xcrs {
            true => Some(vcpu.get_xcrs().map_err(os("KVM_GET_XCRS"))?),
            false => None,
        };
        let debug_regs = vcpu.get_debug_regs().map_err(os("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(os("KVM_GET_LAPIC"))?;
        let mut msrs = read_msrs(vcpu, &abilities.msrs)?;
        let tsc = read_msrs(vcpu, &[MSR_TSC])?;
        let taken_ns = realtime_ns();
        let Some(tsc) = tsc.first().map(|msr| msr.data) else {
            return Err(Error::State("KVM_GET_MSRS does not give the TSC".into()));
        };
        let deadline = msrs.iter().position(|msr| msr.index == MSR_TSC_DEADLINE);
        let tsc_deadline = deadline.map(|index| msrs.swap_remove(index).data);
        let events = vcpu.get_vcpu_events().map_err(os("KVM_GET_VCPU_EVENTS"))?;
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            tsc_deadline,
            events,
            tsc,
            taken_ns,
            tsc_khz,
        })
    }

    /// Loads into a paused vCPU whose CPUID is set.
    pub(super) fn load(
        &self,
        vcpu: &VcpuFd,
        abilities: &Abilities,
        advance: Advance,
    ) -> Result<()> {
        match &self.sregs {
            SpecialRegs::V1(sregs) => vcpu.set_sregs(sregs).map_err(os("KVM_SET_SREGS"))?,
            SpecialRegs::V2(sregs) => ioctls::set_sregs2(vcpu, sregs)?,
        }
        vcpu.set_regs(&self.regs).map_err(os("KVM_SET_REGS"))?;
        vcpu.set_mp_state(self.mp_state).map_err(os("KVM_SET_MP_STATE"))?;
        let mut xsave = self.xsave.clone();
        xsave.resize(abilities.xsave_bytes.div_ceil(8).max(xsave.len()), 0);
        ioctls::set_xsave(vcpu, &xsave)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(os("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(os("KVM_SET_DEBUGREGS"))?;
        let mut lapic = self.lapic;
        if let Advance::Elapsed { now_ns } = advance {
            lapic_timer::age(&mut lapic, now_ns.saturating_sub(self.taken_ns));
        }
        vcpu.set_lapic(&lapic).map_err(os("KVM_SET_LAPIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        if let Advance::Elapsed { now_ns } = advance {
            write_msrs(vcpu, &[msr(MSR_TSC, self.tsc_at(now_ns))])?;
        }
        if let Some(deadline) = self.tsc_deadline {
            write_msrs(vcpu, &[msr(MSR_TSC_DEADLINE, deadline)])?;
        }
        vcpu.set_vcpu_events(&self.events).map_err(os("KVM_SET_VCPU_EVENTS"))
    }

    /// The TSC frequency at the source in kHz; 0 = unknown.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The TSC as it would stand at `now_ns` had the vCPU stayed where it was. A clock that went backwards
    /// between hosts must not turn the guest's time back.
    fn tsc_at(&self, now_ns: u64) -> u64 {
        let elapsed_ns = now_ns.saturating_sub(self.taken_ns);
        let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        self.tsc.wrapping_add(ticks as u64)
    }

    /// The section's payload.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.bytes(self.mp_state.as_bytes()).bytes(self.regs.as_bytes());
        match &self.sregs {
            SpecialRegs::V1(sregs) => writer.u8(1).bytes(sregs.as_bytes()),
            SpecialRegs::V2(sregs) => writer.u8(2).bytes(sregs.as_bytes()),
        };
        writer.bytes(self.xsave.as_bytes());
        match &self.xcrs {
            Some(xcrs) => writer.u8(1).bytes(xcrs.as_bytes()),
            None => writer.u8(0),
        };
        writer.bytes(self.debug_regs.as_bytes()).bytes(self.lapic.as_bytes());
        writer.u32(self.msrs.len() as u32);
        for msr in &self.msrs {
            writer.u32(msr.index).u64(msr.data);
        }
        match self.tsc_deadline {
            Some(deadline) => writer.u8(1).u64(deadline),
            None => writer.u8(0),
        };
        writer.bytes(self.events.as_bytes());
        writer.u64(self.tsc).u64(self.taken_ns).u32(self.tsc_khz).finish()
    }

    /// What [`encode`](Self::encode) made, of section `name`. The host must be able to take it.
    pub(super) fn decode(name: &str, payload: &[u8], abilities: &Abilities) -> Result<Self> {
        let mut reader = Reader::new(name, payload);
        let mp_state = plain(&mut reader)?;
        let regs = plain(&mut reader)?;
        let sregs = match reader.u8()? {
            1 => SpecialRegs::V1(plain(&mut reader)?),
            2 if abilities.sregs2 => SpecialRegs::V2(plain(&mut reader)?),
            2 => return Err(reader.error("SREGS2, which this host's KVM does not have")),
            form => return Err(reader.error(format!("special registers of form {form}"))),
        };
        let xsave = words(reader.bytes(XSAVE_MAX_BYTES)?);
        // KVM_SET_XSAVE reads as much as KVM_CAP_XSAVE2 says; `load` adds what is short with zeros.
        if size_of_val(&xsave[..]) > abilities.xsave_bytes {
            return Err(reader.error(format!(
                "an XSAVE area of {} bytes, this host has {}",
                size_of_val(&xsave[..]),
                abilities.xsave_bytes
            )));
        }
        let xcrs = match reader.u8()? {
            0 => None,
            _ => Some(plain(&mut reader)?),
        };
        let debug_regs = plain(&mut reader)?;
        let lapic = plain(&mut reader)?;
        let count = reader.u32()? as usize;
        if count > MSRS_MAX {
            return Err(reader.error(format!("{count} MSRs")));
        }
        let mut msrs = Vec::with_capacity(count);
        for _ in 0..count {
            msrs.push(msr(reader.u32()?, reader.u64()?));
        }
        let tsc_deadline = match reader.u8()? {
            0 => None,
            _ => Some(reader.u64()?),
        };
        let events = plain(&mut reader)?;
        let (tsc, taken_ns, tsc_khz) = (reader.u64()?, reader.u64()?, reader.u32()?);
        reader.finish()?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            tsc_deadline,
            events,
            tsc,
            taken_ns,
            tsc_khz,
        })
    }

    /// As the machine is handed to a PVH kernel: 32-bit protected mode, flat segments, no paging, the
    /// address of the start information in EBX (Xen `docs/misc/pvh.pandoc`). The vCPU is the first one;
    /// the others wait for INIT and SIPI as they are.
    pub(super) fn set_pvh_entry(&mut self, boot: &Boot) {
        const CR0_PROTECTED_MODE: u64 = 0x11;
        let segment = |selector, kind, long_type| kvm_bindings::kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_: kind,
            present: 1,
            db: 1,
            s: long_type,
            g: 1,
            ..Default::default()
        };
        let (code, data) = (segment(0x8, 0xb, 1), segment(0x10, 0x3, 1));
        let task = kvm_bindings::kvm_segment {
            limit: 0x67,
            selector: 0x18,
            db: 0,
            g: 0,
            ..segment(0x18, 0xb, 0)
        };
        let gdt = kvm_bindings::kvm_dtable {
            base: boot.gdt_base.into(),
            limit: boot.gdt_limit,
            ..Default::default()
        };
        let idt = kvm_bindings::kvm_dtable::default();
        match &mut self.sregs {
            SpecialRegs::V1(sregs) => {
                (sregs.cs, sregs.ss, sregs.tr) = (code, data, task);
                (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
                (sregs.gdt, sregs.idt) = (gdt, idt);
                (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PROTECTED_MODE, 0, 0, 0);
            }
            SpecialRegs::V2(sregs) => {
                let [cs, ds, es, fs, gs, ss, tr, _] = &mut sregs.segments;
                (*cs, *ss, *tr) = (code, data, task);
                (*ds, *es, *fs, *gs) = (data, data, data, data);
                sregs.tables = [gdt, idt];
                (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PROTECTED_MODE, 0, 0, 0);
                (sregs.flags, sregs.pdptrs) = (0, [0; 4]);
            }
        }
        self.regs = kvm_regs {
            rip: boot.entry.into(),
            rbx: boot.start_info.into(),
            rflags: 2,
            ..Default::default()
        };
        self.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
    }
}

/// The MSRs this host can give and take back: of those it lists, the ones that a vCPU can read and
/// whose own value it accepts.
pub(super) fn usable_msrs(vcpu: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let usable = |index: &u32| {
        if *index == MSR_TSC || MSR_KVM_WALL_CLOCK.contains(index) {
            return false;
        }
        let Ok(mut msrs) = Msrs::from_entries(&[msr(*index, 0)]) else { return false };
        vcpu.get_msrs(&mut msrs) == Ok(1) && vcpu.set_msrs(&msrs) == Ok(1)
    };
    let unlisted = UNLISTED_MSRS.into_iter().flatten().filter(|index| !listed.contains(index));
    listed.iter().copied().chain(unlisted).filter(usable).collect()
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk.iter().map(|index| msr(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|error| Error::State(format!("MSR list: {error:?}")))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(os("KVM_GET_MSRS"))?;
        if let Some(failed) = entries.get(read) {
            return Err(Error::State(format!("MSR {:#x} cannot be read", failed.index)));
        }
        all.extend_from_slice(msrs.as_slice());
    }
    Ok(all)
}

/// An MSR that this host does not take is an error, but for the value 0: a source that has it switched
/// off needs nothing of the destination.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let msrs = Msrs::from_entries(chunk)
            .map_err(|error| Error::State(format!("MSR list: {error:?}")))?;
        let written = vcpu.set_msrs(&msrs).map_err(os("KVM_SET_MSRS"))?.min(chunk.len());
        rest = &rest[written..];
        if written < chunk.len() {
            let failed = rest[0];
            if failed.data != 0 {
                return Err(Error::State(format!(
                    "this host does not take the value {:#x} of MSR {:#x}",
                    failed.data, failed.index
                )));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// A struct of the kernel from a field of exactly its size.
pub(super) fn plain<T: FromBytes + IntoBytes + Immutable>(reader: &mut Reader<'_>) -> Result<T> {
    let bytes = reader.bytes(size_of::<T>())?;
    T::read_from_bytes(bytes).map_err(|_| {
        reader.error(format!("a field of {} bytes, {} are expected", bytes.len(), size_of::<T>()))
    })
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}

const _: () = assert!(size_of::<kvm_xsave>() == 4096);
