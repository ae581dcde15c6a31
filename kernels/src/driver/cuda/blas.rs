//! Matrix products by cuBLASLt.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys::{
    cublasComputeType_t as ComputeType, cublasLtMatmulAlgo_t as Algorithm,
    cublasLtMatmulDescAttributes_t as ProductAttribute, cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute,
    cublasLtReductionScheme_t as ReductionScheme, cudaDataType_t as DataType,
};
use cudarc::driver::sys::CUstream;

use super::plan::{Matrix, PlanKey, Problem};
use crate::driver::libraries::{Shared, Wanted, functions};
use crate::{DType, Error, Result, SearchPath};

/// The library's handle, and what it describes products with.
type Handle = *mut c_void;
type Descriptor = *mut c_void;

// Status is an integer and no enum: a newer library may answer what this program has never heard of.
functions!(Functions {
    fn cublasLtGetVersion() -> usize;
    fn cublasLtGetStatusString(status: c_int) -> *const c_char;
    fn cublasLtCreate(handle: *mut Handle) -> c_int;
    fn cublasLtDestroy(handle: Handle) -> c_int;
    fn cublasLtMatmulDescCreate(descriptor: *mut Descriptor, compute: ComputeType, scale: DataType) -> c_int;
    fn cublasLtMatmulDescDestroy(descriptor: Descriptor) -> c_int;
    fn cublasLtMatmulDescSetAttribute(
        descriptor: Descriptor, attribute: ProductAttribute, value: *const c_void, bytes: usize,
    ) -> c_int;
    fn cublasLtMatrixLayoutCreate(layout: *mut Descriptor, dtype: DataType, rows: u64, cols: u64, stride: i64) -> c_int;
    fn cublasLtMatrixLayoutDestroy(layout: Descriptor) -> c_int;
    fn cublasLtMatmulPreferenceCreate(preference: *mut Descriptor) -> c_int;
    fn cublasLtMatmulPreferenceDestroy(preference: Descriptor) -> c_int;
    fn cublasLtMatmulPreferenceSetAttribute(
        preference: Descriptor, attribute: PreferenceAttribute, value: *const c_void, bytes: usize,
    ) -> c_int;
    fn cublasLtMatmulAlgoGetHeuristic(
        handle: Handle, product: Descriptor, a: Descriptor, b: Descriptor, c: Descriptor, d: Descriptor,
        preference: Descriptor, wanted: c_int, results: *mut Candidate, found: *mut c_int,
    ) -> c_int;
    fn cublasLtMatmulAlgoCheck(
        handle: Handle, product: Descriptor, a: Descriptor, b: Descriptor, c: Descriptor, d: Descriptor,
        algorithm: *const Algorithm, result: *mut Candidate,
    ) -> c_int;
    fn cublasLtMatmul(
        handle: Handle, product: Descriptor, alpha: *const c_void,
        a_address: *const c_void, a: Descriptor, b_address: *const c_void, b: Descriptor, beta: *const c_void,
        c_address: *const c_void, c: Descriptor, d_address: *mut c_void, d: Descriptor,
        algorithm: *const Algorithm, workspace: *mut c_void, workspace_bytes: usize, stream: CUstream,
    ) -> c_int;
});

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const AS_IT_LIES: c_int = 0;
const TRANSPOSED: c_int = 1;

const SUCCESS: c_int = 0;
const NOT_SUPPORTED: c_int = 15;

/// `cublasLtMatmulHeuristicResult_t`, with the status as an integer.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Candidate {
    algorithm: Algorithm,
    workspace_bytes: usize,
    status: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// What NVIDIA advises for Hopper.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;
const CANDIDATES: usize = 4;
/// Shapes that could not share an algorithm; they are few, and forgotten when they are not.
const EXACT_MAX: usize = 4096;

/// cuBLASLt on one device, with the algorithms that it was asked for.
pub(crate) struct Blas {
    functions: Functions,
    handle: Handle,
    /// On the device, [`WORKSPACE_BYTES`] of it.
    workspace: usize,
    chosen: Mutex<HashMap<PlanKey, Option<Algorithm>>>,
    exact: Mutex<HashMap<ExactKey, Algorithm>>,
}

/// A shape by itself: its key, sizes, and strides of `a`, `b`, `d`.
type ExactKey = (PlanKey, [u64; 3], [u64; 3]);

