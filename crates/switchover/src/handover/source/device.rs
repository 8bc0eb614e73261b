//! What the source's machine knows of one device.

use crate::handover::{DeviceCall, DeviceState, DeviceTraits};
use crate::message::Session;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Device {
    pub(super) traits: DeviceTraits,
    pub(super) state: DeviceState,
    pub(super) pending: Option<DeviceCall>,
    pub(super) session: Session,
    /// InitialDataSent of `session` went out.
    pub(super) sent: bool,
    /// SwitchoverAck of `session` came.
    pub(super) acked: bool,
    /// Known unread initial data.
    pub(super) unread: bool,
    /// The last question had no useful answer.
    pub(super) unknown: bool,
    /// Asked since the last pause or move.
    pub(super) asked: bool,
    /// The question under way was asked before the last pause or move: its answer does not settle it.
    pub(super) stale_question: bool,
    /// STOP_COPY was read to its end.
    pub(super) ended: bool,
    /// Its session died under us (guest reset): begin anew once the guest runs.
    pub(super) restart: bool,
    /// Reset while a call was out: where that call left it is not known.
    pub(super) reset_meanwhile: bool,
    /// Not to be called any more.
    pub(super) lost: bool,
}

impl Device {
    pub(super) fn has_session(&self) -> bool {
        self.traits.pre_copy && !self.lost
    }

    pub(super) fn ready(&self) -> bool {
        !self.has_session() || (self.sent && self.acked && !self.unread && !self.restart)
    }

    pub(super) fn p2p_state(&self) -> DeviceState {
        if self.traits.pre_copy { DeviceState::PreCopyP2p } else { DeviceState::RunningP2p }
    }

    pub(super) fn precopy_state(&self) -> DeviceState {
        if self.traits.pre_copy { DeviceState::PreCopy } else { DeviceState::Running }
    }
}
