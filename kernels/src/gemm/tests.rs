use half::bf16;

use super::*;
use crate::oracle::Random;

/// `a · b` (+ `c`) in f64, and the sum of the products' magnitudes.
fn expected(a: &[f32], b: &[f32], c: Option<&[f32]>, (m, n, k): (usize, usize, usize)) -> Vec<(f64, f64)> {
    let element = |i: usize, j: usize| {
        let old = c.map_or(0.0, |c| f64::from(c[i * n + j]));
        let products = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j]));
        products.fold((old, old.abs()), |(sum, size), product| (sum + product, size + product.abs()))
    };
    (0..m * n).map(|index| element(index / n, index % n)).collect()
}

fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|index| x[index % rows * cols + index / rows]).collect()
}

fn check(name: &str, c: &[f32], expected: &[(f64, f64)], depth: usize) {
    for (index, (&value, &(sum, size))) in c.iter().zip(expected).enumerate() {
        let tolerance = f64::from(f32::EPSILON) * (depth as f64).sqrt() * size + 1e-30;
        assert!((f64::from(value) - sum).abs() <= tolerance, "{name}: element {index} is {value}, not {sum}");
    }
}

const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (1, 100, 7),
    (8, 8, 32),
    (9, 17, 33),
    (7, 48, 5),
    (13, 64, 256),
    (64, 64, 257),
    (130, 50, 300),
    (33, 500, 64),
    (500, 33, 64),
    (3, 3, 0),
    (200, 200, 600),
];

#[test]
fn every_shape_and_layout_against_f64() {
    for shape @ (m, n, k) in SHAPES {
        let mut random = Random::new(m as u64 * 1000 + n as u64);
        let (a, b, old) = (random.normals(m * k), random.normals(k * n), random.normals(m * n));
        let (a_t, b_t) = (transpose(&a, m, k), transpose(&b, k, n));
        for accumulate in [false, true] {
            let expected = expected(&a, &b, accumulate.then_some(&old), shape);
            for layout in 0..4 {
                let a = match layout & 1 {
                    0 => Matrix::from_slice(&a, m, k, k),
                    _ => Matrix::from_slice(&a_t, k, m, m).transposed(),
                };
                let b = match layout & 2 {
                    0 => Matrix::from_slice(&b, k, n, n),
                    _ => Matrix::from_slice(&b_t, n, k, k).transposed(),
                };
                let mut c = if accumulate { old.clone() } else { vec![f32::NAN; m * n] };
                gemm(a, b, MatrixMut::from_slice(&mut c, m, n, n), accumulate);
                check(&format!("{shape:?} layout {layout}"), &c, &expected, k);
            }
        }
    }
}

#[test]
fn every_instruction_set_against_f64() {
    for kernel in microkernel::all() {
        for shape @ (m, n, k) in SHAPES {
            let mut random = Random::new(3);
            let (a, b) = (random.normals(m * k), random.normals(k * n));
            let run = |way: &dyn Fn(&Product<f32, f32, f32>)| {
                let mut c = vec![f32::NAN; m * n];
                let (a, b) = (Matrix::from_slice(&a, m, k, k), Matrix::from_slice(&b, k, n, n));
                way(&Product { kernel, ..Product::new(a, b, MatrixMut::from_slice(&mut c, m, n, n), false) });
                c
            };
            let c = run(&|product| product.serial());
            check(&format!("{shape:?} {} lanes", kernel.lanes), &c, &expected(&a, &b, None, shape), k);
            assert_eq!(c, run(&|product| product.parallel()), "{shape:?} {} lanes", kernel.lanes);
        }
    }
}

#[test]
fn bf16_operands_are_exact_and_results_rounded_once() {
    let (m, n, k) = (70, 90, 300);
    let mut random = Random::new(5);
    let narrow = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let wide = |values: &[bf16]| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
    let (a, b, old) = (narrow(random.normals(m * k)), narrow(random.normals(k * n)), narrow(random.normals(m * n)));
    let (a32, b32, mut c32) = (wide(&a), wide(&b), wide(&old));
    gemm(
        Matrix::from_slice(&a32, m, k, k),
        Matrix::from_slice(&b32, k, n, n),
        MatrixMut::from_slice(&mut c32, m, n, n),
        true,
    );
    let mut c = old;
    gemm(
        Matrix::from_slice(&a, m, k, k),
        Matrix::from_slice(&b, k, n, n),
        MatrixMut::from_slice(&mut c, m, n, n),
        true,
    );
    assert_eq!(c, narrow(c32));
}

/// One thread packs block by block; several pack the smaller operand together, or as much as their memory holds, which
/// the second shape exceeds, and the larger one piece by piece.
#[test]
fn bits_do_not_depend_on_threads_or_blocks() {
    for (m, n, k) in [(530, 610, 1300), (130, 140, 70_000)] {
        let mut random = Random::new(6);
        let (a, b) = (random.normals(m * k), random.normals(k * n));
        for layout in 0..4 {
            let a = match layout & 1 {
                0 => Matrix::from_slice(&a, m, k, k),
                _ => Matrix::from_slice(&a, k, m, m).transposed(),
            };
            let b = match layout & 2 {
                0 => Matrix::from_slice(&b, k, n, n),
                _ => Matrix::from_slice(&b, n, k, k).transposed(),
            };
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = vec![f32::NAN; m * n];
                pool.install(|| gemm(a, b, MatrixMut::from_slice(&mut c, m, n, n), false));
                c
            };
            let mut alone = vec![f32::NAN; m * n];
            gemm_serial(a, b, MatrixMut::from_slice(&mut alone, m, n, n), false);
            for threads in [1, 2, 3, 5] {
                assert!(alone == run(threads), "{threads} threads, layout {layout} of {m} x {n} x {k}");
            }
        }
    }
}
