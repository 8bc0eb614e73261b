//! Booting a PVH kernel: an ELF with a note that names a 32-bit entry point.
//!
//! The boot protocol is Xen's (`docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`):
//! the ELF's note `Xen`, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), holds the physical entry address; the CPU
//! enters in 32-bit protected mode without paging, EBX pointing to the start information. A 64-bit ELF
//! is entered in the same way.
//!
//! ```text
//!  0x0500  GDT      0x1000  start info, memory map      0x2000  command line
//!  0x6000, 0x7000   the workload's pages                0x10_0000 …  the kernel
//! ```

use std::io::{Read, Seek, SeekFrom};

use migration::GuestMemory;
use zerocopy::IntoBytes;

use crate::layout::{HIGH_RAM_START, IOAPIC_ADDR};

const GDT_ADDR: u64 = 0x500;
const START_INFO_ADDR: u64 = 0x1000;
const MEMORY_MAP_ADDR: u64 = 0x1100;
const COMMAND_LINE_ADDR: u64 = 0x2000;
/// Longest command line, in bytes.
pub(crate) const COMMAND_LINE_MAX: usize = 0x1000 - 1;
/// Where a kernel may lie: behind the first MiB.
const KERNEL_START: u64 = 0x10_0000;
/// End of conventional memory; what follows up to 1 MiB belongs to the firmware on a PC.
const LOW_RAM_END: u64 = 0x9_fc00;

const PHNUM_MAX: u16 = 256;
const NOTES_MAX_BYTES: u64 = 64 << 10;
const COPY_BYTES: usize = 1 << 20;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const NOTE_PHYS32_ENTRY: u32 = 18;
const START_MAGIC: u32 = 0x336e_c578;
const MEMORY_MAP_RAM: u32 = 1;
const MEMORY_MAP_RESERVED: u32 = 2;

/// Where the first vCPU begins, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Physical address of the first instruction.
    pub entry: u32,
    /// Physical address of the start information.
    pub start_info: u32,
    /// Physical address of a GDT: null, code (0x08), data (0x10), task (0x18).
    pub gdt_base: u32,
    /// Its limit.
    pub gdt_limit: u16,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum PvhError {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It is not what it should be.
    #[error("{0}")]
    Format(String),
    /// It does not fit into guest memory.
    #[error(transparent)]
    Memory(#[from] migration::MemoryError),
}

type Result<T> = std::result::Result<T, PvhError>;

fn refuse<T>(what: impl Into<String>) -> Result<T> {
    Err(PvhError::Format(what.into()))
}

/// Loads `kernel` and what it is told at the start into `memory`.
pub fn load(
    kernel: &mut (impl Read + Seek),
    command_line: &str,
    memory: &GuestMemory,
) -> Result<Boot> {
    let entry = load_elf(kernel, memory)?;
    write_start_info(command_line, memory)?;
    Ok(Boot {
        entry,
        start_info: START_INFO_ADDR as u32,
        gdt_base: GDT_ADDR as u32,
        gdt_limit: write_gdt(memory)?,
    })
}

/// One program header, of either class.
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn load_elf(kernel: &mut (impl Read + Seek), memory: &GuestMemory) -> Result<u32> {
    let segments = segments(kernel)?;
    let mut entry = None;
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        entry = entry.or(entry_note(kernel, segment)?);
    }
    let Some(entry) = entry else {
        return refuse("no PVH entry: the note Xen, type 18, is missing (Linux: CONFIG_PVH)");
    };
    let mut loaded = false;
    let mut entry_loaded = false;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_bytes > 0) {
        load_segment(kernel, segment, memory)?;
        loaded = true;
        entry_loaded |=
            (segment.paddr..segment.paddr + segment.memory_bytes).contains(&entry.into());
    }
    match (loaded, entry_loaded) {
        (false, _) => refuse("nothing to load"),
        (_, false) => refuse(format!("the entry {entry:#x} is in no loaded segment")),
        _ => Ok(entry),
    }
}

