//! The KVM ioctls that `kvm-ioctls` lacks, or has only with an allocation for each call.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_dtable, kvm_segment, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::{Error, Result};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, Sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, Sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

/// `struct kvm_sregs2`, in a form whose bytes can be taken.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, FromBytes, IntoBytes, Immutable)]
pub(super) struct Sregs2 {
    /// cs, ds, es, fs, gs, ss, tr, ldt.
    pub segments: [kvm_segment; 8],
    /// gdt, idt.
    pub tables: [kvm_dtable; 2],
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
    pub flags: u64,
    pub pdptrs: [u64; 4],
}

const _: () = assert!(size_of::<Sregs2>() == size_of::<kvm_bindings::kvm_sregs2>());

/// KVM_GET_DIRTY_LOG of a slot whose bitmap has `bitmap.len()` words. Without manual protection this
/// also clears the log.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, bitmap: &mut [u64]) -> Result<()> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_bindings::kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the kernel writes one bit per page of the slot, rounded up to words; the caller's bitmap
    // was made for the slot's size.
    check("KVM_GET_DIRTY_LOG", unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })
}

/// KVM_CLEAR_DIRTY_LOG: forgets the pages whose bits are set and protects them again. `first_page` is a
/// multiple of 64; `pages` is one too, or ends at the slot's end.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> Result<()> {
    debug_assert!(u64::from(pages) <= bitmap.len() as u64 * 64);
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_bindings::kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel only reads the bitmap, which covers `pages` bits.
    check("KVM_CLEAR_DIRTY_LOG", unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) })
}

/// KVM_RESET_DIRTY_RINGS: protects the pages of all harvested entries again and frees the entries; says how many.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> Result<u64> {
    // SAFETY: the call has no argument.
    let count = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    check("KVM_RESET_DIRTY_RINGS", count)?;
    Ok(count as u64)
}

/// KVM_GET_SREGS2.
pub(super) fn sregs2(vcpu: &VcpuFd) -> Result<Sregs2> {
    let mut sregs = Sregs2::default();
    // SAFETY: `Sregs2` has the layout of the kernel's struct.
    check("KVM_GET_SREGS2", unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2.
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &Sregs2) -> Result<()> {
    // SAFETY: `Sregs2` has the layout of the kernel's struct.
    check("KVM_SET_SREGS2", unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// KVM_GET_XSAVE2 into an area of `size_bytes`, as KVM_CAP_XSAVE2 gave it for the VM.
pub(super) fn xsave2(vcpu: &VcpuFd, size_bytes: usize) -> Result<Vec<u64>> {
    let mut area = vec![0u64; size_bytes.max(size_of::<kvm_xsave>()).div_ceil(8)];
    let pointer = area.as_mut_ptr().cast::<kvm_xsave>();
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 says, which the area holds.
    check("KVM_GET_XSAVE2", unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_XSAVE2(), pointer) })?;
    Ok(area)
}

/// KVM_SET_XSAVE; `area` is at least as long as KVM_CAP_XSAVE2 says.
pub(super) fn set_xsave(vcpu: &VcpuFd, area: &[u64]) -> Result<()> {
    debug_assert!(size_of_val(area) >= size_of::<kvm_xsave>());
    let pointer = area.as_ptr().cast::<kvm_xsave>();
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, which the caller checked.
    check("KVM_SET_XSAVE", unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), pointer) })
}

fn check(call: &'static str, result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Error::last_os(call)) } else { Ok(()) }
}

/// KVM_IRQFD: connects `fd` to `gsi`, with a resample eventfd for a level-triggered line, or disconnects
/// it. A disconnect waits for outstanding injections.
pub(super) fn irqfd(
    vm: &VmFd,
    fd: &impl AsRawFd,
    resample: Option<&dyn AsRawFd>,
    gsi: u32,
    flags: u32,
) -> Result<()> {
    let mut request =
        kvm_bindings::kvm_irqfd { fd: fd.as_raw_fd() as u32, gsi, flags, ..Default::default() };
    if let Some(resample) = resample {
        request.resamplefd = resample.as_raw_fd() as u32;
        request.flags |= kvm_bindings::KVM_IRQFD_FLAG_RESAMPLE;
    }
    // SAFETY: the kernel reads the struct, and holds references of its own to both files.
    check("KVM_IRQFD", unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &request) })
}

ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_bindings::kvm_irqfd);
