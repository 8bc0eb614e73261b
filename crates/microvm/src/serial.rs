//! The serial console: a 16550A at port 0x3f8, IRQ 4.
//!
//! A byte is sent when the guest writes it: into a buffer that a thread empties into the sink, so that a
//! sink that blocks never holds a vCPU. Input waits in the receive FIFO. What the guest can see of the chip is
//! saved as a section.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use migration::{Section, SectionVersion};
use vmm_sys_util::eventfd::EventFd;

use crate::body::InterruptController;
use crate::config::SerialConfig;
use crate::error::{Error, Result};
use crate::layout::{SERIAL_IRQ, SERIAL_PORT};
use crate::section::{Reader, Writer};

/// Name and kind of the section.
const NAME: &str = "serial";
const KIND: &str = "serial-16550";
const VERSION: u32 = 1;

const FIFO_BYTES: usize = 16;
/// What may wait for a guest that does not read, beyond the FIFO, in bytes.
const INPUT_MAX_BYTES: usize = 4096;

/// What may wait for a sink that is slow, in bytes.
const OUTPUT_MAX_BYTES: usize = 1 << 20;
/// How long the end waits for a sink that is slow.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const IER_BITS: u8 = 0x0f;
const IIR_NONE: u8 = 1;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVE: u8 = 4;
const IIR_FIFOS: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const LSR_DATA: u8 = 1;
/// Transmit holding register and shift register are empty: always.
const LSR_TRANSMIT_EMPTY: u8 = 0x60;
const MCR_LOOPBACK: u8 = 0x10;
const MCR_BITS: u8 = 0x1f;
/// Carrier, ring off, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    /// A transmit interrupt was raised and not read yet.
    transmit_pending: bool,
    received: VecDeque<u8>,
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

/// The thread that writes output.
struct Output {
    queue: Arc<Queue>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    closed: bool,
    /// Everything is written, or nothing can be any more.
    finished: bool,
}

impl Output {
    fn start(sink: Box<dyn Write + Send>) -> Result<Self> {
        let queue = Arc::new(Queue::default());
        let thread = std::thread::Builder::new()
            .name("serial-output".into())
            .spawn({
                let queue = Arc::clone(&queue);
                move || queue.drain(sink)
            })
            .map_err(|source| Error::Os { call: "spawn of the serial thread", source })?;
        Ok(Self { queue, thread: Some(thread) })
    }

    /// Bytes that find no room are lost, as on a line without flow control.
    fn send(&self, byte: u8) {
        let mut waiting = self.queue.lock();
        if waiting.bytes.len() < OUTPUT_MAX_BYTES {
            waiting.bytes.push(byte);
            self.queue.changed.notify_all();
        }
    }
}

impl Queue {
    fn drain(&self, mut sink: Box<dyn Write + Send>) {
        loop {
            let mut waiting = self.lock();
            while waiting.bytes.is_empty() && !waiting.closed {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let bytes = std::mem::take(&mut waiting.bytes);
            if bytes.is_empty() {
                break;
            }
            drop(waiting);
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                tracing::warn!(%error, "the serial console's output is lost from now on");
                break;
            }
        }
        self.lock().finished = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.closed = true;
        self.queue.changed.notify_all();
        let last = self
            .queue
            .changed
            .wait_timeout_while(waiting, OUTPUT_PATIENCE, |waiting| !waiting.finished);
        let finished = last.is_ok_and(|(waiting, _)| waiting.finished);
        // A sink that blocks keeps its thread until the process ends.
        if let Some(thread) = self.thread.take().filter(|_| finished) {
            let _ = thread.join();
        }
    }
}

impl Registers {
    /// The interrupt to report, by priority.
    fn interrupt(&self) -> u8 {
        if self.interrupt_enable & IER_RECEIVE != 0 && !self.received.is_empty() {
            IIR_RECEIVE
        } else if self.interrupt_enable & IER_TRANSMIT != 0 && self.transmit_pending {
            IIR_TRANSMIT
        } else {
            IIR_NONE
        }
    }

    fn read(&mut self, register: u8) -> u8 {
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
    fn write(&mut self, register: u8, value: u8) -> Option<u8> {
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

/// The thread that reads standard input.
struct Input {
    stop: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Input {
    fn start(serial: Weak<Serial>) -> Result<Self> {
        let stop = EventFd::new(libc::EFD_CLOEXEC)
            .map_err(|source| Error::Os { call: "eventfd", source })?;
        let stopped =
            stop.try_clone().map_err(|source| Error::Os { call: "dup of an eventfd", source })?;
        let thread = std::thread::Builder::new()
            .name("serial-input".into())
            .spawn(move || read_input(&serial, &stopped))
            .map_err(|source| Error::Os { call: "spawn of the serial thread", source })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn read_input(serial: &Weak<Serial>, stop: &EventFd) {
    let stdin = std::io::stdin();
    let mut buffer = [0u8; 256];
    loop {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(stdin.as_fd().as_raw_fd()), poll(stop.as_raw_fd())];
        // SAFETY: the array is valid for the call and its length is given.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        if ready < 0 || fds[1].revents != 0 {
            return;
        }
        // SAFETY: the buffer is valid for its length; the descriptor is standard input.
        let read = unsafe {
            libc::read(stdin.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len())
        };
        let Ok(read @ 1..) = usize::try_from(read) else { return };
        let Some(serial) = serial.upgrade() else { return };
        serial.receive(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;

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

    /// A sink that never takes anything.
    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            loop {
                std::thread::park();
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_sink_that_blocks_holds_nobody() {
        let output = Output::start(Box::new(Stuck)).unwrap();
        (0..2 * OUTPUT_MAX_BYTES).for_each(|_| output.send(b'x'));
        assert!(output.queue.lock().bytes.len() <= OUTPUT_MAX_BYTES);
        drop(output);
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
