//! What the promise is worth in real runs: real `vmferry` processes over loopback TCP, one command.
//!
//! ```text
//!   compare     scenarios x policies on the same engine: who keeps the limit
//!   calibrate   predicted beside measured, over many migrations of one kind
//!   strict      two devices that are reconfigured at bad moments: no limit missed
//!   revoke      switchovers that are revoked: how long the guest stands for nothing, and nothing is sent twice
//! ```
//!
//! Times depend on the machine, which is named with them; counts and ratios do not, and `--no-times` judges by
//! those alone. See docs/downtime.md.

mod calibrate;
mod compare;
mod lab;
mod outcome;
mod revoke;
mod strict;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bench::host::Host;
use clap::{Parser, ValueEnum};
use vmferry::signals::Signals;

use lab::Guest;
use outcome::{Run, Verdict};

/// Campaigns of real migrations on this machine.
#[derive(Debug, Parser)]
#[command(name = "downtime", max_term_width = 100)]
pub struct Args {
    /// Which campaign.
    #[arg(value_enum, default_value_t = Campaign::All)]
    campaign: Campaign,
    /// Migrations (compare: of each scenario and policy; revoke: revoked switchovers); each campaign has a number of its
    /// own.
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Add the runs to those in this file, and judge all of them.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run nothing: show what is in --json.
    #[arg(long, requires = "json")]
    show: bool,
    /// Tables in Markdown, as docs/downtime.md has them.
    #[arg(long)]
    markdown: bool,
    /// compare: only these scenarios. Repeatable.
    #[arg(long = "scenario", value_name = "NAME")]
    scenarios: Vec<String>,
    /// compare: only these policies. Repeatable.
    #[arg(long = "policy", value_name = "NAME")]
    policies: Vec<String>,
    /// Who executes the guest.
    #[arg(long, value_enum, default_value_t)]
    guest: GuestChoice,
    /// strict: the limit, instead of the smallest one that `vmferry plan` calls feasible.
    #[arg(long, value_name = "MS")]
    limit_ms: Option<f64>,
    /// Judge by counts and ratios alone.
    #[arg(long)]
    no_times: bool,
    /// The executable; without one, it is built.
    #[arg(long, value_name = "FILE")]
    vmferry: Option<PathBuf>,
}

/// Which campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Campaign {
    /// Policies side by side.
    Compare,
    /// Predicted beside measured.
    Calibrate,
    /// Strict mode under reconfigurations.
    Strict,
    /// Revoked switchovers.
    Revoke,
    /// One after the other.
    All,
}

/// Who executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum GuestChoice {
    /// KVM where there is one.
    #[default]
    Auto,
    /// vCPUs of KVM.
    Kvm,
    /// Threads of the process.
    Process,
}

/// What every campaign is given.
pub struct Setting<'a> {
    args: &'a Args,
    guest: Guest,
    vmferry: PathBuf,
    signals: &'a Signals,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("downtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    let signals = Signals::take()?;
    let mut runs = match &args.json {
        Some(file) if file.exists() => outcome::read(file)?,
        _ => Vec::new(),
    };
    if !args.show {
        let guest = match args.guest {
            GuestChoice::Auto if microvm::kvm::available().is_err() => Guest::Process,
            GuestChoice::Auto | GuestChoice::Kvm => Guest::Kvm,
            GuestChoice::Process => Guest::Process,
        };
        let vmferry = args.vmferry.clone().map_or_else(build, Ok)?;
        let context = Setting { args, guest, vmferry, signals: &signals };
        let outcome = perform(&context, &mut runs);
        if let Some(file) = &args.json {
            outcome::write(file, &runs)?;
        }
        outcome?;
    }
    println!("Measured on {}.", Host::here());
    let mut good = true;
    for campaign in [Campaign::Compare, Campaign::Calibrate, Campaign::Strict, Campaign::Revoke] {
        if args.campaign == campaign || args.campaign == Campaign::All {
            good &= show(campaign, &runs, args);
        }
    }
    Ok(good)
}

/// Runs what was asked for; what there is by an end or an error is in `runs`.
fn perform(context: &Setting<'_>, runs: &mut Vec<Run>) -> anyhow::Result<()> {
    let wanted =
        |campaign| context.args.campaign == campaign || context.args.campaign == Campaign::All;
    if wanted(Campaign::Compare) {
        compare::run(context, runs)?;
    }
    if wanted(Campaign::Calibrate) {
        calibrate::run(context, runs)?;
    }
    if wanted(Campaign::Strict) {
        strict::run(context, runs)?;
    }
    if wanted(Campaign::Revoke) {
        revoke::run(context, runs)?;
    }
    Ok(())
}

/// Shows a campaign; answers whether everything held that was judged.
fn show(campaign: Campaign, runs: &[Run], args: &Args) -> bool {
    let name = match campaign {
        Campaign::Compare => "compare",
        Campaign::Calibrate => "calibrate",
        Campaign::Strict => "strict",
        Campaign::Revoke => "revoke",
        Campaign::All => return true,
    };
    let runs: Vec<&Run> = runs.iter().filter(|run| run.campaign == name).collect();
    if runs.is_empty() {
        println!("\n{name}: no run");
        return false;
    }
    let (table, verdicts) = match campaign {
        Campaign::Compare => compare::judge(&runs),
        Campaign::Calibrate => calibrate::judge(&runs),
        Campaign::Strict => strict::judge(&runs),
        Campaign::Revoke | Campaign::All => revoke::judge(&runs),
    };
    println!("\n{name}, {} migrations, {} guest\n", runs.len(), runs[0].guest);
    print!(
        "{}",
        if args.markdown { table.to_string() } else { outcome::aligned(&table.to_string()) }
    );
    println!();
    let mut good = true;
    for Verdict { what, met, time } in &verdicts {
        let word = match (*met, *time && args.no_times) {
            (true, _) => "  yes",
            (false, true) => "   no",
            (false, false) => "   NO",
        };
        good &= *met || (*time && args.no_times);
        println!("{}{word} {what}", if args.markdown { "-" } else { "" });
    }
    good
}

/// Builds the executable beside this one.
fn build() -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("find this executable")?;
    let dir = here.parent().context("this executable has no folder")?;
    let mut command =
        std::process::Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(["build", "--quiet", "-p", "vmferry", "--bin", "vmferry"]);
    if dir.ends_with("release") {
        command.arg("--release");
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let status = command.status().context("run cargo to build vmferry")?;
    anyhow::ensure!(status.success(), "cargo could not build vmferry");
    let vmferry = dir.join("vmferry");
    anyhow::ensure!(
        vmferry.exists(),
        "{} is not there; name one with --vmferry",
        vmferry.display()
    );
    Ok(vmferry)
}
