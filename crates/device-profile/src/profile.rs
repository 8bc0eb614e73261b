//! [`Profile`]: one kind of device.

use serde::{Deserialize, Serialize};

use crate::error::ProfileError;
use crate::value::{Fact, Quantity};

/// No profile's text is longer than this, in bytes.
const TEXT_MAX_BYTES: usize = 64 << 10;
/// No device's state is larger than this, in bytes.
const STATE_MAX_BYTES: u64 = 1 << 40;
/// [`Profile::scaled_to`] goes no lower than this, in bytes.
const STATE_MIN_BYTES: u64 = 1 << 10;

/// What a kind of device costs to migrate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Short name, lower case with dashes.
    pub name: String,
    /// The device it is modelled on.
    pub models: String,
    /// One line for a person.
    pub description: String,
    /// What the device offers.
    pub features: Features,
    /// How much state it has.
    pub sizes: Sizes,
    /// How fast it changes and moves.
    pub rates: Rates,
    /// How long its transitions take.
    pub times: Times,
    /// How it behaves in PRE_COPY.
    pub precopy: Precopy,
    /// Deviations of the real driver, by the names software devices know them under.
    #[serde(default)]
    pub deviations: Vec<Fact<String>>,
}

/// What the device offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// The P2P states.
    pub p2p: Fact<bool>,
    /// PRE_COPY and, with it, PRECOPY_INFO.
    pub pre_copy: Fact<bool>,
    /// The INFOv2 opt-in.
    pub precopy_info_v2: Fact<bool>,
    /// MIG_DATA_SIZE.
    pub data_size: Fact<bool>,
    /// The device logs its DMA writes.
    pub dma_logging: Fact<bool>,
}

/// How much state the device has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// The whole state after power-on.
    pub total_bytes: Quantity,
    /// The part that should be read before PRE_COPY is left.
    pub initial_bytes: Quantity,
    /// The part that can be read only once the device is stopped.
    pub stop_only_bytes: Quantity,
    /// The largest initial part a guest can make by reconfiguring the device.
    pub initial_max_bytes: Quantity,
}

/// How fast the state changes and moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// State dirtied by a working guest.
    pub dirty_bytes_per_s: Quantity,
    /// Reading the data stream.
    pub read_bytes_per_s: Quantity,
    /// Writing the data stream on the other side.
    pub load_bytes_per_s: Quantity,
}

/// How long transitions take, in µs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// RUNNING → PRE_COPY and RUNNING_P2P → PRE_COPY_P2P.
    pub to_precopy_us: Quantity,
    /// RUNNING → RUNNING_P2P and PRE_COPY → PRE_COPY_P2P.
    pub to_p2p_us: Quantity,
    /// Any working state → STOP or STOP_COPY.
    pub to_stop_us: Quantity,
    /// STOP → RUNNING_P2P, and out of a P2P state; without P2P, STOP → RUNNING.
    pub to_running_us: Quantity,
    /// Fixed part of the final save, on the way to STOP_COPY.
    pub save_fixed_us: Quantity,
    /// Fixed part of loading initial data: the destination allocates what the device will need.
    pub load_cold_us: Quantity,
    /// RESUMING → STOP when initial data was loaded before.
    pub load_warm_us: Quantity,
    /// Reset.
    pub reset_us: Quantity,
}

/// How the device behaves in PRE_COPY.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precopy {
    /// What happens to unread data when the guest reconfigures the device.
    pub reinit: Fact<ReinitPolicy>,
    /// REINIT is also reported in PRE_COPY_P2P.
    pub reinit_in_p2p: Fact<bool>,
    /// How change after the first reading is offered.
    pub dirty: Fact<DirtyModel>,
    /// With [`DirtyModel::Reread`]: the shortest time between two readings, in µs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reread_interval_us: Option<Quantity>,
    /// The P2P states stop all DMA, not only P2P (rule H2).
    pub p2p_stops_dma: Fact<bool>,
}

