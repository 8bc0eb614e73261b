//! The engine with several data channels: moves, ways back, and cuts of any of them.

#[path = "engine/hosts.rs"]
mod hosts;
#[path = "engine/toy.rs"]
mod toy;

use hosts::*;
use migration::ram::{Codec, Populate};
use migration::testing::proxy::{Action, Channel, Direction};
use migration::{Outgoing, OutgoingConfig, Report};

/// Five blocks of 2 MiB: each of up to four channels has some.
const LARGE: u64 = 5 * 512;

fn with_channels(hosts: &Hosts, channels: u16) -> OutgoingConfig {
    OutgoingConfig { channels: Some(channels), ..hosts.config() }
}

fn migrate(hosts: &Hosts, channels: u16) -> Report {
    report(&hosts.start(with_channels(hosts, channels)))
}

#[test]
fn a_guest_moves_whole_over_any_number_of_channels() {
    for (channels, tcp, populate) in
        [(1, false, Populate::Used), (2, true, Populate::All), (4, false, Populate::All)]
    {
        let what = format!("{channels} channels, tcp {tcp}, {populate:?}");
        let hosts = Hosts::with(LARGE, 2, tcp, |config| config.populate = populate);
        let report = migrate(&hosts, channels);
        hosts.assert_moved(&report, &what);
        assert_eq!(report.ram.channels, channels, "{what}");
        for channel in 0..channels {
            let pages = hosts.proxy.seen(
                Channel::Data(channel),
                Direction::ToDestination,
                migration::wire::kind::RAM_PAGES,
            );
            let zero = hosts.proxy.seen(
                Channel::Data(channel),
                Direction::ToDestination,
                migration::wire::kind::RAM_ZERO,
            );
            assert!(pages + zero > 0, "{what}: nothing went over channel {channel}");
        }
    }
}

/// With a limit that would take hours nothing moves, on either channel; as soon as it is none, everything does.
#[test]
fn the_bandwidth_is_limited_and_the_limit_can_be_changed() {
    let hosts = Hosts::new(LARGE, 0, false);
    hosts.source.dirty_all();
    let mut config = with_channels(&hosts, 2);
    config.max_bandwidth_bytes_per_s = 1_000;
    let outgoing = hosts.start(config);
    until("it is under way", || outgoing.progress().state == "precopy");
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(outgoing.report().is_none(), "not limited");
    outgoing.set_max_bandwidth(0);
    hosts.assert_moved(&report(&outgoing), "the limit is lifted");
}

/// Memory of a toy is a word per page: all of it shrinks. Whether it goes on being compressed is the channel's business.
#[test]
fn a_guest_moves_compressed_and_the_report_says_so() {
    for codec in [None, Some(Codec::Lz4), Some(Codec::Zstd)] {
        let hosts = Hosts::new(LARGE, 1, false);
        hosts.source.dirty_all();
        let mut config = with_channels(&hosts, 2);
        config.compression = codec;
        let outgoing = hosts.start(config);
        let report = report(&outgoing);
        hosts.assert_moved(&report, "compressed");
        assert_eq!(report.ram.compressed > 0, codec.is_some(), "{codec:?}: {:?}", report.ram);
        assert!(report.ram.compressed_size <= report.ram.compressed * 4096 / 2);
        assert!(report.ram.compressed <= report.ram.normal);
    }
}

#[test]
fn more_channels_than_there_may_be_are_refused_by_both_numbers() {
    for channels in [0, 65, u16::MAX] {
        let hosts = Hosts::new(PAGES, 0, false);
        let report = migrate(&hosts, channels);
        assert_eq!(report.status, "failed");
        let failure = report.failure.as_ref().unwrap().to_string();
        assert!(
            failure.contains(&format!("data channels: source {channels}, 1 to 64")),
            "{failure}"
        );
        hosts.assert_stayed(&failure);
    }
}

#[test]
fn cancelled_in_each_phase_nothing_is_left_of_any_channel() {
    for phase in ["setup", "precopy", "look", "quiesce", "stop-copy", "await-ready"] {
        let hosts = Hosts::new(LARGE, 2, false);
        let (observer, reached, let_go) = hold(&hosts, phase);
        let outgoing = hosts.start(OutgoingConfig { observer, ..with_channels(&hosts, 3) });
        reached.recv_timeout(LIMIT).unwrap();
        outgoing.cancel();
        drop(let_go);
        let report = report(&outgoing);
        assert_eq!(report.status, "cancelled", "{phase}: {:?}", report.failure);
        hosts.assert_stayed(phase);
        hosts.assert_moved(&migrate(&hosts, 2), phase);
    }
}

/// Devices have stopped, their streams and the last memory are on several channels: all of them end and new ones
/// come.
#[test]
fn a_switchover_over_several_channels_is_rolled_back_and_tried_again() {
    for phase in ["stop-copy", "await-ready"] {
        let hosts = Hosts::new(LARGE, 3, false);
        let (observer, reached, let_go) = hold(&hosts, phase);
        let outgoing = hosts.start(OutgoingConfig { observer, ..with_channels(&hosts, 3) });
        reached.recv_timeout(LIMIT).unwrap();
        Outgoing::take_back(&outgoing);
        drop(let_go);
        let report = report(&outgoing);
        hosts.assert_moved(&report, phase);
        assert_eq!(report.switchover_roll_backs, 1, "{phase}");
        assert_eq!(report.ram.channels, 3, "{phase}");
    }
}

/// Whichever channel is cut, and wherever: one of both runs, and the next try moves the guest.
#[test]
fn any_of_several_channels_may_be_cut() {
    for channel in 0..3 {
        let fault = (Channel::Data(channel), Direction::ToDestination, Action::CutWithin);
        let make = || Hosts::new(LARGE, 1, false);
        cut_at(fault, (0..24).step_by(5), make, |hosts| migrate(hosts, 3));
    }
}
