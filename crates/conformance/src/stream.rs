//! A device's state as a stream: read to an end within limits, kept, loaded.

use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Duration;

use tempfile::SpooledTempFile;
use vfio_migration::DeviceState;

use crate::context::{Context, Stop, fail, skip};
use crate::errno::Errno;

/// A read's buffer, in bytes.
const BUFFER_BYTES: usize = 1 << 20;
/// So much of a state stays in memory; more goes to a temporary file.
const SPOOL_BYTES: usize = 8 << 20;
/// Kept at the end of a rule's time for what follows the stream.
const RESERVE: Duration = Duration::from_millis(500);

/// Bytes that came out of a device, in order.
#[derive(Debug)]
pub struct Saved {
    file: SpooledTempFile,
    /// How many.
    pub bytes: u64,
}

/// How reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// read() answered 0.
    Zero,
    /// read() answered ENOMSG.
    NoMessage,
}

impl Default for Saved {
    fn default() -> Self {
        Self { file: SpooledTempFile::new(SPOOL_BYTES), bytes: 0 }
    }
}

impl Saved {
    /// Appends.
    pub fn push(&mut self, data: &[u8]) -> Result<(), Stop> {
        let written = self.file.write_all(data);
        written.or_else(|error| skip(format!("no room for the device's state: {error}")))?;
        self.bytes += data.len() as u64;
        Ok(())
    }

    /// Up to `bytes` bytes from `offset` on.
    pub fn part(&mut self, offset: u64, bytes: usize) -> Result<Vec<u8>, Stop> {
        let mut part = vec![0; bytes.min(self.bytes.saturating_sub(offset) as usize)];
        let read =
            self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(&mut part));
        let read = read.and_then(|()| self.file.seek(SeekFrom::End(0)));
        match read {
            Ok(_) => Ok(part),
            Err(error) => skip(format!("the device's state cannot be read back: {error}")),
        }
    }
}

/// Reads the current stream until it has nothing now, or ends, into `saved` if given.
///
/// An errno that is no end is told by the inner result. Too much data, or too little time, skips the rule.
pub fn drain(
    context: &mut Context,
    mut saved: Option<&mut Saved>,
) -> Result<Result<(Ended, u64), Errno>, Stop> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut total = 0u64;
    loop {
        if total > context.stream_max_bytes {
            let limit = context.stream_max_bytes;
            return skip(format!("the stream has more than {limit} bytes (--stream-limit)"));
        }
        if context.time_left() < RESERVE {
            let limit = context.limit_text();
            return skip(format!(
                "the stream did not end within the rule's {limit}: {total} bytes were read (--time-limit)"
            ));
        }
        match context.read(&mut buffer)? {
            Ok(0) => return Ok(Ok((Ended::Zero, total))),
            Ok(got) => {
                total += got as u64;
                if let Some(saved) = saved.as_deref_mut() {
                    saved.push(buffer.get(..got).unwrap_or_default())?;
                }
            }
            Err(Errno(libc::ENOMSG)) => return Ok(Ok((Ended::NoMessage, total))),
            Err(errno) => return Ok(Err(errno)),
        }
    }
}

/// Reads to the temporary end of PRE_COPY; what reading there should look like is S1's.
pub fn drain_precopy(context: &mut Context, saved: Option<&mut Saved>) -> Result<u64, Stop> {
    match drain(context, saved)? {
        Ok((_, bytes)) => Ok(bytes),
        Err(errno) => skip(format!("reading in PRE_COPY failed: {errno} (rules S1, X2)")),
    }
}

/// Reads to the end of STOP_COPY; what the end should look like is S3's.
pub fn drain_stop_copy(context: &mut Context, saved: &mut Saved) -> Result<u64, Stop> {
    match drain(context, Some(saved))? {
        Ok((_, bytes)) => Ok(bytes),
        Err(errno) => skip(format!("reading in STOP_COPY failed: {errno} (rules S3, X2)")),
    }
}

/// The whole state of the device, read in STOP_COPY alone; the device stays there.
pub fn save(context: &mut Context) -> Result<Saved, Stop> {
    context.go(DeviceState::StopCopy)?;
    let mut saved = Saved::default();
    drain_stop_copy(context, &mut saved)?;
    if saved.bytes == 0 {
        return skip("the device has no state to save (rule S5)");
    }
    Ok(saved)
}

/// Skips where the device does not even load what STOP_COPY alone gives; that is S5's.
pub fn need_loading(context: &mut Context) -> Result<(), Stop> {
    let mut saved = save(context)?;
    match load(context, &mut saved)? {
        Ok(()) => context.go_anew(DeviceState::Running),
        Err(why) => skip(format!("the device does not load its own state: {why} (rule S5)")),
    }
}

/// What writing a stream did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All of it was taken.
    All,
    /// It was refused at this offset.
    Refused(u64, Errno),
}

/// Writes `bytes` bytes of `saved` to the current stream in pieces that `piece` sizes by the offset.
pub fn write(
    context: &mut Context,
    saved: &mut Saved,
    bytes: u64,
    piece: impl Fn(u64) -> usize,
) -> Result<Written, Stop> {
    let bytes = bytes.min(saved.bytes);
    let mut at = 0;
    while at < bytes {
        if context.time_left() < RESERVE {
            let limit = context.limit_text();
            return skip(format!(
                "loading did not end within the rule's {limit}: {at} bytes were written (--time-limit)"
            ));
        }
        let most = piece(at).clamp(1, context.write_bytes_max());
        let data = saved.part(at, most.min((bytes - at) as usize))?;
        match context.write(&data)? {
            Ok(0) => return fail("write() takes at least a byte", format!("0 at offset {at}")),
            Ok(taken) => at += taken as u64,
            Err(errno) => return Ok(Written::Refused(at, errno)),
        }
    }
    Ok(Written::All)
}

/// Resets the device and loads `saved` with ordinary writes, up to STOP.
///
/// The inner result says what refused it.
pub fn load(context: &mut Context, saved: &mut Saved) -> Result<Result<(), String>, Stop> {
    context.go_anew(DeviceState::Resuming)?;
    match write(context, saved, u64::MAX, |_| BUFFER_BYTES)? {
        Written::Refused(at, errno) => {
            return Ok(Err(format!("{errno} at offset {at} of {} bytes", saved.bytes)));
        }
        Written::All => {}
    }
    Ok(context.set(DeviceState::Stop)?.map(drop).map_err(|errno| format!("SET STOP: {errno}")))
}
