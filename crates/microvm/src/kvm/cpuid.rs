//! The guest's CPUID: what KVM supports, with the topology of this machine.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::interrupts::os;
use crate::error::{Error, Result};

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;

/// What KVM supports on this host.
pub(super) fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(os("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries = supported.as_slice().to_vec();
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= LEAF1_ECX_HYPERVISOR;
        if deadline {
            entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
        }
    }
    Ok(entries)
}

/// The leaves of vCPU `index` of `vcpus`: one socket, one thread per core, APIC id = index.
pub(super) fn of_vcpu(supported: &[kvm_cpuid_entry2], index: u32, vcpus: u32) -> Result<CpuId> {
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        adapt(entry, index, vcpus);
    }
    CpuId::from_entries(&entries).map_err(|error| Error::Config(format!("CPUID: {error:?}")))
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u32, vcpus: u32) {
    // Bits of the APIC id that number the cores.
    let core_bits = u32::BITS - (vcpus - 1).leading_zeros();
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | vcpus.min(255) << 16 | (index & 0xff) << 24;
            entry.edx = entry.edx & !LEAF1_EDX_HTT | if vcpus > 1 { LEAF1_EDX_HTT } else { 0 };
        }
        // Intel cache topology: each cache is shared by one thread, and so many cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let cores = (1u32 << core_bits).min(64) - 1;
            entry.eax = entry.eax & 0x3fff | cores << 26;
        }
        0xb | 0x1f => {
            entry.edx = index;
            match entry.index {
                0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                1 => (entry.eax, entry.ebx, entry.ecx) = (core_bits, vcpus, 1 | 2 << 8),
                _ => (entry.eax, entry.ebx, entry.ecx) = (0, 0, entry.index & 0xff),
            }
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (vcpus - 1) & 0xff,
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
}

/// The leaves as Describe carries them.
pub(super) fn describe(entries: &[kvm_cpuid_entry2]) -> Vec<String> {
    let describe = |e: &kvm_cpuid_entry2| {
        format!("{:x}.{:x}={:x},{:x},{:x},{:x}", e.function, e.index, e.eax, e.ebx, e.ecx, e.edx)
    };
    entries.iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let supported = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_001e, 0)];
        let third = of_vcpu(&supported, 2, 3).unwrap();
        let third = third.as_slice();
        assert_eq!(third[0].ebx, 3 << 16 | 2 << 24);
        assert_eq!((third[1].edx, third[2].edx), (2, 2));
        assert_eq!((third[2].eax, third[2].ebx), (2, 3), "two bits number three cores");
        assert_eq!(third[3].eax, 2);
        let only = of_vcpu(&supported, 0, 1).unwrap();
        assert_eq!(only.as_slice()[2].eax, 0);
        assert_eq!(only.as_slice()[0].edx & LEAF1_EDX_HTT, 0);
    }

    #[test]
    fn describe_names_leaf_subleaf_and_registers() {
        let leaf = kvm_cpuid_entry2 {
            function: 0xd,
            index: 1,
            eax: 15,
            ebx: 2,
            ecx: 3,
            edx: 4,
            ..Default::default()
        };
        assert_eq!(describe(&[leaf]), ["d.1=f,2,3,4"]);
    }
}
