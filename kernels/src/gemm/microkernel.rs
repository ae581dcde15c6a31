//! The innermost loops of matrix multiplication: a tile of the product in registers, for each instruction set.

use crate::simd::{Level, level};

/// A tile of `rows × cols` of `c = a · b` (`+ c`), `depth` products deep.
///
/// `b` is read in whole vectors: the columns from `cols` to the next multiple of the lanes must be readable.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) depth: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) a: *const f32,
    pub(super) a_row_stride: usize,
    pub(super) a_depth_stride: usize,
    pub(super) b: *const f32,
    pub(super) b_depth_stride: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) accumulate: bool,
}

/// What computes tiles on an instruction set.
pub(super) struct Microkernel {
    /// The largest tile.
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Floats in a vector.
    pub(super) lanes: usize,
    run: unsafe fn(&Tile),
}

impl Microkernel {
    /// The one for this machine.
    pub(super) fn detect() -> &'static Microkernel {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &avx512::MICROKERNEL,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2::MICROKERNEL,
            _ => &portable::MICROKERNEL,
        }
    }

    /// # Safety
    /// The tile's pointers and strides must be valid as [`Tile`] describes, and `c` exclusive.
    pub(super) unsafe fn run(&self, tile: &Tile) {
        debug_assert!((1..=self.rows).contains(&tile.rows) && (1..=self.cols).contains(&tile.cols));
        // SAFETY: `detect` returns only what the machine can run; the rest is promised by the caller.
        unsafe { (self.run)(tile) }
    }
}

/// Asks for a cache line, of any address.
#[inline(always)]
fn prefetch(_address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing; every x86-64 processor has it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(_address.cast());
    }
}

/// Adds to `c`, or writes, the columns of a tile that is no whole number of vectors wide; `values` are the tile's rows.
#[inline(never)]
fn write_some(tile: &Tile, values: &[f32]) {
    for (row, values) in values.chunks_exact(values.len() / tile.rows).enumerate() {
        for (column, &value) in values[..tile.cols].iter().enumerate() {
            let c = tile.c.wrapping_add(row * tile.c_stride + column);
            // SAFETY: an element of the tile, which is exclusive.
            unsafe { *c = if tile.accumulate { *c + value } else { value } }
        }
    }
}

