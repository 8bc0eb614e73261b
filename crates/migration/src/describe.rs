//! Describe: what must fit on both sides, compared before a byte of the guest moves. The destination
//! answers with *all* mismatches at once, each naming both values.

use std::collections::BTreeMap;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::memory::PAGE_SIZE;
use crate::vmm::{DeviceDescription, MachineDescription, Vmm};

/// The most devices one migration takes.
pub const DEVICES_MAX: usize = 256;

/// The most data channels one migration has.
pub const CHANNELS_MAX: u16 = 64;

/// Mismatches told are no longer than this in all, in bytes: a longer answer could not be sent.
const MISMATCHES_MAX_BYTES: usize = 24 << 10;

/// The body of Describe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// Page size of the transfer, in bytes.
    pub page_size: u64,
    /// Number of data channels that will be attached.
    pub channels: u16,
    /// The machine.
    pub machine: MachineDescription,
    /// The devices; messages name them by their place here.
    pub devices: Vec<DeviceDescription>,
}

impl Description {
    /// Describes this side.
    pub fn of(vmm: &dyn Vmm, channels: u16) -> Self {
        let devices = vmm.devices().into_iter().map(|device| device.description).collect();
        Self { page_size: PAGE_SIZE, channels, machine: vmm.description(), devices }
    }

    /// Compares what comes (`self`, the source) with what is `here`; empty when it fits.
    pub fn mismatches(&self, here: &Description) -> Vec<String> {
        let mut list = Mismatches::default();
        let (source, dest) = (&self.machine, &here.machine);
        list.compare("page size", &self.page_size, &here.page_size);
        list.compare("machine", &source.machine, &dest.machine);
        list.compare("machine version", &source.version, &dest.version);
        list.compare("vCPUs", &source.vcpus, &dest.vcpus);
        list.compare_memory(source, dest);
        // Of another kind of machine nothing inside can be the same: telling it all would hide the reason.
        if source.machine == dest.machine {
            list.compare_cpuid(&source.cpuid, &dest.cpuid);
            list.compare("XSAVE size", &source.xsave_bytes, &dest.xsave_bytes);
            list.compare_tsc(source, dest);
            list.compare_sections(source, dest);
        }
        list.compare_devices(&self.devices, &here.devices);
        list.told()
    }
}

#[derive(Default)]
struct Mismatches(Vec<String>);

impl Mismatches {
    fn compare<T: PartialEq + Display + ?Sized>(
        &mut self,
        what: &str,
        source: &T,
        destination: &T,
    ) {
        if source != destination {
            self.0.push(format!("{what}: source {source}, destination {destination}"));
        }
    }

    /// As many as an answer holds, and how many more there are.
    fn told(self) -> Vec<String> {
        let all = self.0.len();
        let mut bytes = 0;
        let fits = |what: &String| {
            bytes += what.len();
            bytes <= MISMATCHES_MAX_BYTES
        };
        let mut told: Vec<_> = self.0.into_iter().take_while(fits).collect();
        if told.len() < all {
            told.push(format!("and {} more", all - told.len()));
        }
        told
    }

    fn compare_memory(&mut self, source: &MachineDescription, dest: &MachineDescription) {
        let total = |machine: &MachineDescription| {
            machine.memory.iter().fold(0u64, |sum, region| sum.saturating_add(region.len))
        };
        let (from, to) = (total(source), total(dest));
        if from != to {
            let kib = |bytes: u64| format!("{} KiB", bytes / 1024);
            return self.compare("memory", &kib(from), &kib(to));
        }
        let layout = |machine: &MachineDescription| {
            let region = |r: &crate::RegionLayout| format!("{:#x}+{:#x}", r.gpa, r.len);
            machine.memory.iter().map(region).collect::<Vec<_>>().join(" ")
        };
        self.compare("memory layout", &layout(source), &layout(dest));
    }

    /// Names the differing leaves only: a full list would hide them.
    fn compare_cpuid(&mut self, source: &[String], dest: &[String]) {
        let split = |leaves: &[String]| -> BTreeMap<String, String> {
            let pair = |leaf: &String| {
                let (key, value) = leaf.split_once('=').unwrap_or((leaf.as_str(), ""));
                (key.to_owned(), value.to_owned())
            };
            leaves.iter().map(pair).collect()
        };
        let (source, dest) = (split(source), split(dest));
        let absent = String::from("absent");
        for key in source.keys().chain(dest.keys().filter(|k| !source.contains_key(*k))) {
            let (s, d) = (source.get(key).unwrap_or(&absent), dest.get(key).unwrap_or(&absent));
            self.compare(&format!("CPUID leaf {key}"), s, d);
        }
    }

