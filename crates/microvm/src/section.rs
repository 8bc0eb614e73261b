//! Bounded encoding of machine-state sections: little endian, every length checked when read.
//!
//! A payload is a sequence of integers and of byte strings with a u32 length. Kinds and versions are in
//! the [`Section`] itself; a reader must consume its payload to the end.

use migration::Section;

use crate::error::{Error, Result};

/// Longest byte string in a section, in bytes.
const BYTES_MAX: usize = 1 << 20;

/// Builds a payload.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty payload.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a u8.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends a u32.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a u64.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a byte string with its length.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.u32(value.len() as u32);
        self.bytes.extend_from_slice(value);
        self
    }

    /// The payload.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Reads a payload; errors name the section.
#[derive(Debug)]
pub struct Reader<'a> {
    name: &'a str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `payload` of section `name`.
    pub fn new(name: &'a str, payload: &'a [u8]) -> Self {
        Self { name, rest: payload }
    }

    /// The next u8.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// The next u32.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next u64.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next byte string, at most `max` bytes long.
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8]> {
        let len = self.u32()? as usize;
        if len > max.min(BYTES_MAX) {
            return Err(self.error(format!("a field of {len} bytes, at most {max} fit")));
        }
        self.take(len)
    }

    /// The next byte string, exactly `N` bytes long.
    pub fn exact<const N: usize>(&mut self) -> Result<[u8; N]> {
        let len = self.u32()? as usize;
        if len != N {
            return Err(self.error(format!("a field of {len} bytes, {N} are expected")));
        }
        self.array()
    }

    /// Nothing may be left.
    pub fn finish(self) -> Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.error(format!("{} bytes too many", self.rest.len())))
    }

    /// An error that names the section.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::section(self.name, what)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.rest.split_first_chunk::<N>() {
            Some((array, rest)) => {
                self.rest = rest;
                Ok(*array)
            }
            None => Err(self.error("it is cut short")),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(len) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(self.error("it is cut short")),
        }
    }
}

/// The section called `name`, of the kind and version this build reads.
pub fn find<'a>(
    sections: &'a [Section],
    name: &str,
    kind: &str,
    version: u32,
) -> Result<&'a Section> {
    let Some(section) = sections.iter().find(|section| section.name == name) else {
        return Err(Error::section(name, "it is missing"));
    };
    if section.kind != kind || section.version != version {
        return Err(Error::section(
            name,
            format!(
                "it is {} version {}, this host reads {kind} version {version}",
                section.kind, section.version
            ),
        ));
    }
    Ok(section)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let payload = Writer::new().u8(1).u32(2).u64(3).bytes(b"four").finish();
        let mut reader = Reader::new("x", &payload);
        assert_eq!(reader.u8().unwrap(), 1);
        assert_eq!(reader.u32().unwrap(), 2);
        assert_eq!(reader.u64().unwrap(), 3);
        assert_eq!(reader.bytes(4).unwrap(), b"four");
        reader.finish().unwrap();

        for cut in 0..payload.len() {
            let mut reader = Reader::new("x", &payload[..cut]);
            let all = (|| -> Result<()> {
                reader.u8()?;
                reader.u32()?;
                reader.u64()?;
                reader.bytes(4)?;
                Ok(())
            })();
            assert!(all.is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_length_from_outside_is_capped() {
        let payload = u32::MAX.to_le_bytes();
        assert!(Reader::new("x", &payload).bytes(usize::MAX).is_err());
        assert!(Reader::new("x", &payload).exact::<8>().is_err());
        let payload = Writer::new().bytes(b"12345").finish();
        assert!(Reader::new("x", &payload).bytes(4).is_err());
        assert!(Reader::new("x", &[0]).finish().is_err());
    }
}
