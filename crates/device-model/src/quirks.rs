//! Deviations of real drivers and servers, and some that only a test would want, each switchable by
//! name.
//!
//! The names are stable: `vmferry device serve --quirk NAME[=ARGUMENT]` and the `deviations` of a
//! profile use them. Evidence for each is in the protocol reference, section 5.

use std::collections::BTreeSet;

use vfio_migration::DeviceState;

use crate::error::ModelError;

/// A transition that fails on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailArc {
    /// The arc's first state.
    pub from: DeviceState,
    /// The arc's second state.
    pub to: DeviceState,
    /// What the SET answers.
    pub errno: i32,
    /// The device ends in ERROR; else it stays where the arc began.
    pub to_error: bool,
    /// How often; `None` = always.
    pub times: Option<u32>,
}

/// A transition that takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowArc {
    /// The arc's second state.
    pub to: DeviceState,
    /// How much longer, in ms.
    pub ms: u64,
    /// Once in so many SETs; 1 = always.
    pub one_in: u64,
}

/// Loading that takes long now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowLoad {
    /// Of its time.
    pub percent: u64,
    /// Once in so many writes; 1 = always.
    pub one_in: u64,
}

/// What [`MIG_DATA_SIZE`](vfio_migration::MigratableDevice::stop_copy_length) and PRECOPY_INFO claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SizeClaim {
    /// The truth, as far as the device knows it.
    #[default]
    Honest,
    /// Values near UINT64_MAX, as seen in the field.
    Garbage,
    /// Always 0.
    Zero,
    /// A tenth of the truth.
    Under,
    /// The query fails with EIO.
    Fails,
}

/// All switches. The default is a device without deviation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// `no-migration`: the device has no migration support at all (D3).
    pub no_migration: bool,
    /// `caller-flags-back`: without the opt-in, PRECOPY_INFO gives the caller's flags back (P6).
    pub caller_flags_back: bool,
    /// `one-size-field`: PRECOPY_INFO assigns only the size that applies; the other is the caller's (P9).
    pub one_size_field: bool,
    /// `zero-at-temporary-end`: read answers 0 instead of ENOMSG when PRE_COPY has nothing now (S1).
    pub zero_at_temporary_end: bool,
    /// `no-info-in-p2p`: PRECOPY_INFO is refused in PRE_COPY_P2P (hisi_acc).
    pub no_info_in_p2p: bool,
    /// `info-drives-device`: dirty data becomes readable only by asking PRECOPY_INFO (mlx5).
    pub info_drives_device: bool,
    /// `hidden-save-failure`: saving fails silently in PRE_COPY: reads find nothing, sizes are 0, and
    /// STOP_COPY sends the full image (mlx5).
    pub hidden_save_failure: bool,
    /// `stay-in-resuming`: a device that dwells in STOP between loading and running loses its DMA (reported
    /// for mlx5, once).
    pub stay_in_resuming: bool,
    /// `reset-keeps-state`: a reset keeps the migration state and is refused in STOP and STOP_COPY
    /// (libvfio-user).
    pub reset_keeps_state: bool,
    /// `size=garbage|zero|under|fails`: what MIG_DATA_SIZE claims; garbage shows in PRECOPY_INFO too (Z3).
    pub size: SizeClaim,
    /// `info-fails`: PRECOPY_INFO fails with EIO.
    pub info_fails: bool,
    /// `short-reads=N`: no read gives more than N bytes (S8).
    pub short_reads: Option<usize>,
    /// `reinit-storm=K`: every K reads in PRE_COPY the configuration becomes initial data again.
    pub reinit_storm: Option<u64>,
    /// `enomsg-forever`: in PRE_COPY reads find nothing although PRECOPY_INFO says there is.
    pub enomsg_forever: bool,
    /// `grow-after-stop=KIB`: so much state is dirtied at the moment the device stops to be saved.
    pub grow_after_stop_kib: Option<u32>,
    /// `corrupt-save`: one bit of the bulk state is wrong on the stream, checksums included: only a
    /// digest finds it.
    pub corrupt_save: bool,
    /// `dma-log-blind`: DMA logging is accepted and nothing is logged.
    pub dma_log_blind: bool,
    /// `lose-interrupts`: pending interrupts are left out of the stream.
    pub lose_interrupts: bool,
    /// `bad-load-errors`: data that does not validate leads to ERROR instead of staying in RESUMING (X8).
    pub bad_load_errors: bool,
    /// `fail-arc=FROM-TO[:ERRNO][:error][:TIMES]`: transitions that fail.
    pub fail_arcs: Vec<FailArc>,
    /// `slow-arc=TO:MS[:ONE-IN]`: transitions into a state that take so long on top, always or once in so
    /// many SETs of the device.
    pub slow_arcs: Vec<SlowArc>,
    /// `slow-load=PERCENT:ONE-IN`: once in so many writes, loading takes so many percent of its time.
    pub slow_load: Option<SlowLoad>,
    /// `reinit-when-read=N`: every Nth PRECOPY_INFO that finds nothing unread makes the configuration
    /// initial data again.
    pub reinit_when_read: Option<u64>,
    /// `break-RULE`: the device breaks that rule of `docs/conformance.md`, and as little else as can be.
    pub breaks: Breaks,
}

