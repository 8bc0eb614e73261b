//! A report as JUnit XML, the form CI systems read.

use std::fmt::Write;

use crate::verdict::{Report, Verdict};

/// The report as one test suite, a rule being a test case.
pub fn to_xml(report: &Report) -> String {
    let total = report.rules.len();
    let (failed, skipped) =
        (report.summary.failed, total - report.summary.passed - report.summary.failed);
    let ms = report.rules.iter().map(|rule| rule.took_ms).sum::<u64>();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a String cannot fail.
    let _ = writeln!(
        xml,
        "<testsuite name=\"{}\" tests=\"{total}\" failures=\"{failed}\" errors=\"0\" skipped=\"{skipped}\" time=\"{}\">",
        escape(&format!("VFIO migration conformance: {}", report.device.name)),
        seconds(ms)
    );
    for rule in &report.rules {
        let _ = write!(
            xml,
            "  <testcase classname=\"{}\" name=\"{} {}\" time=\"{}\"",
            escape(&report.device.name),
            rule.id,
            escape(rule.statement),
            seconds(rule.took_ms)
        );
        let _ = match &rule.verdict {
            Verdict::Pass => writeln!(xml, "/>"),
            Verdict::Fail { expected, got } => writeln!(
                xml,
                ">\n    <failure message=\"{}\">{}</failure>\n  </testcase>",
                escape(&format!("got {got}")),
                escape(&format!("expected: {expected}\ngot: {got}\nsource: {}", rule.source))
            ),
            Verdict::NotApplicable { why } => {
                writeln!(xml, "><skipped message=\"not applicable: {}\"/></testcase>", escape(why))
            }
            Verdict::Skipped { why } | Verdict::Untestable { why } => {
                writeln!(xml, "><skipped message=\"{}\"/></testcase>", escape(why))
            }
        };
    }
    xml.push_str("</testsuite>\n");
    xml
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// Text inside of an attribute or element. Characters that XML cannot hold are replaced.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            c if c < ' ' || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::{About, Kind};
    use crate::verdict::RuleReport;

    #[test]
    fn what_a_device_says_cannot_break_the_document() {
        let about = About { kind: Kind::VfioUser, name: "a<\"&".into(), opened: String::new() };
        let rule = &crate::rules::all()[0];
        let verdict = Verdict::Fail { expected: "x".into(), got: "]]>\u{0}<b>".into() };
        let xml = to_xml(&Report::new(about, vec![RuleReport::new(rule, verdict, 1234)], None));
        assert!(xml.contains("failures=\"1\"") && xml.contains("time=\"1.234\""), "{xml}");
        assert!(
            xml.contains("a&lt;&quot;&amp;") && xml.contains("]]&gt;\u{fffd}&lt;b&gt;"),
            "{xml}"
        );
    }
}
