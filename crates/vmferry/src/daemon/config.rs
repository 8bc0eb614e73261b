//! From arguments to a VM's configuration.

use std::collections::BTreeSet;

use anyhow::bail;
use microvm::{
    DeviceConfig, DirtyRing, DirtyTracking, GuestKind, SerialConfig, VmConfig, WorkloadConfig,
};
use migration::{PAGE_SIZE, PageSizes};

use crate::cli::{GuestChoice, RunArgs, SerialChoice, TrackingChoice};

/// Resolves `auto`, and refuses what this host cannot run by naming why.
pub fn choose_guest(choice: GuestChoice, kernel: bool) -> anyhow::Result<GuestKind> {
    let kvm = microvm::kvm::available();
    let process = microvm::process::available();
    match (choice, kvm, process) {
        (GuestChoice::Kvm, Ok(()), _) => Ok(GuestKind::Kvm),
        (GuestChoice::Kvm, Err(why), _) => {
            bail!("--guest kvm cannot run here: {why}; use --guest process, or a host with KVM")
        }
        (GuestChoice::Process | GuestChoice::Auto, Err(why), _) if kernel => {
            bail!("--kernel needs KVM, which cannot be used here: {why}")
        }
        (GuestChoice::Process, ..) if kernel => {
            bail!(
                "--kernel boots under --guest kvm; the process guest runs the built-in workload only"
            )
        }
        (GuestChoice::Process, _, Ok(())) => Ok(GuestKind::Process),
        (GuestChoice::Process, _, Err(why)) => {
            bail!("--guest process cannot run here: {why}; use --guest kvm, or a newer kernel")
        }
        (GuestChoice::Auto, Ok(()), _) => Ok(GuestKind::Kvm),
        (GuestChoice::Auto, Err(why), Ok(())) => {
            tracing::info!(%why, "no KVM: the process guest is used");
            Ok(GuestKind::Process)
        }
        (GuestChoice::Auto, Err(kvm), Err(process)) => {
            bail!("no guest can run here; KVM: {kvm}; process guest: {process}")
        }
    }
}

/// The VM that `args` ask for.
pub fn vm_config(args: &RunArgs) -> anyhow::Result<VmConfig> {
    let workload = &args.workload;
    // A guest that arrives brings its memory along.
    let fill = workload.fill > 0 && args.incoming.is_none();
    let guest = choose_guest(args.guest, args.kernel.is_some())?;
    Ok(VmConfig {
        guest,
        dirty_tracking: dirty_tracking(args.dirty_tracking, guest)?,
        memory_bytes: args.memory,
        page_sizes: if args.hugepages { PageSizes::Huge } else { PageSizes::Kernels },
        vcpus: args.cpus,
        kernel: args.kernel.clone(),
        command_line: args.append.clone(),
        serial: match &args.serial {
            SerialChoice::None => SerialConfig::None,
            SerialChoice::Stdio => SerialConfig::Stdio,
            SerialChoice::File(path) => SerialConfig::File(path.clone()),
        },
        devices: devices(args)?,
        workload: WorkloadConfig {
            working_set_pages: working_set_pages(workload.working_set)?,
            dirty_pages_per_s: workload.dirty_rate,
            dma_rate: workload.dma_rate,
            fill_seed: fill.then_some(workload.fill_seed),
            fill_percent: workload.fill,
            ..WorkloadConfig::default()
        },
        witness: workload.witness.clone(),
    })
}

fn dirty_tracking(choice: TrackingChoice, guest: GuestKind) -> anyhow::Result<DirtyTracking> {
    const INSTEAD: &str = "leave --dirty-tracking at its default";
    match (choice, guest) {
        (TrackingChoice::Log, _) => Ok(DirtyTracking::Log),
        (TrackingChoice::Ring, GuestKind::Process) => {
            bail!("--dirty-tracking ring is KVM's and the process guest has none; {INSTEAD}")
        }
        (TrackingChoice::Ring, GuestKind::Kvm) => match microvm::dirty_ring_available() {
            Ok(()) => Ok(DirtyTracking::Ring(DirtyRing::default())),
            Err(why) => bail!("--dirty-tracking ring cannot be had: {why}; {INSTEAD}"),
        },
    }
}

fn working_set_pages(bytes: Option<u64>) -> anyhow::Result<Option<u32>> {
    let Some(bytes) = bytes else { return Ok(None) };
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        bail!("--working-set of {bytes} bytes is not whole pages of {PAGE_SIZE} bytes");
    }
    match u32::try_from(bytes / PAGE_SIZE) {
        Ok(pages) => Ok(Some(pages)),
        Err(_) => bail!("--working-set of {bytes} bytes is more than a guest has below 4 GiB"),
    }
}

fn devices(args: &RunArgs) -> anyhow::Result<Vec<DeviceConfig>> {
    let mut names = BTreeSet::new();
    let mut devices = Vec::new();
    for (place, device) in args.devices.iter().enumerate() {
        let id = device.id.clone().unwrap_or_else(|| format!("dev{place}"));
        if !names.insert(id.clone()) {
            bail!("two devices are named {id}; give each its own with ,id=NAME");
        }
        devices.push(DeviceConfig { id, backend: device.backend.clone() });
    }
    Ok(devices)
}
