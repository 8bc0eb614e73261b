//! The saved state of one vCPU: section `process-vcpu<n>`, kind [`KIND`], version [`VERSION`].
//!
//! | field | |
//! |---|---|
//! | u8 | phase: 0 power-on, 1 running, 2 halted |
//! | u8, u32, u32, u32 | command under way: 0 none, 1 await configuration, 2 await reset; device, generation, ticks |
//! | 4 × u64 | interrupt requests, by vector |
//!
//! All else that the guest knows lies in its memory.

use migration::{Section, SectionVersion};

use crate::error::{Error, Result};
use crate::process::cpu::{ACK_TICKS, CpuState, Phase, RESET_TICKS, Task};
use crate::process::interrupts::Requests;
use crate::section::{Reader, Writer};
use crate::workload::WORKLOAD_DEVICES_MAX;

/// Kind of the section.
pub const KIND: &str = "process-vcpu";
/// Version of the kind.
pub const VERSION: u32 = 1;

/// The section of vCPU `index`.
pub fn section(index: usize) -> SectionVersion {
    SectionVersion { name: format!("process-vcpu{index}"), kind: KIND.into(), version: VERSION }
}

/// Encodes the state of vCPU `index`.
pub fn encode(index: usize, state: &CpuState, requests: Requests) -> Section {
    let phase = match state.phase {
        Phase::PowerOn => 0,
        Phase::Running => 1,
        Phase::Halted => 2,
    };
    let (task, device, generation, ticks) = match state.task {
        Task::None => (0, 0, 0, 0),
        Task::AwaitAck { device, generation, ticks } => (1, device, generation, ticks),
        Task::AwaitReset { device, ticks } => (2, device, 0, ticks),
    };
    let mut writer = Writer::new();
    writer.u8(phase).u8(task).u32(device).u32(generation).u32(ticks);
    requests.iter().for_each(|&word| {
        writer.u64(word);
    });
    let SectionVersion { name, kind, version } = section(index);
    Section { name, kind, version, payload: writer.finish() }
}

/// Decodes the state of vCPU `index` out of `sections`.
pub fn decode(index: usize, sections: &[Section]) -> Result<(CpuState, Requests)> {
    let expected = section(index);
    let name = expected.name.as_str();
    let Some(section) = sections.iter().find(|section| section.name == name) else {
        return Err(Error::section(name, "it is missing"));
    };
    if section.kind != KIND || section.version != VERSION {
        let what = format!(
            "it is {} version {}, this host reads {KIND} version {VERSION}",
            section.kind, section.version
        );
        return Err(Error::section(name, what));
    }
    let mut reader = Reader::new(name, &section.payload);
    let phase = match reader.u8()? {
        0 => Phase::PowerOn,
        1 => Phase::Running,
        2 => Phase::Halted,
        phase => return Err(reader.error(format!("a phase of {phase}"))),
    };
    let (kind, device, generation, ticks) =
        (reader.u8()?, reader.u32()?, reader.u32()?, reader.u32()?);
    let task = match kind {
        0 => Task::None,
        1 if ticks <= ACK_TICKS => Task::AwaitAck { device, generation, ticks },
        2 if ticks <= RESET_TICKS => Task::AwaitReset { device, ticks },
        _ => return Err(reader.error(format!("a command {kind} of {ticks} ticks"))),
    };
    if device >= WORKLOAD_DEVICES_MAX as u32 {
        return Err(reader.error(format!("a command for device {device}")));
    }
    let requests = [reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?];
    reader.finish()?;
    Ok((CpuState { phase, task }, requests))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_went() {
        for task in [
            Task::None,
            Task::AwaitAck { device: 7, generation: 9, ticks: ACK_TICKS },
            Task::AwaitReset { device: 1, ticks: 1 },
        ] {
            for phase in [Phase::PowerOn, Phase::Running, Phase::Halted] {
                let state = CpuState { phase, task };
                let section = encode(3, &state, [1, 2, 3, u64::MAX]);
                assert_eq!(section.name, "process-vcpu3");
                assert_eq!(decode(3, &[section]).unwrap(), (state, [1, 2, 3, u64::MAX]));
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = encode(0, &CpuState::default(), [0; 4]);
        for cut in 0..good.payload.len() {
            let mut bad = good.clone();
            bad.payload.truncate(cut);
            assert!(decode(0, &[bad]).is_err(), "cut at {cut}");
        }
        for (at, value) in [(0, 3), (1, 3), (2, 8), (5, 1)] {
            let mut bad = good.clone();
            bad.payload[at] = value;
            assert!(decode(0, &[bad]).is_err(), "{value} at {at}");
        }
        let mut long = encode(
            0,
            &CpuState { phase: Phase::Running, task: Task::AwaitReset { device: 0, ticks: 1 } },
            [0; 4],
        );
        long.payload[12] = 1;
        assert!(decode(0, &[long]).is_err(), "more ticks than a reset takes");
        let mut later = good.clone();
        later.version = 2;
        assert!(decode(0, &[later]).is_err());
        assert!(decode(1, &[good]).is_err(), "missing");
    }
}
