//! Guest memory as the device reaches it where it cannot map it: by messages to the client, or by
//! reading and writing a file.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{DeviceError, DeviceResult, DmaAccess};

use super::link::Link;
use crate::codec::Command;
use crate::codec::dma::DmaTransfer;

/// DMA_READ and DMA_WRITE to the client. Dead once the connection is.
pub(super) struct ClientMemory {
    pub(super) link: Arc<Link>,
    pub(super) chunk_bytes: usize,
    pub(super) timeout: Duration,
}

impl ClientMemory {
    fn transfer<T>(
        &self,
        command: Command,
        transfer: DmaTransfer,
        data: &[u8],
        take: impl FnOnce(&[u8]) -> DeviceResult<T>,
    ) -> DeviceResult<T> {
        let mut fixed = Vec::with_capacity(DmaTransfer::SIZE);
        transfer.encode(&mut fixed);
        self.link.request(command, &fixed, data, self.timeout, |payload| {
            let answer = DmaTransfer::decode(payload)
                .ok()
                .filter(|answer| *answer == transfer)
                .ok_or_else(|| broke(command.name(), "the reply is to another transfer"));
            answer.and_then(|_| take(payload.get(DmaTransfer::SIZE..).unwrap_or_default()))
        })
    }
}

impl DmaAccess for ClientMemory {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()> {
        let mut address = iova;
        for part in data.chunks_mut(self.chunk_bytes.max(1)) {
            let count = part.len() as u64;
            let transfer = DmaTransfer { address, count };
            self.transfer(Command::DMA_READ, transfer, &[], |bytes| {
                let bytes = bytes
                    .get(..part.len())
                    .ok_or_else(|| broke("DMA_READ", "the reply has less data than asked for"))?;
                part.copy_from_slice(bytes);
                Ok(())
            })?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()> {
        let mut address = iova;
        for part in data.chunks(self.chunk_bytes.max(1)) {
            let count = part.len() as u64;
            self.transfer(Command::DMA_WRITE, DmaTransfer { address, count }, part, |_| Ok(()))?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }
}

/// Reads and writes a file, for mappings whose client asks for file I/O.
pub(super) struct FileMemory {
    file: File,
    /// Where the mapping starts in the file.
    offset: u64,
    iova: u64,
    size: u64,
}

impl FileMemory {
    pub(super) fn new(fd: OwnedFd, offset: u64, iova: u64, size: u64) -> Self {
        Self { file: File::from(fd), offset, iova, size }
    }

    fn place(&self, call: &'static str, iova: u64, len: usize) -> DeviceResult<u64> {
        let fault = DeviceError::Errno { call, errno: libc::EFAULT };
        let Some(inside) = iova.checked_sub(self.iova) else { return Err(fault) };
        let end = inside.checked_add(len as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(fault);
        }
        self.offset.checked_add(inside).ok_or(fault)
    }
}

impl DmaAccess for FileMemory {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()> {
        let call = "read of guest memory";
        let place = self.place(call, iova, data.len())?;
        self.file.read_exact_at(data, place).map_err(|source| DeviceError::Io { call, source })
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()> {
        let call = "write of guest memory";
        let place = self.place(call, iova, data.len())?;
        self.file.write_all_at(data, place).map_err(|source| DeviceError::Io { call, source })
    }
}

fn broke(call: &'static str, what: &str) -> DeviceError {
    DeviceError::Protocol { call, what: what.into() }
}
