//! Both bodies of the engine with a toy VM: moves, ways back from every phase, links that break at every
//! frame, delays, flipped bytes, and guests that are the same on the other side.

#[path = "engine/hosts.rs"]
mod hosts;
#[path = "engine/toy.rs"]
mod toy;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hosts::*;
use migration::channel::{ControlReceiver, ControlSender, connect};
use migration::testing::proxy::{Action, At, Channel, Direction};
use migration::trace;
use migration::wire::kind;
use migration::{Controls, Outgoing, OutgoingConfig, Vmm};
use switchover::message::{Connection, Features, Id, Message};
use switchover::trace::What;
use toy::ToyVm;

#[test]
fn a_guest_moves_whole_over_unix_and_tcp_with_and_without_devices() {
    for (devices, tcp) in [(0, false), (1, false), (2, true)] {
        let what = format!("{devices} devices, tcp {tcp}");
        let hosts = Hosts::new(PAGES, devices, tcp);
        let before = hosts.source.guest_counter();
        let report = hosts.migrate();
        assert_eq!(report.status, "completed", "{what}: {:?}", report.failure);
        assert_eq!(report.memory_identical, Some(true), "{what}");
        hosts.assert_runs_there(&what);
        assert!(hosts.destination.guest_counter() > before, "{what}");
        assert!(report.downtime_ms.is_some() && report.ram.normal > 0, "{what}");
        for device in &report.devices {
            assert_eq!((device.acks, device.initial_bytes), (1, 150_000), "{what}");
            assert_eq!(device.stop_copy_bytes, 200_000, "{what}");
        }
    }
}

#[test]
fn a_machine_without_state_sections_moves_at_the_first_attempt_and_after_a_roll_back() {
    for rolled_back in [false, true] {
        let hosts = Hosts::new(PAGES, 1, false);
        hosts.source.forget_machine_state();
        hosts.destination.forget_machine_state();
        let report = match rolled_back {
            false => hosts.migrate(),
            true => hosts.migrate_holding("await-ready", Outgoing::take_back),
        };
        assert_eq!(report.switchover_attempts, 1 + u64::from(rolled_back));
        hosts.assert_moved(&report, &format!("rolled back {rolled_back}"));
    }
}

#[test]
fn cancelled_in_each_phase_the_guest_stays_and_moves_later() {
    for phase in ["setup", "precopy", "look", "quiesce", "stop-copy", "await-ready"] {
        let hosts = Hosts::small();
        let report = hosts.migrate_holding(phase, Outgoing::cancel);
        assert_eq!(report.status, "cancelled", "{phase}: {:?}", report.failure);
        hosts.assert_stayed(phase);
        hosts.assert_moved(&hosts.migrate(), phase);
    }
}

#[test]
fn a_destination_that_ends_in_each_phase_leaves_the_guest_at_the_source() {
    for phase in ["precopy", "look", "quiesce", "stop-copy", "await-ready"] {
        let hosts = Hosts::small();
        let report = hosts.migrate_holding(phase, |_| {
            hosts.incoming.cancel();
            until("cancelled there", || hosts.incoming.status().state == "listening");
        });
        assert_eq!(report.status, "cancelled", "{phase}: {:?}", report.failure);
        hosts.assert_stayed(phase);
        hosts.assert_moved(&hosts.migrate(), phase);
    }
}

#[test]
fn control_cut_before_every_frame_to_the_destination() {
    cut_everywhere(Channel::Control, Direction::ToDestination, Action::Cut, 1);
}

#[test]
fn control_cut_within_every_frame_to_the_source() {
    cut_everywhere(Channel::Control, Direction::ToSource, Action::CutWithin, 1);
}

#[test]
fn link_down_after_every_control_frame_to_the_destination() {
    cut_everywhere(Channel::Control, Direction::ToDestination, Action::LinkDownAfter, 1);
}

#[test]
fn data_cut_within_every_third_frame() {
    cut_everywhere(Channel::Data(0), Direction::ToDestination, Action::CutWithin, 3);
}

