//! The source's brain while the guest runs, with an engine made of answers.

use std::collections::{BTreeMap, VecDeque};

use switchover::Time;
use switchover::estimate::{Ahead, Basis};
use switchover::handover::source::Action as Handover;
use switchover::handover::{DeviceCall, DeviceTraits};
use switchover::message::{Connection, DeviceIndex, Features, Id, Message};
use switchover::source::{Action, CallResult, Config, Event, Info, Setup, Source, State};

const NIC: DeviceIndex = DeviceIndex(0);
const LINK: Connection = Connection(1);

fn brain(limit_ms: u64) -> Source {
    let setup = Setup {
        migration: Id(1),
        instance: Id(2),
        features: Features::default(),
        description: String::new(),
        devices: vec![DeviceTraits { pre_copy: true, p2p: true }],
        dry_run: false,
    };
    // Best effort that never settles for less: what it does while nothing fits can be watched.
    let (downtime_limit, give_up_after) = (Time::from_ms(limit_ms), Time::from_ms(1_000_000));
    let config = Config { downtime_limit, give_up_after, ..Config::default() };
    Source::new(setup, config, 1 << 20)
}

/// Runs the brain in virtual time until `until`, answering everything at once.
fn run(brain: &mut Source, until: Time, initial_bytes: u64) -> Vec<(Time, Action)> {
    run_pausing(brain, until, initial_bytes, &[])
}

/// As [`run`]; the first pauses of the vCPUs take so long.
fn run_pausing(
    brain: &mut Source,
    until: Time,
    initial_bytes: u64,
    pauses: &[Time],
) -> Vec<(Time, Action)> {
    let mut pauses = pauses.iter().copied();
    let mut now = Time(0);
    let mut seen = Vec::new();
    let mut events = vec![Event::LinkUp(LINK)];
    let accept = Message::Accept { features: Features::default(), instance: Id(3), secret: Id(4) };
    events.push(Event::Message(LINK, accept));
    events.push(Event::Message(LINK, Message::DescribeOk));
    events.reverse();
    while now < until {
        let event = events.pop();
        if event.is_none() {
            let Some(next) = brain.next_timer() else { break };
            now = now.max(next);
        }
        for action in brain.handle(now, event) {
            seen.push((now, action.clone()));
            let answer = match action {
                Action::Handover(Handover::StartTracking) => Event::TrackingStarted(Ok(())),
                Action::Handover(Handover::Call(device, DeviceCall::Info)) => Event::Info {
                    device,
                    info: Info::Known { initial_bytes, dirty_bytes: 0, reinit: false },
                    stop_copy_bytes: Some(4096),
                    offset: 10,
                    took: Time(1),
                },
                Action::Handover(Handover::Call(device, call)) => {
                    Event::CallDone { device, call, result: CallResult::Done, took: Time(1) }
                }
                Action::Handover(Handover::Read(device)) => {
                    Event::NothingNow { device, offset: 10 }
                }
                Action::Handover(Handover::Send(Message::InitialDataSent {
                    device,
                    session,
                    ..
                })) => Event::Message(LINK, Message::SwitchoverAck { device, session }),
                Action::Handover(Handover::Pause) => {
                    brain.handle(now, Some(Event::PauseRequested));
                    now = now + pauses.next().unwrap_or(Time(0));
                    Event::Paused(Ok(()))
                }
                Action::Handover(Handover::Resume) => Event::Resumed(Ok(())),
                Action::Handover(Handover::Sync(sync)) => {
                    Event::Synced { sync, dirty_bytes: 0, took: Time(1), answer: Ok(()) }
                }
                Action::SyncPass => {
                    Event::PassSynced { dirty_bytes: 4096, exposed: None, answer: Ok(()) }
                }
                Action::SendPass(_) => Event::PassSent(Ok(())),
                _ => continue,
            };
            events.insert(0, answer);
        }
    }
    seen
}

#[test]
fn precopy_info_is_polled_although_nothing_seems_to_happen() {
    for initial_bytes in [0, 1000] {
        let mut brain = brain(0);
        let seen = run(&mut brain, Time::from_ms(5_000), initial_bytes);
        assert_eq!(brain.handover().state(), State::Precopy);
        let asked = |(_, action): &&(Time, Action)| {
            matches!(action, Action::Handover(Handover::Call(NIC, DeviceCall::Info)))
        };
        let polls: Vec<_> = seen.iter().filter(asked).map(|(at, _)| *at).collect();
        let late = polls.iter().filter(|at| **at > Time::from_ms(2_500)).count();
        // Between 10 and 200 ms apart.
        assert!((12..=260).contains(&late), "{late} polls in the second half: {polls:?}");
    }
}

#[test]
fn z3_a_size_that_cannot_be_is_unknown_and_does_not_hold_the_switchover_up() {
    for initial_bytes in [0, u64::MAX - 7] {
        let mut brain = brain(10_000);
        run(&mut brain, Time::from_ms(5_000), initial_bytes);
        assert_eq!(brain.status().attempts, 1, "{initial_bytes}");
    }
    let mut brain = brain(10_000);
    run(&mut brain, Time::from_ms(5_000), 1000);
    assert_eq!(brain.status().attempts, 0, "a thousand bytes can be, and are not read");
}

