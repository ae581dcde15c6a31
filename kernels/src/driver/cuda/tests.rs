//! The driver on a GPU that is made up (tests/fake_cuda): its stream is as lazy as it may be, its memory is watched, and
//! its cuBLASLt multiplies as the documentation says. What a kernel computes is not tested here.

use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use half::bf16;

use super::*;
use crate::driver::communicator::{Communicator, Patience, Place, WaitLimits};
use crate::driver::libraries::{Shared, Wanted};
use crate::driver::nccl::Nccl;
use crate::driver::{Driver, Gpu};
use crate::float::Float;
use crate::{Device, Tensor, View, ViewMut};

const LIBRARIES: [(&str, &str, &str); 4] = [
    ("libcuda.so.1", "driver.c", include_str!("../../../tests/fake_cuda/driver.c")),
    ("libnvrtc.so.13", "nvrtc.c", include_str!("../../../tests/fake_cuda/nvrtc.c")),
    ("libnccl.so.2", "nccl.c", include_str!("../../../tests/fake_cuda/nccl.c")),
    ("libcublasLt.so.13", "cublaslt.c", include_str!("../../../tests/fake_cuda/cublaslt.c")),
];

/// Where the made-up libraries are; nowhere if they cannot be, and then tests are skipped.
fn fake() -> Option<&'static SearchPath> {
    static FAKE: OnceLock<Option<SearchPath>> = OnceLock::new();
    let fake = FAKE.get_or_init(|| {
        if Shared::open(&Wanted::driver(), &SearchPath::default()).is_ok() {
            eprintln!("SKIPPED: there is a real driver, and a process can have but one");
            return None;
        }
        let folder = std::env::current_exe().unwrap().parent().unwrap().join("fake_cuda");
        fs::create_dir_all(&folder).unwrap();
        for (library, name, text) in LIBRARIES {
            let unfinished = folder.join(format!("{}.{name}", std::process::id()));
            fs::write(&unfinished, text).unwrap();
            let object = unfinished.with_extension("so");
            let mut command = Command::new("cc");
            command.args(["-shared", "-fPIC", "-O1", "-pthread", &format!("-Wl,-soname,{library}"), "-o"]);
            if !command.arg(&object).arg(&unfinished).status().is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: there is no C compiler `cc` to make up a driver with");
                return None;
            }
            fs::rename(object, folder.join(library)).unwrap();
            fs::remove_file(unfinished).unwrap();
        }
        Some(SearchPath { libraries: vec![folder], ..SearchPath::default() })
    });
    fake.as_ref()
}

fn open() -> Option<Gpu> {
    Some(Gpu::new(Driver::Cuda(Cuda::new(0, fake()?).unwrap())))
}

/// Numbers that differ, small enough that sums of their products are exact.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|index| ((index * 37 + seed * 11) % 17) as f32 - 8.0).collect()
}

#[test]
fn copies_wait_for_nothing_and_lose_nothing() {
    let Some(gpu) = open() else { return };
    let device = Device::Gpu(gpu);
    // One of several turns of the ring, and many that fill it several times.
    let sizes = [1_usize, 3, 1 << 20, 10 << 20].into_iter().chain(std::iter::repeat_n(30_000, 400));
    let mut buffer = Vec::new();
    let mut tensors: Vec<(usize, Tensor)> = Vec::new();
    for (seed, size) in sizes.enumerate() {
        buffer.clear();
        buffer.extend(numbers(size, seed));
        tensors.push((seed, device.upload(&buffer, size, 1).unwrap()));
        // What was uploaded is not read again.
        buffer.fill(f32::NAN);
    }
    for (seed, tensor) in &tensors {
        assert!(tensor.download::<f32>().unwrap() == numbers(tensor.rows(), *seed), "tensor {seed}");
    }
}

#[test]
fn memory_is_zeroed_copied_reused_and_limited() {
    let Some(gpu) = open() else { return };
    let device = Device::Gpu(gpu.clone());
    let mut zeros = device.zeros(DType::F32, 10, 100).unwrap();
    assert_eq!(zeros.download::<f32>().unwrap(), [0.0; 1000]);
    let source = device.upload(&numbers(1000, 1), 10, 100).unwrap();
    gpu.copy(source.view(), zeros.view_mut()).unwrap();
    assert_eq!(zeros.download::<f32>().unwrap(), numbers(1000, 1));
    let before = device.memory();
    drop(zeros);
    let again = device.empty(DType::F32, 10, 100).unwrap();
    assert_eq!(device.memory(), before, "a block is used again");
    drop(again);
    let error = device.empty(DType::F32, 1 << 20, 300).err().unwrap();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("out of memory on cuda") && error.to_string().contains("micro_batch_size"));
}

