/* policy.c: a policy's plans, and the facts of its lanes. Arrays of numbers are its engine's
 * (backend.h); what it does with both is in chunk.c. Nothing allocates between the start and the
 * end of a chunk.
 */
#include "plan/plan_core.h"
#include "stage/stage.h"

#include <math.h>
#include <string.h>

/* ---- layout ------------------------------------------------------------------------------ */

static void layout_lane(const tsad_model *m, tsad_lane *lane, tsad_arena *arena)
{
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    int ops = m->n_steps * (tsad_denoiser(m)->n_nodes + 1);
    lane->plan = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_first = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_steady = TSAD_CARVE(arena, uint8_t, cells);
    lane->computed_at = TSAD_CARVE(arena, uint32_t, cells);
    tsad_program_carve(&lane->first, arena, m->n_steps, ops, (int)cells);
    tsad_program_carve(&lane->steady, arena, m->n_steps, ops, (int)cells);
    if (m->has_pruner) {
        tsad_program_carve(&lane->dynamic, arena, m->n_steps, ops, (int)cells);
    }
}

static void layout_desk(const tsad_model *m, tsad_desk *desk, tsad_arena *arena)
{
    desk->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    desk->keys = TSAD_CARVE(arena, int32_t, m->n_steps * m->n_blocks);
    desk->scores = TSAD_CARVE(arena, float, m->array_floats[TSAD_ARRAY_SCORES]);
}

static void layout(tsad_policy *p, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    const tsad_net *encoder = &m->nets[TSAD_ENCODER], *pruner = &m->nets[TSAD_PRUNER_NET];
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    p->lanes = TSAD_CARVE(arena, tsad_lane, p->n_lanes);
    p->desks = TSAD_CARVE(arena, tsad_desk, p->n_threads);
    for (int i = 0; i < p->n_lanes; i++) {
        tsad_lane unplaced = {0};
        layout_lane(m, p->lanes ? &p->lanes[i] : &unplaced, arena);
    }
    for (int i = 0; i < p->n_threads; i++) {
        tsad_desk unplaced = {0};
        layout_desk(m, p->desks ? &p->desks[i] : &unplaced, arena);
    }
    p->noise = TSAD_CARVE(
        arena, float,
        (size_t)p->n_lanes *(size_t)m->n_steps *(size_t)m->horizon *(size_t)m->action_dim);
    p->actions =
        TSAD_CARVE(arena, float, (size_t)p->n_lanes *(size_t)m->horizon *(size_t)m->action_dim);
    p->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    p->dense_plan = TSAD_CARVE(arena, uint8_t, cells);
    p->filled = TSAD_CARVE(arena, uint8_t, cells);
    int ops = m->n_steps * (tsad_denoiser(m)->n_nodes + 1);
    int encode_rows = m->encode_rows ? m->n_steps : tsad_program_encoder_rows(encoder);
    int encode_ops = (m->encode_rows ? m->n_steps : 1) * encoder->n_nodes;
    tsad_program_carve(&p->dense, arena, m->n_steps, ops, (int)cells);
    tsad_program_carve(&p->encode, arena, encode_rows, encode_ops, 1);
    int prune_rows = m->pruner.at_once ? 1 : m->n_steps;
    tsad_program_carve(&p->prune, arena, prune_rows, prune_rows * pruner->n_nodes, 1);
}

static void compile_fixed(tsad_policy *p)
{
    const tsad_model *m = p->model;
    tsad_program_compile(&p->dense, m, p->dense_plan, false, p->last_of_block);
    if (m->encode_rows) {
        tsad_program_straight(&p->encode, &m->nets[TSAD_ENCODER], p->encode.n_rows);
    } else {
        tsad_program_encoder(&p->encode, &m->nets[TSAD_ENCODER]);
    }
    tsad_program_straight(&p->prune, &m->nets[TSAD_PRUNER_NET], p->prune.n_rows);
    for (int i = 0; i < p->n_lanes; i++) {
        tsad_program_compile(&p->lanes[i].first, m, p->dense_plan, false, p->last_of_block);
        tsad_program_compile(&p->lanes[i].steady, m, p->dense_plan, false, p->last_of_block);
    }
}

