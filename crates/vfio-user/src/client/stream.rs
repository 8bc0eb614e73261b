//! The data stream: reads in chunks, a few of them under way at once.
//!
//! The server answers in order, so a region access waits behind the chunks that were asked for before
//! it. While the guest may run (PRE_COPY) the chunks are kept so small that this takes less than about
//! a millisecond, by the rate measured so far; in STOP_COPY nobody waits and they are as large as
//! negotiated.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration::{DeviceError, DeviceResult};

use super::connection::{Call, Request, Shared, broke};
use super::slot::{Outcome, ReadLoan, ReadTarget, Sink};
use crate::codec::Command;
use crate::codec::migration::MigData;

const READ: &str = "MIG_DATA_READ";

/// Chunks under way at once with a server of our own.
pub(super) const PIPELINE_DEPTH: usize = 2;

/// What all chunks under way may take together while the guest runs.
const BEHIND_READS_MAX: Duration = Duration::from_micros(800);

/// Smallest chunk while the guest runs, and the first one before anything is measured, in bytes.
const CHUNK_BYTES_MIN: usize = 16 << 10;
const CHUNK_BYTES_FIRST: usize = 64 << 10;

/// Reads shorter than this say more of the round trip than of the rate.
const MEASURED_BYTES_MIN: usize = 8 << 10;

/// The chunk size while the guest runs, from the measured rate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    ns_per_byte: Option<f64>,
}

impl Pace {
    /// Bytes of a chunk, at most `limit_bytes`, if `depth` of them are under way.
    pub(super) fn chunk_bytes(&self, limit_bytes: usize, depth: usize) -> usize {
        let wanted = match self.ns_per_byte {
            None => CHUNK_BYTES_FIRST,
            Some(rate) => {
                let each_ns = BEHIND_READS_MAX.as_nanos() as f64 / depth.max(1) as f64;
                // A float that is too large saturates.
                (each_ns / rate.max(f64::MIN_POSITIVE)) as usize
            }
        };
        wanted.max(CHUNK_BYTES_MIN).min(limit_bytes).max(1)
    }

    /// Takes a measurement: `bytes` came in `took`.
    pub(super) fn record(&mut self, bytes: usize, took: Duration) {
        if bytes < MEASURED_BYTES_MIN {
            return;
        }
        let rate = took.as_nanos() as f64 / bytes as f64;
        self.ns_per_byte = Some(self.ns_per_byte.map_or(rate, |old| old + (rate - old) / 4.0));
    }
}

/// What a series of reads found.
#[derive(Debug)]
pub(super) struct ReadResult {
    /// Bytes now in the buffer.
    pub(super) filled: usize,
    /// The first failure after them.
    pub(super) error: Option<DeviceError>,
}

/// Fills `buf` from the stream with reads of `chunk_bytes`, up to the first short one.
pub(super) fn read(
    shared: &Shared,
    buf: &mut [u8],
    chunk_bytes: usize,
    depth: usize,
    timeout: Option<Duration>,
) -> ReadResult {
    let len = buf.len();
    let loan = ReadLoan::new(buf);
    let mut under_way: VecDeque<(Call, usize)> = VecDeque::with_capacity(depth);
    let mut asked = 0;
    let mut more = true;
    let mut error = None;
    loop {
        while more && asked < len && under_way.len() < depth {
            let size = chunk_bytes.min(len - asked);
            match ask(shared, loan.target(), size, timeout) {
                Ok(started) => under_way.push_back((started, size)),
                Err(failed) => {
                    error.get_or_insert(failed);
                    more = false;
                }
            }
            asked += size;
        }
        let Some((started, size)) = under_way.pop_front() else { break };
        match answered(shared, &started) {
            Ok(got) => more &= got == size,
            Err(failed) => {
                error.get_or_insert(failed);
                more = false;
            }
        }
    }
    ReadResult { filled: loan.end(), error }
}

/// Asks for the next `size` bytes.
pub(super) fn ask(
    shared: &Shared,
    target: Arc<ReadTarget>,
    size: usize,
    timeout: Option<Duration>,
) -> DeviceResult<Call> {
    let requested = size.min(u32::MAX as usize) as u32;
    let mut fixed = Vec::with_capacity(MigData::SIZE);
    MigData::new(requested).encode(&mut fixed);
    let (call, command) = (READ, Command::MIG_DATA_READ);
    let request = Request { call, command, fixed: &fixed, data: &[], fds: &[], timeout };
    shared.start(request, Sink::Stream { target, requested })
}

/// How many of them came.
pub(super) fn answered(shared: &Shared, call: &Call) -> DeviceResult<usize> {
    match shared.finish(call)? {
        Outcome::Data(got) => Ok(got as usize),
        other => Err(broke(READ, format!("{other:?} instead of data"))),
    }
}

/// Runs `work` and says how long it took.
pub(super) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_follow_the_rate_within_their_limits() {
        let limit = 1 << 20;
        let mut pace = Pace::default();
        assert_eq!(pace.chunk_bytes(limit, 2), CHUNK_BYTES_FIRST);
        assert_eq!(pace.chunk_bytes(1000, 2), 1000, "never above what was negotiated");
        // 1 ns per byte: 400 us each hold 400,000 bytes.
        pace.record(1 << 20, Duration::from_nanos(1 << 20));
        assert_eq!(pace.chunk_bytes(limit, 2), 400_000);
        pace.record(100, Duration::from_secs(1));
        assert_eq!(pace.chunk_bytes(limit, 2), 400_000, "short reads do not count");
        for _ in 0..100 {
            pace.record(1 << 20, Duration::from_secs(10));
        }
        assert_eq!(pace.chunk_bytes(limit, 2), CHUNK_BYTES_MIN);
        for _ in 0..100 {
            pace.record(1 << 20, Duration::ZERO);
        }
        assert_eq!(pace.chunk_bytes(limit, 2), limit);
    }
}
