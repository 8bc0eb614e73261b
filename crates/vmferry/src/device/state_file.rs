//! The format of a saved device state.
//!
//! ```text
//!   magic "VMFYSTAT" │ version u32 │ meta_bytes u32 │ length u64 │ meta: JSON {kind, ids}
//!   chunk: bytes u32 │ data …      repeated
//!   0 u32 │ length u64 │ blake3 of everything before, `length` of the head taken as unknown
//! ```
//!
//! Numbers are little endian. `length` is that of the data; all ones: not known when the head was written
//! (a pipe). Every count is checked against its limit before memory is taken for it.

use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

const MAGIC: [u8; 8] = *b"VMFYSTAT";
const VERSION: u32 = 1;
const META_MAX_BYTES: u32 = 16 << 10;
/// Largest chunk, in bytes.
pub(super) const CHUNK_MAX_BYTES: usize = 1 << 20;
const LENGTH_UNKNOWN: u64 = u64::MAX;
const LENGTH_OFFSET: u64 = 16;

/// Why a saved state is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateFileError {
    #[error("it is not a saved device state")]
    Magic,
    #[error("it has version {0} of the format, this command reads version {VERSION}")]
    Version(u32),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it is cut off {0}")]
    Truncated(&'static str),
    #[error("it is of another device: {what} {saved:?}, this one has {here:?}")]
    OtherDevice { what: &'static str, saved: String, here: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a state was saved from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Meta {
    /// Backend and driver.
    pub(super) kind: String,
    /// PCI ids.
    pub(super) ids: String,
}

impl Meta {
    /// Refuses what was saved from another kind of device.
    pub(super) fn check(&self, here: &Self) -> Result<(), StateFileError> {
        for (what, saved, here) in [("kind", &self.kind, &here.kind), ("ids", &self.ids, &here.ids)]
        {
            if saved != here {
                let (saved, here) = (saved.clone(), here.clone());
                return Err(StateFileError::OtherDevice { what, saved, here });
            }
        }
        Ok(())
    }
}

fn head(meta: &[u8]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(meta.len() as u32).to_le_bytes());
    head.extend_from_slice(&LENGTH_UNKNOWN.to_le_bytes());
    head.extend_from_slice(meta);
    head
}

/// Writes a state.
pub(super) struct Writer<W> {
    out: W,
    hash: blake3::Hasher,
    length: u64,
}

impl<W: Write> Writer<W> {
    /// Begins with the head.
    pub(super) fn new(out: W, meta: &Meta) -> io::Result<Self> {
        let meta = serde_json::to_vec(meta)?;
        let mut writer = Self { out, hash: blake3::Hasher::new(), length: 0 };
        writer.put(&head(&meta))?;
        Ok(writer)
    }

    /// Appends data.
    pub(super) fn data(&mut self, data: &[u8]) -> io::Result<()> {
        for chunk in data.chunks(CHUNK_MAX_BYTES) {
            self.put(&(chunk.len() as u32).to_le_bytes())?;
            self.put(chunk)?;
            self.length += chunk.len() as u64;
        }
        Ok(())
    }

    /// Bytes of data so far.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Ends it; gives the file back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.put(&0u32.to_le_bytes())?;
        self.put(&self.length.to_le_bytes())?;
        let hash = self.hash.finalize();
        self.out.write_all(hash.as_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }
}

/// Enters the length in the head of a finished file.
pub(super) fn enter_length(file: &mut (impl Write + Seek), length: u64) -> io::Result<()> {
    file.seek(SeekFrom::Start(LENGTH_OFFSET))?;
    file.write_all(&length.to_le_bytes())
}

/// Reads a state.
pub(super) struct Reader<R> {
    from: R,
    hash: blake3::Hasher,
    announced: u64,
    length: u64,
    /// What it was saved from.
    pub(super) meta: Meta,
}

impl<R: Read> Reader<R> {
    /// Reads the head.
    pub(super) fn new(mut from: R) -> Result<Self, StateFileError> {
        let mut fixed = [0; 24];
        let got = read_up_to(&mut from, &mut fixed)?;
        if got < MAGIC.len() || fixed[..8] != MAGIC {
            return Err(StateFileError::Magic);
        }
        if got < fixed.len() {
            return Err(StateFileError::Truncated("in its head"));
        }
        let [.., v0, v1, v2, v3, m0, m1, m2, m3, l0, l1, l2, l3, l4, l5, l6, l7] = fixed;
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != VERSION {
            return Err(StateFileError::Version(version));
        }
        let meta_bytes = u32::from_le_bytes([m0, m1, m2, m3]);
        if meta_bytes > META_MAX_BYTES {
            return Err(StateFileError::Damaged("its head is too long"));
        }
        let announced = u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
        let mut meta = vec![0; meta_bytes as usize];
        fill(&mut from, &mut meta, "in its head")?;
        let mut hash = blake3::Hasher::new();
        hash.update(&head(&meta));
        let meta = serde_json::from_slice(&meta)
            .map_err(|_| StateFileError::Damaged("its head cannot be read"))?;
        Ok(Self { from, hash, announced, length: 0, meta })
    }

