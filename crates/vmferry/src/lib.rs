//! The `vmferry` command: a VM's daemon with its control socket, the client commands that speak to it,
//! device servers, and the demonstration.
//!
//! ```text
//!   vmferry run ────── daemon ── microvm::Vm ── migration::{Outgoing, Incoming}
//!                        │
//!                     api::server   one JSON object per line (docs/api.md)
//!                        │
//!   vmferry migrate ── api::client ── progress line, report
//!   vmferry demo ───── children: run, run --incoming, device serve … ── api::client each
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the arguments |
//! | [`units`] | sizes and durations as people write them |
//! | [`api`] | the control socket, both ends |
//! | `daemon` | `vmferry run` |
//! | `migrate`, `query` | the client commands |
//! | `report` | reports for people |
//! | `device` | `vmferry device serve` |
//! | `demo` | `vmferry demo` |

pub mod api;
pub mod cli;
pub mod units;

mod daemon;
mod demo;
mod device;
mod logging;
mod migrate;
mod query;
mod report;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, DeviceCommand};

/// Parses the arguments, performs the command and says how it went: 0 done, 1 not done, 2 arguments
/// refused.
pub fn main() -> ExitCode {
    match perform(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vmferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(command: Command) -> anyhow::Result<bool> {
    let format = match &command {
        Command::Status(args) => return query::status(args),
        Command::Cancel(args) => return query::cancel(args),
        Command::Run(args) => args.log_format,
        Command::Device(DeviceCommand::Serve(args)) => args.log_format,
        Command::Migrate(_) | Command::Demo(_) => cli::LogFormat::Text,
    };
    // Before the first thread, which would not have them blocked.
    let signals = signals::Signals::take()?;
    // Lives until the end: what was logged last is written when it goes.
    let _logs = logging::start(format);
    match command {
        Command::Run(args) => daemon::run(*args, &signals),
        Command::Migrate(args) => migrate::run(&args, &signals),
        Command::Device(DeviceCommand::Serve(args)) => device::serve(&args, &signals),
        Command::Demo(args) => demo::run(&args, &signals),
        Command::Status(_) | Command::Cancel(_) => Ok(true),
    }
}
