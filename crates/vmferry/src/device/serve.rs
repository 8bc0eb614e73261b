//! `vmferry device serve`: a software device as its own process.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use device_model::Profile;
use device_model::quirks::{BREAKS, QUIRK_NAMES};
use device_model::serve::{AS_DRIVER, LIBVFIO_USER, ServeOptions, run};
use device_profile::{ADVERSARIAL_NAMES, BUILTIN_NAMES};
use vfio_user::ServerOptions;
use vfio_user::server::breaks;

use crate::cli::ServeArgs;
use crate::signals::Signals;
use crate::units::show_bytes;

/// How often a signal is looked for.
const TICK: Duration = Duration::from_millis(20);

/// Serves until a signal comes, or lists what there is.
pub fn serve(args: &ServeArgs, signals: &Signals) -> anyhow::Result<bool> {
    if args.list_profiles {
        return list_profiles();
    }
    if args.list_quirks {
        let one_rule = |name: &&&str| **name != "break-RULE";
        for name in QUIRK_NAMES.iter().chain(&[LIBVFIO_USER, AS_DRIVER]).filter(one_rule) {
            println!("{name}");
        }
        // In the order of the rules, for `vmferry device check --list` names them too.
        for rule in conformance::rules::all() {
            if BREAKS.contains(&rule.id) || breaks::BREAKS.contains(&rule.id) {
                println!("break-{}", rule.id);
            }
        }
        return Ok(true);
    }
    let (Some(name), Some(socket)) = (&args.profile, &args.socket) else {
        anyhow::bail!("name a --profile and a --socket");
    };
    let profile = profile(name)?;
    let server = ServerOptions { name: profile.name.clone(), ..ServerOptions::default() };
    let options = ServeOptions {
        socket: socket.clone(),
        profile,
        state_bytes: args.state_size,
        timing_percent: args.time_scale,
        quirks: args.quirks.clone(),
        server,
    };
    run(&options, |handle| {
        tracing::info!(socket = %socket.display(), profile = options.profile.name, "serving");
        let signals = signals.clone();
        // Ends with the process.
        std::thread::spawn(move || {
            while !signals.any() {
                std::thread::sleep(TICK);
            }
            handle.stop();
        });
    })
    .with_context(|| format!("serve {name} at {}", socket.display()))?;
    // The server leaves its socket behind; somebody else may have tidied up.
    let _ = std::fs::remove_file(socket);
    Ok(true)
}

/// A profile that comes along, or one from a file.
pub fn profile(name: &str) -> anyhow::Result<Profile> {
    if !name.contains('/') && !name.ends_with(".toml") {
        return Ok(Profile::builtin(name)?);
    }
    const FILE_MAX_BYTES: u64 = 1 << 20;
    let path = Path::new(name);
    let read = || -> std::io::Result<String> {
        use std::io::Read;
        let mut text = String::new();
        std::fs::File::open(path)?.take(FILE_MAX_BYTES).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().with_context(|| format!("read the profile {name}"))?;
    Profile::from_toml(&text).with_context(|| format!("the profile {name}"))
}

fn list_profiles() -> anyhow::Result<bool> {
    for name in BUILTIN_NAMES.iter().chain(ADVERSARIAL_NAMES) {
        let profile = Profile::builtin(name)?;
        println!(
            "{name:<21} {} (state {})",
            profile.description,
            show_bytes(profile.sizes.total_bytes.typical)
        );
    }
    Ok(true)
}