#[test]
fn a_delayed_channel_changes_nothing_but_time_and_no_word_overtakes_its_data() {
    let late = Action::Delay(Duration::from_millis(200));
    let (control, data) = (Channel::Control, Channel::Data(0));
    let to = Direction::ToDestination;
    let places = [
        (data, At::Kind(kind::DEVICE, 0)),
        (data, At::Kind(kind::DEVICE, 3)),
        (data, At::Kind(kind::RAM_PAGES, 0)),
        (data, At::Kind(kind::SECTION, 0)),
        (control, At::Kind(kind::SESSION_BEGIN, 0)),
        (control, At::Kind(kind::INITIAL_DATA_SENT, 0)),
        (control, At::Kind(kind::STATE_END, 0)),
    ];
    for (channel, at) in places {
        let what = format!("{channel:?} {at:?}");
        let hosts = Arc::new(Hosts::new(PAGES, 1, false));
        hosts.fault(channel, to, at, late);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (noted, looking) = (Arc::clone(&seen), Arc::downgrade(&hosts));
        hosts.destination.toy(0).on_write = Some(Arc::new(move || {
            let Some(hosts) = looking.upgrade() else { return };
            let count = |kind| hosts.proxy.seen(Channel::Control, Direction::ToSource, kind);
            noted.lock().unwrap().push((count(kind::SWITCHOVER_ACK), count(kind::READY)));
        }));
        let report = hosts.migrate();
        hosts.destination.toy(0).on_write = None;
        assert_eq!(hosts.proxy.struck().len(), 1, "{what}");
        hosts.assert_moved(&report, &what);
        // Initial data comes in 5 or more writes of at most 30,000 bytes: none of them is behind an
        // acknowledgement, and none of all is behind Ready.
        let seen = seen.lock().unwrap();
        assert!(seen.len() >= 12, "{what}: {seen:?}");
        assert!(seen.iter().take(5).all(|(acks, _)| *acks == 0), "{what}: {seen:?}");
        assert!(seen.iter().all(|(_, readies)| *readies == 0), "{what}: {seen:?}");
        assert_eq!(hosts.proxy.seen(Channel::Control, Direction::ToSource, kind::READY), 1);
    }
}

#[test]
fn flipped_bytes_are_reported_and_the_guest_stays() {
    let flip = Action::Corrupt { byte: 90, mask: 0x10 };
    for (what, kind, ram_checksum, word) in [
        ("device data", kind::DEVICE, false, "checksum"),
        ("machine state", kind::SECTION, false, "checksum"),
        ("a page with a checksum", kind::RAM_PAGES, true, "checksum"),
    ] {
        let hosts = Hosts::small();
        hosts.fault(Channel::Data(0), Direction::ToDestination, At::Kind(kind, 0), flip);
        let report = report(&hosts.start(OutgoingConfig { ram_checksum, ..hosts.config() }));
        assert_eq!(hosts.proxy.struck().len(), 1, "{what}");
        assert_eq!(report.status, "failed", "{what}");
        let failure = report.failure.unwrap();
        assert!(failure.what.contains(word), "{what}: {failure}");
        hosts.assert_stayed(what);
        hosts.assert_moved(&hosts.migrate(), what);
    }
}

#[test]
fn a_flipped_page_without_a_checksum_is_found_by_verification() {
    let hosts = Hosts::new(PAGES, 0, false);
    // Once each of the guest's own pages is written, three frames hold them, and the fourth begins the part
    // of memory that stays as it is.
    until("the guest's pages are written", || hosts.source.steps() > 8);
    let flip = Action::Corrupt { byte: 50_000, mask: 1 };
    let at = At::Kind(kind::RAM_PAGES, 3);
    hosts.fault(Channel::Data(0), Direction::ToDestination, at, flip);
    let report = hosts.migrate();
    assert_eq!(hosts.proxy.struck().len(), 1);
    assert_eq!(report.memory_identical, Some(false), "{:?}", report.failure);
    assert_eq!(report.status, "failed");
    hosts.assert_stayed("a flipped page");
    hosts.assert_moved(&hosts.migrate(), "after a flipped page");
}

#[test]
fn without_a_source_of_dirty_pages_memory_is_not_identical() {
    let (no_dma, no_vmm) = (
        Controls { ignore_dma_log: true, ..Controls::default() },
        Controls { ignore_vmm_writes: true, ..Controls::default() },
    );
    for controls in [no_dma, no_vmm] {
        let hosts = Hosts::small();
        // The guest writes on while the first pass is done and the switchover is not.
        let (observer, reached, let_go) = hold(&hosts, "look");
        let outgoing = hosts.start(OutgoingConfig { controls, observer, ..hosts.config() });
        reached.recv_timeout(LIMIT).unwrap();
        goes_on(&hosts.source, "held in look");
        drop(let_go);
        let report = report(&outgoing);
        assert_eq!(report.memory_identical, Some(false), "{controls:?}: {:?}", report.failure);
        assert_eq!(report.status, "failed", "{controls:?}");
        hosts.assert_stayed("a negative control");
        hosts.assert_moved(&hosts.migrate(), "after a negative control");
    }
}

