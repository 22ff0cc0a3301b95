/* plan.c: what a lane runs in this chunk: its fixed plan, or what the pruner's scores ask for. */
#include "../plan/plan_core.h"
#include "stage.h"

#include <string.h>

static int32_t float_bits(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* what to reuse when a cell is not computed: the best of classes 1 to 3, lowest on ties */
static int best_reuse(const float *score)
{
    int best = TSAD_REUSE_TYPE;
    for (int c = TSAD_REUSE_STEP; c <= TSAD_REUSE_ROLLOUT; c++) {
        if (score[c] > score[best]) {
            best = c;
        }
    }
    return best;
}

/* Scores to sources. Row k reads the scores of row K - 1 - k (the time flip), row 0 computes.
 * Without a budget a cell follows its argmax; with one, the cells whose compute score leads by
 * most are computed, as many as the cost allows. */
static void choose_sources(const tsad_policy *p, const tsad_desk *desk, tsad_lane *lane,
                           uint8_t *sources)
{
    const tsad_model *m = p->model;
    int K = m->n_steps, B = m->n_blocks;
    int32_t threshold = 0;
    for (int k = 1; k < K; k++) {
        for (int b = 0; b < B; b++) {
            const float *score = desk->scores + ((size_t)(K - 1 - k) * (size_t)B + (size_t)b) * 4;
            size_t i = (size_t)k * (size_t)B + (size_t)b;
            sources[i] = (uint8_t)best_reuse(score);
            desk->keys[i] = tsad_ordered_bits(float_bits(score[0] - score[sources[i]]));
        }
    }
    if (p->sparsity >= 0) {
        int64_t row_cost = 0;
        for (int b = 0; b < B; b++) {
            row_cost += m->block_cost[b];
        }
        int64_t budget = (int64_t)((1 - p->sparsity) * (double)m->dense_cost + 0.5) - row_cost;
        threshold = tsad_budget_threshold(desk->keys + B, m->block_cost, B, (int64_t)(K - 1) * B,
                                          budget > 0 ? budget : 0);
    }
    memset(sources, TSAD_COMPUTE, (size_t)B);
    for (size_t i = (size_t)B; i < (size_t)K * (size_t)B; i++) {
        if (desk->keys[i] >= threshold) {
            sources[i] = TSAD_COMPUTE;
        } else if (sources[i] == TSAD_REUSE_ROLLOUT && !lane->computed_at[i]) {
            sources[i] = TSAD_COMPUTE; /* nothing to reuse: compute, as the method's deployment */
            lane->stats.forced++;
        }
    }
}

static void note_statistics(const tsad_policy *p, tsad_lane *lane)
{
    const tsad_program *program = lane->program;
    tsad_lane_stats *stats = &lane->stats;
    stats->cost = program->cost;
    memcpy(stats->cells, program->cells, sizeof stats->cells);
    stats->max_age = 0;
    if (!program->reads_rollout) {
        return;
    }
    uint32_t now = (uint32_t)lane->chunk + 1;
    for (size_t i = 0; i < (size_t)p->own.n * (size_t)p->model->n_blocks; i++) {
        if (lane->plan[i] == TSAD_REUSE_ROLLOUT && now - lane->computed_at[i] > stats->max_age) {
            stats->max_age = now - lane->computed_at[i];
        }
    }
}

void tsad_plan(const tsad_policy *p, tsad_desk *desk, tsad_lane *lane)
{
    const tsad_model *m = p->model;
    size_t cells = (size_t)p->own.n * (size_t)m->n_blocks;
    bool first = lane->chunk == 0;
    if (lane->cold) {
        lane->program = &lane->cold_program;
        return;
    }
    lane->stats.forced = 0;
    if (lane->planner == TSAD_FIXED_PLAN) {
        lane->program = first ? &lane->first : &lane->steady;
        memcpy(lane->plan, first ? lane->plan_first : lane->plan_steady, cells);
    } else if (lane->planner == TSAD_ROW_RULE) { /* at most */
        lane->program = &p->dense;
        return;
    } else if (first) {
        lane->program = &p->dense;
        memset(lane->plan, TSAD_COMPUTE, cells);
    } else {
        choose_sources(p, desk, lane, lane->plan);
        tsad_program_compile(&lane->dynamic, m, lane->plan, false, desk->last_of_block);
        lane->program = &lane->dynamic;
    }
    note_statistics(p, lane);
}

void tsad_plan_by_rule(const tsad_policy *p, tsad_lane *lane)
{
    const tsad_model *m = p->model;
    int B = m->n_blocks;
    tsad_lane_stats *stats = &lane->stats;
    stats->cost = 0;
    memset(stats->cells, 0, sizeof stats->cells);
    stats->max_age = 0;
    for (int cell = 0; cell < p->own.n * B; cell++) {
        uint8_t source = lane->looked[cell / B] ? TSAD_COMPUTE : lane->plan_steady[cell];
        lane->plan[cell] = source;
        stats->cells[source]++;
        stats->cost += source == TSAD_COMPUTE ? m->block_cost[cell % B] : 0;
    }
}