// SAFETY: cuBLASLt's functions may be called from several threads with one handle; products are in order of the stream,
// so that they share the workspace in turn.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    /// The newest that a driver of this major version can use. The device's context must be current; `workspace` is of
    /// its memory.
    pub(crate) fn open(driver_major: u32, search_path: &SearchPath, workspace: usize) -> Result<Self> {
        let (_, functions) = load(driver_major, search_path)?;
        let mut handle = ptr::null_mut();
        // SAFETY: the handle outlives the call.
        let status = unsafe { (functions.cublasLtCreate)(&mut handle) };
        let (chosen, exact) = Default::default();
        let blas = Blas { functions, handle, workspace, chosen, exact };
        blas.check("cublasLtCreate", status)?;
        Ok(blas)
    }

    /// Enqueues a product that is not empty.
    pub(crate) fn multiply(&self, problem: &Problem, stream: CUstream) -> Result<()> {
        let description = self.describe(problem)?;
        let algorithm = self.algorithm(problem, &description)?;
        let beta = if problem.accumulate { 1.0_f32 } else { 0.0 };
        let d = problem.d.address as *mut c_void;
        let [a_layout, b_layout, d_layout] = description.layouts;
        // SAFETY: the descriptors are of these matrices, which live on the device until the stream is done with them
        // (blocks are only reused in the stream's order); the algorithm was checked for them, and fits the workspace.
        let status = unsafe {
            (self.functions.cublasLtMatmul)(
                self.handle,
                description.product,
                (&raw const problem.alpha).cast(),
                problem.a.address as *const c_void,
                a_layout,
                problem.b.address as *const c_void,
                b_layout,
                (&raw const beta).cast(),
                d,
                d_layout,
                d,
                d_layout,
                &algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream,
            )
        };
        self.check_product(problem, status)
    }

    /// The algorithm of the problem's key where it serves this very shape, else one for this shape alone.
    fn algorithm(&self, problem: &Problem, description: &Description) -> Result<Algorithm> {
        let key = problem.key();
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match chosen.get(&key) {
            Some(shared) => *shared,
            None => {
                let representative = key.representative();
                let shared = self.ask(&representative, &self.describe(&representative)?).ok();
                chosen.insert(key, shared);
                shared
            }
        };
        drop(chosen);
        if let Some(algorithm) = shared.filter(|algorithm| self.serves(algorithm, description)) {
            return Ok(algorithm);
        }
        let strides = [problem.a, problem.b, problem.d].map(|matrix| matrix.stride);
        let exact_key = (key, problem.sizes(), strides);
        let mut exact = self.exact.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algorithm) = exact.get(&exact_key) {
            return Ok(*algorithm);
        }
        let algorithm = self.ask(problem, description)?;
        if exact.len() == EXACT_MAX {
            exact.clear();
        }
        exact.insert(exact_key, algorithm);
        Ok(algorithm)
    }

    /// Whether an algorithm can compute what is described.
    fn serves(&self, algorithm: &Algorithm, description: &Description) -> bool {
        let [a, b, d] = description.layouts;
        let mut result = MaybeUninit::<Candidate>::uninit();
        // SAFETY: the descriptors are alive; the result outlives the call and is read only after a success.
        unsafe {
            let check = self.functions.cublasLtMatmulAlgoCheck;
            check(self.handle, description.product, a, b, d, d, algorithm, result.as_mut_ptr()) == SUCCESS
                && result.assume_init().workspace_bytes <= WORKSPACE_BYTES
        }
    }

    /// Asks the heuristic.
    fn ask(&self, problem: &Problem, description: &Description) -> Result<Algorithm> {
        let preference = self.preference(problem)?;
        let [a, b, d] = description.layouts;
        let mut candidates = [MaybeUninit::<Candidate>::uninit(); CANDIDATES];
        let mut found = 0;
        // SAFETY: the descriptors are alive; the library fills as many candidates as it says, at most CANDIDATES.
        let status = unsafe {
            (self.functions.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                description.product,
                a,
                b,
                d,
                d,
                preference.descriptor,
                CANDIDATES as c_int,
                candidates.as_mut_ptr().cast(),
                &mut found,
            )
        };
        self.check_product(problem, status)?;
        // SAFETY: these are the candidates that were filled.
        let mut candidates = candidates.iter().take(found.max(0) as usize).map(|slot| unsafe { slot.assume_init() });
        let fit = candidates.find(|found| found.status == SUCCESS && found.workspace_bytes <= WORKSPACE_BYTES);
        match fit {
            Some(candidate) => Ok(candidate.algorithm),
            None => Err(self.product_error(problem, NOT_SUPPORTED)),
        }
    }

    fn describe(&self, problem: &Problem) -> Result<Description<'_>> {
        let compute =
            if problem.tf32 { ComputeType::CUBLAS_COMPUTE_32F_FAST_TF32 } else { ComputeType::CUBLAS_COMPUTE_32F };
        let functions = &self.functions;
        let mut description = Description { functions, product: ptr::null_mut(), layouts: [ptr::null_mut(); 3] };
        // SAFETY: the descriptor outlives the call.
        let status =
            unsafe { (functions.cublasLtMatmulDescCreate)(&mut description.product, compute, DataType::CUDA_R_32F) };
        self.check("cublasLtMatmulDescCreate", status)?;
        let sides = [ProductAttribute::CUBLASLT_MATMUL_DESC_TRANSA, ProductAttribute::CUBLASLT_MATMUL_DESC_TRANSB];
        for (attribute, matrix) in sides.into_iter().zip([problem.a, problem.b]) {
            let operation = if matrix.transposed { TRANSPOSED } else { AS_IT_LIES };
            let set = functions.cublasLtMatmulDescSetAttribute;
            // SAFETY: the attribute is an integer of 32 bits, and is copied.
            let status =
                unsafe { set(description.product, attribute, (&raw const operation).cast(), size_of::<c_int>()) };
            self.check("cublasLtMatmulDescSetAttribute", status)?;
        }
        for (layout, matrix) in description.layouts.iter_mut().zip([problem.a, problem.b, problem.d]) {
            let Matrix { rows, cols, stride, .. } = matrix;
            let create = functions.cublasLtMatrixLayoutCreate;
            // SAFETY: the layout outlives the call.
            let status = unsafe { create(layout, data_type(matrix.dtype), rows, cols, stride as i64) };
            self.check("cublasLtMatrixLayoutCreate", status)?;
        }
        Ok(description)
    }

    fn preference(&self, problem: &Problem) -> Result<Preference<'_>> {
        let mut preference = Preference { functions: &self.functions, descriptor: ptr::null_mut() };
        // SAFETY: the descriptor outlives the call.
        let status = unsafe { (self.functions.cublasLtMatmulPreferenceCreate)(&mut preference.descriptor) };
        self.check("cublasLtMatmulPreferenceCreate", status)?;
        // Partial sums of a split depth are kept in f32, so that a result of 16 bits is rounded once.
        let reduction = match problem.d.dtype {
            DType::F32 => ReductionScheme::CUBLASLT_REDUCTION_SCHEME_MASK,
            _ => ReductionScheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
        };
        use PreferenceAttribute as Attribute;
        self.prefer(&preference, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES as u64)?;
        self.prefer(&preference, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction as u32)?;
        let alignments = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, problem.a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, problem.b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, problem.d),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, problem.d),
        ];
        for (attribute, matrix) in alignments {
            self.prefer(&preference, attribute, matrix.alignment())?;
        }
        Ok(preference)
    }

    /// Sets an attribute, which must be of type `T`.
    fn prefer<T>(&self, preference: &Preference, attribute: PreferenceAttribute, value: T) -> Result<()> {
        let set = self.functions.cublasLtMatmulPreferenceSetAttribute;
        // SAFETY: the library compares the size with the attribute's, and copies the value.
        let status = unsafe { set(preference.descriptor, attribute, (&raw const value).cast(), size_of::<T>()) };
        self.check("cublasLtMatmulPreferenceSetAttribute", status)
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        Err(Error::Cuda { action: call.to_string(), reason: self.explain(status) })
    }

    fn check_product(&self, problem: &Problem, status: c_int) -> Result<()> {
        if status == SUCCESS { Ok(()) } else { Err(self.product_error(problem, status)) }
    }

    /// In the order and the words of whoever asked for the product.
    fn product_error(&self, problem: &Problem, status: c_int) -> Error {
        let [n, m, k] = problem.sizes();
        let (input, output) = (problem.a.dtype, problem.d.dtype);
        let action = format!("the product [{m}, {k}] x [{k}, {n}] of {input:?} as {output:?}");
        Error::Cuda { action, reason: self.explain(status) }
    }

    fn explain(&self, status: c_int) -> String {
        // SAFETY: the library answers every number with a string of its own that is never freed.
        let text = unsafe { CStr::from_ptr((self.functions.cublasLtGetStatusString)(status)) };
        format!("cuBLASLt says {} ({status})", text.to_string_lossy())
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: created by `cublasLtCreate`, and destroyed only here.
            unsafe { (self.functions.cublasLtDestroy)(self.handle) };
        }
    }
}

