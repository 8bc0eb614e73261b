//! The serial console: a 16550A at port 0x3f8, IRQ 4.
//!
//! A byte is sent when the guest writes it: into a buffer that a thread empties into the sink, so that a
//! sink that blocks never holds a vCPU. Input waits in the receive FIFO. What the guest can see of the chip is
//! saved as a section.

mod console;
mod registers;

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use migration::{Section, SectionVersion};

use crate::body::InterruptController;
use crate::config::SerialConfig;
use crate::error::{Error, Result};
use crate::layout::{SERIAL_IRQ, SERIAL_PORT};
use crate::section::{Reader, Writer};

use console::{Input, Output};
use registers::{IER_BITS, IIR_NONE, INPUT_MAX_BYTES, MCR_BITS, Registers};

/// Name and kind of the section.
const NAME: &str = "serial";
const KIND: &str = "serial-16550";
const VERSION: u32 = 1;

struct Chip {
    registers: Registers,
    output: Option<Output>,
    line: bool,
}

/// The serial port.
pub struct Serial {
    chip: Mutex<Chip>,
    interrupts: Arc<dyn InterruptController>,
    _input: Option<Input>,
}

impl Serial {
    /// A port as `config` wants it.
    pub fn new(
        config: &SerialConfig,
        interrupts: Arc<dyn InterruptController>,
    ) -> Result<Arc<Self>> {
        let output = match config {
            SerialConfig::None => None,
            SerialConfig::Stdio => Some(Output::start(Box::new(std::io::stdout()))?),
            SerialConfig::File(path) => {
                let file = File::options().create(true).append(true).open(path);
                let file = file.map_err(|error| {
                    Error::Config(format!("serial console {}: {error}", path.display()))
                })?;
                Some(Output::start(Box::new(file))?)
            }
        };
        let input = matches!(config, SerialConfig::Stdio);
        let chip = Chip { registers: Registers::default(), output, line: false };
        let mut failed = Ok(());
        let serial = Arc::new_cyclic(|serial: &Weak<Self>| {
            let input = match input.then(|| Input::start(Weak::clone(serial))).transpose() {
                Ok(input) => input,
                Err(error) => {
                    failed = Err(error);
                    None
                }
            };
            Self { chip: Mutex::new(chip), interrupts, _input: input }
        });
        failed.map(|()| serial)
    }

    /// The register of `port`, if it is one of ours.
    pub fn register(port: u16) -> Option<u8> {
        let register = port.checked_sub(SERIAL_PORT)?;
        (register < 8).then_some(register as u8)
    }

    /// The guest reads a register.
    pub fn read(&self, register: u8) -> u8 {
        let mut chip = self.lock();
        let value = chip.registers.read(register);
        self.update_line(&mut chip);
        value
    }

    /// The guest writes a register.
    pub fn write(&self, register: u8, value: u8) {
        let mut chip = self.lock();
        let byte = chip.registers.write(register, value);
        if let (Some(byte), Some(output)) = (byte, &chip.output) {
            output.send(byte);
        }
        self.update_line(&mut chip);
    }

    /// Bytes for the guest; those that do not fit are dropped, as on a real line.
    pub fn receive(&self, bytes: &[u8]) {
        let mut chip = self.lock();
        for byte in bytes {
            if chip.registers.received.len() < INPUT_MAX_BYTES {
                chip.registers.received.push_back(*byte);
            }
        }
        self.update_line(&mut chip);
    }

    /// Back to power-on; what was sent stays sent.
    pub fn reset(&self) {
        let mut chip = self.lock();
        chip.registers = Registers::default();
        self.update_line(&mut chip);
    }

    /// The section that [`save`](Self::save) makes.
    pub fn section() -> SectionVersion {
        SectionVersion { name: NAME.into(), kind: KIND.into(), version: VERSION }
    }

    /// The state of the chip.
    pub fn save(&self) -> Section {
        let chip = self.lock();
        let registers = &chip.registers;
        let received: Vec<u8> = registers.received.iter().copied().collect();
        let mut writer = Writer::new();
        for byte in registers.divisor {
            writer.u8(byte);
        }
        writer
            .u8(registers.interrupt_enable)
            .u8(registers.fifo_control)
            .u8(registers.line_control)
            .u8(registers.modem_control)
            .u8(registers.scratch)
            .u8(registers.transmit_pending.into())
            .bytes(&received);
        Section { name: NAME.into(), kind: KIND.into(), version: VERSION, payload: writer.finish() }
    }

    /// Loads what [`save`](Self::save) gave. The interrupt line is left low until
    /// [`attach`](Self::attach).
    pub fn load(&self, sections: &[Section]) -> Result<()> {
        let section = crate::section::find(sections, NAME, KIND, VERSION)?;
        let mut reader = Reader::new(NAME, &section.payload);
        let registers = Registers {
            divisor: [reader.u8()?, reader.u8()?],
            interrupt_enable: reader.u8()? & IER_BITS,
            fifo_control: reader.u8()?,
            line_control: reader.u8()?,
            modem_control: reader.u8()? & MCR_BITS,
            scratch: reader.u8()?,
            transmit_pending: reader.u8()? != 0,
            received: reader.bytes(INPUT_MAX_BYTES)?.iter().copied().collect(),
        };
        reader.finish()?;
        self.lock().registers = registers;
        Ok(())
    }