#[test]
fn a_pause_that_was_slow_once_does_not_keep_the_switchover_from_being_tried_again() {
    let mut brain = brain(300);
    run_pausing(&mut brain, Time::from_ms(5_000), 0, &[Time::from_ms(280)]);
    let status = brain.status();
    assert_eq!((status.attempts, status.revocations), (2, 1));
    assert_ne!(status.state, State::Precopy, "the second went on");
}

/// The answer to a question that was out when the guest reset the device speaks of a dead session. To
/// read for it would take the first bytes of the next session under the name of the last one.
#[test]
fn x9_an_answer_from_before_a_guest_reset_reads_nothing() {
    for info in [Info::Unknown, Info::Known { initial_bytes: 9, dirty_bytes: 9, reinit: false }] {
        let mut brain = brain(0);
        run(&mut brain, Time::from_ms(1_000), 0);
        let now = Time::from_ms(2_000);
        let asks = |action: &Action| {
            matches!(action, Action::Handover(Handover::Call(NIC, DeviceCall::Info)))
        };
        assert!(brain.handle(now, None).iter().any(asks), "a poll is out");
        brain.handle(now, Some(Event::DeviceReset(NIC)));
        let answer =
            Event::Info { device: NIC, info, stop_copy_bytes: None, offset: 10, took: Time(1) };
        let actions = brain.handle(now, Some(answer));
        let reads = |action: &Action| matches!(action, Action::Handover(Handover::Read(_)));
        assert!(!actions.iter().any(reads), "{info:?}: {actions:?}");
    }
}

/// A guest that dirties `dirty_bytes_per_s` all the time, over a link of 1 GB/s; syncs take half a ms. Runs until the
/// vCPUs are to pause, or `until`; answers when that was, and when each pass began.
fn chase(brain: &mut Source, dirty_bytes_per_s: u64, until: Time) -> (Option<Time>, Vec<Time>) {
    const LINK_BYTES_PER_MS: u64 = 1_000_000;
    let (mut now, mut synced, mut left) = (Time(0), Time(0), 1u64 << 30);
    let mut passes = Vec::new();
    let accept = Message::Accept { features: Features::default(), instance: Id(3), secret: Id(4) };
    let mut events = VecDeque::from([
        Event::LinkUp(LINK),
        Event::Message(LINK, accept),
        Event::Message(LINK, Message::DescribeOk),
    ]);
    while now < until {
        let event = events.pop_front();
        if event.is_none() {
            now = now.max(brain.next_timer().expect("something is due"));
        }
        for action in brain.handle(now, event) {
            let answer = match action {
                Action::Handover(Handover::StartTracking) => Event::TrackingStarted(Ok(())),
                Action::Handover(Handover::Pause) => return (Some(now), passes),
                Action::SyncPass => {
                    now = now + Time::from_us(500);
                    let dirtied = dirty_bytes_per_s / 1_000 * now.since(synced).0 / 1_000_000;
                    (synced, left) = (now, dirtied.min(64 << 20));
                    Event::PassSynced { dirty_bytes: left, exposed: None, answer: Ok(()) }
                }
                Action::SendPass(_) => {
                    passes.push(now);
                    let busy = Time::from_us(left * 1_000 / LINK_BYTES_PER_MS);
                    now = now + busy;
                    events.push_back(Event::LinkSample { bytes: left, busy });
                    Event::PassSent(Ok(()))
                }
                _ => continue,
            };
            events.push_back(answer);
        }
    }
    (None, passes)
}

fn without_devices(limit_ms: u64) -> Source {
    with_features(limit_ms, Features::default())
}

fn with_features(limit_ms: u64, features: Features) -> Source {
    let setup = Setup {
        migration: Id(1),
        instance: Id(2),
        features,
        description: String::new(),
        devices: Vec::new(),
        dry_run: false,
    };
    let downtime_limit = Time::from_ms(limit_ms);
    Source::new(setup, Config { downtime_limit, ..Config::default() }, 1 << 30)
}

#[test]
fn memory_that_shrinks_is_chased_without_a_wait() {
    // At the shortest interval between passes 5 MB are dirty each time, which alone is half of the limit.
    let mut brain = without_devices(10);
    let (paused, passes) = chase(&mut brain, 500_000_000, Time::from_ms(20_000));
    let paused = paused.expect("the limit is within reach");
    assert!(passes.len() <= 16, "{passes:?}");
    let first = passes[1];
    assert!(paused.since(first) < Time::from_ms(300), "from {first} to {paused}: {passes:?}");
    // Memory that does not shrink is not chased: each pass costs the guest write faults.
    let mut brain = without_devices(1);
    let (_, passes) = chase(&mut brain, 950_000_000, Time::from_ms(2_500));
    let late: Vec<_> = passes.iter().filter(|at| **at > Time::from_ms(2_000)).collect();
    assert!(!late.is_empty() && late.len() <= 51, "{} passes in half a second", late.len());
}

