//! What earlier migrations teach: plain data, in and out of the brain as a value. Whoever runs the brain
//! keeps it in a file, and may lose it: nothing rests on it but the quality of estimates.
//!
//! Everything in it is capped, by [`History::limit`] and by every addition, so a file that was tampered
//! with costs no memory and says at worst wrong numbers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Values that are kept of one thing.
pub const VALUES_MAX: usize = 32;
/// Residuals of whole blackouts that are kept.
pub const RESIDUALS_MAX: usize = 256;
/// Kinds of device, host pairs and combinations that are kept, of each.
const KEYS_MAX: usize = 64;
/// Length of a key in bytes.
const KEY_MAX_BYTES: usize = 256;
/// Version of the format.
const VERSION: u32 = 1;

/// What is known from earlier migrations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct History {
    version: u32,
    /// Counts additions; entries that were not used for longest go first.
    clock: u64,
    kinds: BTreeMap<String, Entry<KindHistory>>,
    pairs: BTreeMap<String, Entry<PairHistory>>,
    wholes: BTreeMap<String, Entry<WholeHistory>>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            version: VERSION,
            clock: 0,
            kinds: BTreeMap::new(),
            pairs: BTreeMap::new(),
            wholes: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entry<T> {
    used: u64,
    #[serde(flatten)]
    is: T,
}

/// What a kind of device costs. Times in ns, rates in ns per MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct KindHistory {
    /// PRECOPY_INFO.
    pub look: Vec<u64>,
    /// Into the P2P state.
    pub quiesce: Vec<u64>,
    /// Out of it, back to PRE_COPY.
    pub unquiesce: Vec<u64>,
    /// Into STOP_COPY.
    pub stop: Vec<u64>,
    /// From STOP_COPY back into RUNNING, or to RUNNING_P2P, whatever was seen of it.
    pub run: Vec<u64>,
    /// Reading the stream.
    pub read: Vec<u64>,
    /// Loading it.
    pub load: Vec<u64>,
    /// What the stop-copy stream had, in permille of what the device had said.
    pub size_permille: Vec<u64>,
}

/// What a pair of hosts costs, in ns; the link in ns per MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct PairHistory {
    /// From the request to pause to the last vCPU's stop.
    pub pause: Vec<u64>,
    /// Collecting dirty pages with the vCPUs stopped.
    pub final_sync: Vec<u64>,
    /// Detach, save and send.
    pub machine_state: Vec<u64>,
    /// One message there and one back.
    pub round_trip: Vec<u64>,
    /// The link.
    pub link: Vec<u64>,
}

/// What guests with the same kinds of devices showed between the same hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct WholeHistory {
    /// From StateEnd to Ready, in ns.
    pub validate: Vec<u64>,
    /// From Commit to Running beyond the round trip, in ns.
    pub start: Vec<u64>,
    /// What the rest of the blackout took, in permille of what was expected of it: from the request to
    /// pause, from the look, from the stop, from Commit on.
    pub residuals_permille: [Vec<u32>; 4],
}

impl History {
    /// Brings a history that came from outside within its limits. `None` for one of another version.
    pub fn limit(mut self) -> Option<Self> {
        if self.version != VERSION {
            return None;
        }
        for entry in self.kinds.values_mut() {
            entry.is.fields().into_iter().for_each(|values| keep_last(values, VALUES_MAX));
        }
        for entry in self.pairs.values_mut() {
            entry.is.fields().into_iter().for_each(|values| keep_last(values, VALUES_MAX));
        }
        for WholeHistory { validate, start, residuals_permille } in
            self.wholes.values_mut().map(|entry| &mut entry.is)
        {
            [validate, start].into_iter().for_each(|values| keep_last(values, VALUES_MAX));
            residuals_permille.iter_mut().for_each(|values| keep_last(values, RESIDUALS_MAX));
        }
        forget(&mut self.kinds);
        forget(&mut self.pairs);
        forget(&mut self.wholes);
        Some(self)
    }

    /// What is known of a kind of device.
    pub fn kind(&self, key: &str) -> Option<&KindHistory> {
        self.kinds.get(key).map(|entry| &entry.is)
    }

    /// What is known of a pair of hosts.
    pub fn pair(&self, key: &str) -> Option<&PairHistory> {
        self.pairs.get(key).map(|entry| &entry.is)
    }

    /// What is known of whole blackouts.
    pub fn whole(&self, key: &str) -> Option<&WholeHistory> {
        self.wholes.get(key).map(|entry| &entry.is)
    }

