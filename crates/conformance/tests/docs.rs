//! `docs/conformance.md` is what the rules say of themselves.

use std::fmt::Write;
use std::path::Path;

use conformance::rule::group;
use conformance::{Rule, Testing, rules};

const INTRODUCTION: &str = "# The conformance check

`vmferry device check DEVICE` tests a driver or server of VFIO migration v2 against the rules below: any device of the
kernel (`vfio:0000:65:00.1`, a mediated device's UUID, `/dev/vfio/devices/vfio0`) or any vfio-user server
(`vfio-user:/tmp/nic.sock`). It is made for the authors of such drivers and servers; nothing of vmferry has to be known.

```sh
vmferry device check vfio-user:/tmp/nic.sock                # the table, with what to fix
vmferry device check vfio:0000:65:00.1 --destructive        # also data that is no device's state
vmferry device check vfio:0000:65:00.1 --only F,S1-S4       # some rules
vmferry device check vfio:0000:65:00.1 --json --junit report.xml
```

**The device must be a spare one**: it is reset before each rule, its state is lost, and it is left in RUNNING.

| verdict | means |
|---|---|
| pass | the device obeys |
| FAIL | it does not: what was expected, what came, where the rule comes from, what to do about it |
| n/a | the rule is not about this device: it lacks the feature, or vfio-user has no such thing |
| skip | not tested, or not to the end, and why. Where one rule's failure keeps another from being tested, the other one is skipped and names it: one fault is one failure |

Exit status: 0 no rule failed, 1 a rule failed, 2 the check could not run.

**It ends.** Every rule has a time limit of its own (`--time-limit` sets one for all). A call that does not return fails its
rule, by name, and while it hangs the rest is skipped. Streams are read up to `--stream-limit`. Nothing a device reports
is taken for a size of memory.

**A guest's part.** Some rules need a device that works: writes memory, changes its state, reconfigures itself. The check
knows how to make the project's own devices do that (docs/workload.md). Of another device it is told one thing, a 32-bit
write to a BAR after which the device has new initial data: `--reinit-write BAR:OFFSET:VALUE`. What is not known is
skipped.

**vfio-user.** A server has no data fd, keeps its device's state from one client to the next, and answers size 0 at the
temporary end of PRE_COPY as well as at the end of STOP_COPY. Rules about those are not applicable. PRECOPY_INFO, its v2 and
MIG_DATA_SIZE are tested where the server announces them (docs/vfio-user.md).

**What proves the check.** Each rule names what is known to fail it: a quirk of `vmferry device serve`, a quirk of the
lab's kernel driver (ferrydev), or the kernel's sample driver (mtty). `crates/conformance/tests/proof.rs` asserts that every
quirk fails exactly its rules, and that a device without quirk fails none; the lab does the same on a real kernel. A rule
that nothing is known to fail is marked *unproven*, one that cannot be tested from outside *untestable*.

This table is generated from the code: `BLESS=1 cargo test -p conformance --test docs` writes it anew.
";

fn row(rule: &Rule) -> String {
    let Rule { id, statement, source, .. } = rule;
    let how = match rule.testing {
        Testing::Untestable { why } => format!("*untestable*: {why}"),
        Testing::Checked { destructive, .. } => {
            let mut proofs: Vec<_> =
                rule.proofs().iter().map(|proof| format!("`{proof}`")).collect();
            if proofs.is_empty() {
                proofs.push("*unproven*".into());
            }
            let destructive = if destructive { " (destructive)" } else { "" };
            proofs.join(", ") + destructive
        }
    };
    format!("| {id} | {statement} | {source} | {how} |\n")
}

fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    let mut letter = None;
    for rule in rules::all() {
        if letter != Some(rule.letter()) {
            letter = Some(rule.letter());
            write!(page, "\n## {}: {}\n\n", rule.letter(), group(rule.letter())).unwrap();
            page += "| rule | statement | source | fails with |\n|---|---|---|---|\n";
        }
        page += &row(rule);
    }
    page
}

#[test]
fn the_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/conformance.md");
    let page = page();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/conformance.md is not what the rules say; run this with BLESS=1"
    );
}

#[test]
fn the_catalogue_is_in_order_and_in_one_line_each() {
    let all = rules::all();
    for pair in all.windows(2) {
        let [first, second] = pair else { continue };
        let next = first.letter() == second.letter() && first.number() + 1 == second.number();
        let fresh = first.letter() != second.letter() && second.number() == 1;
        assert!(next || fresh, "{} follows {}", second.id, first.id);
    }
    for rule in all {
        for text in [rule.statement, rule.source, rule.fix] {
            assert!(!text.contains(['\n', '|']) && text.len() <= 110, "{}: {text}", rule.id);
        }
        let checked = matches!(rule.testing, Testing::Checked { .. });
        assert_eq!(checked, !rule.fix.is_empty(), "{}", rule.id);
    }
}