#[test]
fn l9_a_failed_report_makes_all_memory_dirty_although_later_reports_succeed() {
    let hosts = Hosts::small();
    // With the first sync, when the first pass has sent every page.
    hosts.source.toy(1).fail_report = true;
    let report = hosts.migrate();
    assert!(!hosts.source.toy(1).fail_report, "no report was asked for");
    hosts.assert_moved(&report, "a failed report");
}

#[test]
fn a_device_that_the_guest_resets_late_loses_no_page_with_its_log() {
    let hosts = Hosts::small();
    let report = hosts.migrate_holding("look", |_| hosts.source.reset_device(0));
    hosts.assert_moved(&report, "a device reset");
    assert!(report.timeline.iter().any(|entry| entry.event == "device-reset"), "{report:?}");
}

#[test]
fn a_write_that_fails_behind_the_engines_back_keeps_the_guest_at_the_source() {
    let hosts = Hosts::small();
    hosts.destination.toy(0).fail_settle = true;
    let report = hosts.migrate();
    assert_eq!(report.status, "failed", "{report:?}");
    let failure = report.failure.expect("a reason");
    assert_eq!((failure.errno, failure.call.as_deref()), (Some(libc::ENOSPC), Some("write")));
    assert!(!hosts.destination.toy(0).fail_settle, "nothing was waited for");
    hosts.assert_stayed("a failed write");
    hosts.assert_moved(&hosts.migrate(), "the next one");
}

#[test]
fn cancel_does_not_wait_for_a_destination_that_takes_nothing_in() {
    // More than the sockets between them hold.
    for kind in [kind::RAM_PAGES, kind::DEVICE] {
        let hosts = Hosts::new(8192, 1, false);
        let stalled = At::Kind(kind, 0);
        let to = Direction::ToDestination;
        hosts.fault(Channel::Data(0), to, stalled, Action::Clog);
        // It does not hear of the end either, and so does not free the source by closing its side.
        hosts.fault(Channel::Control, to, At::Kind(kind::CANCEL, 0), Action::Stall);
        let outgoing = hosts.start(hosts.config());
        until("stalled", || !hosts.proxy.struck().is_empty());
        goes_on(&hosts.source, "stalled");
        assert_eq!(outgoing.report(), None, "it cannot go on");
        outgoing.cancel();
        assert_eq!(report(&outgoing).status, "cancelled");
        hosts.assert_ended_by_itself();
        goes_on(&hosts.source, "cancelled");
        assert!(hosts.source.is_untracked(), "the source still tracks");
        assert_eq!(hosts.proxy.struck().len(), 2);
        hosts.assert_moved(&hosts.migrate(), "after a stall");
    }
}

#[test]
fn an_end_in_the_middle_of_loading_machine_state_waits_for_it_and_is_an_end() {
    type End = fn(&Hosts);
    let ends: [(&str, End); 2] = [
        ("cancelled", |hosts| hosts.incoming.cancel()),
        ("failed", |hosts| hosts.proxy.link_down()),
    ];
    for (status, end) in ends {
        let hosts = Arc::new(Hosts::small());
        let there = Arc::downgrade(&hosts);
        hosts.destination.on_load(Arc::new(move || {
            if let Some(hosts) = there.upgrade() {
                end(&hosts);
            }
        }));
        let report = hosts.migrate();
        assert_eq!(report.status, status, "{:?}", report.failure);
        hosts.assert_stayed(status);
        // The load that ends afterwards does not make it a prepared guest.
        std::thread::sleep(Duration::from_millis(200));
        hosts.assert_stayed(status);
        hosts.assert_moved(&hosts.migrate(), status);
    }
}

#[test]
fn a_guest_that_stands_still_does_not_wait_for_a_destination_that_takes_nothing_in() {
    let hosts = Hosts::new(8192, 1, false);
    let to = Direction::ToDestination;
    // The device's initial data was four frames; what it sends next is what it holds when it has stopped.
    hosts.fault(Channel::Data(0), to, At::Kind(kind::DEVICE, 4), Action::Clog);
    // It does not hear of the end either, in whichever words, and so does not close its side.
    for word in [kind::CANCEL, kind::ABORT] {
        hosts.fault(Channel::Control, to, At::Kind(word, 0), Action::Stall);
    }
    let (observer, reached, let_go) = hold(&hosts, "stop-copy");
    let outgoing = hosts.start(OutgoingConfig { observer, ..hosts.config() });
    reached.recv_timeout(LIMIT).unwrap();
    // More than the sockets between them hold.
    hosts.source.dirty_all();
    drop(let_go);
    until("stalled", || !hosts.proxy.struck().is_empty());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((outgoing.report(), hosts.source.runs()), (None, false), "it cannot go on");
    outgoing.cancel();
    assert_eq!(report(&outgoing).status, "cancelled");
    hosts.assert_ended_by_itself();
    goes_on(&hosts.source, "cancelled");
    assert!(hosts.source.is_untracked(), "the source still tracks");
    hosts.assert_moved(&hosts.migrate(), "after a stall");
}

