/* graph.c: a chunk of a fixed plan as one graph: captured when it runs first, launched again as
 * long as the same lanes run the same programs. What a chunk puts in and takes out is in memory of
 * the host that stays where it is, so nothing of a graph ever changes; what is in memory of the
 * caller is copied before it and after it. */
#include "cuda.h"

#include <string.h>

static void drop(tsad_engine *e, int i)
{
    tsad_graph_free(e->graph[i]);
    tsad_device_free(e->graph_list[i]);
    e->graph[i] = NULL;
    e->graph_list[i] = NULL;
}

void tsad_cuda_drop_graphs(tsad_engine *e)
{
    for (int i = 0; i < TSAD_GRAPHS; i++) {
        drop(e, i);
    }
}

static bool is_fixed(const tsad_engine *e, const tsad_run *runs, int n)
{
    bool fixed = e->graphs_used;
    for (int i = 0; i < n; i++) {
        fixed &= runs[i].fixed;
    }
    return fixed;
}

/* bytes that mean nothing are 0, so that keys can be compared as bytes */
static void make_key(tsad_graph_key *key, const tsad_engine *e, const tsad_run *runs, int n)
{
    memset(key, 0, sizeof *key);
    key->n = n;
    key->in_from = e->in_from;
    key->in_to = e->in_to;
    for (int i = 0; i < n; i++) {
        key->run[i].program = runs[i].program;
        key->run[i].serial = runs[i].program->serial;
        key->run[i].rollout = runs[i].rollout;
    }
}

static tsad_graph *find(const tsad_engine *e, const tsad_graph_key *key)
{
    for (int i = 0; i < TSAD_GRAPHS; i++) {
        if (e->graph[i] && memcmp(&e->key[i], key, sizeof *key) == 0) {
            return e->graph[i];
        }
    }
    return NULL;
}

/* A lane that is among these and has another program now will not have the old one again. */
static void keep(tsad_engine *e, const tsad_graph_key *key, tsad_graph *graph, void *list)
{
    int at = e->oldest_graph;
    for (int i = 0; i < TSAD_GRAPHS; i++) {
        for (int j = 0; e->graph[i] && j < e->key[i].n; j++) {
            const tsad_program *program = e->key[i].run[j].program;
            if (program->serial != e->key[i].run[j].serial) {
                drop(e, i);
            }
        }
        at = e->graph[at] && !e->graph[i] ? i : at;
    }
    if (e->graph[at]) {
        e->oldest_graph = (at + 1) % TSAD_GRAPHS;
        drop(e, at);
    }
    e->graph[at] = graph;
    e->graph_list[at] = list;
    e->key[at] = *key;
}

/* ---- launches -------------------------------------------------------------------------------- */

/* The runs that were put off, then these, as a list; whether one kernel can do it. */
static bool list_all(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end)
{
    tsad_list_begin(e->stream, e->list);
    for (int i = 0; i < e->n_deferred; i++) {
        const tsad_deferred *d = &e->deferred[i];
        tsad_cuda_list_rows(e, d->runs, d->n, d->row_begin, d->row_end);
    }
    tsad_cuda_list_rows(e, runs, n, row_begin, row_end);
    return tsad_list_end(e->stream);
}

/* what was listed, from the device's memory, with what goes in and out */
static void run_list(tsad_engine *e, const tsad_run *runs, int n, const void *memory)
{
    tsad_cuda_upload(e);
    e->waits = true;
    tsad_list_launch(e->stream, e->list, memory, e->one_kernel);
    if (runs->sampler) {
        tsad_cuda_ask_for(e, runs->part, e->model->nets[runs->part].input, n);
    }
}

/* The list where copies can be made from, from `at` on: what is there stays until the next wait. As
 * much of the device's memory is for lists that are launched once. */
static tsad_status stage_list(tsad_engine *e, size_t *at)
{
    size_t bytes = tsad_list_bytes(e->list), room = 2 * bytes;
    void *host, *device;
    if (e->list_used + bytes > e->list_room) {
        TSAD_TRY(tsad_stream_wait(e->stream));
        e->list_used = 0;
    }
    if (bytes > e->list_room) {
        TSAD_TRY(tsad_pinned_allocate(room, &host));
        tsad_status status = tsad_device_allocate(room, &device);
        if (status != TSAD_OK) {
            tsad_pinned_free(host);
            return status;
        }
        tsad_pinned_free(e->staged_list);
        tsad_device_free(e->list_memory);
        e->staged_list = host;
        e->list_memory = device;
        e->list_room = room;
    }
    *at = e->list_used;
    e->list_used += bytes;
    memcpy(e->staged_list + *at, tsad_list_items(e->list), bytes);
    return TSAD_OK;
}

