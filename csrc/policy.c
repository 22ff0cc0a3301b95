/* policy.c: a policy's memory and its plans. What it does with them is in chunk.c.
 *
 * Memory is two arenas. The first holds everything of fixed size; the second the branch outputs
 * (slots): one row a lane, or K rows once a plan reuses earlier rollouts. Nothing allocates
 * between the start and the end of a chunk.
 */
#include "backend.h"
#include "plan_core.h"

#include <math.h>
#include <string.h>

/* ---- layout ------------------------------------------------------------------------------ */

static float **carve_registers(tsad_arena *arena, const tsad_net *net)
{
    float **list = TSAD_CARVE(arena, float *, net->n_registers + 1);
    for (int r = 0; r < net->n_registers; r++) {
        float *data = TSAD_CARVE(arena, float, tsad_register_floats(&net->registers[r]));
        if (list) {
            list[r] = data;
        }
    }
    return list;
}

static void layout_member(const tsad_policy *p, tsad_member *member, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    member->registers = carve_registers(arena, &m->net);
    member->encoder_registers = carve_registers(arena, &m->encoder);
    member->previous_x0 = TSAD_CARVE(arena, float, m->horizon *tsad_pad(m->action_dim));
    for (int i = 0; i < TSAD_REMEMBERED; i++) {
        member->sums[i] = TSAD_CARVE(arena, float, p->branch_floats);
        member->tables[i] = TSAD_CARVE(arena, float, m->horizon * (1 + 2 * m->action_dim));
    }
    member->table_ready = TSAD_CARVE(arena, bool, TSAD_REMEMBERED);
}

static void layout_worker(tsad_policy *p, tsad_worker *w, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    w->policy = p;
    w->members = TSAD_CARVE(arena, tsad_member, p->gang);
    for (int i = 0; i < p->gang; i++) {
        tsad_member unplaced = {0};
        layout_member(p, w->members ? &w->members[i] : &unplaced, arena);
    }
    w->pruner_registers = carve_registers(arena, &m->pruner_net);
    w->scratch = TSAD_CARVE(arena, float, m->backend->scratch_floats(m) * (size_t)p->gang);
    w->read_epoch = TSAD_CARVE(arena, uint32_t, m->n_blocks);
    w->write_epoch = TSAD_CARVE(arena, uint32_t, m->n_blocks);
    w->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    w->keys = TSAD_CARVE(arena, int32_t, m->n_steps * m->n_blocks);
}

static void layout_lane(const tsad_policy *p, tsad_lane *lane, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    size_t rows = m->encode_rows ? (size_t)m->n_steps : 1;
    size_t tokens = m->encode_rows ? (size_t)m->n_memory : (size_t)m->n_obs_steps;
    int ops = m->n_steps * (m->net.n_nodes + 1);
    lane->plan = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_first = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_steady = TSAD_CARVE(arena, uint8_t, cells);
    lane->computed_at = TSAD_CARVE(arena, uint32_t, cells);
    tsad_program_carve(&lane->first, arena, m->n_steps, ops, (int)cells);
    tsad_program_carve(&lane->steady, arena, m->n_steps, ops, (int)cells);
    if (m->encoder.n_nodes) {
        lane->fold = TSAD_CARVE(arena, float, rows *(size_t)m->n_layers * tokens * m->fold.floats);
    }
    if (m->has_pruner) {
        size_t hidden = (size_t)m->pruner.hidden, heads = (size_t)m->pruner.n_heads;
        tsad_program_carve(&lane->dynamic, arena, m->n_steps, ops, (int)cells);
        lane->memory = TSAD_CARVE(arena, float, rows * tokens * (size_t)tsad_pad(m->width));
        lane->prune_score = TSAD_CARVE(arena, float, rows * tokens * (size_t)m->n_blocks * heads);
        lane->prune_value = TSAD_CARVE(arena, float, rows * tokens * heads * hidden);
        lane->scores = TSAD_CARVE(arena, float, cells * 4);
    }
}

