//! PCI functions of the guest backed by VFIO devices: configuration space, BARs, interrupts.
//!
//! What the VM needs of this module (`vm.rs` is written against it):
//!
//! - `PciHost::new(interrupts: Arc<dyn InterruptController>, events: Arc<Events>) -> PciHost`
//! - `add(&mut self, id: &str, function: Arc<dyn PciFunction>) -> Result<()>`: the next slot from
//!   [`FIRST_DEVICE_SLOT`](crate::layout::FIRST_DEVICE_SLOT) on; the VM has mapped memory for DMA.
//! - `port_read(&self, port: u16, data: &mut [u8])`, `port_write`: 0xcf8 to 0xcff (not 0xcf9 writes of
//!   one byte, which are a machine reset and stay with the VM).
//! - `mmio_read(&self, addr: u64, data: &mut [u8]) -> bool`, `mmio_write`: `false` when no BAR is there.
//! - `sections(&self) -> Vec<SectionVersion>`, `save(&self) -> Result<Vec<Section>>`,
//!   `load(&self, &[Section]) -> Result<()>` (wires vectors; pending ones are injected once by the first
//!   `resume`), `detach(&self)`, `reattach(&self)`, `rearm(&self, id: &str) -> Result<()>`.
//! - `reset(&self) -> Result<()>`: machine reset; every function reset, configuration back to power-on.
//! - `lost(&self) -> Vec<(String, String)>`: ids whose server is gone, with the reason (for `status`).
