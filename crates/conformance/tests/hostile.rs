//! Servers that lie, stammer, hang and die: the check ends, says so, and takes nothing from them.

mod common;

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{serve, table};
use conformance::vfio_user::VfioUserSubject;
use conformance::{Options, Report, Selection, Verdict, run};

const HEADER: usize = 16;
/// Far beyond what the limits of a run add up to.
const HANGS_AFTER: Duration = Duration::from_secs(300);

/// What a proxy does to a whole message of the server's, header included.
type Spoil = Arc<dyn Fn(&mut Vec<u8>) -> Fate + Send + Sync>;

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Send,
    /// Nothing is answered any more, and the connection stays.
    Hang,
    /// The connection ends.
    Die,
}

/// A proxy in front of a correct server.
struct Proxy {
    socket: PathBuf,
    _directory: tempfile::TempDir,
    _served: common::Served,
    stopped: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

fn message(from: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER];
    from.read_exact(&mut message)?;
    let size = u32::from_le_bytes(message[4..8].try_into().unwrap()) as usize;
    message.resize(size.max(HEADER), 0);
    from.read_exact(&mut message[HEADER..])?;
    Ok(message)
}

impl Proxy {
    fn start(spoil: Spoil) -> Self {
        let served = serve("mlx5-vf", &[]);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("proxy.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let behind = served.socket();
        let stopped = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let (stop, count) = (Arc::clone(&stopped), Arc::clone(&connections));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                count.fetch_add(1, Ordering::AcqRel);
                let Ok(client) = client else { return };
                Self::connect(client, &behind, &spoil);
            }
        });
        Self { socket, _directory: directory, _served: served, stopped, connections }
    }

    /// Messages without fds: no memory is mapped, and the twin socket is not granted.
    fn connect(mut client: UnixStream, behind: &PathBuf, spoil: &Spoil) {
        let mut server = UnixStream::connect(behind).unwrap();
        let (mut to_server, mut to_client) =
            (server.try_clone().unwrap(), client.try_clone().unwrap());
        let spoil = Arc::clone(spoil);
        std::thread::spawn(move || {
            while let Ok(mut request) = message(&mut client) {
                // The twin socket would come as an fd, which does not pass here.
                let text = String::from_utf8_lossy(&request).replace("twin_socket", "twin_sockex");
                if text.contains("twin_sockex") {
                    request = text.into_bytes();
                }
                if to_server.write_all(&request).is_err() {
                    break;
                }
            }
            let _ = to_server.shutdown(std::net::Shutdown::Both);
        });
        std::thread::spawn(move || {
            let mut hung = false;
            while let Ok(mut reply) = message(&mut server) {
                match if hung { Fate::Hang } else { spoil(&mut reply) } {
                    Fate::Send => {
                        if to_client.write_all(&reply).is_err() {
                            break;
                        }
                    }
                    Fate::Hang => hung = true,
                    Fate::Die => break,
                }
            }
            let _ = to_client.shutdown(std::net::Shutdown::Both);
            let _ = server.shutdown(std::net::Shutdown::Both);
        });
    }

    /// The rules with a limit of a second each.
    fn check(&self, only: &str) -> Result<Report, String> {
        let subject = VfioUserSubject::open(&self.socket).map_err(|error| error.to_string())?;
        let options = Options {
            only: Some(Selection::parse(only).unwrap()),
            destructive: true,
            time_limit: Some(Duration::from_secs(1)),
            stream_max_bytes: 4 << 20,
            restore_limit: Duration::from_secs(1),
            ..Options::default()
        };
        // A check that hangs is the failure this file is about.
        let (done, report) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            done.send(run(Box::new(subject), &options, |_| ControlFlow::Continue(())))
        });
        Ok(report.recv_timeout(HANGS_AFTER).expect("the check hangs"))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        let _ = UnixStream::connect(&self.socket);
    }
}

fn command(message: &[u8]) -> u16 {
    u16::from_le_bytes([message[2], message[3]])
}

/// A DEVICE_FEATURE reply: its flags.
fn feature(message: &[u8]) -> Option<u32> {
    let flags = message.get(20..24).filter(|_| command(message) == 16)?;
    Some(u32::from_le_bytes(flags.try_into().unwrap()))
}

const GET_STATE: u32 = 2 | 1 << 16;
const SET_STATE: u32 = 2 | 1 << 17;
const MIG_DATA_READ: u16 = 17;
const PRECOPY_INFO: u16 = 0x8001;

fn verdict<'a>(report: &'a Report, id: &str) -> &'a Verdict {
    &report.rules.iter().find(|rule| rule.id == id).unwrap().verdict
}