    /// The length of the data, where the head says it.
    pub(super) fn announced(&self) -> Option<u64> {
        (self.announced != LENGTH_UNKNOWN).then_some(self.announced)
    }

    /// The next data into `buffer`; `false` at the end, with length and checksum verified.
    pub(super) fn data(&mut self, buffer: &mut Vec<u8>) -> Result<bool, StateFileError> {
        let mut count = [0; 4];
        fill(&mut self.from, &mut count, "before its end")?;
        self.hash.update(&count);
        let count = u32::from_le_bytes(count) as usize;
        if count > CHUNK_MAX_BYTES {
            return Err(StateFileError::Damaged("a piece of it is too long"));
        }
        if count == 0 {
            self.end()?;
            return Ok(false);
        }
        buffer.resize(count, 0);
        fill(&mut self.from, buffer, "in the middle of its data")?;
        self.hash.update(buffer);
        self.length += count as u64;
        Ok(true)
    }

    fn end(&mut self) -> Result<(), StateFileError> {
        let mut length = [0; 8];
        fill(&mut self.from, &mut length, "at its end")?;
        self.hash.update(&length);
        let mut hash = [0; 32];
        fill(&mut self.from, &mut hash, "at its end")?;
        if self.hash.finalize() != hash {
            return Err(StateFileError::Damaged("its checksum does not fit"));
        }
        let announced = self.announced().is_none_or(|announced| announced == self.length);
        if u64::from_le_bytes(length) != self.length || !announced {
            return Err(StateFileError::Damaged("its length does not fit"));
        }
        if read_up_to(&mut self.from, &mut [0; 1])? != 0 {
            return Err(StateFileError::Damaged("something follows its end"));
        }
        Ok(())
    }
}

fn fill(from: &mut impl Read, bytes: &mut [u8], place: &'static str) -> Result<(), StateFileError> {
    match read_up_to(from, bytes)? == bytes.len() {
        true => Ok(()),
        false => Err(StateFileError::Truncated(place)),
    }
}

fn read_up_to(from: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while let Some(room) = bytes.get_mut(got..).filter(|room| !room.is_empty()) {
        match from.read(room) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Meta {
        Meta { kind: "vfio-user".into(), ids: "1b36:00f7".into() }
    }

    fn saved(data: &[u8]) -> Vec<u8> {
        let mut writer = Writer::new(io::Cursor::new(Vec::new()), &meta()).unwrap();
        writer.data(data).unwrap();
        let length = writer.length();
        let mut file = writer.finish().unwrap();
        enter_length(&mut file, length).unwrap();
        file.into_inner()
    }

    fn read(bytes: &[u8]) -> Result<Vec<u8>, StateFileError> {
        let mut reader = Reader::new(bytes)?;
        let (mut data, mut chunk) = (Vec::new(), Vec::new());
        while reader.data(&mut chunk)? {
            data.extend_from_slice(&chunk);
        }
        Ok(data)
    }

    #[test]
    fn what_was_written_is_read() {
        for size in [0, 1, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES + 1] {
            let data: Vec<u8> = (0..size).map(|at| at as u8).collect();
            assert!(read(&saved(&data)).unwrap() == data, "{size}");
        }
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_found() {
        let whole = saved(b"the state of a device");
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                assert!(read(&bytes).is_err(), "bit {bit} of byte {at}");
            }
        }
        let mut longer = whole;
        longer.push(0);
        assert!(read(&longer).is_err());
    }

    #[test]
    fn counts_take_no_memory() {
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&u32::MAX.to_le_bytes());
        head.extend_from_slice(&[0; 8]);
        assert!(matches!(read(&head), Err(StateFileError::Damaged(_))));
        let whole = saved(b"x");
        let meta_bytes = serde_json::to_vec(&meta()).unwrap().len();
        let mut bytes = whole;
        bytes[24 + meta_bytes..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&bytes), Err(StateFileError::Damaged(_))));
    }

    #[test]
    fn another_device_is_named() {
        let other = Meta { ids: "15b3:101e".into(), ..meta() };
        let refused = meta().check(&other).unwrap_err().to_string();
        assert!(refused.contains("1b36:00f7") && refused.contains("15b3:101e"), "{refused}");
    }
}
