//! A plan as a picture (SVG): the distribution against the limit, and the terms stacked.

use std::fmt::Write;

use crate::plan::Plan;

const WIDTH: f64 = 760.0;
const ROW: f64 = 150.0;
const LEFT: f64 = 90.0;
const COLOURS: [&str; 10] = [
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
    "#9c6b4e", "#9498a0",
];

/// One row for each plan, over one axis of time.
pub fn svg(title: &str, plans: &[Plan]) -> String {
    let longest = |plan: &Plan| {
        let downtime = plan.downtime.map_or(0.0, |quantiles| quantiles.max_ms);
        let terms: f64 = plan.terms.iter().map(|term| term.expected_ms).sum();
        downtime.max(terms).max(plan.limit_ms.min(downtime.max(terms) * 2.0))
    };
    let span_ms = plans.iter().map(longest).fold(1.0, f64::max) * 1.05;
    let x = |ms: f64| LEFT + (WIDTH - LEFT - 20.0) * (ms / span_ms).min(1.0);
    let height = 40.0 + ROW * plans.len() as f64 + 40.0;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">{}</text>",
        escape(title)
    );
    for (row, plan) in plans.iter().enumerate() {
        let top = 40.0 + ROW * row as f64;
        draw(&mut out, plan, top, &x);
    }
    let bottom = height - 30.0;
    for tick in 0..=5 {
        let ms = span_ms / 5.0 * f64::from(tick);
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{bottom:.1}\" text-anchor=\"middle\">{ms:.0} ms</text>",
            x(ms)
        );
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, plan: &Plan, top: f64, x: &dyn Fn(f64) -> f64) {
    let base = top + ROW - 60.0;
    let _ = writeln!(
        out,
        "<text x=\"10\" y=\"{:.1}\">{}</text><text x=\"10\" y=\"{:.1}\" fill=\"#666\">{}</text>",
        top + 14.0,
        escape(&plan.policy),
        top + 28.0,
        escape(&plan.mode)
    );
    let most = plan.histogram.iter().copied().max().unwrap_or(0).max(1) as f64;
    for (step, count) in plan.histogram.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (from, to) = (plan.step_ms * step as f64, plan.step_ms * (step + 1) as f64);
        let tall = (base - top - 10.0) * *count as f64 / most;
        let fill = if from >= plan.limit_ms { "#c0392b" } else { "#4269d0" };
        let _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\" fill=\"{fill}\"><title>{from:.0} to {to:.0} ms: {count}</title></rect>",
            x(from),
            base - tall,
            (x(to) - x(from)).max(0.5)
        );
    }
    let limit = x(plan.limit_ms);
    let _ = writeln!(
        out,
        "<line x1=\"{limit:.1}\" x2=\"{limit:.1}\" y1=\"{top:.1}\" y2=\"{:.1}\" stroke=\"#c0392b\" stroke-dasharray=\"4 3\"/>\
         <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{base:.1}\" y2=\"{base:.1}\" stroke=\"#999\"/>",
        base + 26.0,
        x(0.0),
        WIDTH - 20.0
    );
    let mut from = 0.0;
    for (term, colour) in plan.terms.iter().zip(COLOURS.iter().cycle()) {
        let to = from + term.expected_ms;
        let wide = x(to) - x(from);
        let _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"16\" fill=\"{colour}\"><title>{}: {:.1} ms</title></rect>",
            x(from),
            base + 8.0,
            escape(&term.name),
            term.expected_ms
        );
        if wide > 60.0 {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"white\">{}</text>",
                x(from) + 4.0,
                base + 20.0,
                escape(&term.name)
            );
        }
        from = to;
    }
    let quantiles = plan.downtime.map_or("none completed".to_owned(), |q| {
        format!("P50 {:.0}, P99 {:.0}, max {:.0} ms", q.p50_ms, q.p99_ms, q.max_ms)
    });
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#333\">{quantiles}; limit {:.0} ms kept in {} of {}, completed {}</text>",
        base + 40.0,
        plan.limit_ms,
        plan.kept,
        plan.runs,
        plan.completed
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Quantiles, TermShare};

    #[test]
    fn every_plan_has_its_row_and_text_is_escaped() {
        let plan = Plan {
            policy: "<bounded>".into(),
            limit_ms: 300.0,
            runs: 3,
            completed: 3,
            kept: 2,
            histogram: vec![1, 0, 2],
            step_ms: 150.0,
            downtime: Some(Quantiles {
                count: 3,
                p50_ms: 400.0,
                max_ms: 450.0,
                ..Default::default()
            }),
            terms: vec![TermShare { name: "transfer".into(), expected_ms: 200.0 }],
            ..Plan::default()
        };
        let picture = svg("a & b", &[plan.clone(), plan]);
        assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
        assert_eq!(picture.matches("kept in 2 of 3").count(), 2);
        assert_eq!(picture.matches("&lt;bounded&gt;").count(), 2);
        assert!(picture.contains("a &amp; b"));
        // The bar beyond the limit is red.
        assert_eq!(picture.matches("fill=\"#c0392b\"").count(), 2);
        assert!(svg("nothing", &[Plan::default()]).contains("none completed"));
    }
}