    /// Within 250 ppm the guest does not notice; beyond, the destination's host must scale.
    fn compare_tsc(&mut self, source: &MachineDescription, dest: &MachineDescription) {
        let (Some(from), Some(to)) = (source.tsc_khz, dest.tsc_khz) else {
            let known = |khz: Option<u32>| khz.map_or("unknown".to_owned(), |khz| khz.to_string());
            return self.compare("TSC kHz", &known(source.tsc_khz), &known(dest.tsc_khz));
        };
        let difference = u64::from(from.abs_diff(to)) * 1_000_000;
        if difference > 250 * u64::from(from) && !dest.tsc_scaling {
            self.0.push(format!(
                "TSC kHz: source {from}, destination {to}, and the destination's host cannot scale"
            ));
        }
    }

    fn compare_sections(&mut self, source: &MachineDescription, dest: &MachineDescription) {
        for section in &source.sections {
            let here = dest.sections.iter().find(|s| s.name == section.name);
            let shape = |kind: &str, version: u32| format!("{kind} v{version}");
            let from = shape(&section.kind, section.version);
            let to = here.map_or("absent".to_owned(), |s| shape(&s.kind, s.version));
            self.compare(&format!("state section {}", section.name), &from, &to);
        }
        for section in &dest.sections {
            if !source.sections.iter().any(|s| s.name == section.name) {
                let name = &section.name;
                self.0.push(format!("state section {name}: source absent, destination present"));
            }
        }
    }

    fn compare_devices(&mut self, source: &[DeviceDescription], dest: &[DeviceDescription]) {
        if source.len() > DEVICES_MAX {
            self.0.push(format!("devices: source {}, at most {DEVICES_MAX}", source.len()));
            return;
        }
        for (place, device) in source.iter().enumerate() {
            let id = &device.id;
            if source[..place].iter().any(|d| d.id == *id) {
                self.0.push(format!("device {id}: named twice at the source"));
            }
            match dest.iter().find(|d| d.id == *id) {
                Some(here) => self.compare_device(device, here),
                None => self.0.push(format!("device {id}: source present, destination absent")),
            }
        }
        for device in dest {
            if !source.iter().any(|d| d.id == device.id) {
                self.0.push(format!("device {}: source absent, destination present", device.id));
            }
        }
    }

    fn compare_device(&mut self, source: &DeviceDescription, dest: &DeviceDescription) {
        let id = &source.id;
        let hex = |ids: [u16; 4]| ids.map(|id| format!("{id:04x}")).join(":");
        let what = |name: &str| format!("device {id}, {name}");
        self.compare(&what("PCI ids"), &hex(source.pci_ids), &hex(dest.pci_ids));
        let class = |c: u32| format!("{c:08x}");
        let (from, to) = (class(source.class_revision), class(dest.class_revision));
        self.compare(&what("class and revision"), &from, &to);
        self.compare(&what("region sizes"), &row(&source.region_sizes), &row(&dest.region_sizes));
        // Whether a region can be mapped is this host's business, not the guest's.
        let access = |flags: &[u32]| row(&flags.iter().map(|f| f & 3).collect::<Vec<_>>());
        let (from, to) = (access(&source.region_flags), access(&dest.region_flags));
        self.compare(&what("region flags"), &from, &to);
        self.compare(&what("interrupt counts"), &row(&source.irq_counts), &row(&dest.irq_counts));
        let (from, to) = (source.migration_flags, dest.migration_flags);
        self.compare(&what("migration flags"), &from, &to);
    }
}

