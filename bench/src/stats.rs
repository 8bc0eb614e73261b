//! Medians and spread: a noisy machine spoils a mean.

use serde::Serialize;

/// What several runs of one thing took or reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Summary {
    /// Number of runs.
    pub runs: usize,
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Sums up; of nothing, all is 0.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (values.first(), values.last()) else {
            return Self::default();
        };
        let half = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[half - 1] + values[half]) / 2.0,
            _ => values[half],
        };
        Self { runs: values.len(), median, min: *min, max: *max }
    }

    /// `median (min–max)`, with so many decimals.
    pub fn show(&self, decimals: usize) -> String {
        if self.runs < 2 {
            return format!("{:.decimals$}", self.median);
        }
        format!("{:.decimals$} ({:.decimals$}–{:.decimals$})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        for (values, median) in
            [(&[3.0, 1.0, 2.0][..], 2.0), (&[4.0, 1.0, 3.0, 2.0], 2.5), (&[7.0], 7.0)]
        {
            assert_eq!(Summary::of(values.iter().copied()).median, median, "{values:?}");
        }
        assert_eq!(Summary::of([]), Summary::default());
        let summary = Summary::of([5.0, -1.0, 2.0]);
        assert_eq!((summary.min, summary.max, summary.runs), (-1.0, 5.0, 3));
        assert_eq!(summary.show(1), "2.0 (-1.0–5.0)");
    }
}
