//! What the check finds is what is wrong, and nothing else.

mod common;

use conformance::{Options, Proof, Rule, Testing, rules};

use common::{check, everything, serve, table};

/// Kind of device, quirks (and what the server does not offer), and exactly the rules that fail.
const CASES: &[(&str, &[&str], &[&str])] = &[
    ("mlx5-vf", &[], &[]),
    ("qat", &[], &[]),
    ("virtio-vf", &[], &[]),
    ("mlx5-vf", &["no-p2p"], &[]),
    ("mlx5-vf", &["no-precopy"], &[]),
    ("mlx5-vf", &["no-p2p", "no-precopy"], &[]),
    ("mlx5-vf", &["no-reinit"], &[]),
    ("mlx5-vf", &["no-data-size"], &[]),
    ("mlx5-vf", &["no-logging"], &[]),
    // Rules broken on purpose.
    ("mlx5-vf", &["break-D1"], &["D1", "D2"]),
    ("mlx5-vf", &["break-D2"], &["D2"]),
    ("mlx5-vf", &["break-D3"], &["D3"]),
    ("mlx5-vf", &["break-D4"], &["D4"]),
    ("mlx5-vf", &["break-D5"], &["D5"]),
    ("mlx5-vf", &["break-D6"], &["D6"]),
    ("mlx5-vf", &["break-F1"], &["F1"]),
    ("mlx5-vf", &["break-F2"], &["F2"]),
    ("mlx5-vf", &["break-F3"], &["F3"]),
    ("mlx5-vf", &["no-p2p", "break-F4"], &["F4"]),
    ("mlx5-vf", &["no-precopy", "break-F4"], &["F4"]),
    ("mlx5-vf", &["break-F5"], &["F5"]),
    ("mlx5-vf", &["break-F6"], &["F6"]),
    ("mlx5-vf", &["break-F7"], &["F7"]),
    ("mlx5-vf", &["break-F8"], &["F8"]),
    ("mlx5-vf", &["no-p2p", "break-F9"], &["F9"]),
    ("mlx5-vf", &["break-F10"], &["F10"]),
    ("mlx5-vf", &["break-F13"], &["F13"]),
    ("mlx5-vf", &["break-F14"], &["F14"]),
    ("mlx5-vf", &["break-X2"], &["X2"]),
    ("mlx5-vf", &["break-X4"], &["X4"]),
    ("mlx5-vf", &["break-X5"], &["X5"]),
    ("mlx5-vf", &["break-X6"], &["X6"]),
    ("mlx5-vf", &["break-X8"], &["F14", "X8"]),
    ("mlx5-vf", &["break-S3"], &["S3"]),
    ("mlx5-vf", &["break-S4"], &["S4"]),
    ("mlx5-vf", &["break-S8"], &["S8"]),
    ("mlx5-vf", &["break-P3"], &["P3"]),
    ("mlx5-vf", &["break-P5"], &["P5"]),
    ("mlx5-vf", &["break-P6"], &["P6"]),
    ("mlx5-vf", &["break-P8"], &["P8"]),
    ("mlx5-vf", &["break-R1"], &["R1"]),
    ("mlx5-vf", &["break-R2"], &["R2"]),
    ("mlx5-vf", &["break-R3"], &["R3"]),
    ("mlx5-vf", &["break-R4"], &["R4"]),
    ("mlx5-vf", &["break-R5"], &["R5"]),
    ("mlx5-vf", &["break-R6"], &["R6"]),
    ("mlx5-vf", &["break-R7"], &["R7"]),
    ("mlx5-vf", &["break-R8"], &["R8"]),
    ("mlx5-vf", &["break-Z4"], &["Z4"]),
    ("mlx5-vf", &["break-H3"], &["H3"]),
    ("mlx5-vf", &["break-L1"], &["L1"]),
    ("mlx5-vf", &["break-L2"], &["L2"]),
    ("mlx5-vf", &["break-L3"], &["L3"]),
    ("mlx5-vf", &["break-L4"], &["L4"]),
    ("mlx5-vf", &["break-L5"], &["L5"]),
    ("mlx5-vf", &["break-L6"], &["L6"]),
    ("mlx5-vf", &["break-L7"], &["L7"]),
    ("mlx5-vf", &["break-L8"], &["L8"]),
    // What real drivers and servers do.
    ("mlx5-vf", &["no-migration"], &[]),
    ("mlx5-vf", &["caller-flags-back"], &[]),
    ("mlx5-vf", &["one-size-field"], &["P9"]),
    // Not to be seen on vfio-user, where size 0 stands for both.
    ("mlx5-vf", &["zero-at-temporary-end"], &[]),
    ("mlx5-vf", &["no-info-in-p2p"], &["P2"]),
    ("mlx5-vf", &["info-drives-device"], &[]),
    ("mlx5-vf", &["hidden-save-failure"], &[]),
    ("mlx5-vf", &["stay-in-resuming"], &[]),
    ("mlx5-vf", &["reset-keeps-state"], &["H5", "X9"]),
    ("mlx5-vf", &["size=garbage"], &["P4", "R5", "Z3"]),
    ("mlx5-vf", &["size=zero"], &["Z3"]),
    ("mlx5-vf", &["size=under"], &["Z2"]),
    ("mlx5-vf", &["size=fails"], &["Z1"]),
    ("mlx5-vf", &["info-fails"], &["P1"]),
    ("mlx5-vf", &["short-reads=512"], &[]),
    ("mlx5-vf", &["reinit-storm=3"], &[]),
    ("mlx5-vf", &["enomsg-forever"], &["P4"]),
    ("mlx5-vf", &["grow-after-stop=64"], &[]),
    ("mlx5-vf", &["corrupt-save"], &["S5"]),
    ("mlx5-vf", &["dma-log-blind"], &["L10"]),
    ("mlx5-vf", &["lose-interrupts"], &["S5"]),
    ("mlx5-vf", &["bad-load-errors"], &[]),
    ("mlx5-vf", &["fail-arc=resuming-stop"], &["F8", "S5"]),
    ("mlx5-vf", &["fail-arc=pre_copy-running"], &["F8"]),
    ("mlx5-vf", &["slow-arc=pre_copy_p2p:20"], &[]),
    ("mlx5-vf", &["libvfio-user"], &["H5", "L2", "L4", "L6", "X9"]),
    ("mlx5-vf", &["as-driver"], &["P9"]),
    ("qat", &["as-driver"], &[]),
    ("virtio-vf", &["as-driver"], &["P9"]),
];

