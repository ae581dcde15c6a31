//! What a matrix product asks of cuBLASLt, and when two products may share an algorithm.
//!
//! A batch without padding has another number of tokens each time, so nearly every product of a step has a shape that
//! was not seen before, and asking the heuristic for each would cost more than launching it. Products therefore share
//! the algorithm of a [`PlanKey`]: all sizes within a sixteenth of an octave, of the same types, layouts and
//! alignments. It is chosen for the largest of them, so that it does not depend on which came first.

use crate::driver::Product;
use crate::{DType, View};

/// A matrix in column-major order, as cuBLASLt wants it. The rows of a row-major view are its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) address: usize,
    pub(crate) dtype: DType,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    /// Elements between the beginnings of two columns.
    pub(crate) stride: u64,
    pub(crate) transposed: bool,
}

/// `d[m, n] = alpha · op(a)[m, k] · op(b)[k, n] (+ d)` in column-major order: the same memory as the row-major
/// `dᵀ = alpha · op(b)ᵀ · op(a)ᵀ`, so nothing is copied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Problem {
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) d: Matrix,
    pub(crate) alpha: f32,
    pub(crate) accumulate: bool,
    pub(crate) tf32: bool,
}

/// What decides the choice of an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PlanKey {
    /// `m`, `n` and `k`, rounded up to their class.
    pub(crate) sizes: [u64; 3],
    pub(crate) transposed: [bool; 2],
    pub(crate) input: DType,
    pub(crate) output: DType,
    /// Of addresses and of strides of `a`, `b`, `d`, in bytes; 16 if more.
    pub(crate) alignment: [u32; 3],
    pub(crate) accumulate: bool,
    pub(crate) tf32: bool,
}

/// The widest access of any kernel.
const ALIGNMENT_MAX: u32 = 16;

impl Matrix {
    fn new(view: View, transposed: bool) -> Self {
        Matrix {
            address: view.address(),
            dtype: view.dtype(),
            rows: view.cols() as u64,
            cols: view.rows() as u64,
            // cuBLASLt wants at least the number of rows, also where there is a single column.
            stride: view.stride().max(view.cols()) as u64,
            transposed,
        }
    }

    /// Rows and columns after the transposition.
    fn shape(&self) -> (u64, u64) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// The largest power of two, up to 16, that divides the address and the distance of columns, in bytes.
    pub(crate) fn alignment(&self) -> u32 {
        let bytes = self.address as u64 | (self.stride * self.dtype.bytes() as u64);
        1 << bytes.trailing_zeros().min(ALIGNMENT_MAX.trailing_zeros())
    }
}

impl Problem {
    /// Shapes and types have been checked.
    pub(crate) fn new(product: &Product, tf32: bool) -> Self {
        Problem {
            a: Matrix::new(product.b, product.b_transposed),
            b: Matrix::new(product.a, product.a_transposed),
            d: Matrix::new(product.c.view(), false),
            alpha: product.alpha,
            accumulate: product.accumulate,
            tf32: tf32 && product.a.dtype() == DType::F32,
        }
    }

    /// `m`, `n`, `k`.
    pub(crate) fn sizes(&self) -> [u64; 3] {
        [self.d.rows, self.d.cols, self.a.shape().1]
    }

    pub(crate) fn key(&self) -> PlanKey {
        PlanKey {
            sizes: self.sizes().map(size_class),
            transposed: [self.a.transposed, self.b.transposed],
            input: self.a.dtype,
            output: self.d.dtype,
            alignment: [self.a, self.b, self.d].map(|matrix| matrix.alignment()),
            accumulate: self.accumulate,
            tf32: self.tf32,
        }
    }
}

impl PlanKey {
    /// The largest product of this key, its columns as close as the alignment allows; its addresses mean nothing.
    pub(crate) fn representative(&self) -> Problem {
        let [m, n, k] = self.sizes;
        let matrix = |index: usize, dtype: DType, rows: u64, cols: u64, transposed: bool| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            let stride = aligned_stride(rows, dtype.bytes() as u64, u64::from(self.alignment[index]));
            Matrix { address: self.alignment[index] as usize, dtype, rows, cols, stride, transposed }
        };
        Problem {
            a: matrix(0, self.input, m, k, self.transposed[0]),
            b: matrix(1, self.input, k, n, self.transposed[1]),
            d: matrix(2, self.output, m, n, false),
            alpha: 1.0,
            accumulate: self.accumulate,
            tf32: self.tf32,
        }
    }
}

