//! The brain of a live migration.
//!
//! No I/O, no clock, no threads: events and the time go in, actions come out. The engine
//! (`migration`) performs the actions on sockets, devices and vCPUs, a simulator on modelled ones, and
//! tests explore every order of them.
//!
//! ```text
//!            Event + now                                Action
//!   engine ──────────────▶ source::Source ─────────────────────▶ engine
//!                            │        ▲
//!              ids, states   ▼        │ verdict
//!                       handover   decide ◀── estimate ◀── sizes, rates, times
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`message`] | what the two sides say to each other |
//! | [`handover`] | both machines: who runs the guest. Finite, `Clone + Eq + Hash` |
//! | [`estimate`] | the blackout, term by term |
//! | [`decide`] | estimate, budget, counters → verdict; a pure function |
//! | [`policy`] | whose rule decides: ours, or a peer's |
//! | [`source`] | the source's brain: handover, estimate and decide behind one `handle(now, event)` |
//! | [`destination`] | the destination's brain |
//! | [`trace`] | a record of one migration, as plain data |
//! | [`time`] | [`Time`] |

pub mod decide;
pub mod destination;
pub mod estimate;
pub mod handover;
pub mod message;
pub mod policy;
pub mod source;
pub mod time;
pub mod trace;

pub use time::Time;
