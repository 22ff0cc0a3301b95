/* cuda.h: the backend for a GPU: its weights, its engine, and where a program is. Plain C: what
 * needs a C++ compiler is behind device.h and kernels.h. */
#pragma once

#include "backend.h"
#include "blas.h"
#include "kernels.h"
#include "list.h"

/* A node's matrices and tables on the device; NULL: it has none. */
typedef struct tsad_cuda_node {
    tsad_precision precision; /* of all w */
    const void *w[4];
    const float *bias[4];
    const float *table, *norm;
} tsad_cuda_node;

/* A model's numbers on the device. */
typedef struct tsad_cuda_model {
    void *memory;
    const float *time_fold, *time_terms;
    /* of a transformer that prunes; `query` (hidden, blocks) */
    const void *keys, *values, *out; /* float32 */
    const float *keys_bias, *values_bias;
    const float *query, *token, *time_score, *time_value;
    const float *obs[3], *action[3]; /* scale, offset, shift */
    tsad_cuda_node nodes[];          /* of all nets */
} tsad_cuda_model;

tsad_status tsad_cuda_pack(tsad_model *model);
void tsad_cuda_unpack(tsad_model *model);
static inline const tsad_cuda_model *tsad_cuda_of(const tsad_model *m)
{
    return (const tsad_cuda_model *)(const void *)m->packed.base;
}

/* One lane's memory, on the device. */
typedef struct tsad_cuda_lane {
    float *slots;
    float *array[TSAD_N_ARRAYS];
    tsad_reused *sources;        /* of the program that it ran last: */
    const tsad_program *program; /* which that was, NULL: none, */
    uint64_t serial;             /* compiled for the how many-th time, */
    bool rollout;                /* with slots of all rows */
} tsad_cuda_lane;

/* What one track works on, on the device; tracks of a denoiser are lanes of a gang, others rows of
 * any lane. */
typedef struct tsad_cuda_place {
    float **registers[TSAD_N_PARTS];
    float *scratch[3]; /* each for the widest rows of any node */
    /* of a denoiser's */
    float *noise;                 /* (K, T, A) of the running program */
    float *begins;                /* (T, A) what a warm sample has of the chunk before */
    float *finish;                /* (3, T, A) expected, gain, shift: tsad_finish */
    float *x0;                    /* (2, T, A padded): of the last two rows, by their parity */
    float *sums[TSAD_REMEMBERED]; /* shaped as the widest branch */
} tsad_cuda_place;

/* Runs that begin a chunk of a fixed plan: they wait for those that end it. */
typedef struct tsad_deferred {
    tsad_run runs[TSAD_GANG];
    int n, row_begin, row_end;
} tsad_deferred;

/* What a graph is of: programs, each of one lane's and for one sampler, and of slots. */
typedef struct tsad_graph_key {
    int n;
    struct {
        const tsad_program *program;
        uint64_t serial;
        bool rollout;
    } run[TSAD_GANG];
    size_t in_from, in_to; /* what it copies in */
} tsad_graph_key;

enum { TSAD_GRAPHS = 16, TSAD_DEFERRED = 2 };

struct tsad_engine {
    const tsad_model *model;
    tsad_stream *stream;
    int n_lanes, slot_rows; /* n_lanes without the last one, which no caller has */
    int n_gang;             /* places of a denoiser */
    tsad_arena host;        /* of the arrays of pointers below */
    tsad_cuda_lane *lanes;  /* (n_lanes + 1) */
    tsad_cuda_place place[TSAD_TOGETHER];
    void *memory, *slot_memory; /* of the device */
    size_t bytes, slot_bytes;
    /* What goes in is written to pinned memory of the host, laid out as the device's, and copied in
     * one piece: nothing of it is written again before the next wait. */
    char *in, *staged_in;
    size_t in_bytes, in_from, in_to; /* what of it is not yet copied */
    tsad_reused *staged_sources;     /* (n_gang, cells) */
    char *staged_out;
    unsigned long long *fault; /* (TSAD_N_GIVEN) see tsad_taking; all ones: none */
    bool waits;                /* the stream was not waited for since something was asked of it */
    tsad_part out_part;        /* where what is in staged_out is from: */
    int out_reg;               /* this register of all places, -1: nothing is */
    bool graphs_used;          /* TSAD_CUDA_GRAPHS=0 */
    int captures_failed;
    tsad_blas_room blas; /* rows 0: no cuBLAS */
    tsad_deferred deferred[TSAD_DEFERRED];
    int n_deferred;
    tsad_graph *graph[TSAD_GRAPHS];
    tsad_graph_key key[TSAD_GRAPHS];
    void *graph_list[TSAD_GRAPHS]; /* the device's memory of its list; NULL: it is of launches */
    int oldest_graph;
    int one_kernel; /* TSAD_CUDA_ONE_KERNEL: blocks that do a lane's list, 0: none is made */
    tsad_list *list;
    char *staged_list, *list_memory; /* of the host and of the device, for several lists */
    size_t list_room, list_used;
    const tsad_interrupt *interrupt; /* of the running call, NULL: none */
    int64_t asked_at;                /* when the call began, or its interrupt was asked last */
};

