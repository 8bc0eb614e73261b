//! Writes whose answers are still to come.
//!
//! Their bytes are on the socket when [`write`](WriteBehind::write) returns, so nothing is kept of them but how many they are. A
//! failure is answered once, by whatever is asked next.

use std::collections::VecDeque;
use std::time::Duration;

use vfio_migration::{DeviceError, DeviceResult};

use super::connection::{Call, Request, Shared};
use super::slot::Sink;
use crate::codec::Command;
use crate::codec::migration::MigData;

const CALL: &str = "MIG_DATA_WRITE";

/// What was sent and not answered, or answered and not told.
#[derive(Debug, Default)]
pub(super) struct WriteBehind {
    under_way: VecDeque<(Call, usize)>,
    /// Bytes of those.
    bytes: usize,
    /// The session ended while some were under way.
    lost: bool,
}

impl WriteBehind {
    /// Bytes of which it is not known whether the device took them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sends all of `buf` in writes of `chunk_bytes`, with at most `depth` of them under way. After a failure it is not
    /// known what the device took: a later chunk may have been taken although an earlier one was refused.
    pub(super) fn write(
        &mut self,
        shared: &Shared,
        buf: &[u8],
        chunk_bytes: usize,
        depth: usize,
        timeout: Option<Duration>,
    ) -> DeviceResult<()> {
        self.check_lost()?;
        while self.under_way.front().is_some_and(|(call, _)| call.is_done()) {
            self.take_answer(shared)?;
        }
        for data in buf.chunks(chunk_bytes.clamp(1, u32::MAX as usize)) {
            while self.under_way.len() >= depth.max(1) {
                self.take_answer(shared)?;
            }
            let mut fixed = Vec::with_capacity(MigData::SIZE);
            MigData::new(data.len() as u32).encode(&mut fixed);
            let command = Command::MIG_DATA_WRITE;
            let request = Request { call: CALL, command, fixed: &fixed, data, fds: &[], timeout };
            match shared.start(request, Sink::Bytes) {
                Ok(call) => self.under_way.push_back((call, data.len())),
                Err(error) => return Err(self.fail(shared, error)),
            }
            self.bytes += data.len();
        }
        Ok(())
    }

    /// Waits for all answers.
    pub(super) fn settle(&mut self, shared: &Shared) -> DeviceResult<()> {
        self.check_lost()?;
        while !self.under_way.is_empty() {
            self.take_answer(shared)?;
        }
        Ok(())
    }

    /// The session is over: what was under way did not reach its end, which is still to be told.
    pub(super) fn abandon(&mut self) {
        self.lost |= !self.under_way.is_empty();
        self.under_way.clear();
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn check_lost(&mut self) -> DeviceResult<()> {
        if self.lost {
            self.clear();
            return Err(DeviceError::Errno { call: CALL, errno: libc::ENODEV });
        }
        Ok(())
    }

    fn take_answer(&mut self, shared: &Shared) -> DeviceResult<()> {
        let Some((mut call, bytes)) = self.under_way.pop_front() else { return Ok(()) };
        // It waited behind those before it.
        call.renew();
        match shared.finish(&call) {
            Ok(_) => {
                self.bytes -= bytes;
                Ok(())
            }
            Err(error) => Err(self.fail(shared, error)),
        }
    }

    /// One failed: the others are awaited, so that nothing is under way when it is told.
    fn fail(&mut self, shared: &Shared, error: DeviceError) -> DeviceError {
        let mut hangs = error.is_time_out();
        while !hangs && let Some((mut call, _)) = self.under_way.pop_front() {
            call.renew();
            hangs = shared.finish(&call).is_err_and(|error| error.is_time_out());
        }
        self.clear();
        error
    }
}
