//! All rules, by letter, in the protocol reference's order.
//!
//! | module | rules |
//! |---|---|
//! | `discovery` | D |
//! | `states` | F |
//! | `data_fd` | X |
//! | `streaming` | S |
//! | `precopy` | P |
//! | `reinit` | R |
//! | `sizes` | Z |
//! | `quiet` | H |
//! | `logging` | L |

mod data_fd;
mod discovery;
mod logging;
mod precopy;
mod quiet;
mod reinit;
mod sizes;
mod states;
mod streaming;

use crate::context::{Answer, Stop, fail, show};
use crate::errno::Errno;
use crate::rule::Rule;

const UAPI: &str = "Linux uAPI, linux/vfio.h";

/// Every rule, tested or not.
pub fn all() -> Vec<&'static Rule> {
    let groups = [
        discovery::RULES,
        states::RULES,
        data_fd::RULES,
        streaming::RULES,
        precopy::RULES,
        reinit::RULES,
        sizes::RULES,
        quiet::RULES,
        logging::RULES,
    ];
    groups.into_iter().flatten().collect()
}

/// The rule with this id.
pub fn find(id: &str) -> Option<&'static Rule> {
    all().into_iter().find(|rule| rule.id == id)
}

/// An answer must be one of these errnos.
fn must_refuse<T>(answer: Answer<T>, errnos: &[i32], what: &str) -> Result<(), Stop> {
    let answer = answer?;
    match &answer {
        Err(errno) if errnos.contains(&errno.0) => Ok(()),
        _ => fail(format!("{what}: {}", names(errnos)), format!("{what}: {}", show(&answer))),
    }
}

/// An answer must be an error, whichever.
fn must_fail<T>(answer: Answer<T>, what: &str) -> Result<(), Stop> {
    match answer? {
        Err(_) => Ok(()),
        Ok(_) => fail(format!("{what}: an error"), format!("{what}: success")),
    }
}

/// An answer must be a success.
fn must_succeed<T>(answer: Answer<T>, what: &str) -> Result<T, Stop> {
    match answer? {
        Ok(value) => Ok(value),
        Err(errno) => fail(format!("{what}: success"), format!("{what}: {errno}")),
    }
}

fn names(errnos: &[i32]) -> String {
    let names: Vec<_> = errnos.iter().map(|errno| Errno(*errno).to_string()).collect();
    names.join(" or ")
}
