//! vfio-user: a device in another process, reached over a UNIX socket, with migration.
//!
//! ```text
//!   VMM ── VfioUserDevice ─┐                     ┌─ Server ── ServedDevice
//!          ├ pci()         │   UNIX socket       │            ├ pci: PciFunction
//!          └ migration()   ├─────────────────────┤            └ migration: MigratableDevice
//!                          │  commands  ─────>   │
//!                          │  <─────  DMA_READ, DMA_WRITE (twin socket if granted)
//! ```
//!
//! Both sides implement, or serve, the two traits of `vfio-migration`: whoever drives a
//! [`PciFunction`](vfio_migration::PciFunction) or a
//! [`MigratableDevice`](vfio_migration::MigratableDevice) need not know that a socket is in between.
//!
//! | module | holds |
//! |---|---|
//! | [`codec`] | headers and payloads, no I/O; every length from a peer is checked here |
//! | [`client`] | [`VfioUserDevice`]: opens a device, demultiplexes replies, serves the server's DMA |
//! | [`server`] | [`Server`]: serves a [`ServedDevice`], optionally with libvfio-user's quirks |
//! | [`error`] | [`VfioUserError`] |
//!
//! Beyond the specification the crate knows a compatible extension, announced under
//! `capabilities.migration` and refused cleanly by old peers: precopy information, REINIT, the
//! stop-copy size and a state digest for verification.

pub mod client;
pub mod codec;
pub mod error;
pub mod server;

mod wire;

pub use client::{Options, RawDevice, VfioUserDevice, VfioUserMigration};
pub use error::VfioUserError;
pub use server::{RunningServer, ServedDevice, Server, ServerOptions, StopHandle};
