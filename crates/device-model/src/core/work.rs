//! What the device does by itself: stamps into guest memory, and interrupts.
//!
//! A stamp is owed by a doorbell or due by DMA_RATE. Owed ones are state and travel; the phase of the
//! background is not and starts anew in every working state.

use vfio_migration::DeviceState;

use super::DeviceCore;
use crate::regs::{self, CONTROL_DMA, CONTROL_IRQ, STAMP_BYTES, STAMP_STRIDE_BYTES};

/// Why a DMA write was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaFault {
    /// No writable mapping covers it, or the write failed.
    Failed,
    /// It cannot be done within this call. The caller does it ([`DeviceCore::deferred`]) and reports
    /// ([`DeviceCore::complete_deferred`]); meanwhile the device starts no other.
    Later,
}

/// Guest memory, as the device reaches it.
pub trait GuestDma {
    /// Writes `data` at `iova`.
    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), DmaFault>;
}

/// A write that [`GuestDma::write`] put off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeferredWrite {
    /// Where to.
    pub iova: u64,
    /// What.
    pub data: [u8; STAMP_BYTES],
}

/// Whose stamp it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Doorbell,
    Background,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Written,
    Failed,
    Deferred,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    background: Option<Background>,
    deferred: Option<(DeferredWrite, Cause)>,
}

#[derive(Clone, Copy, Debug)]
struct Background {
    since_ns: u64,
    done: u64,
}

const NS_PER_S: u128 = 1_000_000_000;

impl Work {
    /// The rate or what it depends on changed: count from now.
    pub(super) fn restart_background(&mut self) {
        self.background = None;
    }

    pub(super) fn is_deferred(&self) -> bool {
        self.deferred.is_some()
    }
}

impl DeviceCore {
    /// Lets the device work until `now_ns`, at most `budget` stamps.
    pub fn advance(&mut self, now_ns: u64, budget: u64, dma: &mut dyn GuestDma) {
        self.work_off(now_ns, budget, dma);
    }

    /// When [`advance`](Self::advance) next has something to do; `None` while nothing is due by itself.
    /// A time that is past means now.
    pub fn next_due_ns(&self, now_ns: u64) -> Option<u64> {
        let regs = &self.internals.regs;
        if !self.may_work() || self.work.is_deferred() {
            return None;
        }
        if regs.owed > 0 || regs.irq_owed {
            return Some(now_ns);
        }
        if regs.control & CONTROL_DMA == 0 || regs.dma_rate == 0 {
            return None;
        }
        let Some(Background { since_ns, done }) = self.work.background else { return Some(now_ns) };
        let next = (u128::from(done) + 1) * NS_PER_S;
        let wait = u64::try_from(next.div_ceil(regs.dma_rate.into())).unwrap_or(u64::MAX);
        Some(since_ns.saturating_add(wait))
    }

    /// The write that was put off, if one is under way.
    pub fn deferred(&self) -> Option<DeferredWrite> {
        self.work.deferred.map(|(write, _)| write)
    }

    /// The write that was put off is done, or failed. Without one (a reset came between) nothing happens.
    pub fn complete_deferred(&mut self, written: bool) {
        let Some((write, cause)) = self.work.deferred.take() else { return };
        let outcome = if written { Outcome::Written } else { Outcome::Failed };
        self.account(write.iova, cause, outcome);
        if self.may_work() {
            self.answer_doorbell();
        }
    }

    /// The device starts work in this state (H1 to H3).
    fn may_work(&self) -> bool {
        if !self.state.is_active() && self.quirks.breaks.has("H3") {
            return true;
        }
        self.state.is_active() && !(self.state.is_p2p() && self.p2p_stops_dma)
    }

    /// A write under way stands against entering `state`, where there may be none.
    pub(super) fn deferred_forbids(&self, state: DeviceState) -> bool {
        let quiet = !state.is_active() || (state.is_p2p() && self.p2p_stops_dma);
        quiet && self.work.is_deferred()
    }

