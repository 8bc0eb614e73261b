//! Runs the cases, each in a process of its own, and tells the verdict on the console.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::case::{Case, Outcome};
use crate::kernel_log::KernelLog;
use crate::lab::{self, Lab};
use crate::{cases, setup};

/// Exit status of a case that was skipped; its reason is in [`VERDICT`].
const SKIPPED: u8 = 77;
/// Where a case leaves why it failed or was skipped.
const VERDICT: &str = "/run/verdict";
/// Where a case's output goes.
const OUTPUT: &str = "/run/output";
/// How many lines of a failed case's output are shown.
const OUTPUT_LINES: usize = 60;
/// The name under which what is left of a case is removed, in a process of its own: it may hang.
const TIDY: &str = "tidy";
/// How long that may take.
const TIDY_LIMIT: Duration = Duration::from_secs(20);
/// What a line of a log has in it when the emulated processor shut a guest down: KVM's SVM code has reset the vCPU
/// then. A triple fault that KVM itself came to leaves the registers as they were.
const SHUT_DOWN: [&str; 3] = ["the guest is dead", "triple fault", "rip=0xfff0 "];
/// What a case says of a guest that stands still in the emulated processor, seen as rarely.
const SILENT: &str = "no answer to ";
/// How many cases of one run of the lab may be run again.
const RERUNS: usize = 2;
/// How often is looked whether a case is over.
const POLL: Duration = Duration::from_millis(5);

/// As the first process: sets the machine up, runs each of `cases` whose name has `filter` in it, all of them so many
/// `times`, powers off.
pub fn run_all(cases: &[Case], filter: &str, times: usize) -> ! {
    let mut failed = 0;
    let mut passed = 0;
    match setup::set_up() {
        Ok(()) => {
            let mut log = KernelLog::open();
            let chosen: Vec<_> = cases.iter().filter(|case| case.name.contains(filter)).collect();
            let mut reruns = RERUNS * times;
            for case in std::iter::repeat_n(&chosen, times).flatten() {
                match run_one(case, &mut log, &mut reruns) {
                    Verdict::Passed => passed += 1,
                    Verdict::Skipped => {}
                    Verdict::Failed => failed += 1,
                }
            }
        }
        Err(error) => {
            println!("FAIL set-up: {error:#}");
            failed += 1;
        }
    }
    println!("{passed} passed, {failed} failed");
    setup::power_off()
}

enum Verdict {
    Passed,
    Skipped,
    Failed,
}

/// How one run of a case ended.
enum Ended {
    Well,
    Skipped(String),
    Badly {
        why: String,
        /// What told that the emulated processor shut down a guest of the case, or that one stands still.
        shut_down: Option<String>,
    },
}

/// A case whose guest was shut down by the emulated processor is run once more, and the console says so: that
/// happens rarely, to guests that nothing was done to as well (docs/lab.md). What comes of the second run holds. It is
/// done at most [`RERUNS`] times for all cases together: what happens more often is not rare.
fn run_one(case: &Case, log: &mut KernelLog, reruns: &mut usize) -> Verdict {
    let name = case.name;
    let start = Instant::now();
    let mut ended = run_once(case, log);
    if let (Ended::Badly { shut_down: Some(told), why }, 1..) = (&ended, *reruns) {
        *reruns -= 1;
        println!("again {name}: {told}");
        println!("    | {why}");
        show_output();
        ended = run_once(case, log);
    }
    match ended {
        Ended::Well => {
            println!("ok {name} ({:.1} s)", start.elapsed().as_secs_f64());
            Verdict::Passed
        }
        Ended::Skipped(why) => {
            println!("skipped {name}: {why}");
            Verdict::Skipped
        }
        Ended::Badly { why, .. } => fail(name, &why),
    }
}

fn run_once(case: &Case, log: &mut KernelLog) -> Ended {
    let _ = fs::remove_file(VERDICT);
    let ran = in_a_process(case.name, case.limit);
    let said = one_line(&fs::read_to_string(VERDICT).unwrap_or_default());
    let mut shut_down = None;
    let failure = match &ran {
        Ok((pid, status)) => match *status {
            Some(status) if status.success() => None,
            Some(status) if status.code() == Some(i32::from(SKIPPED)) => {
                return match tidy(log) {
                    None => Ended::Skipped(said),
                    Some(why) => Ended::Badly { why, shut_down: None },
                };
            }
            ended => {
                shut_down = shut_down_in(&said, &lab::dir_of(*pid));
                Some(match ended.map(|status| (status, status.signal())) {
                    Some((_, Some(signal))) => format!("ended by signal {signal}"),
                    Some((status, None)) if said.is_empty() => format!("ended with {status}"),
                    Some((_, None)) => said,
                    None => format!("not over after {} s", case.limit.as_secs()),
                })
            }
        },
        Err(error) => Some(format!("cannot be started: {error}")),
    };
    if let Ok((pid, _)) = ran {
        // Of a number that comes again.
        let _ = fs::remove_dir_all(lab::dir_of(pid));
    }
    // A kernel that complains, or is left with something, has no excuse in what the processor did to a guest.
    match (tidy(log), failure) {
        (None, None) => Ended::Well,
        (None, Some(why)) => Ended::Badly { why, shut_down },
        (Some(untidy), why) => Ended::Badly { why: why.unwrap_or(untidy), shut_down: None },
    }
}

