/* device.cu: device.h on CUDA's runtime. */
#include "blas.h"
#include "stream.cuh"

#include <stdio.h>

#include <new>

tsad_atomic_counts tsad_counts;

namespace
{

std::atomic<bool> timed;

tsad_status fail(cudaError_t error, const char *what)
{
    cudaGetLastError(); /* forget it, where that can be */
    return tsad_fail(error == cudaErrorMemoryAllocation ? TSAD_MEMORY : TSAD_BACKEND,
                     "cuda: %s: %s", what, cudaGetErrorString(error));
}

} // namespace

const char *tsad_device_absent(void)
{
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    return n > 0 ? NULL : "there is no GPU";
}

const char *tsad_device_name(void)
{
    static cudaDeviceProp properties;
    if (tsad_device_absent() || cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
        return "";
    }
    return properties.name;
}

const char *tsad_device_identity(void)
{
    static char text[512];
    cudaDeviceProp p;
    int driver, runtime, used;
    if (tsad_device_absent() || cudaGetDeviceProperties(&p, 0) != cudaSuccess ||
        cudaDriverGetVersion(&driver) != cudaSuccess ||
        cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
        return "";
    }
    used = snprintf(text, sizeof text, "%s, %d.%d, driver %d, runtime %d, ", p.name, p.major,
                    p.minor, driver, runtime);
    for (size_t i = 0; i < sizeof p.uuid.bytes; i++) {
        used += snprintf(text + used, sizeof text - (size_t)used, "%02x",
                         (unsigned)(unsigned char)p.uuid.bytes[i]);
    }
    return text;
}

int tsad_device_enter(void)
{
    int before = 0;
    if (cudaGetDevice(&before) != cudaSuccess || before == 0) {
        return 0; /* what is asked for then says what is wrong */
    }
    cudaSetDevice(0);
    return before;
}

void tsad_device_leave(int before)
{
    if (before != 0) {
        cudaSetDevice(before);
    }
}

tsad_status tsad_device_allocate(size_t bytes, void **out)
{
    cudaError_t error = cudaMalloc(out, bytes ? bytes : 1);
    return error == cudaSuccess ? TSAD_OK : fail(error, "memory of the device");
}

void tsad_device_free(void *memory) { cudaFree(memory); }

tsad_status tsad_pinned_allocate(size_t bytes, void **out)
{
    cudaError_t error = cudaMallocHost(out, bytes ? bytes : 1);
    return error == cudaSuccess ? TSAD_OK : fail(error, "pinned memory of the host");
}

void tsad_pinned_free(void *memory) { cudaFreeHost(memory); }

#ifndef TSAD_EMULATE
void tsad_device_guard(void *from, size_t bytes) { (void)from, (void)bytes; }
#endif

tsad_status tsad_stream_make(tsad_stream **out)
{
    *out = new (std::nothrow) tsad_stream();
    if (!*out) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a stream");
    }
    (*out)->asked = &tsad_counts;
    cudaError_t error = cudaStreamCreateWithFlags(&(*out)->cuda, cudaStreamNonBlocking);
    error = error == cudaSuccess ? cudaEventCreate(&(*out)->begun) : error;
    error = error == cudaSuccess ? cudaEventCreate(&(*out)->ended) : error;
    error = error == cudaSuccess ? cudaEventCreateWithFlags(&(*out)->order, cudaEventDisableTiming)
                                 : error;
    return error == cudaSuccess ? TSAD_OK : fail(error, "a stream");
}

void tsad_stream_free(tsad_stream *stream)
{
    if (!stream) {
        return;
    }
    tsad_blas_close(stream);
    for (cudaEvent_t event : {stream->begun, stream->ended, stream->order}) {
        if (event) {
            cudaEventDestroy(event);
        }
    }
    if (stream->cuda) {
        cudaStreamDestroy(stream->cuda);
    }
    delete stream;
}

bool tsad_stream_begin(tsad_stream *stream)
{
    if (stream->failed != cudaSuccess) {
        return false;
    }
    if (timed && !stream->busy && !stream->capturing) {
        stream->busy = true;
        tsad_stream_note(stream, cudaEventRecord(stream->begun, stream->cuda), "an event");
    }
    return true;
}

void tsad_upload(tsad_stream *stream, void *to, const void *from, size_t bytes)
{
    if (!tsad_stream_begin(stream)) {
        return;
    }
    stream->asked->uploads++;
    stream->asked->uploaded_bytes += (int64_t)bytes;
    tsad_stream_note(stream, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream->cuda),
                     "upload");
}

void tsad_download(tsad_stream *stream, void *to, const void *from, size_t bytes)
{
    if (!tsad_stream_begin(stream)) {
        return;
    }
    stream->asked->downloads++;
    stream->asked->downloaded_bytes += (int64_t)bytes;
    tsad_stream_note(stream, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream->cuda),
                     "download");
}

void tsad_zero(tsad_stream *stream, void *at, size_t bytes)
{
    if (tsad_stream_begin(stream)) {
        tsad_stream_note(stream, cudaMemsetAsync(at, 0, bytes, stream->cuda), "memset");
    }
}

