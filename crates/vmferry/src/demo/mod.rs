//! `vmferry demo`: a whole migration on this machine, by processes as a user would start them.
//!
//! ```text
//!   device serve ── run ───────── migrate ─────────▶ run --incoming ── device serve
//!        └─ device0.sock  host0.api            host1.api  └─ device1.sock
//! ```
//!
//! `late-reinit` moves the same guest twice, so it has three hosts. Everything is told over the control
//! sockets, nothing behind their back.

mod host;
mod outcome;
mod process;
mod scenario;

use anyhow::bail;
use device_profile::{Profile, ReinitPolicy};

use crate::cli::{DemoArgs, DowntimeMode, Scenario};
use crate::daemon::{choose_guest, guest_name};
use crate::report;
use crate::signals::Signals;
use crate::units::show_bytes;
use host::Lab;
use outcome::Outcome;

/// Demonstrates; answers whether everything the scenario is about did happen.
pub fn run(args: &DemoArgs, signals: &Signals) -> anyhow::Result<bool> {
    let guest = guest_name(choose_guest(args.guest, false)?);
    let profiles = profiles(args)?;
    let reinit = profiles[0].precopy.reinit.value != ReinitPolicy::Never;
    if args.scenario == Scenario::LateReinit && !reinit {
        bail!(
            "the late-reinit scenario needs a device that announces new initial data, and {} never \
             does; name another one first, as in --profile mlx5-vf",
            profiles[0].name
        );
    }
    say(&format!(
        "a {guest} guest with {} of memory, {} vCPU(s) and {}; {} {} of downtime",
        show_bytes(args.memory),
        args.cpus,
        profiles.iter().map(|profile| profile.name.as_str()).collect::<Vec<_>>().join(", "),
        match args.downtime_mode {
            DowntimeMode::Strict => "no more than",
            DowntimeMode::BestEffort => "if it can be, at most",
        },
        crate::units::show_ms(Some(crate::units::as_ms(args.downtime_limit))),
    ));
    let mut lab = Lab::new(args, guest, &profiles, signals)?;
    let outcomes = match args.scenario {
        Scenario::Plain => vec![scenario::plain(&mut lab, reinit)?],
        Scenario::LateReinit => scenario::late_reinit(&mut lab, &profiles[0])?,
    };
    drop(lab);
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&outcome::json(&outcomes, guest, args.scenario))?
        );
    } else {
        print(&outcomes, guest);
    }
    Ok(outcomes.iter().all(Outcome::is_met))
}

fn profiles(args: &DemoArgs) -> anyhow::Result<Vec<Profile>> {
    const DEFAULT: &str = "mlx5-vf";
    let mut names: Vec<&str> = args.profiles.iter().map(String::as_str).collect();
    if names.is_empty() {
        names.push(DEFAULT);
    }
    Ok(names.into_iter().map(Profile::builtin).collect::<Result<_, _>>()?)
}

fn print(outcomes: &[Outcome], guest: &str) {
    for outcome in outcomes {
        println!("\n== {}\n", outcome.title);
        print!("{}", report::text(&outcome.report, Some(guest)));
        println!();
        for demand in &outcome.demands {
            println!("{} {}", if demand.met { "  yes" } else { "   NO" }, demand.what);
        }
    }
    let met = outcomes.iter().all(Outcome::is_met);
    println!("\n{}", if met { "everything held" } else { "NOT everything held" });
}

/// What goes on, for whoever watches; standard output is the report's.
fn say(text: &str) {
    eprintln!("demo: {text}");
}