/// A microkernel of up to `$rows` rows and `$vectors` vectors of columns, two or three, from an instruction set's vector operations.
/// An element of the product is one chain of multiply-adds in order of depth, whatever the tile: how a product is cut
/// into tiles cannot be seen in its bits.
macro_rules! microkernel {
    ($features:literal, $lanes:literal, $vectors:literal, $rows:literal: [$($count:literal)+]) => {
        const LANES: usize = $lanes;
        const VECTORS: usize = $vectors;

        pub(in super::super) static MICROKERNEL: Microkernel =
            Microkernel { rows: $rows, cols: VECTORS * LANES, lanes: LANES, run };

        #[target_feature(enable = $features)]
        unsafe fn run(tile: &Tile) {
            // SAFETY: the caller's promise is passed on.
            unsafe {
                match tile.cols.div_ceil(LANES) {
                    1 => run_rows::<1>(tile),
                    2 => run_rows::<2>(tile),
                    _ => run_rows::<VECTORS>(tile),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn run_rows<const V: usize>(tile: &Tile) {
            match tile.rows {
                // SAFETY: the caller's promise is passed on.
                $($count => unsafe { kernel::<$count, V>(tile) },)+
                rows => unreachable!("a tile of {rows} rows"),
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn kernel<const R: usize, const V: usize>(tile: &Tile) {
            if tile.accumulate {
                // What the sums are added to comes from memory while they are computed.
                for row in 0..R {
                    for index in 0..V {
                        prefetch(tile.c.wrapping_add(row * tile.c_stride + index * LANES));
                    }
                }
            }
            let mut sums = [[zero(); V]; R];
            // One pointer for three rows: processors add a register, or twice a register, to an address for nothing.
            let mut a: [*const f32; 4] = std::array::from_fn(|group| tile.a.wrapping_add(3 * group * tile.a_row_stride));
            let mut b = tile.b;
            for _ in 0..tile.depth {
                let mut b_vectors = [zero(); V];
                for (index, vector) in b_vectors.iter_mut().enumerate() {
                    // SAFETY: `b` is readable in whole vectors.
                    *vector = unsafe { load(b.add(index * LANES)) };
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: row `row` of `a` at this depth.
                    let factor = splat(unsafe { *a[row / 3].add(row % 3 * tile.a_row_stride) });
                    for (sum, &vector) in sums.iter_mut().zip(&b_vectors) {
                        *sum = multiply_add(factor, vector, *sum);
                    }
                }
                a = a.map(|a| a.wrapping_add(tile.a_depth_stride));
                b = b.wrapping_add(tile.b_depth_stride);
            }
            // Nowhere is the address of `sums` taken: they never leave the registers.
            if tile.cols == V * LANES {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (index, sum) in sums.into_iter().enumerate() {
                        let c = tile.c.wrapping_add(row * tile.c_stride + index * LANES);
                        // SAFETY: a whole vector of row `row` of `c`.
                        unsafe { store(c, if tile.accumulate { add(load(c), sum) } else { sum }) }
                    }
                }
            } else {
                let mut values = [[[0.0; LANES]; V]; R];
                for (values, sums) in values.iter_mut().zip(sums) {
                    for (values, sum) in values.iter_mut().zip(sums) {
                        // SAFETY: an array as long as a vector.
                        unsafe { store(values.as_mut_ptr(), sum) }
                    }
                }
                write_some(tile, values.as_flattened().as_flattened());
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm512_add_ps as add, _mm512_fmadd_ps as multiply_add, _mm512_loadu_ps as load, _mm512_set1_ps as splat,
        _mm512_setzero_ps as zero, _mm512_storeu_ps as store,
    };

    use super::{Microkernel, Tile, prefetch, write_some};

    // 24 sums, 2 vectors of b and a factor in 32 registers. Of the shapes that fit, 32 columns are the one that divides
    // the widths of T5.
    microkernel!("avx512f,avx2,fma", 16, 2, 12: [1 2 3 4 5 6 7 8 9 10 11 12]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        _mm256_add_ps as add, _mm256_fmadd_ps as multiply_add, _mm256_loadu_ps as load, _mm256_set1_ps as splat,
        _mm256_setzero_ps as zero, _mm256_storeu_ps as store,
    };

    use super::{Microkernel, Tile, prefetch, write_some};

    // 12 sums, 3 vectors of b and a factor in 16 registers.
    microkernel!("avx2,fma", 8, 3, 4: [1 2 3 4]);
}

/// Plain arithmetic in vectors of four, which every 64-bit processor has; without fused multiply-add, which is slow
/// where there is no instruction for it.
mod portable {
    use super::{Microkernel, Tile, prefetch, write_some};

    type Vector = [f32; 4];

    #[inline(always)]
    fn zero() -> Vector {
        [0.0; 4]
    }

    #[inline(always)]
    fn splat(value: f32) -> Vector {
        [value; 4]
    }

    #[inline(always)]
    fn add(x: Vector, y: Vector) -> Vector {
        std::array::from_fn(|lane| x[lane] + y[lane])
    }

    #[inline(always)]
    fn multiply_add(x: Vector, y: Vector, sum: Vector) -> Vector {
        std::array::from_fn(|lane| x[lane] * y[lane] + sum[lane])
    }

    /// # Safety
    /// Four floats must be readable.
    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { pointer.cast::<Vector>().read_unaligned() }
    }

    /// # Safety
    /// Four floats must be writable.
    #[inline(always)]
    unsafe fn store(pointer: *mut f32, vector: Vector) {
        // SAFETY: the caller's promise.
        unsafe { pointer.cast::<Vector>().write_unaligned(vector) }
    }

    #[cfg(target_arch = "x86_64")]
    microkernel!("sse2", 4, 3, 4: [1 2 3 4]);
    #[cfg(target_arch = "aarch64")]
    microkernel!("neon", 4, 3, 4: [1 2 3 4]);
}

/// Every microkernel that this machine can run.
#[cfg(test)]
pub(super) fn all() -> Vec<&'static Microkernel> {
    let mut all = vec![&portable::MICROKERNEL];
    #[cfg(target_arch = "x86_64")]
    {
        if level() >= Level::Avx2 {
            all.push(&avx2::MICROKERNEL);
        }
        if level() >= Level::Avx512 {
            all.push(&avx512::MICROKERNEL);
        }
    }
    all
}
