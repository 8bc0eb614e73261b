//! An exhaustive search: breadth first, states by fingerprint, and what can be reached from where.
//!
//! A state is kept whole only while it waits to be expanded; of the others there is a 64-bit fingerprint, the
//! step that led there, and the edges without a fault. A counterexample is found again by replaying steps
//! from the start, so it is a shortest one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Debug;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// How a step counts when it is asked what can still be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It happens by itself.
    Plain,
    /// A person has to do it.
    Operator,
    /// It breaks something: nothing good may depend on it.
    Fault,
}

/// Something with states and steps.
pub trait System: Clone + Hash {
    type Step: Copy + Debug;
    /// Every step that can be taken.
    fn steps(&self) -> Vec<(Kind, Self::Step)>;
    /// The state after it.
    fn after(&self, step: Self::Step) -> Self;
    /// What is wrong with this state.
    fn violation(&self) -> Option<&'static str>;
    /// From here a good state must be reachable: by itself, with an operator, or not at all.
    fn owes(&self) -> Owes;
    /// It is a good state.
    fn is_good(&self) -> bool;
}

/// From where a good state must be reachable without another fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owes {
    Nothing,
    WithOperator,
    ByItself,
}

/// What a search found.
pub struct Found {
    pub states: usize,
    pub steps: usize,
    pub good: usize,
    pub owing: usize,
    pub deepest: usize,
    /// The first harm, and the steps to it.
    pub harm: Option<(String, Vec<String>)>,
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = Fingerprint::default();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Folded multiplication, as wyhash does it: fast, and 64 bits that are worth it.
#[derive(Default)]
struct Fingerprint(u64);

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word) ^ (chunk.len() as u64) << 56);
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word ^ 0xa076_1d64_78bd_642f) * 0xe703_7ed1_a0b4_28db;
        self.0 = (product as u64) ^ (product >> 64) as u64 ^ self.0.rotate_left(23);
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        let product = u128::from(self.0 ^ 0x8ebc_6af0_9c88_c6e3) * 0x5896_5755_90e9_7f4f;
        product as u64 ^ (product >> 64) as u64
    }
}

/// Fingerprints are hashes already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

const NONE: u32 = u32::MAX;

#[derive(Default)]
struct Graph {
    index: HashMap<u64, u32, BuildHasherDefault<Same>>,
    /// The state before, and which of its steps.
    parents: Vec<(u32, u16)>,
    /// Edges without a fault: from, to; the operator's in the second list.
    edges: [Vec<(u32, u32)>; 2],
    good: Vec<bool>,
    owes: Vec<Owes>,
}

/// Explores everything that can be reached from `start`, and no more than `states_max` states.
pub fn explore<S: System>(start: S, states_max: usize) -> Found {
    let mut graph = Graph::default();
    let mut steps = 0;
    let mut deepest = 0;
    add(&mut graph, &start, NONE, 0);
    let mut level = vec![(0, start.clone())];
    while !level.is_empty() {
        let mut next = Vec::new();
        for (from, state) in level {
            for (number, (kind, step)) in state.steps().into_iter().enumerate() {
                steps += 1;
                let after = state.after(step);
                let (to, new) = add(&mut graph, &after, from, number as u16);
                match kind {
                    Kind::Plain => graph.edges[0].push((from, to)),
                    Kind::Operator => graph.edges[1].push((from, to)),
                    Kind::Fault => {}
                }
                if new && let Some(what) = after.violation() {
                    let trace = trace(&graph, start, to);
                    return found(&graph, steps, deepest, Some((what.to_owned(), trace)));
                }
                if new {
                    next.push((to, after));
                }
            }
            assert!(
                graph.parents.len() < states_max,
                "more than {states_max} states at depth {deepest}"
            );
        }
        level = next;
        deepest += 1;
    }
    let harm =
        unreachable(&mut graph).map(|(what, at)| (what.to_owned(), trace(&graph, start, at)));
    found(&graph, steps, deepest, harm)
}

fn found(
    graph: &Graph,
    steps: usize,
    deepest: usize,
    harm: Option<(String, Vec<String>)>,
) -> Found {
    Found {
        states: graph.parents.len(),
        steps,
        deepest,
        good: graph.good.iter().filter(|good| **good).count(),
        owing: graph.owes.iter().filter(|owes| **owes != Owes::Nothing).count(),
        harm,
    }
}

fn add<S: System>(graph: &mut Graph, state: &S, from: u32, step: u16) -> (u32, bool) {
    let next = graph.parents.len() as u32;
    match graph.index.entry(fingerprint(state)) {
        Entry::Occupied(known) => (*known.get(), false),
        Entry::Vacant(entry) => {
            entry.insert(next);
            graph.parents.push((from, step));
            graph.good.push(state.is_good());
            graph.owes.push(state.owes());
            (next, true)
        }
    }
}

/// The first state that owes a good one and cannot reach it.
fn unreachable(graph: &mut Graph) -> Option<(&'static str, u32)> {
    let mut edges = std::mem::take(&mut graph.edges[0]);
    let first_stuck = |edges: &mut Vec<(u32, u32)>, owing: Owes| {
        let reaches = backwards(edges, &graph.good);
        (0..graph.good.len()).find(|state| graph.owes[*state] == owing && !reaches[*state])
    };
    if let Some(at) = first_stuck(&mut edges, Owes::ByItself) {
        return Some(("no way by itself to a guest that runs", at as u32));
    }
    edges.extend(std::mem::take(&mut graph.edges[1]));
    let stuck = first_stuck(&mut edges, Owes::WithOperator);
    stuck.map(|at| ("no way to a guest that runs, not even by the operator", at as u32))
}

fn backwards(edges: &mut [(u32, u32)], good: &[bool]) -> Vec<bool> {
    edges.sort_unstable_by_key(|(_, to)| *to);
    let mut reaches = good.to_vec();
    let mut waiting: Vec<u32> = (0..good.len() as u32).filter(|s| good[*s as usize]).collect();
    while let Some(state) = waiting.pop() {
        let begin = edges.partition_point(|(_, to)| *to < state);
        for (from, _) in edges[begin..].iter().take_while(|(_, to)| *to == state) {
            if !std::mem::replace(&mut reaches[*from as usize], true) {
                waiting.push(*from);
            }
        }
    }
    reaches
}

fn trace<S: System>(graph: &Graph, start: S, at: u32) -> Vec<String> {
    let mut numbers = Vec::new();
    let mut at = at;
    while at != 0 {
        let (from, number) = graph.parents[at as usize];
        numbers.push(number);
        at = from;
    }
    let mut state = start;
    let mut told = Vec::new();
    for number in numbers.into_iter().rev() {
        let (kind, step) = state.steps()[usize::from(number)];
        told.push(format!("{kind:?} {step:?}"));
        state = state.after(step);
    }
    told
}
