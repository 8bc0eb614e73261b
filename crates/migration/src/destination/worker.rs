//! The thread that works on machine state and vCPUs on the destination.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use switchover::Time;
use switchover::destination::Event;
use switchover::handover::DeviceTraits;
use switchover::message::{Attempt, Connection, Failure, Side};

use super::device::{Command as DeviceCommand, DeviceThread};
use super::{Input, Mailbox};
use crate::clock;
use crate::cost::{Account, Work};
use crate::hash::{hex, memory_digest};
use crate::vmm::{Section, Vmm, VmmError};

/// What the worker is told, in the order it does it.
pub(super) enum Command {
    /// Takes in memory that was handed over; the devices' traits come back with the answer.
    Adopt(Vec<OwnedFd>, Vec<DeviceTraits>),
    Apply(Vec<Section>),
    Wire,
    Start,
    Hash(Connection, Attempt),
    /// The attempt is rolled back: what was obtained for it outside is given up. Answered once everything
    /// before it is done.
    GiveUp(Sender<()>),
}

/// The worker, from outside; ends when dropped and its current call returns.
pub(super) struct Worker {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    step_ns: Arc<AtomicU64>,
}

impl Worker {
    pub(super) fn spawn(
        place: u64,
        vmm: Arc<dyn Vmm>,
        devices: Vec<DeviceThread>,
        device_ids: Vec<String>,
        mailbox: Mailbox,
        account: Account,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let step_ns = Arc::new(AtomicU64::new(0));
        let took = Arc::clone(&step_ns);
        let hands = Hands { place, vmm, devices, device_ids, mailbox, step_ns: took };
        let builder = std::thread::Builder::new().name("dst-vmm".into());
        let thread = builder.spawn(move || {
            let _joined = account.join(Work::Data);
            hands.run(&inbox);
        })?;
        Ok(Self { commands, thread, step_ns })
    }

    pub(super) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// How long the step that was just told of took.
    pub(super) fn last_step(&self) -> Time {
        Time(self.step_ns.load(Ordering::Relaxed))
    }

    /// Ends it, and waits for the call under way.
    pub(super) fn end(self) {
        drop(self.commands);
        // A panic there was printed there.
        let _ = self.thread.join();
    }
}

struct Hands {
    place: u64,
    vmm: Arc<dyn Vmm>,
    devices: Vec<DeviceThread>,
    device_ids: Vec<String>,
    mailbox: Mailbox,
    step_ns: Arc<AtomicU64>,
}

impl Hands {
    fn run(self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            let begin = clock::now();
            match command {
                Command::Adopt(files, traits) => {
                    let adopted = self.adopt(files).map_err(|error| error.what);
                    let answer = adopted.map(|()| clock::now().since(begin));
                    self.mailbox.send(Input::Adopted(self.place, traits, answer));
                }
                Command::Apply(sections) => {
                    let answer = self.apply(&sections).map_err(|e| failure(e, "loading state"));
                    self.took(begin);
                    self.tell(Event::MachineStateApplied(answer));
                }
                Command::Wire => {
                    // Committed: memory that was handed over is the guest's here.
                    let unlocked = self.vmm.memory().unlock().map_err(VmmError::from);
                    let arm =
                        |()| self.device_ids.iter().try_for_each(|id| self.vmm.rearm_device(id));
                    let answer = unlocked.and_then(arm).map_err(|e| failure(e, "arming devices"));
                    self.took(begin);
                    self.tell(Event::Wired(answer));
                }
                Command::Start => {
                    let answer = self.vmm.resume().map_err(|e| failure(e, "starting the vCPUs"));
                    self.took(begin);
                    self.tell(Event::Started(answer));
                    self.vmm.outside_resources().iter().for_each(|r| r.runs_here());
                }
                Command::GiveUp(reply) => {
                    self.vmm.outside_resources().iter().for_each(|r| r.give_up());
                    let _ = reply.send(());
                }
                Command::Hash(connection, attempt) => {
                    let (memory, devices) = self.hash();
                    let input = Input::Hashes(self.place, connection, attempt, memory, devices);
                    self.mailbox.send(input);
                }
            }
        }
    }

    fn adopt(&self, files: Vec<OwnedFd>) -> Result<(), VmmError> {
        self.vmm.memory().adopt(files)?;
        self.vmm.memory_replaced()
    }

    fn apply(&self, sections: &[Section]) -> Result<(), VmmError> {
        self.vmm.load_machine_state(sections)?;
        self.vmm.outside_resources().iter().try_for_each(|resource| resource.prepare())
    }

    /// Hashes made from scratch: nothing of what the migration counted or received is used.
    fn hash(&self) -> (String, Vec<Option<String>>) {
        let answers: Vec<_> = self
            .devices
            .iter()
            .map(|device| {
                let (reply, answer) = channel();
                device.tell(DeviceCommand::Digest(reply));
                answer
            })
            .collect();
        let memory = hex(&memory_digest(&self.vmm.memory()));
        let digest = |answer: Receiver<Option<[u8; 32]>>| answer.recv().ok().flatten();
        let devices = answers.into_iter().map(|a| digest(a).map(|d| hex(&d))).collect();
        (memory, devices)
    }

    fn took(&self, begin: Time) {
        self.step_ns.store(clock::now().since(begin).0, Ordering::Relaxed);
    }

    fn tell(&self, event: Event) {
        self.mailbox.send(Input::Event(self.place, event));
    }
}

fn failure(error: VmmError, doing: &str) -> Failure {
    let mut failure = Failure::new(Side::Destination, error.what);
    failure.call = Some(doing.to_owned());
    failure.errno = error.errno;
    failure
}
