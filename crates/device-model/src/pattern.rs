//! State bytes that follow from a seed and a position.
//!
//! Hundreds of MB of device state are neither kept nor made in advance: word i of a pattern is a
//! mixed counter (the finaliser of splitmix64), so any part can be made at any time, several GB/s.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A seed from two numbers and what they are for.
pub(crate) fn seed(domain: u64, a: u64, b: u64) -> u64 {
    mix(mix(mix(domain).wrapping_add(a).wrapping_mul(GOLDEN)).wrapping_add(b))
}

/// Fills `out` with the pattern's bytes from `offset` (a multiple of 8) on.
pub(crate) fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    debug_assert!(offset.is_multiple_of(8));
    let mut counter = seed.wrapping_add((offset / 8).wrapping_mul(GOLDEN));
    let mut words = out.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&mix(counter).to_le_bytes());
        counter = counter.wrapping_add(GOLDEN);
    }
    let rest = words.into_remainder();
    let last = mix(counter).to_le_bytes();
    for (byte, value) in rest.iter_mut().zip(last) {
        *byte = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_the_same_as_the_whole_from_there_on() {
        let mut whole = [0; 4099];
        fill(7, 0, &mut whole);
        for (offset, len) in [(0, 4099), (8, 64), (4096, 3), (1024, 1)] {
            let mut part = vec![0; len];
            fill(7, offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + len]);
        }
    }

    #[test]
    fn seeds_differ_in_every_argument() {
        let seeds = [seed(1, 2, 3), seed(2, 2, 3), seed(1, 3, 3), seed(1, 2, 4), seed(1, 3, 2)];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[i + 1..].iter().all(|b| a != b));
        }
    }
}
