//! `vmferry device info`.

use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::{Value, json};
use vfio_migration::{DeviceResult, DeviceState, IrqIndex, MigratableDevice, PciFunctionInfo};

use super::open::Device;
use crate::cli::InfoArgs;
use crate::units::show_bytes;

const REGIONS: [&str; 9] =
    ["BAR 0", "BAR 1", "BAR 2", "BAR 3", "BAR 4", "BAR 5", "ROM", "configuration", "VGA"];
const IRQS: [&str; 5] = ["INTx", "MSI", "MSI-X", "error", "request"];

/// Shows a device.
pub fn info(args: &InfoArgs) -> anyhow::Result<bool> {
    let device = Device::open(&args.device)?;
    let info = gather(&device)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&info)? + "\n",
        false => text(&info),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(true)
}

fn gather(device: &Device) -> anyhow::Result<Value> {
    let mut info = json!({
        "device": device.name,
        "kind": device.kind,
        "opened": device.opened,
        "ids": device.ids()?,
    });
    if let Some(pci) = device.pci()? {
        info["regions"] = regions(pci.info());
        info["interrupts"] = interrupts(pci.info());
        info["reset"] = pci.info().reset.into();
    }
    info["migration"] = match device.migration()? {
        Some(mut migration) => of_migration(migration.as_mut()),
        None => Value::Null,
    };
    Ok(info)
}

fn regions(info: &PciFunctionInfo) -> Value {
    let there = info.regions.iter().zip(REGIONS).filter(|(region, _)| region.size > 0);
    let regions = there.map(|(region, name)| {
        json!({
            "name": name,
            "size-bytes": region.size,
            "read": region.flags.read,
            "write": region.flags.write,
            "mmap": region.flags.mmap,
        })
    });
    regions.collect()
}

fn interrupts(info: &PciFunctionInfo) -> Value {
    debug_assert_eq!(IRQS.len(), IrqIndex::ALL.len());
    let there = info.irqs.iter().zip(IRQS).filter(|(irq, _)| irq.count > 0);
    there.map(|(irq, name)| json!({ "name": name, "count": irq.count })).collect()
}

/// An answer, or why there is none: what cannot be asked is no reason to show nothing.
fn or_why<T: Into<Value>>(answer: DeviceResult<T>) -> Value {
    answer.map_or_else(|error| json!({ "error": error.to_string() }), Into::into)
}

fn of_migration(migration: &mut dyn MigratableDevice) -> Value {
    let capabilities = migration.capabilities();
    let flags = capabilities.flags;
    let states = DeviceState::ALL.into_iter().filter(|state| flags.has_state(*state));
    let state = migration.state().map(DeviceState::name);
    let size = match capabilities.data_size {
        true => or_why(migration.stop_copy_length()),
        false => Value::Null,
    };
    let digest = migration.state_digest().map(|digest| {
        let hex = |digest: [u8; 32]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
        digest.map_or(Value::Null, |digest| Value::String(hex(digest)))
    });
    json!({
        "flags": flags.as_raw(),
        "p2p": flags.p2p(),
        "pre-copy": flags.pre_copy(),
        "states": states.map(DeviceState::name).collect::<Vec<_>>(),
        "state": or_why(state),
        "precopy-info": capabilities.precopy_info,
        "precopy-info-v2": capabilities.precopy_info_v2,
        "data-size": capabilities.data_size,
        "stop-copy-bytes": size,
        "dirty-tracking": capabilities.dma_logging,
        "reset-leads-to-running": capabilities.reset_runs,
        "state-digest": or_why(digest),
    })
}

fn text(info: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<16}{value}");
    };
    line("device", word(&info["device"]));
    line("opened", word(&info["opened"]));
    line("ids", word(&info["ids"]));
    for region in info["regions"].as_array().into_iter().flatten() {
        let size = region["size-bytes"].as_u64().unwrap_or(0);
        let mmap = if region["mmap"] == true { ", can be mapped" } else { "" };
        line("region", format!("{}: {}{mmap}", word(&region["name"]), show_bytes(size)));
    }
    for irq in info["interrupts"].as_array().into_iter().flatten() {
        line("interrupts", format!("{}: {}", word(&irq["name"]), irq["count"]));
    }
    let migration = &info["migration"];
    if migration.is_null() {
        line("migration", "none".into());
        return out;
    }
    let states: Vec<_> = migration["states"].as_array().into_iter().flatten().map(word).collect();
    line("states", states.join(" "));
    line("state", word(&migration["state"]));
    let size = match migration["stop-copy-bytes"].as_u64() {
        // A claim, which drivers are known to get wrong (Z3).
        Some(bytes) if bytes > i64::MAX as u64 => format!("{bytes} bytes: not a size"),
        Some(bytes) => show_bytes(bytes),
        None => word(&migration["stop-copy-bytes"]),
    };
    line("state size", size);
    for (name, key) in [
        ("PRECOPY_INFO", "precopy-info"),
        ("PRECOPY_INFOv2", "precopy-info-v2"),
        ("MIG_DATA_SIZE", "data-size"),
        ("dirty tracking", "dirty-tracking"),
        ("reset", "reset-leads-to-running"),
    ] {
        let yes = if key == "reset-leads-to-running" { "leads to RUNNING" } else { "yes" };
        let no = if key == "reset-leads-to-running" { "does not lead to RUNNING" } else { "no" };
        line(name, if migration[key] == true { yes } else { no }.into());
    }
    if let Some(digest) = migration["state-digest"].as_str() {
        line("state digest", digest.into());
    }
    out
}

/// A word of the document; what could not be asked says why.
fn word(value: &Value) -> String {
    match (value.as_str(), value["error"].as_str()) {
        (Some(text), _) => text.into(),
        (None, Some(error)) => format!("? ({error})"),
        (None, None) if value.is_null() => "unknown".into(),
        (None, None) => value.to_string(),
    }
}
