//! The worker thread: what the device does without being asked.

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Inner, Shared};
use crate::core::DeferredWrite;
use crate::error::ModelError;

/// Stamps under one hold of the lock.
const STAMPS_PER_HOLD: u64 = 256;
/// Background DMA is done in batches no closer than this.
const BATCH: Duration = Duration::from_millis(1);

/// Ends its thread when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self, ModelError> {
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("soft-device".into())
            .spawn(move || run(&for_thread))
            .map_err(|source| ModelError::Os { what: "starting a device's thread", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        // The last handle may be dropped by a call of the worker's own.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut inner = shared.lock();
    while !inner.ending {
        if let Some(write) = inner.core.deferred() {
            let access = inner.memory.calls(write.iova, write.data.len());
            drop(inner);
            let DeferredWrite { iova, data } = write;
            // Unmapped meanwhile is as failed as a failed call.
            let written = access.is_some_and(|access| match access.dma_write(iova, &data) {
                Ok(()) => true,
                Err(error) => {
                    tracing::debug!(%error, iova, "DMA write by call");
                    false
                }
            });
            inner = shared.lock();
            inner.core.complete_deferred(written);
            inner.settle_interrupts();
            shared.settled.notify_all();
            continue;
        }
        let now_ns = shared.now_ns();
        let due_ns = if inner.quiescing == 0 { inner.core.next_due_ns(now_ns) } else { None };
        inner = match due_ns {
            Some(due_ns) if due_ns <= now_ns => {
                let Inner { core, memory, .. } = &mut *inner;
                core.advance(now_ns, STAMPS_PER_HOLD, memory);
                inner.settle_interrupts();
                // Others may have the lock in between.
                drop(inner);
                std::thread::yield_now();
                shared.lock()
            }
            Some(due_ns) => {
                let wait = Duration::from_nanos(due_ns - now_ns).max(BATCH);
                let waited = shared.changed.wait_timeout(inner, wait);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
        };
    }
}
