//! A resuming session: takes the stream apart as it comes.
//!
//! Bytes are checked record by record and go into the device at once; registers and configuration are
//! put in force by [`Loader::finish`], which RESUMING → STOP calls (X8, F14). Memory is one record, plus
//! what the device itself may have, plus one configuration while it arrives.

use super::LoadError;
use super::record::{self, HEADER_BYTES, Kind, PAYLOAD_MAX_BYTES, RecordHeader};
use super::registers;
use crate::blocks::{BlockSet, GROUP_BLOCKS};
use crate::internals::{Configuration, Geometry, Internals, Registers};
use crate::irq::Pending;

/// One resuming session.
#[derive(Clone, Debug)]
pub(crate) struct Loader {
    geometry: Geometry,
    /// The record that is arriving.
    partial: Vec<u8>,
    sequence: u64,
    arriving: Option<Arriving>,
    config: Option<Configuration>,
    received: BlockSet,
    registers: Option<(Registers, Pending)>,
    ended: bool,
    failed: Option<LoadError>,
}

#[derive(Clone, Debug)]
struct Arriving {
    generation: u32,
    size_bytes: u64,
    bytes: Vec<u8>,
}

impl Loader {
    pub(crate) fn begin(geometry: Geometry) -> Self {
        Self {
            geometry,
            partial: Vec::new(),
            sequence: 0,
            arriving: None,
            config: None,
            received: BlockSet::empty(geometry.blocks()),
            registers: None,
            ended: false,
            failed: None,
        }
    }

    /// A whole configuration has come.
    pub(crate) fn has_config(&self) -> bool {
        self.config.is_some()
    }

