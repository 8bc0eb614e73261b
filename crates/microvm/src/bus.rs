//! Where the guest's port and memory accesses go.

use std::sync::Arc;

use crate::body::GuestBus;
use crate::control::Control;
use crate::layout::{FATAL_PORT, HEARTBEAT_PORT, POWER_OFF_PORT, RESET_PORT};
use crate::pci::PciHost;
use crate::serial::Serial;

/// Bit of the reset port that resets the machine.
const RESET_NOW: u8 = 4;
/// The keyboard controller: its command port, and the command that pulses the reset line.
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// The machine's bus.
pub(crate) struct Bus {
    pub serial: Arc<Serial>,
    pub pci: PciHost,
    pub control: Arc<Control>,
}

impl GuestBus for Bus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = Serial::register(port) {
            let (first, rest) = match data.split_first_mut() {
                Some(split) => split,
                None => return,
            };
            *first = self.serial.read(register);
            rest.fill(0xff);
            return;
        }
        match port {
            // Nothing to read, nothing in the way of a write.
            KEYBOARD_COMMAND_PORT | RESET_PORT if data.len() == 1 => data.fill(0),
            _ if self.pci.port_read(port, data) => {}
            _ => data.fill(0xff),
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let Some(first) = data.first().copied() else { return };
        if let Some(register) = Serial::register(port) {
            self.serial.write(register, first);
            return;
        }
        match port {
            HEARTBEAT_PORT => self.control.beat(),
            FATAL_PORT => self.control.fatal(first),
            POWER_OFF_PORT => self.control.power_off(),
            RESET_PORT if data.len() == 1 => {
                if first & RESET_NOW != 0 {
                    self.control.request_reset();
                }
            }
            KEYBOARD_COMMAND_PORT if first == KEYBOARD_RESET => self.control.request_reset(),
            _ => {
                self.pci.port_write(port, data);
            }
        }
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(addr, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.pci.mmio_write(addr, data);
    }
}