/// The library and its version, for those who only ask.
pub(crate) fn version(driver_major: u32, search_path: &SearchPath) -> Result<(&'static Shared, String)> {
    let (library, functions) = load(driver_major, search_path)?;
    // SAFETY: has no requirements.
    let version = unsafe { (functions.cublasLtGetVersion)() };
    // 13.1.0 is 130100, as 12.9.1 is 120901.
    Ok((library, format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)))
}

fn load(driver_major: u32, search_path: &SearchPath) -> Result<(&'static Shared, Functions)> {
    let library = Shared::open(&Wanted::cublaslt(driver_major), search_path)?;
    Ok((library, Functions::load(library)?))
}

/// Descriptors of a product and its matrices.
struct Description<'a> {
    functions: &'a Functions,
    product: Descriptor,
    /// Of `a`, `b`, `d`.
    layouts: [Descriptor; 3],
}

impl Drop for Description<'_> {
    fn drop(&mut self) {
        // SAFETY: each was created by the library, or is null and skipped, and is destroyed only here.
        unsafe {
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                (self.functions.cublasLtMatrixLayoutDestroy)(layout);
            }
            if !self.product.is_null() {
                (self.functions.cublasLtMatmulDescDestroy)(self.product);
            }
        }
    }
}

struct Preference<'a> {
    functions: &'a Functions,
    descriptor: Descriptor,
}

