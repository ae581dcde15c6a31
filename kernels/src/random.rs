//! Random numbers by counter: the value at (seed, stream, index) needs no state, so that whoever computes a micro-batch,
//! and however often a block is recomputed, sees the same dropout mask.
//!
//! The generator is Philox4x32 with 7 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3", SC11). The seed is the key; the counter is 64 bits of block number and 64 bits of stream, so that no two
//! elements of a stream, and no two streams, share a number.

use std::ops::Range;

use crate::simd::multiversion;

/// Which elements to drop: a pure function of the key, the stream and the element's index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    pub(crate) seed: u64,
    pub(crate) stream: u64,
    /// Numbers below this drop their element.
    pub(crate) threshold: u32,
    /// What a kept element is multiplied with: the reciprocal of the share that is kept.
    pub(crate) scale: f32,
}

/// Elements whose numbers are computed together: 16 Philox blocks of 4 words of 2 numbers.
const GROUP: usize = 128;
const BLOCKS: usize = 16;

/// Elements that [`Dropout::for_each_piece`] hands out at a time.
const PIECE: usize = 2 * GROUP;

/// A number decides with this many bits.
const DECISION_BITS: u32 = 16;

impl Dropout {
    /// Keeps everything.
    pub const NONE: Dropout = Dropout::new(0.0, 0, 0);

    /// `probability` is the share of elements that become zero, to a 65536th; the others are divided by `1 -` that share.
    /// `seed` is the generator's key, one per run and step; `stream` tells apart micro-batches and places in the model.
    ///
    /// # Panics
    /// If the probability is not in `[0, 1)`.
    pub const fn new(probability: f32, seed: u64, stream: u64) -> Self {
        assert!(0.0 <= probability && probability < 1.0, "dropout probability");
        let numbers = 1 << DECISION_BITS;
        // To the nearest, and less than all.
        let nearest = (probability as f64 * numbers as f64 + 0.5) as u32;
        let threshold = if nearest < numbers { nearest } else { numbers - 1 };
        Dropout { seed, stream, threshold, scale: (numbers as f64 / (numbers - threshold) as f64) as f32 }
    }

    pub fn is_none(&self) -> bool {
        self.threshold == 0
    }

    /// The share of elements that become zero, to the last bit of what decides.
    pub(crate) fn dropped_share(&self) -> f64 {
        f64::from(self.threshold) / f64::from(1 << DECISION_BITS)
    }

    /// The factor of each element from index `first` on: 0 where it is dropped, else the scale.
    ///
    /// Element `e` belongs to block `16 · (e / 128) + e mod 16`, and to its half-word `h = e / 16 mod 8`: the low half of
    /// word `h`, or the high half of word `h − 4`. A vector of blocks then gives whole vectors of consecutive elements.
    pub(crate) fn factors(&self, first: u64, factors: &mut [f32]) {
        if self.is_none() {
            factors.fill(1.0);
            return;
        }
        let group = GROUP as u64;
        let mut element = first;
        let mut rest = factors;
        while !rest.is_empty() {
            let skip = (element % group) as usize;
            let count = rest.len().min(GROUP - skip);
            let (now, later) = rest.split_at_mut(count);
            if count == GROUP {
                group_factors(self.seed, self.stream, element / group, self.threshold, self.scale, now);
            } else {
                let mut all = [0.0; GROUP];
                group_factors(self.seed, self.stream, element / group, self.threshold, self.scale, &mut all);
                now.copy_from_slice(&all[skip..skip + count]);
            }
            element += count as u64;
            rest = later;
        }
    }

    /// Calls `f(columns, factors)` for pieces of columns `0..cols` of row `row` of a `[_, cols]` tensor, whose elements
    /// are numbered row by row.
    #[inline(always)]
    pub(crate) fn for_each_piece(&self, row: usize, cols: usize, f: impl FnMut(Range<usize>, &[f32])) {
        self.for_each_piece_of(row * cols, 0..cols, f);
    }

    /// Likewise of some columns of a row that begins with element `first`.
    #[inline(always)]
    pub(crate) fn for_each_piece_of(
        &self,
        first: usize,
        columns: Range<usize>,
        mut f: impl FnMut(Range<usize>, &[f32]),
    ) {
        let mut factors = [1.0; PIECE];
        for start in columns.clone().step_by(PIECE) {
            let piece = start..columns.end.min(start + PIECE);
            let factors = &mut factors[..piece.len()];
            if !self.is_none() {
                self.factors((first + start) as u64, factors);
            }
            f(piece, factors);
        }
    }
}

/// Number `index` of a stream, uniform in `[0, 1)`, of 53 bits: for what is drawn one at a time, such as tokens.
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    let blocks = BLOCKS as u64;
    let [low, high, _, _] = philox(seed, stream, index / blocks * blocks);
    let lane = (index % blocks) as usize;
    let bits = high[lane] << 32 | low[lane];
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