/// What a device makes of its unread data when its guest reconfigures it in PRE_COPY.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReinitPolicy {
    /// REINIT is never reported: new data is ordinary change.
    Never,
    /// All unread bytes become initial and are read first (mlx5).
    Flush,
    /// Unread bytes are dropped and counted again, relative to the new initial data.
    Recount,
}

/// How a device offers, in PRE_COPY, what changed after it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyModel {
    /// It knows what changed.
    Tracked,
    /// It offers everything again, at most once in an interval (virtio).
    Reread,
    /// Not at all: PRE_COPY carries the initial part alone (qat, hisi_acc).
    Never,
}

impl Profile {
    /// Parses and checks a profile.
    pub fn from_toml(text: &str) -> Result<Self, ProfileError> {
        if text.len() > TEXT_MAX_BYTES {
            return Err(ProfileError::TooLong { len: text.len(), max: TEXT_MAX_BYTES });
        }
        let profile: Self = toml::from_str(text)?;
        profile.check()?;
        Ok(profile)
    }

    /// The same kind of device with `total_bytes` of state (1 KiB to 1 TiB): sizes, the rate of change and the
    /// allocation on loading scale with it; rates of moving and fixed times stay. The largest
    /// reconfiguration stays too, because it is the guest's to choose.
    pub fn scaled_to(&self, total_bytes: u64) -> Self {
        let from = self.sizes.total_bytes.typical;
        let total_bytes = total_bytes.clamp(STATE_MIN_BYTES, STATE_MAX_BYTES);
        let mut scaled = self.clone();
        for quantity in [
            &mut scaled.sizes.total_bytes,
            &mut scaled.sizes.initial_bytes,
            &mut scaled.sizes.stop_only_bytes,
            &mut scaled.rates.dirty_bytes_per_s,
            &mut scaled.times.load_cold_us,
        ] {
            *quantity = quantity.scaled(total_bytes, from);
        }
        if self.features.pre_copy.value {
            let initial = &mut scaled.sizes.initial_bytes;
            for value in [&mut initial.min, &mut initial.typical, &mut initial.max] {
                *value = (*value).max(1);
            }
        }
        // Loading into a device that was prepared is never slower than into one that was not.
        let warm = &scaled.times.load_warm_us;
        let cold = &mut scaled.times.load_cold_us;
        cold.min = cold.min.max(warm.min);
        cold.typical = cold.typical.max(warm.typical);
        cold.max = cold.max.max(warm.max);
        let initial_max = &mut scaled.sizes.initial_max_bytes;
        for value in [&mut initial_max.min, &mut initial_max.typical, &mut initial_max.max] {
            *value = (*value).max(scaled.sizes.initial_bytes.max);
        }
        scaled
    }

    /// Every quantity with its key.
    pub fn quantities(&self) -> Vec<(&'static str, &Quantity)> {
        let Self { sizes, rates, times, precopy, .. } = self;
        let mut all = vec![
            ("sizes.total_bytes", &sizes.total_bytes),
            ("sizes.initial_bytes", &sizes.initial_bytes),
            ("sizes.stop_only_bytes", &sizes.stop_only_bytes),
            ("sizes.initial_max_bytes", &sizes.initial_max_bytes),
            ("rates.dirty_bytes_per_s", &rates.dirty_bytes_per_s),
            ("rates.read_bytes_per_s", &rates.read_bytes_per_s),
            ("rates.load_bytes_per_s", &rates.load_bytes_per_s),
            ("times.to_precopy_us", &times.to_precopy_us),
            ("times.to_p2p_us", &times.to_p2p_us),
            ("times.to_stop_us", &times.to_stop_us),
            ("times.to_running_us", &times.to_running_us),
            ("times.save_fixed_us", &times.save_fixed_us),
            ("times.load_cold_us", &times.load_cold_us),
            ("times.load_warm_us", &times.load_warm_us),
            ("times.reset_us", &times.reset_us),
        ];
        all.extend(precopy.reread_interval_us.as_ref().map(|q| ("precopy.reread_interval_us", q)));
        all
    }

