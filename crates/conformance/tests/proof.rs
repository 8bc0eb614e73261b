//! What the check finds is what is wrong, and nothing else.

mod common;

use common::{check, everything, serve, table};

#[test]
fn a_device_without_deviation_fails_nothing() {
    let report = check(&serve("mlx5-vf", &[]), &everything());
    println!("{}", table(&report));
    assert!(report.failed().is_empty(), "{}", table(&report));
}