    /// Raises the interrupt line anew where the state asks for it: a line has no state of its own in the
    /// interrupt controllers that were loaded, and an edge too many is harmless.
    pub fn attach(&self) {
        let mut chip = self.lock();
        self.set_line(&mut chip, false);
        self.update_line(&mut chip);
    }

    fn update_line(&self, chip: &mut Chip) {
        let high = chip.registers.interrupt() != IIR_NONE;
        if high != chip.line {
            self.set_line(chip, high);
        }
    }

    fn set_line(&self, chip: &mut Chip, high: bool) {
        chip.line = high;
        if let Err(error) = self.interrupts.set_line(SERIAL_IRQ, high) {
            tracing::warn!(%error, "serial interrupt");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;

    use super::registers::{
        IER_RECEIVE, IER_TRANSMIT, IIR_RECEIVE, IIR_TRANSMIT, LCR_DIVISOR, LSR_DATA, MCR_LOOPBACK,
    };
    use super::*;
    use crate::body::{IrqConnection, MsiMessage};

    /// Records the line.
    #[derive(Default)]
    struct Line(Mutex<Vec<bool>>);

    impl InterruptController for Line {
        fn connect_msi(&self, _: BorrowedFd<'_>, _: MsiMessage) -> Result<Box<dyn IrqConnection>> {
            Err(Error::State("not here".into()))
        }
        fn connect_intx(
            &self,
            _: BorrowedFd<'_>,
            _: BorrowedFd<'_>,
            _: u32,
        ) -> Result<Box<dyn IrqConnection>> {
            Err(Error::State("not here".into()))
        }
        fn inject_msi(&self, _: MsiMessage) -> Result<()> {
            Ok(())
        }
        fn set_line(&self, gsi: u32, high: bool) -> Result<()> {
            assert_eq!(gsi, SERIAL_IRQ);
            self.0.lock().unwrap().push(high);
            Ok(())
        }
    }

    fn serial() -> (Arc<Serial>, Arc<Line>) {
        let line = Arc::new(Line::default());
        (Serial::new(&SerialConfig::None, Arc::clone(&line) as _).unwrap(), line)
    }

    #[test]
    fn received_bytes_raise_the_line_until_they_are_read() {
        let (serial, line) = serial();
        serial.receive(b"a");
        assert!(line.0.lock().unwrap().is_empty(), "interrupts are off");
        serial.write(1, IER_RECEIVE);
        assert_eq!(serial.read(2) & 0x0f, IIR_RECEIVE);
        assert_eq!(serial.read(5) & LSR_DATA, LSR_DATA);
        assert_eq!(serial.read(0), b'a');
        assert_eq!(serial.read(2) & 0x0f, IIR_NONE);
        assert_eq!(*line.0.lock().unwrap(), [true, false]);
    }

    #[test]
    fn the_transmit_interrupt_ends_when_it_is_identified() {
        let (serial, line) = serial();
        serial.write(1, IER_TRANSMIT);
        assert_eq!(serial.read(2) & 0x0f, IIR_TRANSMIT);
        assert_eq!(serial.read(2) & 0x0f, IIR_NONE);
        serial.write(0, b'x');
        assert_eq!(serial.read(2) & 0x0f, IIR_TRANSMIT);
        assert_eq!(*line.0.lock().unwrap(), [true, false, true, false]);
    }

    #[test]
    fn saved_state_is_loaded_and_a_pending_interrupt_raised_again() {
        let (source, _) = serial();
        source.write(3, LCR_DIVISOR);
        source.write(0, 1);
        source.write(1, 2);
        source.write(3, 3);
        source.write(1, IER_RECEIVE);
        source.write(7, 0x5a);
        source.receive(b"waiting");
        let section = source.save();

        let (destination, line) = serial();
        destination.load(std::slice::from_ref(&section)).unwrap();
        assert!(line.0.lock().unwrap().is_empty(), "nothing before the guest starts");
        destination.attach();
        assert_eq!(*line.0.lock().unwrap(), [false, true]);
        assert_eq!(destination.save(), section);
        assert_eq!(destination.read(7), 0x5a);
        assert_eq!(destination.read(0), b'w');
    }

    #[test]
    fn a_section_cut_short_or_with_absurd_lengths_is_refused() {
        let (serial, _) = serial();
        let section = serial.save();
        for len in 0..section.payload.len() {
            let mut cut = section.clone();
            cut.payload.truncate(len);
            assert!(serial.load(&[cut]).is_err(), "{len}");
        }
        let mut absurd = section;
        let at = absurd.payload.len() - 4;
        absurd.payload[at..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(serial.load(&[absurd]).is_err());
    }

    #[test]
    fn output_is_complete_when_the_port_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let config = SerialConfig::File(path.clone());
        let serial = Serial::new(&config, Arc::new(Line::default())).unwrap();
        for byte in b"all of it" {
            serial.write(0, *byte);
        }
        drop(serial);
        assert_eq!(std::fs::read(&path).unwrap(), b"all of it");
    }

    #[test]
    fn loopback_gives_the_outputs_back() {
        let (serial, _) = serial();
        serial.write(4, MCR_LOOPBACK | 0x0b);
        assert_eq!(serial.read(6), 0xb0, "DTR, RTS, OUT2: DSR, CTS, DCD");
        serial.write(0, b'q');
        assert_eq!(serial.read(0), b'q');
    }
}
