//! The fixed summation tree over the micro-batches of a step.
//!
//! Floating-point addition is not associative, so a sum's bits depend on its order. The order
//! here is a binary tree over micro-batch numbers `0..leaves` that knows nothing of workers:
//! at level `l`, node `i` covers `[i·2^l, min((i+1)·2^l, leaves))` and its value is
//! `left + right`, or `left` alone where the right half lies beyond the end. Each worker sums
//! what lies inside its range, the owner of an element sums the rest; whoever adds, the
//! operands of every addition are the same, hence so is the result.

use std::ops::Range;

use rayon::prelude::*;

/// More micro-batches in one step than anybody runs; keeps index arithmetic inside `u32`.
pub const LEAVES_MAX: u32 = 1 << 30;

/// Elements added by one task; any size gives the same bits.
const BLOCK: usize = 1 << 15;

/// A node of the summation tree, named by the micro-batches `[first, end)` it covers.
///
/// Two nodes that cover the same leaves (a right child is absent) have the same value, so the
/// cover identifies the value where (level, index) would not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub first: u32,
    pub end: u32,
}

impl Node {
    /// The parent, if `self` and `right` are its two children in a tree of `leaves` leaves.
    pub fn join(self, right: Node, leaves: u32) -> Option<Node> {
        let half = self.end - self.first;
        let is_left_child = half.is_power_of_two() && self.first.is_multiple_of(2 * half);
        let parent = Node { first: self.first, end: leaves.min(self.first + 2 * half) };
        (is_left_child && self.end == right.first && parent.end == right.end).then_some(parent)
    }
}

/// The maximal tree nodes inside `range`, left to right: what a worker that computed
/// `range` holds. A pure function, so every rank knows what every other will send.
pub fn nodes_of(range: Range<u32>, leaves: u32) -> Vec<Node> {
    assert!(leaves <= LEAVES_MAX && range.end <= leaves, "range {range:?} of {leaves} leaves");
    let mut nodes = Vec::new();
    let mut first = range.start;
    while first < range.end {
        let mut size = 1;
        while first.is_multiple_of(2 * size) && first + size < range.end && leaves.min(first + 2 * size) <= range.end {
            size *= 2;
        }
        let end = leaves.min(first + size);
        nodes.push(Node { first, end });
        first = end;
    }
    nodes
}

/// The additions `slot[left] += slot[right]` that turn `nodes` (left to right, covering
/// `0..leaves`) into the root, which ends in slot 0.
pub(super) fn merge_plan(nodes: &[Node], leaves: u32) -> Vec<(usize, usize)> {
    let mut plan = Vec::with_capacity(nodes.len());
    let mut stack: Vec<(Node, usize)> = Vec::new();
    for (slot, &node) in nodes.iter().enumerate() {
        let mut right = (node, slot);
        while let Some(&(left, left_slot)) = stack.last() {
            let Some(parent) = left.join(right.0, leaves) else {
                break;
            };
            plan.push((left_slot, right.1));
            right = (parent, left_slot);
            stack.pop();
        }
        stack.push(right);
    }
    let root = [(Node { first: 0, end: leaves }, 0)];
    assert!(stack == root, "the ranks' nodes do not cover 0..{leaves}: {nodes:?}");
    plan
}

/// A worker's part of the tree: the gradient sums of a contiguous range of micro-batches,
/// merged as each completes, so that at most `log2(range) + 2` buffers are alive.
///
/// Buffers return to a free list: after the first step nothing is allocated.
pub struct TreeSum {
    elements: usize,
    leaves: u32,
    range: Range<u32>,
    stack: Vec<(Node, Vec<f32>)>,
    free: Vec<Vec<f32>>,
}

impl TreeSum {
    /// A sum of gradient buffers of `elements` elements; `begin` comes before the first leaf.
    pub fn new(elements: usize) -> Self {
        Self { elements, leaves: 0, range: 0..0, stack: Vec::new(), free: Vec::new() }
    }

