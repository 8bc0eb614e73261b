//! Whole blackouts against what was expected of them (split conformal prediction).
//!
//! Terms that hang together in ways nobody models make joint samples too narrow or too wide. Once enough
//! whole blackouts were seen, their own ratios to what the samples expected say how far to trust those: of
//! n ratios and one to come, any rank is equally likely for the one to come, whatever their distribution.

use super::history::WholeHistory;

/// Fewer say nothing.
const LEAST: usize = 16;
/// The oldest are left out: what was expected of the first blackouts rested on priors that the terms have
/// unlearnt since, and says nothing of what is expected now. (A real mlx5-like device whose profile was not
/// named: ratios from 2.6 to 1.1 before the 12th, and 1.0 from then on.)
const UNLEARNT: usize = 16;

/// Ratios of measured to expected, in permille and ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Residuals {
    sorted: [Vec<u32>; 4],
}

impl Residuals {
    pub(crate) fn of(history: Option<&WholeHistory>) -> Self {
        let mut sorted = history.map(|h| h.residuals_permille.clone()).unwrap_or_default();
        for ratios in &mut sorted {
            ratios.drain(..UNLEARNT.min(ratios.len()));
            ratios.sort_unstable();
        }
        Self { sorted }
    }

    /// How many there are for this stage; `None` when too few.
    pub(crate) fn count(&self, stage: usize) -> Option<u32> {
        let count = self.sorted.get(stage)?.len();
        (count >= LEAST).then_some(count as u32)
    }

    /// The ratio that the next one does not exceed in `permille` of all cases. `Err` has the largest seen,
    /// where there are too few to say: then nobody knows how much larger it can get.
    pub(crate) fn quantile(&self, stage: usize, permille: u32) -> Option<Result<u32, u32>> {
        self.count(stage)?;
        let ratios = &self.sorted[stage];
        let rank = ((ratios.len() + 1) * permille.min(1000) as usize).div_ceil(1000).max(1);
        let largest = ratios.last().copied().unwrap_or(1000);
        Some(ratios.get(rank - 1).copied().ok_or(largest))
    }

    /// How likely it is, in permille, that a blackout of which `expected_ns` was expected takes no longer than
    /// `left_ns`; and how many were seen, where enough to know the rare ones. `None` when too few.
    pub(crate) fn within_permille(
        &self,
        stage: usize,
        left_ns: u64,
        expected_ns: u64,
    ) -> Option<(u32, Option<u32>)> {
        let count = self.count(stage)?;
        let ratio = permille(left_ns, expected_ns);
        let within = self.sorted[stage].partition_point(|seen| *seen <= ratio) as u64;
        let share = within * 1000 / (u64::from(count) + 1);
        Some((share as u32, (count >= 99).then_some(count)))
    }
}

/// The ratio as it is kept, rounded to the nearest: cut off, half a permille was missing on average, which shifts
/// the median visibly where blackouts differ by little more.
pub(crate) fn permille(measured_ns: u64, expected_ns: u64) -> u32 {
    let expected = u128::from(expected_ns.max(1));
    let ratio = (u128::from(measured_ns) * 1000 + expected / 2) / expected;
    u32::try_from(ratio).unwrap_or(u32::MAX)
}

/// `value` times the ratio.
pub(crate) fn scaled(value: u64, permille: u32) -> u64 {
    if let Some(product) = value.checked_mul(permille.into()) {
        return product / 1000;
    }
    let scaled = u128::from(value) * u128::from(permille) / 1000;
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ratios: impl IntoIterator<Item = u32>) -> Residuals {
        let mut history = WholeHistory::default();
        let learning = std::iter::repeat_n(9_999, UNLEARNT);
        history.residuals_permille[0] = learning.chain(ratios).collect();
        Residuals::of(Some(&history))
    }

    #[test]
    fn ranks_are_those_of_one_more_than_was_seen() {
        let hundred_and_ninety_nine = of(1..=199);
        assert_eq!(hundred_and_ninety_nine.quantile(0, 500), Some(Ok(100)));
        assert_eq!(hundred_and_ninety_nine.quantile(0, 990), Some(Ok(198)));
        // Of 50, nobody can say what 99 of 100 do not exceed.
        assert_eq!(of(1..=50).quantile(0, 990), Some(Err(50)));
        assert_eq!(of(1..=50).quantile(0, 500), Some(Ok(26)));
        assert_eq!(of(1..=15).quantile(0, 500), None, "too few");
        assert_eq!(of(1..=50).quantile(1, 500), None, "another stage");
    }

    #[test]
    fn coverage_is_what_it_claims_for_any_distribution() {
        // A skewed one with rare long cases.
        let mut bits = 7u64;
        let mut next = move || {
            bits = bits
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let uniform = (bits >> 40) as u32 % 1000;
            if uniform > 985 { 5_000 + uniform } else { 800 + uniform * uniform / 2_000 }
        };
        let mut window: Vec<u32> = (0..256).map(|_| next()).collect();
        let (mut p50, mut p99, rounds) = (0, 0, 20_000);
        for _ in 0..rounds {
            let residuals = of(window.iter().copied());
            let (middle, upper) = (residuals.quantile(0, 500), residuals.quantile(0, 990));
            let measured = next();
            p50 += u32::from(Some(Ok(measured)) <= middle);
            p99 += u32::from(Some(Ok(measured)) <= upper);
            window.remove(0);
            window.push(measured);
        }
        let share = |n: u32| f64::from(n) / f64::from(rounds);
        assert!((0.48..0.53).contains(&share(p50)), "{}", share(p50));
        assert!((0.985..0.997).contains(&share(p99)), "{}", share(p99));
    }
}
