//! DEVICE_FEATURE: migration flags, states, sizes, INFOv2. DMA logging is in `logging`.

use vfio_migration::{DeviceError, DeviceState, MigratableDevice, MigrationFlags};

use super::negotiate::Offered;
use super::session::{Refusal, Session, errno_of};
use crate::codec::feature::{
    DMA_LOGGING_REPORT, DMA_LOGGING_START, DMA_LOGGING_STOP, DataSizeData, DeviceStateData,
    Feature, FeatureOp, FixedData, MIG_DATA_SIZE, MIG_DEVICE_STATE, MIG_PRECOPY_INFO_V2, MIGRATION,
    MigrationData,
};

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);
const ENOTTY: Refusal = Refusal::Errno(libc::ENOTTY);

impl Session<'_> {
    pub(super) fn feature(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        if let Some(answer) = self.broken_feature(payload) {
            return answer;
        }
        let (feature, data) = Feature::decode(payload)?;
        let offered = self.offered.ok_or(ENOTTY)?;
        let (get, set) = operations(feature.index, &offered)?;
        match feature.op {
            FeatureOp::Probe { get: g, set: s } => {
                if (g && !get) || (s && !set) || (feature.argsz as usize) < payload.len() {
                    return Err(EINVAL);
                }
                self.reply.extend_from_slice(payload);
                Ok(())
            }
            FeatureOp::Get if get => self.feature_get(&feature, data),
            FeatureOp::Set if set => {
                if (feature.argsz as usize) < payload.len() {
                    return Err(EINVAL);
                }
                match feature.index {
                    MIG_DEVICE_STATE => self.set_state(data, payload),
                    DMA_LOGGING_START => self.logging_start(&feature, data, payload),
                    DMA_LOGGING_STOP => self.logging_stop(payload),
                    _ => self.opt_in(payload),
                }
            }
            FeatureOp::Get | FeatureOp::Set => Err(EINVAL),
        }
    }

    fn feature_get(&mut self, feature: &Feature, data: &[u8]) -> Result<(), Refusal> {
        if feature.index == DMA_LOGGING_REPORT {
            return self.logging_report(feature, data);
        }
        // All three that are left have 8 bytes of data.
        let argsz = (Feature::SIZE + size_of::<u64>()) as u32;
        if feature.argsz < argsz {
            return Err(EINVAL);
        }
        let flags = self.flags();
        let migration = self.migration()?;
        let mut answer = Vec::with_capacity(size_of::<u64>());
        match feature.index {
            MIGRATION => MigrationData { flags: flags.as_raw() }.encode(&mut answer),
            MIG_DEVICE_STATE => {
                let device_state = migration.state()?.as_raw();
                DeviceStateData { device_state, data_fd: 0 }.encode(&mut answer);
            }
            _ => {
                let stop_copy_length = migration.stop_copy_length()?;
                DataSizeData { stop_copy_length }.encode(&mut answer);
            }
        }
        Feature { argsz, ..*feature }.encode(&mut self.reply);
        self.reply.extend_from_slice(&answer);
        Ok(())
    }

    pub(super) fn set_state(&mut self, data: &[u8], payload: &[u8]) -> Result<(), Refusal> {
        let wanted = DeviceStateData::decode(data)?.device_state;
        let refuse = match self.options.libvfio_user_compat {
            true => Refusal::Echo,
            false => Refusal::Errno,
        };
        // F4, F6, F7: what is not there, ERROR and unknown numbers are no targets.
        let flags = self.flags();
        let target = DeviceState::from_raw(wanted)
            .filter(|target| *target != DeviceState::Error && flags.has_state(*target))
            .ok_or_else(|| refuse(libc::EINVAL))?;
        let migration = self.migration()?;
        let before = migration.state();
        let result = migration.set_state(target);
        let session_goes_on =
            result.is_ok() && target.is_precopy() && before.is_ok_and(DeviceState::is_saving);
        // What was announced in a session ends with it.
        self.kept.reinit = self.kept.reinit && session_goes_on;
        result.map_err(|error: DeviceError| {
            tracing::info!(%error, %target, "vfio-user server: state change failed");
            refuse(errno_of(&error))
        })?;
        tracing::debug!(%target, "vfio-user server: state");
        self.reply.extend_from_slice(payload);
        Ok(())
    }

    /// SET MIG_PRECOPY_INFOv2; lasts as long as the connection (R8).
    fn opt_in(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        match self.migration()?.opt_in_precopy_info_v2() {
            // Not on offer again: its backend opted in when it opened the device.
            Ok(()) | Err(DeviceError::Unsupported { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.opted_in = true;
        self.kept.device_opted_in = true;
        self.reply.extend_from_slice(payload);
        Ok(())
    }

    /// The states the client is shown.
    pub(super) fn flags(&self) -> MigrationFlags {
        let offered = self.offered.as_ref();
        let (p2p, pre_copy) = offered.map_or((false, false), |it| (it.p2p, it.pre_copy));
        MigrationFlags::new(p2p, pre_copy)
    }

    /// The device's migration side, where it is offered.
    pub(super) fn migration(&mut self) -> Result<&mut dyn MigratableDevice, Refusal> {
        let migration = self.device.migration.as_mut().filter(|_| self.offered.is_some());
        migration.map(|migration| migration.as_mut() as &mut dyn MigratableDevice).ok_or(ENOTTY)
    }
}

/// Which of GET and SET a feature offers (D3, D5, D6).
fn operations(index: u16, offered: &Offered) -> Result<(bool, bool), Refusal> {
    match index {
        MIGRATION => Ok((true, false)),
        MIG_DEVICE_STATE => Ok((true, true)),
        DMA_LOGGING_START | DMA_LOGGING_STOP if offered.dma_logging => Ok((false, true)),
        DMA_LOGGING_REPORT if offered.dma_logging => Ok((true, false)),
        MIG_DATA_SIZE if offered.data_size => Ok((true, false)),
        MIG_PRECOPY_INFO_V2 if offered.reinit => Ok((false, true)),
        // R1: known, but not on a device without PRE_COPY.
        MIG_PRECOPY_INFO_V2 if !offered.pre_copy => Err(EINVAL),
        _ => Err(ENOTTY),
    }
}
