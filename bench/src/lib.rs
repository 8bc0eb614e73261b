//! What the benchmarks share: counting, summing up, naming the machine. See docs/performance.md.
//!
//! | module | holds |
//! |---|---|
//! | [`stats`] | medians and spread |
//! | [`perf`] | instruction counts of the CPU |
//! | [`cpu`] | CPU seconds of threads and processes, pinning |
//! | [`host`] | the machine's name |
//! | [`table`] | Markdown tables |

pub mod cpu;
pub mod host;
pub mod perf;
pub mod stats;
pub mod table;
