//! The order of examples: a stateless permutation.

/// Which example lies at a position of an epoch. A pure function of (number of examples, seed, epoch, position): nothing
/// to store or to replay, so a run continues at any position at once.
///
/// The permutation is a Feistel network over the smallest even number of bits that holds all examples, keyed by seed and
/// epoch; values beyond the last example walk on along their cycle until they fall inside (Black & Rogaway, "Ciphers
/// with arbitrary finite domains", 2002), which takes fewer than four walks on average, small sets apart.
///
/// Of a mixture, a part with c of an epoch's positions gives its draws number e·c to (e + 1)·c − 1 in epoch e, in
/// places that the epoch's permutation says; draw t of a part of n examples is position t mod n of the t / n-th
/// permutation of its own. So every example of a part is taken once before any is taken for a second time, over the
/// whole run, and a part whose number of examples is its number of positions is taken exactly once an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    positions: u64,
    seed: u64,
    shuffle: bool,
    /// Of a mixture.
    parts: Vec<PartOrder>,
}

/// A part of a mixture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PartOrder {
    /// Its examples, numbered behind those of the parts before it; at least 1.
    pub examples: u64,
    /// Its share of the positions of an epoch; at least 1.
    pub slots: u64,
}

/// Enough for the output to look random; four is Luby and Rackoff's proof, the rest is for the short halves.
const ROUNDS: u64 = 8;

/// Two halves of at least four bits, because a Feistel network over fewer reaches only few permutations.
const HALF_BITS_MIN: u32 = 4;

impl Order {
    /// The order of `examples` examples; without `shuffle` every epoch is in file order.
    pub fn new(examples: u64, seed: u64, shuffle: bool) -> Self {
        Self { positions: examples, seed, shuffle, parts: Vec::new() }
    }

    /// The order of a mixture; without `shuffle` one part comes after the other, each in file order.
    pub fn mixture(parts: Vec<PartOrder>, seed: u64, shuffle: bool) -> Self {
        Self { positions: parts.iter().map(|part| part.slots).sum(), seed, shuffle, parts }
    }

    /// The number of positions of an epoch.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// The positions of each part of a mixture.
    pub fn slots(&self) -> Vec<u64> {
        self.parts.iter().map(|part| part.slots).collect()
    }

    /// The number of examples there are to take.
    pub fn examples(&self) -> u64 {
        match self.parts.is_empty() {
            true => self.positions,
            false => self.parts.iter().map(|part| part.examples).sum(),
        }
    }

    /// The example at `position` (from 0) of `epoch` (from 0). Without parts it is a bijection over the positions of an
    /// epoch.
    ///
    /// # Panics
    /// When `position` is not below the number of positions.
    pub fn example(&self, epoch: u64, position: u64) -> u64 {
        assert!(position < self.positions, "position {position} of {} examples", self.positions);
        let mut slot = self.permuted(self.positions, mix(self.seed), epoch, position);
        let mut first_example = 0;
        for (number, part) in (1..).zip(&self.parts) {
            if slot < part.slots {
                let draw = u128::from(epoch) * u128::from(part.slots) + u128::from(slot);
                let examples = u128::from(part.examples);
                // Neither is more than the draw's epoch or the part's examples.
                let (pass, place) = ((draw / examples) as u64, (draw % examples) as u64);
                let key = mix(mix(self.seed) ^ mix(number));
                return first_example + self.permuted(part.examples, key, pass, place);
            }
            slot -= part.slots;
            first_example += part.examples;
        }
        slot
    }

    /// A permutation of `count` numbers, one for each epoch.
    fn permuted(&self, count: u64, key: u64, epoch: u64, position: u64) -> u64 {
        if !self.shuffle {
            return position;
        }
        let bits = u64::BITS - (count - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(HALF_BITS_MIN);
        let key = mix(key.wrapping_add(epoch));
        let mut value = position;
        loop {
            value = feistel(value, half_bits, key);
            if value < count {
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

    fn mixture(shuffle: bool) -> Order {
        let part = |examples, slots| PartOrder { examples, slots };
        Order::mixture(vec![part(10, 10), part(7, 3), part(2, 9)], 5, shuffle)
    }

    #[test]
    fn a_mixture_takes_every_example_once_before_any_twice() {
        let order = mixture(true);
        assert_eq!((order.positions(), order.examples()), (22, 19));
        let mut taken = [0_u64; 19];
        for e in 0..40 {
            let before = taken;
            for position in 0..order.positions() {
                taken[order.example(e, position) as usize] += 1;
            }
            for (range, slots) in [(0..10, 10), (10..17, 3), (17..19, 9)] {
                let counts = &taken[range.clone()];
                let of_epoch: u64 = counts.iter().sum::<u64>() - before[range].iter().sum::<u64>();
                assert_eq!(of_epoch, slots, "each part has its share of every epoch");
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
            }
        }
    }

    #[test]
    fn a_mixture_is_mixed() {
        let part = |examples, slots| PartOrder { examples, slots };
        let order = Order::mixture(vec![part(5000, 500), part(300, 1500)], 5, true);
        let of_first = |positions: std::ops::Range<u64>| positions.filter(|&p| order.example(3, p) < 5000).count();
        // A quarter of 200 each: 50 with a standard deviation of 6.
        for start in (0..2000).step_by(200) {
            assert!((20..80).contains(&of_first(start..start + 200)), "from {start}");
        }
        let (one, other) = (mixture(true), Order::mixture(vec![part(10, 10), part(7, 3), part(2, 9)], 6, true));
        assert!((0..22).any(|p| one.example(0, p) != other.example(0, p)));
        assert!((0..22).any(|p| one.example(0, p) != one.example(1, p)));
    }

    #[test]
    fn a_mixture_without_shuffle_is_in_file_order() {
        let order = mixture(false);
        let epoch = |e| (0..22).map(|p| order.example(e, p)).collect::<Vec<_>>();
        assert_eq!(epoch(0), (0..13).chain([17, 18, 17, 18, 17, 18, 17, 18, 17]).collect::<Vec<_>>());
        assert_eq!(epoch(1)[10..14], [13, 14, 15, 18]);
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
