//! CPU seconds, and where threads run.

use std::io;
use std::time::Duration;

/// CPU time of this process so far, all its threads, user and system.
pub fn process_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of this thread so far.
pub fn thread_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a timespec of ours.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of process `pid` so far, all its threads, user and system (proc(5), fields 14 and 15).
///
/// # Errors
/// There is no such process, or its file cannot be understood.
pub fn time_of(pid: u32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let not_stat = || io::Error::other(format!("/proc/{pid}/stat is not as proc(5) says"));
    // The name, in brackets, may hold anything.
    let (_, fields) = stat.rsplit_once(')').ok_or_else(not_stat)?;
    let ticks =
        |field: usize| -> Option<u64> { fields.split_whitespace().nth(field - 3)?.parse().ok() };
    let (user, system) = ticks(14).zip(ticks(15)).ok_or_else(not_stat)?;
    Ok(Duration::from_secs_f64((user + system) as f64 / ticks_per_s()))
}

fn ticks_per_s() -> f64 {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64
}

/// CPU time that all processes of the machine have had so far, what a hypervisor took included
/// (/proc/stat: all but idle and iowait); 0 where it cannot be read.
pub fn machine_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, (idle, iowait), irq, softirq, steal; guests are in user.
    let busy: u64 = [0, 1, 2, 5, 6, 7].into_iter().filter_map(|field| ticks.get(field)).sum();
    Duration::from_secs_f64(busy as f64 / ticks_per_s())
}

/// Pins this thread to the `index`-th of the CPUs this process may use, counted around.
///
/// # Errors
/// The kernel refused.
pub fn pin(index: usize) -> io::Result<()> {
    // SAFETY: a zeroed cpu_set_t is an empty set; both calls get its true size.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(libc::getpid(), size_of_val(&allowed), &raw mut allowed) != 0 {
            return Err(io::Error::last_os_error());
        }
        let cpus: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &allowed)).collect();
        let Some(cpu) = cpus.get(index % cpus.len().max(1)) else {
            return Err(io::Error::other("no CPU to run on"));
        };
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(*cpu, &mut set);
        if libc::sched_setaffinity(0, size_of_val(&set), &raw const set) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_asking_tell_of_the_same_process() {
        let before = process_time();
        let mut sum = 0u64;
        while process_time() - before < Duration::from_millis(50) {
            sum = std::hint::black_box(sum + 1);
        }
        // The file counts in ticks of 10 ms.
        assert!(time_of(std::process::id()).unwrap() >= Duration::from_millis(20));
        assert!(time_of(u32::MAX).is_err());
    }
}