/// The smallest `m · 2^e ≥ size` with `16 ≤ m ≤ 32`; below 16, `size` itself.
fn size_class(size: u64) -> u64 {
    let exponent = size.max(1).ilog2().saturating_sub(4);
    size.div_ceil(1 << exponent) << exponent
}

/// The smallest stride of at least `rows` elements with exactly this alignment in bytes (or more, if it is the most).
fn aligned_stride(rows: u64, element: u64, alignment: u64) -> u64 {
    let step = (alignment / element).max(1);
    let stride = rows.next_multiple_of(step);
    let exact = stride / step % 2 == 1 || alignment == u64::from(ALIGNMENT_MAX);
    if exact { stride } else { stride + step }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn classes_are_a_sixteenth_apart() {
        for size in 1..5000 {
            let class = size_class(size);
            assert!(size <= class && (class - size) * 16 <= size, "{size} -> {class}");
            assert_eq!(size_class(class), class);
        }
        // What models are made of stays exact.
        for size in [64, 384, 512, 768, 1024, 2048, 2816, 3072, 4096, 5120, 10240, 65536] {
            assert_eq!(size_class(size), size);
        }
    }

    /// A row-major product is the column-major one of the exchanged operands over the same memory.
    #[test]
    fn row_major_is_column_major_exchanged() {
        let device = Device::cpu();
        // c[5, 7] = a[5, 3] · b[7, 3]ᵀ, with a and c being columns of wider tensors.
        let a = device.zeros(DType::Bf16, 5, 16).unwrap();
        let b = device.zeros(DType::Bf16, 7, 3).unwrap();
        let mut c = device.zeros(DType::F32, 5, 12).unwrap();
        let (c, _) = c.view_mut().split_columns(7);
        let product = Product {
            a: a.view().columns(8..11),
            a_transposed: false,
            b: b.view(),
            b_transposed: true,
            c,
            alpha: 1.0,
            accumulate: true,
        };
        let problem = Problem::new(&product, true);
        assert_eq!(problem.sizes(), [7, 5, 3]);
        assert!(!problem.tf32, "only f32 can be rounded to tf32");
        let expected =
            |address, dtype, rows, cols, stride, transposed| Matrix { address, dtype, rows, cols, stride, transposed };
        assert_eq!(problem.a, expected(b.view().address(), DType::Bf16, 3, 7, 3, true));
        assert_eq!(problem.b, expected(a.view().address() + 16, DType::Bf16, 3, 5, 16, false));
        assert_eq!((problem.d.rows, problem.d.cols, problem.d.stride), (7, 5, 12));
        // Strides of 3 bf16, of 16 bf16 behind an offset of 8, of 12 f32.
        assert_eq!([problem.a, problem.b, problem.d].map(|matrix| matrix.alignment()), [2, 16, 16]);
    }

    #[test]
    fn similar_products_share_a_plan_and_others_do_not() {
        let device = Device::cpu();
        let w = device.zeros(DType::F32, 64, 32).unwrap();
        let key = |tokens: usize, tf32: bool| {
            let x = device.zeros(DType::F32, tokens, 32).unwrap();
            let mut y = device.zeros(DType::F32, tokens, 64).unwrap();
            let product = Product {
                a: x.view(),
                a_transposed: false,
                b: w.view(),
                b_transposed: true,
                c: y.view_mut(),
                alpha: 1.0,
                accumulate: false,
            };
            Problem::new(&product, tf32).key()
        };
        assert_eq!(key(1000, false), key(1021, false));
        assert_ne!(key(1000, false), key(1100, false));
        assert_ne!(key(1000, false), key(1000, true));
        let key = key(1000, false);
        assert_eq!(key.sizes, [64, 1024, 32]);
        // The representative is a product of its own key.
        assert_eq!(key.representative().key(), key);
        let odd = PlanKey { alignment: [4, 8, 16], ..key };
        assert_eq!(odd.representative().key(), odd);
    }
}
