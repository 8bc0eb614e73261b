//! A plan for people.

use std::fmt::Write;

use planner::Plan;

use crate::units::show_ms;

/// Rows side by side, then what dominates and why what did not complete did not.
pub fn text<'a>(title: &str, rows: impl Iterator<Item = (&'a str, &'a Plan)>) -> String {
    let rows: Vec<_> = rows.collect();
    let mut out = format!("{title}\n\n");
    let header = [
        "",
        "limit",
        "completed",
        "limit kept",
        "P50",
        "P99",
        "max",
        "predicted P99",
        "taken back",
        "total P50",
    ];
    let mut cells = vec![header.map(str::to_owned)];
    for (what, plan) in &rows {
        let ms = |pick: fn(&planner::plan::Quantiles) -> f64| {
            plan.downtime.as_ref().map_or("-".into(), |q| show_ms(Some(pick(q))))
        };
        let share = |n: u64| format!("{:.1} %", n as f64 * 100.0 / plan.runs.max(1) as f64);
        cells.push([
            format!("{what}{}", if plan.mode == "strict" { ", strict" } else { "" }),
            show_ms(Some(plan.limit_ms)),
            share(plan.completed),
            share(plan.kept),
            ms(|q| q.p50_ms),
            ms(|q| q.p99_ms),
            ms(|q| q.max_ms),
            plan.predicted.map_or("-".into(), |q| show_ms(Some(q.p50_ms))),
            format!("{:.2}", plan.revocations),
            plan.total_time.map_or("-".into(), |q| show_ms(Some(q.p50_ms))),
        ]);
    }
    let widths: Vec<usize> = (0..header.len())
        .map(|column| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in &cells {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right. Writing to a String cannot fail.
            let _ = match column {
                0 => write!(out, "{cell:<width$}"),
                _ => write!(out, "  {cell:>width$}"),
            };
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    for (what, plan) in &rows {
        let _ = writeln!(
            out,
            "\n{what}: {} migrations, seeds from {}{}",
            plan.runs,
            plan.seed,
            if plan.stopped { ", stopped" } else { "" }
        );
        for line in words(plan) {
            let _ = writeln!(out, "  {line}");
        }
        let mut terms: Vec<_> = plan.terms.iter().collect();
        terms.sort_by(|a, b| b.expected_ms.total_cmp(&a.expected_ms));
        let largest: Vec<_> = terms
            .iter()
            .take(4)
            .map(|term| format!("{} {}", term.name, show_ms(Some(term.expected_ms))))
            .collect();
        if !largest.is_empty() {
            let _ = writeln!(out, "  what it takes: {}", largest.join(", "));
        }
        if plan.refused + plan.stayed + plan.in_doubt > 0 {
            let _ = writeln!(
                out,
                "  not completed: {} refused, {} stayed, {} in doubt",
                plan.refused, plan.stayed, plan.in_doubt
            );
        }
        if plan.throttled > 0 {
            let (times, percent) = (plan.throttled, plan.throttle_percent);
            let _ =
                writeln!(out, "  slowed down by auto-converge: {times}, by {percent} % at most");
        }
        for (reason, times, seed) in &plan.reasons {
            let _ = writeln!(out, "  {times} × {reason} (seed {seed})");
        }
    }
    out
}

/// The answer in words: will it fit, with what certainty, what dominates, what would help.
fn words(plan: &Plan) -> Vec<String> {
    if plan.runs == 0 {
        return Vec::new();
    }
    let share = plan.success();
    let mut lines = vec![format!(
        "moved within {} in {:.1} % of them; with 97.5 % certainty in at least {:.1} % of all such migrations",
        show_ms(Some(plan.limit_ms)),
        share * 100.0,
        at_least(share, plan.runs) * 100.0
    )];
    let largest = plan.terms.iter().max_by(|a, b| a.expected_ms.total_cmp(&b.expected_ms));
    if let Some(term) = largest {
        let helps = match term.name.as_str() {
            "transfer" => {
                "a faster link, less device state, or a guest that writes less (--sweep link=…, device-size=…)"
            }
            "quiesce" | "stop" | "start" | "validate" => {
                "only a calmer or faster device; a rehearsal or earlier migrations make its share known better"
            }
            "look" | "pause" | "final-sync" => "a calmer host, or less memory to look through",
            _ => "faster hosts, or a shorter way between them",
        };
        lines.push(format!("dominated by {}; what helps: {helps}", term.name));
    }
    if let (true, Some(downtime)) = (share < 0.99, plan.downtime)
        && downtime.p99_ms > plan.limit_ms
    {
        lines.push(format!(
            "of those that moved, 99 of 100 would fit into a limit of {}",
            show_ms(Some(downtime.p99_ms.ceil()))
        ));
    }
    lines
}

/// The lower end of Wilson's interval for a share of so many runs, two standard deviations wide on each side.
fn at_least(share: f64, runs: u64) -> f64 {
    let (n, z) = (runs as f64, 1.96);
    let spread = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    ((share + z * z / (2.0 * n) - spread) / (1.0 + z * z / n)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_given_in_words_with_its_certainty() {
        let quantiles = planner::plan::Quantiles { p99_ms: 340.2, ..Default::default() };
        let term =
            |name: &str, expected_ms| planner::plan::TermShare { name: name.into(), expected_ms };
        let plan = Plan {
            limit_ms: 300.0,
            runs: 1_000,
            completed: 1_000,
            kept: 950,
            downtime: Some(quantiles),
            terms: vec![term("quiesce", 20.0), term("transfer", 80.0)],
            ..Plan::default()
        };
        let lines = words(&plan);
        assert!(lines[0].contains("95.0 %") && lines[0].contains("93.5 %"), "{lines:?}");
        assert!(lines[1].contains("dominated by transfer"), "{lines:?}");
        assert!(lines[2].contains("341"), "{lines:?}");
        // Even of many without a miss nobody knows that all fit.
        assert!((0.996..1.0).contains(&at_least(1.0, 1_000)));
    }

    #[test]
    fn columns_line_up_and_reasons_are_told() {
        let plan = Plan {
            mode: "strict".into(),
            limit_ms: 300.0,
            runs: 4,
            kept: 4,
            stayed: 4,
            reasons: vec![("the limit is out of reach".into(), 4, 7)],
            ..Plan::default()
        };
        let text = text("a guest", [("bounded", &plan)].into_iter());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2].chars().count(), lines[3].chars().count(), "{text}");
        assert!(lines[3].starts_with("bounded, strict") && lines[3].contains("100.0 %"), "{text}");
        assert!(text.contains("4 × the limit is out of reach (seed 7)"), "{text}");
    }
}
