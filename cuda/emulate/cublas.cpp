/* cublas.cpp: what stands in for cuBLAS where there is no GPU: found by dlopen like the true one,
 * in the backend's own library.
 *
 * A product is asked of the handle's stream and done when its turn comes. It must lie in arrays of
 * the device, its workspace too, which is full of NaN after it. In the mode of TF32 it rounds its
 * inputs to the nearest (the true one may cut the bits off). Without a workspace, or in a
 * capture that its kernel was not loaded before, the true one may allocate: that fails here.
 */
#include "cuda_runtime.h"

#include <cmath>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace
{

enum Mode { DEFAULT_MATH = 0, TF32_TENSOR_OP_MATH = 3 };
enum Status { FINE = 0, ALLOC_FAILED = 3, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };
constexpr int VERSION[] = {0, 0, 1};

struct Handle {
    cudaStream_t stream = (cudaStream_t)1; /* the one that all have who name none */
    void *workspace = nullptr;
    size_t bytes = 0;
    int mode = DEFAULT_MATH;
};

/* as the handle's mode has it: 10 of 23 bits of mantissa */
float input(const Handle &handle, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~UINT32_C(0x1fff);
    if (handle.mode == TF32_TENSOR_OP_MATH && std::isfinite(x)) {
        memcpy(&x, &bits, sizeof x);
    }
    return x;
}

/* numbers of a matrix whose columns are ld apart */
size_t span(int rows, int columns, int ld)
{
    return sizeof(float) * ((size_t)(columns - 1) * (size_t)ld + (size_t)rows);
}

/* which shapes the process has had: their kernels are loaded */
bool is_new(int m, int n, int k)
{
    static std::mutex mutex;
    static std::set<std::tuple<int, int, int>> known;
    std::lock_guard<std::mutex> lock(mutex);
    return known.insert({m, n, k}).second;
}

} // namespace

EXPORTED int cublasCreate_v2(Handle **out);
EXPORTED int cublasDestroy_v2(Handle *handle);
EXPORTED int cublasSetStream_v2(Handle *handle, cudaStream_t stream);
EXPORTED int cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t bytes);
EXPORTED int cublasSetMathMode(Handle *handle, int mode);
EXPORTED int cublasGetProperty(int which, int *out);
EXPORTED const char *cublasGetStatusString(int status);
EXPORTED int cublasSgemm_v2(Handle *handle, int turn_a, int turn_b, int m, int n, int k,
                            const float *alpha, const float *a, int lda, const float *b, int ldb,
                            const float *beta, float *c, int ldc);

int cublasCreate_v2(Handle **out)
{
    *out = new Handle();
    return FINE;
}

int cublasDestroy_v2(Handle *handle)
{
    delete handle;
    return FINE;
}

int cublasSetStream_v2(Handle *handle, cudaStream_t stream)
{
    int mode = handle->mode;
    *handle = {};
    handle->stream = stream;
    handle->mode = mode;
    return FINE;
}

int cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t bytes)
{
    handle->workspace = workspace;
    handle->bytes = bytes;
    return emulate::holds(workspace, bytes) ? FINE : INVALID_VALUE;
}

int cublasSetMathMode(Handle *handle, int mode)
{
    handle->mode = mode;
    return mode == DEFAULT_MATH || mode == TF32_TENSOR_OP_MATH ? FINE : INVALID_VALUE;
}

int cublasGetProperty(int which, int *out)
{
    *out = VERSION[which];
    return FINE;
}

const char *cublasGetStatusString(int status)
{
    return status == ALLOC_FAILED       ? "CUBLAS_STATUS_ALLOC_FAILED"
           : status == INVALID_VALUE    ? "CUBLAS_STATUS_INVALID_VALUE"
           : status == EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
                                        : "CUBLAS_STATUS_SUCCESS";
}

int cublasSgemm_v2(Handle *handle, int turn_a, int turn_b, int m, int n, int k, const float *alpha,
                   const float *a, int lda, const float *b, int ldb, const float *beta, float *c,
                   int ldc)
{
    int rows_a = turn_a ? k : m, columns_a = turn_a ? m : k;
    int rows_b = turn_b ? n : k, columns_b = turn_b ? k : n;
    float scale = *alpha, keep = *beta;
    if (m < 1 || n < 1 || k < 1 || lda < rows_a || ldb < rows_b || ldc < m) {
        return INVALID_VALUE;
    }
    if (!emulate::holds(a, span(rows_a, columns_a, lda)) ||
        !emulate::holds(b, span(rows_b, columns_b, ldb)) || !emulate::holds(c, span(m, n, ldc))) {
        return EXECUTION_FAILED;
    }
    if (!handle->workspace) {
        return ALLOC_FAILED;
    }
    if (is_new(m, n, k) && emulate::spoil_capture(handle->stream)) {
        return EXECUTION_FAILED;
    }
    Handle with = *handle;
    emulate::ask(handle->stream, [=]() -> const char * {
        memset(with.workspace, 0xff, with.bytes); /* used while the inputs are read, and after */
        for (int j = 0; j < n; j++) {
            std::vector<float> column((size_t)m, 0);
            for (int l = 0; l < k; l++) {
                float x = input(with, b[turn_b ? (size_t)l * (size_t)ldb + (size_t)j
                                               : (size_t)j * (size_t)ldb + (size_t)l]);
                for (int i = 0; i < m; i++) {
                    float w = a[turn_a ? (size_t)i * (size_t)lda + (size_t)l
                                       : (size_t)l * (size_t)lda + (size_t)i];
                    column[(size_t)i] += x * input(with, w);
                }
            }
            float *to = c + (size_t)j * (size_t)ldc;
            for (int i = 0; i < m; i++) {
                to[i] = scale * column[(size_t)i] + (keep != 0 ? keep * to[i] : 0);
            }
        }
        memset(with.workspace, 0xff, with.bytes);
        return nullptr;
    });
    return FINE;
}
