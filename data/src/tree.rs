//! A digest of many items by which any few of them can be checked without the others: a Merkle tree whose shape is that of
//! RFC 6962, over BLAKE3. Items are hashed by leaves of eight, so that the proof of one is not longer than it is.

use blake3::{Hash, Hasher};
use rayon::prelude::*;

/// Items a leaf.
pub(crate) const LEAF_ITEMS: u64 = 8;
/// Of a tree that is kept, the nodes that are less than so many levels above the leaves are hashed anew when asked for.
const BLOCK_LEVELS: u32 = 2;
const BLOCK_LEAVES: u64 = 1 << BLOCK_LEVELS;

/// Keeps the hashes of leaves, nodes and whole trees apart.
const LEAF: &[u8] = &[0];
const NODE: &[u8] = &[1];
const WHOLE: &[u8] = &[2];

/// The digest of `items` items whose tree has this root.
pub(crate) fn digest(items: u64, root: &Hash) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(WHOLE).update(&items.to_le_bytes()).update(root.as_bytes());
    hasher.finalize()
}

/// The number of leaves of so many items.
pub(crate) fn leaves_of(items: u64) -> u64 {
    items.div_ceil(LEAF_ITEMS)
}

pub(crate) fn leaf<'a>(items: impl IntoIterator<Item = &'a [u8]>) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(LEAF);
    items.into_iter().for_each(|item| add_item(&mut hasher, item));
    hasher.finalize()
}

/// Length first, so that bytes cannot move between items unnoticed.
fn add_item(hasher: &mut Hasher, item: &[u8]) {
    hasher.update(&(item.len() as u64).to_le_bytes());
    hasher.update(item);
}

fn node(left: &Hash, right: &Hash) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(NODE).update(left.as_bytes()).update(right.as_bytes());
    hasher.finalize()
}

/// The level above; what has no neighbour rises as it is.
fn above(level: &[Hash]) -> Vec<Hash> {
    let pair = |pair: &[Hash]| match pair {
        [left, right] => node(left, right),
        alone => alone[0],
    };
    level.chunks(2).map(pair).collect()
}

/// Makes the root while items come, in memory that grows with the logarithm of their number.
#[derive(Default)]
pub(crate) struct Growing {
    items: u64,
    /// The leaf that is not complete.
    leaf: Option<Hasher>,
    leaves: u64,
    /// The roots of the largest complete subtrees, from left to right.
    subtrees: Vec<Hash>,
}

impl Growing {
    pub(crate) fn push(&mut self, item: &[u8]) {
        let hasher = self.leaf.get_or_insert_with(|| {
            let mut hasher = Hasher::new();
            hasher.update(LEAF);
            hasher
        });
        add_item(hasher, item);
        self.items += 1;
        if self.items.is_multiple_of(LEAF_ITEMS) {
            self.end_leaf();
        }
    }

    fn end_leaf(&mut self) {
        let Some(hasher) = self.leaf.take() else { return };
        let mut hash = hasher.finalize();
        for _ in 0..self.leaves.trailing_ones() {
            // There is one for each of these bits.
            let Some(left) = self.subtrees.pop() else { break };
            hash = node(&left, &hash);
        }
        self.subtrees.push(hash);
        self.leaves += 1;
    }

    pub(crate) fn root(mut self) -> Hash {
        self.end_leaf();
        let root = self.subtrees.iter().rev().copied().reduce(|right, left| node(&left, &right));
        root.unwrap_or_else(|| leaf([]))
    }
}

/// A tree, to prove leaves by.
#[derive(Debug)]
pub(crate) struct Tree {
    leaves: u64,
    /// From the roots of blocks up to the root of all.
    levels: Vec<Vec<Hash>>,
}

impl Tree {
    /// Of leaves whose hashes `leaf` tells; reads all of them, on all threads.
    pub(crate) fn new(leaves: u64, leaf: impl Fn(u64) -> Hash + Sync) -> Self {
        let blocks = (0..leaves.div_ceil(BLOCK_LEAVES)).into_par_iter();
        let mut levels: Vec<Vec<Hash>> = vec![blocks.map(|block| climb(block_of(leaves, block, &leaf), 0).0).collect()];
        while let Some(level) = levels.last().filter(|level| level.len() > 1) {
            levels.push(above(level));
        }
        Self { leaves, levels }
    }

