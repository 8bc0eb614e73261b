//! What the kernel complains about while a case runs.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// What a complaint looks like. Everything else the kernel logs is its own business.
const COMPLAINTS: [&str; 8] = [
    "WARNING:",
    "BUG:",
    "BUG ",
    "Oops",
    "general protection fault",
    "unable to handle",
    "list_add corruption",
    "list_del corruption",
];
/// The longest record of the kernel's log.
const RECORD_MAX_BYTES: usize = 8192;

/// The kernel's log, read as it goes.
#[derive(Debug)]
pub struct KernelLog {
    file: Option<File>,
}

impl KernelLog {
    /// From here on; what was logged before is skipped.
    pub fn open() -> Self {
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok();
        let mut log = Self { file };
        log.complaints();
        log
    }

    /// The complaints since the last call.
    pub fn complaints(&mut self) -> Vec<String> {
        let mut found = Vec::new();
        let Some(file) = &mut self.file else { return found };
        let mut record = [0; RECORD_MAX_BYTES];
        loop {
            match file.read(&mut record) {
                Ok(0) => return found,
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    found.extend(complaint(&text));
                }
                // EPIPE: records were overwritten before they were read; go on with what is there.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => return found,
            }
        }
    }
}

/// The text of a record (`level,number,time,-;text`) that is a complaint.
fn complaint(record: &str) -> Option<String> {
    let (_, text) = record.split_once(';')?;
    let line = text.lines().next()?;
    COMPLAINTS.iter().any(|mark| line.contains(mark)).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_told_from_a_message() {
        let warning = "4,1,2,-;WARNING: CPU: 0 PID: 9 at fs/x.c:1 f+0x1/0x2\n SUBSYSTEM=x\n";
        assert_eq!(
            complaint(warning).as_deref(),
            Some("WARNING: CPU: 0 PID: 9 at fs/x.c:1 f+0x1/0x2")
        );
        assert_eq!(complaint("6,1,2,-;mtty: registered\n DEVICE=WARNING:\n"), None);
        assert_eq!(complaint("nothing"), None);
    }
}