/// One value after the other.
fn row<T: Display>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RegionLayout;
    use crate::vmm::SectionVersion;

    fn description() -> Description {
        let device = DeviceDescription {
            id: "nic0".into(),
            backend: "vfio-user".into(),
            pci_ids: [0x1b36, 0xf7, 0x1b36, 1],
            class_revision: 0x0880_0001,
            region_sizes: vec![4096, 0, 4096],
            region_flags: vec![3, 0, 7],
            irq_counts: vec![1, 0, 4],
            migration_flags: 7,
            precopy_info: true,
            precopy_info_v2: true,
            data_size: true,
            dma_logging: true,
            reset_runs: true,
        };
        Description {
            page_size: PAGE_SIZE,
            channels: 1,
            machine: MachineDescription {
                machine: "microvm-kvm".into(),
                version: 1,
                vcpus: 1,
                memory: vec![RegionLayout { gpa: 0, len: 1 << 20 }],
                cpuid: vec!["1.0=1,2,3,4".into(), "7.0=0,0,0,0".into()],
                xsave_bytes: 832,
                tsc_khz: Some(2_000_000),
                tsc_scaling: false,
                sections: vec![SectionVersion {
                    name: "vcpu0".into(),
                    kind: "kvm-vcpu".into(),
                    version: 1,
                }],
            },
            devices: vec![device],
        }
    }

    #[test]
    fn equal_descriptions_fit() {
        assert!(description().mismatches(&description()).is_empty());
    }

    #[test]
    fn every_mismatch_is_named_at_once_with_both_values() {
        let mut here = description();
        here.machine.vcpus = 2;
        here.machine.memory[0].len = 2 << 20;
        here.machine.cpuid[1] = "7.0=0,0,0,1".into();
        here.machine.sections[0].version = 2;
        here.devices[0].pci_ids[1] = 0xf8;
        here.devices[0].region_sizes[0] = 8192;
        here.devices.push(DeviceDescription { id: "nic1".into(), ..here.devices[0].clone() });
        let list = description().mismatches(&here);
        let expected = [
            "vCPUs: source 1, destination 2",
            "memory: source 1024 KiB, destination 2048 KiB",
            "CPUID leaf 7.0: source 0,0,0,0, destination 0,0,0,1",
            "state section vcpu0: source kvm-vcpu v1, destination kvm-vcpu v2",
            "device nic0, PCI ids: source 1b36:00f7:1b36:0001, destination 1b36:00f8:1b36:0001",
            "device nic0, region sizes: source 4096 0 4096, destination 8192 0 4096",
            "device nic1: source absent, destination present",
        ];
        assert_eq!(list, expected);
    }

    #[test]
    fn of_another_kind_of_machine_the_insides_are_not_listed() {
        let mut here = description();
        here.machine.machine = "another".into();
        here.machine.cpuid.clear();
        here.machine.tsc_khz = None;
        here.machine.sections.clear();
        here.machine.vcpus = 2;
        let list = description().mismatches(&here);
        assert_eq!(list.len(), 2, "{list:?}");
        assert!(list[0].starts_with("machine: ") && list[1].starts_with("vCPUs: "), "{list:?}");
    }

    #[test]
    fn memory_of_the_same_size_in_other_places_is_named() {
        let mut here = description();
        here.machine.memory[0].gpa = 1 << 20;
        let list = description().mismatches(&here);
        assert_eq!(list, ["memory layout: source 0x0+0x100000, destination 0x100000+0x100000"]);
    }

    #[test]
    fn however_many_mismatches_there_are_the_answer_can_be_sent() {
        let mut here = description();
        here.machine.cpuid = (0..10_000).map(|leaf| format!("{leaf:x}.0=1,1,1,1")).collect();
        let list = description().mismatches(&here);
        assert!(list.last().unwrap().starts_with("and "), "{:?}", list.last());
        let message = switchover::message::Message::Mismatch { list };
        crate::wire::encode_message(&message).unwrap();
    }

    #[test]
    fn tsc_may_differ_by_250_ppm_or_be_scaled() {
        let with = |khz, scaling| {
            let mut here = description();
            (here.machine.tsc_khz, here.machine.tsc_scaling) = (Some(khz), scaling);
            description().mismatches(&here).len()
        };
        assert_eq!(with(2_000_500, false), 0);
        assert_eq!(with(2_000_501, false), 1);
        assert_eq!(with(3_000_000, true), 0);
    }

    #[test]
    fn whether_a_region_can_be_mapped_is_no_mismatch() {
        let mut here = description();
        here.devices[0].region_flags[2] = 3;
        assert!(description().mismatches(&here).is_empty());
    }
}
