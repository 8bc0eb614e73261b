//! The state machine: the code's table against a search of the graph, for every set of flags and all
//! pairs of states, and against the printed table of the protocol reference. Rules F1 to F14, X1, X2.

use std::collections::VecDeque;

use vfio_migration::DeviceState::{self, *};
use vfio_migration::arcs::{DIRECT_ARCS, SessionEffect, session_effect};
use vfio_migration::{MigrationFlags, next_hop, path};

const FULL: MigrationFlags = MigrationFlags::new(true, true);

fn flag_sets() -> [MigrationFlags; 4] {
    [(false, false), (true, false), (false, true), (true, true)]
        .map(|(p2p, pre_copy)| MigrationFlags::new(p2p, pre_copy))
}

/// The arcs of a device: those of the full graph between states it has; without P2P, RUNNING↔STOP and
/// PRE_COPY→STOP_COPY stand for the two-step ways (reference, section 2).
fn arcs(flags: MigrationFlags) -> Vec<(DeviceState, DeviceState)> {
    let mut arcs = DIRECT_ARCS.to_vec();
    if !flags.p2p() {
        arcs.extend([(Running, Stop), (Stop, Running), (PreCopy, StopCopy)]);
    }
    arcs.retain(|(from, to)| flags.has_state(*from) && flags.has_state(*to));
    arcs
}

/// All shortest ways from `from` to `to`. Inside of the saving group the session goes on, so such a way
/// never leaves it; any other way has no saving-group state in its interior.
fn search(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Vec<Vec<DeviceState>> {
    let inside = from.is_saving() && to.is_saving();
    let arcs = arcs(flags);
    let mut found: Vec<Vec<DeviceState>> = Vec::new();
    let mut queue = VecDeque::from([vec![from]]);
    while let Some(way) = queue.pop_front() {
        let here = way[way.len() - 1];
        if found.first().is_some_and(|shortest| shortest.len() < way.len() - 1) {
            break;
        }
        if here == to {
            found.push(way[1..].to_vec());
            continue;
        }
        let interior_allowed = here == from || here.is_saving() == inside;
        if !interior_allowed {
            continue;
        }
        for (_, next) in arcs.iter().filter(|(start, _)| *start == here) {
            if !way.contains(next) {
                queue.push_back([way.as_slice(), &[*next]].concat());
            }
        }
    }
    found
}

#[test]
fn f8_f9_the_way_is_the_only_shortest_one_for_all_flags_and_pairs() {
    for flags in flag_sets() {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let there = flags.has_state(from) && flags.has_state(to);
                let refused = !there || from == Error || to == Error;
                let ways = if refused { vec![] } else { search(from, to, flags) };
                assert!(ways.len() <= 1, "{flags:?}: {from} -> {to}: {ways:?}");
                let expected = ways.first();
                assert_eq!(path(from, to, flags).as_ref(), expected, "{flags:?}: {from} -> {to}");
                let hop = expected.map(|way| way.first().copied().unwrap_or(to));
                assert_eq!(next_hop(from, to, flags), hop, "{flags:?}: {from} -> {to}");
            }
        }
    }
}

/// The table as the reference prints it: `-` no arc, `x` refused.
const PRINTED: &str = "
| from \\ to | STOP | RUNNING | STOP_COPY | RESUMING | RUNNING_P2P | PRE_COPY | PRE_COPY_P2P |
|---|---|---|---|---|---|---|---|
| STOP | - | RUNNING_P2P | STOP_COPY | RESUMING | RUNNING_P2P | RUNNING_P2P | RUNNING_P2P |
| RUNNING | RUNNING_P2P | - | RUNNING_P2P | RUNNING_P2P | RUNNING_P2P | PRE_COPY | RUNNING_P2P |
| STOP_COPY | STOP | STOP | - | STOP | STOP | x | x |
| RESUMING | STOP | STOP | STOP | - | STOP | STOP | STOP |
| RUNNING_P2P | STOP | RUNNING | STOP | STOP | - | RUNNING | PRE_COPY_P2P |
| PRE_COPY | RUNNING | RUNNING | PRE_COPY_P2P | RUNNING | RUNNING | - | PRE_COPY_P2P |
| PRE_COPY_P2P | RUNNING_P2P | RUNNING_P2P | STOP_COPY | RUNNING_P2P | RUNNING_P2P | PRE_COPY | - |
| ERROR | x | x | x | x | x | x | x |
";

