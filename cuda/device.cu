/* device.cu: device.h on CUDA's runtime. */
#include "stream.cuh"

#include <new>

tsad_atomic_counts tsad_counts;

namespace
{

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
    cudaError_t error = cudaStreamCreateWithFlags(&(*out)->cuda, cudaStreamNonBlocking);
    return error == cudaSuccess ? TSAD_OK : fail(error, "a stream");
}

void tsad_stream_free(tsad_stream *stream)
{
    if (stream && stream->cuda) {
        cudaStreamDestroy(stream->cuda);
    }
    delete stream;
}

void tsad_upload(tsad_stream *stream, void *to, const void *from, size_t bytes)
{
    tsad_counts.uploads++;
    tsad_counts.uploaded_bytes += (int64_t)bytes;
    tsad_stream_note(stream, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream->cuda),
                     "upload");
}

void tsad_download(tsad_stream *stream, void *to, const void *from, size_t bytes)
{
    tsad_counts.downloads++;
    tsad_counts.downloaded_bytes += (int64_t)bytes;
    tsad_stream_note(stream, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream->cuda),
                     "download");
}

void tsad_zero(tsad_stream *stream, void *at, size_t bytes)
{
    tsad_stream_note(stream, cudaMemsetAsync(at, 0, bytes, stream->cuda), "memset");
}

tsad_status tsad_stream_wait(tsad_stream *stream)
{
    tsad_counts.waits++;
    tsad_stream_note(stream, cudaStreamSynchronize(stream->cuda), "waiting for the stream");
    cudaError_t error = stream->failed;
    stream->failed = cudaSuccess;
    return error == cudaSuccess ? TSAD_OK : fail(error, stream->failed_in);
}

tsad_device_counts tsad_device_get_counts(void)
{
    return {tsad_counts.launches,       tsad_counts.uploads,          tsad_counts.downloads,
            tsad_counts.uploaded_bytes, tsad_counts.downloaded_bytes, tsad_counts.waits};
}
