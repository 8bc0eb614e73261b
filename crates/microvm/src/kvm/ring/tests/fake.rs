//! Rings in memory, filled and reset as KVM does it (virt/kvm/dirty_ring.c), by vCPUs that go on at every moment of a
//! harvest that a real one could.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::*;

const LEN: u32 = 64;
/// KVM stops a vCPU with so many entries filled.
const SOFT_LIMIT: u32 = 48;
/// The first entry's number: the counts wrap around soon.
const FIRST: u32 = 0_u32.wrapping_sub(5 * LEN);

/// KVM's side of one ring.
struct Side {
    entries: NonNull<kvm_dirty_gfn>,
    dirty_index: u32,
    reset_index: u32,
    /// Pages the vCPU still writes before anybody looks whether its ring is full.
    batch: u32,
    /// In its own harvest, or paused.
    stands: bool,
}

impl Side {
    fn entry(&mut self, index: u32) -> &mut kvm_dirty_gfn {
        // SAFETY: inside the mapping of `LEN` entries; one thread uses it, and no other reference is alive.
        unsafe { self.entries.add((index % LEN) as usize).as_mut() }
    }

    fn is_full(&self) -> bool {
        self.dirty_index.wrapping_sub(self.reset_index) >= SOFT_LIMIT
    }
}

/// KVM and its vCPUs.
struct Fake {
    sides: Vec<Side>,
    /// Pages that were written and not reported.
    owed: BTreeSet<u64>,
    pages: u64,
    /// How many pages a batch has at most.
    batch_max: u32,
    random: u64,
}

impl Fake {
    fn new(vcpus: usize, batch_max: u32, seed: u64) -> (RefCell<Self>, Harvest) {
        let bytes = LEN as usize * size_of::<kvm_dirty_gfn>();
        let map = || {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a fresh mapping, at an address the kernel chooses.
            let addr = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
            assert_ne!(addr, libc::MAP_FAILED);
            NonNull::new(addr.cast()).unwrap()
        };
        let ring = |_| {
            let mut ring = Ring::new(map(), LEN);
            ring.next = FIRST;
            ring
        };
        let rings: Vec<_> = (0..vcpus).map(ring).collect();
        let side = |ring: &Ring| Side {
            entries: ring.entries,
            dirty_index: FIRST,
            reset_index: FIRST,
            batch: 0,
            stands: false,
        };
        let sides = rings.iter().map(side).collect();
        let fake = Self { sides, owed: BTreeSet::new(), pages: 0, batch_max, random: seed };
        (RefCell::new(fake), Harvest { rings, ..Harvest::default() })
    }

    /// Below `end`.
    fn random(&mut self, end: u32) -> u32 {
        // splitmix64
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % u64::from(end)) as u32
    }

    /// kvm_dirty_ring_push
    fn push(&mut self, vcpu: usize) {
        let (side, page) = (&mut self.sides[vcpu], self.pages);
        let index = side.dirty_index;
        *side.entry(index) = kvm_dirty_gfn { flags: DIRTY, slot: 0, offset: page };
        side.dirty_index = index.wrapping_add(1);
        self.owed.insert(page);
        self.pages += 1;
    }

    /// The vCPU writes a page if it may; says whether it did.
    fn step(&mut self, vcpu: usize) -> bool {
        if self.sides[vcpu].batch == 0 {
            if self.sides[vcpu].is_full() {
                return false;
            }
            self.sides[vcpu].batch = 1 + self.random(self.batch_max);
        }
        self.sides[vcpu].batch -= 1;
        self.push(vcpu);
        true
    }

    /// The vCPUs go on for a moment.
    fn meanwhile(&mut self) {
        if self.random(4) > 0 {
            return;
        }
        for vcpu in 0..self.sides.len() {
            let steps = if self.random(16) == 0 { 2 * LEN } else { 4 };
            for _ in 0..self.random(steps) {
                if !self.sides[vcpu].stands {
                    self.step(vcpu);
                }
            }
        }
    }

    fn pause(&mut self) {
        for vcpu in 0..self.sides.len() {
            while self.sides[vcpu].batch > 0 {
                self.step(vcpu);
            }
            self.sides[vcpu].stands = true;
        }
    }

    fn resume(&mut self) {
        self.sides.iter_mut().for_each(|side| side.stands = false);
    }

    /// KVM_RESET_DIRTY_RINGS
    fn reset(&mut self) -> Result<u64> {
        let mut count = 0;
        for vcpu in 0..self.sides.len() {
            self.meanwhile();
            loop {
                let side = &mut self.sides[vcpu];
                let index = side.reset_index;
                if side.entry(index).flags & RESET == 0 {
                    break;
                }
                assert_ne!(index, side.dirty_index, "KVM is to free an entry it never filled");
                side.entry(index).flags = 0;
                side.reset_index = index.wrapping_add(1);
                count += 1;
                self.meanwhile();
            }
        }
        Ok(count)
    }
}

