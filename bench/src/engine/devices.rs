//! Device state: of many devices, in-process or behind sockets, while the guest runs or in the blackout.
//!
//! ```text
//!  in-process   memory ─copy─▶ device thread ─TCP─▶ channel thread ─queue─▶ device thread ─copy─▶ memory
//!  vfio-user    memory ─▶ server ─UNIX─▶ device thread ─TCP─▶ channel thread ─▶ device thread ─UNIX─▶ server ─▶ memory
//! ```
//!
//! The baseline carries the content of the same devices, over as many sockets, with a thread wherever one is named
//! above. Its buffers are of 1 MiB and go round; nothing is checked, and nobody asks. Neither side is pinned.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migration::{Incoming, IncomingConfig, Outgoing, OutgoingConfig, Vmm};
use switchover::Time;
use vfio_migration::MigratableDevice;
use vfio_user::{Options, RunningServer, ServedDevice, Server, ServerOptions, VfioUserDevice};

use super::bulk::{Bulk, Function};
use super::vm::StillVm;
use super::{Pair, tcp_pair};

const CHUNK: usize = 1 << 20;
/// Chunks that wait for a device of the destination; 8 MiB, as the engine allows.
const QUEUE: usize = 8;
/// Memory of the VM around the devices: nothing to speak of.
const MEMORY_BYTES: u64 = 16 << 20;

/// How a device is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Reach {
    /// In the process of the engine.
    InProcess,
    /// Behind a socket.
    VfioUser,
}

/// When their state is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// While the guest runs: the time is from the first read to the last write.
    Precopy,
    /// While it stands still: the time is the whole blackout.
    Blackout,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Number of devices.
    pub devices: usize,
    /// State of each, in bytes.
    pub bytes: usize,
    /// How they are reached.
    pub reach: Reach,
    /// When their state is carried.
    pub stage: Stage,
}

impl Setup {
    /// Both in turn, on the same devices.
    ///
    /// # Errors
    /// A migration failed, or what arrived is not what was sent.
    pub fn measure(&self, turns: usize) -> anyhow::Result<Pair> {
        let (here, there) = (self.fresh(1), self.fresh(1000));
        let mut times = Vec::new();
        for _ in 0..turns {
            renew(&here, &there);
            let (engine, channels) = self.engine(&here, &there)?;
            check(&here, &there).context("the engine")?;
            renew(&here, &there);
            let baseline = self.baseline(&here, &there, channels)?;
            check(&here, &there).context("the baseline")?;
            times.push((engine, baseline));
        }
        Ok(Pair::of(self.name(), (self.devices * self.bytes) as u64, &times))
    }

    fn name(&self) -> String {
        let reach = match self.reach {
            Reach::InProcess => "in-process",
            Reach::VfioUser => "vfio-user",
        };
        let stage = match self.stage {
            Stage::Precopy => "precopy",
            Stage::Blackout => "blackout",
        };
        let (number, mb) = (self.devices, self.bytes / 1_000_000);
        let plural = if number == 1 { "" } else { "s" };
        format!("{stage}, {number} device{plural} of {mb} MB, {reach}")
    }

    fn fresh(&self, seed: u64) -> Vec<Bulk> {
        let precopy = if self.stage == Stage::Precopy { self.bytes } else { 0 };
        let device = |place| Bulk::new(self.bytes, precopy, seed + place);
        (0..self.devices as u64).map(device).collect()
    }

