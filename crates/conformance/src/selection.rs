//! Which rules: `F`, `D1`, `D1-D4`, `S1-5`, separated by commas.

use crate::rule::Rule;
use crate::rules;

/// A set of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection(Vec<(char, u32, u32)>);

impl Selection {
    /// Parses a list.
    ///
    /// # Errors
    /// A sentence that names what no rule has.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut selection = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            selection.0.push(parse_part(part)?);
        }
        if selection.0.is_empty() {
            return Err("name rules, as in F,D1-D4,S1".into());
        }
        Ok(selection)
    }

    /// The rule is in it.
    pub fn contains(&self, rule: &Rule) -> bool {
        let (letter, number) = (rule.letter(), rule.number());
        self.0.iter().any(|(l, from, to)| *l == letter && (*from..=*to).contains(&number))
    }

    /// Adds what `other` has.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }
}

fn parse_part(part: &str) -> Result<(char, u32, u32), String> {
    let refused = || format!("{part:?} names no rule; write a letter, F5, F5-F9 or F5-9");
    let part = part.to_ascii_uppercase();
    let letter = part.chars().next().ok_or_else(refused)?;
    let rest = part.get(letter.len_utf8()..).ok_or_else(refused)?;
    let (from, to) = match rest.split_once('-') {
        None if rest.is_empty() => (0, u32::MAX),
        None => {
            let number = parse_number(rest).ok_or_else(refused)?;
            (number, number)
        }
        Some((from, to)) => {
            let to = to.strip_prefix(letter).unwrap_or(to);
            (parse_number(from).ok_or_else(refused)?, parse_number(to).ok_or_else(refused)?)
        }
    };
    let known = |number| rules::all().iter().any(|r| r.letter() == letter && number == r.number());
    let group = rules::all().iter().any(|rule| rule.letter() == letter);
    let whole = from == 0 && to == u32::MAX;
    if !group || from > to || !(whole || (known(from) && known(to))) {
        return Err(refused());
    }
    Ok((letter, from, to))
}

fn parse_number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<&'static str> {
        let selection = Selection::parse(text).unwrap();
        rules::all().iter().filter(|rule| selection.contains(rule)).map(|rule| rule.id).collect()
    }

    #[test]
    fn letters_ids_and_ranges() {
        assert_eq!(ids("z"), ["Z1", "Z2", "Z3", "Z4"]);
        assert_eq!(ids("D1-D3, f5"), ["D1", "D2", "D3", "F5"]);
        assert_eq!(ids("X8-9"), ["X8", "X9"]);
    }

    #[test]
    fn what_no_rule_has_is_refused() {
        for text in ["", ",", "Q", "D0", "D8", "D3-D1", "D1-F2", "1", "D-", "Dx", "ä1"] {
            assert!(Selection::parse(text).is_err(), "{text}");
        }
    }
}
