//! What a vCPU looked like when its guest died, in one line for the log.
//!
//! After a shutdown intercept, KVM on AMD resets the vCPU before it says so (Linux `shutdown_interception`):
//! the line then has the registers of a processor after INIT, with `rip=0xfff0`. A triple fault that KVM itself
//! came to, in its instruction emulator or while it injected an exception, leaves them as they were.

use std::fmt::{self, Display, Formatter};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;

use super::interrupts::os;
use crate::error::Result;

/// The part of a vCPU's state that tells why it could not go on.
pub(super) struct CrashState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
}

impl CrashState {
    /// Of a vCPU that is not to run any more.
    pub(super) fn take(vcpu: &VcpuFd) -> Result<Self> {
        Ok(Self {
            regs: vcpu.get_regs().map_err(os("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(os("KVM_GET_SREGS"))?,
            events: vcpu.get_vcpu_events().map_err(os("KVM_GET_VCPU_EVENTS"))?,
        })
    }
}

/// `rip=… rsp=… rflags=… cs=SELECTOR:BASE … cr0=… cr2=… cr3=… cr4=… efer=… gdt=BASE/LIMIT idt=BASE/LIMIT`, then
/// each event that was pending or was being injected.
impl Display for CrashState {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { regs, sregs, events } = self;
        write!(f, "rip={:#x} rsp={:#x} rflags={:#x}", regs.rip, regs.rsp, regs.rflags)?;
        write!(f, " cs={} ss={}", Segment(&sregs.cs), Segment(&sregs.ss))?;
        write!(f, " cr0={:#x} cr2={:#x} cr3={:#x}", sregs.cr0, sregs.cr2, sregs.cr3)?;
        write!(f, " cr4={:#x} efer={:#x}", sregs.cr4, sregs.efer)?;
        write!(f, " gdt={} idt={}", Table(&sregs.gdt), Table(&sregs.idt))?;
        let exception = &events.exception;
        for (is_so, state) in [(exception.injected, "injected"), (exception.pending, "pending")] {
            if is_so != 0 {
                write!(f, " exception={}:{state}", exception.nr)?;
                if exception.has_error_code != 0 {
                    write!(f, ":{:#x}", exception.error_code)?;
                }
            }
        }
        if events.interrupt.injected != 0 {
            let kind = if events.interrupt.soft != 0 { "soft" } else { "injected" };
            write!(f, " interrupt={:#x}:{kind}", events.interrupt.nr)?;
        }
        if events.interrupt.shadow != 0 {
            write!(f, " interrupt-shadow={:#x}", events.interrupt.shadow)?;
        }
        for (is_so, state) in [(events.nmi.injected, "injected"), (events.nmi.pending, "pending")] {
            if is_so != 0 {
                write!(f, " nmi={state}")?;
            }
        }
        Ok(())
    }
}

struct Segment<'a>(&'a kvm_segment);

impl Display for Segment<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}:{:#x}", self.0.selector, self.0.base)
    }
}

struct Table<'a>(&'a kvm_dtable);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.0.base, self.0.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_named_and_no_other() {
        let mut state = CrashState {
            regs: kvm_regs { rip: 0x10_0002, rsp: 0x2_0ff0, rflags: 2, ..Default::default() },
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
        };
        state.sregs.cs = kvm_segment { selector: 8, base: 0x1000, ..Default::default() };
        (state.sregs.cr0, state.sregs.cr2) = (0x11, 0x5000);
        state.sregs.idt = kvm_dtable { base: 0x3_0000, limit: 0x7ff, ..Default::default() };
        let quiet = "rip=0x100002 rsp=0x20ff0 rflags=0x2 cs=0x8:0x1000 ss=0x0:0x0 cr0=0x11 cr2=0x5000 \
                     cr3=0x0 cr4=0x0 efer=0x0 gdt=0x0/0x0 idt=0x30000/0x7ff";
        assert_eq!(state.to_string(), quiet);

        let events = &mut state.events;
        (events.exception.injected, events.exception.nr) = (1, 13);
        (events.exception.has_error_code, events.exception.error_code) = (1, 0x102);
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.shadow) = (1, 0x20, 1);
        events.nmi.pending = 1;
        let all =
            " exception=13:injected:0x102 interrupt=0x20:injected interrupt-shadow=0x1 nmi=pending";
        assert_eq!(state.to_string(), format!("{quiet}{all}"));
    }
}
