/* program.h: a plan made flat (program.c): fixed nodes, branches to compute, and runs of
 * consecutive reused branches folded into one addition. Indices only: a backend uploads it in one
 * copy. Encoder and pruner are programs too. */
#pragma once

#include "../model.h"

typedef enum tsad_op_kind {
    TSAD_OP_NODE,    /* run a fixed node */
    TSAD_OP_COMPUTE, /* run a branch, keep it in slot dst, add it */
    TSAD_OP_ADD,     /* add the sum of n_src slots, sources[src ...], to the node's register */
    TSAD_OP_GATED,   /* add one slot times the node's gate of this row */
    TSAD_OP_UPDATE   /* the sampler's row */
} tsad_op_kind;

#define TSAD_REMEMBERED 4 /* sums that are kept for rows that add the same slots again */

typedef struct tsad_op {
    uint8_t kind;
    uint8_t remember, repeat; /* ADD: 1 + the remembered sum to make, or to add instead; 0: none */
    uint8_t again;            /* COMPUTE: an earlier row of the program computes it, too */
    int16_t node;
    int16_t n_src, n_rollout; /* ADD: the rollout slots come first */
    int32_t dst;
    int32_t src;
    int32_t kept; /* ADD: where the sum of its rollout slots is in the lane's sums; -1: nowhere */
} tsad_op;

typedef struct tsad_program {
    int n_rows, n_ops, n_sources;
    int max_ops, max_sources;
    int32_t *row_start; /* (n_rows + 1) into ops */
    uint8_t *closed;    /* (n_rows) 1 + the remembered sum that the closed form is of, 0: run ops */
    tsad_op *ops;
    int32_t *sources;
    float *counts;   /* how often an addition takes each of its sources */
    uint64_t serial; /* how often it was compiled: a backend knows the one that it has seen */
    int64_t cost;
    int32_t cells[TSAD_N_SOURCES];
    bool reads_rollout;
    size_t kept_floats; /* of the lane's sums that its ops use */
} tsad_program;

void tsad_program_carve(tsad_program *program, tsad_arena *arena, int n_rows, int max_ops,
                        int max_sources);
/* Sources (already valid) to a program. `keep`: it will run many times between resets, so sums of
 * rollout slots are worth keeping. */
void tsad_program_compile(tsad_program *program, const tsad_model *model, const uint8_t *sources,
                          bool keep, int32_t *last_of_block);
/* Its rows may be run after rows of another program: no sum is that of a row before. */
void tsad_program_part_rows(tsad_program *program);
/* A program that runs every node of a net once per row. */
void tsad_program_straight(tsad_program *program, const tsad_net *net, int n_rows);
/* The encoder's, where it runs once: its first row makes the memory, each other folds a layer. */
int tsad_program_encoder_rows(const tsad_net *net);
void tsad_program_encoder(tsad_program *program, const tsad_net *net);
