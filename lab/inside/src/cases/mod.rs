//! The cases, a module per part. To add a part: a module with `pub fn cases() -> Vec<Case>`, and its line here.

mod check;
pub mod controls;
mod ferrydev;
mod guests;
mod kernel;
mod machine;
mod migrate;

use crate::case::Case;

/// Every case, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        machine::cases(),
        kernel::cases(),
        check::cases(),
        ferrydev::cases(),
        guests::cases(),
        migrate::cases(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_words() {
        let cases = [super::all(), super::controls::cases()].concat();
        for (place, case) in cases.iter().enumerate() {
            let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
            assert!(case.name.chars().all(fits), "{}", case.name);
            assert!(
                cases[..place].iter().all(|other| other.name != case.name),
                "{} twice",
                case.name
            );
        }
    }
}
