//! The host's side of the mailbox: commands to the guest, its counters.

use migration::GuestMemory;

use super::{MAILBOX, MAILBOX_MAGIC, WORKLOAD_DEVICES_MAX, WORKLOAD_VCPUS_MAX};
use crate::error::{Error, Result};

const CMD_SEQ: u64 = 0x04;
const CMD: u64 = 0x08;
const ACK_SEQ: u64 = 0x20;
const RESULT: u64 = 0x24;
const IRQS: u64 = 0x40;
const VCPUS: u64 = 0x200;

/// A command and its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reconfigure device `device` to generation `generation` of `kib` KiB.
    Reconfigure {
        /// Device index.
        device: u32,
        /// New generation.
        generation: u32,
        /// Size of the configuration in KiB.
        kib: u32,
    },
    /// Dirty so many pages per second; 0 = none, `u32::MAX` = as fast as it can.
    SetDirtyRate {
        /// Of all vCPUs together.
        pages_per_s: u32,
    },
    /// `stamps` DMA stamps, then interrupt `vector`.
    RingDoorbell {
        /// Device index.
        device: u32,
        /// Number of stamps.
        stamps: u32,
        /// MSI-X vector, 0 to 3.
        vector: u32,
    },
    /// Reset a device by FLR and set it up anew.
    ResetDevice {
        /// Device index.
        device: u32,
    },
    /// Power off.
    PowerOff,
    /// Rewrite `kib` KiB of a device's bulk state.
    FillDevice {
        /// Device index.
        device: u32,
        /// KiB to rewrite.
        kib: u32,
    },
    /// Triple fault.
    TripleFault,
    /// Reset the machine.
    ResetMachine,
    /// Mask or unmask an MSI-X vector in the table.
    MaskVector {
        /// Device index.
        device: u32,
        /// Vector, 0 to 3.
        vector: u32,
        /// Masked.
        masked: bool,
    },
    /// Background DMA; 0 = off.
    SetDmaRate {
        /// Device index.
        device: u32,
        /// Stamps per second.
        stamps_per_s: u32,
    },
    /// MSI-X or INTx.
    SetInterruptMode {
        /// Device index.
        device: u32,
        /// MSI-X; `false`: INTx.
        msix: bool,
    },
}

impl Command {
    /// Number and arguments, as the mailbox has them.
    pub fn words(self) -> [u32; 4] {
        match self {
            Self::Reconfigure { device, generation, kib } => [1, device, generation, kib],
            Self::SetDirtyRate { pages_per_s } => [2, pages_per_s, 0, 0],
            Self::RingDoorbell { device, stamps, vector } => [3, device, stamps, vector],
            Self::ResetDevice { device } => [4, device, 0, 0],
            Self::PowerOff => [5, 0, 0, 0],
            Self::FillDevice { device, kib } => [6, device, kib, 0],
            Self::TripleFault => [7, 0, 0, 0],
            Self::ResetMachine => [8, 0, 0, 0],
            Self::MaskVector { device, vector, masked } => [9, device, vector, masked.into()],
            Self::SetDmaRate { device, stamps_per_s } => [10, device, stamps_per_s, 0],
            Self::SetInterruptMode { device, msix } => [11, device, msix.into(), 0],
        }
    }
}

/// What the guest counts for one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceInterrupts {
    /// Interrupts taken in all.
    pub total: u32,
    /// By MSI-X vector.
    pub vectors: [u32; 4],
    /// By INTx.
    pub intx: u32,
}

/// What the guest counts for one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuCounters {
    /// Page writes.
    pub writes: u64,
    /// Timer interrupts.
    pub ticks: u32,
}

/// What the guest counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counters {
    /// The guest is up.
    pub running: bool,
    /// Stamps that did not hold.
    pub errors: u32,
    /// Page writes.
    pub writes: u64,
    /// Heartbeats.
    pub beats: u32,
    /// Devices found and set up.
    pub devices: u32,
    /// Timer interrupts.
    pub timer_ticks: u32,
    /// By device.
    pub interrupts: Vec<DeviceInterrupts>,
    /// By vCPU, those that have ticked or written.
    pub vcpus: Vec<VcpuCounters>,
}