/// What tells that the emulated processor shut a guest down, or that it stands still: in what a case said, or in the
/// logs in its folder.
fn shut_down_in(said: &str, dir: &Path) -> Option<String> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let logs = files.filter(|file| file.path().extension().is_some_and(|end| end == "log"));
    let texts = logs.filter_map(|file| fs::read(file.path()).ok());
    let texts: Vec<_> = texts.map(|text| String::from_utf8_lossy(&text).into_owned()).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    // Cases join the lines of a log by bars.
    let mut lines = lines.chain(said.split(" | "));
    lines.find_map(|line| {
        let what = match line {
            line if SHUT_DOWN.iter().all(|part| line.contains(part)) => {
                "the emulated processor shut the guest down"
            }
            line if line.contains(SILENT) => "the guest stands still",
            _ => return None,
        };
        Some(format!("{what}: {line}"))
    })
}

fn fail(name: &str, why: &str) -> Verdict {
    println!("FAIL {name}: {why}");
    show_output();
    Verdict::Failed
}

/// The end of what a case wrote.
fn show_output() {
    let output = fs::read(OUTPUT).unwrap_or_default();
    let output = String::from_utf8_lossy(&output);
    let lines: Vec<&str> = output.lines().collect();
    for line in &lines[lines.len().saturating_sub(OUTPUT_LINES)..] {
        println!("    | {line}");
    }
}

/// Ends and removes what a case has left; answers what is wrong afterwards, or what the kernel complained
/// about meanwhile.
fn tidy(log: &mut KernelLog) -> Option<String> {
    // SAFETY: no pointers. The first process is spared by the kernel.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    reap();
    let tidied = in_a_process(TIDY, TIDY_LIMIT);
    reap();
    if let Some(complaint) = log.complaints().into_iter().next() {
        return Some(format!("the kernel complains: {complaint}"));
    }
    match tidied {
        Ok((_, Some(status))) if status.success() => None,
        Ok((_, Some(_))) => {
            let said = one_line(&fs::read_to_string(VERDICT).unwrap_or_default());
            Some(format!("it left something that cannot be removed: {said}"))
        }
        Ok((_, None)) => Some("what it left cannot be removed: that hangs".into()),
        Err(error) => Some(format!("no process to tidy up: {error}")),
    }
}

/// Runs `/init --case NAME` and answers its process id; no status when it was not over in time.
fn in_a_process(name: &str, limit: Duration) -> std::io::Result<(u32, Option<ExitStatus>)> {
    let output = File::create(OUTPUT)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["--case", name])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0);
    let mut child = command.spawn()?;
    let ended = wait(&mut child, limit)?;
    if ended.is_none() {
        // It may be stuck in the kernel and not die of this; then it is left behind.
        let _ = child.kill();
    }
    Ok((child.id(), ended))
}

fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// Takes the exit status of whatever was left to the first process, until nothing is about to end.
fn reap() {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        // SAFETY: no status is asked for, so the null pointer is allowed.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        // Nobody left, or only those who do not die.
        if pid < 0 || (pid == 0 && Instant::now() >= deadline) {
            return;
        }
        if pid == 0 {
            std::thread::sleep(POLL);
        }
    }
}

/// In the process of a case: runs it, leaves the reason, answers the status.
pub fn run_here(name: &str) -> ExitCode {
    let outcome = match name {
        TIDY => lab::remove_devices().map(|()| Outcome::Passed),
        _ => match [cases::all(), cases::controls::cases()]
            .concat()
            .iter()
            .find(|case| case.name == name)
        {
            Some(case) => Lab::new().and_then(|lab| (case.run)(&lab)),
            None => Err(anyhow::anyhow!("there is no case {name:?}")),
        },
    };
    match outcome {
        Ok(Outcome::Passed) => ExitCode::SUCCESS,
        Ok(Outcome::Skipped(why)) => {
            let _ = fs::write(VERDICT, why);
            ExitCode::from(SKIPPED)
        }
        Err(error) => {
            let _ = fs::write(VERDICT, format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// As one line of the console, whatever it is.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
