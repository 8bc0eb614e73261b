//! Which data channel carries which device. A stream stays on one channel, so that it stays ordered.

/// For each device, by its bytes (0: unknown), the place of its channel: the largest first, each to the channel that
/// has least so far. So no channel carries two large devices while another carries small ones.
pub(super) fn spread(device_bytes: &[u64], channels: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..device_bytes.len()).collect();
    // Stable: devices of one size stay in their order.
    order.sort_by_key(|device| std::cmp::Reverse(device_bytes[*device]));
    let mut loads = vec![(0u64, 0usize); channels.max(1)];
    let mut places = vec![0; device_bytes.len()];
    for device in order {
        // Devices count where bytes do not tell.
        let least = (0..loads.len()).min_by_key(|channel| loads[*channel]).unwrap_or(0);
        let (bytes, devices) = &mut loads[least];
        *bytes = bytes.saturating_add(device_bytes[device]);
        *devices += 1;
        places[device] = least;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_each_goes_where_least_is() {
        for (bytes, channels, expected) in [
            (&[0, 0, 0, 0][..], 2, &[0, 1, 0, 1][..]),
            (&[5, 5, 5], 4, &[0, 1, 2]),
            // In their own order both large ones would share a channel.
            (&[100, 1, 100, 1], 2, &[0, 0, 1, 1]),
            (&[1, 2, 3, 4, 10], 2, &[1, 1, 1, 1, 0]),
            (&[7, 0, 9], 1, &[0, 0, 0]),
            // A claim without sense overflows nothing.
            (&[u64::MAX, u64::MAX, u64::MAX, 1], 2, &[0, 1, 0, 1]),
            (&[], 3, &[]),
            (&[1, 2], 0, &[0, 0]),
        ] {
            assert_eq!(spread(bytes, channels), expected, "{bytes:?} over {channels}");
        }
    }

    #[test]
    fn no_channel_has_more_than_a_fair_share_and_one_device_above_it() {
        let mut random = 12345u64;
        for _ in 0..500 {
            let mut next = |below: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (random >> 33) % below
            };
            let (devices, channels) = (next(20) as usize, 1 + next(6) as usize);
            let bytes: Vec<u64> = (0..devices).map(|_| next(1 << 30)).collect();
            let mut loads = vec![0; channels];
            for (device, channel) in spread(&bytes, channels).into_iter().enumerate() {
                loads[channel] += bytes[device];
            }
            let fair = bytes.iter().sum::<u64>() / channels as u64;
            let most = bytes.iter().max().copied().unwrap_or(0);
            assert!(loads.iter().all(|load| *load <= fair + most), "{bytes:?}: {loads:?}");
        }
    }
}