fn named(name: &str) -> DeviceState {
    DeviceState::ALL.into_iter().find(|state| state.name() == name).unwrap()
}

#[test]
fn the_printed_table_holds() {
    let rows: Vec<Vec<&str>> = PRINTED
        .trim()
        .lines()
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let columns = &rows[0][1..];
    let mut checked = 0;
    for row in &rows[2..] {
        for (column, cell) in columns.iter().zip(&row[1..]) {
            let (from, to) = (named(row[0]), named(column));
            let expected = match *cell {
                "x" => None,
                "-" => Some(to),
                hop => Some(named(hop)),
            };
            assert_eq!(next_hop(from, to, FULL), expected, "{from} -> {to}");
            checked += 1;
        }
    }
    assert_eq!(checked, 8 * 7);
}

#[test]
fn f1_every_way_ends_at_its_target_over_direct_arcs() {
    for flags in flag_sets() {
        let arcs = arcs(flags);
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Some(hops) = path(from, to, flags) else { continue };
                let mut at = from;
                for hop in &hops {
                    assert!(arcs.contains(&(at, *hop)), "{flags:?}: {from} -> {to}: {hops:?}");
                    at = *hop;
                }
                assert_eq!(at, to);
            }
        }
    }
}

#[test]
fn f3_the_current_state_is_reached_without_an_arc() {
    for flags in flag_sets() {
        for state in DeviceState::ALL {
            let expected = (state != Error && flags.has_state(state)).then(Vec::new);
            assert_eq!(path(state, state, flags), expected, "{flags:?}: {state}");
        }
    }
}

#[test]
fn f4_states_the_device_lacks_are_no_targets() {
    for flags in flag_sets() {
        for to in DeviceState::ALL.into_iter().filter(|state| !flags.has_state(*state)) {
            for from in DeviceState::ALL {
                assert_eq!(path(from, to, flags), None, "{flags:?}: {from} -> {to}");
            }
        }
    }
}

#[test]
fn f5_nothing_leads_from_stop_copy_back_to_precopy() {
    for flags in flag_sets() {
        assert_eq!(path(StopCopy, PreCopy, flags), None);
        assert_eq!(path(StopCopy, PreCopyP2p, flags), None);
    }
}

#[test]
fn f6_error_is_neither_left_nor_entered_by_a_set() {
    for flags in flag_sets() {
        for state in DeviceState::ALL {
            assert_eq!(path(Error, state, flags), None);
            assert_eq!(path(state, Error, flags), None);
        }
    }
}

#[test]
fn f7_f10_unknown_numbers_are_no_states() {
    for (raw, state) in DeviceState::ALL.into_iter().enumerate() {
        assert_eq!(state.as_raw(), raw as u32);
        assert_eq!(DeviceState::from_raw(raw as u32), Some(state));
    }
    for raw in [8, 9, 42, u32::MAX] {
        assert_eq!(DeviceState::from_raw(raw), None);
    }
}

#[test]
fn f8_the_examples_of_the_rule() {
    let examples: [(DeviceState, DeviceState, &[DeviceState]); 7] = [
        (Running, StopCopy, &[RunningP2p, Stop, StopCopy]),
        (PreCopy, Stop, &[Running, RunningP2p, Stop]),
        (PreCopyP2p, Stop, &[RunningP2p, Stop]),
        (PreCopy, StopCopy, &[PreCopyP2p, StopCopy]),
        (Resuming, Running, &[Stop, RunningP2p, Running]),
        (StopCopy, Resuming, &[Stop, Resuming]),
        (Resuming, StopCopy, &[Stop, StopCopy]),
    ];
    for (from, to, hops) in examples {
        assert_eq!(path(from, to, FULL).as_deref(), Some(hops), "{from} -> {to}");
    }
}

