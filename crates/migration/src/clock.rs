//! CLOCK_BOOTTIME: the clock of both sides' windows and stamps, which does not stand still while a
//! host sleeps.

use switchover::Time;

/// Now, in ns of CLOCK_BOOTTIME.
pub fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the answer; the clock exists on every Linux we run on.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

/// Now, as the brain counts it.
pub fn now() -> Time {
    Time(boottime_ns())
}

/// Names this boot: stamps of CLOCK_BOOTTIME compare only within one.
pub fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}
