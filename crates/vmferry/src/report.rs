//! A migration's report for people: what happened when, what was expected and what was measured.

use std::fmt::Write;

use migration::report::{
    BlackoutReport, BlackoutTimeline, CostReport, DeviceReport, OverrunReport, Report, TermReport,
    TimelineEntry,
};

use switchover::message::Side;

use crate::units::{show_bytes, show_ms};

/// Memory and device state were compared and equal.
pub fn is_identical(report: &Report) -> bool {
    let devices = report.devices.is_empty() || report.device_state_identical == Some(true);
    report.memory_identical == Some(true) && devices
}

/// The whole report.
pub fn text(report: &Report, guest: Option<&str>) -> String {
    let mut out = String::new();
    timeline(&mut out, &report.timeline);
    summary(&mut out, report, guest);
    blackout(&mut out, &report.terms);
    parts(&mut out, report.blackout_timeline.as_ref());
    ram(&mut out, report);
    devices(&mut out, &report.devices);
    cost(&mut out, Side::Source, report.source_cost);
    cost(&mut out, Side::Destination, report.destination_cost);
    if let Some(failure) = &report.failure {
        line(&mut out, &format!("why: {failure}"));
    }
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

fn timeline(out: &mut String, entries: &[TimelineEntry]) {
    if entries.is_empty() {
        return;
    }
    line(out, "      at ms  where        what");
    for entry in entries {
        let side = entry.side.to_string();
        line(out, &format!("{:>11.3}  {side:<11}  {} {}", entry.at_ms, entry.event, entry.detail));
    }
    line(out, "");
}

fn summary(out: &mut String, report: &Report, guest: Option<&str>) {
    let guest = guest.map(|guest| format!(" ({guest} guest)")).unwrap_or_default();
    line(out, &format!("{}{guest} in {}", report.status, show_ms(Some(report.total_time_ms))));
    if report.status == "dry-run" {
        line(out, "the destination fits: memory, CPUs, devices and state; nothing was moved");
        return;
    }
    if report.switchover_attempts > 0 {
        downtime(out, report);
    }
    if report.status != "completed" && report.memory_identical.is_none() {
        return;
    }
    line(
        out,
        &format!(
            "verification: memory {}, device state {}",
            identical(report.memory_identical),
            identical(report.device_state_identical),
        ),
    );
}

fn downtime(out: &mut String, report: &Report) {
    let held = report.verification_ms;
    let own = report.downtime_ms.map(|all| (all - held.unwrap_or(0.0)).max(0.0));
    line(
        out,
        &format!(
            "downtime: {} measured, {} expected{}, limit {}{}{}; seen by the guest {}",
            show_ms(own),
            show_ms(report.expected_downtime_ms),
            at_most(report),
            show_ms(Some(report.downtime_limit_ms)),
            held.map(|_| ", verification apart").unwrap_or_default(),
            own.filter(|own| *own > report.downtime_limit_ms)
                .map(|own| format!(", MISSED by {}", show_ms(Some(own - report.downtime_limit_ms))))
                .unwrap_or_default(),
            show_ms(report.guest_observed_downtime_ms),
        ),
    );
    if held.is_some() {
        line(
            out,
            &format!(
                "  and {} held before Commit, only to hash everything on both sides: {} in all",
                show_ms(held),
                show_ms(report.downtime_ms),
            ),
        );
    }
    line(
        out,
        &format!(
            "switchovers: {} tried, {} revoked, {} absorbed new initial data",
            report.switchover_attempts,
            report.switchover_revocations,
            report.switchover_absorptions,
        ),
    );
    if report.switchover_roll_backs > 0 {
        let what =
            format!("{} of those revoked had to be rolled back", report.switchover_roll_backs);
        line(out, &what);
    }
    if report.cpu_throttle_percentage > 0 {
        let percent = report.cpu_throttle_percentage;
        line(
            out,
            &format!(
                "auto-converge: vCPUs throttled by up to {percent} %, no part of the downtime"
            ),
        );
    }
    for BlackoutReport { ms, ended, cause } in &report.source_blackouts {
        let missed = if *ms > report.downtime_limit_ms { ", LIMIT MISSED" } else { "" };
        let time = show_ms(Some(*ms));
        line(out, &format!("stood still for {time}{missed} and went on here, {ended}: {cause}"));
    }
    for OverrunReport { device, call, ms, bound_ms } in &report.overruns {
        let device = device.as_ref().map(|id| format!("device {id}, ")).unwrap_or_default();
        let (time, bound) = (show_ms(Some(*ms)), show_ms(Some(*bound_ms)));
        line(out, &format!("overrun: {device}{call} took {time}, its bound is {bound}"));
    }
}

/// ` (P99 200 ms, from history 30)`
fn at_most(report: &Report) -> String {
    let Some(upper) = report.expected_downtime_upper_ms else { return String::new() };
    let (level, basis) = (report.confidence_percent, &report.expected_downtime_basis);
    format!(" (P{level} {}, from {basis})", show_ms(Some(upper)))
}

fn identical(verdict: Option<bool>) -> &'static str {
    match verdict {
        Some(true) => "identical",
        Some(false) => "NOT IDENTICAL",
        None => "not compared",
    }
}

