//! The README's walk through a migration by hand works as it is printed.

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use common::any_guest;

/// The commands of the section, in order.
fn commands() -> String {
    let readme = include_str!("../../../README.md");
    let section = readme.split("\n## ").find(|section| section.starts_with("By hand")).unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap());
    blocks.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_walk_by_hand_works_as_printed() {
    if any_guest().is_none() {
        return;
    }
    let script = commands();
    for part in ["cargo build", "target/release", "tcp:127.0.0.1:4444", "--verify", "kill "] {
        assert!(script.contains(part), "{part} is not in\n{script}");
    }
    // The executable under test instead of a release build, and a port that is free here.
    let binary = Path::new(env!("CARGO_BIN_EXE_vmferry")).parent().unwrap().to_str().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let script = script
        .replace("cargo build --release\n", "")
        .replace("$PWD/target/release", binary)
        .replace(":4444", &format!(":{port}"));
    let output = Command::new("bash")
        // What a failed step leaves behind ends with the shell.
        .args([
            "-euc",
            &format!("trap 'kill $(jobs -pr) 2>/dev/null || true' EXIT\n{script}\nwait"),
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{script}\n{stdout}\n{stderr}");
    for part in [
        "dry-run",
        "completed",
        "verification: memory identical, device state identical",
        ": running",
    ] {
        assert!(stdout.contains(part), "{part:?} is not in\n{stdout}\n{stderr}");
    }
}
