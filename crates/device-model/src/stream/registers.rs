//! The REGISTERS payload: registers, counters, pending interrupts.

use crate::internals::{Geometry, Registers};
use crate::irq::{MSIX_MASK, Pending};
use crate::regs;

/// Length of the payload in bytes.
pub(crate) const REGISTERS_BYTES: usize = 8 * 4 + 6 * 8 + 8;

/// Appends the payload to `out`.
pub(crate) fn encode(out: &mut Vec<u8>, regs: &Registers, pending: Pending) {
    let Registers {
        control,
        status,
        config_kib,
        dma_addr,
        dma_pages,
        dma_rate,
        vector,
        fill_kib,
        scratch,
        completed,
        raised,
        owed,
        irq_owed,
        fills,
        fill_cursor,
    } = *regs;
    for word in [control, status, config_kib, dma_pages, dma_rate, vector, fill_kib, scratch] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for word in [dma_addr, completed, raised, owed, fills, fill_cursor] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    let flags = [u8::from(irq_owed), pending.msix, u8::from(pending.intx), 0, 0, 0, 0, 0];
    out.extend_from_slice(&flags);
}

/// Parses the payload; `Err` says what cannot be.
pub(crate) fn decode(bytes: &[u8], geometry: &Geometry) -> Result<(Registers, Pending), String> {
    if bytes.len() != REGISTERS_BYTES {
        return Err(format!("{} bytes of registers, not {REGISTERS_BYTES}", bytes.len()));
    }
    let (words, rest) = bytes.split_at(8 * 4);
    let (longs, flags) = rest.split_at(6 * 8);
    let mut words =
        words.chunks_exact(4).map(|w| w.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b)));
    let mut longs =
        longs.chunks_exact(8).map(|w| w.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
    let mut word = || words.next().unwrap_or(0);
    let mut long = || longs.next().unwrap_or(0);
    let (control, status, config_kib, dma_pages) = (word(), word(), word(), word());
    let (dma_rate, vector, fill_kib, scratch) = (word(), word(), word(), word());
    let (dma_addr, completed, raised) = (long(), long(), long());
    let (owed, fills, fill_cursor) = (long(), long(), long());
    let known_control = regs::CONTROL_DMA | regs::CONTROL_IRQ;
    let known_status = regs::STATUS_RECONFIGURED | regs::STATUS_DMA_FAILED;
    let checks = [
        ("CONTROL", control & !known_control == 0),
        ("STATUS", status & !known_status == 0),
        ("CONFIG_KIB", config_kib <= geometry.initial_max_kib),
        ("DMA_RATE", dma_rate <= regs::DMA_RATE_MAX),
        ("VECTOR", vector < regs::MSIX_VECTORS),
        ("the fill cursor", fill_cursor < geometry.blocks().max(1)),
        ("a flag", flags.iter().zip([1, MSIX_MASK, 1, 0, 0, 0, 0, 0]).all(|(f, m)| f & !m == 0)),
    ];
    if let Some((name, _)) = checks.iter().find(|(_, holds)| !holds) {
        return Err(format!("{name} holds an impossible value"));
    }
    let flag = |at: usize| flags.get(at).copied().unwrap_or(0);
    let registers = Registers {
        control,
        status,
        config_kib,
        dma_addr,
        dma_pages,
        dma_rate,
        vector,
        fill_kib,
        scratch,
        completed,
        raised,
        owed,
        irq_owed: flag(0) != 0,
        fills,
        fill_cursor,
    };
    Ok((registers, Pending { msix: flag(1), intx: flag(2) != 0 }))
}