    pub(super) fn work_off(&mut self, now_ns: u64, budget: u64, dma: &mut dyn GuestDma) {
        if !self.may_work() {
            return;
        }
        self.answer_doorbell();
        for _ in 0..budget {
            if self.work.is_deferred() {
                return;
            }
            let cause = if self.internals.regs.owed > 0 {
                Cause::Doorbell
            } else if self.background_due(now_ns) {
                Cause::Background
            } else {
                return;
            };
            self.stamp(cause, dma);
            self.answer_doorbell();
        }
    }

    /// Raises the interrupt of a doorbell that is served.
    fn answer_doorbell(&mut self) {
        let regs = &mut self.internals.regs;
        if regs.irq_owed && regs.owed == 0 {
            regs.irq_owed = false;
            self.raise();
        }
    }

    fn background_due(&mut self, now_ns: u64) -> bool {
        let regs = &self.internals.regs;
        if regs.control & CONTROL_DMA == 0 || regs.dma_rate == 0 {
            self.work.background = None;
            return false;
        }
        let fresh = Background { since_ns: now_ns, done: 0 };
        let background = self.work.background.get_or_insert(fresh);
        let elapsed = u128::from(now_ns.saturating_sub(background.since_ns));
        let due = elapsed * u128::from(regs.dma_rate) / NS_PER_S;
        let behind = due.saturating_sub(background.done.into());
        if behind > u128::from(regs.dma_rate) {
            // More than a second behind: it will not be caught up with.
            *background = fresh;
            return false;
        }
        behind > 0
    }

    fn stamp(&mut self, cause: Cause, dma: &mut dyn GuestDma) {
        let regs = &self.internals.regs;
        let page = regs.completed.checked_rem(regs.dma_pages.into());
        let offset = page.and_then(|page| page.checked_mul(STAMP_STRIDE_BYTES));
        let iova = offset.and_then(|offset| regs.dma_addr.checked_add(offset));
        let able = self.config_space.bus_master() && !self.migration.wedged;
        let Some(iova) = iova.filter(|_| able) else {
            return self.account(0, cause, Outcome::Failed);
        };
        let data = regs::stamp(regs.completed);
        let outcome = match dma.write(iova, &data) {
            Ok(()) => Outcome::Written,
            Err(DmaFault::Failed) => Outcome::Failed,
            Err(DmaFault::Later) => {
                self.work.deferred = Some((DeferredWrite { iova, data }, cause));
                Outcome::Deferred
            }
        };
        self.account(iova, cause, outcome);
    }

    /// Counts a stamp. The log is written after the bytes, in one call with them, so a report never
    /// misses bytes that a copy of the page missed.
    fn account(&mut self, iova: u64, cause: Cause, outcome: Outcome) {
        if outcome == Outcome::Deferred {
            return;
        }
        if outcome == Outcome::Written && !self.quirks.dma_log_blind {
            self.dma_log.note_write(iova, STAMP_BYTES as u64);
        }
        let regs = &mut self.internals.regs;
        match outcome {
            Outcome::Written => regs.completed = regs.completed.wrapping_add(1),
            _ => regs.status |= regs::STATUS_DMA_FAILED,
        }
        match (cause, outcome) {
            (Cause::Doorbell, Outcome::Written) => regs.owed = regs.owed.saturating_sub(1),
            (Cause::Doorbell, _) => regs.owed = 0,
            (Cause::Background, _) => {
                if let Some(background) = &mut self.work.background {
                    background.done += 1;
                }
            }
        }
    }

    fn raise(&mut self) {
        let regs = &mut self.internals.regs;
        if regs.control & CONTROL_IRQ == 0 {
            return;
        }
        regs.raised = regs.raised.wrapping_add(1);
        if self.config_space.msix_enabled() || self.wiring.msix_wired != 0 {
            self.internals.pending.msix |= 1 << regs.vector;
        } else {
            self.internals.pending.intx = true;
        }
        self.deliver();
    }

    /// Hands over to the VMM what is pending and can be signalled; never in a stopped state (H3).
    pub(super) fn deliver(&mut self) {
        if !self.state.is_active() {
            return;
        }
        let intx_disabled = self.config_space.intx_disabled();
        let fired = self.wiring.deliver(&mut self.internals.pending, intx_disabled);
        self.fired.msix |= fired.msix;
        self.fired.intx |= fired.intx;
    }
}
