/* plan.c: scores -> sources -> slots -> program. Pure functions of integers (plan_core.h), so the
 * same rules can run on a GPU.
 *
 * A program is the plan made flat: fixed nodes, branches to compute, and runs of consecutive
 * reused branches folded into one addition.
 */
#include "../backend.h"
#include "../plan_core.h"

#include <string.h>

const char *tsad_plan_reason_text(tsad_plan_reason reason)
{
    switch (reason) {
    case TSAD_PLAN_VALID:
        return "valid";
    case TSAD_PLAN_UNKNOWN_SOURCE:
        return "the source is not 0 (compute) to 4 (skip)";
    case TSAD_PLAN_EMPTY_TYPE:
        return "reuse_type, but no block of this type has been computed before it in this chunk";
    case TSAD_PLAN_EMPTY_STEP:
        return "reuse_step, but this block has not been computed at an earlier step of this chunk";
    case TSAD_PLAN_FIRST_ROLLOUT:
        return "reuse_rollout, but there is no earlier chunk right after a reset";
    case TSAD_PLAN_EMPTY_ROLLOUT:
        return "reuse_rollout, but this cell has not been computed in an earlier chunk of this "
               "episode";
    }
    return "unknown";
}

tsad_plan_fault tsad_plan_resolve(const uint8_t *sources, int n_steps, int n_blocks,
                                  const uint8_t *block_type, const uint8_t *filled, int32_t *slot)
{
    int32_t last[TSAD_MAX_BLOCKS];
    tsad_resolver resolver;
    tsad_resolver_begin(&resolver, n_blocks, last);
    for (int k = 0; k < n_steps; k++) {
        for (int b = 0; b < n_blocks; b++) {
            size_t i = (size_t)k * (size_t)n_blocks + (size_t)b;
            tsad_plan_reason reason;
            int32_t s =
                tsad_resolver_next(&resolver, sources[i], k, b, block_type[b], filled, &reason);
            if (reason != TSAD_PLAN_VALID) {
                return (tsad_plan_fault){reason, k, b};
            }
            if (slot) {
                slot[i] = s;
            }
        }
    }
    return (tsad_plan_fault){TSAD_PLAN_VALID, -1, -1};
}

/* ---- programs --------------------------------------------------------------------------- */

void tsad_program_carve(tsad_program *program, tsad_arena *arena, int n_rows, int max_ops,
                        int max_sources)
{
    program->n_rows = n_rows;
    program->max_ops = max_ops;
    program->max_sources = max_sources;
    program->row_start = TSAD_CARVE(arena, int32_t, n_rows + 1);
    program->ops = TSAD_CARVE(arena, tsad_op, max_ops);
    program->sources = TSAD_CARVE(arena, int32_t, max_sources);
}

static tsad_op *emit(tsad_program *program, tsad_op_kind kind, int node)
{
    tsad_op *op = &program->ops[program->n_ops++];
    *op = (tsad_op){.kind = (uint8_t)kind, .node = (int16_t)node, .dst = -1, .src = -1};
    return op;
}

/* one row of a plan; `slot` is what the resolver said of each block */
static void compile_row(tsad_program *program, const tsad_net *net, const int32_t *slot,
                        const uint8_t *sources)
{
    tsad_op *run = NULL; /* the addition that is still growing */
    for (int i = 0; i < net->n_nodes; i++) {
        const tsad_node *node = &net->nodes[i];
        if (node->block < 0) {
            if (!node->is_residual) {
                emit(program, TSAD_OP_NODE, i);
                run = NULL;
            }
            continue;
        }
        if (node->residual >= 0) {
            emit(program, TSAD_OP_NODE, node->residual);
            run = NULL;
        }
        int source = sources[node->block];
        if (source == TSAD_COMPUTE) {
            emit(program, TSAD_OP_COMPUTE, i)->dst = slot[node->block];
            run = NULL;
        } else if (source != TSAD_SKIP && node->cache_point == TSAD_BEFORE_GATE) {
            tsad_op *op = emit(program, TSAD_OP_GATED, i);
            op->src = program->n_sources;
            op->n_src = 1;
            program->sources[program->n_sources++] = slot[node->block];
            run = NULL;
        } else if (source != TSAD_SKIP) {
            if (!run || net->nodes[run->node].out != node->out) {
                run = emit(program, TSAD_OP_ADD, i);
                run->src = program->n_sources;
            }
            run->n_src++;
            program->sources[program->n_sources++] = slot[node->block];
        }
    }
    emit(program, TSAD_OP_UPDATE, -1);
}

