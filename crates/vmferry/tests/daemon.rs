//! One daemon by itself: its control socket, its device servers, its end.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use common::{Lab, any_guest, guests, number, vmferry};
use serde_json::{Value, json};

#[test]
fn a_guest_runs_drives_its_device_and_powers_off() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let device = lab.device(&[]);
        let mut daemon = lab.source(&[&device], &[]);
        daemon.assert_guest_lives();
        let status = daemon.status();
        assert_eq!(
            (&status["state"], &status["guest"], &status["devices"][0]["lost"]),
            (&json!("running"), &json!(guest), &json!(null))
        );
        daemon.workload(json!({"command": "doorbell", "device": "nic0", "stamps": 3, "vector": 2}));
        while number(&daemon.counters()["interrupts"][0]["vectors"][2]) == 0 {
            std::thread::yield_now();
        }
        daemon.workload(json!({"command": "power-off"}));
        assert!(daemon.process.wait_ended().success(), "{}", daemon.process.log());
        assert!(!daemon.api.exists(), "the socket is gone with its daemon");
    }
}

#[test]
fn a_guest_that_dies_is_a_failure_with_a_reason() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let mut daemon = lab.source(&[], &[]);
    daemon.workload(json!({"command": "triple-fault"}));
    assert_eq!(daemon.process.wait_ended().code(), Some(1));
    assert!(daemon.process.log().contains("the guest died"), "{}", daemon.process.log());
}

#[test]
fn a_signal_and_quit_end_it_in_good_order() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let mut daemon = lab.source(&[], &[]);
    daemon.process.terminate();
    assert!(daemon.process.wait_ended().success());
    let mut daemon = lab.source(&[], &[]);
    daemon.call("quit", json!({}));
    assert!(daemon.process.wait_ended().success());
    for transport in ["tcp", "unix"] {
        let (mut waiting, address) = lab.destination(transport, &[], &[]);
        waiting.process.terminate();
        assert!(waiting.process.wait_ended().success());
        if let Some(path) = address.strip_prefix("unix:") {
            assert!(!Path::new(path).exists(), "{path} is gone with its daemon");
        }
    }
}

#[test]
fn a_log_filter_that_is_none_is_refused() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmferry"));
    let output = command.args(["run", "--guest", "process"]).env("VMFERRY_LOG", "a=b=c").output();
    let output = output.unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("VMFERRY_LOG"), "{stderr}");
}

#[test]
fn garbage_on_the_control_socket_is_answered_and_the_guest_goes_on() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let daemon = lab.source(&[], &[]);
    let mode = std::fs::metadata(&daemon.api).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = daemon.process.resident_bytes();
    let mut stream = BufReader::new(UnixStream::connect(&daemon.api).unwrap());
    let mut answer_to = |bytes: &[u8]| -> Value {
        stream.get_mut().write_all(bytes).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    let endless = [vec![b'{'; 4 << 20], b"\n".to_vec()].concat();
    let nested = [vec![b'['; 60_000], b"\n".to_vec()].concat();
    for (bytes, class) in [
        (b"\x00\xff\xfe\n".as_slice(), "invalid-request"),
        (b"{}\n", "invalid-request"),
        (b"{\"execute\":\"status\",\"arguments\":7}\n", "invalid-request"),
        (&endless, "invalid-request"),
        (&nested, "invalid-request"),
        (b"{\"execute\":\"explode\"}\n", "unknown-command"),
        (b"{\"execute\":\"status\",\"arguments\":{\"x\":1}}\n", "invalid-arguments"),
        (b"{\"execute\":\"migrate\"}\n", "invalid-arguments"),
        (b"{\"execute\":\"migrate\",\"arguments\":{\"destination\":\"x\"}}\n", "invalid-arguments"),
        (b"{\"execute\":\"hold\",\"arguments\":{\"phases\":[\"x\"]}}\n", "invalid-arguments"),
        (b"{\"execute\":\"wait\",\"arguments\":{\"for\":\"held\",\"timeout-ms\":-1}}\n", "invalid-arguments"),
        (b"{\"execute\":\"peek\",\"arguments\":{\"gpa\":0,\"bytes\":99999999}}\n", "invalid-arguments"),
        (b"{\"execute\":\"peek\",\"arguments\":{\"gpa\":18446744073709551615,\"bytes\":8}}\n", "failed"),
        (b"{\"execute\":\"workload\",\"arguments\":{\"command\":\"fill\",\"device\":9,\"kib\":1}}\n", "invalid-arguments"),
        (b"{\"execute\":\"cancel\"}\n", "refused"),
        (b"{\"execute\":\"release\"}\n", "refused"),
        (b"{\"execute\":\"progress\"}\n", "refused"),
        (b"{\"execute\":\"set\",\"arguments\":{\"downtime-limit-ms\":1}}\n", "refused"),
    ] {
        let answer = answer_to(bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        assert_eq!(answer["error"]["class"], class, "{shown}: {answer}");
        assert!(!answer["error"]["desc"].as_str().unwrap().is_empty());
    }
    assert!(answer_to(b"{\"execute\":\"status\"}\n")["return"].is_object());
    // A line that never ends, and one that ends with its client.
    drop(stream);
    let mut rude = UnixStream::connect(&daemon.api).unwrap();
    rude.write_all(b"{\"execute\":").unwrap();
    drop(rude);
    daemon.assert_guest_lives();
    let grown = daemon.process.resident_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "grew by {grown} bytes");
}