static void upload_list(tsad_engine *e, void *memory, size_t at)
{
    tsad_upload(e->stream, memory, e->staged_list + at, tsad_list_bytes(e->list));
}

static tsad_status launch_all(tsad_engine *e, const tsad_run *runs, int n, int row_begin,
                              int row_end, bool capturing)
{
    for (int i = 0; i < e->n_deferred; i++) {
        const tsad_deferred *d = &e->deferred[i];
        TSAD_TRY(tsad_cuda_run_rows(e, d->runs, d->n, d->row_begin, d->row_end, capturing));
    }
    return tsad_cuda_run_rows(e, runs, n, row_begin, row_end, capturing);
}

/* as one kernel, where that is wanted and can be; else as launches */
static tsad_status run_all(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end)
{
    if (!e->one_kernel || !list_all(e, runs, n, row_begin, row_end)) {
        return launch_all(e, runs, n, row_begin, row_end, false);
    }
    if (runs->sampler && tsad_cuda_stops(e)) {
        return TSAD_INTERRUPTED;
    }
    size_t at;
    TSAD_TRY(stage_list(e, &at));
    upload_list(e, e->list_memory + at, at);
    run_list(e, runs, n, e->list_memory + at);
    return TSAD_OK;
}

/* A graph of them, and the device's memory that it needs (NULL: none); no graph where this GPU or
 * driver cannot capture them. */
static tsad_status capture(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end,
                           tsad_graph **graph, void **memory)
{
    tsad_status status = TSAD_OK;
    *memory = NULL;
    if (e->one_kernel && list_all(e, runs, n, row_begin, row_end)) {
        size_t at;
        TSAD_TRY(stage_list(e, &at));
        TSAD_TRY(tsad_device_allocate(tsad_list_bytes(e->list), memory));
        upload_list(e, *memory, at);
    }
    if (tsad_capture_begin(e->stream)) {
        if (*memory) {
            run_list(e, runs, n, *memory);
        } else {
            status = launch_all(e, runs, n, row_begin, row_end, true);
        }
    }
    if (tsad_capture_end(e->stream, graph) == TSAD_OK && status == TSAD_OK) {
        return TSAD_OK;
    }
    tsad_graph_free(*graph);
    *graph = NULL;
    status = *memory ? tsad_stream_wait(e->stream) : TSAD_OK; /* its list may be on its way */
    tsad_device_free(*memory);
    *memory = NULL;
    return status;
}

static tsad_status run_chunk(tsad_engine *e, const tsad_run *runs, int n, int row_begin,
                             int row_end)
{
    tsad_graph_key key;
    make_key(&key, e, runs, n);
    tsad_graph *graph = find(e, &key);
    if (!graph) {
        size_t from = e->in_from, to = e->in_to;
        void *memory;
        TSAD_TRY(capture(e, runs, n, row_begin, row_end, &graph, &memory));
        if (!graph) {
            /* The launches load the kernel that cuBLAS could not load within: they may be captured
             * then. Otherwise this GPU or driver has none of these: launches do as well. */
            e->graphs_used = e->blas.rows && ++e->captures_failed < TSAD_GRAPHS;
            e->in_from = from;
            e->in_to = to;
            return run_all(e, runs, n, row_begin, row_end);
        }
        keep(e, &key, graph, memory);
    }
    tsad_graph_launch(e->stream, graph);
    e->in_from = e->in_to = 0;
    e->waits = true;
    e->out_part = runs->part;
    e->out_reg = e->model->nets[runs->part].input;
    return TSAD_OK;
}

tsad_status tsad_cuda_run(tsad_queue *queue, const tsad_run *runs, int n, int row_begin,
                          int row_end)
{
    tsad_engine *e = queue->engine;
    bool fixed = is_fixed(e, runs, n);
    e->out_reg = -1;
    if (row_begin >= row_end) {
        return TSAD_OK;
    }
    if (fixed && !runs->sampler && e->n_deferred < TSAD_DEFERRED) {
        tsad_deferred *d = &e->deferred[e->n_deferred++];
        *d = (tsad_deferred){.n = n, .row_begin = row_begin, .row_end = row_end};
        memcpy(d->runs, runs, sizeof *runs * (size_t)n);
        return TSAD_OK;
    }
    tsad_cuda_bring(e, runs, n, row_begin, row_end);
    tsad_status status = fixed && runs->sampler ? run_chunk(e, runs, n, row_begin, row_end)
                                                : run_all(e, runs, n, row_begin, row_end);
    e->n_deferred = 0;
    return status;
}
