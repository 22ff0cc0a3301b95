/* blas.cu: blas.h. NVIDIA's headers are not needed: these few functions have been as they are since
 * CUDA 11, and the stand-in for tests (emulate/cublas.cpp) has them, too.
 */
#include "blas.h"
#include "stream.cuh"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

namespace
{

typedef void *Handle;

struct Library {
    int (*create)(Handle *);
    int (*destroy)(Handle);
    int (*set_stream)(Handle, cudaStream_t);
    int (*set_workspace)(Handle, void *, size_t);
    int (*set_math)(Handle, int);
    int (*property)(int, int *);
    const char *(*words)(int);
    int (*multiply)(Handle, int, int, int, int, int, const float *, const float *, int,
                    const float *, int, const float *, float *, int);
    char version[48];
};
Library library;
bool is_loaded;

const char *say(const char *format, const char *a, const char *b)
{
    static char text[512];
    snprintf(text, sizeof text, format, a, b);
    return text;
}

} // namespace

struct tsad_blas {
    Handle handle;
    tsad_blas_room room;
};

const char *tsad_blas_load(const char *path)
{
    Library found = {};
    const struct {
        const char *name;
        void *function;
    } wanted[] = {
        {"cublasCreate_v2", &found.create},        {"cublasDestroy_v2", &found.destroy},
        {"cublasSetStream_v2", &found.set_stream}, {"cublasSetWorkspace_v2", &found.set_workspace},
        {"cublasSetMathMode", &found.set_math},    {"cublasGetProperty", &found.property},
        {"cublasGetStatusString", &found.words},   {"cublasSgemm_v2", &found.multiply},
    };
    void *opened = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* never closed: streams may have it */
    if (!opened) {
        return say("%s%s", dlerror(), "");
    }
    for (const auto &one : wanted) {
        void *symbol = dlsym(opened, one.name);
        if (!symbol) {
            return say("%s has no %s", path, one.name);
        }
        memcpy(one.function, &symbol, sizeof symbol);
    }
    int parts[3] = {0, 0, 0};
    for (int i = 0; i < 3; i++) {
        if (found.property(i, &parts[i]) != 0) {
            return say("%s does not say its version%s", path, "");
        }
    }
    snprintf(found.version, sizeof found.version, "%d.%d.%d", parts[0], parts[1], parts[2]);
    library = found;
    is_loaded = true;
    return nullptr;
}

const char *tsad_blas_version(void) { return library.version; }

int tsad_blas_major(void) { return CUDART_VERSION / 1000; }

tsad_status tsad_blas_rows(int *rows)
{
    const char *given = getenv("TSAD_CUDA_BLAS");
    char *end = nullptr;
    long n = TSAD_BLAS_ROWS;
    bool automatic = !given || !*given || strcmp(given, "auto") == 0;
    if (!automatic) {
        n = strtol(given, &end, 10);
    }
    if (n < 0 || n > 1 << 20 || (end && (*end || end == given))) {
        return tsad_fail(TSAD_ARGUMENT,
                         "TSAD_CUDA_BLAS: expected 'auto' (%d), 0 (never), or from how many rows "
                         "on products are cuBLAS's, got '%s'; leave the variable out",
                         TSAD_BLAS_ROWS, given);
    }
    if (!automatic && n > 0 && !is_loaded) {
        return tsad_fail(TSAD_ARGUMENT,
                         "TSAD_CUDA_BLAS: '%s' needs cuBLAS, which was not found; see tsad info, "
                         "or leave the variable out",
                         given);
    }
    *rows = is_loaded ? (int)n : 0;
    return TSAD_OK;
}

/* what NVIDIA's manual (cublasSetWorkspace) recommends */
size_t tsad_blas_workspace(void)
{
    cudaDeviceProp p;
    bool large = cudaGetDeviceProperties(&p, 0) == cudaSuccess && p.major >= 9;
    return (size_t)(large ? 32 : 4) << 20;
}

tsad_status tsad_blas_open(tsad_stream *stream, tsad_blas_room room)
{
    stream->blas = new (std::nothrow) tsad_blas{nullptr, room};
    if (!stream->blas) {
        return tsad_fail(TSAD_MEMORY, "out of memory for cuBLAS's handle");
    }
    Handle *handle = &stream->blas->handle;
    int status = library.create(handle);
    /* a stream that is set takes the workspace away: in this order */
    status = status == 0 ? library.set_stream(*handle, stream->cuda) : status;
    status =
        status == 0 ? library.set_workspace(*handle, room.workspace, room.workspace_bytes) : status;
    return status == 0 ? TSAD_OK
                       : tsad_fail(TSAD_BACKEND,
                                   "cuda: a handle of cuBLAS %s: %s; TSAD_CUDA_BLAS=0 does without",
                                   library.version, library.words(status));
}

void tsad_blas_close(tsad_stream *stream)
{
    if (stream->blas && stream->blas->handle) {
        library.destroy(stream->blas->handle);
    }
    delete stream->blas;
    stream->blas = nullptr;
}

const tsad_blas_room *tsad_blas_room_of(const tsad_stream *stream)
{
    return stream->blas ? &stream->blas->room : nullptr;
}

/* cuBLAS counts columns first: what it takes for (outputs, rows) are our rows of outputs. The mode
 * of its handle, of which the host alone knows, is for this product: the next may be of a matrix
 * that stays float32. */
void tsad_blas_multiply(tsad_stream *stream, const float *x, int ldx, const float *w, int rows,
                        int inputs, int outputs, float *y, bool tf32)
{
    enum { AS_IT_IS = 0, DEFAULT_MATH = 0, TF32_TENSOR_OP_MATH = 3 };
    const float one = 1, zero = 0;
    if (!tsad_stream_begin(stream)) {
        return;
    }
    stream->asked->launches++;
    Handle handle = stream->blas->handle;
    int status = tf32 ? library.set_math(handle, TF32_TENSOR_OP_MATH) : 0;
    status = status == 0 ? library.multiply(handle, AS_IT_IS, AS_IT_IS, outputs, rows, inputs, &one,
                                            w, outputs, x, ldx, &zero, y, outputs)
                         : status;
    int after = tf32 ? library.set_math(handle, DEFAULT_MATH) : 0;
    status = status == 0 ? after : status;
    if (status != 0) {
        tsad_stream_note(stream, cudaErrorUnknown, library.words(status));
    }
}