    /// How long a migration with these devices took for their state, in ms, and how many data channels it had.
    fn engine(&self, here: &[Bulk], there: &[Bulk]) -> anyhow::Result<(f64, usize)> {
        let dir = tempfile::tempdir()?;
        let mut servers = Vec::new();
        let mut reach = |devices: &[Bulk], side: &str| -> anyhow::Result<_> {
            let mut handles: Vec<Arc<Mutex<dyn MigratableDevice>>> = Vec::new();
            for (place, device) in devices.iter().enumerate() {
                if self.reach == Reach::InProcess {
                    handles.push(Arc::new(Mutex::new(device.clone())));
                    continue;
                }
                let path = dir.path().join(format!("{side}{place}"));
                let (server, client) = serve(device, &path)?;
                servers.push(server);
                handles.push(Arc::new(Mutex::new(client.migration().map_err(anyhow::Error::new)?)));
            }
            StillVm::new(MEMORY_BYTES, handles)
        };
        let source = reach(here, "source")?;
        let destination = reach(there, "destination")?;
        let config = IncomingConfig::new("tcp:127.0.0.1:0".parse().map_err(anyhow::Error::msg)?);
        let incoming = Incoming::start(Arc::clone(&destination) as Arc<dyn Vmm>, config)?;
        let mut config = OutgoingConfig::new(incoming.local_address());
        config.brain.downtime_limit = Time::from_ms(60_000);
        let report = Outgoing::start(source as Arc<dyn Vmm>, config).wait();
        if report.status != "completed" {
            bail!("the migration {}: {:?}", report.status, report.failure);
        }
        incoming.wait_running().map_err(|failure| anyhow::anyhow!("{failure:?}"))?;
        let channels = report.ram.channels.max(1);
        let ms = match self.stage {
            Stage::Blackout => report.downtime_ms.context("no downtime in the report")?,
            Stage::Precopy => {
                let began = here.iter().filter_map(Bulk::streamed).map(|(first, _)| first).min();
                let ended = there.iter().filter_map(Bulk::streamed).map(|(_, last)| last).max();
                let (began, ended) = began.zip(ended).context("nothing was carried")?;
                ended.duration_since(began).as_secs_f64() * 1e3
            }
        };
        Ok((ms, channels.into()))
    }

    fn baseline(&self, here: &[Bulk], there: &[Bulk], channels: usize) -> anyhow::Result<f64> {
        let here: Vec<_> = here.iter().map(Bulk::lend).collect();
        let mut there: Vec<_> = there.iter().map(Bulk::lend).collect();
        let (mut sending, mut receiving) = (Vec::new(), Vec::new());
        for _ in 0..channels {
            let (one, other) = tcp_pair()?;
            sending.push(Mutex::new(one));
            receiving.push(other);
        }
        let start = Instant::now();
        thread::scope(|scope| {
            let (mut queues, mut spares) = (Vec::new(), Vec::new());
            for (device, target) in there.iter_mut().enumerate() {
                let (filled_sender, filled_receiver) = sync_channel::<Vec<u8>>(QUEUE);
                let (spare_sender, spare_receiver) = sync_channel::<Vec<u8>>(QUEUE + 2);
                for _ in 0..QUEUE + 2 {
                    let _ = spare_sender.send(vec![1; CHUNK]);
                }
                queues.push((device, filled_sender));
                spares.push((device, spare_receiver));
                let (reach, target) = (self.reach, target.bytes_mut());
                scope.spawn(move || take_in(reach, target, &filled_receiver, &spare_sender));
            }
            for (channel, socket) in receiving.into_iter().enumerate() {
                let part = |device: &usize| device % channels == channel;
                let queues: Vec<_> = queues.iter().filter(|q| part(&q.0)).cloned().collect();
                let mine;
                (mine, spares) = spares.into_iter().partition(|s: &(usize, _)| part(&s.0));
                scope.spawn(move || receive(socket, &queues, &mine));
            }
            drop(queues);
            let sending = &sending;
            let senders: Vec<_> = here
                .iter()
                .enumerate()
                .map(|(device, memory)| {
                    let (reach, memory) = (self.reach, memory.bytes());
                    scope
                        .spawn(move || give_out(reach, device, memory, &sending[device % channels]))
                })
                .collect();
            for sender in senders {
                let _ = sender.join();
            }
            for socket in sending {
                if let Ok(socket) = socket.lock() {
                    let _ = socket.shutdown(std::net::Shutdown::Write);
                }
            }
        });
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

/// Before a turn: nothing of what is to be carried is there yet.
fn renew(here: &[Bulk], there: &[Bulk]) {
    here.iter().for_each(|device| device.renew(false));
    there.iter().for_each(|device| device.renew(true));
}

fn check(here: &[Bulk], there: &[Bulk]) -> anyhow::Result<()> {
    match here.iter().zip(there).all(|(here, there)| here.equals(there)) {
        true => Ok(()),
        false => bail!("a device does not hold what was sent"),
    }
}

fn serve(device: &Bulk, path: &std::path::Path) -> anyhow::Result<(RunningServer, VfioUserDevice)> {
    let served = ServedDevice {
        migration: Some(Box::new(device.clone())),
        pci: Arc::new(Function::default()),
    };
    let server = Server::bind(path, ServerOptions::default())?.spawn(served)?;
    let options = Options {
        setup_timeout: Duration::from_secs(30),
        data_timeout: Some(Duration::from_secs(60)),
        ..Options::default()
    };
    Ok((server, VfioUserDevice::open(path, options)?))
}

/// A device thread of the source: its chunks, each behind the number of the device and its length.
fn give_out(
    reach: Reach,
    device: usize,
    memory: &[u8],
    socket: &Mutex<TcpStream>,
) -> anyhow::Result<()> {
    let mut buffer = vec![1; CHUNK];
    let send = |len: usize, buffer: &[u8]| -> anyhow::Result<()> {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&(device as u64).to_le_bytes());
        header[8..].copy_from_slice(&(len as u64).to_le_bytes());
        let mut socket = socket.lock().map_err(|_| anyhow::anyhow!("a sender panicked"))?;
        let parts = [std::io::IoSlice::new(&header), std::io::IoSlice::new(&buffer[..len])];
        let sent = socket.write_vectored(&parts)?;
        if sent < header.len() {
            bail!("a header was cut");
        }
        Ok(socket.write_all(&buffer[sent - header.len()..len])?)
    };
    if reach == Reach::InProcess {
        for chunk in memory.chunks(CHUNK) {
            buffer[..chunk.len()].copy_from_slice(chunk);
            send(chunk.len(), &buffer)?;
        }
        return Ok(());
    }
    let (mut server, mut client) = UnixStream::pair()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = vec![1; CHUNK];
            for chunk in memory.chunks(CHUNK) {
                buffer[..chunk.len()].copy_from_slice(chunk);
                if server.write_all(&buffer[..chunk.len()]).is_err() {
                    break;
                }
            }
        });
        for chunk in memory.chunks(CHUNK) {
            client.read_exact(&mut buffer[..chunk.len()])?;
            send(chunk.len(), &buffer)?;
        }
        Ok(())
    })
}

