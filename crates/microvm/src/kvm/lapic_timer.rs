//! The LAPIC's timer over the time in which its state was on the way.
//!
//! KVM starts a loaded timer with the count that was left when it was saved. The guest's clock goes
//! on meanwhile, so the count is taken down by as much. And KVM keeps the tick it owes a periodic timer where
//! nobody can read it: the guest gets one, as it would after any pause of a period or more. TSC-deadline
//! mode needs nothing: the deadline is a moment, and an owed one fires when it is set again.

use kvm_bindings::kvm_lapic_state;

const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

const MASKED: u32 = 1 << 16;
const MODE_ONE_SHOT: u32 = 0;
const MODE_PERIODIC: u32 = 1;
/// Vectors below are refused by the LAPIC.
const VECTOR_MIN: u32 = 16;
/// KVM's APIC bus runs at 1 GHz (`APIC_BUS_CYCLE_NS`).
const BUS_CYCLE_NS: u64 = 1;

/// Lets `elapsed_ns` pass for the timer.
pub(super) fn age(lapic: &mut kvm_lapic_state, elapsed_ns: u64) {
    let lvt = register(lapic, LVT_TIMER);
    let initial = u64::from(register(lapic, INITIAL_COUNT));
    let current = u64::from(register(lapic, CURRENT_COUNT));
    if initial == 0 {
        return;
    }
    let passed = elapsed_ns / (BUS_CYCLE_NS * divisor(register(lapic, DIVIDE)));
    match lvt >> 17 & 3 {
        // One that is due fires at once. 0 means that it fired; KVM lets it fire again, which makes good for a
        // tick it still owed.
        MODE_ONE_SHOT if current > 0 => {
            set_register(lapic, CURRENT_COUNT, current.saturating_sub(passed).max(1) as u32);
        }
        MODE_PERIODIC => {
            let into_period = (initial - current.min(initial) + passed % initial) % initial;
            set_register(lapic, CURRENT_COUNT, (initial - into_period) as u32);
            if lvt & MASKED == 0 {
                request(lapic, lvt & 0xff);
            }
        }
        _ => {}
    }
}

fn divisor(divide: u32) -> u64 {
    let bits = divide & 3 | (divide & 8) >> 1;
    1 << ((bits + 1) & 7)
}

fn request(lapic: &mut kvm_lapic_state, vector: u32) {
    if vector >= VECTOR_MIN {
        let at = IRR + (vector / 32) as usize * 0x10;
        let requests = register(lapic, at);
        set_register(lapic, at, requests | 1 << (vector % 32));
    }
}

fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    let byte = |index: usize| lapic.regs[at + index] as u8;
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (byte, value) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
        *byte = value as std::ffi::c_char;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BY_1: u32 = 0xb;
    const BY_16: u32 = 0x3;
    const VECTOR: u32 = 0x31;

    fn timer(lvt: u32, divide: u32, initial: u32, current: u32) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        set_register(&mut lapic, LVT_TIMER, lvt);
        set_register(&mut lapic, DIVIDE, divide);
        set_register(&mut lapic, INITIAL_COUNT, initial);
        set_register(&mut lapic, CURRENT_COUNT, current);
        lapic
    }

    fn requested(lapic: &kvm_lapic_state) -> bool {
        register(lapic, IRR + 0x10) & 1 << (VECTOR % 32) != 0
    }

    #[test]
    fn divisors_are_those_of_the_manual() {
        let cases = [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)];
        for (divide, expected) in cases {
            assert_eq!(divisor(divide), expected, "{divide:#x}");
        }
    }

    #[test]
    fn a_one_shot_timer_goes_on_and_fires_when_it_is_due() {
        let cases = [
            (BY_1, 1000, 400, 600),
            (BY_1, 1000, 1000, 1),
            (BY_1, 1000, u64::MAX, 1),
            (BY_16, 1000, 1600, 900),
            // It fired on the source: nothing to come.
            (BY_1, 0, 400, 0),
        ];
        for (divide, current, elapsed_ns, expected) in cases {
            let mut lapic = timer(VECTOR, divide, 2000, current);
            age(&mut lapic, elapsed_ns);
            assert_eq!(register(&lapic, CURRENT_COUNT), expected, "{current} {elapsed_ns}");
            assert!(!requested(&lapic));
        }
    }

    #[test]
    fn a_periodic_timer_keeps_its_phase_and_makes_up_one_tick() {
        let cases = [(1000, 700, 0, 700), (1000, 700, 200, 500), (1000, 700, 5200, 500)];
        for (initial, current, elapsed_ns, expected) in cases {
            let mut lapic = timer(1 << 17 | VECTOR, BY_1, initial, current);
            age(&mut lapic, elapsed_ns);
            assert_eq!(register(&lapic, CURRENT_COUNT), expected, "{elapsed_ns}");
            assert!(requested(&lapic));
        }
        let mut masked = timer(1 << 17 | MASKED | VECTOR, BY_1, 1000, 700);
        age(&mut masked, 5000);
        assert!(!requested(&masked));
    }

    #[test]
    fn a_timer_that_is_off_or_waits_for_a_deadline_is_left_alone() {
        for (lvt, initial) in [(VECTOR, 0), (2 << 17 | VECTOR, 1000), (3 << 17 | VECTOR, 1000)] {
            let before = timer(lvt, BY_1, initial, 10);
            let mut after = before;
            age(&mut after, 5);
            assert_eq!(after, before);
        }
    }

    #[test]
    fn absurd_registers_do_no_harm() {
        let mut lapic = timer(1 << 17 | 3, BY_1, u32::MAX, u32::MAX);
        age(&mut lapic, u64::MAX);
        let mut lapic = timer(1 << 17 | VECTOR, BY_1, 1, u32::MAX);
        age(&mut lapic, u64::MAX);
        assert_eq!(register(&lapic, CURRENT_COUNT), 1);
    }
}