/// The rules that a device can break on purpose; servers can break more.
pub const BREAKS: [&str; 21] = [
    "F2", "F5", "F10", "F13", "F14", "X2", "X8", "S4", "P5", "P6", "P8", "R3", "R4", "R5", "R6",
    "R7", "Z4", "H3", "L2", "L3", "L7",
];

/// Rules that are broken on purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Breaks(BTreeSet<&'static str>);

impl Breaks {
    /// Breaks one of [`BREAKS`]; `false` for anything else.
    pub fn insert(&mut self, rule: &str) -> bool {
        let known = BREAKS.into_iter().find(|known| *known == rule);
        self.0.extend(known);
        known.is_some()
    }

    /// The rule is broken.
    pub fn has(&self, rule: &str) -> bool {
        self.0.contains(rule)
    }
}

/// Every name with its argument, if it takes one.
pub const QUIRK_NAMES: [&str; 24] = [
    "no-migration",
    "caller-flags-back",
    "one-size-field",
    "zero-at-temporary-end",
    "no-info-in-p2p",
    "info-drives-device",
    "hidden-save-failure",
    "stay-in-resuming",
    "reset-keeps-state",
    "size=garbage|zero|under|fails",
    "info-fails",
    "short-reads=BYTES",
    "reinit-storm=READS",
    "enomsg-forever",
    "grow-after-stop=KIB",
    "corrupt-save",
    "dma-log-blind",
    "lose-interrupts",
    "bad-load-errors",
    "fail-arc=FROM-TO[:ERRNO][:error][:TIMES]",
    "slow-arc=TO:MS[:ONE-IN]",
    "slow-load=PERCENT:ONE-IN",
    "reinit-when-read=QUESTIONS",
    "break-RULE",
];

impl Quirks {
    /// Switches on what `names` lists.
    pub fn from_names<S: AsRef<str>>(
        names: impl IntoIterator<Item = S>,
    ) -> Result<Self, ModelError> {
        let mut quirks = Self::default();
        for name in names {
            quirks.switch_on(name.as_ref())?;
        }
        Ok(quirks)
    }

    /// Switches on one quirk, `name` or `name=argument`.
    pub fn switch_on(&mut self, given: &str) -> Result<(), ModelError> {
        let (name, argument) = match given.split_once('=') {
            Some((name, argument)) => (name, Some(argument)),
            None => (given, None),
        };
        let problem = |problem: &str| ModelError::QuirkArgument {
            name: given.into(),
            problem: problem.into(),
        };
        let number = |least: u64| {
            let parsed = argument.and_then(|a| a.parse::<u64>().ok());
            parsed
                .filter(|n| (least..=u64::from(u32::MAX)).contains(n))
                .ok_or_else(|| problem(&format!("takes a number of at least {least}")))
        };
        if let Some(flag) = self.flag(name) {
            if argument.is_some() {
                return Err(problem("takes no argument"));
            }
            *flag = true;
            return Ok(());
        }
        if let Some(rule) = name.strip_prefix("break-") {
            return match (argument, self.breaks.insert(rule)) {
                (Some(_), _) => Err(problem("takes no argument")),
                (None, true) => Ok(()),
                (None, false) => Err(problem(&format!("breaks one of {}", BREAKS.join(", ")))),
            };
        }
        match name {
            "size" => {
                self.size = match argument {
                    Some("garbage") => SizeClaim::Garbage,
                    Some("zero") => SizeClaim::Zero,
                    Some("under") => SizeClaim::Under,
                    Some("fails") => SizeClaim::Fails,
                    _ => return Err(problem("takes garbage, zero, under or fails")),
                };
            }
            "short-reads" => self.short_reads = Some(number(1)? as usize),
            "reinit-storm" => self.reinit_storm = Some(number(1)?),
            "grow-after-stop" => self.grow_after_stop_kib = Some(number(1)? as u32),
            "fail-arc" => {
                let arc = argument.and_then(parse_fail_arc);
                let arc = arc.ok_or_else(|| {
                    problem("takes FROM-TO[:ERRNO][:error][:TIMES], as in stop-stop_copy:5:error:1")
                })?;
                self.fail_arcs.push(arc);
            }
            "slow-arc" => {
                let slow = argument.and_then(parse_slow_arc).ok_or_else(|| {
                    problem("takes TO:MS[:ONE-IN], as in pre_copy_p2p:300 or stop_copy:5000:100")
                })?;
                self.slow_arcs.push(slow);
            }
            "slow-load" => {
                let parts = argument.and_then(|a| a.split_once(':'));
                let number = |text: &str| text.parse().ok().filter(|n| (1..=1_000_000).contains(n));
                let slow = parts.and_then(|(percent, one_in)| {
                    Some(SlowLoad { percent: number(percent)?, one_in: number(one_in)? })
                });
                let slow = slow.ok_or_else(|| problem("takes PERCENT:ONE-IN, as in 1000:100"))?;
                self.slow_load = Some(slow);
            }
            "reinit-when-read" => self.reinit_when_read = Some(number(1)?),
            _ => {
                let known = QUIRK_NAMES.join(", ");
                return Err(ModelError::UnknownQuirk { name: given.into(), known });
            }
        }
        Ok(())
    }