#[test]
fn tracking_of_a_second_migration_is_not_stopped_by_the_first() {
    let hosts = Hosts::small();
    for _ in 0..5 {
        let report = hosts.migrate_holding("precopy", Outgoing::cancel);
        assert_eq!(report.status, "cancelled", "{:?}", report.failure);
        // Not a moment later.
        assert!(hosts.source.is_untracked(), "the end was told before it was one");
    }
    hosts.assert_moved(&hosts.migrate(), "the sixth");
}

#[test]
fn garbage_on_the_port_does_not_keep_a_guest_from_moving() {
    let hosts = Hosts::small();
    let mut absurd = Vec::from(*b"VFY1");
    absurd.extend_from_slice(&[0xff; 60]);
    let garbage: [&[u8]; 5] = [b"", b"GET / HTTP/1.1\r\n\r\n", &[0; 100], b"VFY1", &absurd];
    let mut open = Vec::new();
    for bytes in garbage {
        let mut stream = connect(&hosts.incoming.local_address(), LIMIT).unwrap();
        // It may be closed already.
        let _ = stream.write_all(bytes);
        open.push(stream);
    }
    hosts.assert_moved(&hosts.migrate(), "beside garbage");
}

#[test]
fn a_second_source_is_refused_while_one_is_at_it_and_by_a_guest_that_runs() {
    let hosts = Hosts::small();
    let report = hosts.migrate_holding("precopy", |_| {
        // Of this same process the later one wins; what a foreign one hears is tested with processes.
        assert_eq!(hosts.incoming.status().state, "loading");
    });
    hosts.assert_moved(&report, "undisturbed");
    let other = ToyVm::new(true, PAGES, 2);
    let config = OutgoingConfig::new(hosts.incoming.local_address());
    let refused = self::report(&Outgoing::start(Arc::clone(&other) as Arc<dyn Vmm>, config));
    assert_eq!(refused.status, "failed");
    let failure = refused.failure.unwrap();
    assert!(failure.what.contains("already runs here"), "{failure}");
    goes_on(&other, "refused");
    hosts.assert_runs_there("after a refusal");
}

#[test]
fn the_round_trip_is_asked_while_the_guest_runs_and_is_in_the_trace() {
    let hosts = Hosts::small();
    let mut config = hosts.config();
    let file = hosts.dir.path().join("trace");
    config.trace = Some(file.clone());
    hosts.assert_moved(&report(&hosts.start(config)), "traced");
    let trace = trace::load(&file).unwrap();
    let place = |is: fn(&What) -> bool| trace.entries.iter().position(|entry| is(&entry.what));
    let paused = place(|what| *what == What::Paused).expect("a pause");
    let echo = place(|what| matches!(what, What::Echo { .. })).expect("an echo");
    assert!(echo < paused, "{:?}", trace.entries);
}

#[test]
fn echoes_are_answered_by_their_number_and_a_flood_of_them_does_no_harm() {
    let hosts = Hosts::small();
    let stream = connect(&hosts.incoming.local_address(), LIMIT).unwrap();
    let mut receiver = ControlReceiver::new(stream.try_clone().unwrap());
    let sender = ControlSender::new(stream);
    let features = Features { echo: true, ..Features::default() };
    let (migration, instance, connection) = (Id(1), Id(2), Connection(1));
    sender
        .send(Message::Hello { features, migration, instance, connection, secret: None })
        .unwrap();
    assert!(matches!(receiver.recv().unwrap(), Message::Accept { features, .. } if features.echo));
    let mut echoed = || loop {
        if let Message::Echoed { number } = receiver.recv().unwrap() {
            return number;
        }
    };
    for number in [1, 1, u64::MAX] {
        sender.send(Message::Echo { number }).unwrap();
        assert_eq!(echoed(), number);
    }
    // Nobody reads the answers; some are lost, and the channel stays.
    (0..20_000).for_each(|number| drop(sender.send(Message::Echo { number })));
    let first = echoed();
    assert_eq!(first, 0);
    let mut last = first;
    while last < 1_000 {
        let next = echoed();
        assert!(next > last, "{next} after {last}");
        last = next;
    }
}