#[test]
fn f9_without_p2p_the_p2p_states_are_passed_over() {
    for pre_copy in [false, true] {
        let flags = MigrationFlags::new(false, pre_copy);
        assert_eq!(path(Running, Stop, flags), Some(vec![Stop]));
        assert_eq!(path(Stop, Running, flags), Some(vec![Running]));
        assert_eq!(path(Running, StopCopy, flags), Some(vec![Stop, StopCopy]));
    }
    let flags = MigrationFlags::new(false, true);
    assert_eq!(path(PreCopy, StopCopy, flags), Some(vec![StopCopy]));
    assert_eq!(path(PreCopy, Stop, flags), Some(vec![Running, Stop]));
}

#[test]
fn f12_no_arc_inside_of_a_way_hands_out_an_fd() {
    for flags in flag_sets() {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Some(hops) = path(from, to, flags) else { continue };
                let mut at = from;
                for hop in hops {
                    let begins = matches!(
                        session_effect(at, hop),
                        SessionEffect::BeginsSaving | SessionEffect::BeginsResuming
                    );
                    assert!(!begins || hop == to, "{flags:?}: {from} -> {to} at {at} -> {hop}");
                    at = hop;
                }
            }
        }
    }
}

#[test]
fn f13_from_pre_copy_p2p_back_to_pre_copy_the_session_goes_on() {
    assert_eq!(path(PreCopyP2p, PreCopy, FULL), Some(vec![PreCopy]));
    assert_eq!(session_effect(PreCopyP2p, PreCopy), SessionEffect::Keeps);
}

#[test]
fn f14_every_way_out_of_resuming_passes_stop_first() {
    for flags in flag_sets() {
        for to in DeviceState::ALL.into_iter().filter(|to| *to != Resuming) {
            if let Some(hops) = path(Resuming, to, flags) {
                assert_eq!(hops.first(), Some(&Stop), "{flags:?}: -> {to}");
            }
        }
        assert!(path(Resuming, Stop, flags).is_some());
    }
}

#[test]
fn x1_exactly_four_arcs_begin_a_session_and_four_end_one() {
    let with = |wanted: fn(&SessionEffect) -> bool| -> Vec<_> {
        DIRECT_ARCS.into_iter().filter(|(from, to)| wanted(&session_effect(*from, *to))).collect()
    };
    let saving = with(|effect| *effect == SessionEffect::BeginsSaving);
    assert_eq!(saving, [(Running, PreCopy), (RunningP2p, PreCopyP2p), (Stop, StopCopy)]);
    assert_eq!(with(|effect| *effect == SessionEffect::BeginsResuming), [(Stop, Resuming)]);
    let ends = with(|effect| *effect == SessionEffect::Ends);
    assert_eq!(
        ends,
        [(StopCopy, Stop), (Resuming, Stop), (PreCopy, Running), (PreCopyP2p, RunningP2p)]
    );
}

#[test]
fn x2_moves_inside_of_the_saving_group_keep_the_session() {
    let group = [PreCopy, PreCopyP2p, StopCopy];
    for state in DeviceState::ALL {
        assert_eq!(state.is_saving(), group.contains(&state), "{state}");
    }
    for from in group {
        for to in group {
            assert_eq!(session_effect(from, to), SessionEffect::Keeps);
            let Some(hops) = path(from, to, FULL) else { continue };
            assert!(hops.iter().all(|hop| hop.is_saving()), "{from} -> {to}: {hops:?}");
        }
    }
}

#[test]
fn states_are_what_their_names_say() {
    let of = |is: fn(DeviceState) -> bool| -> Vec<DeviceState> {
        DeviceState::ALL.into_iter().filter(|state| is(*state)).collect()
    };
    assert_eq!(of(DeviceState::is_precopy), [PreCopy, PreCopyP2p]);
    assert_eq!(of(DeviceState::is_p2p), [RunningP2p, PreCopyP2p]);
    assert_eq!(of(DeviceState::is_active), [Running, RunningP2p, PreCopy, PreCopyP2p]);
}
