//! The emulator finds what it is there to find, and its operations do what a GPU's do.

use half::{bf16, f16};

use super::compile::is_sanitized;
use crate::driver::{Argument, Launch, Module, Product, dropout_arguments};
use crate::float::Float;
use crate::oracle::{self, Random};
use crate::{DType, Device, Dropout, Error, Result, Segments, Tensor, ops, selftest};

const THREADS: usize = 96;
const BLOCKS: usize = 5;
const COUNT: usize = THREADS * BLOCKS;

/// A launch of a kernel of test.cu, with or without its mistake.
#[derive(Clone, Copy)]
struct Test<'a> {
    function: &'static str,
    element: DType,
    right: bool,
    blocks: usize,
    threads: usize,
    shared_bytes: usize,
    arguments: &'a [Argument],
}

const TEST: Test<'static> = Test {
    function: "",
    element: DType::F32,
    right: true,
    blocks: 1,
    threads: THREADS,
    shared_bytes: 0,
    arguments: &[],
};

fn launch(device: &Device, test: Test) -> Result<()> {
    let Device::Gpu(gpu) = device else { panic!("not a GPU") };
    gpu.launch(Launch {
        module: Module { source: "emulator_test", element: test.element, constants: &[("RIGHT", test.right.into())] },
        function: test.function,
        grid: [test.blocks as u32, 1, 1],
        block: test.threads as u32,
        shared_bytes: test.shared_bytes,
        arguments: test.arguments,
    })
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|index| index as f32).collect()
}

/// Runs a kernel from x to y.
fn run(seed: u64, function: &'static str, right: bool, factor: usize) -> Result<Vec<f32>> {
    let device = Device::emulated(seed)?;
    let x = device.upload(&numbers(COUNT * factor), BLOCKS, THREADS * factor)?;
    let mut y = device.empty(DType::F32, BLOCKS, THREADS * factor)?;
    let arguments: &[Argument] = match function {
        "copy" => &[x.view().into(), (&y.view_mut()).into(), (COUNT * factor).into()],
        "leave_before_barrier" | "part_ways" | "shuffle" => &[(&y.view_mut()).into()],
        _ => &[x.view().into(), (&y.view_mut()).into()],
    };
    let shared_bytes = 2 * 16 * THREADS;
    let blocks = if function == "copy" { BLOCKS + 1 } else { BLOCKS };
    launch(&device, Test { function, right, blocks, shared_bytes, arguments, ..TEST })?;
    y.download()
}

/// The message of a kernel that must fail.
fn failure(function: &'static str, factor: usize) -> String {
    match run(1, function, false, factor) {
        Err(Error::Kernel { kernel, reason }) => {
            assert_eq!(kernel, function);
            reason
        }
        other => panic!("{function}: {other:?}"),
    }
}

fn operations_agree_with_the_oracle(seed: u64) {
    let device = Device::emulated(seed).unwrap();
    let outcomes = selftest::run(&device).unwrap_or_else(|error| panic!("{error}"));
    let failures: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let as_on_cpu = outcomes.iter().filter(|outcome| outcome.dtype != "tf32").count();
    // Prepared weights are the processor's alone.
    let on_cpu = selftest::run(&Device::cpu()).unwrap();
    assert_eq!(as_on_cpu, on_cpu.iter().filter(|outcome| outcome.op != "linear_forward_prepared").count());
    assert_eq!(device.memory().live_bytes, 0);
}

/// Several orders of threads; tests of their own, to run side by side.
#[test]
fn operations_agree_with_the_oracle_in_one_order() {
    if super::is_missing() {
        return;
    }
    operations_agree_with_the_oracle(1);
}

#[test]
fn operations_agree_with_the_oracle_in_another_order() {
    if super::is_missing() {
        return;
    }
    operations_agree_with_the_oracle(2);
}

#[test]
fn operations_agree_with_the_oracle_in_a_third_order() {
    if super::is_missing() {
        return;
    }
    operations_agree_with_the_oracle(3);
}

#[test]
fn a_missing_barrier_shows_by_the_order_of_threads() {
    if super::is_missing() {
        return;
    }
    let seeds = 0..6;
    for function in ["rotate", "rotate_twice", "rotate_lanes"] {
        let right = run(0, function, true, 1).unwrap();
        assert!(seeds.clone().all(|seed| run(seed, function, true, 1).unwrap() == right), "{function}");
        let wrong = seeds.clone().filter(|&seed| run(seed, function, false, 1).unwrap() != right).count();
        assert!(wrong >= 5, "{function}: only {wrong} seeds of 6 show it");
    }
    let rotated: Vec<f32> = (0..COUNT).map(|i| (i / THREADS * THREADS + (i + 1) % THREADS) as f32).collect();
    assert_eq!(run(0, "rotate", true, 1).unwrap(), rotated);
}

