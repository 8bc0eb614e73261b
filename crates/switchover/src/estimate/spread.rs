//! Values that are not known exactly, and how they are drawn together.
//!
//! A [`Spread`] is a quantile function in [`STRATA`] equally likely steps. A joint sample draws every
//! spread [`DRAWS`] times, each in an order of its own: over all draws a spread gives each of its steps
//! equally often (a Latin hypercube), so few draws are as good as many independent ones, and the same
//! question always has the same answer.

/// Equally likely steps of a spread.
pub(crate) const STRATA: usize = 128;
/// Draws of a joint sample.
pub(crate) const DRAWS: usize = 256;

/// A quantile function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    steps: Box<[u64; STRATA]>,
}

/// What is assumed of a value: nothing lies below `min`, half of all cases above `typical`, none above
/// `max` as far as anybody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// The least.
    pub min: u64,
    /// The middle.
    pub typical: u64,
    /// The most.
    pub max: u64,
}

impl Range {
    /// A value that is always the same.
    pub const fn exactly(value: u64) -> Self {
        Self { min: value, typical: value, max: value }
    }

    /// The value at `part` of 1: straight from min to typical, and with the third power from there to max,
    /// so that the middle is common and the maximum rare.
    pub fn at(self, part: f64) -> u64 {
        let (min, typical) = (self.min.min(self.typical), self.typical);
        let max = self.max.max(typical);
        if part <= 0.5 {
            return min + ((typical - min) as f64 * 2.0 * part.max(0.0)) as u64;
        }
        let above = 2.0 * part.min(1.0) - 1.0;
        typical + ((max - typical) as f64 * above * above * above) as u64
    }

    /// Both together, the bounds added: where one follows the other and no more is known.
    pub fn then(self, other: Self) -> Self {
        Self {
            min: self.min.saturating_add(other.min),
            typical: self.typical.saturating_add(other.typical),
            max: self.max.saturating_add(other.max),
        }
    }

    /// The larger of each: where both go on at once and the slower one counts.
    pub fn or(self, other: Self) -> Self {
        Self {
            min: self.min.max(other.min),
            typical: self.typical.max(other.typical),
            max: self.max.max(other.max),
        }
    }
}

impl Spread {
    pub(crate) fn of_range(range: Range) -> Self {
        Self::from_fn(|part| range.at(part))
    }

    /// From values and their weights.
    pub(crate) fn of_weighted(mut values: Vec<(u64, u32)>) -> Self {
        values.sort_unstable();
        let all: u64 = values.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let (mut next, mut below, mut value) = (values.iter(), 0u64, 0u64);
        let mut steps = Box::new([0; STRATA]);
        for (step, out) in steps.iter_mut().enumerate() {
            // The middle of the step, in 2 STRATA parts of all weight.
            let wanted = (2 * step as u64 + 1) * all;
            while below * 2 * STRATA as u64 <= wanted {
                let Some((v, weight)) = next.next() else { break };
                (value, below) = (*v, below + u64::from(*weight));
            }
            *out = value;
        }
        Self { steps }
    }

    fn from_fn(mut value: impl FnMut(f64) -> u64) -> Self {
        let mut steps = Box::new([0; STRATA]);
        for (step, out) in steps.iter_mut().enumerate() {
            *out = value((step as f64 + 0.5) / STRATA as f64);
        }
        Self { steps }
    }

    /// The value that `permille` of all cases do not exceed.
    pub(crate) fn quantile(&self, permille: u32) -> u64 {
        let step = (permille.min(1000) as usize * STRATA).div_ceil(1000).clamp(1, STRATA);
        self.steps[step - 1]
    }

    /// All draws of a joint sample, in the order `order`.
    pub(crate) fn draws(&self, order: Order) -> Draws {
        match self.constant() {
            Some(value) => [value; DRAWS],
            None => order.places().map(|place| self.steps[usize::from(place)]),
        }
    }

    /// The value, where it is always the same.
    pub(crate) fn constant(&self) -> Option<u64> {
        let (least, most) = (self.steps[0], self.steps[STRATA - 1]);
        (least == most).then_some(least)
    }
}

/// What a joint sample drew of something.
pub(crate) type Draws = [u64; DRAWS];

/// Nothing, in every draw.
pub(crate) const NO_DRAWS: Draws = [0; DRAWS];

/// Adds draw by draw.
pub(crate) fn add(sum: &mut Draws, more: &Draws) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum = sum.saturating_add(*more);
    }
}

/// The larger of both, draw by draw.
pub(crate) fn raise(most: &mut Draws, other: &Draws) {
    for (most, other) in most.iter_mut().zip(other) {
        *most = (*most).max(*other);
    }
}