    fn flag(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "no-migration" => &mut self.no_migration,
            "caller-flags-back" => &mut self.caller_flags_back,
            "one-size-field" => &mut self.one_size_field,
            "zero-at-temporary-end" => &mut self.zero_at_temporary_end,
            "no-info-in-p2p" => &mut self.no_info_in_p2p,
            "info-drives-device" => &mut self.info_drives_device,
            "hidden-save-failure" => &mut self.hidden_save_failure,
            "stay-in-resuming" => &mut self.stay_in_resuming,
            "reset-keeps-state" => &mut self.reset_keeps_state,
            "info-fails" => &mut self.info_fails,
            "enomsg-forever" => &mut self.enomsg_forever,
            "corrupt-save" => &mut self.corrupt_save,
            "dma-log-blind" => &mut self.dma_log_blind,
            "lose-interrupts" => &mut self.lose_interrupts,
            "bad-load-errors" => &mut self.bad_load_errors,
            _ => return None,
        })
    }
}

/// A state by the uAPI's name, in any case, with `_` or without prefix.
fn parse_state(name: &str) -> Option<DeviceState> {
    DeviceState::ALL.into_iter().find(|state| state.name().eq_ignore_ascii_case(name))
}

fn parse_slow_arc(argument: &str) -> Option<SlowArc> {
    let mut parts = argument.split(':');
    let to = parse_state(parts.next()?)?;
    let ms = parts.next()?.parse().ok().filter(|ms| *ms <= 3_600_000)?;
    let one_in = match parts.next() {
        Some(one_in) => one_in.parse().ok().filter(|n| *n >= 1)?,
        None => 1,
    };
    parts.next().is_none().then_some(SlowArc { to, ms, one_in })
}

fn parse_fail_arc(argument: &str) -> Option<FailArc> {
    let mut parts = argument.split(':');
    let (from, to) = parts.next()?.split_once('-')?;
    let (from, to) = (parse_state(from)?, parse_state(to)?);
    let mut arc = FailArc { from, to, errno: libc::EIO, to_error: false, times: None };
    let mut numbers = 0;
    for part in parts {
        if part == "error" {
            arc.to_error = true;
            continue;
        }
        let number: u32 = part.parse().ok()?;
        match numbers {
            0 => arc.errno = i32::try_from(number).ok().filter(|n| (1..4096).contains(n))?,
            1 => arc.times = Some(number),
            _ => return None,
        }
        numbers += 1;
    }
    Some(arc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_known() {
        for name in QUIRK_NAMES {
            let mut quirks = Quirks::default();
            let example = match name.split_once('=') {
                None if name == "break-RULE" => "break-F5".into(),
                None => name.to_owned(),
                Some(("size", _)) => "size=under".into(),
                Some(("fail-arc", _)) => "fail-arc=stop-stop_copy:5:error:1".into(),
                Some(("slow-arc", _)) => "slow-arc=PRE_COPY_P2P:300:7".into(),
                Some(("slow-load", _)) => "slow-load=1000:100".into(),
                Some((name, _)) => format!("{name}=7"),
            };
            quirks.switch_on(&example).unwrap();
            assert_ne!(quirks, Quirks::default(), "{example} switched nothing on");
        }
    }

    #[test]
    fn a_fail_arc_parses_into_its_parts() {
        let quirks = Quirks::from_names(["fail-arc=stop-stop_copy:5:error:2"]).unwrap();
        let expected = FailArc {
            from: DeviceState::Stop,
            to: DeviceState::StopCopy,
            errno: 5,
            to_error: true,
            times: Some(2),
        };
        assert_eq!(quirks.fail_arcs, [expected]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (given, named) in [
            ("flags-back", "caller-flags-back"),
            ("one-size-field=1", "no argument"),
            ("size", "garbage"),
            ("size=huge", "garbage"),
            ("short-reads=0", "at least 1"),
            ("short-reads=99999999999", "number"),
            ("fail-arc=stop", "FROM-TO"),
            ("fail-arc=stop-nowhere", "FROM-TO"),
            ("fail-arc=stop-running:0", "FROM-TO"),
            ("slow-arc=stop", "TO:MS"),
            ("slow-arc=stop:5:0", "ONE-IN"),
            ("slow-load=5", "PERCENT"),
        ] {
            let error = Quirks::from_names([given]).unwrap_err().to_string();
            assert!(error.contains(named), "{given}: {error}");
        }
    }
}
