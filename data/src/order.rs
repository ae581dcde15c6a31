//! The order of examples: a stateless permutation.

/// Which example lies at a position of an epoch. A pure function of (number of examples, seed, epoch, position): nothing
/// to store or to replay, so a run continues at any position at once.
///
/// The permutation is a Feistel network over the smallest even number of bits that holds all examples, keyed by seed and
/// epoch; values beyond the last example walk on along their cycle until they fall inside (Black & Rogaway, "Ciphers
/// with arbitrary finite domains", 2002), which takes fewer than four walks on average, small sets apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    examples: u64,
    seed: u64,
    shuffle: bool,
}

/// Enough for the output to look random; four is Luby and Rackoff's proof, the rest is for the short halves.
const ROUNDS: u64 = 8;

/// Two halves of at least four bits, because a Feistel network over fewer reaches only few permutations.
const HALF_BITS_MIN: u32 = 4;

impl Order {
    /// The order of `examples` examples; without `shuffle` every epoch is in file order.
    pub fn new(examples: u64, seed: u64, shuffle: bool) -> Self {
        Self { examples, seed, shuffle }
    }

    /// The number of examples of an epoch.
    pub fn examples(&self) -> u64 {
        self.examples
    }

    /// The example at `position` (from 0) of `epoch` (from 0). Over all positions of an epoch it is a bijection.
    ///
    /// # Panics
    /// When `position` is not below the number of examples.
    pub fn example(&self, epoch: u64, position: u64) -> u64 {
        assert!(position < self.examples, "position {position} of {} examples", self.examples);
        if !self.shuffle {
            return position;
        }
        let bits = u64::BITS - (self.examples - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(HALF_BITS_MIN);
        let key = mix(mix(self.seed).wrapping_add(epoch));
        let mut value = position;
        loop {
            value = feistel(value, half_bits, key);
            if value < self.examples {
                return value;
            }
        }
    }
}

/// A bijection on `2 * half_bits` bits.
fn feistel(value: u64, half_bits: u32, key: u64) -> u64 {
    let mask = (1 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & mask);
    for round in 0..ROUNDS {
        let round_key = mix(key.wrapping_add(round));
        (left, right) = (right, left ^ (mix(round_key ^ right) & mask));
    }
    left << half_bits | right
}

/// A random-looking bijection on 64 bits: one step of SplitMix64 (Steele, Lea & Flood, 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &Order, epoch: u64) -> Vec<u64> {
        (0..order.examples()).map(|position| order.example(epoch, position)).collect()
    }

    #[test]
    fn is_a_bijection_for_any_number_of_examples() {
        let sizes = (1..=70).chain([127, 128, 129, 255, 256, 257, 997, 1023, 1024, 1025, 4095, 4097, 65_537]);
        for examples in sizes {
            for seed in [0, 42] {
                let mut seen = epoch(&Order::new(examples, seed, true), 3);
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..examples), "{examples} examples, seed {seed}");
            }
        }
    }

    #[test]
    fn stays_in_range_for_huge_sets() {
        for examples in [u64::MAX, 1 << 63, (1 << 40) + 7] {
            let order = Order::new(examples, 7, true);
            for position in [0, 1, examples / 2, examples - 1] {
                assert!(order.example(0, position) < examples);
            }
        }
    }

    #[test]
    fn without_shuffle_it_is_the_identity() {
        assert!(epoch(&Order::new(9, 1, false), 2).into_iter().eq(0..9));
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let order = Order::new(1000, 1, true);
        let first = epoch(&order, 0);
        assert_eq!(first, epoch(&Order::new(1000, 1, true), 0));
        for other in [epoch(&order, 1), epoch(&Order::new(1000, 2, true), 0), (0..1000).collect()] {
            let fixed = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            // A random pair of permutations agrees in 1 ± 1 places.
            assert!(fixed <= 8, "{fixed} of 1000 in the same place");
        }
    }

    #[test]
    fn the_same_on_every_machine_and_in_every_version() {
        // A change here changes the data order of every run that is resumed.
        assert_eq!(epoch(&Order::new(10, 42, true), 0), GOLDEN);
    }

    const GOLDEN: [u64; 10] = [1, 6, 4, 5, 9, 3, 2, 7, 8, 0];

    /// Every example is equally likely at every position: chi-squared over many epochs, far inside its distribution.
    #[test]
    fn is_uniform() {
        for examples in [2_u64, 3, 5, 17, 100] {
            let order = Order::new(examples, 11, true);
            let epochs = 400 * examples;
            let n = examples as usize;
            let mut counts = vec![0_u64; n * n];
            for e in 0..epochs {
                for (position, example) in epoch(&order, e).into_iter().enumerate() {
                    counts[position * n + example as usize] += 1;
                }
            }
            let expected = epochs as f64 / examples as f64;
            let chi_squared: f64 = counts.iter().map(|&count| (count as f64 - expected).powi(2) / expected).sum();
            // (n - 1)² degrees of freedom: mean, and standard deviation √(2 · mean).
            let mean = ((examples - 1) * (examples - 1)) as f64;
            let bound = 5.0 * (2.0 * mean).sqrt() + 5.0;
            assert!((chi_squared - mean).abs() < bound, "{examples} examples: chi-squared {chi_squared}, mean {mean}");
        }
    }

    /// Neighbours do not stay neighbours.
    #[test]
    fn neighbours_part() {
        let order = Order::new(10_000, 5, true);
        let shuffled = epoch(&order, 0);
        let near = shuffled.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 10).count();
        // Expected: 10^4 · 20 / 10^4 = 20, standard deviation about 4.5.
        assert!((1..50).contains(&near), "{near}");
    }
}
