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
//! | [`signals`] | those that ask for an end, counted |
//! | [`units`] | sizes and durations as people write them |
//! | [`api`] | the control socket, both ends |
//! | `daemon` | `vmferry run` |
//! | `migrate`, `query` | the client commands |
//! | `report` | reports for people |
//! | `resolve` | `vmferry resolve` |
//! | `plan` | `vmferry plan` |
//! | `device` | `vmferry device serve`, `info`, `save`, `load`, `check` |
//! | `demo` | `vmferry demo` |

pub mod api;
pub mod cli;
pub mod signals;
pub mod units;

mod daemon;
mod demo;
mod device;
mod logging;
mod migrate;
mod plan;
mod query;
mod report;
mod resolve;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, DeviceCommand};

/// Parses the arguments, performs the command and says how it went: 0 done, 1 not done, 2 arguments
/// refused. A check answers 1 for a rule that failed, and 2 if it could not run.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let trouble = match &command {
        Command::Device(DeviceCommand::Check(_)) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    };
    match perform(command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vmferry: {}", sentence(&error));
            trouble
        }
    }
}

/// The error and its causes; what says its cause already does not get it twice.
fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        let cause = cause.trim_end();
        if sentence.is_empty() {
            sentence.push_str(cause);
        } else if !sentence.contains(cause) {
            sentence = format!("{sentence}: {cause}");
        }
    }
    sentence
}

fn perform(command: Command) -> anyhow::Result<bool> {
    let format = match &command {
        Command::Status(args) => return query::status(args),
        Command::Cancel(args) => return query::cancel(args),
        Command::Set(args) => return query::set(args),
        Command::Resolve(args) => return resolve::run(args),
        Command::Run(args) => args.log_format,
        Command::Device(DeviceCommand::Serve(args)) => args.log_format,
        Command::Device(DeviceCommand::Check(args)) => return device::check_apart(args),
        Command::Device(_) => cli::LogFormat::Text,
        Command::Migrate(_) | Command::Plan(_) | Command::Demo(_) => cli::LogFormat::Text,
    };
    // Before the first thread, which would not have them blocked.
    let signals = signals::Signals::take()?;
    // Lives until the end: what was logged last is written when it goes.
    let _logs = logging::start(format)?;
    match command {
        Command::Run(args) => daemon::run(*args, &signals),
        Command::Migrate(args) => migrate::run(&args, &signals),
        Command::Device(DeviceCommand::Serve(args)) => device::serve(&args, &signals),
        Command::Device(DeviceCommand::Info(args)) => device::info(&args),
        Command::Device(DeviceCommand::Save(args)) => device::save(&args, &signals),
        Command::Device(DeviceCommand::Load(args)) => device::load(&args, &signals),
        Command::Device(DeviceCommand::Check(_)) => Ok(true),
        Command::Plan(args) => plan::run(&args, &signals),
        Command::Demo(args) => demo::run(&args, &signals),
        Command::Status(_) | Command::Cancel(_) | Command::Set(_) | Command::Resolve(_) => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot listen: {source}; try another")]
    struct Listen {
        source: io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::Error::from(Listen { source: io::Error::other("it is taken") });
        assert_eq!(
            sentence(&error.context("wait here")),
            "wait here: cannot listen: it is taken; try another"
        );
        let error = anyhow::Error::from(io::Error::other("it is taken")).context("wait here");
        assert_eq!(sentence(&error), "wait here: it is taken");
    }
}