const char *tsad_stream_unfit(uintptr_t other)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(other), &status);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    return status == cudaStreamCaptureStatusNone ? NULL : "it is being captured as a graph";
}

/* what `after` gets next comes after what `before` holds */
static tsad_status order(cudaEvent_t event, cudaStream_t before, cudaStream_t after)
{
    cudaError_t error = cudaEventRecord(event, before);
    error = error == cudaSuccess ? cudaStreamWaitEvent(after, event, 0) : error;
    return error == cudaSuccess ? TSAD_OK : fail(error, "the order of the caller's stream");
}

tsad_status tsad_stream_follow(tsad_stream *stream, uintptr_t other)
{
    return order(stream->order, reinterpret_cast<cudaStream_t>(other), stream->cuda);
}

tsad_status tsad_stream_precede(tsad_stream *stream, uintptr_t other)
{
    return order(stream->order, stream->cuda, reinterpret_cast<cudaStream_t>(other));
}

tsad_status tsad_stream_wait(tsad_stream *stream)
{
    bool busy = stream->busy;
    float milliseconds;
    stream->busy = false;
    tsad_counts.waits++;
    if (busy) {
        tsad_stream_note(stream, cudaEventRecord(stream->ended, stream->cuda), "an event");
    }
    tsad_stream_note(stream, cudaStreamSynchronize(stream->cuda), "waiting for the stream");
    if (busy && stream->failed == cudaSuccess &&
        cudaEventElapsedTime(&milliseconds, stream->begun, stream->ended) == cudaSuccess) {
        tsad_counts.device_ns += (int64_t)(1e6 * (double)milliseconds);
    }
    cudaError_t error = stream->failed;
    stream->failed = cudaSuccess;
    return error == cudaSuccess ? TSAD_OK : fail(error, stream->failed_in);
}

/* ---- graphs ------------------------------------------------------------------------------ */

bool tsad_capture_begin(tsad_stream *stream)
{
    stream->failed_before = stream->failed;
    stream->failed_before_in = stream->failed_in;
    stream->failed = cudaSuccess;
    stream->capturing = new (std::nothrow) tsad_graph();
    if (!stream->capturing) {
        tsad_stream_note(stream, cudaErrorMemoryAllocation, "a graph");
        return false;
    }
    cudaError_t error = cudaStreamBeginCapture(stream->cuda, cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) {
        tsad_stream_note(stream, error, "capturing a graph");
        tsad_graph_free(stream->capturing);
        stream->capturing = NULL;
        return false;
    }
    stream->asked = &stream->capturing->counts;
    return true;
}

tsad_status tsad_capture_end(tsad_stream *stream, tsad_graph **out)
{
    tsad_graph *made = stream->capturing;
    cudaGraph_t graph = NULL;
    *out = NULL;
    stream->capturing = NULL;
    stream->asked = &tsad_counts;
    if (made) {
        tsad_stream_note(stream, cudaStreamEndCapture(stream->cuda, &graph), "capturing a graph");
    }
    if (graph && stream->failed == cudaSuccess) {
        tsad_stream_note(stream, cudaGraphInstantiateWithFlags(&made->exec, graph, 0), "a graph");
    }
    if (graph) {
        cudaGraphDestroy(graph);
    }
    cudaError_t error = stream->failed;
    const char *failed_in = stream->failed_in;
    stream->failed = stream->failed_before; /* which is no failure of the capture, and to be said */
    stream->failed_in = stream->failed_before_in;
    if (error != cudaSuccess) {
        tsad_graph_free(made);
        return fail(error, failed_in);
    }
    *out = made;
    return TSAD_OK;
}

void tsad_graph_launch(tsad_stream *stream, tsad_graph *graph)
{
    if (!tsad_stream_begin(stream)) {
        return;
    }
    tsad_counts.graphs++;
    tsad_counts.replayed += graph->counts.launches;
    tsad_counts.listed += graph->counts.listed;
    tsad_counts.uploads += graph->counts.uploads;
    tsad_counts.downloads += graph->counts.downloads;
    tsad_counts.uploaded_bytes += graph->counts.uploaded_bytes;
    tsad_counts.downloaded_bytes += graph->counts.downloaded_bytes;
    tsad_stream_note(stream, cudaGraphLaunch(graph->exec, stream->cuda), "a graph");
}

void tsad_graph_free(tsad_graph *graph)
{
    if (graph && graph->exec) {
        cudaGraphExecDestroy(graph->exec);
    }
    delete graph;
}

/* ---- callers' memory ----------------------------------------------------------------------- */

bool tsad_device_owns(int device_type, int device_id)
{
    enum { DLPACK_CUDA = 2 };
    return device_type == DLPACK_CUDA && device_id == 0;
}

/* ---- counts ------------------------------------------------------------------------------ */

void tsad_device_time(bool on) { timed = on; }

tsad_device_counts tsad_device_get_counts(void)
{
    const tsad_atomic_counts &c = tsad_counts;
    return {c.launches,  c.graphs,         c.launches + c.replayed, c.listed, c.uploads,
            c.downloads, c.uploaded_bytes, c.downloaded_bytes,      c.waits,  c.device_ns};
}
