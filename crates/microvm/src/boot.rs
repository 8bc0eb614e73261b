//! What the guest is booted from, at the start and after each machine reset.
//!
//! A guest that came from another host resets there too: into the same kernel with the same command
//! line, or into the same workload. The identity of what it was booted from travels with the machine
//! state; the kernel's file does not, and a host that lacks it says so when the guest resets.

use std::fs::File;
use std::io::{Cursor, Seek};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::GuestMemory;

use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::mptable;
use crate::pvh::{self, Boot, COMMAND_LINE_MAX};
use crate::section::{Reader, Writer};
use crate::workload::{self, StartPage};

/// What a guest was booted from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    /// The built-in workload; its start page is in memory.
    Workload,
    /// A kernel.
    Kernel { digest: [u8; 32], command_line: String },
}

/// Boots the guest.
pub(crate) struct Booter {
    memory: Arc<GuestMemory>,
    identity: Mutex<Identity>,
}

impl Booter {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, identity: Mutex::new(Identity::Workload) }
    }

    /// The first boot, as `config` says.
    pub(crate) fn first(&self, config: &VmConfig, devices: usize) -> Result<Boot> {
        let Some(path) = &config.kernel else {
            let start = StartPage::of(config, devices)?;
            *self.identity() = Identity::Workload;
            return self.workload(&start, &config.command_line);
        };
        let (mut file, digest) = open(path)?;
        let boot = self.kernel(path, &mut file, config, &config.command_line)?;
        *self.identity() = Identity::Kernel { digest, command_line: config.command_line.clone() };
        Ok(boot)
    }

    /// The boot after a machine reset: of what the guest was booted from at first, here or elsewhere.
    pub(crate) fn again(&self, config: &VmConfig, devices: usize) -> Result<Boot> {
        let identity = self.identity().clone();
        let Identity::Kernel { digest, command_line } = identity else {
            let start = StartPage::read(&self.memory);
            let start = start.or_else(|_| StartPage::of(config, devices))?;
            return self.workload(&start, &config.command_line);
        };
        let Some(path) = &config.kernel else {
            return Err(Error::State("this host was not given the guest's kernel".into()));
        };
        let (mut file, found) = open(path)?;
        if found != digest {
            let what = "it is not the kernel the guest was booted from".into();
            return Err(Error::Kernel { path: path.clone(), what });
        }
        self.kernel(path, &mut file, config, &command_line)
    }

    fn workload(&self, start: &StartPage, command_line: &str) -> Result<Boot> {
        start.install(&self.memory)?;
        pvh::load(&mut Cursor::new(workload::elf_image()), command_line, &self.memory)
            .map_err(|error| Error::State(format!("the built-in workload: {error}")))
    }

    fn kernel(
        &self,
        path: &Path,
        file: &mut File,
        config: &VmConfig,
        command_line: &str,
    ) -> Result<Boot> {
        mptable::write(config.vcpus, &self.memory)?;
        pvh::load(file, command_line, &self.memory)
            .map_err(|error| Error::Kernel { path: path.into(), what: error.to_string() })
    }

    /// Appends the identity to a section.
    pub(crate) fn save(&self, writer: &mut Writer) {
        match &*self.identity() {
            Identity::Workload => writer.u8(0),
            Identity::Kernel { digest, command_line } => {
                writer.u8(1).bytes(digest).bytes(command_line.as_bytes())
            }
        };
    }

    /// Reads what [`save`](Self::save) appended; takes effect only when `commit` is called with it.
    pub(crate) fn load(&self, reader: &mut Reader<'_>) -> Result<LoadedIdentity> {
        let identity = match reader.u8()? {
            0 => Identity::Workload,
            1 => {
                let digest = reader.exact()?;
                let command_line = reader.bytes(COMMAND_LINE_MAX)?.to_vec();
                let command_line = String::from_utf8(command_line)
                    .map_err(|_| reader.error("a command line that is not UTF-8"))?;
                Identity::Kernel { digest, command_line }
            }
            other => return Err(reader.error(format!("a guest booted from source {other}"))),
        };
        Ok(LoadedIdentity(identity))
    }

    /// The guest that was loaded was booted from this.
    pub(crate) fn commit(&self, loaded: LoadedIdentity) {
        *self.identity() = loaded.0;
    }

    fn identity(&self) -> MutexGuard<'_, Identity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An identity that was read.
pub(crate) struct LoadedIdentity(Identity);

/// The file at its start, and its digest.
fn open(path: &Path) -> Result<(File, [u8; 32])> {
    let refused =
        |error: std::io::Error| Error::Kernel { path: path.into(), what: error.to_string() };
    let mut file = File::open(path).map_err(refused)?;
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut file, &mut hasher).map_err(refused)?;
    file.rewind().map_err(refused)?;
    Ok((file, *hasher.finalize().as_bytes()))
}