void tsad_program_compile(tsad_program *program, const tsad_model *model, const uint8_t *sources,
                          int32_t *last_of_block)
{
    const tsad_net *net = &model->net;
    int B = net->n_blocks;
    int32_t slot[TSAD_MAX_BLOCKS];
    tsad_resolver resolver;
    tsad_resolver_begin(&resolver, B, last_of_block);
    program->n_ops = program->n_sources = 0;
    program->cost = 0;
    program->reads_rollout = false;
    memset(program->cells, 0, sizeof program->cells);
    for (int k = 0; k < model->n_steps; k++) {
        const uint8_t *row = sources + (size_t)k * (size_t)B;
        for (int b = 0; b < B; b++) {
            tsad_plan_reason reason;
            program->cells[row[b]]++;
            if (row[b] == TSAD_REUSE_ROLLOUT) {
                slot[b] = k * B + b; /* validated by whoever made the plan */
                program->reads_rollout = true;
            } else {
                slot[b] =
                    tsad_resolver_next(&resolver, row[b], k, b, net->block_type[b], NULL, &reason);
            }
            if (row[b] == TSAD_COMPUTE) {
                program->cost += model->block_cost[b];
            }
        }
        program->row_start[k] = program->n_ops;
        compile_row(program, net, slot, row);
    }
    program->row_start[model->n_steps] = program->n_ops;
}

void tsad_program_straight(tsad_program *program, const tsad_net *net, int n_rows)
{
    program->n_ops = program->n_sources = 0;
    for (int k = 0; k < n_rows; k++) {
        program->row_start[k] = program->n_ops;
        for (int i = 0; i < net->n_nodes; i++) {
            emit(program, net->nodes[i].block < 0 ? TSAD_OP_NODE : TSAD_OP_COMPUTE, i);
        }
    }
    program->row_start[n_rows] = program->n_ops;
}

/* ---- the planner of a pruner ------------------------------------------------------------- */

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
static void choose_sources(tsad_worker *w, tsad_lane *lane, uint8_t *sources)
{
    const tsad_policy *p = w->policy;
    const tsad_model *m = p->model;
    int K = m->n_steps, B = m->n_blocks;
    int32_t threshold = 0;
    for (int k = 1; k < K; k++) {
        for (int b = 0; b < B; b++) {
            const float *score = lane->scores + ((size_t)(K - 1 - k) * (size_t)B + (size_t)b) * 4;
            size_t i = (size_t)k * (size_t)B + (size_t)b;
            sources[i] = (uint8_t)best_reuse(score);
            w->keys[i] = tsad_ordered_bits(float_bits(score[0] - score[sources[i]]));
        }
    }
    if (p->sparsity >= 0) {
        int64_t row_cost = 0;
        for (int b = 0; b < B; b++) {
            row_cost += m->block_cost[b];
        }
        int64_t budget = (int64_t)((1 - p->sparsity) * (double)m->dense_cost + 0.5) - row_cost;
        threshold = tsad_budget_threshold(w->keys + B, m->block_cost, B, (int64_t)(K - 1) * B,
                                          budget > 0 ? budget : 0);
    }
    memset(sources, TSAD_COMPUTE, (size_t)B);
    for (size_t i = (size_t)B; i < (size_t)K * (size_t)B; i++) {
        if (w->keys[i] >= threshold) {
            sources[i] = TSAD_COMPUTE;
        } else if (sources[i] == TSAD_REUSE_ROLLOUT && !lane->computed_at[i]) {
            sources[i] = TSAD_COMPUTE; /* nothing to reuse: compute, as the method's deployment */
            lane->stats.forced++;
        }
    }
}

static void note_statistics(const tsad_model *m, tsad_lane *lane)
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
    for (size_t i = 0; i < (size_t)m->n_steps * (size_t)m->n_blocks; i++) {
        if (lane->plan[i] == TSAD_REUSE_ROLLOUT && now - lane->computed_at[i] > stats->max_age) {
            stats->max_age = now - lane->computed_at[i];
        }
    }
}

void tsad_plan(tsad_worker *w, tsad_lane *lane)
{
    const tsad_model *m = w->policy->model;
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    bool first = lane->chunk == 0;
    lane->stats.forced = 0;
    if (lane->planner == TSAD_FIXED_PLAN) {
        lane->program = first ? &lane->first : &lane->steady;
        memcpy(lane->plan, first ? lane->plan_first : lane->plan_steady, cells);
    } else if (first) {
        lane->program = &w->policy->dense;
        memset(lane->plan, TSAD_COMPUTE, cells);
    } else {
        choose_sources(w, lane, lane->plan);
        tsad_program_compile(&lane->dynamic, m, lane->plan, w->last_of_block);
        lane->program = &lane->dynamic;
    }
    note_statistics(m, lane);
}
