/* stream.cuh: a stream as the .cu files see it. */
#pragma once

#include "device.h"

#include <cuda_runtime.h>

#include <atomic>

struct tsad_held;
typedef void (*tsad_issue_fn)(tsad_stream *stream, const tsad_held &held);

/* A launch that is held back, until all tracks that go through it have come. */
struct tsad_held {
    tsad_issue_fn issue;
    const void *kernel;
    dim3 grid, block;
    size_t bytes; /* of dynamic shared memory */
    const char *name;
    int n; /* tracks */
    alignas(16) char arguments[1536];
};

/* Policies of several threads add to them. */
struct tsad_atomic_counts {
    std::atomic<int64_t> launches, graphs, replayed, listed, uploads, downloads, uploaded_bytes,
        downloaded_bytes, waits, device_ns;
};
extern tsad_atomic_counts tsad_counts;

struct tsad_graph {
    cudaGraphExec_t exec;
    tsad_atomic_counts counts; /* what it asks for */
};

struct tsad_blas;
struct tsad_list;

struct tsad_stream {
    cudaStream_t cuda;
    cudaError_t failed; /* the first failure since the last wait */
    const char *failed_in;
    cudaError_t failed_before; /* the same, before what is captured */
    const char *failed_before_in;
    tsad_atomic_counts *asked; /* of all, or of the graph that is being captured */
    tsad_graph *capturing;
    bool together; /* launches are held back */
    int next, n_held;
    tsad_held held[8];
    cudaEvent_t begun, ended; /* where device time is measured */
    cudaEvent_t order;        /* of this stream and a caller's */
    bool busy;                /* begun was recorded */
    tsad_blas *blas;          /* NULL: none */
    tsad_list *list;          /* launches are written down there; NULL: they are launched */
};

static inline void tsad_stream_note(tsad_stream *stream, cudaError_t error, const char *what)
{
    if (error != cudaSuccess && stream->failed == cudaSuccess) {
        stream->failed = error;
        stream->failed_in = what;
    }
}

/* Before anything is asked of it: whether it may be. What follows a failure would work with what is
 * not there, and is left out until the next wait says it. */
bool tsad_stream_begin(tsad_stream *stream);
