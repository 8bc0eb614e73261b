//! The data stream, precopy information and the state digest.
//!
//! **REINIT on the wire.** On a device it is an edge: whoever asks first sees it (R10). A reply may be
//! lost with its connection, so the server keeps the flag set in its replies until it knows that one
//! arrived: until the client reads data, or asks again with the REINIT flag in the *request*, which says
//! "I have seen it". Clients that do not know this send 0 there, see the flag a few times more, and
//! lose nothing by it. The flag outlives a connection and ends with the session.

use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{DeviceState, RawPrecopyInfo, ReadOutcome};

use super::session::{Refusal, Session};
use crate::codec::migration::{MigData, decode_precopy_info, encode_precopy_info};

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);
const ENOTTY: Refusal = Refusal::Errno(libc::ENOTTY);

impl Session<'_> {
    pub(super) fn data_read(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let request = MigData::decode_request(payload)?;
        let size = request.size as usize;
        if size > self.max_data_xfer_bytes {
            return Err(EINVAL);
        }
        if let Some(answer) = self.broken_read(size) {
            return answer;
        }
        self.check_compat_state(DeviceState::is_saving)?;
        // The buffer is kept and never shrinks: only the first time are its bytes zeroed.
        let mut buffer = std::mem::take(&mut self.kept.read_buffer);
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let result = self.read_into(buffer.get_mut(..size).unwrap_or_default());
        self.kept.read_buffer = buffer;
        let got = result?;
        self.kept.reinit = false;
        self.note_read(got);
        MigData::new(got as u32).encode(&mut self.reply);
        self.reply_data_bytes = if self.options.libvfio_user_compat { size } else { got };
        Ok(())
    }

    /// Reads from the device; answers how much, 0 for nothing now and for the end.
    pub(super) fn read_into(&mut self, buf: &mut [u8]) -> Result<usize, Refusal> {
        // Nothing was asked for, and the device would not know what to say of it.
        if buf.is_empty() {
            return Ok(0);
        }
        let got = match self.migration()?.read(buf)? {
            ReadOutcome::Data(got) => got,
            ReadOutcome::NothingNow | ReadOutcome::End => 0,
        };
        let size = buf.len();
        let Some(padding) = buf.get_mut(got..) else {
            tracing::error!(got, size, "vfio-user server: the device read beyond the buffer");
            return Err(Refusal::Errno(libc::EIO));
        };
        if self.options.libvfio_user_compat {
            padding.fill(0);
        }
        Ok(got)
    }

    pub(super) fn data_write(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let (request, mut data) = MigData::decode_with_data(payload)?;
        if request.size as usize > self.max_data_xfer_bytes {
            return Err(EINVAL);
        }
        if let Some(answer) = self.broken_write(data) {
            return answer;
        }
        self.check_compat_state(|state| state == DeviceState::Resuming)?;
        let partly_is_error = self.options.libvfio_user_compat;
        while !data.is_empty() {
            let taken = self.migration()?.write(data)?;
            if taken == 0 || taken > data.len() {
                tracing::error!(taken, of = data.len(), "vfio-user server: impossible write");
                return Err(Refusal::Errno(libc::EIO));
            }
            data = data.get(taken..).unwrap_or_default();
            if partly_is_error && !data.is_empty() {
                return Err(EINVAL);
            }
        }
        Ok(())
    }

    /// libvfio-user says EINVAL to data commands in a wrong state; otherwise the device says what it will.
    fn check_compat_state(&mut self, valid: impl Fn(DeviceState) -> bool) -> Result<(), Refusal> {
        if !self.options.libvfio_user_compat {
            return Ok(());
        }
        if valid(self.migration()?.state()?) { Ok(()) } else { Err(EINVAL) }
    }

    pub(super) fn precopy_info(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        if !self.offered.is_some_and(|offered| offered.precopy_info) {
            return Err(EINVAL);
        }
        let request = match self.breaks("P3") {
            false => decode_precopy_info(payload)?,
            true => self.decode_any_argsz(payload)?,
        };
        // P2, whatever the device does with it.
        if !self.migration()?.state()?.is_precopy() {
            return Err(EINVAL);
        }
        // The acknowledgement is between client and server; flags are the device's to give (R2).
        let acknowledged = self.opted_in && request.flags & PRECOPY_INFO_REINIT != 0;
        let own = if acknowledged { PRECOPY_INFO_REINIT } else { 0 };
        let for_device = RawPrecopyInfo { flags: request.flags & !own, ..request };
        let answer = self.migration()?.precopy_info_raw(for_device)?;
        // Without the opt-in a device may give the caller's flags back (P6), which is no news.
        let news = self.kept.device_opted_in || for_device.flags & PRECOPY_INFO_REINIT == 0;
        let fresh = news && answer.flags & PRECOPY_INFO_REINIT != 0;
        self.kept.reinit = fresh || (self.kept.reinit && !acknowledged);
        let flags = match (self.opted_in, self.kept.device_opted_in) {
            (false, _) if self.breaks("R3") => answer.flags,
            (true, _) if self.breaks("R2") => answer.flags | request.flags,
            (true, _) if self.kept.reinit => PRECOPY_INFO_REINIT,
            (true, _) | (false, true) => 0,
            // R3: no REINIT before the opt-in, but what the caller sent may come back.
            (false, false) if !fresh => answer.flags,
            (false, false) => answer.flags & !PRECOPY_INFO_REINIT,
        };
        let answer = RawPrecopyInfo { argsz: request.argsz, flags, ..answer };
        encode_precopy_info(&answer, &mut self.reply);
        Ok(())
    }

    fn decode_any_argsz(&self, payload: &[u8]) -> Result<RawPrecopyInfo, Refusal> {
        let mut payload = payload.to_vec();
        if let Some(argsz) = payload.get_mut(..4) {
            argsz.copy_from_slice(&RawPrecopyInfo::SIZE.to_ne_bytes());
        }
        Ok(decode_precopy_info(&payload)?)
    }

    pub(super) fn state_digest(&mut self) -> Result<(), Refusal> {
        if !self.options.state_digest || self.options.libvfio_user_compat {
            return Err(EINVAL);
        }
        let digest = self.migration()?.state_digest()?.ok_or(ENOTTY)?;
        self.reply.extend_from_slice(&digest);
        Ok(())
    }
}
