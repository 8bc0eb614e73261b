//! The profiles that come along are sound, and what is not sound is refused with its key.

use device_profile::{
    ADVERSARIAL_NAMES, BUILTIN_NAMES, DirtyModel, Profile, ProfileError, Provenance, ReinitPolicy,
};

fn builtin_text(name: &str) -> String {
    toml::to_string(&Profile::builtin(name).unwrap()).unwrap()
}

#[test]
fn every_builtin_parses_is_named_after_itself_and_survives_a_round_trip() {
    for name in BUILTIN_NAMES.iter().chain(ADVERSARIAL_NAMES).copied() {
        let profile = Profile::builtin(name).unwrap();
        assert_eq!(profile.name, name);
        assert_eq!(Profile::from_toml(&builtin_text(name)).unwrap(), profile);
    }
}

#[test]
fn published_values_are_marked_sourced() {
    let mlx5 = Profile::builtin("mlx5-vf").unwrap();
    assert_eq!(mlx5.times.load_cold_us.typical, 1_480_000);
    assert_eq!(mlx5.times.load_cold_us.provenance, Provenance::Sourced);
    assert_eq!(mlx5.sizes.total_bytes.provenance, Provenance::Sourced);
    assert_eq!(mlx5.sizes.initial_bytes.provenance, Provenance::Assumed);
    assert_eq!(mlx5.precopy.reinit.value, ReinitPolicy::Flush);
    assert!(!mlx5.precopy.reinit_in_p2p.value);

    let virtio = Profile::builtin("virtio-vf").unwrap();
    assert_eq!(virtio.precopy.dirty.value, DirtyModel::Reread);
    let qat = Profile::builtin("qat").unwrap();
    assert_eq!(qat.sizes.total_bytes.typical, 4096);
    assert_eq!(qat.precopy.dirty.value, DirtyModel::Never);
}

#[test]
fn an_unknown_name_is_answered_with_the_known_ones() {
    let error = Profile::builtin("mlx6").unwrap_err().to_string();
    for name in BUILTIN_NAMES {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn scaling_keeps_the_shape_and_stays_valid() {
    let mlx5 = Profile::builtin("mlx5-vf").unwrap();
    for total in [1 << 10, 4 << 20, 300_000_000, 1 << 30] {
        let scaled = mlx5.scaled_to(total);
        assert_eq!(scaled.sizes.total_bytes.typical, total);
        assert_eq!(scaled.rates.read_bytes_per_s, mlx5.rates.read_bytes_per_s);
        assert!(scaled.times.load_cold_us.typical >= scaled.times.load_warm_us.typical);
        Profile::from_toml(&toml::to_string(&scaled).unwrap()).unwrap();
    }
    let half = mlx5.scaled_to(150_000_000);
    assert_eq!(half.sizes.initial_bytes.typical, mlx5.sizes.initial_bytes.typical / 2);
    assert_eq!(half.times.load_cold_us.typical, 740_000);
}

#[test]
fn a_range_is_sampled_between_its_ends() {
    let quantity = Profile::builtin("mlx5-vf").unwrap().times.save_fixed_us;
    assert_eq!(quantity.at_permille(0), quantity.min);
    assert_eq!(quantity.at_permille(500), 40_000);
    assert_eq!(quantity.at_permille(1000), quantity.max);
    assert_eq!(quantity.at_permille(5000), quantity.max);
}

#[test]
fn what_cannot_be_is_refused_and_named() {
    // (what is replaced, by what, what the message must name)
    let cases = [
        ("name = \"qat\"", "name = \"QAT 4\"", "name"),
        ("value = 1024\n", "value = 9999\n", "total_bytes"),
        ("value = 1024\n", "value = 0\n", "P4"),
        ("value = 1024\n", "min = 3\nmax = 2\n", "min 3 is above max 2"),
        ("value = 1024\n", "min = 3\n", "`min` and `max`"),
        ("value = 1024\n", "min = 3\nmax = 9\ntypical = 10\n", "typical 10"),
        ("value = 1024\n", "value = -1\n", "-1"),
        ("note = \"the set-up section\"", "note = \" \"", "sizes.initial_bytes"),
        ("value = \"never\"", "value = \"flushed\"", "flushed"),
        ("models = \"qat-gen4\"", "models = \"qat-gen4\"\nspeed = 3", "speed"),
    ];
    for (from, to, named) in cases {
        let text = builtin_text("qat");
        assert!(text.contains(from), "{from:?} is not in the text:\n{text}");
        let error = Profile::from_toml(&text.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(named), "{from:?} -> {to:?}: {error}");
    }
}

#[test]
fn flags_that_contradict_each_other_are_refused() {
    let mlx5 = Profile::builtin("mlx5-vf").unwrap();

    let mut no_precopy = mlx5.clone();
    no_precopy.features.pre_copy.value = false;
    let mut no_v2 = mlx5.clone();
    no_v2.features.precopy_info_v2.value = false;
    let mut no_interval = mlx5.clone();
    no_interval.precopy.dirty.value = DirtyModel::Reread;
    let mut stuck = mlx5;
    stuck.rates.load_bytes_per_s.min = 0;

    for (profile, named) in [
        (no_precopy, "features.precopy_info_v2"),
        (no_v2, "precopy.reinit"),
        (no_interval, "reread_interval_us"),
        (stuck, "load_bytes_per_s"),
    ] {
        let error = Profile::from_toml(&toml::to_string(&profile).unwrap()).unwrap_err();
        assert!(matches!(error, ProfileError::Invalid { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn an_endless_text_is_refused_before_it_is_parsed() {
    let text = "#".repeat(1 << 20);
    assert!(matches!(Profile::from_toml(&text), Err(ProfileError::TooLong { .. })));
}