/// Rules that no quirk over vfio-user fails; those with another proof are tried in the lab.
const NOT_OVER_VFIO_USER: &[&str] = &["D7", "F11", "F12", "X1", "X3", "S1", "S2"];
/// Rules whose test nothing is known to fail.
const UNPROVEN: &[&str] = &["F11"];

#[test]
fn every_rule_has_a_quirk_that_fails_it_or_is_listed() {
    let ids = |wanted: fn(&Rule) -> bool| -> Vec<_> {
        rules::all().into_iter().filter(|rule| wanted(rule)).map(|rule| rule.id).collect()
    };
    assert_eq!(ids(Rule::is_unproven), UNPROVEN);
    let by_quirk = |rule: &Rule| rule.proofs().iter().any(|proof| matches!(proof, Proof::Quirk(_)));
    let checked = |rule: &Rule| matches!(rule.testing, Testing::Checked { .. });
    let others: Vec<_> = rules::all()
        .into_iter()
        .filter(|rule| checked(rule) && !by_quirk(rule))
        .map(|rule| rule.id)
        .collect();
    assert_eq!(others, NOT_OVER_VFIO_USER);
    for rule in rules::all() {
        for proof in rule.proofs() {
            let Proof::Quirk(name) = proof else { continue };
            let fails = |(_, quirks, failed): &&(_, &[&str], &[&str])| {
                quirks.contains(name) && failed.contains(&rule.id)
            };
            assert!(CASES.iter().any(|case| fails(&case)), "{name} is not tried for {}", rule.id);
        }
    }
}

#[test]
fn each_quirk_fails_exactly_its_rules() {
    let mut wrong = String::new();
    let only = std::env::var("CONFORMANCE_QUIRK").ok();
    for (profile, quirks, expected) in CASES {
        if only.as_ref().is_some_and(|only| !quirks.contains(&only.as_str())) {
            continue;
        }
        let start = std::time::Instant::now();
        // A storm has no end.
        let options = Options { stream_max_bytes: 8 << 20, ..everything() };
        let report = check(&serve(profile, quirks), &options);
        let mut failed = report.failed();
        failed.sort_unstable();
        println!("{profile} {quirks:?} {:?}: {failed:?}", start.elapsed());
        if failed != *expected || report.not_usable.is_some() {
            println!(
                "WRONG {profile} {quirks:?}: {failed:?}, not {expected:?} {:?}",
                report.not_usable
            );
            wrong += &format!(
                "{profile} {quirks:?}: {failed:?}, not {expected:?}\n{}\n",
                table(&report)
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
