//! What a case finds in the lab: mediated devices to make, and the command to run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// Where the command is in the initramfs.
pub const VMFERRY: &str = "/bin/vmferry";
/// Where mediated devices appear.
const MDEV_DEVICES: &str = "/sys/bus/mdev/devices";
/// How long the kernel may take to show a device that was made, or to take one away.
const APPEAR_LIMIT: Duration = Duration::from_secs(5);
/// How often is looked.
const POLL: Duration = Duration::from_millis(5);

/// Who makes mediated devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The kernel's sample: a serial card, migratable with STOP_COPY, P2P and PRE_COPY.
    Mtty,
    /// Our test driver.
    Ferrydev,
}

impl Parent {
    /// Its name under `/sys/class/mdev_bus`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mtty => "mtty",
            Self::Ferrydev => "ferrydev",
        }
    }

    fn create_file(self) -> String {
        let kind = match self {
            Self::Mtty => "mtty-1",
            Self::Ferrydev => "ferrydev-1",
        };
        format!("/sys/class/mdev_bus/{}/mdev_supported_types/{kind}/create", self.name())
    }
}

/// The machine as a case sees it.
#[derive(Debug)]
pub struct Lab {
    /// A folder for this case alone, in memory.
    dir: PathBuf,
}

/// The folder of the case that runs, or ran, in process `pid`.
pub fn dir_of(pid: u32) -> PathBuf {
    PathBuf::from(format!("/tmp/case-{pid}"))
}

/// A mediated device; dropping it takes it away.
#[derive(Debug)]
pub struct Mdev {
    uuid: String,
}

impl Lab {
    /// The lab for the case that runs in this process.
    pub fn new() -> anyhow::Result<Self> {
        let dir = dir_of(std::process::id());
        fs::create_dir_all(&dir).context("make a folder for the case")?;
        Ok(Self { dir })
    }

    /// A folder for this case alone, in memory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether this kind of device can be made.
    pub fn has(&self, parent: Parent) -> bool {
        Path::new(&parent.create_file()).exists()
    }

    /// Makes a device.
    pub fn create(&self, parent: Parent) -> anyhow::Result<Mdev> {
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a UUID")?;
        let uuid = uuid.trim().to_owned();
        fs::write(parent.create_file(), &uuid)
            .with_context(|| format!("make a {} device", parent.name()))?;
        let device = Mdev { uuid };
        // Its nodes are made before create returns; this is for a kernel that thinks otherwise.
        wait_until("the device's node appears", || Ok(device.cdev()?.exists()))?;
        Ok(device)
    }

    /// The command with these arguments, not yet started.
    pub fn vmferry<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: I,
    ) -> Command {
        let mut command = Command::new(VMFERRY);
        command.args(arguments).current_dir(&self.dir).stdin(std::process::Stdio::null());
        command
    }
}

impl Mdev {
    /// Its UUID, which names it for `vfio:UUID`.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Its folder in sysfs.
    pub fn sysfs(&self) -> PathBuf {
        Path::new(MDEV_DEVICES).join(&self.uuid)
    }

    /// `/dev/vfio/devices/vfioN`.
    pub fn cdev(&self) -> anyhow::Result<PathBuf> {
        let dir = self.sysfs().join("vfio-dev");
        let entry = fs::read_dir(&dir)
            .with_context(|| format!("read {}", dir.display()))?
            .next()
            .with_context(|| format!("{} is empty", dir.display()))??;
        Ok(Path::new("/dev/vfio/devices").join(entry.file_name()))
    }

    /// `/dev/vfio/N`, its group.
    pub fn group(&self) -> anyhow::Result<PathBuf> {
        let link = self.sysfs().join("iommu_group");
        let target = fs::read_link(&link).with_context(|| format!("read {}", link.display()))?;
        let number =
            target.file_name().with_context(|| format!("{} names no group", link.display()))?;
        Ok(Path::new("/dev/vfio").join(number))
    }

    /// Sets an attribute of ferrydev; only while the device is not open.
    pub fn set(&self, attribute: &str, value: impl ToString) -> anyhow::Result<()> {
        let file = self.sysfs().join("ferrydev").join(attribute);
        // With its newline: a write of nothing would not reach the driver.
        fs::write(&file, format!("{}\n", value.to_string()))
            .with_context(|| format!("write {:?} to {}", value.to_string(), file.display()))
    }

    /// Reads an attribute of ferrydev.
    pub fn get(&self, attribute: &str) -> anyhow::Result<String> {
        let file = self.sysfs().join("ferrydev").join(attribute);
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(text.trim().to_owned())
    }
}

impl Drop for Mdev {
    fn drop(&mut self) {
        // A case that failed with the device in use leaves it to the runner.
        let _ = fs::write(self.sysfs().join("remove"), "1");
    }
}

/// Waits until something holds, for as long as the kernel may take.
pub fn wait_until(what: &str, holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    wait_until_for(what, APPEAR_LIMIT, holds)
}

/// Waits until something holds.
pub fn wait_until_for(
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !holds()? {
        if Instant::now() >= deadline {
            bail!("waited {} s until {what}", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// The folders of the mediated devices there are.
pub fn devices() -> anyhow::Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(MDEV_DEVICES) else { return Ok(Vec::new()) };
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Takes every mediated device away that a case has left.
pub fn remove_devices() -> anyhow::Result<()> {
    for path in devices()? {
        fs::write(path.join("remove"), "1")
            .with_context(|| format!("remove {}", path.display()))?;
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}
