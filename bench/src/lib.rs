//! What the benchmarks share: counting, summing up, naming the machine. See docs/performance.md.
//!
//! | module | holds |
//! |---|---|
//! | [`stats`] | medians and spread |
//! | [`perf`] | instruction counts of the CPU |
//! | [`cpu`] | CPU seconds of threads and processes, pinning |
//! | [`free`] | the host's free memory, the same for whoever is measured |
//! | [`host`] | the machine's name |
//! | [`engine`] | the engine by itself, beside baselines |
//! | [`table`] | Markdown tables |
//! | [`process`], [`jsonl`] | processes, and their sockets of one JSON object per line |
//! | [`tracking`] | KVM's dirty log beside its dirty rings |
//! | [`rival`] | one guest moved by vmferry and by QEMU |

pub mod cpu;
pub mod engine;
pub mod free;
pub mod host;
pub mod jsonl;
pub mod perf;
pub mod process;
pub mod rival;
pub mod stats;
pub mod table;
pub mod tracking;
