//! Instruction counts: a busy machine changes times, hardly the number of instructions.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};

/// `PERF_TYPE_HARDWARE`, `PERF_COUNT_HW_INSTRUCTIONS`, and the ioctls of perf_event.h.
const HARDWARE: u32 = 0;
const INSTRUCTIONS: u64 = 1;
const ENABLE: libc::c_ulong = 0x2400;
const DISABLE: libc::c_ulong = 0x2401;
const RESET: libc::c_ulong = 0x2403;

/// Bits of `perf_event_attr`: disabled, inherit, exclude_kernel, exclude_hv.
const DISABLED: u64 = 1;
const INHERIT: u64 = 1 << 1;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HV: u64 = 1 << 6;

/// The first 64 bytes of `perf_event_attr` (PERF_ATTR_SIZE_VER0), which every kernel takes.
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    bp_type: u32,
    config1: u64,
}

/// Counts instructions in user space of this thread and of threads it starts.
pub struct Instructions {
    counter: File,
}

impl Instructions {
    /// Opens the counter.
    ///
    /// # Errors
    /// The CPU has no counters (many VMs), or they are not allowed (`perf_event_paranoid`).
    pub fn open() -> io::Result<Self> {
        let attr = Attr {
            kind: HARDWARE,
            size: size_of::<Attr>() as u32,
            config: INSTRUCTIONS,
            flags: DISABLED | INHERIT | EXCLUDE_KERNEL | EXCLUDE_HV,
            ..Attr::default()
        };
        // SAFETY: `attr` is as long as it says, and outlives the call; this thread, any CPU, no group.
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attr, 0, -1, -1, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self { counter: unsafe { File::from_raw_fd(fd as i32) } })
    }

    /// Instructions that `run` took.
    ///
    /// # Errors
    /// The counter could not be read.
    pub fn count(&mut self, run: impl FnOnce()) -> io::Result<u64> {
        self.control(RESET)?;
        self.control(ENABLE)?;
        run();
        self.control(DISABLE)?;
        let mut value = [0; 8];
        self.counter.read_exact(&mut value)?;
        Ok(u64::from_ne_bytes(value))
    }

    fn control(&self, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: these requests take no memory.
        match unsafe { libc::ioctl(self.counter.as_raw_fd(), request, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_the_work_is_about_twice_the_instructions() {
        let mut counter = match Instructions::open() {
            Ok(counter) => counter,
            Err(error) => {
                println!("skipped: no instruction counter: {error}");
                return;
            }
        };
        let mut work = |rounds: u64| {
            let sum = || (0..rounds).fold(0, |sum, i| std::hint::black_box(sum ^ i));
            counter.count(|| _ = std::hint::black_box(sum())).unwrap()
        };
        let (once, twice) = (work(1_000_000), work(2_000_000));
        assert!((19..22).contains(&(twice * 10 / once)), "{once} and {twice}");
    }
}
