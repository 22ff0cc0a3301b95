/* list.cuh: a list as the .cu files see it. */
#pragma once

#include "kernels.h"
#include "list.h"

#include <cuda_runtime.h>

enum tsad_kind {
    TSAD_DO_PRODUCT,
    TSAD_DO_LAYERNORM,
    TSAD_DO_GROUPNORM,
    TSAD_DO_ATTENTION,
    TSAD_DO_CROSS_ATTENTION,
    TSAD_DO_ADDITION,
    TSAD_DO_COPY,
    TSAD_DO_UPDATE,
    TSAD_DO_TAIL,
    TSAD_DO_PRUNE_QUERY,
    TSAD_DO_ALONE /* what is never listed */
};

/* One launch. */
struct tsad_item {
    tsad_kind kind;
    int next;         /* of the same lane; -1: it is the last */
    unsigned x, y, z; /* the launch's blocks */
    int floats;       /* that one of them shares, beside what its body always does */
    union {
        tsad_product product;
        tsad_layernorm layernorm;
        tsad_groupnorm groupnorm;
        tsad_attention attention;
        tsad_cross_attention cross_attention;
        tsad_addition addition;
        tsad_copy copy;
        tsad_update update;
        tsad_tail tail;
        tsad_prune_query prune_query;
    };
};

void tsad_list_add(tsad_list *list, tsad_kind kind, const void *arguments, size_t bytes, dim3 grid,
                   size_t floats);
