//! Sizes and durations as people write them: `1G`, `512M`, `300ms`, `1.5s`.

use std::time::Duration;

/// A size in bytes: digits and one of `K`, `M`, `G`, `T` (1024-fold each, `KiB` and so on too), or none
/// for bytes.
///
/// # Errors
/// A sentence that shows what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let refused = || format!("{text:?} is not a size; write 512M, 1G or a number of bytes");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches("iB").to_ascii_uppercase().as_str() {
        "" if !unit.ends_with("iB") => 0,
        "B" if unit == "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(refused()),
    };
    let number: u64 = number.parse().map_err(|_| refused())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is more bytes than a u64 holds"))
}

/// A link's rate as its makers write it, in bits per second: digits and one of `K`, `M`, `G` (1000-fold
/// each). Answers bytes per second.
///
/// # Errors
/// A sentence that shows what is accepted.
pub fn parse_link(text: &str) -> Result<u64, String> {
    let refused =
        || format!("{text:?} is not a rate; write 10G, 2500M or a number of bits per second");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit {
        "" => 1,
        "K" | "k" => 1_000,
        "M" | "m" => 1_000_000,
        "G" | "g" => 1_000_000_000,
        _ => return Err(refused()),
    };
    let bits = number.parse::<u64>().ok().and_then(|number| number.checked_mul(scale));
    bits.map(|bits| bits / 8).filter(|bytes| *bytes > 0).ok_or_else(refused)
}

/// A duration: a decimal number with `us`, `ms`, `s` or `min`.
///
/// # Errors
/// A sentence that shows what is accepted.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is not a duration; write 300ms, 1.5s or 2min");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds_per_unit = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(refused()),
    };
    let number: f64 = number.parse().map_err(|_| refused())?;
    let seconds = number * seconds_per_unit;
    if !(0.0..=86_400.0).contains(&seconds) {
        return Err(format!("{text:?} is longer than a day"));
    }
    Ok(Duration::from_nanos((seconds * 1e9).round() as u64))
}

/// `bytes` for people, in binary units.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Milliseconds for people; an unknown value is said to be unknown.
pub fn show_ms(ms: Option<f64>) -> String {
    match ms {
        None => "unknown".into(),
        Some(ms) if ms >= 10_000.0 => format!("{:.2} s", ms / 1000.0),
        Some(ms) if ms >= 100.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{ms:.1} ms"),
    }
}

/// `duration` in ms, as JSON has it.
pub fn as_ms(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        for (text, bytes) in [
            ("4096", 4096),
            ("0", 0),
            ("4096B", 4096),
            ("1K", 1 << 10),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("1G", 1 << 30),
            ("1GiB", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1X", "1.5G", "-1", "1 G", "1GB", "1iB", "99999999T", "٣G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn links_are_decimal_bits() {
        for (text, bytes) in [("10G", 1_250_000_000), ("2500M", 312_500_000), ("8", 1)] {
            assert_eq!(parse_link(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "7", "0", "1T", "-1G", "99999999999999G"] {
            assert!(parse_link(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, us) in [
            ("300ms", 300_000),
            ("1.5s", 1_500_000),
            ("250us", 250),
            ("2min", 120_000_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_micros(us)), "{text}");
        }
        for text in ["", "300", "ms", "1h", "-1s", "1..5s", "2000min", "infs", "NaNs"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_is_short() {
        assert_eq!(show_bytes(1023), "1023 B");
        assert_eq!(show_bytes(3 << 19), "1.5 MiB");
        assert_eq!(show_ms(None), "unknown");
        assert_eq!(show_ms(Some(12.34)), "12.3 ms");
        assert_eq!(show_ms(Some(299.9)), "300 ms");
        assert_eq!(show_ms(Some(12_345.0)), "12.35 s");
    }
}
