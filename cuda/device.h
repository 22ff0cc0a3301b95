/* device.h: the few things that this backend asks of a GPU's runtime; device.cu answers them, with
 * CUDA or with its stand-in for tests (emulate/). No CUDA header is needed to include this one, so
 * the backend itself is C.
 */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

#include "base.h"

/* A stream: copies and launches in order, none of them waited for but by tsad_stream_wait. */
typedef struct tsad_stream tsad_stream;

/* What is launched again as a whole. */
typedef struct tsad_graph tsad_graph;

/* What all streams of the process were asked for: launches of kernels and of graphs, kernels of
 * both, launches that lists among them stand for, copies of both, waits, and the device's time from
 * a stream's first work to its wait. */
typedef struct tsad_device_counts {
    int64_t launches, graphs, kernels, listed, uploads, downloads, uploaded_bytes, downloaded_bytes,
        waits;
    int64_t device_ns; /* while tsad_device_time is on */
} tsad_device_counts;

const char *tsad_device_absent(void); /* why there is no device to run on; NULL: there is one */
const char *tsad_device_name(void);   /* "" without one */
/* the GPU, its driver and the runtime, as far as what they compute may depend on them; "" */
const char *tsad_device_identity(void);

/* The GPU that the caller's thread works with, which may be another, until it leaves ours: what all
 * that follows asks for is asked of ours. */
int tsad_device_enter(void);
void tsad_device_leave(int before);

tsad_status tsad_device_allocate(size_t bytes, void **out);
void tsad_device_free(void *memory); /* NULL is fine */
/* Memory of the host that copies can be made from while the host goes on. */
tsad_status tsad_pinned_allocate(size_t bytes, void **out);
void tsad_pinned_free(void *memory);
/* Nothing may be written to these bytes of a device's memory: the stand-in looks. */
void tsad_device_guard(void *from, size_t bytes);

tsad_status tsad_stream_make(tsad_stream **out);
void tsad_stream_free(tsad_stream *stream);
/* `from` of an upload and `to` of a download must stay until the next wait. */
void tsad_upload(tsad_stream *stream, void *to, const void *from, size_t bytes);
void tsad_download(tsad_stream *stream, void *to, const void *from, size_t bytes);
void tsad_zero(tsad_stream *stream, void *at, size_t bytes);
/* Why another library's stream takes no work of ours now; NULL: it does. What is asked of `stream`
 * next comes after what the other holds; what the other gets next comes after what `stream` holds.
 */
const char *tsad_stream_unfit(uintptr_t other);
tsad_status tsad_stream_follow(tsad_stream *stream, uintptr_t other);
tsad_status tsad_stream_precede(tsad_stream *stream, uintptr_t other);
/* Waits for all that was asked for, and says what of it failed. */
tsad_status tsad_stream_wait(tsad_stream *stream);

/* Between the two nothing is done: it is kept as a graph, with the addresses and arguments of now.
 * A failure leaves none, and the stream as before; where the first says false nothing may be asked
 * for before the second, as it would be done. */
bool tsad_capture_begin(tsad_stream *stream);
tsad_status tsad_capture_end(tsad_stream *stream, tsad_graph **out);
void tsad_graph_launch(tsad_stream *stream, tsad_graph *graph);
void tsad_graph_free(tsad_graph *graph); /* NULL is fine; none of its launches may be under way */

/* Callers' memory of the device: see tsad_policy_owns. */
bool tsad_device_owns(int device_type, int device_id);

tsad_device_counts tsad_device_get_counts(void);
void tsad_device_time(bool on);

#ifdef __cplusplus
}
#endif
