//! Does it pay? Of a plain way and a special one both are tried, and the one is taken by which memory is sooner done with.
//!
//! ```text
//!              plain          special             what counts
//!   a channel  sends pages    compresses them     time from the page to the socket: on a link slower than a core fewer
//!                                                 bytes are sooner gone, elsewhere all bytes are
//!   population 4 KiB pages    2 MiB at once       CPU time, what the kernel waits for not among it: cheaper by far, unless
//!                                                 free blocks of that size have to be made or fetched from a hypervisor
//! ```
//!
//! Either may change, so the other way is tried again now and then, more and more seldom while it loses. While the guest
//! stands still nothing is tried.

/// Bytes of memory of one measurement.
const SAMPLE_BYTES: u64 = 1 << 20;
/// So many bytes go by until the other way is tried again, and at most so many.
const AGAIN_BYTES: std::ops::Range<u64> = 128 << 20..1 << 30;

/// One choice.
#[derive(Clone, Debug)]
pub(crate) struct Worth {
    /// The way that is taken now.
    special: bool,
    /// What is noted next still pays for what went the other way before, or finds its tables cold.
    turned: bool,
    /// The other way is being tried.
    trying: bool,
    /// What a MiB took in ns: plain, special.
    ns_per_mib: [Option<u64>; 2],
    /// Of the measurement under way: bytes of memory, and time.
    sample: (u64, u64),
    /// Bytes since the other way was tried, and after how many it is again.
    since: u64,
    again: u64,
}

impl Default for Worth {
    fn default() -> Self {
        Self {
            special: true,
            turned: true,
            trying: false,
            ns_per_mib: [None, None],
            sample: (0, 0),
            since: 0,
            again: AGAIN_BYTES.start,
        }
    }
}

impl Worth {
    /// The next pages go the special way. In a `blackout` it is the way that is known to be better, if any.
    pub(crate) fn is_special(&self, blackout: bool) -> bool {
        match (blackout, self.ns_per_mib) {
            (false, _) => self.special,
            (true, [Some(_), Some(_)]) => self.is_better(true),
            (true, _) => false,
        }
    }

    /// The special way costs something besides: it has to win by more than a little.
    fn is_better(&self, special: bool) -> bool {
        let [plain, of_special] = self.ns_per_mib.map(|ns| ns.unwrap_or(u64::MAX));
        (of_special < plain - plain / 16) == special
    }

    /// So many bytes of memory took so long, this way.
    pub(crate) fn note(&mut self, special: bool, bytes: u64, ns: u64) {
        if special != self.special || bytes == 0 || std::mem::take(&mut self.turned) {
            return;
        }
        let (sampled, took) = &mut self.sample;
        (*sampled, *took) = (sampled.saturating_add(bytes), took.saturating_add(ns));
        self.since = self.since.saturating_add(bytes);
        if *sampled < SAMPLE_BYTES {
            return;
        }
        let ns_per_mib = u128::from(*took) * (1 << 20) / u128::from(*sampled);
        let fresh = u64::try_from(ns_per_mib).unwrap_or(u64::MAX).max(1);
        self.sample = (0, 0);
        let known = &mut self.ns_per_mib[usize::from(special)];
        // One measurement may fill a socket's buffer, or wait for one: what goes on evens out.
        *known = Some(match *known {
            Some(before) if !self.trying => before - before / 4 + fresh / 4,
            _ => fresh,
        });
        self.choose();
    }

    fn choose(&mut self) {
        let other = !self.special;
        if self.ns_per_mib[usize::from(other)].is_none() {
            return self.turn_to(other, true);
        }
        match (self.is_better(other), self.trying) {
            // Tried in vain: back, and the next time later.
            (true, true) => {
                self.again = (self.again * 2).min(AGAIN_BYTES.end);
                self.turn_to(other, false);
            }
            // What was better is not any more.
            (true, false) => {
                self.again = AGAIN_BYTES.start;
                self.turn_to(other, false);
            }
            (false, true) => (self.trying, self.since, self.again) = (false, 0, AGAIN_BYTES.start),
            (false, false) if self.since >= self.again => self.turn_to(other, true),
            (false, false) => {}
        }
    }

    fn turn_to(&mut self, special: bool, trying: bool) {
        (self.special, self.turned, self.trying) = (special, true, trying);
        (self.since, self.sample) = (0, (0, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Sends `mib` MiB at so many ns per MiB plain and compressed; answers how many went compressed.
    fn send(worth: &mut Worth, mib: u64, plain: u64, compressed: u64) -> u64 {
        let mut packed_mib = 0;
        for _ in 0..mib {
            let packed = worth.is_special(false);
            packed_mib += u64::from(packed);
            worth.note(packed, MIB, if packed { compressed } else { plain });
        }
        packed_mib
    }

    #[test]
    fn the_sooner_way_is_taken_and_the_other_one_tried_now_and_then() {
        // (plain, compressed, compressed is better)
        for (plain, compressed, packed_is_better) in
            [(1_000, 300, true), (300, 1_000, false), (1_000, 990, false)]
        {
            let mut worth = Worth::default();
            let packed = send(&mut worth, 1024, plain, compressed);
            let worse = if packed_is_better { 1024 - packed } else { packed };
            assert!((2..=16).contains(&worse), "{plain} {compressed}: {worse}");
            assert_eq!(worth.is_special(true), packed_is_better);
        }
    }

    #[test]
    fn what_loses_is_tried_more_and_more_seldom() {
        let mut worth = Worth::default();
        let early = send(&mut worth, 1024, 300, 1_000);
        let late = send(&mut worth, 4096, 300, 1_000);
        assert!(late <= early + 2, "{early} of the first GiB, {late} of the next four");
    }

    #[test]
    fn a_link_that_becomes_slow_or_fast_again_changes_the_choice() {
        let mut worth = Worth::default();
        send(&mut worth, 256, 300, 1_000);
        assert!(!worth.is_special(true));
        // Found by the plain way becoming slower than compressed is known to be.
        send(&mut worth, 32, 10_000, 4_000);
        assert!(worth.is_special(true));
        // Found by trying.
        send(&mut worth, 256, 300, 1_000);
        assert!(!worth.is_special(true));
    }

    #[test]
    fn in_a_blackout_nothing_is_tried() {
        let mut worth = Worth::default();
        assert!(!worth.is_special(true), "nobody knows what it is worth");
        send(&mut worth, 64, 1_000, 300);
        let trying = |worth: &mut Worth| {
            (0..2048).any(|_| {
                send(worth, 1, 1_000, 300);
                !worth.is_special(false)
            })
        };
        assert!(trying(&mut worth));
        assert!(worth.is_special(true));
    }

    /// A batch pays for the one before, as with a limit of the bandwidth: the first of a try says nothing of it.
    #[test]
    fn what_the_other_way_left_behind_does_not_count() {
        let mut worth = Worth::default();
        let mut before = 5_000;
        let packed = (0..1024).filter(|number| {
            let packed = worth.is_special(false);
            // Plain 5,000; compressed 2,000 and 1,000, right after plain 7,000 and with cold tables 50,000.
            let own = if packed { 1_000 } else { 0 } + if *number == 0 { 43_000 } else { 0 };
            worth.note(packed, MIB / 2, own + before);
            before = if packed { 2_000 } else { 5_000 };
            packed
        });
        assert!(packed.count() > 1000);
    }

    #[test]
    fn small_passes_add_up() {
        let mut worth = Worth::default();
        for _ in 0..1024 {
            let packed = worth.is_special(false);
            worth.note(packed, 4096, if packed { 90 } else { 10 });
        }
        assert!(!worth.is_special(false));
    }
}