    /// Elements of one gradient buffer.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Starts a step: this worker computes the micro-batches `range` of `leaves`. Whatever an
    /// abandoned step left is dropped.
    pub fn begin(&mut self, range: Range<u32>, leaves: u32) {
        assert!(leaves <= LEAVES_MAX && range.start <= range.end && range.end <= leaves);
        self.free.extend(self.stack.drain(..).map(|(_, buffer)| buffer));
        self.leaves = leaves;
        self.range = range;
    }

    /// Takes in the gradient of the next micro-batch of the range, in ascending order.
    pub fn push(&mut self, gradient: &[f32]) {
        assert_eq!(gradient.len(), self.elements, "a gradient of another size");
        let first = self.stack.last().map_or(self.range.start, |(node, _)| node.end);
        assert!(first < self.range.end, "more micro-batches than the range {:?}", self.range);
        let leaf = Node { first, end: first + 1 };
        let sibling = self.stack.last_mut().and_then(|(left, sum)| Some((left.join(leaf, self.leaves)?, left, sum)));
        match sibling {
            Some((parent, left, sum)) => {
                add_blocks(sum, gradient);
                *left = parent;
            }
            None => {
                let mut buffer = self.free.pop().unwrap_or_else(|| vec![0.0; self.elements]);
                let blocks = buffer.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK));
                blocks.for_each(|(buffer, gradient)| buffer.copy_from_slice(gradient));
                self.stack.push((leaf, buffer));
            }
        }
        self.merge();
    }

    /// Adds up complete pairs of siblings at the end of the stack.
    fn merge(&mut self) {
        while let [.., (left, sum), (right, addend)] = self.stack.as_mut_slice() {
            let Some(parent) = left.join(*right, self.leaves) else { return };
            add_blocks(sum, addend);
            *left = parent;
            self.free.extend(self.stack.pop().map(|(_, buffer)| buffer));
        }
    }

    /// The sum of the whole step, where one rank has computed all of it; `previous` takes its place as a buffer.
    pub(super) fn take_total(&mut self, previous: &mut Vec<f32>) {
        let whole = Node { first: 0, end: self.leaves };
        assert!(self.stack.len() == 1 && self.stack[0].0 == whole, "one rank computes the whole step");
        std::mem::swap(&mut self.stack[0].1, previous);
    }

    /// Whether every micro-batch of the range has arrived.
    pub fn is_complete(&self) -> bool {
        self.stack.last().map_or(self.range.start, |(node, _)| node.end) == self.range.end
    }

    /// Whether every element of every partial sum is finite.
    pub fn is_finite(&self) -> bool {
        // No early exit inside a block, so that it vectorises.
        let block_is_finite = |block: &[f32]| block.iter().fold(true, |all, x| all & x.is_finite());
        self.stack.iter().all(|(_, sum)| sum.par_chunks(BLOCK).all(block_is_finite))
    }

    /// An element that is not finite in some partial sum.
    pub fn find_not_finite(&self) -> Option<usize> {
        if self.is_finite() {
            return None;
        }
        self.stack.iter().find_map(|(_, sum)| sum.iter().position(|x| !x.is_finite()))
    }

    /// The nodes held, left to right, with their sums.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (Node, &[f32])> {
        self.stack.iter().map(|(node, sum)| (*node, sum.as_slice()))
    }

    pub fn range(&self) -> Range<u32> {
        self.range.clone()
    }

    pub fn leaves(&self) -> u32 {
        self.leaves
    }
}

/// [`add`], in parallel.
fn add_blocks(sum: &mut [f32], addend: &[f32]) {
    sum.par_chunks_mut(BLOCK).zip(addend.par_chunks(BLOCK)).for_each(|(sum, addend)| add(sum, addend));
}