/// An order of draws, one for each spread of a joint sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    add: u8,
    first: u8,
    second: u8,
}

impl Order {
    pub(crate) const fn new(number: u64) -> Self {
        // SplitMix64: orders of neighbouring numbers have nothing in common.
        let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        Self { add: bits as u8, first: (bits >> 8) as u8 | 1, second: (bits >> 16) as u8 | 1 }
    }

    /// The step that each draw takes. Every operation is one to one on a byte, and so is the whole: no place
    /// is drawn more often.
    fn places(self) -> [u8; DRAWS] {
        std::array::from_fn(|draw| {
            let mut byte = (draw as u8).wrapping_add(self.add).wrapping_mul(self.first);
            byte ^= byte >> 4;
            byte = byte.wrapping_mul(self.second);
            byte ^= byte >> 3;
            (usize::from(byte) * STRATA / DRAWS) as u8
        })
    }
}

/// The value that `permille` of `values` do not exceed; changes their order.
pub(crate) fn quantile_of(values: &mut Draws, permille: u32) -> u64 {
    let rank = (permille.min(1000) as usize * DRAWS).div_ceil(1000).clamp(1, DRAWS);
    // Far up it is quicker to keep the few largest than to part all.
    const FEW: usize = 8;
    let larger = DRAWS - rank;
    if larger >= FEW {
        return *values.select_nth_unstable(rank - 1).1;
    }
    let mut largest = [0; FEW];
    let largest = &mut largest[..=larger];
    for value in values.iter() {
        if *value <= largest[larger] {
            continue;
        }
        largest[larger] = *value;
        let mut place = larger;
        while place > 0 && largest[place - 1] < largest[place] {
            largest.swap(place - 1, place);
            place -= 1;
        }
    }
    largest[larger]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_draws_every_step_equally_often() {
        for number in 0..100 {
            let order = Order::new(number);
            let mut seen = [0; STRATA];
            order.places().iter().for_each(|place| seen[usize::from(*place)] += 1);
            assert_eq!(seen, [DRAWS / STRATA; STRATA], "order {number}");
        }
    }

    #[test]
    fn two_orders_have_little_in_common() {
        // Independent draws of two uniform values: their sum's P99 lies at 2 - sqrt(0.02) = 1.86.
        let even = Spread::of_range(Range { min: 0, typical: 500, max: 1000 });
        let straight = Spread::from_fn(|part| (part * 1000.0) as u64);
        assert!(even.quantile(1000) > 900);
        let (mut far, mut sums) = (0, 0);
        for number in 0..60 {
            let (a, b) = (Order::new(number), Order::new(number + 1));
            let mut totals = straight.draws(a);
            add(&mut totals, &straight.draws(b));
            let p99 = quantile_of(&mut totals, 990);
            far += u32::from(!(1_780..=1_950).contains(&p99));
            sums += p99;
        }
        assert!(far <= 12 && (1_840..1_890).contains(&(sums / 60)), "{far}, {}", sums / 60);
    }

    #[test]
    fn a_quantile_far_up_is_the_one_that_sorting_finds() {
        let straight = Spread::from_fn(|part| (part * 1000.0) as u64);
        for number in 0..20 {
            let mut sorted = straight.draws(Order::new(number));
            add(&mut sorted, &straight.draws(Order::new(number + 1)));
            let draws = sorted;
            sorted.sort_unstable();
            for permille in [1, 500, 900, 960, 975, 990, 999, 1000] {
                let rank = (permille as usize * DRAWS).div_ceil(1000);
                assert_eq!(quantile_of(&mut draws.clone(), permille), sorted[rank - 1]);
            }
        }
    }

    #[test]
    fn weights_decide_the_quantiles() {
        let spread = Spread::of_weighted(vec![(100, 3), (10, 95), (1_000, 2)]);
        assert_eq!(spread.quantile(500), 10);
        assert_eq!(spread.quantile(940), 10);
        assert_eq!(spread.quantile(960), 100);
        assert_eq!(spread.quantile(1000), 1_000);
        assert_eq!(Spread::of_weighted(Vec::new()).quantile(500), 0);
    }

    #[test]
    fn a_range_has_its_middle_in_the_middle() {
        let range = Range { min: 10, typical: 20, max: 1_020 };
        assert_eq!((range.at(0.0), range.at(0.5), range.at(1.0)), (10, 20, 1_020));
        assert!(range.at(0.75) < 150, "the maximum is rare");
        // Nonsense is put in order and does not overflow.
        assert_eq!(Range { min: 9, typical: 5, max: 1 }.at(1.0), 5);
        assert_eq!(Range { min: 0, typical: 0, max: u64::MAX }.at(1.0), u64::MAX);
    }
}
