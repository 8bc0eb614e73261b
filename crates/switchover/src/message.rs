//! What source and destination say to each other. The brain owns the meaning, `migration` the bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names one migration of one guest; random, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(pub u128);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for Id {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text.len() != 32 {
            return Err(format!("an id has 32 hex digits, not {}", text.len()));
        }
        u128::from_str_radix(&text, 16).map(Id).map_err(|e| format!("not an id: {e}"))
    }
}

/// One try to switch over; starts at 1, never repeats within a migration.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Attempt(pub u64);

/// An initial-data session of a device; starts at 1, never repeats within a migration.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Session(pub u64);

/// A control connection, numbered by the source; only the newest may commit.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Connection(pub u64);

/// A device's place in Describe's list.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct DeviceIndex(pub u16);

/// Optional parts of the protocol; a part is used where both sides have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Features {
    /// Both sides hash memory and devices between Ready and Commit.
    pub verify: bool,
    /// RAM payloads carry a checksum.
    pub ram_checksum: bool,
    /// Device payloads carry a checksum.
    pub device_checksum: bool,
    /// The destination tells what it measures.
    pub telemetry: bool,
    /// Pages may come compressed by LZ4.
    pub lz4: bool,
    /// Pages may come compressed by zstd.
    pub zstd: bool,
    /// The guest's memory is handed over as files that come with Describe; none of it is sent.
    pub local: bool,
    /// The destination answers echoes.
    pub echo: bool,
}

impl Features {
    /// What both sides have.
    pub fn intersect(self, other: Self) -> Self {
        Self {
            verify: self.verify && other.verify,
            ram_checksum: self.ram_checksum && other.ram_checksum,
            device_checksum: self.device_checksum && other.device_checksum,
            telemetry: self.telemetry && other.telemetry,
            lz4: self.lz4 && other.lz4,
            zstd: self.zstd && other.zstd,
            local: self.local && other.local,
            echo: self.echo && other.echo,
        }
    }
}

/// Which side something happened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest ran first.
    Source,
    /// Where it goes.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Why something failed: told on both sides, in the log and in reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failure {
    /// Where it happened.
    pub side: Side,
    /// The phase it happened in; filled by the brain when empty.
    #[serde(default)]
    pub phase: String,
    /// The device concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The call that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// Its errno.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
    /// What happened, as a sentence.
    pub what: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Failure {
    /// A failure that is a sentence.
    pub fn new(side: Side, what: impl Into<String>) -> Self {
        Self {
            side,
            phase: String::new(),
            device: None,
            call: None,
            errno: None,
            what: what.into(),
            remedy: None,
        }
    }

    /// The same, with what to do.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same, about a device.
    pub fn device(mut self, id: impl Into<String>) -> Self {
        self.device = Some(id.into());
        self
    }

    /// The same, with the phase filled where it was empty.
    pub fn in_phase(mut self, phase: &str) -> Self {
        if self.phase.is_empty() {
            self.phase = phase.to_owned();
        }
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.side)?;
        if !self.phase.is_empty() {
            write!(f, ", {}", self.phase)?;
        }
        if let Some(device) = &self.device {
            write!(f, ", device {device}")?;
        }
        write!(f, ": {}", self.what)?;
        if let Some(call) = &self.call {
            write!(f, " ({call}")?;
            if let Some(errno) = self.errno {
                write!(f, ", errno {errno}")?;
            }
            f.write_str(")")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

/// What one data channel carried in this migration, up to the end of an attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChannelEnd {
    /// Frames sent.
    pub frames: u64,
    /// Bytes sent, headers included.
    pub bytes: u64,
}

/// What one device's stream carried in its data session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceEnd {
    /// The device.
    pub device: DeviceIndex,
    /// Length of its stream, in bytes.
    pub bytes: u64,
    /// CRC-32 of its stream.
    pub checksum: u32,
}

/// What the destination measures of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceTelemetry {
    /// The device.
    pub device: DeviceIndex,
    /// Bytes of its stream that write() returned for.
    pub loaded_bytes: u64,
    /// Time spent inside write(), in ns.
    pub load_ns: u64,
    /// RESUMING → STOP, in ns, once the guest runs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validate_ns: Option<u64>,
    /// STOP → RUNNING, in ns, by way of RUNNING_P2P where there is one; once the guest runs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_ns: Option<u64>,
}

/// A part of the blackout as the destination lived it, on its own clock.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// What was done, such as `validate`.
    pub name: String,
    /// When it began, in ns of CLOCK_BOOTTIME.
    pub begin_ns: u64,
    /// When it was over.
    pub end_ns: u64,
    /// How much of it was the work itself, in ns; the rest is the way from thread to thread. 0 where that is
    /// not told apart.
    pub work_ns: u64,
}

