//! Values that carry where they come from.

use serde::{Deserialize, Serialize};

/// How far a value can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provenance {
    /// Read in source code, a commit or a published measurement; the note says which.
    Sourced,
    /// A proposal of whoever wrote the profile; the note says why.
    Assumed,
}

/// A value that is not a range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fact<T> {
    /// The value.
    pub value: T,
    /// How far it can be trusted.
    pub provenance: Provenance,
    /// The source, or the reason of the guess.
    pub note: String,
}

/// A number, possibly a range; the key it stands under names the unit. In TOML either `value`, or
/// `min` and `max` with an optional `typical` (the middle when left out).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuantity", into = "RawQuantity")]
pub struct Quantity {
    /// The smallest credible value.
    pub min: u64,
    /// The value of a device that does nothing special; software devices use it.
    pub typical: u64,
    /// The largest credible value.
    pub max: u64,
    /// How far it can be trusted.
    pub provenance: Provenance,
    /// The source, or the reason of the guess.
    pub note: String,
}

impl Quantity {
    /// The value at `permille` of the way from `min` to `max`, for drawing samples; clamped at 1000.
    pub fn at_permille(&self, permille: u32) -> u64 {
        let span = u128::from(self.max - self.min);
        let step = span * u128::from(permille.min(1000)) / 1000;
        self.min + step as u64
    }

    /// The same quantity times `numerator / denominator`, saturating; 0 as denominator changes nothing.
    pub fn scaled(&self, numerator: u64, denominator: u64) -> Self {
        let scale = |value: u64| {
            let wide = u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1));
            u64::try_from(wide).unwrap_or(u64::MAX)
        };
        if denominator == 0 {
            return self.clone();
        }
        let (min, typical, max) = (scale(self.min), scale(self.typical), scale(self.max));
        Self { min, typical, max, provenance: self.provenance, note: self.note.clone() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuantity {
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    typical: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<u64>,
    provenance: Provenance,
    note: String,
}

impl TryFrom<RawQuantity> for Quantity {
    type Error = String;

    fn try_from(raw: RawQuantity) -> Result<Self, String> {
        let (min, typical, max) = match (raw.value, raw.min, raw.typical, raw.max) {
            (Some(value), None, None, None) => (value, value, value),
            (None, Some(min), typical, Some(max)) if min <= max => {
                let typical = typical.unwrap_or(min + (max - min) / 2);
                if !(min..=max).contains(&typical) {
                    return Err(format!("typical {typical} is not within {min} to {max}"));
                }
                (min, typical, max)
            }
            (None, Some(min), _, Some(max)) => {
                return Err(format!("min {min} is above max {max}"));
            }
            _ => return Err("a quantity is either `value`, or `min` and `max`".into()),
        };
        Ok(Self { min, typical, max, provenance: raw.provenance, note: raw.note })
    }
}

impl From<Quantity> for RawQuantity {
    fn from(quantity: Quantity) -> Self {
        let Quantity { min, typical, max, provenance, note } = quantity;
        if min == max {
            let value = Some(typical);
            return Self { value, min: None, typical: None, max: None, provenance, note };
        }
        let (min, typical, max) = (Some(min), Some(typical), Some(max));
        Self { value: None, min, typical, max, provenance, note }
    }
}
