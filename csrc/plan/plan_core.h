/* plan_core.h: the integer rules of planning, inline, compiled by the C compiler and by nvcc alike.
 *
 * No floats, no memory of their own: a pruner's scores become sources (argmax or a budget), and
 * sources become slots. Only `compute` writes, and it writes the place of its own cell; every
 * reuse is an index into that one buffer (paper: arXiv 2605.13316; the reference implementation
 * keeps three dictionaries instead, with the same reads).
 */
#pragma once

#include <stdint.h>

#include "../tsad.h"

#ifdef __CUDACC__
#define TSAD_INLINE static inline __host__ __device__
#else
#define TSAD_INLINE static inline
#endif

/* Rows since when each block and each type was last computed, while walking a plan. */
typedef struct tsad_resolver {
    int n_blocks;
    int32_t last_of_type[TSAD_MAX_TYPES]; /* slot, -1: none yet in this chunk */
    int32_t *last_of_block;               /* (B) slots, -1: none yet */
} tsad_resolver;

TSAD_INLINE void tsad_resolver_begin(tsad_resolver *r, int n_blocks, int32_t *last_of_block)
{
    r->n_blocks = n_blocks;
    r->last_of_block = last_of_block;
    for (int t = 0; t < TSAD_MAX_TYPES; t++) {
        r->last_of_type[t] = -1;
    }
    for (int b = 0; b < n_blocks; b++) {
        last_of_block[b] = -1;
    }
}

/* The slot of one cell; -1 for skip. On a fault *reason is set and the result is -1. Cells must
 * come in execution order: row after row, block after block. */
TSAD_INLINE int32_t tsad_resolver_next(tsad_resolver *r, int source, int step, int block, int type,
                                       const uint8_t *filled, tsad_plan_reason *reason)
{
    int32_t own = step * r->n_blocks + block, slot = -1;
    *reason = TSAD_PLAN_VALID;
    switch (source) {
    case TSAD_COMPUTE:
        r->last_of_type[type] = own;
        r->last_of_block[block] = own;
        return own;
    case TSAD_REUSE_TYPE:
        slot = r->last_of_type[type];
        *reason = slot < 0 ? TSAD_PLAN_EMPTY_TYPE : TSAD_PLAN_VALID;
        return slot;
    case TSAD_REUSE_STEP:
        slot = r->last_of_block[block];
        *reason = slot < 0 ? TSAD_PLAN_EMPTY_STEP : TSAD_PLAN_VALID;
        return slot;
    case TSAD_REUSE_ROLLOUT:
        if (!filled) {
            *reason = TSAD_PLAN_FIRST_ROLLOUT;
        } else if (!filled[own]) {
            *reason = TSAD_PLAN_EMPTY_ROLLOUT;
        } else {
            slot = own;
        }
        return slot;
    case TSAD_SKIP:
        return -1;
    default:
        *reason = TSAD_PLAN_UNKNOWN_SOURCE;
        return -1;
    }
}

/* A float's bits as an integer of the same order, so that thresholds are found without floats. */
TSAD_INLINE int32_t tsad_ordered_bits(int32_t bits)
{
    return bits < 0 ? (int32_t)(0x80000000u - (uint32_t)bits) : bits;
}

/* The lowest key t such that the cells with key >= t cost at most `budget`; keys of n cells.
 * INT32_MAX if not even the best fit. Cells with equal keys stand or fall together, so the result
 * does not depend on their order. */
TSAD_INLINE int32_t tsad_budget_threshold(const int32_t *key, const int64_t *block_cost,
                                          int n_blocks, int64_t n_cells, int64_t budget)
{
    int64_t low = INT32_MIN, high = INT32_MAX; /* the answer lies in (low - 1, high] */
    while (low < high) {
        int64_t middle = low + (high - low) / 2, spent = 0;
        for (int64_t i = 0; i < n_cells; i++) {
            if (key[i] >= middle) {
                spent += block_cost[i % n_blocks];
            }
        }
        if (spent <= budget) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return (int32_t)high;
}