/// The messages of the control channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// Source: opens a connection. `secret` is set when it is not the migration's first.
    Hello {
        /// What the source can do.
        features: Features,
        /// The migration.
        migration: Id,
        /// The source's process.
        instance: Id,
        /// The connection's number.
        connection: Connection,
        /// Proof of belonging to a migration that was accepted before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        secret: Option<Id>,
    },
    /// Destination: takes the connection; `secret` binds data channels and later connections to it.
    Accept {
        /// What both can do.
        features: Features,
        /// The destination's process.
        instance: Id,
        /// The migration's secret.
        secret: Id,
    },
    /// Destination: does not take it.
    Refuse {
        /// Why.
        reason: Failure,
    },
    /// Source: what must fit. The body is the engine's.
    Describe {
        /// JSON text.
        body: String,
    },
    /// Destination: everything fits, devices are open, memory is reserved.
    DescribeOk,
    /// Destination: it does not fit; every mismatch names both values.
    Mismatch {
        /// All of them.
        list: Vec<String>,
    },
    /// Source: a new stream of this device begins at offset 0 with this session.
    SessionBegin {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// Source: all initial data of the session lies before this stream offset.
    InitialDataSent {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
        /// Stream offset in bytes.
        offset: u64,
    },
    /// Destination: the session's initial data is loaded.
    SwitchoverAck {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// Source: the device announced new initial data; it begins at or after this stream offset.
    Reinit {
        /// The device.
        device: DeviceIndex,
        /// The new session.
        session: Session,
        /// Stream offset in bytes.
        offset: u64,
    },
    /// Source: a pass over memory begins.
    Pass {
        /// Its number, from 1.
        number: u64,
        /// Bytes it will look at.
        bytes: u64,
    },
    /// Source: the devices stop; what follows belongs to this attempt.
    StopCopyBegin {
        /// The attempt.
        attempt: Attempt,
    },
    /// Source: the attempt was revoked while every device could still go on.
    Revoked {
        /// The attempt.
        attempt: Attempt,
    },
    /// Source: the attempt is rolled back, devices load new sessions.
    RollBack {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: rolled back.
    RolledBack {
        /// The attempt.
        attempt: Attempt,
    },
    /// Source: everything was sent, and this is how much it was.
    StateEnd {
        /// The attempt.
        attempt: Attempt,
        /// Per data channel.
        channels: Vec<ChannelEnd>,
        /// Per device.
        devices: Vec<DeviceEnd>,
        /// Number of machine-state sections.
        sections: u32,
    },
    /// Destination: everything of the attempt is here, loaded and validated.
    Ready {
        /// The attempt.
        attempt: Attempt,
        /// How long it obeys Commit, in ms of its own clock from now.
        window_ms: u64,
    },
    /// Source: the point of no return.
    Commit {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: the guest runs here.
    Running {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: the guest will never run here from this attempt.
    Never {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: Failure,
    },
    /// Source in doubt: which was it?
    Query {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: it has no record of this attempt, or knows that the guest ran and is gone. Does not end
    /// doubt.
    Unknown {
        /// The attempt.
        attempt: Attempt,
        /// What it does know.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<Failure>,
    },
    /// Source: the attempt ended, the guest goes on at the source.
    Abort {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: what it measures.
    Telemetry {
        /// Per device.
        devices: Vec<DeviceTelemetry>,
        /// Bytes of RAM frames written to memory.
        ram_bytes: u64,
        /// Bytes of guest memory that the host has given already; `None` where the destination does not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        populated_bytes: Option<u64>,
        /// Time that all threads spent on that, in ns.
        #[serde(default, skip_serializing_if = "is_zero")]
        populate_ns: u64,
        /// Bytes of guest memory that were handed over and are mapped, here and for the devices.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mapped_bytes: Option<u64>,
        /// Time that took, pinning included, in ns.
        #[serde(default, skip_serializing_if = "is_zero")]
        map_ns: u64,
        /// The guest's first heartbeat here, in ns of CLOCK_BOOTTIME.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first_heartbeat_ns: Option<u64>,
        /// The boot whose clock that is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot_id: Option<String>,
    },
    /// Destination: what it did of the blackout, after Running. Only for reports.
    Timeline {
        /// The attempt.
        attempt: Attempt,
        /// The boot whose clock the spans are of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot_id: Option<String>,
        /// From StateEnd to Ready and from Commit to Running, in order.
        spans: Vec<Span>,
    },
    /// Destination: what the migration cost it so far. Only for reports.
    Cost {
        /// CPU time of the driver and the control channel, in ns.
        control_ns: u64,
        /// For memory and machine state.
        data_ns: u64,
        /// For devices.
        devices_ns: u64,
        /// For populating memory in the background.
        populate_ns: u64,
        /// The most memory beyond the guest's that was held at once, in bytes.
        memory_peak_bytes: u64,
    },
    /// Source: hash everything you hold (verifying runs, between Ready and Commit).
    HashRequest {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: its hashes, made from scratch, in hex.
    Hashes {
        /// The attempt.
        attempt: Attempt,
        /// All guest memory.
        memory: String,
        /// Per device; `None` where the device has no side door.
        devices: Vec<Option<String>>,
    },
    /// Either side's operator ended the migration.
    Cancel,
    /// Either side failed.
    Failed {
        /// Why.
        reason: Failure,
    },
    /// Nothing new, still here.
    KeepAlive,
    /// Source: to be answered at once.
    Echo {
        /// From 1.
        number: u64,
    },
    /// Destination: the answer to that echo.
    Echoed {
        /// Its number.
        number: u64,
    },
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}
