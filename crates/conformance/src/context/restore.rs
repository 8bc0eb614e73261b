//! The way to RUNNING: before the first rule, and after each.

use std::time::Duration;

use vfio_migration::DeviceState;

use super::{Context, Stop, show, skip, state_name, why};
use crate::stream::{self, Written};

impl Context {
    fn close_streams(&mut self) {
        for stream in std::mem::take(&mut self.held) {
            self.subject.close(stream);
        }
        self.stream = None;
    }

    /// A device in RUNNING, reset if that leads there.
    pub(super) fn come_to_running(&mut self) -> Result<(), Stop> {
        let running = DeviceState::Running.as_raw();
        self.close_streams();
        let reset = self.reset()?;
        let mut at = self.state()?;
        if at == DeviceState::Resuming.as_raw() && self.way_out.is_some() {
            self.leave_resuming()?;
            at = self.state()?;
        }
        if at != running {
            // A reset that keeps the migration state (libvfio-user) is rule H5's; SET helps there.
            if self.set_raw(running)?.is_err() {
                // A device that failed to load is left by a reset alone.
                let _ = self.reset()?;
            }
            at = self.state()?;
        }
        if at == running {
            return Ok(());
        }
        let (reset, at) = (show(&reset), state_name(at));
        skip(format!("the device does not come back to RUNNING: reset: {reset}, it is in {at}"))
    }

    /// Skips where a reset does not lead out of a failed load.
    pub fn need_reset(&mut self) -> Result<(), Stop> {
        match self.way_out {
            None => Ok(()),
            Some(_) => {
                skip("a reset does not lead to RUNNING, so that a failed load would stay (rule H5)")
            }
        }
    }

    /// Loads a whole state, where neither SET nor reset leads out of RESUMING.
    fn leave_resuming(&mut self) -> Result<(), Stop> {
        let Some(mut saved) = self.way_out.take() else { return Ok(()) };
        let written = stream::write(self, &mut saved, u64::MAX, |_| usize::MAX);
        self.way_out = Some(saved);
        if written? == Written::All {
            let _ = self.set(DeviceState::Running)?;
        }
        Ok(())
    }

    /// Before the first rule: asks what the device is, and sees to it that RESUMING can be left.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub fn prepare(&mut self, limit: Duration) -> Result<(), String> {
        self.begin(limit);
        let prepared = self.try_prepare();
        let restored = self.restore(limit);
        match prepared {
            Ok(()) | Err(Stop::NotApplicable(_) | Stop::Skipped(_)) => restored,
            // What is wrong is found again by a rule, unless the device is gone.
            Err(Stop::Fail { .. }) => restored,
        }
    }

    /// The state in which the device was found before anything was done to it.
    pub fn opened_in(&self) -> Option<u32> {
        self.opened_in
    }

    fn try_prepare(&mut self) -> Result<(), Stop> {
        self.flags()?;
        self.opened_in = Some(self.state()?);
        self.come_to_running()?;
        self.go(DeviceState::Stop)?;
        let _ = self.reset()?;
        if self.state()? == DeviceState::Running.as_raw() {
            return Ok(());
        }
        self.come_to_running()?;
        self.way_out = Some(stream::save(self)?);
        Ok(())
    }

    /// Undoes what a rule did: streams closed, logging off, device in RUNNING. Takes up to twice `limit`.
    ///
    /// # Errors
    /// Why the device is not usable.
    pub fn restore(&mut self, limit: Duration) -> Result<(), String> {
        self.failed_fd = None;
        self.begin(limit);
        let first = match self.try_restore() {
            Ok(()) => {
                // Some servers take memory away from a running device only.
                if let Some(mut guest) = self.guest.take() {
                    guest.leave();
                }
                return Ok(());
            }
            Err(stop) => why(stop),
        };
        // The connection may be out of step, or gone: a new one tells whether the device is.
        self.begin(limit);
        match self.reopen().and_then(|()| self.try_restore()) {
            Ok(()) => Ok(()),
            Err(stop) if why(stop.clone()) == first => Err(first),
            Err(stop) => Err(format!("{first}; opened again: {}", why(stop))),
        }
    }

    fn try_restore(&mut self) -> Result<(), Stop> {
        if self.logging && self.log_stop()?.is_err() {
            // It ends with the handle.
            self.reopen()?;
        }
        match &self.shape {
            // Without migration there are no states.
            Some(Err(Stop::NotApplicable(_))) => self.reset().map(drop),
            _ => self.come_to_running(),
        }
    }
}
