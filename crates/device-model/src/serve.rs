//! Serving a software device over vfio-user, as its own process (`vmferry device serve`).
//!
//! ```no_run
//! use device_model::serve::{ServeOptions, run};
//!
//! let mut options = ServeOptions::new("/run/nic0.sock".into(), "mlx5-vf")?;
//! options.state_bytes = Some(4 << 20);
//! options.quirks = vec!["one-size-field".into()];
//! run(&options, |handle| {
//!     // Keep `handle` where a signal handler finds it: `handle.stop()` ends the server.
//!     drop(handle);
//! })?;
//! # Ok::<(), device_model::ModelError>(())
//! ```

use std::path::PathBuf;

use device_profile::Profile;
use vfio_user::{ServedDevice, Server, ServerOptions, StopHandle};

use crate::error::ModelError;
use crate::quirks::Quirks;
use crate::soft::{SoftDevice, SoftOptions};
use crate::timing::Timing;

/// The quirk that is the server's and not the device's.
pub const LIBVFIO_USER: &str = "libvfio-user";
/// The quirk that stands for the deviations a profile lists for its real driver.
pub const AS_DRIVER: &str = "as-driver";

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Path of the UNIX socket.
    pub socket: PathBuf,
    /// The kind of device.
    pub profile: Profile,
    /// Scales the profile to so many bytes of state.
    pub state_bytes: Option<u64>,
    /// Times of the profile in percent; 0 = the device takes no time.
    pub timing_percent: u32,
    /// Quirks by name: those of [`QUIRK_NAMES`](crate::quirks::QUIRK_NAMES), [`LIBVFIO_USER`] and
    /// [`AS_DRIVER`].
    pub quirks: Vec<String>,
    /// Further options of the server.
    pub server: ServerOptions,
}

impl ServeOptions {
    /// The built-in profile `name` with its own times, at `socket`.
    ///
    /// # Errors
    /// [`ModelError::Profile`] for a name that no profile has.
    pub fn new(socket: PathBuf, name: &str) -> Result<Self, ModelError> {
        let profile = Profile::builtin(name)?;
        let server = ServerOptions { name: name.into(), ..ServerOptions::default() };
        Ok(Self {
            socket,
            profile,
            state_bytes: None,
            timing_percent: 100,
            quirks: Vec::new(),
            server,
        })
    }

    /// The device these options ask for, and the server's options.
    ///
    /// # Errors
    /// [`ModelError`] for an unknown quirk, or a profile that is too large.
    pub fn device(&self) -> Result<(SoftDevice, ServerOptions), ModelError> {
        let profile = match self.state_bytes {
            Some(bytes) => self.profile.scaled_to(bytes),
            None => self.profile.clone(),
        };
        let mut quirks = Quirks::default();
        let mut server = self.server.clone();
        for name in &self.quirks {
            match name.as_str() {
                LIBVFIO_USER => server.libvfio_user_compat = true,
                AS_DRIVER => {
                    for deviation in &profile.deviations {
                        quirks.switch_on(&deviation.value)?;
                    }
                }
                name => match name.strip_prefix("break-") {
                    // Some rules are the server's to break, some the device's, some take both.
                    Some(rule) if server.breaks.insert(rule) => {
                        quirks.breaks.insert(rule);
                    }
                    _ => quirks.switch_on(name)?,
                },
            }
        }
        let timing = Timing::of_profile(&profile).scaled(self.timing_percent);
        Ok((SoftDevice::new(SoftOptions { profile, quirks, timing })?, server))
    }
}

/// Serves a device until the handle given to `started` stops it. `started` is called once the socket is
/// bound, so whoever waits for that may connect.
///
/// # Errors
/// [`ModelError`] for options that cannot be, or a socket that cannot be bound or served.
pub fn run(options: &ServeOptions, started: impl FnOnce(StopHandle)) -> Result<(), ModelError> {
    let (device, server_options) = options.device()?;
    let server = Server::bind(&options.socket, server_options)?;
    started(server.stop_handle());
    server.run(&mut served(&device))?;
    Ok(())
}

/// A device as the server takes it.
pub fn served(device: &SoftDevice) -> ServedDevice {
    let migratable = !device.with_core(|core| core.quirks().no_migration);
    let migration = migratable.then(|| Box::new(device.served_migration()) as Box<_>);
    ServedDevice { migration, pci: device.function() }
}
