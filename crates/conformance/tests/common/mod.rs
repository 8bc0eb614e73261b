//! A software device behind a real socket, and the check of it.
#![allow(dead_code)]

use std::ops::ControlFlow;

use conformance::vfio_user::VfioUserSubject;
use conformance::{Options, Report, Verdict, run};
use device_model::serve::{ServeOptions, served};
use vfio_user::{RunningServer, Server};

pub struct Served {
    _server: RunningServer,
    directory: tempfile::TempDir,
}

impl Served {
    pub fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("device.sock")
    }
}

/// Serves `profile` with 1 MiB of state, in no time, with `quirks`; `no-p2p` and `no-precopy` are the
/// server's.
pub fn serve(profile: &str, quirks: &[&str]) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("device.sock");
    let mut options = ServeOptions::new(socket.clone(), profile).unwrap();
    options.state_bytes = (profile == "mlx5-vf").then_some(1 << 20);
    options.timing_percent = 0;
    for quirk in quirks {
        match *quirk {
            "no-p2p" => options.server.p2p = false,
            "no-precopy" => options.server.pre_copy = false,
            "no-reinit" => options.server.reinit = false,
            "no-data-size" => options.server.data_size = false,
            "no-logging" => options.server.dma_logging = false,
            name => options.quirks.push(name.into()),
        }
    }
    let (device, server_options) = options.device().unwrap();
    let server = Server::bind(&socket, server_options).unwrap().spawn(served(&device)).unwrap();
    Served { _server: server, directory }
}

pub fn check(served: &Served, options: &Options) -> Report {
    let subject = VfioUserSubject::open(&served.socket()).unwrap();
    run(Box::new(subject), options, |_| ControlFlow::Continue(()))
}

/// Everything, destructive rules too.
pub fn everything() -> Options {
    Options { destructive: true, ..Options::default() }
}

/// A report for people who read a failed test.
pub fn table(report: &Report) -> String {
    let mut table = String::new();
    for rule in &report.rules {
        let text = match &rule.verdict {
            Verdict::Pass => String::new(),
            Verdict::Fail { expected, got } => format!("expected {expected}; got {got}"),
            Verdict::NotApplicable { why }
            | Verdict::Skipped { why }
            | Verdict::Untestable { why } => why.clone(),
        };
        table += &format!("{:4} {:4} {:5} ms {text}\n", rule.id, rule.verdict.word(), rule.took_ms);
    }
    if let Some(why) = &report.not_usable {
        table += &format!("not usable: {why}\n");
    }
    table
}