tsad_status tsad_policy_create(tsad_model *model, int n_lanes, int n_threads, tsad_policy **out)
{
    *out = NULL;
    if (n_lanes < 1 || n_lanes > 65536) {
        return tsad_fail(TSAD_ARGUMENT, "lanes: expected 1 to 65536, got %d", n_lanes);
    }
    if (n_threads < 1 || n_threads > 64) {
        return tsad_fail(TSAD_ARGUMENT, "threads: expected 1 to 64, got %d", n_threads);
    }
    tsad_policy *p = tsad_allocate(sizeof *p);
    if (!p) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a policy");
    }
    tsad_model_retain(model);
    p->model = model;
    p->n_lanes = n_lanes;
    p->n_threads = n_threads;
    p->sparsity = -1;
    layout(p, &p->arena);
    tsad_status status = tsad_arena_allocate(&p->arena);
    if (status == TSAD_OK) {
        layout(p, &p->arena);
        status = model->backend->open(model, n_lanes, n_threads, &p->engine);
    }
    if (status != TSAD_OK) {
        tsad_policy_destroy(p);
        return status;
    }
    compile_fixed(p);
    *out = p;
    return TSAD_OK;
}

void tsad_policy_destroy(tsad_policy *p)
{
    if (!p) {
        return;
    }
    p->model->backend->close(p->engine);
    tsad_arena_free(&p->arena);
    tsad_model_destroy(p->model);
    tsad_deallocate(p);
}

/* ---- one thread at a time ---------------------------------------------------------------- */

tsad_status tsad_policy_acquire(tsad_policy *p)
{
    int idle = 0;
    if (!atomic_compare_exchange_strong(&p->busy, &idle, 1)) {
        return tsad_fail(TSAD_BUSY, "the policy is running a chunk in another thread; a policy is "
                                    "used by one thread at a time");
    }
    return TSAD_OK;
}

void tsad_policy_release(tsad_policy *p) { atomic_store(&p->busy, 0); }

/* ---- plans ------------------------------------------------------------------------------- */

static void forget_rollouts(const tsad_policy *p, tsad_lane *lane)
{
    size_t cells = (size_t)p->model->n_steps * (size_t)p->model->n_blocks;
    memset(lane->computed_at, 0, sizeof(uint32_t) * cells);
}

void tsad_policy_reset(tsad_policy *p, int lane)
{
    forget_rollouts(p, &p->lanes[lane]);
    p->lanes[lane].chunk = p->lanes[lane].stats.chunks = 0;
    p->lanes[lane].sums_ready = false;
}

static tsad_status refuse(const tsad_policy *p, const char *which, tsad_plan_fault fault,
                          const char *advice)
{
    const tsad_net *net = tsad_denoiser(p->model);
    return tsad_fail(TSAD_PLAN, "%s: step %d, block %d (%s): %s; %s", which, fault.step,
                     fault.block, net->nodes[net->block_node[fault.block]].label,
                     tsad_plan_reason_text(fault.reason), advice);
}

/* a lane's slots hold K rows from now on; earlier rollouts, if any, are forgotten */
static tsad_status use_rollout_memory(tsad_policy *p, tsad_lane *lane)
{
    if (!p->rollout_memory) {
        TSAD_TRY(p->model->backend->remember_rollouts(p->engine));
        p->rollout_memory = true;
    }
    if (!lane->rollout_memory) {
        lane->rollout_memory = true;
        forget_rollouts(p, lane);
    }
    return TSAD_OK;
}

