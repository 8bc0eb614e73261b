//! The process guest: threads of this process run the workload on guest memory.
//!
//! What the VM needs of this module (`vm.rs` is written against it):
//!
//! - `ProcessInterrupts::new() -> Arc<ProcessInterrupts>`, an
//!   [`InterruptController`](crate::InterruptController).
//! - `ProcessBody::new(config: &VmConfig, memory: Arc<GuestMemory>, bus: Arc<dyn GuestBus>,
//!   interrupts: Arc<ProcessInterrupts>) -> Result<ProcessBody>`, a [`Body`](crate::Body). It reads the
//!   start page from memory when it first runs, as the KVM guest does, drives devices and sends
//!   heartbeats through the bus.
//! - `process::available() -> Result<(), String>`: why this host cannot run it.
