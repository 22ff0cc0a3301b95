/* cuda_runtime.h: what stands in for CUDA where there is no GPU: the backend's .cu files, compiled
 * as C++ for the host, find this header in the place of CUDA's.
 *
 * A kernel's blocks run one after the other in random order, those of a cluster together, each
 * thread as a fiber: up to a barrier or a shuffle in random order again. A stream's copies and
 * launches wait until somebody waits for the stream, or until TSAD_EMULATE_QUEUE of them wait
 * (1024; 0: no end): then a random part is done before the call that asked for more returns, and of
 * other streams what they come to. The host can never touch the device's memory. What a stream
 * waits for of another one is done when it comes to that, at the latest. Memory that nobody wrote
 * is full of NaN, so is a block's shared memory, and the bytes after an array are looked at after
 * every launch. A graph is the list of what was asked for while it was captured; memory of the host
 * is full of NaN at first, too. TSAD_EMULATE_SEED (0) chooses the order, of the queue too; with
 * TSAD_EMULATE_COUNT launches are counted alone, and all results are 0.
 *
 * Not shown: the hardware's memory model, bank conflicts, speed.
 */
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include <functional>

#define TSAD_EMULATE 1
#define CUDART_VERSION 0

#define __device__
#define __host__
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

/* ---- the runtime ------------------------------------------------------------------------- */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorUnknown = 999
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaDeviceProp {
    char name[256];
    struct {
        char bytes[16];
    } uuid;
    int major, minor;
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_graph *cudaGraph_t;
typedef struct emulated_exec *cudaGraphExec_t;
typedef struct emulated_event *cudaEvent_t;

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMallocHost(void **out, size_t bytes);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status);
cudaError_t cudaEventCreate(cudaEvent_t *out);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                          unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

namespace emulate
{

cudaError_t launch(const void *kernel, std::function<void()> thread, dim3 grid, dim3 block,
                   size_t shared, cudaStream_t stream, unsigned cluster = 1);
cudaError_t allow_shared(const void *kernel, size_t bytes);
void ask(cudaStream_t stream, std::function<const char *()> what);
bool holds(const void *at, size_t bytes); /* in an array of the device */
/* what a stream captures will be no graph; false: it captures nothing */
bool spoil_capture(cudaStream_t stream);
float warp_exchange(float value, unsigned lanes); /* with thread `own lane ^ lanes` of the warp */
void sync_part(int number, int threads); /* barrier 1 to 15 of a block, of so many of its threads */
void sync_cluster();
void *shared(int line, size_t bytes);
float *dynamic();

} // namespace emulate

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(const Arguments &), dim3 grid, dim3 block,
                             void **arguments, size_t shared, cudaStream_t stream)
{
    Arguments copy = *static_cast<Arguments *>(arguments[0]);
    return emulate::launch(
        reinterpret_cast<const void *>(kernel), [kernel, copy] { kernel(copy); }, grid, block,
        shared, stream);
}

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

/* clusters lie along x, and there is no other attribute */
template <typename Arguments>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, void (*kernel)(const Arguments &),
                                void **arguments)
{
    Arguments copy = *static_cast<Arguments *>(arguments[0]);
    return emulate::launch(
        reinterpret_cast<const void *>(kernel), [kernel, copy] { kernel(copy); }, how->gridDim,
        how->blockDim, how->dynamicSmemBytes, how->stream,
        how->numAttrs ? how->attrs[0].val.clusterDim.x : 1);
}

template <typename Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(const Arguments &), cudaFuncAttribute, int bytes)
{
    return emulate::allow_shared(reinterpret_cast<const void *>(kernel), (size_t)bytes);
}

/* ---- in a kernel ------------------------------------------------------------------------- */

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

#define TSAD_SHARED(type, name, count)                                                             \
    type *name = static_cast<type *>(emulate::shared(__LINE__, sizeof(type) * (size_t)(count)))
#define TSAD_DYNAMIC(name) float *name = emulate::dynamic()

struct alignas(16) float4 {
    float x, y, z, w;
};

void __syncthreads();

static inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* threads are fibers of one: nothing comes between */
static inline unsigned long long atomicMin(unsigned long long *at, unsigned long long value)
{
    unsigned long long before = *at;
    *at = value < before ? value : before;
    return before;
}

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }

static inline float __shfl_xor_sync(unsigned, float value, int lanes)
{
    return emulate::warp_exchange(value, (unsigned)lanes);
}