    /// The notes of everything that is not a quantity, with their keys.
    fn notes(&self) -> Vec<(&'static str, &str)> {
        let Self { features, precopy, .. } = self;
        let mut all = vec![
            ("features.p2p", features.p2p.note.as_str()),
            ("features.pre_copy", &features.pre_copy.note),
            ("features.precopy_info_v2", &features.precopy_info_v2.note),
            ("features.data_size", &features.data_size.note),
            ("features.dma_logging", &features.dma_logging.note),
            ("precopy.reinit", &precopy.reinit.note),
            ("precopy.reinit_in_p2p", &precopy.reinit_in_p2p.note),
            ("precopy.dirty", &precopy.dirty.note),
            ("precopy.p2p_stops_dma", &precopy.p2p_stops_dma.note),
        ];
        all.extend(self.deviations.iter().map(|fact| ("deviations", fact.note.as_str())));
        all
    }

    fn check(&self) -> Result<(), ProfileError> {
        let invalid = |key, problem: String| {
            Err(ProfileError::Invalid { profile: self.name.clone(), key, problem })
        };
        let name_ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || self.name.len() > 64 || !self.name.chars().all(name_ok) {
            return invalid("name", "is not lower-case letters, digits and dashes".into());
        }
        for (key, quantity) in self.quantities() {
            if quantity.note.trim().is_empty() {
                return invalid(key, "has no note: say where it comes from".into());
            }
        }
        for (key, note) in self.notes() {
            if note.trim().is_empty() {
                return invalid(key, "has no note: say where it comes from".into());
            }
        }
        let Sizes { total_bytes, initial_bytes, stop_only_bytes, initial_max_bytes } = &self.sizes;
        for (key, quantity) in
            [("sizes.total_bytes", total_bytes), ("sizes.initial_max_bytes", initial_max_bytes)]
        {
            if quantity.max > STATE_MAX_BYTES {
                return invalid(key, format!("is above {STATE_MAX_BYTES} bytes"));
            }
        }
        let parts = initial_bytes.typical.checked_add(stop_only_bytes.typical);
        if parts.is_none_or(|parts| parts > total_bytes.typical) {
            let total = total_bytes.typical;
            return invalid(
                "sizes.total_bytes",
                format!("of {total} is less than initial and stop-only bytes together"),
            );
        }
        if initial_max_bytes.typical < initial_bytes.max {
            return invalid("sizes.initial_max_bytes", "is less than initial_bytes".into());
        }
        for (key, rate) in [
            ("rates.read_bytes_per_s", &self.rates.read_bytes_per_s),
            ("rates.load_bytes_per_s", &self.rates.load_bytes_per_s),
        ] {
            if rate.min == 0 {
                return invalid(key, "may be 0, so nothing would ever arrive".into());
            }
        }
        let pre_copy = self.features.pre_copy.value;
        if self.features.precopy_info_v2.value && !pre_copy {
            return invalid("features.precopy_info_v2", "needs pre_copy (rule R1)".into());
        }
        let reinit = self.precopy.reinit.value != ReinitPolicy::Never;
        if reinit && !self.features.precopy_info_v2.value {
            return invalid("precopy.reinit", "needs precopy_info_v2 (rule R3)".into());
        }
        if pre_copy && initial_bytes.min == 0 {
            return invalid("sizes.initial_bytes", "starts non-zero in PRE_COPY (rule P4)".into());
        }
        let reread = self.precopy.dirty.value == DirtyModel::Reread;
        if reread != self.precopy.reread_interval_us.is_some() {
            return invalid(
                "precopy.reread_interval_us",
                "belongs to dirty = \"reread\", and only to it".into(),
            );
        }
        Ok(())
    }
}