fn launch<'a>(function: &'static str, shared_bytes: usize, arguments: &'a [Argument]) -> Launch<'a> {
    let module = Module { source: "residual", element: DType::Bf16, constants: &[("SIZE", 7)] };
    Launch { module, function, grid: [3, 2, 1], block: 64, shared_bytes, arguments }
}

#[test]
fn launches_carry_their_arguments() {
    let Some(gpu) = open() else { return };
    let device = Device::Gpu(gpu.clone());
    let report = device.zeros(DType::U32, 1, 10).unwrap();
    // More shared memory than a kernel has without asking, then less.
    for shared_bytes in [100_000, 16] {
        let arguments: [Argument; 5] =
            [report.view().into(), 5_u32.into(), (-6_i32).into(), (7_u64 << 32 | 8).into(), 1.5_f32.into()];
        gpu.launch(launch("report_launch", shared_bytes, &arguments)).unwrap();
        let expected = [5, -6_i32 as u32, 8, 7, 1.5_f32.to_bits(), 3, 2, 1, 64, shared_bytes as u32];
        assert_eq!(report.download::<u32>().unwrap(), expected);
    }
}

#[test]
fn failures_name_kernel_and_grid() {
    let Some(gpu) = open() else { return };
    let message = |launch: Launch| gpu.launch(launch).unwrap_err().to_string();
    let error = message(launch("report_launch", 200_000, &[]));
    assert!(error.contains("report_launch") && error.contains("200000 bytes of shared memory"), "{error}");
    assert!(error.contains("this GPU has 166912"), "{error}");
    let error = message(launch("missing", 0, &[]));
    assert!(error.contains("residual (bf16, SIZE=7)") && error.contains("missing"), "{error}");
    let error = message(launch("refused", 0, &[]));
    assert!(error.contains("kernel refused failed: grid 3 x 2 x 1, 64 threads"), "{error}");
    // One that fails while it runs is noticed later, and named.
    gpu.launch(launch("faulty", 0, &[])).unwrap();
    let error = gpu.synchronize().unwrap_err().to_string();
    assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED") && error.contains("launched last: faulty"), "{error}");
}

#[test]
fn kernels_are_compiled_for_the_device() {
    let Some(search_path) = fake() else { return };
    let nvrtc = Nvrtc::open(13, search_path).unwrap();
    let module = launch("any", 0, &[]).module;
    let cubin = String::from_utf8(cubin(&nvrtc, &nvrtc.architecture((9, 0)).unwrap(), module).unwrap()).unwrap();
    for part in ["of residual.cu", "--gpu-architecture=sm_90a", "-DELEMENT_BF16", "-DSIZE=7"] {
        assert!(cubin.contains(part), "{part} in {cubin}");
    }
}

#[test]
fn a_gpu_that_is_not_there_is_an_error() {
    let Some(search_path) = fake() else { return };
    let error = Cuda::new(5, search_path).err().unwrap().to_string();
    assert_eq!(error, "no GPU that can be used: number 5 of 1, counted from 0");
}

/// A matrix as it lies in memory, at the end of the columns of a wider tensor.
struct Operand {
    tensor: Tensor,
    margin: usize,
    transposed: bool,
    numbers: Vec<f32>,
    cols: usize,
}

impl Operand {
    fn new(device: &Device, dtype: DType, [rows, cols]: [usize; 2], transposed: bool, margin: usize) -> Self {
        let numbers = numbers(rows * cols, rows + cols);
        let (lying_rows, lying_cols) = if transposed { (cols, rows) } else { (rows, cols) };
        let width = lying_cols + margin;
        let mut lying = vec![f32::NAN; lying_rows * width];
        for (index, number) in numbers.iter().enumerate() {
            let (row, col) = (index / cols, index % cols);
            let (row, col) = if transposed { (col, row) } else { (row, col) };
            lying[row * width + margin + col] = *number;
        }
        let tensor = upload(device, dtype, &lying, lying_rows, width);
        Operand { tensor, margin, transposed, numbers, cols }
    }

    fn view(&self) -> View<'_> {
        self.tensor.view().columns(self.margin..self.tensor.cols())
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        self.numbers[row * self.cols + col]
    }
}

fn upload(device: &Device, dtype: DType, values: &[f32], rows: usize, cols: usize) -> Tensor {
    match dtype {
        DType::F32 => device.upload(values, rows, cols).unwrap(),
        _ => {
            let narrow: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            device.upload(&narrow, rows, cols).unwrap()
        }
    }
}

fn download(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype() {
        DType::F32 => tensor.download::<f32>().unwrap(),
        _ => tensor.download::<bf16>().unwrap().into_iter().map(Float::to_f32).collect(),
    }
}