/// `sum += addend`, element by element.
pub(super) fn add(sum: &mut [f32], addend: &[f32]) {
    for (s, a) in sum.iter_mut().zip(addend) {
        *s += *a;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values whose sum depends on the order of addition.
    fn leaf_value(leaf: u32) -> f32 {
        let bits = (u64::from(leaf) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        (bits as f32 / 65536.0 - 128.0) * 10f32.powi((leaf % 7) as i32 - 3)
    }

    /// The definition, by (level, index).
    fn direct(level: u32, index: u32, leaves: u32) -> f32 {
        if level == 0 {
            return leaf_value(index);
        }
        let left = direct(level - 1, 2 * index, leaves);
        if (2 * index + 1) << (level - 1) < leaves { left + direct(level - 1, 2 * index + 1, leaves) } else { left }
    }

    fn partitions(leaves: u32, parts: u32) -> Vec<Vec<Range<u32>>> {
        fn extend(start: u32, leaves: u32, parts: u32, prefix: &[Range<u32>], out: &mut Vec<Vec<Range<u32>>>) {
            let first_end = if parts == 1 { leaves } else { start };
            for end in first_end..=leaves {
                let ranges = [prefix, std::slice::from_ref(&(start..end))].concat();
                if parts == 1 {
                    out.push(ranges);
                } else {
                    extend(end, leaves, parts - 1, &ranges, out);
                }
            }
        }
        let mut out = Vec::new();
        extend(0, leaves, parts, &[], &mut out);
        out
    }

    fn partial(range: Range<u32>, leaves: u32) -> TreeSum {
        let mut sum = TreeSum::new(1);
        sum.begin(range.clone(), leaves);
        for leaf in range {
            sum.push(&[leaf_value(leaf)]);
        }
        assert!(sum.is_complete());
        sum
    }

    #[test]
    fn every_partition_sums_to_the_same_bits() {
        let mut order_matters = false;
        for leaves in 1..=17u32 {
            let expected = direct(leaves.next_power_of_two().ilog2(), 0, leaves);
            order_matters |= expected != (0..leaves).map(leaf_value).sum::<f32>();
            for parts in 1..=4 {
                for ranges in partitions(leaves, parts) {
                    let (mut nodes, mut slots) = (Vec::new(), Vec::new());
                    for range in &ranges {
                        let sum = partial(range.clone(), leaves);
                        let held: Vec<Node> = sum.nodes().map(|(node, _)| node).collect();
                        assert_eq!(held, nodes_of(range.clone(), leaves), "{range:?} of {leaves}");
                        slots.extend(sum.nodes().map(|(_, value)| value[0]));
                        nodes.extend(held);
                    }
                    for (left, right) in merge_plan(&nodes, leaves) {
                        slots[left] += slots[right];
                    }
                    assert_eq!(slots[0].to_bits(), expected.to_bits(), "{ranges:?} of {leaves}");
                }
            }
        }
        assert!(order_matters, "the values must tell orders apart");
    }

    #[test]
    fn buffers_are_reused_from_the_second_step_on() {
        let mut sum = TreeSum::new(3);
        let step = |sum: &mut TreeSum| {
            sum.begin(3..16, 16);
            for _ in 3..16 {
                sum.push(&[1.0; 3]);
            }
            sum.free.len() + sum.stack.len()
        };
        let held = step(&mut sum);
        assert!(held <= 5, "log2 of the range and one, not {held}");
        assert_eq!(step(&mut sum), held);
    }

    #[test]
    fn one_infinite_element_is_noticed() {
        let mut sum = TreeSum::new(100_000);
        sum.begin(0..1, 1);
        let mut buffer = vec![0.0; 100_000];
        buffer[77_777] = f32::MAX;
        sum.push(&buffer);
        assert!(sum.is_finite());
        assert_eq!(sum.find_not_finite(), None);
        for bad in [f32::INFINITY, f32::NAN] {
            sum.begin(0..1, 1);
            buffer[77_777] = bad;
            sum.push(&buffer);
            assert!(!sum.is_finite());
            assert_eq!(sum.find_not_finite(), Some(77_777));
        }
    }
}