#[test]
fn a_missing_wait_for_copies_shows() {
    if super::is_missing() {
        return;
    }
    assert_eq!(run(0, "copy_in_the_background", true, 8).unwrap(), numbers(8 * COUNT));
    let wrong = run(0, "copy_in_the_background", false, 8).unwrap();
    let missing = wrong.iter().filter(|value| value.is_nan()).count();
    assert_eq!(missing, wrong.len() / 2);
}

#[test]
fn barriers_that_not_all_reach_are_reported() {
    if super::is_missing() {
        return;
    }
    for (function, words) in [
        ("leave_before_barrier", ["thread 40 has returned", "is at the barrier of emulator_test.cu:"]),
        ("part_ways", ["thread 40 is at the barrier of emulator_test.cu:", "is at the barrier of emulator_test.cu:"]),
        ("shuffle", ["is at the warp operation of emulator_test.cu:", "has returned"]),
    ] {
        assert_eq!(run(1, function, true, 1).unwrap(), [1.0; COUNT]);
        let message = failure(function, 1);
        assert!(message.starts_with("block ("), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn writes_out_of_bounds_are_reported() {
    if super::is_missing() {
        return;
    }
    assert_eq!(run(0, "copy", true, 1).unwrap(), numbers(COUNT));
    assert_eq!(run(0, "copy_shared", true, 1).unwrap(), numbers(COUNT));
    if !is_sanitized() {
        assert_eq!(failure("copy", 1), format!("out of bounds: wrote byte 0 after a block of {} bytes", 4 * COUNT));
        let message = failure("copy_shared", 1);
        assert!(message.contains("wrote beyond the 384 bytes taken from byte 0 on"), "{message}");
    }
}

/// With the sanitizers these end the process, with their report; tests/emulator/sanitize.sh looks for that.
#[test]
#[ignore = "ends the process where it works: run by tests/emulator/sanitize.sh"]
fn planted_write_out_of_device_memory() {
    if super::is_missing() {
        return;
    }
    assert!(is_sanitized());
    let _ = run(1, "copy", false, 1);
}

#[test]
#[ignore = "ends the process where it works: run by tests/emulator/sanitize.sh"]
fn planted_write_out_of_shared_memory() {
    if super::is_missing() {
        return;
    }
    assert!(is_sanitized());
    let _ = run(1, "copy_shared", false, 1);
}

#[test]
#[ignore = "ends the process where it works: run by tests/emulator/sanitize.sh"]
fn planted_overflow() {
    if super::is_missing() {
        return;
    }
    assert!(is_sanitized());
    let _ = run(1, "overflow", false, 1);
}

#[test]
fn memory_that_nobody_wrote_is_nan() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(0).unwrap();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let tensor = device.empty(dtype, 3, 5).unwrap();
        let is_nan = match dtype {
            DType::F32 => tensor.download::<f32>().unwrap().iter().all(|value| value.is_nan()),
            DType::Bf16 => tensor.download::<bf16>().unwrap().iter().all(|value| value.is_nan()),
            _ => tensor.download::<f16>().unwrap().iter().all(|value| value.is_nan()),
        };
        assert!(is_nan, "{dtype:?}");
    }
    assert_eq!(device.memory().live_bytes, 0);
}

#[test]
#[should_panic(expected = "arguments and parameters of kernel copy")]
fn arguments_are_checked_against_parameters() {
    if super::is_missing() {
        panic!("arguments and parameters of kernel copy");
    }
    let device = Device::emulated(0).unwrap();
    let x = device.zeros(DType::F32, 1, 32).unwrap();
    let arguments = &[x.view().into(), x.view().into(), Argument::I32(32)];
    let test = Test { function: "copy", threads: 32, arguments, ..TEST };
    let _ = launch(&device, test);
}

#[test]
fn shared_memory_is_no_more_than_the_launch_gives() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(0).unwrap();
    let x = device.zeros(DType::F32, 1, 32).unwrap();
    let arguments = &[x.view().into(), x.view().into()];
    let test = Test { function: "rotate", threads: 32, shared_bytes: 100, arguments, ..TEST };
    let error = launch(&device, test).unwrap_err().to_string();
    assert!(error.contains("takes 128 bytes of shared memory from byte 0 on, but the launch gives 100"), "{error}");
}

/// Values whose rounding is delicate, and others.
fn delicate_numbers() -> Vec<f32> {
    let mut values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
        .collect();
    let halves = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32());
    // Halfway to the next f16, and next to that.
    values.extend(halves.flat_map(|half| [0x0fff, 0x1000, 0x1001].map(|more| f32::from_bits(half.to_bits() + more))));
    values.resize(values.len().next_multiple_of(THREADS), 0.0);
    values
}

