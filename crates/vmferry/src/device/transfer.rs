//! `vmferry device save` and `vmferry device load`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vfio_migration::recovery::{Recovery, recover};
use vfio_migration::{DeviceState, MigratableDevice, ReadOutcome};

use super::open::Device;
use super::state_file::{CHUNK_MAX_BYTES, Meta, Reader, Writer, enter_length};
use crate::cli::{LoadArgs, SaveArgs};
use crate::signals::Signals;
use crate::units::show_bytes;

/// More than any device has: a stream without an end is given up.
const STATE_MAX_BYTES: u64 = 1 << 40;

/// Saves a device's state.
pub fn save(args: &SaveArgs, signals: &Signals) -> anyhow::Result<bool> {
    let pipe = args.file == Path::new("-");
    if pipe && io::stdout().is_terminal() {
        bail!("a device's state is not for a terminal; name a file, or pipe it on");
    }
    let device = Device::open(&args.device)?;
    let meta = Meta { kind: device.kind.clone(), ids: device.ids()? };
    let mut migration = device.need_migration()?;
    let bytes = match pipe {
        true => {
            let out = BufWriter::with_capacity(CHUNK_MAX_BYTES, io::stdout().lock());
            let mut writer = Writer::new(out, &meta).context("write to standard output")?;
            save_to(&device, migration.as_mut(), &mut writer, signals)?;
            let bytes = writer.length();
            writer.finish().context("write to standard output")?;
            bytes
        }
        false => save_file(&device, migration.as_mut(), &args.file, &meta, signals)?,
    };
    eprintln!("{}: {} saved", device.name, show_bytes(bytes));
    Ok(true)
}

/// Writes a new file and puts it in place once it is whole.
fn save_file(
    device: &Device,
    migration: &mut dyn MigratableDevice,
    path: &Path,
    meta: &Meta,
    signals: &Signals,
) -> anyhow::Result<u64> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let what = || format!("write {}", path.display());
    let file = tempfile::NamedTempFile::new_in(folder).with_context(what)?;
    let out = BufWriter::with_capacity(CHUNK_MAX_BYTES, file);
    let mut writer = Writer::new(out, meta).with_context(what)?;
    save_to(device, migration, &mut writer, signals)?;
    let bytes = writer.length();
    let out = writer.finish().with_context(what)?;
    let mut file = out.into_inner().map_err(io::IntoInnerError::into_error).with_context(what)?;
    enter_length(&mut file, bytes).with_context(what)?;
    file.as_file().sync_all().with_context(what)?;
    file.persist(path).map_err(|error| error.error).with_context(what)?;
    Ok(bytes)
}

/// Reads the whole state in STOP_COPY; the device runs again afterwards, whatever happens.
fn save_to<W: Write>(
    device: &Device,
    migration: &mut dyn MigratableDevice,
    writer: &mut Writer<W>,
    signals: &Signals,
) -> anyhow::Result<()> {
    let saved = read_all(migration, writer, signals);
    let back = match recover(migration, DeviceState::Running) {
        Recovery::Recovered => Ok(()),
        Recovery::Reset { cause } => {
            eprintln!("{}: only a reset made it run again: {cause}", device.name);
            Ok(())
        }
        Recovery::Lost { cause } => Err(cause),
    };
    saved.with_context(|| format!("save {}", device.name))?;
    back.with_context(|| format!("{} does not run again", device.name))
}

fn read_all<W: Write>(
    migration: &mut dyn MigratableDevice,
    writer: &mut Writer<W>,
    signals: &Signals,
) -> anyhow::Result<()> {
    if migration.state()? == DeviceState::Error {
        bail!("it is in ERROR, and only a reset leaves that");
    }
    // From any other state; a session that an earlier client left behind is not taken over.
    migration.set_state(DeviceState::Stop)?;
    migration.set_state(DeviceState::StopCopy)?;
    let mut buffer = vec![0; CHUNK_MAX_BYTES];
    let mut progress = Progress::new("saved");
    loop {
        if signals.any() {
            bail!("interrupted");
        }
        match migration.read(&mut buffer)? {
            ReadOutcome::Data(got) => {
                let data = buffer.get(..got).context("the device read beyond the buffer")?;
                writer.data(data).context("write the state")?;
            }
            ReadOutcome::End => return Ok(()),
            ReadOutcome::NothingNow => bail!("it says ENOMSG in STOP_COPY (rule S3)"),
        }
        if writer.length() > STATE_MAX_BYTES {
            bail!("it has more than {} of state", show_bytes(STATE_MAX_BYTES));
        }
        progress.tell(writer.length(), None);
    }
}

