//! DEVICE_FEATURE, what the device has, and its states.

use vfio_migration::{DeviceState, MigrationFlags, path};

use super::{Answer, Context, Shape, Stop, fail, not_applicable, skip, state_name};
use crate::errno::Errno;
use crate::subject::{FdAnswer, StreamId, feature};

impl Context {
    /// DEVICE_FEATURE as given; answers the payload as it is afterwards.
    pub fn feature(&mut self, argsz: u32, flags: u32, payload: &[u8]) -> Answer<Vec<u8>> {
        let mut payload = payload.to_vec();
        let name = format!("DEVICE_FEATURE(argsz {argsz}, flags {flags:#x})");
        let answer = self.call(&name, |subject| subject.feature(argsz, flags, &mut payload))?;
        Ok(answer.map(|()| payload))
    }

    /// GET or SET with the right argsz.
    pub fn feature_sized(&mut self, flags: u32, payload: &[u8]) -> Answer<Vec<u8>> {
        self.feature(feature::HEADER_BYTES + payload.len() as u32, flags, payload)
    }

    /// PROBE of `operations` of a feature.
    pub fn probe(&mut self, index: u32, operations: u32) -> Answer<Vec<u8>> {
        self.feature(feature::HEADER_BYTES, index | operations | feature::PROBE, &[])
    }

    /// GET of a u64.
    pub fn get_u64(&mut self, index: u32) -> Answer<u64> {
        let answer = self.feature_sized(index | feature::GET, &[0; 8])?;
        Ok(answer.map(|payload| {
            u64::from_ne_bytes(payload.get(..8).and_then(|b| b.try_into().ok()).unwrap_or_default())
        }))
    }

    /// The device's migration, asked once. Flags that are not a valid set are taken by their known bits.
    pub(crate) fn shape(&mut self) -> Result<Shape, Stop> {
        if let Some(shape) = &self.shape {
            return shape.clone();
        }
        let shape = self.ask_shape();
        self.shape = Some(shape.clone());
        shape
    }

    fn ask_shape(&mut self) -> Result<Shape, Stop> {
        let flags = match self.get_u64(feature::MIGRATION)? {
            Ok(flags) => flags,
            Err(Errno(libc::ENOTTY | libc::EINVAL)) => {
                return not_applicable("the device has no migration support");
            }
            Err(errno) => return skip(format!("GET MIGRATION failed: {errno} (rules D1, D3)")),
        };
        let has = |bit| flags & bit != 0;
        let flags = MigrationFlags::new(has(MigrationFlags::P2P), has(MigrationFlags::PRE_COPY));
        let data_size = self.probe(feature::MIG_DATA_SIZE, feature::GET)?.is_ok();
        let logging = self.probe(feature::DMA_LOGGING_START, feature::SET)?.is_ok();
        Ok(Shape { flags, data_size, logging })
    }

    /// The migration flags; not applicable without migration.
    pub fn flags(&mut self) -> Result<MigrationFlags, Stop> {
        Ok(self.shape()?.flags)
    }

    /// Every state of the device but ERROR.
    pub fn states(&mut self) -> Result<Vec<DeviceState>, Stop> {
        let flags = self.flags()?;
        let all = DeviceState::ALL.into_iter().filter(|state| *state != DeviceState::Error);
        Ok(all.filter(|state| flags.has_state(*state)).collect())
    }

    /// Not applicable to a device without PRE_COPY.
    pub fn need_precopy(&mut self) -> Result<(), Stop> {
        match self.flags()?.pre_copy() {
            true => Ok(()),
            false => not_applicable("the device has no PRE_COPY"),
        }
    }

    /// Not applicable to a device without P2P.
    pub fn need_p2p(&mut self) -> Result<(), Stop> {
        match self.flags()?.p2p() {
            true => Ok(()),
            false => not_applicable("the device has no P2P states"),
        }
    }

