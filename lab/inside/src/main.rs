//! The first program of the lab's machine (`/init` of its initramfs), and the only one that matters there.
//!
//! ```text
//!   lab/run ── QEMU ── Linux ── /init: set up, then for each case
//!                                 ├─ /init --case NAME   in a session of its own, with a time limit
//!                                 └─ tidy: what is left of processes and mediated devices goes
//!                               `ok NAME (s)` … `N passed, N failed`, power off
//! ```
//!
//! A case that hangs, dies or makes the kernel complain is a failed case and nothing worse. Whoever reads the
//! console takes a missing tally as a failure.

mod case;
mod cases;
mod hosts;
mod kernel_log;
mod lab;
mod runner;
mod setup;

use std::process::ExitCode;

use case::Case;

/// How the program is used by hand.
const USAGE: &str = "usage: lab-inside --list [--filter TEXT | --controls]\n(all else happens as the first program of a machine)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match texts.as_slice() {
        ["--list"] => list(cases::all(), ""),
        ["--list", "--filter", text] => list(cases::all(), text),
        ["--list", "--controls"] => list(cases::controls::cases(), ""),
        ["--case", name] => return runner::run_here(name),
        // The kernel hands on what it does not know itself; only words of ours count.
        _ if std::process::id() == 1 => {
            let after = |option| texts.iter().skip_while(|text| **text != option).nth(1);
            let filter = after("--filter").unwrap_or(&"");
            let times = after("--repeat").and_then(|times| times.parse().ok()).unwrap_or(1);
            let cases =
                if texts.contains(&"--controls") { cases::controls::cases() } else { cases::all() };
            runner::run_all(&cases, filter, times);
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn list(cases: Vec<Case>, filter: &str) {
    for case in cases.iter().filter(|case| case.name.contains(filter)) {
        println!("{}", case.name);
    }
}
