//! SET_IRQS: wiring, masking and triggering of interrupt vectors.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take, take_bytes};

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 2;
const DATA_EVENTFD: u32 = 4;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// What is done to the vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqAction {
    /// Mask.
    Mask,
    /// Unmask.
    Unmask,
    /// Trigger now, or wire the trigger to an eventfd.
    Trigger,
}

/// What comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqData<'a> {
    /// Nothing: every vector of the range is meant.
    None,
    /// One byte per vector: the action is done where it is not 0.
    Bool(&'a [u8]),
    /// Eventfds, as fds of the message: one per vector, or none to unwire the range.
    Eventfd,
}

/// SET_IRQS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SetIrqs<'a> {
    /// Interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Number of vectors; 0 with [`IrqAction::Trigger`] and [`IrqData::None`] turns the index off.
    pub count: u32,
    /// What is done.
    pub action: IrqAction,
    /// What comes along.
    pub data: IrqData<'a>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSetIrqs {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

impl<'a> SetIrqs<'a> {
    /// Parses and checks: exactly one kind of data and one action, a range that does not wrap, a byte per
    /// vector where there should be one, and no empty range but the one that turns the index off.
    pub fn decode(payload: &'a [u8]) -> Result<Self, DecodeError> {
        let what = "SET_IRQS";
        let (raw, rest) = take::<RawSetIrqs>(what, payload)?;
        if (raw.argsz as usize) < size_of::<RawSetIrqs>() {
            return Err(DecodeError::field(what, "argsz", raw.argsz));
        }
        let bad_flags = DecodeError::field(what, "flags", raw.flags);
        let action = match raw.flags & !(DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
            ACTION_MASK => IrqAction::Mask,
            ACTION_UNMASK => IrqAction::Unmask,
            ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(bad_flags),
        };
        let data = match raw.flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
            DATA_NONE => IrqData::None,
            DATA_BOOL => IrqData::Bool(take_bytes("SET_IRQS data", rest, raw.count as usize)?),
            DATA_EVENTFD => IrqData::Eventfd,
            _ => return Err(bad_flags),
        };
        if raw.start.checked_add(raw.count).is_none() {
            return Err(DecodeError::field(what, "count", raw.count));
        }
        if raw.count == 0 && (action, data) != (IrqAction::Trigger, IrqData::None) {
            return Err(DecodeError::field(what, "count", raw.count));
        }
        Ok(Self { index: raw.index, start: raw.start, count: raw.count, action, data })
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, bytes): (u32, &[u8]) = match self.data {
            IrqData::None => (DATA_NONE, &[]),
            IrqData::Bool(bytes) => (DATA_BOOL, bytes),
            IrqData::Eventfd => (DATA_EVENTFD, &[]),
        };
        let action = match self.action {
            IrqAction::Mask => ACTION_MASK,
            IrqAction::Unmask => ACTION_UNMASK,
            IrqAction::Trigger => ACTION_TRIGGER,
        };
        let argsz = (size_of::<RawSetIrqs>() + bytes.len()) as u32;
        let (index, start, count) = (self.index, self.start, self.count);
        put(out, &RawSetIrqs { argsz, flags: kind | action, index, start, count });
        out.extend_from_slice(bytes);
    }
}
