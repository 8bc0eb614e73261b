//! The registers of the chip, without anything around them.

use std::collections::VecDeque;

const FIFO_BYTES: usize = 16;
/// What may wait for a guest that does not read, beyond the FIFO, in bytes.
pub(super) const INPUT_MAX_BYTES: usize = 4096;

pub(super) const IER_RECEIVE: u8 = 1;
pub(super) const IER_TRANSMIT: u8 = 2;
pub(super) const IER_BITS: u8 = 0x0f;
pub(super) const IIR_NONE: u8 = 1;
pub(super) const IIR_TRANSMIT: u8 = 2;
pub(super) const IIR_RECEIVE: u8 = 4;
const IIR_FIFOS: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
pub(super) const LCR_DIVISOR: u8 = 0x80;
pub(super) const LSR_DATA: u8 = 1;
/// Transmit holding register and shift register are empty: always.
const LSR_TRANSMIT_EMPTY: u8 = 0x60;
pub(super) const MCR_LOOPBACK: u8 = 0x10;
pub(super) const MCR_BITS: u8 = 0x1f;
/// Carrier, ring off, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) divisor: [u8; 2],
    pub(super) interrupt_enable: u8,
    pub(super) fifo_control: u8,
    pub(super) line_control: u8,
    pub(super) modem_control: u8,
    pub(super) scratch: u8,
    /// A transmit interrupt was raised and not read yet.
    pub(super) transmit_pending: bool,
    pub(super) received: VecDeque<u8>,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            divisor: [12, 0],
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            transmit_pending: false,
            received: VecDeque::new(),
        }
    }
}

impl Registers {
    /// The interrupt to report, by priority.
    pub(super) fn interrupt(&self) -> u8 {
        if self.interrupt_enable & IER_RECEIVE != 0 && !self.received.is_empty() {
            IIR_RECEIVE
        } else if self.interrupt_enable & IER_TRANSMIT != 0 && self.transmit_pending {
            IIR_TRANSMIT
        } else {
            IIR_NONE
        }
    }

    pub(super) fn read(&mut self, register: u8) -> u8 {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match register {
            0 | 1 if divisor => self.divisor[usize::from(register)],
            0 => self.received.pop_front().unwrap_or(0),
            1 => self.interrupt_enable,
            2 => {
                let interrupt = self.interrupt();
                if interrupt == IIR_TRANSMIT {
                    self.transmit_pending = false;
                }
                let fifos = if self.fifo_control & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 };
                interrupt | fifos
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => LSR_TRANSMIT_EMPTY | if self.received.is_empty() { 0 } else { LSR_DATA },
            6 if self.modem_control & MCR_LOOPBACK != 0 => loopback_status(self.modem_control),
            6 => MSR_CONNECTED,
            _ => self.scratch,
        }
    }

    /// Answers the byte to send, if this sends one.
    pub(super) fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match register {
            0 | 1 if divisor => self.divisor[usize::from(register)] = value,
            0 => {
                self.transmit_pending = true;
                if self.modem_control & MCR_LOOPBACK == 0 {
                    return Some(value);
                }
                if self.received.len() < FIFO_BYTES {
                    self.received.push_back(value);
                }
            }
            1 => {
                // Enabling the transmit interrupt raises it when there is room: there always is.
                if value & !self.interrupt_enable & IER_TRANSMIT != 0 {
                    self.transmit_pending = true;
                }
                self.interrupt_enable = value & IER_BITS;
            }
            2 => {
                if value & FCR_CLEAR_RECEIVE != 0 {
                    self.received.clear();
                }
                self.fifo_control = value & !FCR_CLEAR_RECEIVE;
            }
            3 => self.line_control = value,
            4 => self.modem_control = value & MCR_BITS,
            7 => self.scratch = value,
            _ => {}
        }
        None
    }
}

/// Modem status in loop-back: the outputs come back as inputs (RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD).
fn loopback_status(modem_control: u8) -> u8 {
    (modem_control & 0x0c) << 4 | (modem_control & 1) << 5 | (modem_control & 2) << 3
}