    /// Adds to a kind of device.
    pub fn add_kind(&mut self, key: &str, new: &KindHistory) {
        self.clock = self.clock.saturating_add(1);
        let mut new = new.clone();
        if let Some(known) = entry(&mut self.kinds, key, self.clock) {
            for (known, new) in known.fields().into_iter().zip(new.fields()) {
                known.append(new);
                keep_last(known, VALUES_MAX);
            }
        }
    }

    /// Adds to a pair of hosts.
    pub fn add_pair(&mut self, key: &str, new: &PairHistory) {
        self.clock = self.clock.saturating_add(1);
        let mut new = new.clone();
        if let Some(known) = entry(&mut self.pairs, key, self.clock) {
            for (known, new) in known.fields().into_iter().zip(new.fields()) {
                known.append(new);
                keep_last(known, VALUES_MAX);
            }
        }
    }

    /// Adds to what is known of whole blackouts.
    pub fn add_whole(&mut self, key: &str, new: &WholeHistory) {
        self.clock = self.clock.saturating_add(1);
        let new = new.clone();
        let Some(known) = entry(&mut self.wholes, key, self.clock) else { return };
        known.validate.extend(new.validate);
        known.start.extend(new.start);
        keep_last(&mut known.validate, VALUES_MAX);
        keep_last(&mut known.start, VALUES_MAX);
        for (known, new) in known.residuals_permille.iter_mut().zip(new.residuals_permille) {
            known.extend(new);
            keep_last(known, RESIDUALS_MAX);
        }
    }
}

impl KindHistory {
    fn fields(&mut self) -> [&mut Vec<u64>; 8] {
        let Self { look, quiesce, unquiesce, stop, run, read, load, size_permille } = self;
        [look, quiesce, unquiesce, stop, run, read, load, size_permille]
    }
}

impl PairHistory {
    fn fields(&mut self) -> [&mut Vec<u64>; 5] {
        let Self { pause, final_sync, machine_state, round_trip, link } = self;
        [pause, final_sync, machine_state, round_trip, link]
    }
}

fn entry<'a, T: Default>(
    all: &'a mut BTreeMap<String, Entry<T>>,
    key: &str,
    clock: u64,
) -> Option<&'a mut T> {
    if key.is_empty() || key.len() > KEY_MAX_BYTES {
        return None;
    }
    let entry = all.entry(key.to_owned()).or_default();
    entry.used = clock;
    forget(all);
    all.get_mut(key).map(|entry| &mut entry.is)
}

/// Lets the entries go that were not used for longest.
fn forget<T>(all: &mut BTreeMap<String, Entry<T>>) {
    all.retain(|key, _| !key.is_empty() && key.len() <= KEY_MAX_BYTES);
    while all.len() > KEYS_MAX {
        let oldest = all.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
        let Some(oldest) = oldest else { return };
        all.remove(&oldest);
    }
}

fn keep_last<T>(values: &mut Vec<T>, max: usize) {
    let surplus = values.len().saturating_sub(max);
    values.drain(..surplus);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_whatever_is_added_or_comes_from_outside() {
        let mut history = History::default();
        for number in 0..1_000 {
            let key = format!("kind {}", number % 200);
            history.add_kind(&key, &KindHistory { look: vec![number; 9], ..Default::default() });
        }
        assert_eq!(history.kinds.len(), KEYS_MAX);
        assert!(history.kind("kind 199").unwrap().look.len() <= VALUES_MAX);
        assert!(history.kind("kind 10").is_none(), "the oldest went");
        history.add_kind(&"x".repeat(9_000), &KindHistory::default());
        assert_eq!(history.kinds.len(), KEYS_MAX);

        let mut huge = History::default();
        let residuals_permille = std::array::from_fn(|_| vec![1; 100_000]);
        let whole = WholeHistory { residuals_permille, ..Default::default() };
        huge.wholes.insert("w".into(), Entry { used: 1, is: whole });
        huge.wholes.insert("y".repeat(1 << 20), Entry::default());
        let limited = huge.limit().unwrap();
        assert_eq!(limited.wholes.len(), 1);
        assert_eq!(limited.whole("w").unwrap().residuals_permille[0].len(), RESIDUALS_MAX);
        assert_eq!(History { version: VERSION + 1, ..History::default() }.limit(), None);
    }

    #[test]
    fn the_newest_values_stay() {
        let mut history = History::default();
        for number in 0..100u64 {
            history.add_pair("a → b", &PairHistory { pause: vec![number], ..Default::default() });
        }
        let pause = &history.pair("a → b").unwrap().pause;
        assert_eq!(**pause, (68..100).collect::<Vec<_>>());
    }
}
