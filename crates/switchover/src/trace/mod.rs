//! A record of one migration as its brain saw it: plain data, in and out as a value.
//!
//! Whoever runs the brain shows the [`Recorder`] every event and action that goes by, keeps the [`Trace`] in a
//! file, and a planner makes a VM of it to ask what-if. The recorder has no clock of its own and is bounded: of
//! a migration that lasts it keeps how it began and how it ended.
//!
//! ```text
//!   Event, Action + now ──▶ Recorder ──▶ Trace { header, entries, end } ──▶ a file, a planner
//! ```

mod recorder;

pub use recorder::Recorder;

use serde::{Deserialize, Serialize};

/// Version of the format.
pub const VERSION: u32 = 1;
/// Entries that are kept of the beginning, and as many of the end.
pub const ENTRIES_HALF: usize = 10_000;

/// The record of one migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Who migrated.
    pub header: Header,
    /// What happened, in order.
    pub entries: Vec<Entry>,
    /// How it ended.
    pub end: End,
}

/// Who migrated, and how it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Header {
    /// [`VERSION`], under the name by which such a file is known.
    #[serde(rename = "vmferry-trace")]
    pub version: u32,
    /// The migration's id.
    pub migration: String,
    /// Kind of machine, such as `microvm-kvm`.
    pub machine: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// All guest memory, in bytes.
    pub memory_bytes: u64,
    /// The downtime limit at the start, in µs.
    pub limit_us: u64,
    /// How hard it was: `best-effort` or `strict`.
    pub mode: String,
    /// Whose rule decided.
    pub policy: String,
    /// The devices, by index.
    pub devices: Vec<TracedDevice>,
}

/// A device as it describes itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TracedDevice {
    /// The user's name for it.
    pub id: String,
    /// Kind, driver and firmware.
    pub kind: String,
    /// PRE_COPY is there.
    pub pre_copy: bool,
    /// The P2P states are there.
    pub p2p: bool,
    /// INFOv2 is opted in.
    pub precopy_info_v2: bool,
    /// MIG_DATA_SIZE is there.
    pub data_size: bool,
    /// It logs its DMA.
    pub dma_logging: bool,
    /// What MIG_DATA_SIZE said before the migration, in bytes, where nobody asks later.
    pub stop_copy_bytes: Option<u64>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Since the recording began, in µs.
    #[serde(rename = "at-us")]
    pub at_us: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened. Devices by their index in the header, times in µs, sizes in bytes; what nobody knows is
/// `null`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum What {
    /// The source's handover entered a state.
    State {
        /// By its name.
        name: String,
    },
    /// One message there and one back, the set-up of the connection included.
    RoundTrip {
        /// How long.
        took_us: u64,
    },
    /// The same, asked while the guest ran.
    Echo {
        /// How long.
        took_us: u64,
    },
    /// A device's stream begins at offset 0.
    StreamBegins {
        /// Which.
        device: u16,
    },
    /// PRECOPY_INFO and MIG_DATA_SIZE.
    Info {
        /// Of which device.
        device: u16,
        /// Unread initial bytes.
        initial_bytes: Option<u64>,
        /// Unread dirty bytes.
        dirty_bytes: Option<u64>,
        /// New initial data was announced.
        reinit: bool,
        /// What MIG_DATA_SIZE says.
        stop_copy_bytes: Option<u64>,
        /// Read of the stream so far.
        offset: u64,
        /// How long the answer took.
        took_us: u64,
    },
    /// A device call other than that ended.
    Call {
        /// On which device.
        device: u16,
        /// The state that was set, or `reset`.
        call: String,
        /// It worked.
        done: bool,
        /// How long it took.
        took_us: u64,
    },
    /// Device bytes were read and sent since the last such entry.
    Read {
        /// Of which device.
        device: u16,
        /// How many.
        bytes: u64,
        /// Time spent in read().
        read_us: u64,
    },
    /// A read found nothing for now.
    NothingNow {
        /// Of which device.
        device: u16,
    },
    /// STOP_COPY was read to its end.
    StreamEnds {
        /// Of which device.
        device: u16,
    },
    /// A device's initial data began anew.
    Reinit {
        /// Which.
        device: u16,
        /// After the decision to switch over.
        late: bool,
    },
    /// The destination has a session's initial data.
    Acked {
        /// Of which device.
        device: u16,
    },
    /// What the destination has loaded of the stream.
    Loaded {
        /// Of which device.
        device: u16,
        /// So far.
        bytes: u64,
        /// Time spent in write() so far.
        load_us: u64,
    },
    /// The destination's own calls of the switchover.
    Started {
        /// On which device.
        device: u16,
        /// RESUMING → STOP.
        validate_us: Option<u64>,
        /// STOP → RUNNING, by way of RUNNING_P2P where there is one.
        start_us: Option<u64>,
    },
    /// A pass over memory begins.
    Pass {
        /// From 1.
        number: u64,
        /// So much is to be sent.
        bytes: u64,
    },
    /// It was sent.
    PassSent,
    /// Dirty pages were collected while the guest runs.
    PassSynced {
        /// So many.
        dirty_bytes: u64,
        /// How long memory had been exposed to writes, on average, where that is not since the last such entry.
        #[serde(default)]
        exposed_us: Option<u64>,
        /// How long it took.
        took_us: u64,
    },
    /// The link was busy without a gap.
    Link {
        /// So much went out.
        bytes: u64,
        /// In this time.
        busy_us: u64,
    },
    /// The vCPUs are slowed down.
    Throttle {
        /// For so many percent of the time.
        percent: u8,
    },
    /// The vCPUs are being asked to pause.
    PauseRequested,
    /// They stand.
    Paused,
    /// They run here again.
    Resumed,
    /// Dirty pages were collected with the vCPUs stopped.
    Synced {
        /// The one that counts, and not the provisional one.
        last: bool,
        /// So many.
        dirty_bytes: u64,
        /// How long it took.
        took_us: u64,
    },
    /// The last memory was sent.
    RamSent,
    /// Interrupts were detached, the machine state saved and sent.
    MachineState {
        /// How long it took.
        took_us: u64,
    },
    /// StateEnd was sent.
    StateEnd,
    /// The destination is ready.
    Ready,
    /// Commit was sent.
    Commit,
    /// The guest runs there.
    Running,
    /// A verdict.
    Verdict {
        /// Where.
        point: String,
        /// Which.
        verdict: String,
        /// Since the request to pause.
        elapsed_us: u64,
        /// What was still to come, as expected.
        expected_us: Option<u64>,
        /// The same at the level of the promise.
        upper_us: Option<u64>,
    },
    /// Here entries are missing: there were more than are kept.
    Left {
        /// So many.
        entries: u64,
    },
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct End {
    /// `completed`, `failed`, `cancelled` …
    pub status: String,
    /// From the request to pause to the arrival of Running, without what verification cost, in µs.
    pub downtime_us: Option<u64>,
    /// From the start to the end, in µs.
    pub total_us: u64,
    /// The blackout's terms.
    pub terms: Vec<MeasuredTerm>,
}

/// A term of the blackout as it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MeasuredTerm {
    /// Its name.
    pub name: String,
    /// As it was expected, in µs; `None` = unknown.
    pub expected_us: Option<u64>,
    /// As it was, in µs; `None` where it is part of another.
    pub measured_us: Option<u64>,
}