    /// Takes `data`. After the first error every call and [`finish`](Self::finish) fail with it.
    pub(crate) fn write(
        &mut self,
        mut data: &[u8],
        internals: &mut Internals,
    ) -> Result<(), LoadError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        while !data.is_empty() {
            if let Err(error) = self.take(&mut data, internals) {
                self.partial = Vec::new();
                self.arriving = None;
                self.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Validates the whole and puts it in force.
    pub(crate) fn finish(&self, internals: &mut Internals) -> Result<(), LoadError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let missing = if !self.partial.is_empty() {
            Some("it ends within a record")
        } else if !self.ended {
            Some("its end did not come")
        } else if self.arriving.is_some() {
            Some("a configuration did not come whole")
        } else if !self.received.is_full() {
            Some("parts of the bulk state did not come")
        } else {
            None
        };
        if let Some(missing) = missing {
            return Err(LoadError::Incomplete(missing));
        }
        let (Some(config), Some((regs, pending))) = (&self.config, self.registers) else {
            return Err(LoadError::Incomplete("configuration or registers did not come"));
        };
        internals.config = config.clone();
        internals.regs = regs;
        internals.pending = pending;
        Ok(())
    }

    /// Takes from the front of `data` what the record that is arriving lacks.
    fn take(&mut self, data: &mut &[u8], internals: &mut Internals) -> Result<(), LoadError> {
        if self.ended {
            return Err(self.invalid("data after the end".into()));
        }
        self.take_up_to(data, HEADER_BYTES);
        let Some(header) = self.partial.first_chunk::<HEADER_BYTES>() else { return Ok(()) };
        let header = record::decode(header, self.sequence)?;
        // At most one header and one payload: the claim was checked against the limit by `decode`.
        self.take_up_to(data, HEADER_BYTES + header.payload_len as usize);
        if self.partial.len() < HEADER_BYTES + header.payload_len as usize {
            return Ok(());
        }
        let record = std::mem::take(&mut self.partial);
        let (head, payload) = record.split_at(HEADER_BYTES);
        if record::checksum(&head[..28], payload) != header.checksum {
            return Err(LoadError::Checksum { sequence: self.sequence });
        }
        if header.sequence != self.sequence {
            let (expected, found) = (self.sequence, header.sequence);
            return Err(LoadError::Sequence { expected, found });
        }
        self.record(&header, payload, internals)?;
        self.sequence += 1;
        self.partial = record;
        self.partial.clear();
        Ok(())
    }

    fn take_up_to(&mut self, data: &mut &[u8], len: usize) {
        let lacking = len.saturating_sub(self.partial.len()).min(data.len());
        let (taken, rest) = data.split_at(lacking);
        self.partial.extend_from_slice(taken);
        *data = rest;
    }

    fn record(
        &mut self,
        header: &RecordHeader,
        payload: &[u8],
        internals: &mut Internals,
    ) -> Result<(), LoadError> {
        if (self.sequence == 0) != (header.kind == Kind::Header) {
            return Err(self.invalid("HEADER is the first record and only that".into()));
        }
        if self.registers.is_some() && header.kind != Kind::End {
            return Err(self.invalid("only END follows the registers".into()));
        }
        match header.kind {
            Kind::Header => record::check_geometry(header.value, payload, &self.geometry),
            Kind::Config => self.config(header.value, payload),
            Kind::ConfigData => self.config_data(header.value, payload),
            Kind::Bulk => self.bulk(header, payload, internals),
            Kind::Registers => {
                let decoded = registers::decode(payload, &self.geometry);
                self.registers = Some(decoded.map_err(|what| self.invalid(what))?);
                Ok(())
            }
            Kind::End if self.registers.is_none() => {
                Err(self.invalid("the end comes before the registers".into()))
            }
            Kind::End if header.value != self.sequence || !payload.is_empty() => {
                let what = format!("the end speaks of {} records before it", header.value);
                Err(self.invalid(what))
            }
            Kind::End => {
                self.ended = true;
                Ok(())
            }
        }
    }

    fn config(&mut self, size_bytes: u64, payload: &[u8]) -> Result<(), LoadError> {
        let Ok(generation) = <[u8; 4]>::try_from(payload) else {
            return Err(self.invalid("a configuration without generation".into()));
        };
        let max_bytes = u64::from(self.geometry.initial_max_kib) * 1024;
        if size_bytes > max_bytes || !size_bytes.is_multiple_of(1024) {
            let what = format!("a configuration of {size_bytes} bytes, at most {max_bytes}");
            return Err(self.invalid(what));
        }
        // The older one is void. Memory for the new one is taken as it arrives.
        self.config = None;
        let generation = u32::from_le_bytes(generation);
        self.arriving = Some(Arriving { generation, size_bytes, bytes: Vec::new() });
        self.config_whole();
        Ok(())
    }

    fn config_data(&mut self, offset: u64, payload: &[u8]) -> Result<(), LoadError> {
        let sequence = self.sequence;
        let invalid = |what: String| LoadError::Invalid { sequence, what };
        let Some(arriving) = &mut self.arriving else {
            return Err(invalid("configuration data without a configuration".into()));
        };
        let len = arriving.bytes.len() as u64;
        if offset != len || payload.is_empty() {
            return Err(invalid(format!("configuration data at {offset}, not at {len}")));
        }
        if len + payload.len() as u64 > arriving.size_bytes {
            return Err(invalid("configuration data beyond its size".into()));
        }
        // At most the device's own maximum, and once: growing by doubling would take more.
        if arriving.bytes.capacity() == 0 {
            let size = usize::try_from(arriving.size_bytes).unwrap_or(usize::MAX);
            if arriving.bytes.try_reserve_exact(size).is_err() {
                return Err(invalid(format!("no memory for a configuration of {size} bytes")));
            }
        }
        arriving.bytes.extend_from_slice(payload);
        self.config_whole();
        Ok(())
    }

    fn config_whole(&mut self) {
        let whole = |a: &Arriving| a.bytes.len() as u64 == a.size_bytes;
        if let Some(arriving) = self.arriving.take_if(|a| whole(a)) {
            self.config = Some(Configuration::stored(arriving.generation, arriving.bytes));
        }
    }

    fn bulk(
        &mut self,
        header: &RecordHeader,
        payload: &[u8],
        internals: &mut Internals,
    ) -> Result<(), LoadError> {
        let groups = self.geometry.blocks().div_ceil(GROUP_BLOCKS);
        if header.value >= groups || header.arg == 0 {
            return Err(self.invalid(format!("bulk group {} of {groups}", header.value)));
        }
        let mut rest = payload;
        for bit in (0..GROUP_BLOCKS).filter(|bit| header.arg >> bit & 1 != 0) {
            let block = header.value * GROUP_BLOCKS + bit;
            let len = self.geometry.block_len(block) as usize;
            let Some((bytes, behind)) = rest.split_at_checked(len).filter(|_| len > 0) else {
                return Err(self.invalid(format!("bulk block {block} is not whole")));
            };
            internals.bulk.store_block(block, bytes);
            self.received.insert_range(block, block + 1);
            rest = behind;
        }
        match rest.is_empty() {
            true => Ok(()),
            false => Err(self.invalid("bulk data behind the last block".into())),
        }
    }

    fn invalid(&self, what: String) -> LoadError {
        LoadError::Invalid { sequence: self.sequence, what }
    }
}

const _: () = assert!(PAYLOAD_MAX_BYTES as u64 == GROUP_BLOCKS * crate::blocks::BLOCK_BYTES);
