//! `vmferry status`, `vmferry cancel` and `vmferry set`.

use std::fmt::Write;

use serde_json::{Value, json};
use switchover::message::Failure;

use crate::api::client;
use crate::cli::{CancelArgs, SetArgs, StatusArgs};
use crate::units::{as_ms, show_bytes, show_ms};

/// What an operator has to know of a source in doubt.
pub const DOUBT: &str = "in doubt: Commit was sent and the destination has not said that the guest runs there; \
     the guest stands still here and the destination is asked again until it answers; if it cannot, look there, and \
     decide with vmferry resolve";

/// What an operator has to know of a destination that holds a guest.
const HOLDS: &str = "all of a guest is here and does not run; if its source is dead, vmferry resolve --run-here \
     starts it";

/// Shows what a daemon is doing.
pub fn status(args: &StatusArgs) -> anyhow::Result<bool> {
    let status = client::call(&args.api, "status", json!({}))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", status_text(&status));
    }
    Ok(true)
}

/// Asks for the guest to stay.
pub fn cancel(args: &CancelArgs) -> anyhow::Result<bool> {
    client::call(&args.api, "cancel", json!({}))?;
    println!("asked for; vmferry status --api {} shows what comes of it", args.api.display());
    Ok(true)
}

/// Changes the migration under way.
pub fn set(args: &SetArgs) -> anyhow::Result<bool> {
    let arguments = json!({
        "downtime-limit-ms": args.downtime_limit.map(as_ms),
        "max-bandwidth": args.max_bandwidth,
    });
    client::call(&args.api, "set", arguments)?;
    Ok(true)
}

fn status_text(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {} guest, {}, {} vCPU(s), pid {}",
        text(&status["state"]),
        text(&status["guest"]),
        show_bytes(status["memory-bytes"].as_u64().unwrap_or(0)),
        status["vcpus"],
        status["pid"],
    );
    if let Some(full_exits) = status["dirty-ring"]["full-exits"].as_u64() {
        let harvested = &status["dirty-ring"]["harvested"];
        let _ = writeln!(
            out,
            "dirty rings: {harvested} entries harvested, vCPUs waited {full_exits} times for a full one"
        );
    }
    for device in status["devices"].as_array().into_iter().flatten() {
        let (id, backend) = (text(&device["id"]), text(&device["backend"]));
        let _ = match (device["lost"].as_str(), device["opened"].as_str()) {
            (Some(why), _) => writeln!(out, "device {id}: LOST ({backend}): {why}"),
            (None, Some(opened)) => writeln!(out, "device {id}: {backend} ({opened})"),
            (None, None) => writeln!(out, "device {id}: {backend}"),
        };
        if let Some(ms) = device["in-call"]["for-ms"].as_u64().filter(|ms| *ms >= 1000) {
            let call = text(&device["in-call"]["call"]);
            let _ = writeln!(out, "device {id}: {call} has been under way for {ms} ms");
        }
    }
    if let Some(ended) = status["ended"].as_str() {
        let _ = writeln!(out, "the guest ended: {ended}");
    }
    if let Some(incoming) = status["incoming"].as_object() {
        let listen = text(&incoming["listen"]);
        let state = text(&incoming["state"]);
        let _ = writeln!(out, "incoming on {listen}: {state}");
        if let "prepared" | "expired" = state.as_str() {
            let _ = writeln!(out, "{HOLDS}");
        }
    }
    let migration = &status["migration"];
    if migration.is_object() {
        let _ = writeln!(
            out,
            "migration: {} ({}), pass {}, left {}, expected downtime {} of {}",
            text(&migration["status"]),
            text(&migration["state"]),
            migration["pass"],
            migration["remaining"].as_u64().map_or("unknown".into(), show_bytes),
            show_ms(migration["expected-downtime-ms"].as_f64()),
            show_ms(migration["downtime-limit-ms"].as_f64()),
        );
        if migration["status"] == "in-doubt" {
            let _ = writeln!(out, "{DOUBT}");
            let known = serde_json::from_value::<Failure>(migration["failure"].clone());
            if let Ok(known) = known {
                let _ = writeln!(out, "the destination says: {known}");
            }
        }
        if let Some(percent) = migration["cpu-throttle-percentage"].as_u64().filter(|p| *p > 0) {
            let _ = writeln!(
                out,
                "vCPUs throttled: they execute {} % of the time",
                100 - percent.min(100)
            );
        }
        if let Some(call) = migration["slow-call"].as_str() {
            let _ = writeln!(out, "waiting for {call}");
        }
        for overrun in migration["overruns"].as_array().into_iter().flatten() {
            let device = overrun["device"].as_str().map(|id| format!("device {id}, "));
            let _ = writeln!(
                out,
                "overrun: {}{} took {}, its bound is {}",
                device.unwrap_or_default(),
                text(&overrun["call"]),
                show_ms(overrun["ms"].as_f64()),
                show_ms(overrun["bound-ms"].as_f64()),
            );
        }
        for device in migration["devices"].as_array().into_iter().flatten() {
            if let Some(lost) = device["lost"].as_str() {
                let _ = writeln!(out, "device {} lost its state: {lost}", text(&device["id"]));
            }
        }
    }
    if let Some(held) = status["held"].as_object() {
        let _ = writeln!(out, "held before {} ({})", text(&held["phase"]), text(&held["side"]));
    }
    let failure = serde_json::from_value::<Failure>(status["failure"].clone());
    if let Ok(failure) = failure {
        let _ = writeln!(out, "last migration: {failure}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_and_a_failure_are_named() {
        let status = json!({
            "state": "running", "guest": "kvm", "memory-bytes": 1 << 30, "vcpus": 2, "pid": 7,
            "devices": [
                {"id": "nic0", "backend": "vfio-user:/s", "lost": "connection closed"},
                {"id": "nic1", "backend": "vfio:65:00.1", "opened": "cdev", "lost": null,
                 "in-call": {"call": "SET MIG_DEVICE_STATE", "for-ms": 1200}},
            ],
            "migration": null, "incoming": null, "held": null, "ended": null,
            "dirty-ring": {"harvested": 12, "full-exits": 3},
            "failure": {"side": "destination", "phase": "loading", "what": "it broke"},
        });
        let text = status_text(&status);
        assert!(text.starts_with("running: kvm guest, 1.0 GiB, 2 vCPU(s), pid 7\n"), "{text}");
        assert!(text.contains("device nic0: LOST (vfio-user:/s): connection closed"), "{text}");
        assert!(text.contains("device nic1: vfio:65:00.1 (cdev)\n"), "{text}");
        assert!(
            text.contains("nic1: SET MIG_DEVICE_STATE has been under way for 1200 ms"),
            "{text}"
        );
        assert!(text.contains("12 entries harvested, vCPUs waited 3 times"), "{text}");
        assert!(text.contains("last migration: destination, loading: it broke"), "{text}");
    }

    #[test]
    fn an_answer_of_another_version_is_no_panic() {
        status_text(&json!(null));
        status_text(&json!({"devices": 7, "failure": [], "migration": {"devices": {}}}));
    }
}