fn blackout(out: &mut String, terms: &[TermReport]) {
    if terms.is_empty() {
        return;
    }
    line(out, "");
    line(out, "blackout                expected     at most    measured  expected from");
    for term in terms {
        line(
            out,
            &format!(
                "  {:<18} {:>11} {:>11} {:>11}  {}",
                term.name,
                show_ms(term.expected_ms),
                show_ms(term.expected_upper_ms),
                term.measured_ms.map_or("-".into(), |ms| show_ms(Some(ms))),
                term.basis,
            ),
        );
    }
}

/// Every part of the blackout, in order.
fn parts(out: &mut String, blackout: Option<&BlackoutTimeline>) {
    let Some(blackout) = blackout else { return };
    line(out, "");
    line(
        out,
        &format!(
            "blackout of {:.0} us, part by part ({:.1} % accounted for; work: the call itself, without the way \
             between threads)",
            blackout.total_us, blackout.accounted_percent,
        ),
    );
    line(out, "       at us        us      work  where        what");
    for part in &blackout.parts {
        let work = part.work_us.map_or("-".into(), |work| format!("{work:.1}"));
        let side = part.side.to_string();
        line(
            out,
            &format!(
                "  {:>10.1} {:>9.1} {work:>9}  {side:<11}  {}",
                part.at_us, part.us, part.name
            ),
        );
    }
}

fn ram(out: &mut String, report: &Report) {
    let ram = &report.ram;
    if ram.total == 0 {
        return;
    }
    if let Some(bytes) = ram.handed_over {
        line(out, "");
        let took = show_ms(ram.map_time_ms);
        let bytes = show_bytes(bytes);
        return line(
            out,
            &format!("memory: {bytes} handed over, mapped and pinned there in {took}"),
        );
    }
    let packed = match ram.compressed {
        0 => String::new(),
        pages => format!(" ({pages} of them compressed to {})", show_bytes(ram.compressed_size)),
    };
    let rate = ram.mbps.map(|mbps| format!(", {mbps:.0} Mbit/s")).unwrap_or_default();
    line(out, "");
    line(
        out,
        &format!(
            "memory: {} of {} sent{rate}, {} channels; {} pages with content{packed}, {} zero, {} syncs",
            show_bytes(ram.transferred),
            show_bytes(ram.total),
            ram.channels,
            ram.normal,
            ram.duplicate,
            ram.dirty_sync_count,
        ),
    );
    if let (Some(bytes), Some(ms)) = (ram.populated, ram.populate_time_ms) {
        let what = format!(
            "  {} populated there, {} of its threads' time",
            show_bytes(bytes),
            show_ms(Some(ms))
        );
        line(out, &what);
    }
}

fn devices(out: &mut String, devices: &[DeviceReport]) {
    for device in devices {
        line(
            out,
            &format!(
                "device {}: initial {}, dirty {}, stopped {}; {} re-initialised ({} late), {} acknowledged",
                device.id,
                show_bytes(device.initial_bytes),
                show_bytes(device.dirty_bytes),
                show_bytes(device.stop_copy_bytes),
                device.reinits,
                device.late_reinits,
                device.acks,
            ),
        );
        if let Some(lost) = &device.lost {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "device {} LOST: {lost}", device.id);
        }
    }
}

fn cost(out: &mut String, side: Side, cost: Option<CostReport>) {
    let Some(cost) = cost else { return };
    line(
        out,
        &format!(
            "cost of the {side}: {} of CPU time (data {}, devices {}, control {}, populating {}), {} beyond the guest's \
             memory",
            show_ms(Some(cost.cpu_time_ms)),
            show_ms(Some(cost.data_ms)),
            show_ms(Some(cost.devices_ms)),
            show_ms(Some(cost.control_ms)),
            show_ms(Some(cost.populate_ms)),
            show_bytes(cost.memory_peak),
        ),
    );
}

#[cfg(test)]
mod tests {
    use migration::report::RamReport;
    use switchover::message::Failure;

    use super::*;