fn segments(kernel: &mut (impl Read + Seek)) -> Result<Vec<Segment>> {
    let mut ident = [0; 16];
    // The magic first: a file of a few bytes is no ELF either.
    let _ = read_at(kernel, 0, &mut ident[..4]);
    if ident[..4] != *b"\x7fELF" {
        return refuse("not an ELF file (of Linux, take vmlinux, not bzImage)");
    }
    read_at(kernel, 0, &mut ident)?;
    let wide = match (ident[4], ident[5]) {
        (1, 1) => false,
        (2, 1) => true,
        _ => return refuse("not a little-endian ELF of 32 or 64 bits"),
    };
    let mut header = [0; 64];
    let header_bytes = if wide { 64 } else { 52 };
    read_at(kernel, 0, &mut header[..header_bytes])?;
    let machine = u16_at(&header, 18);
    if machine != if wide { EM_X86_64 } else { EM_386 } {
        return refuse(format!("an ELF for machine {machine}, not x86"));
    }
    let (table, entry_bytes, count) = if wide {
        (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56))
    } else {
        (u32_at(&header, 28).into(), u16_at(&header, 42), u16_at(&header, 44))
    };
    let expected = if wide { 56 } else { 32 };
    if entry_bytes != expected || count == 0 || count > PHNUM_MAX {
        return refuse(format!("{count} program headers of {entry_bytes} bytes"));
    }
    let mut headers = vec![0; usize::from(count) * usize::from(expected)];
    read_at(kernel, table, &mut headers)?;
    let parse = |h: &[u8]| match wide {
        true => Segment {
            kind: u32_at(h, 0),
            offset: u64_at(h, 8),
            paddr: u64_at(h, 24),
            file_bytes: u64_at(h, 32),
            memory_bytes: u64_at(h, 40),
        },
        false => Segment {
            kind: u32_at(h, 0),
            offset: u32_at(h, 4).into(),
            paddr: u32_at(h, 12).into(),
            file_bytes: u32_at(h, 16).into(),
            memory_bytes: u32_at(h, 20).into(),
        },
    };
    Ok(headers.chunks_exact(expected.into()).map(parse).collect())
}

/// The entry address, if this segment of notes has it.
fn entry_note(kernel: &mut (impl Read + Seek), segment: &Segment) -> Result<Option<u32>> {
    if segment.file_bytes > NOTES_MAX_BYTES {
        return refuse(format!("{} bytes of notes", segment.file_bytes));
    }
    let mut notes = vec![0; segment.file_bytes as usize];
    read_at(kernel, segment.offset, &mut notes)?;
    let mut rest = &notes[..];
    while rest.len() >= 12 {
        let (name_bytes, value_bytes) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
        let kind = u32_at(rest, 8);
        let body = &rest[12..];
        // Name and value are padded to 4 bytes each.
        let (Some(name_end), Some(value_len)) =
            (name_bytes.checked_next_multiple_of(4), value_bytes.checked_next_multiple_of(4))
        else {
            return refuse("a note that is longer than its segment");
        };
        let (Some(name), Some(value)) = (
            body.get(..name_bytes),
            body.get(name_end..).and_then(|values| values.get(..value_bytes)),
        ) else {
            return refuse("a note that is longer than its segment");
        };
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match value.len() {
                4 => Ok(Some(u32_at(value, 0))),
                8 => match u32::try_from(u64_at(value, 0)) {
                    Ok(entry) => Ok(Some(entry)),
                    Err(_) => refuse("a PVH entry above 4 GiB"),
                },
                len => refuse(format!("a PVH entry note of {len} bytes")),
            };
        }
        rest = body[name_end..].get(value_len..).unwrap_or_default();
    }
    Ok(None)
}

