//! `vmferry device check`.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use conformance::kernel::KernelSubject;
use conformance::rule::group;
use conformance::runner::Progress;
use conformance::vfio_user::VfioUserSubject;
use conformance::{
    Options, Report, Rule, RuleReport, Subject, Testing, Verdict, junit, rules, run,
};
use microvm::DeviceBackend;
use serde_json::{Value, json};

use super::apart;
use crate::cli::{CheckArgs, LogFormat};
use crate::logging;
use crate::signals::Signals;

/// The exit status of a check that could not run.
const TROUBLE: u8 = 2;
/// Where the text of a row begins.
const INDENT: &str = "           ";

/// As `check`. A device of the kernel is tested by a process of its own, because a call that hangs in a driver
/// would keep the process from ending.
pub fn check_apart(args: &CheckArgs) -> anyhow::Result<bool> {
    let here = || -> anyhow::Result<bool> {
        // Before the first thread, which would not have them blocked.
        let signals = Signals::take()?;
        let _logs = logging::start(LogFormat::Text)?;
        check(args, &signals)
    };
    if args.list || !matches!(args.device, Some(DeviceBackend::Vfio(_))) {
        return here();
    }
    let status = apart::run(|| match here() {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            eprintln!("vmferry: {}", crate::sentence(&error));
            TROUBLE
        }
    })?;
    match status {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        // It has said why.
        Some(status) => std::process::exit(status.into()),
        None => anyhow::bail!("the process of the check died"),
    }
}

/// Tests a device; `false` when a rule failed.
fn check(args: &CheckArgs, signals: &Signals) -> anyhow::Result<bool> {
    let options = Options {
        only: args.only.clone(),
        skip: args.skip.clone(),
        destructive: args.destructive,
        stream_max_bytes: args.stream_limit,
        time_limit: args.time_limit,
        reinit_write: args.reinit_write,
        ..Options::default()
    };
    if args.list {
        return list(&options, args.json);
    }
    let device = args.device.as_ref().context("name a device")?;
    let subject = open(device)?;
    let mut out = io::stdout().lock();
    let mut failed_to_print = None;
    let mut letter = None;
    if !args.json {
        let about = subject.about();
        writeln!(out, "{} ({})", about.name, about.opened)?;
    }
    let report = run(subject, &options, |progress| {
        if let (Progress::Done(rule), false) = (progress, args.json)
            && let Err(error) = print_row(&mut out, rule, &mut letter)
        {
            failed_to_print.get_or_insert(error);
        }
        if signals.count() > 1 {
            // The device is left as it is.
            std::process::exit(TROUBLE.into());
        }
        match signals.any() || failed_to_print.is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    if let Some(path) = &args.junit {
        write_junit(path, &report)?;
    }
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        print_end(&mut out, &report)?;
    }
    out.flush()?;
    if let Some(error) = failed_to_print {
        return Err(error).context("print the table");
    }
    if signals.any() {
        anyhow::bail!("interrupted");
    }
    match (report.summary.failed, report.not_usable) {
        (0, Some(why)) => anyhow::bail!("the check did not come to its end: {why}"),
        (failed, _) => Ok(failed == 0),
    }
}

fn open(device: &DeviceBackend) -> anyhow::Result<Box<dyn Subject>> {
    Ok(match device {
        DeviceBackend::VfioUser(path) => Box::new(VfioUserSubject::open(path)?),
        DeviceBackend::Vfio(spec) => Box::new(KernelSubject::open(spec)?),
    })
}

/// A rule's row, below the heading of its letter.
fn print_row(out: &mut impl Write, rule: &RuleReport, letter: &mut Option<char>) -> io::Result<()> {
    let of = rule.id.chars().next();
    if matches!(rule.verdict, Verdict::Untestable { .. }) {
        return Ok(());
    }
    if *letter != of {
        *letter = of;
        let of = of.unwrap_or('?');
        writeln!(out, "\n{of}  {}", group(of))?;
    }
    writeln!(out, "  {:<4} {:<4} {}", rule.id, rule.verdict.word(), rule.statement)?;
    match &rule.verdict {
        Verdict::Fail { expected, got } => {
            writeln!(out, "{INDENT}expected  {}", one_line(expected))?;
            writeln!(out, "{INDENT}got       {}", one_line(got))?;
            writeln!(out, "{INDENT}source    {}", rule.source)?;
            if !rule.fix.is_empty() {
                writeln!(out, "{INDENT}to fix    {}", rule.fix)?;
            }
        }
        Verdict::NotApplicable { why } | Verdict::Skipped { why } => {
            writeln!(out, "{INDENT}{}", one_line(why))?;
        }
        Verdict::Pass | Verdict::Untestable { .. } => {}
    }
    out.flush()
}

/// What a device says stays on its line, and does not steer a terminal.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn print_end(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let untestable: Vec<_> = report
        .rules
        .iter()
        .filter(|rule| matches!(rule.verdict, Verdict::Untestable { .. }))
        .map(|rule| rule.id)
        .collect();
    if !untestable.is_empty() {
        writeln!(
            out,
            "\nnot to be tested from outside: {} (--list says why)",
            untestable.join(", ")
        )?;
    }
    if let Some(why) = &report.not_usable {
        writeln!(out, "\nthe device is not usable: {}", one_line(why))?;
    }
    let summary = report.summary;
    writeln!(
        out,
        "\n{} passed, {} failed, {} not applicable, {} skipped",
        summary.passed, summary.failed, summary.not_applicable, summary.skipped
    )
}