fn converts_as_rust_does<T: Float>() {
    let (device, values) = (Device::emulated(0).unwrap(), delicate_numbers());
    let x = device.upload(&values, 1, values.len()).unwrap();
    let mut y = device.empty(T::DTYPE, 1, values.len()).unwrap();
    let mut z = device.empty(DType::F32, 1, values.len()).unwrap();
    let test = Test { element: T::DTYPE, blocks: values.len() / THREADS, ..TEST };
    let arguments = &[x.view().into(), (&y.view_mut()).into()];
    launch(&device, Test { function: "convert", arguments, ..test }).unwrap();
    let arguments = &[y.view().into(), (&z.view_mut()).into()];
    launch(&device, Test { function: "widen", arguments, ..test }).unwrap();
    let (narrow, wide) = (y.download::<T>().unwrap(), z.download::<f32>().unwrap());
    for ((value, narrow), wide) in values.into_iter().zip(narrow).zip(wide) {
        let want = <T as Float>::from_f32(value);
        let is_same = bytemuck::bytes_of(&want) == bytemuck::bytes_of(&narrow);
        assert!(is_same || value.is_nan() && narrow.to_f32().is_nan(), "{value:e} became {:e}", narrow.to_f32());
        assert!(
            wide.to_bits() == want.to_f32().to_bits() || value.is_nan() && wide.is_nan(),
            "{value:e} came back {wide:e}"
        );
    }
}

#[test]
fn elements_are_rounded_as_on_the_cpu() {
    if super::is_missing() {
        return;
    }
    converts_as_rust_does::<f32>();
    converts_as_rust_does::<bf16>();
    converts_as_rust_does::<f16>();
}

#[test]
fn reductions_votes_and_shuffles() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(3).unwrap();
    let values: Vec<f32> = (0..THREADS).map(|t| ((t * 37) % 101) as f32 - 50.0).collect();
    let x = device.upload(&values, 1, THREADS).unwrap();
    let mut y = device.empty(DType::F32, THREADS, 8).unwrap();
    let arguments = &[x.view().into(), (&y.view_mut()).into()];
    let test = Test { function: "reductions", shared_bytes: 128, arguments, ..TEST };
    launch(&device, test).unwrap();
    let largest = |values: &[f32]| values.iter().copied().fold(f32::MIN, f32::max);
    let positive = |values: &[f32]| values.iter().filter(|&&value| value > 0.0).count();
    for (t, got) in y.download::<f32>().unwrap().chunks(8).enumerate() {
        let warp = &values[t / 32 * 32..][..32];
        let lane = t % 32;
        let want = [
            values.iter().sum(),
            largest(&values),
            warp.iter().sum(),
            largest(warp),
            warp[if lane < 3 { lane } else { lane - 3 }],
            warp[if lane % 16 + 5 < 16 { lane + 5 } else { lane }],
            warp[9],
            (100 * positive(&values) + positive(warp)) as f32,
        ];
        assert_eq!(got, want, "thread {t}");
    }
}

#[test]
fn blocks_add_up_in_device_memory() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(4).unwrap();
    let values: Vec<u32> = (0..COUNT as u32).map(|index| index * 7919 % 1009).collect();
    let x = device.upload(&values, BLOCKS, THREADS).unwrap();
    let mut sums = device.zeros(DType::U32, 1, 2).unwrap();
    let arguments = &[x.view().into(), (&sums.view_mut()).into()];
    let test = Test { function: "atomics", blocks: BLOCKS, arguments, ..TEST };
    launch(&device, test).unwrap();
    assert_eq!(sums.download::<u32>().unwrap(), [values.iter().sum(), values.iter().copied().max().unwrap()]);
}

#[test]
fn kernels_drop_what_the_cpu_drops() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(5).unwrap();
    let count = 8 * COUNT;
    for probability in [0.0, 0.1, 0.9] {
        let mask = Dropout::new(probability, 1 << 40 | 7, 1 << 50 | 9);
        let mut outputs = [(); 2].map(|()| device.empty(DType::F32, 1, count).unwrap());
        let [y, z] = outputs.each_mut().map(|output| Argument::from(&output.view_mut()));
        let [seed, stream, threshold, scale] = dropout_arguments(mask);
        let test =
            Test { function: "factors", blocks: BLOCKS, arguments: &[y, z, seed, stream, threshold, scale], ..TEST };
        launch(&device, test).unwrap();
        let mut want = vec![0.0; count];
        mask.factors(0, &mut want);
        for output in &outputs {
            assert_eq!(output.download::<f32>().unwrap(), want, "{probability}");
        }
    }
}