fn load_segment(
    kernel: &mut (impl Read + Seek),
    segment: &Segment,
    memory: &GuestMemory,
) -> Result<()> {
    if segment.file_bytes > segment.memory_bytes {
        return refuse("a segment that is longer in the file than in memory");
    }
    let end = segment.paddr.checked_add(segment.memory_bytes);
    let (Some(end), true) = (end, segment.paddr >= KERNEL_START) else {
        return refuse(format!("a segment at {:#x}, below 1 MiB", segment.paddr));
    };
    // Refuses the whole segment before anything of it is written.
    memory.untracked_addr(segment.paddr, segment.memory_bytes)?;
    kernel.seek(SeekFrom::Start(segment.offset))?;
    let mut buffer = vec![0; COPY_BYTES.min(segment.memory_bytes as usize)];
    let file_end = segment.paddr + segment.file_bytes;
    let mut at = segment.paddr;
    while at < file_end {
        let len = (file_end - at).min(buffer.len() as u64) as usize;
        kernel.read_exact(&mut buffer[..len])?;
        memory.write(at, &buffer[..len])?;
        at += len as u64;
    }
    buffer.fill(0);
    while at < end {
        let len = (end - at).min(buffer.len() as u64) as usize;
        memory.write(at, &buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// The start information (`struct hvm_start_info`, version 1), the memory map and the command line.
fn write_start_info(command_line: &str, memory: &GuestMemory) -> Result<()> {
    if command_line.len() > COMMAND_LINE_MAX || command_line.contains('\0') {
        return refuse(format!("a command line of {} bytes, or with NUL", command_line.len()));
    }
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory.write(COMMAND_LINE_ADDR, &line)?;

    let map = memory_map(memory);
    let mut entries = Vec::with_capacity(map.len() * 24);
    for (addr, size, kind) in &map {
        entries.extend_from_slice([*addr, *size].as_bytes());
        entries.extend_from_slice([*kind, 0].as_bytes());
    }
    memory.write(MEMORY_MAP_ADDR, &entries)?;

    let mut info = Vec::with_capacity(56);
    // magic, version, flags, nr_modules
    info.extend_from_slice([START_MAGIC, 1, 0, 0].as_bytes());
    // modlist, cmdline, rsdp, memory map
    info.extend_from_slice([0, COMMAND_LINE_ADDR, 0, MEMORY_MAP_ADDR].as_bytes());
    // entries, reserved
    info.extend_from_slice([map.len() as u32, 0].as_bytes());
    memory.write(START_INFO_ADDR, &info)?;
    Ok(())
}

/// Ranges as (address, bytes, kind).
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END, MEMORY_MAP_RAM),
        (LOW_RAM_END, KERNEL_START - LOW_RAM_END, MEMORY_MAP_RESERVED),
    ];
    for region in memory.layout() {
        let start = region.gpa.max(KERNEL_START);
        if let Some(len) = (region.gpa + region.len).checked_sub(start) {
            map.push((start, len, MEMORY_MAP_RAM));
        }
    }
    map.push((IOAPIC_ADDR, HIGH_RAM_START - IOAPIC_ADDR, MEMORY_MAP_RESERVED));
    map
}

fn write_gdt(memory: &GuestMemory) -> Result<u16> {
    // Null, 32-bit code, data, task; flat.
    const GDT: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    memory.write(GDT_ADDR, GDT.as_bytes())?;
    Ok(size_of_val(&GDT) as u16 - 1)
}