#[test]
fn a_guest_that_is_held_back_is_synced_ten_times_a_second() {
    // Each sync costs a fifth of a millisecond of CPU time: 50 a second would be more than 1 % of a core.
    let mut brain = brain(0);
    let seen = run(&mut brain, Time::from_ms(5_000), 0);
    let late =
        |(at, action): &&(Time, Action)| *action == Action::SyncPass && *at > Time::from_ms(3_000);
    let syncs = seen.iter().filter(late).count();
    assert!((15..=21).contains(&syncs), "{syncs} syncs in two seconds");
}

#[test]
fn syncs_of_a_running_guest_say_what_those_of_a_blackout_take() {
    let mut brain = without_devices(50);
    chase(&mut brain, 150_000_000, Time::from_ms(20_000)).0.expect("a switchover");
    let estimate = brain.estimator().estimate(Ahead::All, Time(0));
    let sync = estimate.terms.iter().find(|term| term.name == "final-sync").expect("a term");
    assert!(matches!(sync.basis, Basis::Measured(n) if n >= 1), "{sync:?}");
    assert_eq!(sync.time, Some(Time::from_us(500)), "{sync:?}");
}

/// When the vCPUs are to pause of an idle guest whose destination takes so long to accept, leaves so many echoes without
/// answer, and else answers after 200 µs; the link carries 1 GB/s. And when the first pass was sent, and the echoes.
fn paused_after(features: Features, accept_took: Time, lost: u64) -> (Time, Time, Vec<Time>) {
    let mut brain = with_features(10, features);
    let (answer, sync) = (Time::from_us(200), Time::from_us(500));
    let accept = Message::Accept { features, instance: Id(3), secret: Id(4) };
    let mut queue = BTreeMap::from([
        ((Time(0), 0), Event::LinkUp(LINK)),
        ((accept_took, 1), Event::Message(LINK, accept)),
        ((accept_took + answer, 2), Event::Message(LINK, Message::DescribeOk)),
    ]);
    let (mut now, mut count, mut sent, mut echoes) = (Time(0), 2, Time(0), Vec::new());
    while now < Time::from_ms(20_000) {
        let first = queue.first_key_value().map(|((at, _), _)| *at);
        let timer = brain.next_timer();
        now = now.max(first.into_iter().chain(timer).min().expect("something is due"));
        let event = first.filter(|at| *at <= now).and_then(|_| queue.pop_first());
        for action in brain.handle(now, event.map(|(_, event)| event)) {
            let (after, events) = match action {
                Action::Handover(Handover::StartTracking) => {
                    (Time(0), vec![Event::TrackingStarted(Ok(()))])
                }
                Action::Handover(Handover::Send(Message::Echo { number })) if number <= lost => {
                    echoes.push(now);
                    continue;
                }
                Action::Handover(Handover::Send(Message::Echo { number })) => {
                    echoes.push(now);
                    // One of another number, and one more, say nothing.
                    let echoed = |number| Event::Message(LINK, Message::Echoed { number });
                    (answer, vec![echoed(number + 1), echoed(number), echoed(number)])
                }
                Action::Handover(Handover::Pause) => return (now, sent, echoes),
                Action::SyncPass => {
                    let synced =
                        Event::PassSynced { dirty_bytes: 4096, exposed: None, answer: Ok(()) };
                    (sync, vec![synced])
                }
                Action::SendPass(pass) => {
                    let bytes = if pass == 1 { 1 << 30 } else { 4096 };
                    let busy = Time(bytes);
                    if pass == 1 {
                        sent = now + busy;
                    }
                    (busy, vec![Event::LinkSample { bytes, busy }, Event::PassSent(Ok(()))])
                }
                _ => continue,
            };
            for event in events {
                count += 1;
                queue.insert((now + after, count), event);
            }
        }
    }
    panic!("no switchover");
}

#[test]
fn an_answer_that_was_slow_once_does_not_keep_a_tight_limit_out_of_reach_where_echoes_are_answered()
{
    let slow = Time::from_ms(9);
    // The one sample there is: only when the limit is given up.
    let (paused, sent, echoes) = paused_after(Features::default(), slow, 0);
    assert!(paused.since(sent) >= Config::default().give_up_after, "from {sent} to {paused}");
    assert!(echoes.is_empty(), "a destination that does not know them is sent none");
    let echo = Features { echo: true, ..Features::default() };
    let (paused, sent, echoes) = paused_after(echo, slow, 0);
    assert!(paused.since(sent) < Time::from_ms(300), "from {sent} to {paused}");
    // Eight at once, then two a second.
    assert!((9..=11).contains(&echoes.len()), "{echoes:?}");
}

#[test]
fn an_echo_that_is_lost_is_followed_by_another() {
    let echo = Features { echo: true, ..Features::default() };
    let (.., echoes) = paused_after(echo, Time::from_ms(9), 1);
    assert_eq!(echoes[1].since(echoes[0]), Time::from_ms(1000));
    assert!(echoes.len() > 8, "and that one by more: {echoes:?}");
}