    /// What leads from a leaf to the root: its neighbours on the way, from below.
    ///
    /// # Panics
    /// When there is no such leaf.
    pub(crate) fn proof(&self, number: u64, leaf: impl Fn(u64) -> Hash) -> Vec<Hash> {
        assert!(number < self.leaves, "leaf {number} of {}", self.leaves);
        let block = number / BLOCK_LEAVES;
        let (_, mut proof) = climb(block_of(self.leaves, block, &leaf), (number % BLOCK_LEAVES) as usize);
        let mut index = block as usize;
        for level in &self.levels {
            proof.extend(level.get(index ^ 1));
            index /= 2;
        }
        proof
    }
}

fn block_of(leaves: u64, block: u64, leaf: &impl Fn(u64) -> Hash) -> Vec<Hash> {
    let first = block * BLOCK_LEAVES;
    (first..leaves.min(first + BLOCK_LEAVES)).map(leaf).collect()
}

/// The root over a level, and the neighbours on the way to it from `index`.
fn climb(mut level: Vec<Hash>, mut index: usize) -> (Hash, Vec<Hash>) {
    let mut proof = Vec::new();
    while level.len() > 1 {
        proof.extend(level.get(index ^ 1));
        level = above(&level);
        index /= 2;
    }
    (level[0], proof)
}

/// Whether a proof leads from leaf `number` of `leaves` to the root.
pub(crate) fn holds(root: &Hash, leaves: u64, number: u64, leaf: Hash, proof: &[Hash]) -> bool {
    let (mut index, mut count, mut hash) = (number, leaves, leaf);
    let mut proof = proof.iter();
    while count > 1 {
        if index ^ 1 < count {
            let Some(neighbour) = proof.next() else { return false };
            hash = if index % 2 == 1 { node(neighbour, &hash) } else { node(&hash, neighbour) };
        }
        (index, count) = (index / 2, count.div_ceil(2));
    }
    number < leaves && hash == *root && proof.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(count: u64) -> Vec<Vec<u8>> {
        (0..count).map(|number| number.to_string().repeat(number as usize % 5).into_bytes()).collect()
    }

    fn leaf_of(items: &[Vec<u8>], number: u64) -> Hash {
        let first = (number * LEAF_ITEMS) as usize;
        leaf(items[first..items.len().min(first + LEAF_ITEMS as usize)].iter().map(Vec::as_slice))
    }

    #[test]
    fn every_leaf_is_proved_and_no_other_in_its_place() {
        for count in [1, 8, 9, 100, 127, 128, 129, 1000, 2049] {
            let items = items(count);
            let mut growing = Growing::default();
            items.iter().for_each(|item| growing.push(item));
            let root = growing.root();
            let leaves = leaves_of(count);
            let tree = Tree::new(leaves, |number| leaf_of(&items, number));
            for number in 0..leaves {
                let (own, proof) = (leaf_of(&items, number), tree.proof(number, |number| leaf_of(&items, number)));
                assert!(holds(&root, leaves, number, own, &proof), "leaf {number} of {leaves}");
                assert!(!holds(&root, leaves, number, leaf([b"other".as_slice()]), &proof));
                for other in [number ^ 1, number + 1, leaves] {
                    assert!(!holds(&root, leaves, other, own, &proof), "{number} as {other} of {leaves}");
                }
                assert!(proof.is_empty() || !holds(&root, leaves, number, own, &proof[1..]));
                assert!(!holds(&root, leaves, number, own, &[proof, vec![root]].concat()));
            }
        }
    }

    #[test]
    fn the_digest_covers_bytes_bounds_and_number() {
        let of = |items: &[&[u8]]| {
            let mut growing = Growing::default();
            items.iter().for_each(|item| growing.push(item));
            digest(items.len() as u64, &growing.root())
        };
        let some: [&[&[u8]]; 5] = [&[], &[b""], &[b"ab", b"c"], &[b"a", b"bc"], &[b"ab", b"c", b""]];
        for (index, items) in some.iter().enumerate() {
            assert_eq!(some.iter().filter(|other| of(other) == of(items)).count(), 1, "{index}");
        }
    }
}
