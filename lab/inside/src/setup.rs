//! Makes an empty machine fit to run cases: file systems, the loopback interface, our driver.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, bail, ensure};

/// Our driver, if it was built.
const MODULE: &str = "/lib/ferrydev.ko";

/// Does all of it.
pub fn set_up() -> anyhow::Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
    ] {
        mount(kind, target)?;
    }
    // devtmpfs has no place for POSIX shared memory.
    fs::create_dir_all("/dev/shm").context("make /dev/shm")?;
    loopback_up().context("bring up the loopback interface")?;
    if Path::new(MODULE).exists() {
        load_ferrydev()?;
    }
    Ok(())
}

/// Loads our driver.
pub fn load_ferrydev() -> anyhow::Result<()> {
    load_module(MODULE)
}

fn mount(kind: &str, target: &str) -> anyhow::Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
    let kind_c = CString::new(kind)?;
    let target_c = CString::new(target)?;
    // SAFETY: all pointers are to strings that live for the call; no data is passed.
    let result = unsafe {
        libc::mount(kind_c.as_ptr(), target_c.as_ptr(), kind_c.as_ptr(), 0, std::ptr::null())
    };
    check(result).with_context(|| format!("mount {kind} on {target}"))
}

fn loopback_up() -> anyhow::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo\0") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives for the call and is what SIOCSIFFLAGS takes.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
}

fn load_module(path: &str) -> anyhow::Result<()> {
    let file = fs::File::open(path).with_context(|| format!("open {path}"))?;
    let parameters = c"";
    // SAFETY: finit_module reads the file behind the descriptor and the string, both alive for the call.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    ensure!(result == 0, "load {path}: {}", std::io::Error::last_os_error());
    Ok(())
}

fn check(result: libc::c_int) -> anyhow::Result<()> {
    if result < 0 {
        bail!(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Ends the machine. Does not come back.
pub fn power_off() -> ! {
    // SAFETY: no pointers; both end every process, which is the point.
    unsafe {
        libc::sync();
        libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF);
    }
    // Only where the machine cannot be switched off: whoever waits for it has a time limit.
    loop {
        std::thread::park();
    }
}