fn write_junit(path: &Path, report: &Report) -> anyhow::Result<()> {
    std::fs::write(path, junit::to_xml(report))
        .with_context(|| format!("write the JUnit report {}", path.display()))
}

fn list(options: &Options, as_json: bool) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    let selected = options.selected();
    if as_json {
        let all: Vec<Value> = selected.into_iter().map(to_json).collect();
        serde_json::to_writer_pretty(&mut out, &all)?;
        writeln!(out)?;
        return Ok(true);
    }
    let mut letter = None;
    for rule in selected {
        if letter != Some(rule.letter()) {
            letter = Some(rule.letter());
            writeln!(out, "\n{}  {}", rule.letter(), group(rule.letter()))?;
        }
        writeln!(out, "  {:<4} {}", rule.id, rule.statement)?;
        writeln!(out, "       source: {}", rule.source)?;
        writeln!(out, "       {}", how(rule))?;
    }
    let all = rules::all();
    let untestable =
        all.iter().filter(|rule| matches!(rule.testing, Testing::Untestable { .. })).count();
    let unproven = all.iter().filter(|rule| rule.is_unproven()).count();
    writeln!(out, "\n{} rules, {untestable} of them untestable, {unproven} unproven", all.len())?;
    Ok(true)
}

/// How a rule is tested, in a line.
fn how(rule: &Rule) -> String {
    match rule.testing {
        Testing::Untestable { why } => format!("untestable: {why}"),
        Testing::Checked { destructive, .. } => {
            let proofs: Vec<_> = rule.proofs().iter().map(ToString::to_string).collect();
            let proofs = match proofs.is_empty() {
                true => "unproven: nothing is known to fail it".into(),
                false => format!("known to fail it: {}", proofs.join(", ")),
            };
            if destructive { format!("{proofs}; destructive") } else { proofs }
        }
    }
}

fn to_json(rule: &Rule) -> Value {
    let Rule { id, statement, source, fix, testing } = *rule;
    let proofs: Vec<_> = rule.proofs().iter().map(ToString::to_string).collect();
    let (testing, destructive, limit_s, why) = match testing {
        Testing::Untestable { why } => ("untestable", false, None, Some(why)),
        Testing::Checked { destructive, limit_s, .. } => {
            let word = if rule.is_unproven() { "unproven" } else { "proven" };
            (word, destructive, Some(limit_s), None)
        }
    };
    json!({
        "id": id,
        "statement": statement,
        "source": source,
        "fix": fix,
        "testing": testing,
        "why": why,
        "destructive": destructive,
        "time-limit-s": limit_s,
        "fails-with": proofs,
    })
}
