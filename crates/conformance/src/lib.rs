//! A conformance test for anyone's driver or server of VFIO migration v2.
//!
//! ```text
//!   rules/*      one function per rule ──> Context: calls with a deadline, streams, way back to RUNNING
//!                                             │
//!   runner       a thread owns the device     │        Subject: the raw view of one device
//!                and has a limit per rule     ├──> vfio_user   messages over a socket
//!   verdict      pass, fail, not applicable,  ├──> kernel      ioctls on a device and its data_fd
//!                skipped; JSON, JUnit         └──> anything that implements Subject
//! ```
//!
//! Nothing here trusts the device: sizes are capped, streams are read up to a limit of bytes and time,
//! every call is watched, and a device that does not answer costs one failed rule and skips the rest.
//!
//! | module | holds |
//! |---|---|
//! | [`rule`] | what a rule is: id, statement, source, what fails it |
//! | [`rules`] | all rules, by letter |
//! | [`subject`] | [`Subject`], what a backend implements |
//! | [`kernel`] | [`KernelSubject`](kernel::KernelSubject) |
//! | [`vfio_user`] | [`VfioUserSubject`](vfio_user::VfioUserSubject) |
//! | [`context`] | what a rule's function works with |
//! | [`runner`] | [`run`]: the rules in order, within their limits |
//! | [`selection`] | `F,D1-D4`: which rules |
//! | [`verdict`] | [`Verdict`], [`Report`] |
//! | [`junit`] | a report as JUnit XML |

pub mod context;
pub mod errno;
pub mod guest;
pub mod junit;
pub mod kernel;
pub mod rule;
pub mod rules;
pub mod runner;
pub mod selection;
pub mod stream;
pub mod subject;
pub mod verdict;
pub mod vfio_user;

pub use rule::{Proof, Rule, Testing};
pub use runner::{Options, run};
pub use selection::Selection;
pub use subject::{CallError, Subject};
pub use verdict::{Report, RuleReport, Summary, Verdict};
