//! Both guests run in the lab at all, with a software device: what fails beyond this is about kernel devices.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::case::{Case, Outcome};
use crate::hosts::Guest;
use crate::lab::Lab;

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("guests-kvm-runs", |lab| runs(lab, Guest::Kvm)),
        Case::new("guests-process-runs", |lab| runs(lab, Guest::Process)),
        Case::new("guests-kvm-migrates-with-a-software-device", |lab| migrates(lab, Guest::Kvm))
            .limit_s(120),
    ]
}

fn runs(lab: &Lab, guest: Guest) -> anyhow::Result<Outcome> {
    let daemon = lab.source("host", guest, &[])?;
    let status = daemon.call("status", json!({}))?;
    ensure!(status["guest"] == guest.name(), "the guest is {}", status["guest"]);
    daemon.ensure_guest_lives()?;
    Ok(Outcome::Passed)
}

fn migrates(lab: &Lab, guest: Guest) -> anyhow::Result<Outcome> {
    let output = lab
        .vmferry([
            "demo",
            "--json",
            "--memory",
            "32M",
            "--state-size",
            "4M",
            "--downtime-limit",
            "3s",
        ])
        .args(["--guest", guest.name()])
        .output()
        .context("run the demonstration")?;
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {log}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).context("the report is no JSON")?;
    ensure!(report["guest"] == guest.name(), "it ran on {}", report["guest"]);
    Ok(Outcome::Passed)
}
