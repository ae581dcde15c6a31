//! Which rank holds the optimizer's state of which weights.
//!
//! The arena of what is trained is cut into a slice a rank. Its owner adds up the slice's gradient. Without sharding
//! everybody holds the state of all slices. With it (ZeRO-1, Rajbhandari et al. 2020), a slice's state is held by its owner
//! and by the next rank, both of which update the slice's weights; the others get them from the owner. So the death of a
//! rank takes no state along; and what travels is as much as without sharding, where the owner sends everybody the
//! gradient's sum instead.

use std::ops::Range;

use quintet_kernels::ops::NORM_BLOCK;

/// Ranks that hold a slice's state where it is sharded.
const COPIES: u32 = 2;
/// Slices of what everybody holds begin at multiples of a cache line.
const ALIGNMENT: usize = 16;

/// The division of an arena among the ranks of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    /// By rank: the elements that it owns.
    slices: Vec<Range<usize>>,
    /// So many ranks hold the state of each slice: its owner and those that follow.
    copies: u32,
}

impl Shards {
    /// Every rank holds the state of all `elements`.
    pub fn replicated(elements: usize, world_size: u32) -> Self {
        Self { slices: slices(elements, world_size, ALIGNMENT), copies: world_size }
    }

    /// A rank holds its own slice's state and that of the rank before it. Slices are whole blocks of the norm's sum, whose
    /// bits are then those of one rank that has all of them.
    pub fn sharded(elements: usize, world_size: u32) -> Self {
        Self { slices: slices(elements, world_size, NORM_BLOCK), copies: COPIES.min(world_size) }
    }

    pub fn world_size(&self) -> u32 {
        self.slices.len() as u32
    }

    /// Of the arena.
    pub fn elements(&self) -> usize {
        self.slices.last().map_or(0, |last| last.end)
    }

    /// By rank: the elements that it owns.
    pub fn slices(&self) -> &[Range<usize>] {
        &self.slices
    }

    /// Whether `rank` holds the state of the slice that `owner` owns.
    pub fn holds(&self, rank: u32, owner: u32) -> bool {
        (rank + self.world_size() - owner) % self.world_size() < self.copies
    }

    /// Whether every rank holds the state of all.
    pub fn is_replicated(&self) -> bool {
        self.copies == self.world_size()
    }

    /// The elements whose state `rank` holds: ascending, with gaps between them, none empty.
    pub fn parts(&self, rank: u32) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        for (_, slice) in (0..).zip(&self.slices).filter(|(owner, slice)| self.holds(rank, *owner) && !slice.is_empty())
        {
            match parts.last_mut() {
                Some(last) if last.end == slice.start => last.end = slice.end,
                _ => parts.push(slice.clone()),
            }
        }
        parts
    }
}

/// Slices as equal as multiples of `alignment` can be.
fn slices(elements: usize, world_size: u32, alignment: usize) -> Vec<Range<usize>> {
    let world_size = world_size as usize;
    let bound = |rank: usize| match rank {
        rank if rank == world_size => elements,
        rank => elements * rank / world_size / alignment * alignment,
    };
    (0..world_size).map(|rank| bound(rank)..bound(rank + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_death_leaves_a_holder_of_everything() {
        for world_size in 1..=7 {
            for elements in [0, 1, 5000, NORM_BLOCK, 3 * NORM_BLOCK + 16, 40 * NORM_BLOCK + 1] {
                let shards = Shards::sharded(elements, world_size);
                assert_eq!(shards.elements(), elements);
                assert!(shards.slices().windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(shards.slices().iter().all(|slice| slice.start.is_multiple_of(NORM_BLOCK)));
                for dead in (0..world_size).filter(|_| world_size > 1) {
                    let mut held: Vec<_> =
                        (0..world_size).filter(|&rank| rank != dead).flat_map(|rank| shards.parts(rank)).collect();
                    held.sort_unstable_by_key(|part| part.start);
                    let end = held.iter().fold(0, |end, part| if part.start <= end { end.max(part.end) } else { end });
                    assert_eq!(end, elements, "{dead} of {world_size} died");
                }
            }
        }
    }

    #[test]
    fn a_rank_holds_two_slices_of_many_and_all_of_two() {
        let shards = Shards::sharded(40 * NORM_BLOCK, 4);
        let blocks = |rank| -> Vec<[usize; 2]> {
            let parts = shards.parts(rank).into_iter();
            parts.map(|part| [part.start / NORM_BLOCK, part.end / NORM_BLOCK]).collect()
        };
        assert_eq!([blocks(0), blocks(1), blocks(3)], [vec![[0, 10], [30, 40]], vec![[0, 20]], vec![[20, 40]]]);
        assert!(!shards.is_replicated() && Shards::sharded(40 * NORM_BLOCK, 2).is_replicated());
        let whole: Range<usize> = 0..5000;
        assert!((0..3).all(|rank| Shards::replicated(5000, 3).parts(rank) == [whole.clone()]));
    }
}
