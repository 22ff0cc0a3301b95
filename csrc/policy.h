/* policy.h: a policy's plans, counters and desks; its arrays are its engine's (backend.h). */
#pragma once

#include "backend.h"

typedef enum tsad_planner_kind {
    TSAD_FIXED_PLAN,
    TSAD_PRUNER_PLAN,
    TSAD_ROW_RULE
} tsad_planner_kind;

/* The steps that a chunk runs: all of the model's, or its last ones. */
typedef struct tsad_steps {
    int n, first;   /* first: of the model's */
    float *sampler; /* (n, 9) */
    bool adds_noise;
} tsad_steps;

/* K is of the policy's own steps here: with a warm start the last of the model's. */
typedef struct tsad_lane {
    uint32_t *computed_at;             /* (K, B) rollout memory only: chunk number, 0: empty */
    uint8_t *plan;                     /* (K, B) last executed */
    uint8_t *plan_first, *plan_steady; /* (K, B) what a fixed plan runs; of a rule: its rest */
    uint8_t *looked;                   /* (K) rows that a rule had computed whole */
    tsad_program first, steady, dynamic;
    const tsad_program *program; /* of the running chunk */
    uint64_t chunk;              /* since the reset; 0: the next one is the first */
    bool cold;                   /* warm start: the next chunk is not one, and counts nowhere */
    tsad_program cold_program;
    float *previous;     /* (T, A) warm start or lead: the last chunk, raw units */
    bool has_previous;   /* since the reset */
    bool rollout_memory; /* slots hold K rows, not one */
    /* A fixed plan reads the same rollout slots in every chunk and never writes them: from its
     * second chunk on their sums are kept, where the engine has room for them. */
    bool keeps_sums, plan_is_new, sums_ready;
    tsad_sums_use sums_use; /* in the running chunk */
    tsad_planner_kind planner;
    tsad_audit audit;
    tsad_lane_stats stats;
    const char *overflow; /* what of the running chunk is not finite, NULL: nothing */
} tsad_lane;

/* What one queue's stages write on, on the host. */
typedef struct tsad_desk {
    int32_t *last_of_block; /* (B) the planner's */
    int32_t *keys;          /* (K, B) the planner's */
    float *scores;          /* (K, B, 4) of a pruner, memory order */
    float *sample;          /* (T, A) that a warm chunk begins with, or what is made of one */
    int64_t ns[TSAD_N_TIMERS];
} tsad_desk;

struct tsad_policy {
    tsad_model *model;
    tsad_engine *engine;
    atomic_int busy;
    int n_lanes, n_threads;
    tsad_steps all, own;       /* the model's, and those that plans are of */
    bool warm_start;           /* otherwise they are the same */
    float signal, noise_share; /* of a warm chunk's first sample */
    float lead;                /* tsad_policy_set_lead */
    bool smoothing;
    float *gain, *shift; /* (T, A) tsad_policy_set_correction; shift in raw units */
    bool corrected;
    bool rollout_memory; /* the engine's slots hold K rows */
    double sparsity;     /* of the pruner's budget; < 0: argmax */
    tsad_rule rule;      /* of lanes that have one */
    bool audits;         /* tsad_policy_set_audit */
    tsad_arena arena;
    tsad_lane *lanes; /* n_lanes */
    tsad_desk *desks; /* n_threads */
    tsad_program dense, encode, prune;
    float *noise;   /* (L, K, T, A), K of the model */
    float *actions; /* (L, T, A) of the running call, until all its lanes are done */
    /* a call that was deferred, with lanes of its own, and how many rows of it are not read yet */
    tsad_call deferred;
    int *deferred_lanes, *deferred_executed; /* (L) */
    int n_deferred;                          /* 0: there is none */
    int *rows;              /* (L) of the running call: those of cold lanes first */
    int32_t *last_of_block; /* (B) scratch of the planner outside chunks */
    uint8_t *dense_plan;    /* (K, B) zeros, K of the model */
    uint8_t *filled;        /* (K, B) scratch of tsad_policy_set_plans */
    int64_t ns[TSAD_N_TIMERS];
};

/* A pruner plans all steps of a model. */
static inline bool tsad_has_pruner(const tsad_policy *p)
{
    return p->model->has_pruner && !p->warm_start;
}

/* of the lane's next chunk */
static inline const tsad_steps *tsad_lane_steps(const tsad_policy *p, const tsad_lane *lane)
{
    return lane->cold ? &p->all : &p->own;
}

/* What the lane's last chunk has for action t of the next one: moved by the actions executed since,
 * its last one repeated. (A), raw units */
static inline const float *tsad_expected(const tsad_policy *p, const tsad_call *call, int row,
                                         int t)
{
    const tsad_model *m = p->model;
    int moved = call->executed ? call->executed[row] : m->n_action_steps;
    int at = t + moved < m->horizon ? t + moved : m->horizon - 1;
    return p->lanes[call->lanes[row]].previous + (size_t)at * (size_t)m->action_dim;
}