tsad_status tsad_policy_set_plan(tsad_policy *p, int index, const uint8_t *sources,
                                 const uint8_t *first)
{
    const tsad_model *m = p->model;
    tsad_lane *lane = &p->lanes[index];
    int K = m->n_steps, B = m->n_blocks;
    size_t cells = (size_t)K * (size_t)B;
    const uint8_t *types = tsad_denoiser(m)->block_type;
    tsad_plan_fault fault = tsad_plan_resolve(first, K, B, types, NULL, NULL);
    if (fault.reason != TSAD_PLAN_VALID) {
        return refuse(p, "first", fault, "set this cell to compute (0)");
    }
    bool rollout = false;
    for (size_t i = 0; i < cells; i++) {
        p->filled[i] = first[i] == TSAD_COMPUTE;
        rollout |= sources[i] == TSAD_REUSE_ROLLOUT;
    }
    fault = tsad_plan_resolve(sources, K, B, types, p->filled, NULL);
    if (fault.reason != TSAD_PLAN_VALID) {
        return refuse(p, "plan", fault,
                      fault.reason == TSAD_PLAN_EMPTY_ROLLOUT
                          ? "let the plan's `first` compute it, or set this cell to compute (0)"
                          : "set this cell to compute (0)");
    }
    if (lane->chunk > 0 && rollout) {
        for (size_t i = 0; i < cells; i++) {
            p->filled[i] = lane->rollout_memory && lane->computed_at[i] != 0;
        }
        fault = tsad_plan_resolve(sources, K, B, types, p->filled, NULL);
        if (fault.reason != TSAD_PLAN_VALID) {
            return refuse(p, "plan", fault,
                          "call reset() first and then set the plan, or set this cell to compute "
                          "(0)");
        }
    }
    if (rollout) {
        TSAD_TRY(use_rollout_memory(p, lane));
    } else if (lane->chunk == 0) { /* in mid-episode what is kept stays kept */
        lane->rollout_memory = false;
        forget_rollouts(p, lane);
    }
    lane->planner = TSAD_FIXED_PLAN;
    memcpy(lane->plan_first, first, cells);
    memcpy(lane->plan_steady, sources, cells);
    tsad_program_compile(&lane->first, m, first, false, p->last_of_block);
    tsad_program_compile(&lane->steady, m, sources, true, p->last_of_block);
    tsad_sums_begin(lane, m->backend->prepare(p->engine, index, &lane->steady));
    return TSAD_OK;
}

tsad_status tsad_policy_set_pruner(tsad_policy *p, double sparsity)
{
    if (!p->model->has_pruner) {
        return tsad_fail(TSAD_ARGUMENT, "planner: this policy has no pruner");
    }
    if (isnan(sparsity) || sparsity > 1) {
        return tsad_fail(TSAD_ARGUMENT, "sparsity: expected at most 1, got %g", sparsity);
    }
    for (int i = 0; i < p->n_lanes; i++) {
        TSAD_TRY(use_rollout_memory(p, &p->lanes[i]));
    }
    for (int i = 0; i < p->n_lanes; i++) {
        p->lanes[i].planner = TSAD_PRUNER_PLAN;
    }
    p->sparsity = sparsity;
    return TSAD_OK;
}

/* ---- facts ------------------------------------------------------------------------------- */

void tsad_policy_get_plan(const tsad_policy *p, int lane, uint8_t *sources)
{
    memcpy(sources, p->lanes[lane].plan, (size_t)p->model->n_steps * (size_t)p->model->n_blocks);
}

void tsad_policy_get_ages(const tsad_policy *p, int lane, uint32_t *ages)
{
    const tsad_lane *l = &p->lanes[lane];
    for (size_t i = 0; i < (size_t)p->model->n_steps * (size_t)p->model->n_blocks; i++) {
        ages[i] = l->computed_at[i] ? (uint32_t)l->chunk - l->computed_at[i] + 1 : 0;
    }
}

tsad_lane_stats tsad_policy_get_stats(const tsad_policy *p, int lane)
{
    return p->lanes[lane].stats;
}

void tsad_policy_get_timings(const tsad_policy *p, int64_t ns[TSAD_N_TIMERS])
{
    memcpy(ns, p->ns, sizeof p->ns);
}

size_t tsad_policy_bytes(const tsad_policy *p)
{
    return p->arena.size + p->model->backend->bytes(p->engine);
}

float *tsad_policy_noise_buffer(tsad_policy *p) { return p->noise; }
