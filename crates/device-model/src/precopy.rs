//! The check of a PRECOPY_INFO request that every device shares.
//!
//! Linux 7.1 moved it into one helper (commit c995498636c7); whoever implements a device here calls
//! [`check_request`] first and [`answer`] last.

use vfio_migration::RawPrecopyInfo;
use vfio_migration::precopy::PRECOPY_INFO_REINIT;

/// `VFIO_MIG_GET_PRECOPY_INFO`, `_IO(';', 121)`.
pub const VFIO_MIG_GET_PRECOPY_INFO: u32 = (b';' as u32) << 8 | 121;

/// Checks `request` of ioctl `command` on a saving fd. Answers the request with its flags zeroed after
/// the opt-in, so that input flags do not come back (R2).
///
/// # Errors
/// ENOTTY for another command (P1), EINVAL for an `argsz` below the struct (P3).
pub fn check_request(
    command: u32,
    request: RawPrecopyInfo,
    opted_in: bool,
) -> Result<RawPrecopyInfo, i32> {
    if command != VFIO_MIG_GET_PRECOPY_INFO {
        return Err(libc::ENOTTY);
    }
    if request.argsz < RawPrecopyInfo::SIZE {
        return Err(libc::EINVAL);
    }
    let flags = if opted_in { 0 } else { request.flags };
    Ok(RawPrecopyInfo { flags, ..request })
}

/// What a device reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Unread initial bytes.
    pub initial_bytes: u64,
    /// Unread bytes of change.
    pub dirty_bytes: u64,
    /// New initial data was announced since the last report.
    pub reinit: bool,
}

/// Builds the answer to a checked `request`. REINIT is shown after the opt-in alone (R3); without it
/// flags are 0, or the caller's where `caller_flags_back` (P6). With `one_size_field` the size that
/// does not apply stays the caller's (P9).
pub fn answer(
    request: RawPrecopyInfo,
    report: Report,
    opted_in: bool,
    caller_flags_back: bool,
    one_size_field: bool,
) -> RawPrecopyInfo {
    let flags = match (opted_in, caller_flags_back) {
        (true, _) if report.reinit => PRECOPY_INFO_REINIT,
        (true, _) | (false, false) => 0,
        (false, true) => request.flags,
    };
    let Report { initial_bytes, dirty_bytes, .. } = report;
    let answer = RawPrecopyInfo { argsz: request.argsz, flags, initial_bytes, dirty_bytes };
    match (one_size_field, initial_bytes) {
        (false, _) => answer,
        (true, 0) => RawPrecopyInfo { initial_bytes: request.initial_bytes, ..answer },
        (true, _) => RawPrecopyInfo { dirty_bytes: request.dirty_bytes, ..answer },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: RawPrecopyInfo =
        RawPrecopyInfo { argsz: 24, flags: 0xf0, initial_bytes: 111, dirty_bytes: 222 };

    #[test]
    fn p1_any_other_command_is_enotty() {
        assert_eq!(check_request(0x3b78, REQUEST, false), Err(libc::ENOTTY));
        assert!(check_request(VFIO_MIG_GET_PRECOPY_INFO, REQUEST, false).is_ok());
    }

    #[test]
    fn p3_a_short_argsz_is_einval() {
        for argsz in [0, 8, 23] {
            let request = RawPrecopyInfo { argsz, ..REQUEST };
            let checked = check_request(VFIO_MIG_GET_PRECOPY_INFO, request, true);
            assert_eq!(checked, Err(libc::EINVAL));
        }
        let longer = RawPrecopyInfo { argsz: 64, ..REQUEST };
        assert!(check_request(VFIO_MIG_GET_PRECOPY_INFO, longer, true).is_ok());
    }

    #[test]
    fn p6_r2_r3_flags_by_opt_in_and_quirk() {
        let report = Report { initial_bytes: 1, dirty_bytes: 2, reinit: true };
        // (opted in, quirk, flags of the answer)
        for (opted_in, quirk, flags) in
            [(false, false, 0), (false, true, 0xf0), (true, false, 1), (true, true, 1)]
        {
            let request = check_request(VFIO_MIG_GET_PRECOPY_INFO, REQUEST, opted_in).unwrap();
            assert_eq!(answer(request, report, opted_in, quirk, false).flags, flags);
            let calm = Report { reinit: false, ..report };
            let expected = if opted_in { 0 } else { flags };
            assert_eq!(answer(request, calm, opted_in, quirk, false).flags, expected);
        }
    }

    #[test]
    fn p9_the_size_that_does_not_apply_is_the_callers() {
        let both = |initial_bytes, dirty_bytes| {
            let report = Report { initial_bytes, dirty_bytes, reinit: false };
            let answer = answer(REQUEST, report, true, false, true);
            (answer.initial_bytes, answer.dirty_bytes)
        };
        assert_eq!(both(5, 6), (5, 222));
        assert_eq!(both(0, 6), (111, 6));
    }
}