/// A harvest; says whether it lost something.
fn harvest(fake: &RefCell<Fake>, rings: &mut Harvest, full: Option<usize>) -> bool {
    let page = |entry: Entry| {
        fake.borrow_mut().meanwhile();
        Some((0, entry.offset))
    };
    let filled = rings.take(page, || fake.borrow_mut().reset());
    if let Some(vcpu) = full {
        rings.send_on(vcpu, || fake.borrow_mut().reset());
    }
    let mut fake = fake.borrow_mut();
    assert_eq!(rings.batch.len() as u64, filled);
    rings.batch.drain(..).for_each(|(_, page)| {
        fake.owed.remove(&page);
    });
    let lost = std::mem::take(&mut rings.lost);
    if lost {
        // All of memory is dirty and protected anew.
        fake.owed.clear();
    }
    lost
}

/// The vCPU writes a page; with a full ring it harvests before, as often as that takes. Says how often.
fn write(fake: &RefCell<Fake>, rings: &mut Harvest, vcpu: usize) -> u32 {
    for exits in 0..20 * LEN {
        if fake.borrow_mut().step(vcpu) {
            return exits;
        }
        fake.borrow_mut().sides[vcpu].stands = true;
        harvest(fake, rings, Some(vcpu));
        fake.borrow_mut().sides[vcpu].stands = false;
    }
    panic!("vCPU {vcpu} stands still with a full ring");
}

/// Writes and harvests at random, and sees to it that every page is reported. Says how many harvests lost some.
fn storm(vcpus: usize, batch_max: u32, seed: u64) -> u32 {
    let (fake, mut rings) = Fake::new(vcpus, batch_max, seed);
    let mut lost = 0;
    for round in 0..200 {
        let writes = fake.borrow_mut().random(2 * LEN);
        for _ in 0..writes {
            let vcpu = fake.borrow_mut().random(vcpus as u32) as usize;
            write(&fake, &mut rings, vcpu);
        }
        lost += u32::from(harvest(&fake, &mut rings, None));
        if round % 10 == 9 {
            fake.borrow_mut().pause();
            lost += u32::from(harvest(&fake, &mut rings, None));
            assert!(fake.borrow().owed.is_empty(), "round {round}: {:?}", fake.borrow().owed);
            fake.borrow_mut().resume();
        }
    }
    lost
}

#[test]
fn a_ring_that_kvm_stops_in_time_loses_nothing_whatever_its_vcpu_does_meanwhile() {
    for seed in 0..100 {
        assert_eq!(storm(3, LEN - SOFT_LIMIT, seed), 0, "seed {seed}");
    }
}

#[test]
fn a_ring_that_is_overrun_at_any_moment_is_found_again_and_what_was_lost_is_known() {
    // By a part of a ring, around it once, and several times.
    for (vcpus, batch_max) in [(1, 30), (3, 30), (1, LEN + 10), (3, LEN + 10), (2, 5 * LEN)] {
        let lost: u32 = (0..20)
            .map(|seed| {
                println!("{vcpus} vCPUs, {batch_max} pages at once, seed {seed}");
                storm(vcpus, batch_max, seed)
            })
            .sum();
        assert!(lost > 0);
    }
}

#[test]
fn a_ring_full_for_kvm_and_empty_for_us_is_handed_back_entry_by_entry() {
    let (fake, mut rings) = Fake::new(1, 1, 0);
    // As many too many as make the ring full again once all of it is reset.
    (0..LEN + SOFT_LIMIT + 2).for_each(|_| fake.borrow_mut().push(0));
    // The first exit finds the ring filled, each of the next hands an entry back.
    assert_eq!(write(&fake, &mut rings, 0), 1 + 3);
    fake.borrow_mut().pause();
    harvest(&fake, &mut rings, None);
    fake.borrow_mut().owed.clear();
    fake.borrow_mut().resume();
    // KVM and we agree again: the ring is full when it should be.
    let exits: u32 = (0..4 * SOFT_LIMIT).map(|_| write(&fake, &mut rings, 0)).sum();
    assert_eq!(exits, 3);
    fake.borrow_mut().pause();
    assert!(!harvest(&fake, &mut rings, None) && fake.borrow().owed.is_empty());
}