fn read_at(file: &mut (impl Read + Seek), offset: u64, into: &mut [u8]) -> Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    Ok(file.read_exact(into)?)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// Callers have checked the length; a mistake of theirs reads as zero.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use migration::RegionLayout;
    use proptest::prelude::*;

    use super::*;
    use crate::workload::pvh_elf;

    const CODE: &[u8] = b"\xf4code";
    const BASE: u32 = 0x20_0000;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[RegionLayout { gpa: 0, len: 16 << 20 }]).unwrap()
    }

    fn boot(elf: Vec<u8>) -> Result<Boot> {
        load(&mut Cursor::new(elf), "", &memory())
    }

    /// A 64-bit ELF with `code` at `base` and an 8-byte note behind another one.
    fn elf64(code: &[u8], base: u64) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend_from_slice([2u16, EM_X86_64].as_bytes());
        elf.extend_from_slice(1u32.as_bytes());
        elf.extend_from_slice([0xffff_ffff_8000_0000u64, 64, 0].as_bytes());
        elf.extend_from_slice(0u32.as_bytes());
        elf.extend_from_slice([64u16, 56, 2, 64, 0, 0].as_bytes());
        let notes_at = 64 + 2 * 56;
        let len = code.len() as u64;
        elf.extend_from_slice([PT_LOAD, 7].as_bytes());
        elf.extend_from_slice(
            [0x200u64, 0xffff_ffff_8000_0000, base, len, len + 100, 8].as_bytes(),
        );
        elf.extend_from_slice([PT_NOTE, 4].as_bytes());
        elf.extend_from_slice([notes_at, 0, 0, 44, 44, 4u64].as_bytes());
        elf.extend_from_slice([4u32, 1, 6].as_bytes());
        elf.extend_from_slice(b"Xen\0?\0\0\0");
        elf.extend_from_slice([4u32, 8, NOTE_PHYS32_ENTRY].as_bytes());
        elf.extend_from_slice(b"Xen\0");
        elf.extend_from_slice(base.as_bytes());
        elf.resize(0x200, 0);
        elf.extend_from_slice(code);
        elf
    }

    #[test]
    fn a_64_bit_kernel_is_entered_by_its_note_and_its_tail_is_zeroed() {
        let memory = memory();
        memory.write(u64::from(BASE), &[0xaa; 200]).unwrap();
        let boot = load(&mut Cursor::new(elf64(CODE, BASE.into())), "root=none", &memory).unwrap();
        assert_eq!(boot.entry, BASE);
        let mut loaded = [0; 106];
        memory.read(BASE.into(), &mut loaded).unwrap();
        assert_eq!(loaded[..CODE.len()], *CODE);
        assert_eq!(loaded[CODE.len()..105], [0; 100]);
        assert_eq!(loaded[105], 0xaa, "not a byte beyond the segment");
    }

    #[test]
    fn the_start_information_has_memory_map_and_command_line() {
        let layout = [
            RegionLayout { gpa: 0, len: 16 << 20 },
            RegionLayout { gpa: HIGH_RAM_START, len: 1 << 20 },
        ];
        let memory = GuestMemory::new(&layout).unwrap();
        let boot = load(&mut Cursor::new(pvh_elf(CODE, BASE)), "console=ttyS0", &memory).unwrap();
        let mut info = [0; 56];
        memory.read(boot.start_info.into(), &mut info).unwrap();
        assert_eq!(u32_at(&info, 0), START_MAGIC);
        assert_eq!(u32_at(&info, 4), 1);
        let mut line = [0; 14];
        memory.read(u64_at(&info, 24), &mut line).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let mut map = vec![0; 24 * u32_at(&info, 48) as usize];
        memory.read(u64_at(&info, 40), &mut map).unwrap();
        let ram: Vec<_> = map
            .chunks_exact(24)
            .filter(|entry| u32_at(entry, 16) == MEMORY_MAP_RAM)
            .map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
            .collect();
        let expected = [(0, LOW_RAM_END), (KERNEL_START, 15 << 20), (HIGH_RAM_START, 1 << 20)];
        assert_eq!(ram, expected);
    }

    #[test]
    fn what_cannot_be_booted_is_refused_with_the_reason() {
        let good = pvh_elf(CODE, BASE);
        let changed = |at: usize, bytes: &[u8]| {
            let mut elf = good.clone();
            elf[at..at + bytes.len()].copy_from_slice(bytes);
            elf
        };
        const LOAD: usize = 52;
        const NOTE_HEADER: usize = LOAD + 32;
        const NOTES: usize = NOTE_HEADER + 32;
        let cases: [(&str, Vec<u8>, &str); 12] = [
            ("empty", Vec::new(), "not an ELF"),
            ("bzImage", b"MZ".repeat(100), "not an ELF"),
            ("big endian", changed(5, &[2]), "little-endian"),
            ("for another machine", changed(18, &[40]), "machine 40"),
            ("no program headers", changed(44, &[0]), "program headers"),
            ("65535 program headers", changed(44, &[0xff, 0xff]), "program headers"),
            ("no note", changed(NOTES + 8, &[17]), "PVH"),
            ("a note for others", changed(NOTES + 12, b"Lin\0"), "PVH"),
            ("a note longer than its segment", changed(NOTES + 4, &[0xff; 4]), "longer"),
            ("huge notes", changed(NOTE_HEADER + 16, &[0, 0, 0, 0x7f]), "notes"),
            ("below 1 MiB", changed(LOAD + 12, &[0, 0x70, 0, 0]), "below 1 MiB"),
            ("an entry elsewhere", changed(NOTES + 16, &[0, 0, 0x70, 0]), "no loaded segment"),
        ];
        for (what, elf, reason) in cases {
            let error = boot(elf).expect_err(what).to_string();
            assert!(error.contains(reason), "{what}: {error}");
        }
        let outside = changed(LOAD + 20, &[0, 0, 0, 0x10]);
        assert!(matches!(boot(outside), Err(PvhError::Memory(_))), "larger than memory");
        assert!(boot(good).is_ok());
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = memory();
        let elf = pvh_elf(CODE, BASE);
        for line in ["x".repeat(COMMAND_LINE_MAX + 1), "a\0b".into()] {
            assert!(load(&mut Cursor::new(elf.clone()), &line, &memory).is_err());
        }
        let longest = "x".repeat(COMMAND_LINE_MAX);
        assert!(load(&mut Cursor::new(elf), &longest, &memory).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the file says: an answer, no panic, nothing beyond guest memory.
        #[test]
        fn any_file_is_answered(
            wide in any::<bool>(),
            changes in proptest::collection::vec((0usize..0x240, any::<u8>()), 0..12),
            cut in 0usize..0x1100,
        ) {
            let mut elf = if wide { elf64(CODE, BASE.into()) } else { pvh_elf(CODE, BASE) };
            for (at, byte) in changes {
                if let Some(place) = elf.get_mut(at) {
                    *place = byte;
                }
            }
            elf.truncate(elf.len().max(cut) - cut.min(elf.len()) / 2);
            let _ = boot(elf);
        }
    }
}
