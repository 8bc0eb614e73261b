//! Control messages as frames: the kind's number, and JSON of the fields.

use serde_json::Value;
use switchover::message::Message;

use super::{FrameHeader, HEADER_LEN, WireError, field, kind, payload_limit};

/// Number and serde name of every message, in the order of the numbers.
const NAMES: &[(u16, &str)] = &[
    (kind::HELLO, "hello"),
    (kind::ACCEPT, "accept"),
    (kind::REFUSE, "refuse"),
    (kind::DESCRIBE, "describe"),
    (kind::DESCRIBE_OK, "describe-ok"),
    (kind::MISMATCH, "mismatch"),
    (kind::SESSION_BEGIN, "session-begin"),
    (kind::INITIAL_DATA_SENT, "initial-data-sent"),
    (kind::SWITCHOVER_ACK, "switchover-ack"),
    (kind::REINIT, "reinit"),
    (kind::PASS, "pass"),
    (kind::STOP_COPY_BEGIN, "stop-copy-begin"),
    (kind::REVOKED, "revoked"),
    (kind::ROLL_BACK, "roll-back"),
    (kind::ROLLED_BACK, "rolled-back"),
    (kind::STATE_END, "state-end"),
    (kind::READY, "ready"),
    (kind::COMMIT, "commit"),
    (kind::RUNNING, "running"),
    (kind::NEVER, "never"),
    (kind::QUERY, "query"),
    (kind::UNKNOWN, "unknown"),
    (kind::ABORT, "abort"),
    (kind::TELEMETRY, "telemetry"),
    (kind::HASH_REQUEST, "hash-request"),
    (kind::HASHES, "hashes"),
    (kind::CANCEL, "cancel"),
    (kind::FAILED, "failed"),
    (kind::KEEP_ALIVE, "keep-alive"),
    (kind::TIMELINE, "timeline"),
    (kind::COST, "cost"),
    (kind::ECHO, "echo"),
    (kind::ECHOED, "echoed"),
];

/// The kind is a control message's.
pub fn is_control(kind: u16) -> bool {
    name_of(kind).is_some()
}

fn name_of(kind: u16) -> Option<&'static str> {
    NAMES.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

fn kind_of(message: &Message) -> u16 {
    match message {
        Message::Hello { .. } => kind::HELLO,
        Message::Accept { .. } => kind::ACCEPT,
        Message::Refuse { .. } => kind::REFUSE,
        Message::Describe { .. } => kind::DESCRIBE,
        Message::DescribeOk => kind::DESCRIBE_OK,
        Message::Mismatch { .. } => kind::MISMATCH,
        Message::SessionBegin { .. } => kind::SESSION_BEGIN,
        Message::InitialDataSent { .. } => kind::INITIAL_DATA_SENT,
        Message::SwitchoverAck { .. } => kind::SWITCHOVER_ACK,
        Message::Reinit { .. } => kind::REINIT,
        Message::Pass { .. } => kind::PASS,
        Message::StopCopyBegin { .. } => kind::STOP_COPY_BEGIN,
        Message::Revoked { .. } => kind::REVOKED,
        Message::RollBack { .. } => kind::ROLL_BACK,
        Message::RolledBack { .. } => kind::ROLLED_BACK,
        Message::StateEnd { .. } => kind::STATE_END,
        Message::Ready { .. } => kind::READY,
        Message::Commit { .. } => kind::COMMIT,
        Message::Running { .. } => kind::RUNNING,
        Message::Never { .. } => kind::NEVER,
        Message::Query { .. } => kind::QUERY,
        Message::Unknown { .. } => kind::UNKNOWN,
        Message::Abort { .. } => kind::ABORT,
        Message::Telemetry { .. } => kind::TELEMETRY,
        Message::HashRequest { .. } => kind::HASH_REQUEST,
        Message::Hashes { .. } => kind::HASHES,
        Message::Cancel => kind::CANCEL,
        Message::Failed { .. } => kind::FAILED,
        Message::KeepAlive => kind::KEEP_ALIVE,
        Message::Timeline { .. } => kind::TIMELINE,
        Message::Cost { .. } => kind::COST,
        Message::Echo { .. } => kind::ECHO,
        Message::Echoed { .. } => kind::ECHOED,
    }
}

/// The whole frame of a message. Fails where a peer would refuse it for its length.
pub fn encode_message(message: &Message) -> Result<Vec<u8>, WireError> {
    let kind = kind_of(message);
    let value = serde_json::to_value(message).map_err(|e| field(kind, e.to_string()))?;
    let mut frame = vec![0; HEADER_LEN];
    // A variant with fields is an object with one entry, one without is its name alone.
    if let Value::Object(entry) = value
        && let Some((_, fields)) = entry.into_iter().next()
    {
        serde_json::to_writer(&mut frame, &fields).map_err(|e| field(kind, e.to_string()))?;
    }
    let payload = &frame[HEADER_LEN..];
    let (length, limit) = (payload.len() as u64, payload_limit(kind).unwrap_or(0) as u64);
    if length > limit {
        return Err(WireError::TooLong { kind, length, limit });
    }
    let payload_checksum = Some(crc32fast::hash(payload));
    let header =
        FrameHeader { kind, length: length as u32, payload_checksum, ..FrameHeader::default() };
    frame[..HEADER_LEN].copy_from_slice(&header.encode());
    Ok(frame)
}

/// The message of a frame; `None` where the kind is unknown and may be skipped.
pub fn decode_message(header: &FrameHeader, payload: &[u8]) -> Result<Option<Message>, WireError> {
    let kind = header.kind;
    let Some(name) = name_of(kind) else {
        if header.is_known() {
            return Err(WireError::WrongChannel { kind, channel: "control" });
        }
        return Ok(None);
    };
    header.check_payload(payload, true)?;
    // A message without fields; what a newer version may have put into it is skipped.
    if let Ok(message) = serde_json::from_value(Value::String(name.to_owned())) {
        return Ok(Some(message));
    }
    let fields: Value =
        serde_json::from_slice(payload).map_err(|e| field(kind, format!("not JSON: {e}")))?;
    let value = Value::Object([(name.to_owned(), fields)].into_iter().collect());
    let message = serde_json::from_value(value).map_err(|e| field(kind, e.to_string()))?;
    Ok(Some(message))
}