/// Multiplies on the made-up device and by hand; operands have gaps of `margin` between their rows.
fn check_product(gpu: &Gpu, [m, n, k]: [usize; 3], types: (DType, DType), transposed: (bool, bool), margin: usize) {
    let device = Device::Gpu(gpu.clone());
    let a = Operand::new(&device, types.0, [m, k], transposed.0, margin);
    let b = Operand::new(&device, types.0, [k, n], transposed.1, margin);
    for accumulate in [false, true] {
        let old = numbers(m * (n + margin), 3);
        let mut c = upload(&device, types.1, &old, m, n + margin);
        let (_, c_view): (ViewMut, ViewMut) = c.view_mut().split_columns(margin);
        let (a_transposed, b_transposed) = (a.transposed, b.transposed);
        let product =
            Product { a: a.view(), a_transposed, b: b.view(), b_transposed, c: c_view, alpha: 0.5, accumulate };
        gpu.gemm(product).unwrap();
        let expected = old.iter().enumerate().map(|(index, old)| {
            let (row, col) = (index / (n + margin), index % (n + margin));
            let Some(col) = col.checked_sub(margin) else { return *old };
            let sum: f32 = (0..k).map(|depth| a.at(row, depth) * b.at(depth, col)).sum();
            let value = 0.5 * sum + if accumulate { *old } else { 0.0 };
            if types.1 == DType::F32 { value } else { bf16::from_f32(value).to_f32() }
        });
        let expected: Vec<f32> = expected.collect();
        assert!(download(&c) == expected, "{m} {n} {k} {types:?} {transposed:?} {margin} {accumulate}");
    }
}

#[test]
fn sums_over_ranks_come_after_what_was_launched_and_before_what_follows() {
    let (Some(gpu), Some(search_path)) = (open(), fake()) else { return };
    let nccl = Nccl::load(&Wanted::nccl(13), search_path).unwrap();
    let place = Place { id: nccl.unique_id().unwrap(), rank: 0, world_size: 1 };
    let limits = WaitLimits { meeting: Duration::from_secs(60), sum: Duration::from_secs(60) };
    let patience = Patience { limits, is_void: Arc::new(|| false) };
    let mut communicator = Communicator::join(&gpu, nccl, place, patience).unwrap();
    let mut tensor = Device::Gpu(gpu).zeros(DType::F32, 1, 300).unwrap();
    for seed in 0..10 {
        for part in [2, 1, 0] {
            let mut range = tensor.view_mut().reshape(part * 100, 1, 100);
            range.reborrow().write(&numbers(100, seed + part)).unwrap();
            // SAFETY: nobody looks at this part before `wait`.
            unsafe { communicator.all_reduce(range) };
        }
        communicator.wait().unwrap();
        let doubled = (0..3).flat_map(|part| numbers(100, seed + part)).map(|number| 2.0 * number);
        assert_eq!(tensor.download::<f32>().unwrap(), doubled.collect::<Vec<f32>>());
    }
}

/// In one test, because the made-up library counts how often it is asked.
#[test]
fn products_of_rows_are_products_of_columns_and_share_algorithms() {
    let (Some(gpu), Some(search_path)) = (open(), fake()) else { return };
    let library = Shared::open(&Wanted::cublaslt(13), search_path).unwrap();
    // SAFETY: the type of fake_cuda/cublaslt.c.
    let calls: unsafe extern "C" fn() -> u64 = unsafe { library.function("fake_heuristic_calls") }.unwrap();
    // SAFETY: it has no requirements.
    let calls = || unsafe { calls() };

    use DType::{Bf16, F32};
    for types in [(F32, F32), (Bf16, F32), (Bf16, Bf16)] {
        for transposed in [(false, false), (false, true), (true, false), (true, true)] {
            for margin in [0, 1, 8] {
                check_product(&gpu, [5, 7, 3], types, transposed, margin);
                check_product(&gpu, [33, 16, 24], types, transposed, margin);
            }
        }
    }
    // Nothing to add up.
    check_product(&gpu, [3, 4, 0], (F32, F32), (false, false), 2);
    check_product(&gpu, [0, 4, 2], (F32, F32), (false, false), 2);

    // Batches of nearly the same size ask once: with `accumulate` and without.
    let before = calls();
    for tokens in 250..=256 {
        check_product(&gpu, [tokens, 16, 8], (F32, F32), (false, true), 0);
    }
    assert_eq!(calls() - before, 2);
    // Where the shared algorithm does not serve, a shape has its own, and that is kept too.
    let before = calls();
    for _ in 0..3 {
        check_product(&gpu, [8, 16, 77], (F32, F32), (false, true), 0);
    }
    assert_eq!(calls() - before, 4);
    // Another arithmetic is another plan.
    gpu.set_tf32(true);
    let before = calls();
    check_product(&gpu, [256, 16, 8], (F32, F32), (false, true), 0);
    assert_eq!(calls() - before, 2);
}