/// Reads the counters. The guest goes on counting: values of different fields may be of different moments.
pub fn counters(memory: &GuestMemory) -> Result<Counters> {
    let u32_at = |offset| u32_at(memory, offset);
    let u64_at = |offset| -> Result<u64> {
        loop {
            let high = u32_at(offset + 4)?;
            let low = u32_at(offset)?;
            if u32_at(offset + 4)? == high {
                return Ok(u64::from(high) << 32 | u64::from(low));
            }
        }
    };
    let devices = u32_at(0x38)?;
    let mut interrupts = Vec::new();
    for device in 0..u64::from(devices.min(WORKLOAD_DEVICES_MAX as u32)) {
        let at = IRQS + 32 * device;
        interrupts.push(DeviceInterrupts {
            total: u32_at(at)?,
            vectors: [u32_at(at + 4)?, u32_at(at + 8)?, u32_at(at + 12)?, u32_at(at + 16)?],
            intx: u32_at(at + 20)?,
        });
    }
    let mut vcpus = Vec::new();
    for vcpu in 0..u64::from(WORKLOAD_VCPUS_MAX) {
        let at = VCPUS + 16 * vcpu;
        let counters = VcpuCounters { writes: u64_at(at)?, ticks: u32_at(at + 8)? };
        if counters != VcpuCounters::default() {
            vcpus.push(counters);
        }
    }
    Ok(Counters {
        running: u32_at(0)? == MAILBOX_MAGIC,
        errors: u32_at(0x28)?,
        writes: u64_at(0x2c)?,
        beats: u32_at(0x34)?,
        devices,
        timer_ticks: u32_at(0x3c)?,
        interrupts,
        vcpus,
    })
}

/// Posts `command`; answers the number to wait for. Refused while another one is not answered.
pub fn post(memory: &GuestMemory, command: Command) -> Result<u32> {
    if u32_at(memory, 0)? != MAILBOX_MAGIC {
        return Err(Error::Guest("the workload is not up".into()));
    }
    let last = u32_at(memory, CMD_SEQ)?;
    if u32_at(memory, ACK_SEQ)? != last {
        return Err(Error::Guest("it has not answered the last command yet".into()));
    }
    for (at, word) in (CMD..).step_by(4).zip(command.words()) {
        memory.write(at + MAILBOX, &word.to_le_bytes())?;
    }
    let sequence = last.wrapping_add(1);
    // The guest reads command and arguments once it sees this.
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
    memory.write(MAILBOX + CMD_SEQ, &sequence.to_le_bytes())?;
    Ok(sequence)
}

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Not answered yet.
    None,
    /// Answered with this result.
    Result(u32),
    /// The mailbox was emptied by a reset of the machine.
    Forgotten,
}

/// The guest's answer to the command `sequence`, if it is there.
pub fn answer(memory: &GuestMemory, sequence: u32) -> Result<Answer> {
    if u32_at(memory, CMD_SEQ)? != sequence {
        return Ok(Answer::Forgotten);
    }
    if u32_at(memory, ACK_SEQ)? != sequence {
        return Ok(Answer::None);
    }
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
    u32_at(memory, RESULT).map(Answer::Result)
}

/// What a result means.
pub fn result_name(result: u32) -> &'static str {
    match result {
        0 => "done",
        1 => "unknown command",
        2 => "no such device or vector",
        3 => "the device did not answer",
        4 => "the device's server is gone",
        _ => "unknown result",
    }
}

fn u32_at(memory: &GuestMemory, offset: u64) -> Result<u32> {
    let mut word = [0; 4];
    memory.read(MAILBOX + offset, &mut word)?;
    Ok(u32::from_le_bytes(word))
}
