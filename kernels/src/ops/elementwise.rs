//! Launches of elementwise kernels, whose threads take pieces of 8 elements (cuda/piece.cuh).

use crate::driver::{Argument, Gpu, Launch, Module, dropout_arguments, has_whole_vectors};
use crate::{DType, Dropout, Result, View};

const THREADS: usize = 256;
/// Elements that a thread takes.
const PIECE: usize = 8;

/// A kernel over `[rows, cols]` elements. Its arguments are `first`, then address and stride of each view, the numbers of
/// rows and columns, whether rows are whole vectors, and the mask if there is one.
pub(super) struct Elementwise<'a> {
    pub(super) source: &'static str,
    pub(super) function: &'static str,
    pub(super) element: DType,
    pub(super) constants: &'a [(&'static str, u32)],
    pub(super) first: &'a [Argument],
    /// What is read and written, all of as many rows.
    pub(super) views: &'a [View<'a>],
    pub(super) cols: usize,
    pub(super) mask: Option<Dropout>,
}

impl Elementwise<'_> {
    pub(super) fn launch(&self, gpu: &Gpu) -> Result<()> {
        let rows = self.views.last().map_or(0, View::rows);
        let mut arguments = self.first.to_vec();
        for &view in self.views {
            arguments.extend::<[Argument; 2]>([view.into(), view.stride().into()]);
        }
        arguments.extend::<[Argument; 3]>([rows.into(), self.cols.into(), has_whole_vectors(self.views).into()]);
        arguments.extend(self.mask.into_iter().flat_map(dropout_arguments));
        gpu.launch(Launch {
            module: Module { source: self.source, element: self.element, constants: self.constants },
            function: self.function,
            grid: [(rows * self.cols).div_ceil(PIECE * THREADS) as u32, 1, 1],
            block: THREADS as u32,
            shared_bytes: 0,
            arguments: &arguments,
        })
    }
}
