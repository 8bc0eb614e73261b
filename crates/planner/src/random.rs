//! Seeded randomness: the same seed, the same run, on every machine.

use switchover::estimate::Range;

/// A generator (xorshift64*, seeded by SplitMix64).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut bits = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self { state: (bits ^ (bits >> 31)).max(1) }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in 0..1.
    pub fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform below `end`; 0 for 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True once in `n`; never for 0.
    pub fn once_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }

    /// From a range, never beyond its ends. The middle is common, the upper end rare: what lies above the
    /// typical value falls off with the fourth power.
    pub fn within(&mut self, range: Range) -> u64 {
        let part = self.part();
        let (min, typical) = (range.min.min(range.typical), range.typical);
        let max = range.max.max(typical);
        if part < 0.5 {
            let below = 1.0 - 2.0 * part;
            return typical - ((typical - min) as f64 * below * below) as u64;
        }
        let above = 2.0 * part - 1.0;
        typical + ((max - typical) as f64 * above.powi(4)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_kept_and_its_middle_is_the_middle() {
        let mut random = Random::new(1);
        let range = Range { min: 100, typical: 200, max: 10_000 };
        let mut drawn: Vec<u64> = (0..10_001).map(|_| random.within(range)).collect();
        drawn.sort_unstable();
        assert!(drawn[0] >= 100 && drawn[10_000] <= 10_000);
        assert!((190..210).contains(&drawn[5_000]), "{}", drawn[5_000]);
        assert!(drawn[9_990] > 5_000, "{}", drawn[9_990]);
    }

    #[test]
    fn a_seed_repeats_itself_and_another_does_not() {
        let draw = |seed| (0..4).map(|_| Random::new(seed).below(1 << 40)).collect::<Vec<_>>();
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
