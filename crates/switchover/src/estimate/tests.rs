//! The estimator as a whole.

use super::*;

fn new(devices: usize) -> Estimator {
    Estimator::new(devices, Knowledge::default(), 990)
}

fn all(estimator: &Estimator) -> Estimate {
    estimator.estimate(Ahead::All, Time(0))
}

#[test]
fn an_unknown_size_makes_the_total_unknown_and_never_zero() {
    let mut estimator = new(2);
    assert!(all(&estimator).total().is_some());
    estimator.device_remaining(DeviceIndex(1), None);
    let estimate = all(&estimator);
    assert_eq!((estimate.total(), estimate.upper()), (None, None));
    assert!(estimate.known > Time(0));
    assert_eq!(estimate.term("transfer").unwrap().basis, Basis::Unknown);
    // What lies behind the transfer does not depend on sizes.
    assert!(estimator.estimate(Ahead::FromCommit, Time(0)).total().is_some());
}

#[test]
fn the_slowest_pipeline_decides_the_transfer() {
    let mut estimator = new(2);
    estimator.link_sent(1 << 30, Time(1 << 30));
    estimator.device_remaining(DeviceIndex(0), Some(100_000_000));
    let transfer = |e: &Estimator| {
        let time = e.estimate(Ahead::FromStop, Time(0)).term("transfer").and_then(|t| t.time);
        time.unwrap().as_ms().round()
    };
    let chunk = Time((1 << 20) * 10);
    (0..2).for_each(|_| estimator.device_read(DeviceIndex(0), 1 << 20, chunk));
    // 100 MB read at 0.1 GB/s, not sent at 1 GB/s.
    assert_eq!(transfer(&estimator), 1_000.0);
    // RAM goes when the devices are drained.
    estimator.ram_dirty(500_000_000, 0);
    assert_eq!(transfer(&estimator), 1_500.0);
}

#[test]
fn quantiles_of_the_total_are_not_those_of_the_terms_added_up() {
    let estimate = all(&new(3));
    let added: u64 = estimate.terms.iter().filter_map(|term| term.upper).map(|t| t.0).sum();
    assert!(estimate.known_upper.0 < added * 4 / 5, "{} of {added}", estimate.known_upper.0);
    assert!(estimate.known_upper > estimate.known);
    assert_eq!(all(&new(3)), estimate, "the same question has the same answer");
}

#[test]
fn what_is_dirtied_until_the_guest_stands_is_charged() {
    let mut estimator = new(0);
    estimator.link_sent(1 << 30, Time(1 << 30));
    estimator.ram_dirty(0, 1_000_000_000);
    let transfer = |unsynced| {
        let estimate = estimator.estimate(Ahead::All, unsynced);
        estimate.term("transfer").and_then(|term| term.time).unwrap()
    };
    let (at_once, later) = (transfer(Time(0)), transfer(Time::from_ms(40)));
    assert_eq!(later.since(at_once).as_ms().round(), 40.0);
    let paused = estimator.estimate(Ahead::FromQuiesce, Time::from_ms(40));
    assert_eq!(paused.term("transfer").unwrap().time, Some(Time(0)), "the guest stands");
}

#[test]
fn a_cold_device_is_charged_once_and_a_loaded_one_is_not() {
    let prior = DevicePrior { load_cold: Range::exactly(1_480_000_000), ..DevicePrior::default() };
    let devices = vec![DeviceKnowledge { prior, ..DeviceKnowledge::default() }];
    let knowledge = Knowledge { devices, ..Knowledge::default() };
    let mut estimator = Estimator::new(1, knowledge, 990);
    assert!(all(&estimator).known > Time::from_ms(1_480));
    estimator.device_acked(DeviceIndex(0), 4096);
    assert!(all(&estimator).known_upper < Time::from_ms(300));
}

#[test]
fn a_liar_is_known_from_its_past() {
    let knowledge = |history| Knowledge {
        devices: vec![DeviceKnowledge { kind: "liar".into(), ..DeviceKnowledge::default() }],
        history,
        ..Knowledge::default()
    };
    let mut estimator = Estimator::new(1, knowledge(History::default()), 990);
    estimator.device_remaining(DeviceIndex(0), Some(30_000_000));
    let believed = all(&estimator).known;
    for _ in 0..8 {
        estimator.stop_copy_had(DeviceIndex(0), 300_000_000, 30_000_000);
    }
    let history = estimator.history(&[]);
    let mut next = Estimator::new(1, knowledge(history), 990);
    next.device_remaining(DeviceIndex(0), Some(30_000_000));
    assert!(all(&next).known_upper > believed + Time::from_ms(250));
}

#[test]
fn whole_blackouts_correct_what_the_terms_add_up_to() {
    let knowledge = |history| Knowledge {
        host: HostKnowledge { pair: "a → b".into(), ..HostKnowledge::default() },
        history,
        ..Knowledge::default()
    };
    let mut history = History::default();
    let mut modelled = Time(0);
    for number in 0..200 {
        let estimator = Estimator::new(1, knowledge(history), 990);
        let estimate = all(&estimator);
        modelled = estimate.modelled;
        // Three times what is expected, and now and then ten times.
        let factor = if number % 50 == 7 { 10 } else { 3 };
        let took = Time(estimate.modelled.0 * factor);
        history = estimator.history(&[Stretch { ahead: Ahead::All, modelled, took }]);
    }
    let estimate = all(&Estimator::new(1, knowledge(history), 990));
    // The first ones are those the terms were learnt from.
    assert_eq!(estimate.basis, Basis::History(184));
    assert_eq!((estimate.known.0, estimate.known_upper.0), (modelled.0 * 3, modelled.0 * 10));
}

#[test]
fn a_device_is_blamed_for_its_own_part() {
    let mut estimator = new(2);
    estimator.device_remaining(DeviceIndex(0), Some(4 << 30));
    estimator.device_remaining(DeviceIndex(1), Some(4 << 10));
    let (large, small) = (estimator.alone(DeviceIndex(0)), estimator.alone(DeviceIndex(1)));
    assert!(large > Some(Time::from_ms(4_000)), "{large:?}");
    assert!(small < Some(Time::from_ms(100)), "{small:?}");
    assert_eq!(estimator.floor().dominating().unwrap().name, "transfer");
}

#[test]
fn memory_that_the_destinations_host_has_not_given_yet_is_charged() {
    let transfer = |populated: Option<(u64, u64)>| {
        let mut estimator = new(0);
        estimator.link_sent(1 << 30, Time(1 << 30));
        estimator.ram_total(1000 << 20);
        estimator.ram_dirty(100 << 20, 0);
        if let Some((mib, ms)) = populated {
            estimator.populated(mib << 20, Time::from_ms(ms));
        }
        let estimate = estimator.estimate(Ahead::FromStop, Time(0));
        estimate.term("transfer").unwrap().time.unwrap().as_ms().round()
    };
    // 100 MiB over 1 GiB/s; half a millisecond for each MiB that is not there.
    for (populated, expected) in [
        (None, 105.0),
        (Some((0, 0)), 105.0),
        (Some((1000, 500)), 105.0),
        (Some((500, 250)), 155.0),
        (Some((980, 490)), 115.0),
        // More than there is may be claimed.
        (Some((u64::MAX >> 20, 1)), 105.0),
    ] {
        assert_eq!(transfer(populated), expected, "{populated:?}");
    }
}
