use crate::{Device, selftest};

#[test]
fn operations_agree_with_the_oracle_in_any_order_of_threads() {
    for seed in 0..3 {
        let outcomes = selftest::run(&Device::emulated(seed).unwrap()).unwrap();
        let failures: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
        assert!(failures.is_empty(), "seed {seed}: {failures:#?}");
        assert!(outcomes.len() >= 48, "{} outcomes", outcomes.len());
    }
}