    /// SET MIG_DEVICE_STATE of a raw number. What data_fd held after a failure is kept.
    pub fn set_raw(&mut self, state: u32) -> Answer<FdAnswer> {
        let name = format!("SET {}", state_name(state));
        let mut fd = FdAnswer::None;
        let answer = self.call(&name, |subject| {
            let (result, answer) = subject.set_state(state);
            fd = answer;
            result
        });
        if let FdAnswer::Stream(stream) = fd {
            self.held.push(stream);
        }
        let answer = answer?;
        match (&answer, fd) {
            (Ok(()), FdAnswer::Stream(stream)) => self.stream = Some(stream),
            (Ok(()), FdAnswer::Absent) => self.stream = Some(StreamId::WIRE),
            _ => {}
        }
        self.failed_fd = answer.is_err().then_some(fd);
        Ok(answer.map(|()| fd))
    }

    /// SET of a state.
    pub fn set(&mut self, state: DeviceState) -> Answer<FdAnswer> {
        self.set_raw(state.as_raw())
    }

    /// What data_fd held after the last failed SET.
    pub fn failed_fd(&self) -> Option<FdAnswer> {
        self.failed_fd
    }

    /// GET MIG_DEVICE_STATE.
    pub fn state(&mut self) -> Result<u32, Stop> {
        Ok(self.state_and_fd()?.0)
    }

    /// GET MIG_DEVICE_STATE with data_fd.
    pub fn state_and_fd(&mut self) -> Result<(u32, FdAnswer), Stop> {
        match self.call("GET MIG_DEVICE_STATE", |subject| subject.get_state())? {
            Ok((state, fd)) => {
                if let FdAnswer::Stream(stream) = fd {
                    self.held.push(stream);
                }
                Ok((state, fd))
            }
            Err(errno) => fail("GET MIG_DEVICE_STATE succeeds in every state", errno.to_string()),
        }
    }

    /// Brings the device to `state` for what follows.
    pub fn go(&mut self, state: DeviceState) -> Result<(), Stop> {
        match self.set(state)? {
            Ok(_) => match self.state()? {
                at if at == state.as_raw() => Ok(()),
                at => {
                    let at = state_name(at);
                    skip(format!("SET {state} succeeded and the device is in {at} (rule F1)"))
                }
            },
            Err(_) if self.walk(state)? => Ok(()),
            Err(errno) => {
                let at = self.state().map_or_else(|_| "?".into(), state_name);
                skip(format!(
                    "the device did not go to {state}: {errno}, it is in {at} (rules F8, F9)"
                ))
            }
        }
    }

    /// Arc by arc, where a combination was refused (rule F8).
    fn walk(&mut self, state: DeviceState) -> Result<bool, Stop> {
        let flags = self.flags()?;
        let Some(from) = DeviceState::from_raw(self.state()?) else { return Ok(false) };
        for hop in path(from, state, flags).unwrap_or_default() {
            if self.set(hop)?.is_err() {
                return Ok(false);
            }
        }
        Ok(self.state()? == state.as_raw())
    }

    /// A SET that succeeded led to `state`; if only a moment later, that is another rule's.
    pub fn expect_reached(&mut self, state: DeviceState, after: &str) -> Result<(), Stop> {
        if self.state()? == state.as_raw() {
            return Ok(());
        }
        for _ in 0..20 {
            self.wait(50);
            if self.state()? == state.as_raw() {
                break;
            }
        }
        self.expect_state(state, after)?;
        skip(format!("{state} was reached after {after} returned (rule F1)"))
    }

    /// Brings the device to `state` from RUNNING, whichever state it is in.
    pub fn go_anew(&mut self, state: DeviceState) -> Result<(), Stop> {
        self.come_to_running()?;
        if state == DeviceState::Running { Ok(()) } else { self.go(state) }
    }

    /// The state must be `state`.
    pub fn expect_state(&mut self, state: DeviceState, after: &str) -> Result<(), Stop> {
        let at = self.state()?;
        if at == state.as_raw() {
            return Ok(());
        }
        fail(format!("{state} {after}"), state_name(at))
    }
}
