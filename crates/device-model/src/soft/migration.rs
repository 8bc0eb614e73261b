//! The device as a [`MigratableDevice`].

use std::sync::Arc;

use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    PrecopyInfo, RawPrecopyInfo, ReadOutcome,
};

use super::{Device, Shared, pass};
use crate::core::{DeviceCore, Hop, RawRead, Session, towards};

/// Most bytes of one read; more would only make the caller wait.
const READ_MAX_BYTES: usize = 1 << 20;
/// Bytes written under one hold of the lock.
const WRITE_HOLD_BYTES: usize = 64 << 10;
/// Shorter times are added up before they are slept, because a sleep is never exact.
const SLEEP_MIN_NS: u64 = 500_000;

/// The migration side of a software device. One thread owns it at a time.
#[derive(Debug)]
pub struct SoftMigration {
    device: Arc<Device>,
    session: Option<Session>,
    owed_ns: u64,
}

impl SoftMigration {
    pub(super) fn new(device: Arc<Device>) -> Self {
        Self { device, session: None, owed_ns: 0 }
    }

    fn shared(&self) -> &Shared {
        &self.device.shared
    }

    fn with_core<T>(&self, access: impl FnOnce(&mut DeviceCore) -> T) -> T {
        self.shared().with_inner(|inner| access(&mut inner.core))
    }

    fn session(&self, call: &'static str) -> DeviceResult<Session> {
        self.session.ok_or(DeviceError::Errno { call, errno: libc::EINVAL })
    }

    /// Lets `ns` of streaming pass, in pieces that are worth a sleep.
    fn pass_streaming(&mut self, ns: u64) {
        self.owed_ns = self.owed_ns.saturating_add(ns);
        if self.owed_ns >= SLEEP_MIN_NS {
            pass(std::mem::take(&mut self.owed_ns));
        }
    }

    /// Takes the arcs to `target` one by one; the device goes on working while each takes its time.
    fn walk(&mut self, target: DeviceState) -> DeviceResult<Option<Session>> {
        let mut begun = None;
        self.with_core(|core| core.begin_set(target))?;
        while let Some(hop) = self.with_core(|core| core.next_hop(target))? {
            pass(hop.took_ns);
            let session = self.take(hop).map_err(|error| towards(target, error))?;
            begun = session.or(begun);
        }
        Ok(begun)
    }

    fn take(&self, hop: Hop) -> DeviceResult<Option<Session>> {
        let shared = self.shared();
        shared.with_quiet_inner(|inner| inner.core.take_hop(hop, shared.now_ns()))
    }
}

impl MigratableDevice for SoftMigration {
    fn capabilities(&self) -> DeviceCapabilities {
        self.with_core(|core| DeviceCapabilities {
            precopy_info_v2: core.offers_precopy_info_v2(),
            ..core.capabilities()
        })
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        Ok(self.with_core(|core| core.state()))
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        let result = self.walk(target);
        let live = self.with_core(|core| core.session());
        match result {
            Ok(begun) => {
                // A session ends with the arc that ends it; moves inside the saving group keep it (X2).
                self.session = begun.or(self.session).filter(|session| Some(*session) == live);
                self.owed_ns = 0;
                Ok(())
            }
            Err(error) => {
                // Possibly dead, so dropped (X10).
                self.session = None;
                Err(error)
            }
        }
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        let now_ns = self.shared().now_ns();
        self.with_core(|core| core.precopy_info(now_ns))
    }

    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        self.with_core(|core| core.opt_in_precopy_info_v2())
    }

    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        let now_ns = self.shared().now_ns();
        self.with_core(|core| core.precopy_info_raw(request, now_ns))
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        self.with_core(|core| core.stop_copy_length())
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        let session = self.session("read")?;
        let limit = buf.len().min(READ_MAX_BYTES);
        let mut got = 0;
        while got < limit {
            let now_ns = self.shared().now_ns();
            let room = &mut buf[got..limit];
            let (read, state, short) = {
                let mut inner = self.shared().lock();
                let read = inner.core.read(session, room, now_ns);
                (read, inner.core.state(), inner.core.quirks().short_reads.is_some())
            };
            match read {
                Ok(RawRead::Data(len)) => got += len,
                Ok(RawRead::NoMessage) if got == 0 => return Ok(ReadOutcome::NothingNow),
                Ok(RawRead::Zero) if got == 0 && state.is_precopy() => {
                    return Ok(ReadOutcome::NothingNow);
                }
                Ok(RawRead::Zero) if got == 0 => return Ok(ReadOutcome::End),
                Ok(RawRead::NoMessage | RawRead::Zero) => break,
                Err(error) if got == 0 => return Err(error),
                // What was read is the caller's; the error comes with the next read.
                Err(_) => break,
            }
            if short {
                break;
            }
        }
        let took_ns = self.with_core(|core| core.read_ns(got as u64));
        self.pass_streaming(took_ns);
        Ok(ReadOutcome::Data(got))
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        let session = self.session("write")?;
        for part in buf.chunks(WRITE_HOLD_BYTES) {
            let written = self.with_core(|core| core.write(session, part))?;
            self.pass_streaming(written.took_ns);
        }
        Ok(buf.len())
    }

    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        self.with_core(|core| core.start_dma_logging(ranges, page_size))
    }

    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        self.with_core(|core| core.report_dma_log(range, page_size, bitmap))
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        self.with_core(|core| core.stop_dma_logging())
    }

    fn reset(&mut self) -> DeviceResult<()> {
        self.shared().reset()?;
        let live = self.with_core(|core| core.session());
        self.session = self.session.filter(|session| Some(*session) == live);
        Ok(())
    }

    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        Ok(Some(self.with_core(|core| core.digest())))
    }
}