/// `a[16,depth] · b[depth,8]` by a warp, whose operands have few enough bits for every sum to be exact.
fn multiplies<T: Float>(depth: usize) {
    let (device, mut random) = (Device::emulated(6).unwrap(), Random::new(7));
    let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| random.below(17) as f32 - 8.0).collect() };
    let (a, b) = (draw(16 * depth), draw(depth * 8));
    let upload = |values: &[f32], cols: usize| -> Tensor {
        let values: Vec<T> = values.iter().map(|&value| <T as Float>::from_f32(value)).collect();
        device.upload(&values, values.len() / cols, cols).unwrap()
    };
    let (left, right) = (upload(&a, depth), upload(&b, 8));
    let mut c = device.empty(DType::F32, 16, 8).unwrap();
    let arguments = &[left.view().into(), right.view().into(), (&c.view_mut()).into()];
    let test = Test { function: "product", element: T::DTYPE, threads: 32, shared_bytes: 1024, arguments, ..TEST };
    launch(&device, test).unwrap();
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
    let want = oracle::matmul(&wide(&a), &wide(&b), depth);
    assert_eq!(wide(&c.download::<f32>().unwrap()), want, "{:?}", T::DTYPE);
}

#[test]
fn tensor_cores_multiply_fragments() {
    if super::is_missing() {
        return;
    }
    multiplies::<f32>(8);
    multiplies::<bf16>(16);
    multiplies::<f16>(16);
}

#[test]
#[should_panic(expected = "128 threads, but kernel bounded is for 96")]
fn launch_bounds_are_kept() {
    if super::is_missing() {
        panic!("128 threads, but kernel bounded is for 96");
    }
    let device = Device::emulated(0).unwrap();
    let test = Test { function: "bounded", ..TEST };
    launch(&device, test).unwrap();
    let _ = launch(&device, Test { threads: 128, ..test });
}

#[test]
fn views_are_read_written_copied_and_zeroed() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(0).unwrap();
    let mut tensor = device.upload(&numbers(12), 3, 4).unwrap();
    tensor.view_mut().rows_range(1..2).write(&[-1.0_f32; 4]).unwrap();
    tensor.view_mut().split_columns(3).1.fill_zero().unwrap();
    let mut row = [f32::NAN; 4];
    tensor.view().rows_range(2..3).read(&mut row).unwrap();
    assert_eq!(row, [8.0, 9.0, 10.0, 0.0]);
    let mut other = device.empty(DType::F32, 3, 4).unwrap();
    ops::cast(tensor.view(), other.view_mut()).unwrap();
    assert_eq!(other.download::<f32>().unwrap(), [0.0, 1.0, 2.0, 0.0, -1.0, -1.0, -1.0, 0.0, 8.0, 9.0, 10.0, 0.0]);
    assert!(device.zeros(DType::F32, 0, 4).unwrap().download::<f32>().unwrap().is_empty());
}

#[test]
#[should_panic(expected = "host access to memory of emulated")]
fn the_host_does_not_reach_into_device_memory() {
    let tensor = Device::emulated(0).unwrap().zeros(DType::F32, 1, 1).unwrap();
    tensor.as_slice::<f32>();
}

#[test]
fn segments_are_uploaded_once() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(0).unwrap();
    let segments = Segments::from_offsets(&[0, 3, 3, 7]);
    let view = segments.on_device(&device).unwrap();
    let mut values = [0; 6];
    view.read::<u32>(&mut values).unwrap();
    assert_eq!(values, [0, 3, 3, 3, 0, 4]);
    assert_eq!(segments.on_device(&device).unwrap().address(), view.address());
}

#[test]
fn products_are_scaled_transposed_and_accumulated() {
    if super::is_missing() {
        return;
    }
    let device = Device::emulated(0).unwrap();
    let Device::Gpu(gpu) = &device else { unreachable!() };
    let a = device.upload(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], 3, 2).unwrap(); // as [K,M]
    let b = device.upload(&[1.0_f32, 0.0, 2.0, 0.0, 1.0, 1.0], 2, 3).unwrap(); // as [N,K]
    for (accumulate, want) in [(false, [5.5, 4.0, 7.0, 5.0]), (true, [6.5, 5.0, 8.0, 6.0])] {
        let mut c = device.upload(&[1.0_f32; 4], 2, 2).unwrap();
        let product = Product {
            a: a.view(),
            a_transposed: true,
            b: b.view(),
            b_transposed: true,
            c: c.view_mut(),
            alpha: 0.5,
            accumulate,
        };
        gpu.gemm(product).unwrap();
        assert_eq!(c.download::<f32>().unwrap(), want);
    }
}

/// Before any memory is asked for.
#[test]
fn a_tensor_of_more_elements_than_32_bits_count_is_an_error() {
    let device = Device::emulated(0).unwrap();
    let error = device.empty(DType::Bf16, 1 << 16, 1 << 16).err().unwrap();
    assert!(matches!(error, Error::TooManyElements { .. }) && error.is_user_error(), "{error}");
}
