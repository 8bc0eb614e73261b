//! `vmferry resolve`: the operator's word where two hosts lost each other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migration::record::{Record, RecordStore};
use migration::{Outgoing, RecoverConfig};
use serde_json::json;
use switchover::handover::Resolve;

use crate::api::client;
use crate::cli::ResolveArgs;

/// How long a destination may take to say what it decided.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Resolves; answers whether nothing is left in doubt.
pub fn run(args: &ResolveArgs) -> anyhow::Result<bool> {
    if let Some(dir) = &args.state_dir {
        return of_the_dead(dir, args.abandon);
    }
    let Some(api) = &args.api else { bail!("--api or --state-dir is needed") };
    let (decision, done) = match args {
        _ if args.resume_here => {
            eprintln!(
                "the guest resumes here; should it run at the destination already, it runs twice"
            );
            ("resume-here", "the guest resumes here")
        }
        _ if args.run_here => {
            eprintln!("the guest starts here; should it still run at the source, it runs twice");
            ("run-here", "the guest starts here")
        }
        _ if args.abandon => ("abandon", "the guest is given up here"),
        _ => ("discard", "what was loaded is thrown away"),
    };
    client::call(api, "resolve", json!({"decision": decision, "force": args.force}))?;
    println!("{done}; vmferry status --api {} shows what comes of it", api.display());
    Ok(true)
}

/// What sources whose process died left in doubt. Their guests died with them, so there is nothing to resume.
fn of_the_dead(dir: &Path, abandon: bool) -> anyhow::Result<bool> {
    if !dir.is_dir() {
        bail!("{} is no folder", dir.display());
    }
    let store = RecordStore::new(dir.to_owned(), false)
        .with_context(|| format!("open the records in {}", dir.display()))?;
    let doubtful = store.in_doubt().context("read the records")?;
    if doubtful.is_empty() {
        println!("nothing is in doubt");
    }
    let mut resolved = true;
    for record in doubtful {
        resolved &= one_of_the_dead(dir, record, abandon)?;
    }
    Ok(resolved)
}

fn one_of_the_dead(dir: &Path, record: Record, abandon: bool) -> anyhow::Result<bool> {
    let id = record.migration;
    let destination = record.binding.as_ref().and_then(|b| b.destination.clone());
    let destination = destination.unwrap_or_else(|| "an unknown place".into());
    let config = RecoverConfig {
        state_dir: dir.to_owned(),
        durable: true,
        connect_limit: Duration::from_secs(2),
    };
    let migration = Outgoing::recover(record, config);
    if abandon && let Err(why) = migration.resolve(Resolve::Discard) {
        // It may have been decided meanwhile.
        eprintln!("migration {id}: {why}");
    }
    let deadline = Instant::now() + ANSWER_LIMIT;
    let report = loop {
        match migration.report() {
            Some(report) => break report,
            None if Instant::now() >= deadline => {
                let why = migration.progress().failure.map(|failure| format!(": {failure}"));
                println!(
                    "migration {id} to {destination}: in doubt{}; look there, and start what it holds \
                     (vmferry resolve --run-here), or give up here (--abandon)",
                    why.unwrap_or_default()
                );
                return Ok(false);
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let failure = report.failure.map(|failure| format!(": {failure}")).unwrap_or_default();
    match report.status.as_str() {
        "completed" => println!("migration {id}: the guest runs at {destination}"),
        "abandoned" => println!("migration {id} to {destination}: given up"),
        status => println!("migration {id} to {destination}: {status}{failure}"),
    }
    Ok(true)
}
