// cuBLASLt that is made up: libcublasLt.so.13 for tests on machines without a GPU. It multiplies as the documentation says,
// in column-major order, slowly, in the order of the made-up stream. An algorithm remembers what it was chosen for, and
// does not serve matrices that are aligned less; none serves a depth of 77 but the one chosen for it.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_FAST_TF32 = 77, TRANSA = 3, TRANSB = 4 };

typedef struct Stream {
    int (*enqueue)(struct Stream*, int (*run)(void*), const void* data, size_t bytes);
} Stream;
typedef struct Layout { int type; uint64_t rows, cols; int64_t stride; } Layout;
typedef struct Descriptor { int compute, transposed[2]; } Descriptor;
typedef struct Preference { uint64_t workspace_bytes; uint32_t reduction, alignment[4]; } Preference;
typedef struct Algorithm { uint64_t depth; uint32_t alignment[3]; uint32_t compute; uint64_t rest[4]; } Algorithm;
typedef struct Candidate { Algorithm algorithm; size_t workspace_bytes; int status; float waves; int reserved[4]; } Candidate;

static uint64_t heuristic_calls;
uint64_t fake_heuristic_calls(void) { return __atomic_load_n(&heuristic_calls, __ATOMIC_SEQ_CST); }

size_t cublasLtGetVersion(void) { return 130000; }
const char* cublasLtGetStatusString(int status) { return status == NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "made up"; }
int cublasLtCreate(void** handle) { *handle = malloc(1); return SUCCESS; }
int cublasLtDestroy(void* handle) { free(handle); return SUCCESS; }
int cublasLtMatmulDescCreate(Descriptor** descriptor, int compute, int scale) {
    if (scale != R_32F) return INVALID_VALUE;
    *descriptor = malloc(sizeof(Descriptor));
    **descriptor = (Descriptor){compute, {0, 0}};
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(Descriptor* descriptor) { free(descriptor); return SUCCESS; }
int cublasLtMatmulDescSetAttribute(Descriptor* descriptor, int attribute, const void* value, size_t bytes) {
    if (bytes != 4 || (attribute != TRANSA && attribute != TRANSB)) return INVALID_VALUE;
    memcpy(&descriptor->transposed[attribute - TRANSA], value, 4);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    if (stride < (int64_t)rows || !rows || !cols) return INVALID_VALUE;
    *layout = malloc(sizeof(Layout));
    **layout = (Layout){type, rows, cols, stride};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { free(layout); return SUCCESS; }
int cublasLtMatmulPreferenceCreate(Preference** preference) { *preference = calloc(1, sizeof(Preference)); return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(Preference* preference) { free(preference); return SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (attribute == 1 && bytes == 8) memcpy(&preference->workspace_bytes, value, 8);
    else if (attribute == 3 && bytes == 4) memcpy(&preference->reduction, value, 4);
    else if (attribute >= 5 && attribute <= 8 && bytes == 4) memcpy(&preference->alignment[attribute - 5], value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}

static size_t bytes_of(int type) { return type == R_32F ? 4 : 2; }
static uint64_t depth_of(const Descriptor* product, const Layout* a) { return product->transposed[0] ? a->rows : a->cols; }

static int fits(const Descriptor* product, const Layout* a, const Layout* b, const Layout* d) {
    uint64_t m = product->transposed[0] ? a->cols : a->rows, k = depth_of(product, a);
    uint64_t n = product->transposed[1] ? b->rows : b->cols, inner = product->transposed[1] ? b->cols : b->rows;
    int types = a->type == b->type && (d->type == a->type || d->type == R_32F);
    int compute = product->compute == COMPUTE_32F || (product->compute == COMPUTE_FAST_TF32 && a->type == R_32F);
    return types && compute && m == d->rows && n == d->cols && k == inner;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, Descriptor* product, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int wanted, Candidate* results, int* found) {
    __atomic_add_fetch(&heuristic_calls, 1, __ATOMIC_SEQ_CST);
    *found = 0;
    if (!fits(product, a, b, d)) return NOT_SUPPORTED;
    if (wanted < 1 || preference->workspace_bytes != 32 << 20) return INVALID_VALUE;
    uint32_t reduction = d->type == R_32F ? 7 : 2;
    if (preference->reduction != reduction || preference->alignment[2] != preference->alignment[3]) return INVALID_VALUE;
    memset(results, 0, sizeof *results);
    results->algorithm.depth = depth_of(product, a);
    results->algorithm.compute = product->compute;
    memcpy(results->algorithm.alignment, preference->alignment, 12);
    *found = 1;
    return SUCCESS;
}

static int serves(const Algorithm* algorithm, const Descriptor* product, const Layout* layouts[3]) {
    uint64_t depth = depth_of(product, layouts[0]);
    if (!fits(product, layouts[0], layouts[1], layouts[2]) || (int)algorithm->compute != product->compute) return 0;
    for (int i = 0; i < 3; i++) {
        if (layouts[i]->stride * bytes_of(layouts[i]->type) % algorithm->alignment[i]) return 0;
    }
    return depth != 77 || algorithm->depth == 77;
}

int cublasLtMatmulAlgoCheck(void* handle, Descriptor* product, Layout* a, Layout* b, Layout* c, Layout* d,
                            const Algorithm* algorithm, Candidate* result) {
    const Layout* layouts[3] = {a, b, d};
    if (!serves(algorithm, product, layouts)) return NOT_SUPPORTED;
    memset(result, 0, sizeof *result);
    result->algorithm = *algorithm;
    return SUCCESS;
}

static float read_number(const char* address, int type) {
    uint32_t bits;
    if (type == R_32F) memcpy(&bits, address, 4);
    else bits = (uint32_t)(*(const uint16_t*)address) << 16; // bf16; no test multiplies f16 here
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void write_number(char* address, int type, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (type == R_32F) memcpy(address, &bits, 4);
    else *(uint16_t*)address = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

typedef struct Work {
    Descriptor product;
    Layout a, b, d;
    const char *a_address, *b_address;
    char* d_address;
    float alpha, beta;
} Work;

static float operand(const char* address, const Layout* layout, int transposed, uint64_t row, uint64_t col) {
    uint64_t at = transposed ? col + row * layout->stride : row + col * layout->stride;
    return read_number(address + at * bytes_of(layout->type), layout->type);
}

static int multiply(void* data) {
    Work* work = data;
    uint64_t depth = depth_of(&work->product, &work->a);
    for (uint64_t col = 0; col < work->d.cols; col++) {
        for (uint64_t row = 0; row < work->d.rows; row++) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; k++) {
                sum += operand(work->a_address, &work->a, work->product.transposed[0], row, k)
                     * operand(work->b_address, &work->b, work->product.transposed[1], k, col);
            }
            char* to = work->d_address + (row + col * work->d.stride) * bytes_of(work->d.type);
            float old = work->beta ? work->beta * read_number(to, work->d.type) : 0;
            write_number(to, work->d.type, work->alpha * sum + old);
        }
    }
    return SUCCESS;
}

int cublasLtMatmul(void* handle, Descriptor* product, const float* alpha, const char* a_address, Layout* a,
                   const char* b_address, Layout* b, const float* beta, const char* c_address, Layout* c, char* d_address,
                   Layout* d, const Algorithm* algorithm, void* workspace, size_t workspace_bytes, Stream* stream) {
    const Layout* layouts[3] = {a, b, d};
    const char* addresses[3] = {a_address, b_address, d_address};
    if (!serves(algorithm, product, layouts) || c_address != d_address || workspace_bytes != 32 << 20) return INVALID_VALUE;
    for (int i = 0; i < 3; i++) {
        if ((uintptr_t)addresses[i] % algorithm->alignment[i]) return INVALID_VALUE;
    }
    Work work = {*product, *a, *b, *d, a_address, b_address, d_address, *alpha, *beta};
    return stream->enqueue(stream, multiply, &work, sizeof work);
}