multiversion! {
    /// The factors of the 128 elements of group `group`.
    fn group_factors(seed: u64, stream: u64, group: u64, threshold: u32, scale: f32, factors: &mut [f32]) {
        let words = philox(seed, stream, group * BLOCKS as u64);
        let (low, high) = factors.as_chunks_mut::<BLOCKS>().0.split_at_mut(words.len());
        for ((low, high), words) in low.iter_mut().zip(high).zip(words) {
            // In loops of their own over arrays, or they become vectors of four.
            let words = words.map(|word| word as u32);
            for lane in 0..BLOCKS {
                low[lane] = if words[lane] & 0xffff < threshold { 0.0 } else { scale };
            }
            for lane in 0..BLOCKS {
                high[lane] = if words[lane] >> DECISION_BITS < threshold { 0.0 } else { scale };
            }
        }
    }
}

/// The four words of the [`BLOCKS`] blocks from `first` on, which is a multiple of [`BLOCKS`].
///
/// A word has a lane of 64 bits, so that the 32 × 32 → 64-bit products need no rearrangement.
#[inline(always)]
fn philox(seed: u64, stream: u64, first: u64) -> [[u64; BLOCKS]; 4] {
    const LOW: u64 = u32::MAX as u64;
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut words = [[0; BLOCKS], [first >> 32; BLOCKS], [stream & LOW; BLOCKS], [stream >> 32; BLOCKS]];
    for (lane, word) in words[0].iter_mut().enumerate() {
        *word = (first & LOW) + lane as u64;
    }
    for _ in 0..7 {
        let [w0, w1, w2, w3] = &mut words;
        for (((w0, w1), w2), w3) in w0.iter_mut().zip(w1).zip(w2).zip(w3) {
            let low = *w0 * 0xD251_1F53;
            let high = *w2 * 0xCD9E_8D57;
            *w0 = (high >> 32) ^ *w1 ^ u64::from(key[0]);
            *w1 = high & LOW;
            *w2 = (low >> 32) ^ *w3 ^ u64::from(key[1]);
            *w3 = low & LOW;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's known answers for philox4x32 with 7 rounds (tests/kat_vectors).
    #[test]
    fn philox_gives_the_published_numbers() {
        let zeros = philox(0, 0, 0);
        assert_eq!(zeros.map(|words| words[0]), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
        // Counter 85a308d3_243f6a88 03707344_13198a2e, key 299f31d0_a4093822: block 8 of its vector.
        let pi = philox(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a80);
        assert_eq!(pi.map(|words| words[8]), [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a]);
    }

    #[test]
    fn uniform_numbers_fill_the_interval_evenly() {
        let count = 1 << 16;
        let mut buckets = [0_u32; 16];
        for index in 0..count {
            let number = uniform(3, 4, index);
            assert!((0.0..1.0).contains(&number));
            buckets[(number * 16.0) as usize] += 1;
        }
        let expected = count as f64 / 16.0;
        let chi_squared: f64 = buckets.iter().map(|&got| (f64::from(got) - expected).powi(2) / expected).sum();
        // 15 degrees of freedom: 44.3 has a probability of 1 in 10,000.
        assert!(chi_squared < 44.3, "{chi_squared}");
        assert_ne!(uniform(3, 4, 0), uniform(3, 5, 0));
        assert_ne!(uniform(3, 4, 0), uniform(4, 4, 0));
    }

    #[test]
    fn factors_do_not_depend_on_where_a_run_begins() {
        let mask = Dropout::new(0.3, 7, 9);
        let mut whole = [0.0; 300];
        mask.factors(0, &mut whole);
        for (first, length) in [(0, 1), (5, 59), (63, 2), (64, 64), (70, 200), (128, 128), (127, 2), (299, 1)] {
            let mut part = vec![f32::NAN; length];
            mask.factors(first as u64, &mut part);
            assert_eq!(part, whole[first..first + length], "{first} {length}");
        }
    }

    #[test]
    fn drops_the_share_asked_for_independently_of_neighbours_and_streams() {
        let count = 1 << 18;
        let draw = |seed, stream, first| {
            let mut factors = vec![0.0; count];
            Dropout::new(0.1, seed, stream).factors(first, &mut factors);
            factors
        };
        let base = draw(1, 2, 0);
        let others = [draw(1, 3, 0), draw(2, 2, 0), draw(1, 2, 1), draw(1, 2 | 1 << 40, 0), draw(1, 2, 1 << 40)];
        let dropped = base.iter().filter(|&&factor| factor == 0.0).count() as f64 / count as f64;
        // Standard deviations: 0.0006 of the share, 0.0002 of the share dropped twice.
        assert!((dropped - 0.1).abs() < 0.003, "{dropped}");
        for (index, other) in others.iter().enumerate() {
            let both = base.iter().zip(other).filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64 / count as f64;
            assert!((both - 0.01).abs() < 0.001, "{index}: {both}");
        }
        // 6554 of 65536 numbers drop.
        let scale = 65536.0 / (65536.0 - 6554.0);
        assert!(base.iter().all(|&factor| factor == 0.0 || factor == scale));
    }
}
