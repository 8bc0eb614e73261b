//! The order of a guest's reset and the failures it causes.
//!
//! A reset by the guest ends the device's migration session while the engine may be reading it. The
//! engine must hear of the reset before it sees its own call fail, or it would take the one for a fault of
//! the device. So a failed call waits at a fence while a reset is under way:
//!
//! ```text
//!   vCPU     begin ── reset_function ── GuestEvent::DeviceReset ── end
//!   engine            read ── fails ──────────(waits)──────────── error
//! ```

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use vfio_migration::{
    DeviceCapabilities, DeviceResult, DeviceState, DmaRange, MigratableDevice, PrecopyInfo,
    RawPrecopyInfo, ReadOutcome,
};

/// A reset that takes longer has a problem of its own, which the failed call then tells of.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Knows whether a reset by the guest is under way.
#[derive(Debug, Default)]
pub struct ResetFence {
    resets: Mutex<u32>,
    over: Condvar,
}

impl ResetFence {
    /// A reset begins; it ends, with everybody told, when the answer is dropped.
    pub fn begin(&self) -> UnderWay<'_> {
        *self.resets.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        UnderWay(self)
    }

    fn wait(&self) {
        let resets = self.resets.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.over.wait_timeout_while(resets, WAIT_MAX, |resets| *resets > 0);
    }
}

/// A reset under way.
#[derive(Debug)]
pub struct UnderWay<'a>(&'a ResetFence);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        *self.0.resets.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.over.notify_all();
    }
}

/// A device whose failures come after the events of the resets that caused them.
#[derive(Debug)]
pub struct Fenced<D> {
    device: D,
    fence: Arc<ResetFence>,
}

impl<D: MigratableDevice> Fenced<D> {
    /// Puts `device` behind `fence`.
    pub fn new(device: D, fence: Arc<ResetFence>) -> Self {
        Self { device, fence }
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut D) -> DeviceResult<T>) -> DeviceResult<T> {
        let result = call(&mut self.device);
        if result.is_err() {
            self.fence.wait();
        }
        result
    }
}

impl<D: MigratableDevice> MigratableDevice for Fenced<D> {
    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
    fn state(&mut self) -> DeviceResult<DeviceState> {
        self.call(|device| device.state())
    }
    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        self.call(|device| device.set_state(target))
    }
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        self.call(|device| device.precopy_info())
    }
    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        self.call(|device| device.opt_in_precopy_info_v2())
    }
    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        self.call(|device| device.precopy_info_raw(request))
    }
    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        self.call(|device| device.stop_copy_length())
    }
    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        self.call(|device| device.read(buf))
    }
    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.call(|device| device.write(buf))
    }
    fn read_ahead(&mut self, buf: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
        self.call(|device| device.read_ahead(buf))
    }
    fn write_behind(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.call(|device| device.write_behind(buf))
    }
    fn unsettled_bytes(&self) -> u64 {
        self.device.unsettled_bytes()
    }
    fn settle(&mut self) -> DeviceResult<()> {
        self.call(|device| device.settle())
    }
    fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.data_fd()
    }
    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        self.call(|device| device.start_dma_logging(ranges, page_size))
    }
    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        self.call(|device| device.report_dma_log(range, page_size, bitmap))
    }
    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        self.call(|device| device.stop_dma_logging())
    }
    fn reset(&mut self) -> DeviceResult<()> {
        self.call(|device| device.reset())
    }
    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        self.call(|device| device.state_digest())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use vfio_migration::{DeviceError, MigrationFlags};

    use super::*;

    /// Fails every read.
    struct Dead;

    impl MigratableDevice for Dead {
        fn capabilities(&self) -> DeviceCapabilities {
            DeviceCapabilities {
                flags: MigrationFlags::new(false, true),
                precopy_info: false,
                precopy_info_v2: false,
                data_size: false,
                dma_logging: false,
                reset_runs: true,
                max_write_bytes: None,
            }
        }
        fn state(&mut self) -> DeviceResult<DeviceState> {
            Ok(DeviceState::Running)
        }
        fn set_state(&mut self, _: DeviceState) -> DeviceResult<()> {
            Ok(())
        }
        fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
            Err(DeviceError::Errno { call: "PRECOPY_INFO", errno: libc::EINVAL })
        }
        fn stop_copy_length(&mut self) -> DeviceResult<u64> {
            Ok(0)
        }
        fn read(&mut self, _: &mut [u8]) -> DeviceResult<ReadOutcome> {
            Err(DeviceError::Errno { call: "read", errno: libc::ENODEV })
        }
        fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
            Ok(buf.len())
        }
        fn reset(&mut self) -> DeviceResult<()> {
            Ok(())
        }
    }

    #[test]
    fn x9_a_failed_call_is_seen_after_the_reset_was_told() {
        let fence = Arc::new(ResetFence::default());
        let mut device = Fenced::new(Dead, Arc::clone(&fence));
        assert!(device.read(&mut [0; 8]).is_err(), "without a reset nothing waits");
        let told = AtomicBool::new(false);
        let reset = fence.begin();
        std::thread::scope(|scope| {
            let (started, wait) = mpsc::channel();
            let (device, told) = (&mut device, &told);
            let reader = scope.spawn(move || {
                assert_eq!(device.state().unwrap(), DeviceState::Running, "success does not wait");
                started.send(()).unwrap();
                let failed = device.read(&mut [0; 8]).is_err();
                (failed, told.load(Ordering::SeqCst))
            });
            wait.recv().unwrap();
            std::thread::sleep(Duration::from_millis(5));
            told.store(true, Ordering::SeqCst);
            drop(reset);
            assert_eq!(reader.join().unwrap(), (true, true));
        });
    }
}
