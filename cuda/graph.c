/* graph.c: a chunk of a fixed plan as one graph: captured when it runs first, launched again as
 * long as the same lanes run the same programs. What a chunk puts in and takes out is in memory of
 * the host that stays where it is, so nothing of a graph ever changes; what is in memory of the
 * caller is copied before it and after it. */
#include "cuda.h"

#include <string.h>

void tsad_cuda_drop_graphs(tsad_engine *e)
{
    for (int i = 0; i < TSAD_GRAPHS; i++) {
        tsad_graph_free(e->graph[i]);
        e->graph[i] = NULL;
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
static void keep(tsad_engine *e, const tsad_graph_key *key, tsad_graph *graph)
{
    int at = e->oldest_graph;
    for (int i = 0; i < TSAD_GRAPHS; i++) {
        for (int j = 0; e->graph[i] && j < e->key[i].n; j++) {
            const tsad_program *program = e->key[i].run[j].program;
            if (program->serial != e->key[i].run[j].serial) {
                tsad_graph_free(e->graph[i]);
                e->graph[i] = NULL;
            }
        }
        at = e->graph[at] && !e->graph[i] ? i : at;
    }
    if (e->graph[at]) {
        e->oldest_graph = (at + 1) % TSAD_GRAPHS;
        tsad_graph_free(e->graph[at]);
    }
    e->graph[at] = graph;
    e->key[at] = *key;
}

/* the runs that were put off, then these */
static tsad_status run_all(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end,
                           bool capturing)
{
    for (int i = 0; i < e->n_deferred; i++) {
        const tsad_deferred *d = &e->deferred[i];
        TSAD_TRY(tsad_cuda_run_rows(e, d->runs, d->n, d->row_begin, d->row_end, capturing));
    }
    return tsad_cuda_run_rows(e, runs, n, row_begin, row_end, capturing);
}

static tsad_status run_chunk(tsad_engine *e, const tsad_run *runs, int n, int row_begin,
                             int row_end)
{
    tsad_graph_key key;
    make_key(&key, e, runs, n);
    tsad_graph *graph = find(e, &key);
    if (!graph) {
        size_t from = e->in_from, to = e->in_to;
        tsad_capture_begin(e->stream);
        tsad_status status = run_all(e, runs, n, row_begin, row_end, true);
        if (tsad_capture_end(e->stream, &graph) != TSAD_OK || status != TSAD_OK) {
            /* The launches load the kernel that cuBLAS could not load within: they may be captured
             * then. Otherwise this GPU or driver has none of these: launches do as well. */
            e->graphs_used = e->blas.rows && ++e->captures_failed < TSAD_GRAPHS;
            e->in_from = from;
            e->in_to = to;
            return run_all(e, runs, n, row_begin, row_end, false);
        }
        keep(e, &key, graph);
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
                                                : run_all(e, runs, n, row_begin, row_end, false);
    e->n_deferred = 0;
    return status;
}
