//! The fixed summation tree over the micro-batches of a step.
//!
//! Floating-point addition is not associative, so a sum's bits depend on its order. The order
//! here is a binary tree over micro-batch numbers `0..leaves` that knows nothing of workers:
//! at level `l`, node `i` covers `[i·2^l, min((i+1)·2^l, leaves))` and its value is
//! `left + right`, or `left` alone where the right half lies beyond the end. Each worker sums
//! what lies inside its range, the owner of an element sums the rest; whoever adds, the
//! operands of every addition are the same, hence so is the result.

use std::ops::Range;

use quintet_kernels::{DType, Device, Tensor, ops};
use rayon::prelude::*;

use crate::Result;

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
/// A gradient is written into a buffer that this lends and takes back, and is never copied.
/// Buffers return to free lists: after the first step nothing is allocated.
pub struct TreeSum {
    /// Whose memory the buffers are: the host's.
    device: Device,
    elements: usize,
    leaves: u32,
    range: Range<u32>,
    stack: Vec<(Node, Tensor)>,
    /// Free buffers that hold zeros, as adding one up leaves it.
    zeros: Vec<Tensor>,
    /// Free buffers that hold anything.
    used: Vec<Tensor>,
}

impl TreeSum {
    /// A sum of gradient buffers of `elements` elements; `begin` comes before the first leaf.
    pub fn new(device: &Device, elements: usize) -> Self {
        let (device, stack) = (device.clone(), Vec::new());
        Self { device, elements, leaves: 0, range: 0..0, stack, zeros: Vec::new(), used: Vec::new() }
    }

    /// Elements of one gradient buffer.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Starts a step: this worker computes the micro-batches `range` of `leaves`. Whatever an
    /// abandoned step left is dropped.
    pub fn begin(&mut self, range: Range<u32>, leaves: u32) {
        assert!(leaves <= LEAVES_MAX && range.start <= range.end && range.end <= leaves);
        self.used.extend(self.stack.drain(..).map(|(_, buffer)| buffer));
        self.leaves = leaves;
        self.range = range;
    }

    /// Zeros to add a micro-batch's gradient to, for [`TreeSum::push`].
    ///
    /// # Errors
    /// Memory, in the first steps.
    pub fn lend(&mut self) -> Result<Tensor> {
        if let Some(buffer) = self.zeros.pop() {
            return Ok(buffer);
        }
        let Some(mut buffer) = self.used.pop() else {
            return Ok(self.device.zeros(DType::F32, 1, self.elements)?);
        };
        buffer.view_mut().fill_zero()?;
        Ok(buffer)
    }

    /// Takes in the gradient of the next micro-batch of the range, in ascending order.
    pub fn push(&mut self, gradient: Tensor) {
        assert_eq!(gradient.cols(), self.elements, "a gradient of another size");
        let first = self.stack.last().map_or(self.range.start, |(node, _)| node.end);
        assert!(first < self.range.end, "more micro-batches than the range {:?}", self.range);
        self.stack.push((Node { first, end: first + 1 }, gradient));
        self.merge();
    }

    /// Adds up complete pairs of siblings at the end of the stack.
    fn merge(&mut self) {
        while let [.., (left, sum), (right, addend)] = self.stack.as_mut_slice() {
            let Some(parent) = left.join(*right, self.leaves) else { return };
            take_blocks(sum.as_mut_slice(), addend.as_mut_slice());
            *left = parent;
            self.zeros.extend(self.stack.pop().map(|(_, buffer)| buffer));
        }
    }

    /// The sum of the whole step, where one rank has computed all of it; `previous` takes its place as a buffer.
    pub(super) fn take_total(&mut self, previous: &mut Tensor) {
        let whole = Node { first: 0, end: self.leaves };
        assert!(self.stack.len() == 1 && self.stack[0].0 == whole, "one rank computes the whole step");
        std::mem::swap(&mut self.stack[0].1, previous);
    }

    /// Whether every micro-batch of the range has arrived.
    pub fn is_complete(&self) -> bool {
        self.stack.last().map_or(self.range.start, |(node, _)| node.end) == self.range.end
    }

    /// An element that is not finite in some partial sum.
    pub fn find_not_finite(&self) -> Result<Option<usize>> {
        for (_, sum) in &self.stack {
            if let Some(index) = ops::find_not_finite(sum.view())? {
                return Ok(Some(index));
            }
        }
        Ok(None)
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

/// `sum += addend` and `addend = 0`: while an element is in the cache, clearing it for the buffer's next use costs little.
fn take_blocks(sum: &mut [f32], addend: &mut [f32]) {
    sum.par_chunks_mut(BLOCK).zip(addend.par_chunks_mut(BLOCK)).for_each(|(sum, addend)| {
        for (s, a) in sum.iter_mut().zip(addend) {
            *s += *a;
            *a = 0.0;
        }
    });
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

    /// Adds to what it is lent, as a backward pass does.
    fn push(sum: &mut TreeSum, gradient: &[f32]) {
        let mut buffer = sum.lend().unwrap();
        buffer.as_mut_slice::<f32>().iter_mut().zip(gradient).for_each(|(sum, x)| *sum += x);
        sum.push(buffer);
    }

    fn partial(range: Range<u32>, leaves: u32) -> TreeSum {
        let mut sum = TreeSum::new(&Device::cpu(), 1);
        sum.begin(range.clone(), leaves);
        for leaf in range {
            push(&mut sum, &[leaf_value(leaf)]);
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
        let device = Device::cpu();
        let mut sum = TreeSum::new(&device, 3);
        let step = |sum: &mut TreeSum| {
            sum.begin(3..16, 16);
            for _ in 3..16 {
                push(sum, &[1.0; 3]);
            }
            let sums: Vec<f32> = sum.nodes().map(|(_, sum)| sum[0]).collect();
            assert_eq!(sums, [1.0, 4.0, 8.0], "every buffer was lent as zeros");
            device.memory().system_allocations
        };
        let held = step(&mut sum);
        assert!(held <= 6, "log2 of the range and two, not {held}");
        assert_eq!(step(&mut sum), held);
    }

    #[test]
    fn one_infinite_element_is_noticed() {
        let mut sum = TreeSum::new(&Device::cpu(), 100_000);
        sum.begin(0..1, 1);
        let mut gradient = vec![0.0; 100_000];
        gradient[77_777] = f32::MAX;
        push(&mut sum, &gradient);
        assert_eq!(sum.find_not_finite().unwrap(), None);
        for bad in [f32::INFINITY, f32::NAN] {
            sum.begin(0..1, 1);
            gradient[77_777] = bad;
            push(&mut sum, &gradient);
            assert_eq!(sum.find_not_finite().unwrap(), Some(77_777));
        }
    }
}
