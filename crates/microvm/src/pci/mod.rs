//! PCI functions of the guest backed by VFIO devices: configuration space, BARs, interrupts.
//!
//! ```text
//!   guest ── ports, memory ──> PciHost ──> Function (one per slot) ──> PciFunction (the device)
//!                                           ├ ConfigSpace   shadow: PCI_COMMAND, BARs, MSI, MSI-X
//!                                           ├ Interrupts ─────> InterruptController ──> guest
//!                                           └ state         section pci:<id>
//! ```
//!
//! What the guest can see of a device and the device's own state does not carry lives here, and travels
//! as a section of the machine state: configuration space with the BAR addresses, the MSI-X table with
//! mask and pending bits, the level of INTx.
//!
//! For a migration: [`PciHost::detach`] when the devices are stopped, then the interrupt controllers are
//! saved, then [`PciHost::save`]; on the other host [`PciHost::load`], [`PciHost::rearm`] for each device
//! before it runs, and [`PciHost::reattach`] before the vCPUs run. A source that goes on calls
//! `reattach` too: nothing that came meanwhile is lost.
//!
//! | module | about |
//! |---|---|
//! | [`host`] | bus 0, configuration mechanism 1, dispatch |
//! | [`function`] | one function: accesses, resets, loss of the device |
//! | `config` | the shadow of configuration space, pure; `bar`, `capability`, `msi`, `msix` are parts of it |
//! | `irq` | wiring to the device and routing to the guest; `vectors` and `intx` are parts of it |
//! | [`state`] | save and load |
//! | [`fence`] | a guest's reset is told before the failures it causes are seen |
//! | [`dma`], [`open`](mod@open) | guest memory for the device; opening and describing it |

mod bar;
mod capability;
mod config;
pub mod dma;
pub mod fence;
pub mod function;
pub mod host;
mod intx;
mod irq;
#[cfg(test)]
pub(crate) mod mock;
mod msi;
mod msix;
pub mod open;
pub(crate) mod signal;
#[cfg(test)]
mod socket_tests;
pub mod state;
#[cfg(test)]
mod tests;
mod vectors;

pub use dma::{GuestDma, map_memory, unmap_memory};
pub use function::FunctionStatus;
pub use host::PciHost;
pub use open::{OpenDevice, describe, open};