/* Lanes of a call go through one stream, a gang at a time. */
struct tsad_queue {
    tsad_engine *engine;
};

/* Where a program is. */
typedef struct tsad_cuda_context {
    tsad_engine *e;
    const tsad_run *run;
    const tsad_model *m;
    const tsad_cuda_model *cuda;
    const tsad_net *net;
    const tsad_cuda_lane *lane;
    const tsad_cuda_place *place;
    float **registers;
    int row;  /* of the program */
    int step; /* of the tables over steps */
} tsad_cuda_context;

/* engine.c: where to write what goes to these bytes of the device's `in`; what was staged goes
 * there; this register of n places goes to staged_out */
void *tsad_cuda_stage(tsad_engine *e, const void *device, size_t bytes);
void tsad_cuda_upload(tsad_engine *e);
void tsad_cuda_ask_for(tsad_engine *e, tsad_part part, int reg, int places);
bool tsad_cuda_stops(tsad_engine *e);
/* caller.c: rows that are on the device, to there; the backend's functions for callers' arrays */
void tsad_cuda_take(tsad_engine *e, int place, float *to, int ld, const tsad_rows *from);
const char *tsad_cuda_unfit(uintptr_t stream);
tsad_status tsad_cuda_follow(tsad_engine *e, uintptr_t stream);
tsad_status tsad_cuda_precede(tsad_engine *e, uintptr_t stream);
tsad_status tsad_cuda_hand_over(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to,
                                const tsad_finish *finish);
bool tsad_cuda_fault(tsad_engine *e, tsad_given given, size_t *index, float *raw);
/* run.c: sources and noise of runs; then their rows, op by op */
void tsad_cuda_bring(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end);
tsad_status tsad_cuda_run_rows(tsad_engine *e, const tsad_run *runs, int n, int row_begin,
                               int row_end, bool capturing);
void tsad_cuda_list_rows(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end);
/* graph.c: the backend's `run`: whole chunks of fixed plans as graphs, the rest as launches */
tsad_status tsad_cuda_run(tsad_queue *queue, const tsad_run *runs, int n, int row_begin,
                          int row_end);
void tsad_cuda_drop_graphs(tsad_engine *e);

/* node.c: a branch that is computed; a fixed node; the end of a step, sum and sampler's row
 * included, and the node that begins the next one (NULL: none) */
void tsad_cuda_compute(const tsad_cuda_context *c, const tsad_op *op);
void tsad_cuda_fixed(const tsad_cuda_context *c, const tsad_node *node);
void tsad_cuda_tail(const tsad_cuda_context *c, const tsad_node *head, tsad_sum sum,
                    tsad_update update, const tsad_node *next);
bool tsad_cuda_is_head(const tsad_cuda_context *c, const tsad_node *node);
bool tsad_cuda_begins(const tsad_cuda_context *c, const tsad_node *node);
/* prune.c: the pruner's own, and the encoder's folding */
bool tsad_cuda_prune(const tsad_cuda_context *c, const tsad_node *node);
void tsad_cuda_fold(const tsad_cuda_context *c, const tsad_node *node);

/* a row's terms from `at` on */
tsad_term tsad_cuda_terms(const tsad_cuda_context *c, int at);
/* the gate (c_out) of a branch that is cached before it, in this row */
tsad_term tsad_cuda_gate(const tsad_cuda_context *c, const tsad_node *node);
/* the lane's memory of this row */
float *tsad_cuda_memory(const tsad_cuda_context *c, int tokens);

static inline const tsad_cuda_node *tsad_cuda_node_of(const tsad_node *node)
{
    return (const tsad_cuda_node *)node->packed;
}

static inline float *tsad_cuda_slot(const tsad_cuda_context *c, int32_t slot)
{
    int B = c->net->n_blocks, row = c->run->rollout ? slot / B : 0;
    return c->lane->slots + (size_t)row * c->net->row_floats + c->net->slot_offset[slot % B];
}

/* rows of x (rows, m->n_in) times a matrix into y: to be completed */
static inline tsad_product tsad_cuda_product(const tsad_cuda_node *packed, const tsad_matrix *m,
                                             int i, const float *x, int ldx, int rows, int channels,
                                             tsad_delivery to)
{
    return (tsad_product){.x = x,
                          .ldx = ldx,
                          .tokens = rows,
                          .channels = channels,
                          .taps = 1,
                          .stride = 1,
                          .w = packed->w[i],
                          .precision = packed->precision,
                          .bias = packed->bias[i],
                          .rows = rows,
                          .n_out = m->n_out,
                          .step = 1,
                          .to = to,
                          .batches = 1};
}