impl Drop for Preference<'_> {
    fn drop(&mut self) {
        if !self.descriptor.is_null() {
            // SAFETY: created by the library, and destroyed only here.
            unsafe { (self.functions.cublasLtMatmulPreferenceDestroy)(self.descriptor) };
        }
    }
}

fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::F32 => DataType::CUDA_R_32F,
        DType::Bf16 => DataType::CUDA_R_16BF,
        DType::F16 => DataType::CUDA_R_16F,
        DType::U32 => panic!("a product of u32"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::libraries::NEWEST_MAJOR;

    /// The library, without a GPU: it can describe, but neither choose nor multiply.
    fn blas() -> Option<Blas> {
        match load(NEWEST_MAJOR, &SearchPath::default()) {
            Ok((_, functions)) => {
                let (chosen, exact) = Default::default();
                Some(Blas { functions, handle: ptr::null_mut(), workspace: 0, chosen, exact })
            }
            Err(error) => {
                eprintln!("SKIPPED: no product is described to cuBLASLt, because {error}");
                None
            }
        }
    }

    /// Every attribute has the size that the library expects, and every layout is one that it accepts.
    #[test]
    fn products_can_be_described() {
        let Some(blas) = blas() else { return };
        let types = [(DType::F32, DType::F32), (DType::Bf16, DType::F32), (DType::F16, DType::F16)];
        for ((input, output), transposed) in
            types.into_iter().flat_map(|types| [[false, true], [true, false]].map(|sides| (types, sides)))
        {
            let key = PlanKey {
                sizes: [768, 4096, 64],
                transposed,
                input,
                output,
                alignment: [16, 8, 16],
                accumulate: true,
                tf32: input == DType::F32,
            };
            let problem = key.representative();
            blas.describe(&problem).unwrap();
            blas.preference(&problem).unwrap();
        }
    }

    #[test]
    fn a_refusal_names_the_product_as_it_was_asked_for() {
        let Some(blas) = blas() else { return };
        let key = PlanKey {
            sizes: [2, 3, 4],
            transposed: [false; 2],
            input: DType::Bf16,
            output: DType::F32,
            alignment: [16; 3],
            accumulate: false,
            tf32: false,
        };
        let problem = key.representative();
        let error = blas.ask(&problem, &blas.describe(&problem).unwrap()).unwrap_err().to_string();
        assert!(
            error.contains("the product [3, 4] x [4, 2] of Bf16 as F32") && error.contains("cuBLASLt says"),
            "{error}"
        );
    }
}
