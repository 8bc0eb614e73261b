//! A digest of guest memory that knows nothing of a migration's bitmaps and buffers.
//!
//! BLAKE3 over the layout and, for every 2 MiB of every region, the BLAKE3 of its bytes; so that all cores
//! work on it, and holes cost nothing:
//!
//! ```text
//! digest = blake3("vmferry-memory-1" ‖ regions u64 ‖ (gpa u64 ‖ len u64)… ‖ blake3(chunk)…)     little endian
//! ```

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::bitmap::DirtyBitmap;
use crate::cost::{Account, Held};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::ram::data_extents;

const DOMAIN: &[u8] = b"vmferry-memory-1";
const CHUNK: u64 = 2 << 20;

/// The digest of all guest memory, from scratch. Holes are zero, and stay holes. Means something only
/// while nobody writes.
pub fn memory_digest(memory: &GuestMemory) -> [u8; 32] {
    let layout = memory.layout();
    let mut digest = blake3::Hasher::new();
    digest.update(DOMAIN);
    digest.update(&(layout.len() as u64).to_le_bytes());
    let mut chunks = Vec::new();
    // Looked for once, and kept as a bit per page: as extents it would take as much as a guest likes to make of it.
    let mut data = DirtyBitmap::new(&layout);
    for (region, place) in layout.iter().enumerate() {
        for extent in data_extents(memory.region_fd(region), 0..place.len) {
            data.set_range(place.gpa + extent.start, extent.end - extent.start);
        }
        digest.update(&place.gpa.to_le_bytes());
        digest.update(&place.len.to_le_bytes());
        for offset in (0..place.len).step_by(CHUNK as usize) {
            let len = CHUNK.min(place.len - offset);
            chunks.push(Chunk { region, gpa: place.gpa + offset, offset, len });
        }
    }
    let _held = Held::new(data.bytes() + (chunks.len() * (size_of::<Chunk>() + 32)) as u64);
    for chunk in hash_chunks(memory, &data, &chunks) {
        digest.update(&chunk);
    }
    *digest.finalize().as_bytes()
}

/// A digest as text.
pub fn hex(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::with_capacity(2 * digest.len()), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

struct Chunk {
    region: usize,
    gpa: u64,
    offset: u64,
    len: u64,
}

fn hash_chunks(memory: &GuestMemory, data: &DirtyBitmap, chunks: &[Chunk]) -> Vec<[u8; 32]> {
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(chunks.len());
    let next = AtomicUsize::new(0);
    let digests = Mutex::new(vec![[0; 32]; chunks.len()]);
    let zero = *blake3::hash(&vec![0; CHUNK as usize]).as_bytes();
    let mine = Account::mine();
    let work = |helps: bool| {
        let _joined = mine.as_ref().filter(|_| helps).map(|(account, work)| account.join(*work));
        let _held = Held::new(CHUNK);
        let mut buffer = vec![0; CHUNK as usize];
        while let Some((index, chunk)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            chunks.get(index).map(|chunk| (index, chunk))
        } {
            let digest = hash_chunk(memory, data, chunk, &mut buffer, &zero);
            digests.lock().unwrap_or_else(PoisonError::into_inner)[index] = digest;
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where there is no thread to be had, the others do the work.
            let _ = thread::Builder::new()
                .name("vmferry-hash".into())
                .spawn_scoped(scope, || work(true));
        }
        work(false);
    });
    digests.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn hash_chunk(
    memory: &GuestMemory,
    data: &DirtyBitmap,
    chunk: &Chunk,
    buffer: &mut [u8],
    zero: &[u8; 32],
) -> [u8; 32] {
    let bytes = &mut buffer[..chunk.len as usize];
    let mut hole = true;
    let pages = chunk.offset / PAGE_SIZE..(chunk.offset + chunk.len) / PAGE_SIZE;
    for (page, count) in data.runs_in(chunk.region, pages) {
        if hole {
            bytes.fill(0);
            hole = false;
        }
        let first = page * PAGE_SIZE - chunk.offset;
        let end = first + count * PAGE_SIZE;
        let read = memory.read(chunk.gpa + first, &mut bytes[first as usize..end as usize]);
        debug_assert!(read.is_ok(), "chunks are made from the layout");
    }
    if !hole {
        return *blake3::hash(bytes).as_bytes();
    }
    if chunk.len == CHUNK {
        return *zero;
    }
    bytes.fill(0);
    *blake3::hash(bytes).as_bytes()
}