fn got(report: &Report, id: &str) -> String {
    match verdict(report, id) {
        Verdict::Fail { got, .. } => got.clone(),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_proxy_that_spoils_nothing_changes_no_verdict() {
    let proxy = Proxy::start(Arc::new(|_| Fate::Send));
    let report = proxy.check("D,F,X,S,P,Z").unwrap();
    assert!(report.failed().is_empty() && report.not_usable.is_none(), "{}", table(&report));
}

#[test]
fn a_call_that_hangs_fails_its_rule_by_name_and_the_rest_is_skipped() {
    // After the preparations: the first PRECOPY_INFO is never answered, nor is anything after it.
    let proxy = Proxy::start(Arc::new(|reply| match command(reply) {
        PRECOPY_INFO => Fate::Hang,
        _ => Fate::Send,
    }));
    let report = proxy.check("P1,P2,Z1").unwrap();
    assert_eq!(got(&report, "P1"), "did not return within 1 s: PRECOPY_INFO");
    // Its handle hangs for ever; a new one does not.
    assert!(matches!(verdict(&report, "Z1"), Verdict::Pass), "{}", table(&report));
    assert!(proxy.connections.load(Ordering::Acquire) > 1);
}

#[test]
fn a_server_that_hangs_altogether_costs_one_rule_and_no_time() {
    let hung = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(Arc::new(move |reply| {
        if command(reply) == PRECOPY_INFO {
            hung.store(true, Ordering::Release);
        }
        if hung.load(Ordering::Acquire) { Fate::Hang } else { Fate::Send }
    }));
    let report = proxy.check("P1,P2,P3,P4,P5,Z,L").unwrap();
    assert_eq!(report.failed(), ["P1"], "{}", table(&report));
    let Verdict::Skipped { why } = verdict(&report, "L1") else { panic!("{}", table(&report)) };
    assert!(why.contains("after rule P1"), "{why}");
    assert!(report.not_usable.is_some());
}

#[test]
fn a_connection_that_dies_fails_its_rule_and_a_new_one_goes_on() {
    let proxy = Proxy::start(Arc::new(|reply| match command(reply) {
        PRECOPY_INFO => Fate::Die,
        _ => Fate::Send,
    }));
    let report = proxy.check("P1,Z1").unwrap();
    assert!(got(&report, "P1").contains("the device is gone"), "{}", table(&report));
    assert!(matches!(verdict(&report, "Z1"), Verdict::Pass), "{}", table(&report));
}

#[test]
fn a_stream_without_end_is_read_up_to_the_limit() {
    // Every read gives as much as was asked for.
    let proxy = Proxy::start(Arc::new(|reply| {
        if command(reply) == MIG_DATA_READ && reply.len() >= 24 {
            let size = u32::from_le_bytes(reply[20..24].try_into().unwrap()) as usize;
            if size < 1 << 20 {
                reply.resize(24 + (1 << 20), 0xa5);
                let total = reply.len() as u32;
                reply[4..8].copy_from_slice(&total.to_le_bytes());
                reply[8..12].copy_from_slice(&1u32.to_le_bytes());
                reply[16..20].copy_from_slice(&(total - 16).to_le_bytes());
                reply[20..24].copy_from_slice(&(1u32 << 20).to_le_bytes());
            }
        }
        Fate::Send
    }));
    let report = proxy.check("S3").unwrap();
    let Verdict::Skipped { why } = verdict(&report, "S3") else { panic!("{}", table(&report)) };
    assert!(why.contains("more than 4194304 bytes"), "{why}");
}

#[test]
fn lies_in_replies_are_failures_and_not_crashes() {
    let set = |at: usize, value: u32| -> Spoil {
        Arc::new(move |reply: &mut Vec<u8>| {
            if feature(reply) == Some(GET_STATE)
                && let Some(bytes) = reply.get_mut(at..at + 4)
            {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            Fate::Send
        })
    };
    for (what, spoil) in [
        ("another feature", set(20, 9 | 1 << 16)),
        ("a state that is not known", set(24, 4711)),
        ("the size of the message", set(4, u32::MAX)),
        ("a message smaller than its header", set(4, 3)),
        ("neither command nor reply", set(8, 7)),
        ("another message", set(0, 0xffff)),
    ] {
        let report = Proxy::start(spoil).check("D,F1-F3,X9,H5").unwrap();
        assert!(report.not_usable.is_some(), "{what}: {}", table(&report));
    }
}

#[test]
fn short_replies_are_named() {
    let proxy = Proxy::start(Arc::new(|reply| {
        if feature(reply) == Some(1 | 1 << 16) {
            reply.truncate(26);
            reply[4..8].copy_from_slice(&26u32.to_le_bytes());
        }
        Fate::Send
    }));
    let report = proxy.check("D1").unwrap();
    assert!(got(&report, "D1").contains("2 bytes, 8 are needed"), "{}", table(&report));
}

#[test]
fn a_state_change_that_is_never_confirmed_is_named() {
    let proxy = Proxy::start(Arc::new(|reply| {
        let stop_copy = reply.get(24..28) == Some(&3u32.to_le_bytes());
        if feature(reply) == Some(SET_STATE) && stop_copy { Fate::Hang } else { Fate::Send }
    }));
    let report = proxy.check("S3").unwrap();
    assert_eq!(got(&report, "S3"), "did not return within 1 s: SET STOP_COPY");
}

#[test]
fn what_is_no_server_is_refused() {
    let answers: [(&str, &[u8]); 4] = [
        ("nothing", b""),
        ("garbage", &[0xa5; 4096]),
        ("a huge message", &[1, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]),
        ("half a header", &[1, 0, 1]),
    ];
    for (what, bytes) in answers {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("bad.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(bytes);
        });
        assert!(VfioUserSubject::open(&socket).is_err(), "{what}");
        thread.join().unwrap();
    }
}

#[test]
fn random_damage_never_crashes_or_hangs_the_check() {
    // One byte of every n-th message, by a generator with a seed.
    for seed in 1..=4u64 {
        let state = Arc::new(std::sync::Mutex::new(seed));
        let proxy = Proxy::start(Arc::new(move |reply| {
            let mut x = state.lock().unwrap();
            *x ^= *x << 13;
            *x ^= *x >> 7;
            *x ^= *x << 17;
            // The negotiation passes.
            if command(reply) != 1 && x.is_multiple_of(7) {
                let at = (*x >> 8) as usize % reply.len().min(64);
                reply[at] = (*x >> 32) as u8;
            }
            Fate::Send
        }));
        if let Ok(report) = proxy.check("D,F1-F7,P,Z,L") {
            assert_eq!(report.rules.len(), 39, "{}", table(&report));
        }
    }
}
