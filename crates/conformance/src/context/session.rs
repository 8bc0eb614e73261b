//! Streams, PRECOPY_INFO and the opt-in.

use super::{Answer, Context, Info, Stop, fail, not_applicable, skip};
use crate::errno::Errno;
use crate::subject::{StreamId, feature};

impl Context {
    /// The stream of the last session that a SET handed out.
    pub fn stream(&mut self) -> Result<StreamId, Stop> {
        match self.stream {
            Some(stream) => Ok(stream),
            None if self.is_wire() => Ok(StreamId::WIRE),
            None => skip("no data_fd was handed out (rule X1)"),
        }
    }

    /// Reads the current stream.
    pub fn read(&mut self, buf: &mut [u8]) -> Answer<usize> {
        let stream = self.stream()?;
        self.read_of(stream, buf)
    }

    /// Reads a stream.
    pub fn read_of(&mut self, stream: StreamId, buf: &mut [u8]) -> Answer<usize> {
        let (name, room) = (self.name_of_read(), buf.len());
        match self.call(name, |subject| subject.read(stream, buf))? {
            Ok(got) if got > room => {
                fail(format!("at most {room} bytes of a read"), format!("{got} bytes"))
            }
            answer => Ok(answer),
        }
    }

    /// Writes to the current stream.
    pub fn write(&mut self, data: &[u8]) -> Answer<usize> {
        let stream = self.stream()?;
        self.write_to(stream, data)
    }

    /// Writes to a stream.
    pub fn write_to(&mut self, stream: StreamId, data: &[u8]) -> Answer<usize> {
        let name = if self.is_wire() { "MIG_DATA_WRITE" } else { "write()" };
        match self.call(name, |subject| subject.write(stream, data))? {
            Ok(taken) if taken > data.len() => {
                let most = data.len();
                fail(format!("at most {most} bytes taken"), format!("{taken} bytes"))
            }
            answer => Ok(answer),
        }
    }

    /// How reading is called.
    pub fn name_of_read(&self) -> &'static str {
        if self.is_wire() { "MIG_DATA_READ" } else { "read()" }
    }

    /// The most bytes of one write.
    pub fn write_bytes_max(&self) -> usize {
        self.subject.write_bytes_max().max(1)
    }

    /// PRECOPY_INFO with the caller's bytes.
    pub fn info_raw(&mut self, argsz: u32, info: Info) -> Answer<Info> {
        let stream = self.stream()?;
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        bytes[4..8].copy_from_slice(&info.flags.to_ne_bytes());
        bytes[8..16].copy_from_slice(&info.initial_bytes.to_ne_bytes());
        bytes[16..].copy_from_slice(&info.dirty_bytes.to_ne_bytes());
        let answer =
            self.call("PRECOPY_INFO", |subject| subject.precopy_info(stream, &mut bytes))?;
        let word = |at: usize| {
            u64::from_ne_bytes(
                bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]),
            )
        };
        let flags = (word(0) >> if cfg!(target_endian = "little") { 32 } else { 0 }) as u32;
        Ok(answer.map(|()| Info { flags, initial_bytes: word(8), dirty_bytes: word(16) }))
    }

    /// PRECOPY_INFO of a zeroed struct.
    pub fn info(&mut self) -> Answer<Info> {
        self.info_raw(24, Info { flags: 0, initial_bytes: 0, dirty_bytes: 0 })
    }

    /// PRECOPY_INFO where a rule needs it and is not about whether it works.
    pub fn need_info(&mut self) -> Result<Info, Stop> {
        match self.info()? {
            Ok(info) => Ok(info),
            Err(errno) => skip(format!("PRECOPY_INFO failed: {errno} (rules P1, P2)")),
        }
    }

    /// A handle without the INFOv2 opt-in: opens the device anew if need be.
    pub fn without_opt_in(&mut self) -> Result<(), Stop> {
        if self.opted_in { self.reopen() } else { Ok(()) }
    }

    /// Opts in to INFOv2; not applicable where that is not offered.
    pub fn opt_in(&mut self) -> Result<(), Stop> {
        self.need_precopy()?;
        match self.set_opt_in(&[])? {
            Ok(_) => Ok(()),
            Err(Errno(libc::ENOTTY | libc::EINVAL)) => {
                not_applicable("INFOv2 is not offered (Linux before 7.1, or a server without it)")
            }
            Err(errno) => skip(format!("the INFOv2 opt-in failed: {errno} (rule R1)")),
        }
    }

    /// SET MIG_PRECOPY_INFOv2 with a payload that does not matter.
    pub fn set_opt_in(&mut self, payload: &[u8]) -> Answer<Vec<u8>> {
        let answer = self.feature_sized(feature::MIG_PRECOPY_INFO_V2 | feature::SET, payload)?;
        self.opted_in |= answer.is_ok();
        Ok(answer)
    }
}
