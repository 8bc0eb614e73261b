//! Sizes that devices claim.

/// The most a device may plausibly hold, in bytes. Sizes near 2^63 and above were seen in the field
/// (protocol rule Z3); 1 TiB is beyond any device known.
pub const CREDIBLE_BYTES_MAX: u64 = 1 << 40;

/// Cross-checks MIG_DATA_SIZE with what PRECOPY_INFO holds: the size is the total that remains,
/// precopy included (Z2), so the larger one counts; an incredible or missing one is unknown. A total of 0 is
/// incredible too: the end of the stream alone takes bytes.
pub fn remaining_bytes(stop_copy: Option<u64>, precopy: Option<u64>) -> Option<u64> {
    let credible = |bytes: Option<u64>| bytes.filter(|b| *b <= CREDIBLE_BYTES_MAX);
    let stop_copy = stop_copy.filter(|bytes| *bytes > 0);
    match (credible(stop_copy), credible(precopy)) {
        (Some(total), Some(precopy)) => Some(total.max(precopy)),
        (total, None) if precopy.is_none() => total,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_claims() {
        assert_eq!(remaining_bytes(Some(10), Some(4)), Some(10));
        assert_eq!(remaining_bytes(Some(3), Some(4)), Some(4), "less than precopy holds");
        assert_eq!(remaining_bytes(Some(u64::MAX - 7), Some(4)), None, "garbage");
        assert_eq!(remaining_bytes(Some(5), Some(u64::MAX)), None, "garbage");
        assert_eq!(remaining_bytes(None, Some(4)), None, "precopy is no total");
        assert_eq!(remaining_bytes(Some(9), None), Some(9));
        assert_eq!(remaining_bytes(None, None), None);
        assert_eq!(remaining_bytes(Some(0), Some(0)), None, "never 0");
        assert_eq!(remaining_bytes(Some(0), None), None, "never 0");
    }
}
