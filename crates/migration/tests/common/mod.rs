//! What the tests of channels share: connected pairs, and a sink that keeps everything.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration::channel::{
    Address, ChannelError, DataReceiver, DataSender, DataSink, DeviceFrame, Listener,
    ReceivedTotals, Stream, connect,
};
use migration::{GuestMemory, RegionLayout, Section};
use switchover::message::{Attempt, Features};

pub const LIMIT: Duration = Duration::from_secs(20);
pub const PAGE: u64 = migration::PAGE_SIZE;
pub const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unix,
    Tcp,
}

/// Two connected ends: (source's, destination's).
pub fn pair(kind: Kind) -> (Stream, Stream) {
    let dir = tempfile::tempdir().unwrap();
    let address = match kind {
        Kind::Unix => Address::Unix(dir.path().join("socket")),
        Kind::Tcp => "tcp:127.0.0.1:0".parse().unwrap(),
    };
    let listener = Listener::bind(&address).unwrap();
    let source = connect(listener.local_address(), LIMIT).unwrap();
    let destination = listener.accept_timeout(LIMIT).unwrap().unwrap();
    (source, destination)
}

pub fn region(gpa: u64, len: u64) -> RegionLayout {
    RegionLayout { gpa, len }
}

pub fn memory(layout: &[RegionLayout]) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(layout).unwrap())
}

pub fn bytes_of(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.layout() {
        let mut bytes = vec![0; region.len as usize];
        memory.read(region.gpa, &mut bytes).unwrap();
        all.extend_from_slice(&bytes);
    }
    all
}

/// Bytes of memory that the host has to hold: holes are none.
pub fn allocated(memory: &GuestMemory) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = 0..memory.layout().len();
    let blocks = files.map(|i| {
        let fd = memory.region_fd(i).try_clone_to_owned().unwrap();
        std::fs::File::from(fd).metadata().unwrap().blocks()
    });
    blocks.sum::<u64>() * 512
}

#[derive(Debug, Default)]
pub struct Kept {
    pub frames: Mutex<Vec<DeviceFrame>>,
    pub sections: Mutex<Vec<(Attempt, u32, Section)>>,
}

impl DataSink for Kept {
    fn device(&self, frame: DeviceFrame) -> Result<(), ChannelError> {
        self.frames.lock().unwrap().push(frame);
        Ok(())
    }

    fn section(&self, attempt: Attempt, index: u32, section: Section) -> Result<(), ChannelError> {
        self.sections.lock().unwrap().push((attempt, index, section));
        Ok(())
    }
}

/// N data channels into one memory.
pub struct Link {
    pub senders: Vec<DataSender>,
    pub totals: Vec<Arc<ReceivedTotals>>,
    pub kept: Arc<Kept>,
    receivers: Vec<JoinHandle<Result<(), ChannelError>>>,
}

impl Link {
    pub fn new(kind: Kind, channels: usize, features: Features, memory: &Arc<GuestMemory>) -> Self {
        let kept = Arc::new(Kept::default());
        let (mut senders, mut totals, mut receivers) = (vec![], vec![], vec![]);
        for _ in 0..channels {
            let (source, destination) = pair(kind);
            senders.push(DataSender::new(source, features));
            let receiver = DataReceiver::new(destination, features, Arc::clone(memory));
            totals.push(receiver.totals());
            let kept = Arc::clone(&kept);
            receivers.push(thread::spawn(move || receiver.run(&*kept)));
        }
        Self { senders, totals, kept, receivers }
    }

    /// Ends the channels and returns how each receiver ended.
    pub fn finish(self) -> (Vec<Result<(), ChannelError>>, Arc<Kept>) {
        self.senders.iter().for_each(DataSender::shutdown);
        let ends = self.receivers.into_iter().map(|thread| thread.join().unwrap()).collect();
        (ends, self.kept)
    }

    /// Ends the channels; every receiver ended well and has what was sent.
    pub fn finish_well(self) -> Arc<Kept> {
        let sent: Vec<_> = self.senders.iter().map(DataSender::totals).collect();
        let totals = self.totals.clone();
        let (ends, kept) = self.finish();
        ends.into_iter().for_each(|end| end.unwrap());
        let received: Vec<_> = totals.iter().map(|totals| totals.end()).collect();
        assert_eq!(sent, received, "frames and bytes are the same on both sides");
        kept
    }
}