#[test]
fn a_client_that_reads_nothing_holds_nobody_up() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let daemon = lab.source(&[], &[]);
    let mut silent = UnixStream::connect(&daemon.api).unwrap();
    silent.set_write_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    for _ in 0..10_000 {
        // Sooner or later nobody takes it any more.
        if silent.write_all(b"{\"execute\":\"status\"}\n").is_err() {
            break;
        }
    }
    daemon.assert_guest_lives();
    assert_eq!(daemon.status()["state"], "running");
}

#[test]
fn a_port_that_others_reach_needs_insecure_and_warns() {
    let Some(guest) = any_guest() else { return };
    let args = ["run", "--guest", guest, "--memory", "16M", "--incoming", "tcp:0.0.0.0:0"];
    let output = vmferry(&args);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("--insecure"), "{stderr}");
    let mut lab = Lab::new(guest);
    let daemon = lab.daemon(&[], &["--incoming", "tcp:0.0.0.0:0", "--insecure"]);
    assert_eq!(daemon.status()["state"], "incoming");
    assert!(daemon.process.log().contains("neither encrypted nor authenticated"));
}

#[test]
fn what_is_wrong_with_the_arguments_is_named_with_a_remedy() {
    let Some(guest) = any_guest() else { return };
    let lab = Lab::new(guest);
    let path = |name: &str| lab.path(name).to_str().unwrap().to_owned();
    let run = |args: &[&str]| {
        let output = vmferry(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let device = format!("vfio-user:{}", path("absent.sock"));
    for (args, said) in [
        (vec!["run", "--guest", guest, "--device", &device], "vmferry device serve"),
        (vec!["run", "--memory", "1X"], "write 512M"),
        (vec!["run", "--memory", "5000"], "whole pages"),
        (vec!["run", "--device", "/tmp/x"], "vfio-user:PATH"),
        (vec!["run", "--device", "vfio-user:/a,id=x", "--device", "vfio-user:/b,id=x"], "named x"),
        (vec!["run", "--incoming", "nowhere"], "tcp:"),
        (vec!["run", "--incoming", "tcp:127.0.0.1:0", "--fill", "5"], "--fill"),
        (vec!["migrate", "--api", "/x", "tcp:h:1", "--downtime-limit", "300"], "300ms"),
        (vec!["status", "--api", &path("absent.api")], "no daemon answers"),
        (vec!["device", "serve", "--profile", "x", "--socket", "/x"], "mlx5-vf"),
        (
            vec!["device", "serve", "--profile", "qat", "--quirk", "x", "--socket", "/x"],
            "short-reads",
        ),
        (vec!["device", "serve", "--profile", "/absent.toml", "--socket", "/x"], "/absent.toml"),
        (vec!["demo", "--scenario", "late-reinit", "--profile", "qat"], "mlx5-vf"),
    ] {
        let stderr = run(&args);
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}

#[test]
fn what_there_is_can_be_listed() {
    let output = vmferry(&["device", "serve", "--list-profiles"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for name in ["mlx5-vf", "virtio-vf", "qat"] {
        assert!(text.contains(name), "{text}");
    }
    let output = vmferry(&["device", "serve", "--list-quirks"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("libvfio-user"));
}

#[test]
fn a_device_server_that_is_killed_is_named_and_the_guest_goes_on() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let mut device = lab.device(&[]);
        let daemon = lab.source(&[&device], &[]);
        device.process.kill();
        while daemon.status()["devices"][0]["lost"].is_null() {
            std::thread::yield_now();
        }
        daemon.assert_guest_lives();
        // The guest reads all ones.
        let error = daemon
            .try_call("workload", json!({"command": "doorbell", "device": 0, "stamps": 1}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("gone"), "{error}");
    }
}

#[test]
fn garbage_on_the_device_socket_ends_that_client_only() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let mut device = lab.device(&[]);
    let before = device.process.resident_bytes();
    for bytes in [vec![0; 64], vec![0xff; 1 << 20], b"GET / HTTP/1.0\r\n\r\n".to_vec()] {
        let mut stream = UnixStream::connect(&device.socket).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        // The server may hang up before all of it is written.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert!(device.process.ended().is_none(), "{}", device.process.log());
    assert!(device.process.resident_bytes() < before + (32 << 20));
    let daemon = lab.source(&[&device], &[]);
    daemon.workload(json!({"command": "doorbell", "device": 0, "stamps": 1}));
    daemon.assert_guest_lives();
}