/// Loads a device's state.
pub fn load(args: &LoadArgs, signals: &Signals) -> anyhow::Result<bool> {
    let what = || format!("load {}", args.file.display());
    if args.file == Path::new("-") {
        let from = BufReader::with_capacity(CHUNK_MAX_BYTES, io::stdin().lock());
        let reader = Reader::new(from).context("load standard input")?;
        return load_from(args, reader, signals);
    }
    // The whole file first: the device sees nothing that is not right.
    let open =
        || File::open(&args.file).map(|file| BufReader::with_capacity(CHUNK_MAX_BYTES, file));
    let mut reader = Reader::new(open().with_context(what)?).with_context(what)?;
    let mut buffer = Vec::new();
    let mut progress = Progress::new("checked");
    let mut bytes = 0;
    while reader.data(&mut buffer).with_context(what)? {
        if signals.any() {
            bail!("interrupted");
        }
        bytes += buffer.len() as u64;
        progress.tell(bytes, reader.announced());
    }
    drop(progress);
    let reader = Reader::new(open().with_context(what)?).with_context(what)?;
    load_from(args, reader, signals)
}

fn load_from<R: Read>(
    args: &LoadArgs,
    mut reader: Reader<R>,
    signals: &Signals,
) -> anyhow::Result<bool> {
    let device = Device::open(&args.device)?;
    let here = Meta { kind: device.kind.clone(), ids: device.ids()? };
    reader.meta.check(&here).with_context(|| format!("load {}", args.file.display()))?;
    let mut migration = device.need_migration()?;
    match write_all(migration.as_mut(), &mut reader, args.stop, signals) {
        Ok(bytes) => {
            eprintln!("{}: {} loaded", device.name, show_bytes(bytes));
            Ok(true)
        }
        Err(error) => {
            let error = error.context(format!("load {} into {}", args.file.display(), device.name));
            let error = crate::sentence(&error);
            match migration.reset() {
                Ok(()) => bail!("{error}; the device was reset"),
                Err(reset) => bail!("{error}; the device could not even be reset: {reset}"),
            }
        }
    }
}

fn write_all<R: Read>(
    migration: &mut dyn MigratableDevice,
    reader: &mut Reader<R>,
    stop: bool,
    signals: &Signals,
) -> anyhow::Result<u64> {
    if migration.state()? != DeviceState::Running {
        // Whatever another client left behind.
        migration.reset()?;
    }
    migration.set_state(DeviceState::Resuming)?;
    let mut buffer = Vec::new();
    let mut progress = Progress::new("loaded");
    let mut bytes = 0;
    while reader.data(&mut buffer)? {
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            if signals.any() {
                bail!("interrupted");
            }
            let taken = migration.write(rest)?;
            rest = rest.get(taken..).filter(|_| taken > 0).context("impossible write")?;
            bytes += taken as u64;
        }
        progress.tell(bytes, reader.announced());
    }
    // Length and checksum are right; now the device judges.
    migration.set_state(DeviceState::Stop).context("the device refuses the state")?;
    if !stop {
        migration.set_state(DeviceState::Running)?;
    }
    Ok(bytes)
}

/// A line on a terminal, once the work takes long.
struct Progress {
    word: &'static str,
    next: Instant,
    shown: bool,
}

impl Progress {
    fn new(word: &'static str) -> Self {
        Self { word, next: Instant::now() + Duration::from_secs(1), shown: false }
    }

    fn tell(&mut self, bytes: u64, of: Option<u64>) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + Duration::from_millis(500);
        let of = of.map_or_else(String::new, |of| format!(" of {}", show_bytes(of)));
        if io::stderr().is_terminal() {
            self.shown = true;
            eprint!("\r\x1b[K{} {}{of}", show_bytes(bytes), self.word);
        } else {
            tracing::debug!(bytes, "{} so far", self.word);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