static void layout(tsad_policy *p, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    tsad_lane *lanes = TSAD_CARVE(arena, tsad_lane, p->n_lanes + 1);
    tsad_worker *workers = TSAD_CARVE(arena, tsad_worker, p->n_threads);
    p->lanes = lanes;
    p->workers = workers;
    for (int i = 0; i <= p->n_lanes; i++) {
        tsad_lane unplaced = {0};
        layout_lane(p, lanes ? &lanes[i] : &unplaced, arena);
    }
    for (int i = 0; i < p->n_threads; i++) {
        tsad_worker unplaced = {0};
        layout_worker(p, workers ? &workers[i] : &unplaced, arena);
    }
    p->barrier = TSAD_CARVE(arena, tsad_barrier, 1);
    p->meeting = TSAD_CARVE(arena, tsad_meeting, 1);
    p->exchange = TSAD_CARVE(arena, float, 2 * TSAD_PARTS * p->branch_floats);
    p->noise = TSAD_CARVE(
        arena, float,
        (size_t)p->n_lanes *(size_t)m->n_steps *(size_t)m->horizon *(size_t)m->action_dim);
    p->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    p->dense_plan = TSAD_CARVE(arena, uint8_t, cells);
    p->filled = TSAD_CARVE(arena, uint8_t, cells);
    int ops = m->n_steps * (m->net.n_nodes + 1);
    int encode_rows = m->encode_rows ? m->n_steps : tsad_program_encoder_rows(&m->encoder);
    int encode_ops = (m->encode_rows ? m->n_steps : 1) * m->encoder.n_nodes;
    tsad_program_carve(&p->dense, arena, m->n_steps, ops, (int)cells);
    tsad_program_carve(&p->encode, arena, encode_rows, encode_ops, 1);
    int prune_rows = m->pruner.at_once ? 1 : m->n_steps;
    tsad_program_carve(&p->prune, arena, prune_rows, prune_rows * m->pruner_net.n_nodes, 1);
}

/* Slots for every lane, `rows` rows each (the lane of predict_noise needs one). On failure the
 * old slots stay. */
static tsad_status place_slots(tsad_policy *p, int rows)
{
    size_t floats = p->model->net.row_floats;
    tsad_arena arena = {0};
    for (int i = 0; i <= p->n_lanes; i++) {
        TSAD_CARVE(&arena, float, floats *(size_t)(i < p->n_lanes ? rows : 1));
    }
    TSAD_TRY(tsad_arena_allocate(&arena));
    for (int i = 0; i <= p->n_lanes; i++) {
        p->lanes[i].slots = TSAD_CARVE(&arena, float, floats *(size_t)(i < p->n_lanes ? rows : 1));
    }
    tsad_arena_free(&p->slot_arena);
    p->slot_arena = arena;
    p->slot_rows = rows;
    return TSAD_OK;
}

static void compile_fixed(tsad_policy *p)
{
    const tsad_model *m = p->model;
    tsad_program_compile(&p->dense, m, p->dense_plan, false, p->last_of_block);
    if (m->encode_rows) {
        tsad_program_straight(&p->encode, &m->encoder, p->encode.n_rows);
    } else {
        tsad_program_encoder(&p->encode, &m->encoder);
    }
    tsad_program_straight(&p->prune, &m->pruner_net, p->prune.n_rows);
    for (int i = 0; i <= p->n_lanes; i++) {
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
    p->gang = n_lanes < TSAD_GANG ? n_lanes : TSAD_GANG;
    p->sparsity = -1;
    for (int b = 0; b < model->n_blocks; b++) {
        const tsad_node *node = &model->net.nodes[model->net.block_node[b]];
        size_t floats = tsad_register_floats(&model->net.registers[node->out]);
        p->branch_floats = floats > p->branch_floats ? floats : p->branch_floats;
    }
    layout(p, &p->arena);
    tsad_status status = tsad_arena_allocate(&p->arena);
    if (status == TSAD_OK) {
        layout(p, &p->arena);
        status = place_slots(p, 1);
    }
    if (status != TSAD_OK) {
        tsad_policy_destroy(p);
        return status;
    }
    compile_fixed(p);
    tsad_team_reserve(n_threads);
    *out = p;
    return TSAD_OK;
}

void tsad_policy_destroy(tsad_policy *p)
{
    if (!p) {
        return;
    }
    for (int i = 0; p->lanes && i < p->n_lanes; i++) {
        tsad_arena_free(&p->lanes[i].sum_arena);
    }
    tsad_arena_free(&p->slot_arena);
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
    const tsad_net *net = &p->model->net;
    return tsad_fail(TSAD_PLAN, "%s: step %d, block %d (%s): %s; %s", which, fault.step,
                     fault.block, net->nodes[net->block_node[fault.block]].label,
                     tsad_plan_reason_text(fault.reason), advice);
}

/* a lane's slots hold K rows from now on; earlier rollouts, if any, are forgotten */
static tsad_status use_rollout_memory(tsad_policy *p, tsad_lane *lane)
{
    if (p->slot_rows != p->model->n_steps) {
        TSAD_TRY(place_slots(p, p->model->n_steps));
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
    const uint8_t *types = m->net.block_type;
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
    tsad_sums_place(lane);
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
    size_t bytes = p->arena.size + p->slot_arena.size;
    for (int i = 0; i < p->n_lanes; i++) {
        bytes += p->lanes[i].sum_arena.size;
    }
    return bytes;
}

float *tsad_policy_noise_buffer(tsad_policy *p) { return p->noise; }
