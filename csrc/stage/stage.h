/* stage.h: the four stages of a chunk, each for lanes on a queue. They say what is to be done; who
 * does it is a backend's affair. */
#pragma once

#include "../policy.h"

/* The lanes of a call that go through the stages together: all cold, or all not. */
typedef struct tsad_gang {
    tsad_policy *policy;
    const tsad_call *call;
    tsad_queue *queue;
    tsad_desk *desk;
    const tsad_steps *steps;
    const int *rows; /* (n) of the call */
    int n;
    bool deferred; /* nobody waits for what it makes */
} tsad_gang;

static inline int tsad_gang_index(const tsad_gang *g, int i) { return g->call->lanes[g->rows[i]]; }
static inline tsad_lane *tsad_gang_lane(const tsad_gang *g, int i)
{
    return &g->policy->lanes[tsad_gang_index(g, i)];
}

/* Does the lane run plans that somebody set, or those that the pruner makes for each chunk? The
 * last lane, which no caller has, runs single rows. */
static inline bool tsad_is_fixed(const tsad_policy *p, int lane)
{
    return lane < p->n_lanes && p->lanes[lane].planner == TSAD_FIXED_PLAN;
}

/* obs, n of (n_obs_steps, O), raw -> memory of the lanes (n), by the network of this name.
 * there: on the device, where the caller's array begins; NULL: on the host */
tsad_status tsad_encode(const tsad_policy *p, tsad_queue *queue, const tsad_steps *steps, int n,
                        const int *lanes, const float *const *obs, const float *there);
/* memory of a lane -> scores (K, B, 4) */
tsad_status tsad_prune(const tsad_policy *p, tsad_queue *queue, int lane, float *scores);
/* Chooses the lane's program for this chunk and records the plan. */
void tsad_plan(const tsad_policy *p, tsad_desk *desk, tsad_lane *lane);
/* After a chunk: the plan that the lane's rule has come to. */
void tsad_plan_by_rule(const tsad_policy *p, tsad_lane *lane);
/* After a lane's fixed plan was compiled; `room`: the engine can keep its sums. */
void tsad_sums_begin(tsad_lane *lane, bool room);
/* After tsad_plan: whether this chunk makes them, has them, or goes without. */
void tsad_sums_choose(tsad_lane *lane);
/* audit.c: its slots hold nothing to compare with; what the chunk that begins is to note its
 * differences in, NULL: nowhere; what the slots hold after it. */
void tsad_audit_forget(const tsad_policy *p, tsad_lane *lane);
tsad_audit *tsad_audit_begin(const tsad_policy *p, tsad_lane *lane);
void tsad_audit_end(const tsad_policy *p, tsad_lane *lane);
/* Runs the lanes' programs from noise to actions, which wait in the policy's memory; of a gang that
 * is deferred they are on the device until tsad_emit. */
tsad_status tsad_denoise(const tsad_gang *g);
tsad_status tsad_emit(const tsad_gang *g);