/// A channel thread of the destination.
fn receive(
    mut socket: TcpStream,
    queues: &[(usize, SyncSender<Vec<u8>>)],
    spares: &[(usize, Receiver<Vec<u8>>)],
) -> anyhow::Result<()> {
    let mut header = [0; 16];
    while socket.read_exact(&mut header).is_ok() {
        let word = |at: usize| -> u64 {
            header[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
        };
        let (device, len) = (word(0) as usize, word(8) as usize);
        let place = queues.iter().position(|queue| queue.0 == device).context("no such device")?;
        let mut buffer = spares[place].1.recv()?;
        buffer.resize(len, 0);
        socket.read_exact(&mut buffer)?;
        queues[place].1.send(buffer)?;
    }
    Ok(())
}

/// A device thread of the destination.
fn take_in(
    reach: Reach,
    mut memory: &mut [u8],
    queue: &Receiver<Vec<u8>>,
    spares: &SyncSender<Vec<u8>>,
) -> anyhow::Result<()> {
    if reach == Reach::InProcess {
        for buffer in queue {
            let (target, rest) = memory.split_at_mut(buffer.len());
            target.copy_from_slice(&buffer);
            memory = rest;
            let _ = spares.try_send(buffer);
        }
        return Ok(());
    }
    let (mut client, mut server) = UnixStream::pair()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = vec![1; CHUNK];
            for target in memory.chunks_mut(CHUNK) {
                let buffer = &mut buffer[..target.len()];
                if server.read_exact(buffer).is_err() {
                    break;
                }
                target.copy_from_slice(buffer);
            }
        });
        for buffer in queue {
            client.write_all(&buffer)?;
            let _ = spares.try_send(buffer);
        }
        Ok(())
    })
}
