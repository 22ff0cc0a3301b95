/* cuda.h: the backend for a GPU: its weights, its engine, and where a program is. Plain C: what
 * needs a C++ compiler is behind device.h and kernels.h. */
#pragma once

#include "backend.h"
#include "kernels.h"

/* A node's matrices and tables on the device; NULL: it has none. */
typedef struct tsad_cuda_node {
    const float *w[4], *bias[4];
    const float *table, *norm;
} tsad_cuda_node;

/* A model's numbers on the device. */
typedef struct tsad_cuda_model {
    void *memory;
    const float *time_fold, *time_terms;
    /* of a transformer that prunes; `query` (hidden, blocks) */
    const float *keys, *keys_bias, *values, *values_bias, *out;
    const float *query, *token, *time_score, *time_value;
    tsad_cuda_node nodes[]; /* of all nets */
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
} tsad_cuda_lane;

/* Memory of the host that copies are made from and to, used up from one wait to the next. */
typedef struct tsad_staging {
    char *base;
    size_t used, size;
} tsad_staging;

struct tsad_engine {
    const tsad_model *model;
    tsad_stream *stream;
    int n_lanes, slot_rows; /* n_lanes without the last one, which no caller has */
    tsad_arena host;        /* of the arrays of pointers below */
    tsad_cuda_lane *lanes;  /* (n_lanes + 1) */
    float **registers[TSAD_N_PARTS];
    void *memory, *slot_memory; /* of the device, as all that follows */
    size_t bytes, slot_bytes;
    float *previous_x0;           /* (T, A padded) */
    float *sums[TSAD_REMEMBERED]; /* shaped as the widest branch */
    float *scratch[3];            /* each for the widest rows of any node */
    float *noise;                 /* (K, T, A) of the running program */
    int64_t *offsets;             /* of its sources, in the lane's slots, */
    float *counts;                /* and how often each is taken */
    tsad_staging staging;
    const tsad_interrupt *interrupt; /* of the running call, NULL: none */
    int64_t asked_at;                /* when the call began, or its interrupt was asked last */
};

/* Lanes go one after the other through one stream. */
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
    float **registers;
    int row;  /* of the program */
    int step; /* of the tables over steps */
} tsad_cuda_context;

/* n bytes of staging; waits for the stream if they are all taken */
tsad_status tsad_cuda_stage(tsad_engine *e, size_t bytes, void **out);
bool tsad_cuda_stops(tsad_engine *e);
tsad_status tsad_cuda_run(tsad_queue *queue, const tsad_run *runs, int n, int row_begin,
                          int row_end);

/* node.c: a branch that is computed; a fixed node */
void tsad_cuda_compute(const tsad_cuda_context *c, const tsad_op *op);
void tsad_cuda_fixed(const tsad_cuda_context *c, const tsad_node *node);
/* prune.c: the pruner's own, and the encoder's folding */
bool tsad_cuda_prune(const tsad_cuda_context *c, const tsad_node *node);
void tsad_cuda_fold(const tsad_cuda_context *c, const tsad_node *node);

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
                          .bias = packed->bias[i],
                          .rows = rows,
                          .n_out = m->n_out,
                          .step = 1,
                          .to = to,
                          .batches = 1};
}