    fn report() -> Report {
        Report {
            status: "completed".into(),
            downtime_limit_ms: 300.0,
            expected_downtime_ms: Some(180.0),
            downtime_ms: Some(143.21),
            total_time_ms: 2500.0,
            switchover_attempts: 2,
            switchover_revocations: 1,
            switchover_roll_backs: 1,
            expected_downtime_upper_ms: Some(270.0),
            expected_downtime_basis: "history 30".into(),
            confidence_percent: 99.0,
            source_blackouts_ms: vec![4.25],
            source_blackouts: vec![BlackoutReport {
                ms: 4.25,
                ended: "rolled-back".into(),
                cause: "device nic0 took too long".into(),
            }],
            overruns: vec![OverrunReport {
                device: Some("nic0".into()),
                call: "StopCopy".into(),
                ms: 40.0,
                bound_ms: 25.0,
            }],
            ram: RamReport { total: 1 << 30, transferred: 3 << 29, ..RamReport::default() },
            devices: vec![DeviceReport {
                id: "nic0".into(),
                reinits: 1,
                ..DeviceReport::default()
            }],
            memory_identical: Some(true),
            terms: vec![TermReport {
                name: "pause".into(),
                expected_ms: None,
                expected_upper_ms: None,
                basis: "unknown".into(),
                measured_ms: Some(0.2),
            }],
            timeline: vec![TimelineEntry {
                at_ms: 1200.5,
                side: Side::Source,
                event: "revoked".into(),
                detail: String::new(),
            }],
            ..Report::default()
        }
    }

    #[test]
    fn a_person_finds_the_promise_the_proof_and_the_revocation() {
        let text = text(&report(), Some("kvm"));
        for part in [
            "   1200.500  source       revoked\n",
            "completed (kvm guest) in 2500 ms\n",
            "143 ms measured, 180 ms expected (P99 270 ms, from history 30), limit 300 ms; seen by the guest",
            "2 tried, 1 revoked",
            "1 of those revoked had to be rolled back",
            "stood still for 4.2 ms and went on here, rolled-back: device nic0 took too long\n",
            "overrun: device nic0, StopCopy took 40.0 ms, its bound is 25.0 ms\n",
            "memory identical, device state not compared",
            "pause                  unknown     unknown      0.2 ms  unknown",
            "1.5 GiB of 1.0 GiB sent",
            "device nic0: initial 0 B",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!is_identical(&report()));
    }

    #[test]
    fn every_part_of_the_blackout_is_shown_in_microseconds() {
        let part = |side, name: &str, at_us, us, work_us| migration::report::BlackoutPart {
            side,
            name: name.into(),
            at_us,
            us,
            work_us,
        };
        let parts = vec![
            part(Side::Source, "pause", 0.0, 53.25, Some(20.0)),
            part(Side::Destination, "validate", 53.25, 1200.0, None),
        ];
        let blackout = BlackoutTimeline { total_us: 1253.25, accounted_percent: 97.5, parts };
        let text = text(&Report { blackout_timeline: Some(blackout), ..report() }, None);
        for part in [
            "blackout of 1253 us, part by part (97.5 % accounted for",
            "         0.0      53.2      20.0  source       pause\n",
            "        53.2    1200.0         -  destination  validate\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn what_it_cost_is_said_of_each_side_that_told() {
        let cost = CostReport {
            cpu_time_ms: 412.0,
            data_ms: 400.0,
            devices_ms: 9.5,
            control_ms: 2.5,
            populate_ms: 0.0,
            memory_peak: 3 << 20,
        };
        let text = text(&Report { source_cost: Some(cost), ..report() }, None);
        let told = "cost of the source: 412 ms of CPU time (data 400 ms, devices 9.5 ms, control 2.5 ms, populating 0.0 ms), \
                    3.0 MiB beyond the guest's memory\n";
        assert!(text.contains(told), "{text}");
        assert!(!text.contains("cost of the destination"), "{text}");
    }

    #[test]
    fn a_limit_that_was_missed_is_said_to_be() {
        let missed = Report { downtime_ms: Some(341.0), ..report() };
        assert!(text(&missed, None).contains("limit 300 ms, MISSED by 41.0 ms; seen"));
        let verified = Report { verification_ms: Some(100.0), ..missed };
        assert!(!text(&verified, None).contains("MISSED"), "verification is not the move's doing");
    }

    #[test]
    fn what_never_came_to_a_switchover_speaks_of_none() {
        let cancelled =
            Report { status: "cancelled".into(), total_time_ms: 20.0, ..Report::default() };
        assert_eq!(text(&cancelled, None), "cancelled in 20.0 ms\n");
        let fits = Report { status: "dry-run".into(), ..cancelled };
        assert!(text(&fits, None).contains("the destination fits"));
    }

    #[test]
    fn a_failure_is_told_with_its_remedy() {
        let failure = Failure::new(Side::Destination, "it broke").device("nic0").remedy("mend it");
        let report = Report {
            status: "failed".into(),
            failure: Some(failure),
            memory_identical: Some(false),
            ..report()
        };
        let text = text(&report, None);
        assert!(text.ends_with("why: destination, device nic0: it broke; mend it\n"), "{text}");
        assert!(text.contains("memory NOT IDENTICAL"), "{text}");
    }
}
