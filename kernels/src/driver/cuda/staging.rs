//! Which part of a buffer is free: copies from the host go through pinned memory, and many may be under way at a time.

use std::collections::VecDeque;
use std::ops::Range;

/// A buffer given out piece by piece, round and round. A piece is free again when its mark has been passed, and pieces
/// are passed in the order in which they were given out.
pub(crate) struct Ring<Mark> {
    capacity: usize,
    head: usize,
    pieces: VecDeque<(Range<usize>, Mark)>,
}

impl<Mark> Ring<Mark> {
    pub(crate) fn new(capacity: usize) -> Self {
        Ring { capacity, head: 0, pieces: VecDeque::new() }
    }

    /// A free piece; `wait` returns when a mark has been passed, and is asked only for pieces that are in the way.
    pub(crate) fn take<E>(
        &mut self,
        bytes: usize,
        mut wait: impl FnMut(Mark) -> Result<(), E>,
    ) -> Result<Range<usize>, E> {
        assert!(0 < bytes && bytes <= self.capacity, "{bytes} bytes of a ring of {}", self.capacity);
        let start = if self.head + bytes <= self.capacity { self.head } else { 0 };
        let piece = start..start + bytes;
        // The oldest piece is the next ahead of the head, so those in the way are the oldest ones. When the ring turns
        // over, the ones between the head and the end are older than those at its start, and go first.
        while let Some((oldest, _)) = self.pieces.front() {
            let skipped = start == 0 && oldest.start >= self.head;
            if !skipped && (oldest.start >= piece.end || piece.start >= oldest.end) {
                break;
            }
            if let Some((_, mark)) = self.pieces.pop_front() {
                wait(mark)?;
            }
        }
        self.head = piece.end;
        Ok(piece)
    }

    /// Says when a piece that was taken is free again.
    pub(crate) fn give(&mut self, piece: Range<usize>, mark: Mark) {
        self.pieces.push_back((piece, mark));
    }

    /// The marks that nobody has waited for.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Mark> {
        self.pieces.drain(..).map(|(_, mark)| mark)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Pieces of every size in turn: none overlaps one that has not been waited for, and none is waited for too early.
    #[test]
    fn pieces_never_overlap_and_waits_are_in_order() {
        let mut ring = Ring::new(100);
        let mut live: VecDeque<(usize, Range<usize>)> = VecDeque::new();
        let mut waits = 0;
        for number in 0..1000_usize {
            let bytes = 1 + number * 37 % 60;
            let piece = ring
                .take(bytes, |mark: usize| {
                    let (oldest, _) = live.pop_front().unwrap();
                    assert_eq!(oldest, mark, "out of order");
                    waits += 1;
                    Ok::<(), Infallible>(())
                })
                .unwrap();
            assert_eq!(piece.len(), bytes);
            assert!(piece.end <= 100);
            for (other, range) in &live {
                assert!(range.end <= piece.start || piece.end <= range.start, "{number} on {other}");
            }
            live.push_back((number, piece.clone()));
            ring.give(piece, number);
        }
        assert!(waits > 900 && live.len() > 1);
    }

    #[test]
    fn nothing_is_waited_for_while_there_is_room() {
        let mut ring = Ring::new(64);
        for number in 0..4 {
            let piece = ring.take(16, |_: u32| Err("waited")).unwrap();
            ring.give(piece, number);
        }
        assert_eq!(ring.take(16, |mark| if mark == 0 { Ok(()) } else { Err("waited") }), Ok(0..16));
        assert_eq!(ring.take(16, |_| Err("waited")), Err("waited"));
    }
}
