/* stream.cuh: a stream as the .cu files see it. */
#pragma once

#include "device.h"

#include <cuda_runtime.h>

#include <atomic>

struct tsad_stream {
    cudaStream_t cuda;
    cudaError_t failed; /* the first failure since the last wait */
    const char *failed_in;
};

/* Policies of several threads add to them. */
struct tsad_atomic_counts {
    std::atomic<int64_t> launches, uploads, downloads, uploaded_bytes, downloaded_bytes, waits;
};
extern tsad_atomic_counts tsad_counts;

static inline void tsad_stream_note(tsad_stream *stream, cudaError_t error, const char *what)
{
    if (error != cudaSuccess && stream->failed == cudaSuccess) {
        stream->failed = error;
        stream->failed_in = what;
    }
}
