/* policy.c: a policy's plans, and the facts of its lanes. Arrays of numbers are its engine's
 * (backend.h); what it does with both is in chunk.c. Nothing allocates between the start and the
 * end of a chunk.
 */
#include "plan/plan_core.h"
#include "stage/stage.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- layout ------------------------------------------------------------------------------ */

static void layout_program(const tsad_model *m, tsad_program *program, int steps, tsad_arena *arena)
{
    int ops = steps * (tsad_denoiser(m)->n_nodes + 1);
    tsad_program_carve(program, arena, steps, ops, steps * m->n_blocks);
}

static void layout_lane(const tsad_policy *p, tsad_lane *lane, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    int K = p->own.n;
    size_t cells = (size_t)K * (size_t)m->n_blocks;
    lane->plan = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_first = TSAD_CARVE(arena, uint8_t, cells);
    lane->plan_steady = TSAD_CARVE(arena, uint8_t, cells);
    lane->looked = TSAD_CARVE(arena, uint8_t, K);
    lane->computed_at = TSAD_CARVE(arena, uint32_t, cells);
    lane->audit.known = TSAD_CARVE(arena, int32_t, m->n_blocks);
    lane->audit.wrote = TSAD_CARVE(arena, int32_t, m->n_blocks);
    layout_program(m, &lane->first, K, arena);
    layout_program(m, &lane->steady, K, arena);
    if (tsad_has_pruner(p)) {
        layout_program(m, &lane->dynamic, K, arena);
    }
    lane->previous = TSAD_CARVE(arena, float, m->horizon * m->action_dim);
    if (p->warm_start) {
        layout_program(m, &lane->cold_program, p->all.n, arena);
    }
}

static void layout_desk(const tsad_policy *p, tsad_desk *desk, tsad_arena *arena)
{
    const tsad_model *m = p->model;
    desk->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    if (tsad_has_pruner(p)) {
        desk->keys = TSAD_CARVE(arena, int32_t, m->n_steps * m->n_blocks);
        desk->scores = TSAD_CARVE(arena, float, m->array_floats[TSAD_ARRAY_SCORES]);
    }
    desk->sample = TSAD_CARVE(arena, float, m->horizon * m->action_dim);
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
        layout_lane(p, p->lanes ? &p->lanes[i] : &unplaced, arena);
    }
    for (int i = 0; i < p->n_threads; i++) {
        tsad_desk unplaced = {0};
        layout_desk(p, p->desks ? &p->desks[i] : &unplaced, arena);
    }
    p->noise = TSAD_CARVE(
        arena, float,
        (size_t)p->n_lanes *(size_t)m->n_steps *(size_t)m->horizon *(size_t)m->action_dim);
    p->actions =
        TSAD_CARVE(arena, float, (size_t)p->n_lanes *(size_t)m->horizon *(size_t)m->action_dim);
    p->rows = TSAD_CARVE(arena, int, p->n_lanes);
    p->deferred_lanes = TSAD_CARVE(arena, int, p->n_lanes);
    p->deferred_executed = TSAD_CARVE(arena, int, p->n_lanes);
    p->gain = TSAD_CARVE(arena, float, m->horizon * m->action_dim);
    p->shift = TSAD_CARVE(arena, float, m->horizon * m->action_dim);
    if (p->warm_start) {
        p->own.sampler = TSAD_CARVE(arena, float, p->own.n *TSAD_SAMPLER_COLUMNS);
    }
    p->last_of_block = TSAD_CARVE(arena, int32_t, m->n_blocks);
    p->dense_plan = TSAD_CARVE(arena, uint8_t, cells);
    p->filled = TSAD_CARVE(arena, uint8_t, cells);
    int encode_rows = m->encode_rows ? m->n_steps : tsad_program_encoder_rows(encoder);
    int encode_ops = (m->encode_rows ? m->n_steps : 1) * encoder->n_nodes;
    layout_program(m, &p->dense, m->n_steps, arena);
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
        if (p->warm_start) {
            tsad_program_compile(&p->lanes[i].cold_program, m, p->dense_plan, false,
                                 p->last_of_block);
        }
    }
}

static tsad_status check_warm_start(const tsad_warm_start *warm, tsad_policy *p)
{
    if (warm->n_steps < 1 || warm->n_steps > p->all.n) {
        return tsad_fail(TSAD_ARGUMENT, "warm_start: expected 1 to %d steps, got %d", p->all.n,
                         warm->n_steps);
    }
    if (!isfinite(warm->signal) || !isfinite(warm->noise)) {
        return tsad_fail(TSAD_ARGUMENT, "warm_start: expected finite shares, got %g and %g",
                         (double)warm->signal, (double)warm->noise);
    }
    TSAD_TRY(tsad_sampler_check(warm->sampler, warm->n_steps, &p->own.adds_noise));
    p->own.n = warm->n_steps;
    p->own.first = p->all.n - warm->n_steps;
    p->warm_start = true;
    p->signal = warm->signal;
    p->noise_share = warm->noise;
    return TSAD_OK;
}

tsad_status tsad_policy_create(tsad_model *model, const tsad_warm_start *warm, int n_lanes,
                               int n_threads, tsad_policy **out)
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
    p->all = p->own = (tsad_steps){
        .n = model->n_steps, .sampler = model->sampler, .adds_noise = model->adds_noise};
    tsad_status status = warm ? check_warm_start(warm, p) : TSAD_OK;
    if (status == TSAD_OK) {
        layout(p, &p->arena);
        status = tsad_arena_allocate(&p->arena);
    }
    if (status == TSAD_OK) {
        layout(p, &p->arena);
        status = model->backend->open(model, n_lanes, n_threads, &p->engine);
    }
    if (status != TSAD_OK) {
        tsad_policy_destroy(p);
        return status;
    }
    if (warm) {
        memcpy(p->own.sampler, warm->sampler,
               sizeof(float) * (size_t)p->own.n * TSAD_SAMPLER_COLUMNS);
    }
    for (int i = 0; i < n_lanes; i++) {
        p->lanes[i].cold = p->warm_start;
    }
    compile_fixed(p);
    *out = p;
    return TSAD_OK;
}

tsad_status tsad_policy_set_lead(tsad_policy *p, float lead, int smoothing)
{
    if (!(lead >= 0 && lead <= TSAD_MAX_LEAD)) {
        return tsad_fail(TSAD_ARGUMENT, "lead: expected a number from 0 (none) to %g, got %g",
                         (double)TSAD_MAX_LEAD, (double)lead);
    }
    p->lead = lead;
    p->smoothing = smoothing != 0;
    return TSAD_OK;
}

tsad_status tsad_policy_set_correction(tsad_policy *p, const float *gain, const float *shift)
{
    const tsad_model *m = p->model;
    int A = m->action_dim;
    size_t n = (size_t)m->horizon * (size_t)A;
    TSAD_TRY(tsad_check_numbers("gain", gain, n));
    TSAD_TRY(tsad_check_numbers("shift", shift, n));
    for (size_t i = 0; i < n && !p->warm_start; i++) {
        if (gain[i] != 0) {
            return tsad_fail(
                TSAD_ARGUMENT,
                "gain: expected zeros, as no chunk starts from the one before, got %g; "
                "it takes a warm start",
                (double)gain[i]);
        }
    }
    for (size_t i = 0; i < n; i++) {
        p->gain[i] = gain[i];
        p->shift[i] = shift[i] / m->action_scale[i % (size_t)A];
    }
    p->corrected = true;
    return TSAD_OK;
}

void tsad_policy_destroy(tsad_policy *p)
{
    if (!p) {
        return;
    }
    tsad_policy_settle(p); /* which nobody hears of */
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

/* ---- arrays of callers on the device ------------------------------------------------------ */

int tsad_policy_owns(const tsad_policy *p, int device_type, int device_id)
{
    const tsad_backend *backend = p->model->backend;
    return backend->owns && backend->owns(device_type, device_id);
}

/* ---- plans ------------------------------------------------------------------------------- */

static void forget_rollouts(const tsad_policy *p, tsad_lane *lane)
{
    size_t cells = (size_t)p->own.n * (size_t)p->model->n_blocks;
    memset(lane->computed_at, 0, sizeof(uint32_t) * cells);
}

static bool reads_rollouts(const tsad_policy *p, const uint8_t *sources)
{
    return memchr(sources, TSAD_REUSE_ROLLOUT, (size_t)p->own.n * (size_t)p->model->n_blocks);
}

void tsad_policy_reset(tsad_policy *p, int index)
{
    tsad_lane *lane = &p->lanes[index];
    forget_rollouts(p, lane);
    /* An episode remembers what its own plans ask for: a plan set in the middle of an earlier one
     * makes no difference. */
    lane->rollout_memory =
        lane->planner == TSAD_PRUNER_PLAN ||
        (lane->planner == TSAD_FIXED_PLAN && reads_rollouts(p, lane->plan_steady));
    lane->chunk = lane->stats.chunks = 0;
    lane->stats.spent = 0;
    lane->sums_ready = false;
    tsad_audit_forget(p, lane);
    lane->cold = p->warm_start;
    lane->has_previous = false;
}

/* one lane's plan that the resolver refuses */
static tsad_status refuse(const tsad_policy *p, int lane, const char *which, tsad_plan_fault fault,
                          const char *advice)
{
    const tsad_net *net = tsad_denoiser(p->model);
    char of[32] = "";
    if (p->n_lanes > 1) {
        snprintf(of, sizeof of, " (lane %d)", lane);
    }
    return tsad_fail(TSAD_PLAN, "%s: step %d, block %d (%s): %s; %s%s", which, fault.step,
                     fault.block, net->nodes[net->block_node[fault.block]].label,
                     tsad_plan_reason_text(fault.reason), advice, of);
}

static tsad_status remember_rollouts(tsad_policy *p)
{
    if (!p->rollout_memory) {
        TSAD_TRY(p->model->backend->remember_rollouts(p->engine, p->own.n));
        p->rollout_memory = true;
    }
    return TSAD_OK;
}

/* a lane's slots hold K rows from now on; earlier rollouts, if any, are forgotten */
static void use_rollout_memory(const tsad_policy *p, tsad_lane *lane)
{
    if (!lane->rollout_memory) {
        lane->rollout_memory = true;
        forget_rollouts(p, lane);
    }
}

/* Would this lane take these plans now? */
static tsad_status check_plan(const tsad_policy *p, int index, const tsad_lane_plan *plan)
{
    const char *compute = "set this cell to compute (0)";
    const tsad_lane *lane = &p->lanes[index];
    int K = p->own.n, B = p->model->n_blocks;
    size_t cells = (size_t)K * (size_t)B;
    const uint8_t *types = tsad_denoiser(p->model)->block_type;
    tsad_plan_fault fault = tsad_plan_resolve(plan->first, K, B, types, NULL, NULL);
    if (fault.reason != TSAD_PLAN_VALID) {
        return refuse(p, index, "first", fault, compute);
    }
    if (plan->cold) {
        fault = tsad_plan_resolve(plan->cold, p->all.n, B, types, NULL, NULL);
        if (fault.reason != TSAD_PLAN_VALID) {
            return refuse(p, index, "cold_plan", fault, compute);
        }
    }
    for (size_t i = 0; i < cells; i++) {
        p->filled[i] = plan->first[i] == TSAD_COMPUTE;
    }
    fault = tsad_plan_resolve(plan->sources, K, B, types, p->filled, NULL);
    if (fault.reason != TSAD_PLAN_VALID) {
        return refuse(p, index, "plan", fault,
                      fault.reason == TSAD_PLAN_EMPTY_ROLLOUT
                          ? "let the plan's `first` compute it, or set this cell to compute (0)"
                          : compute);
    }
    if (lane->chunk > 0 && reads_rollouts(p, plan->sources)) {
        for (size_t i = 0; i < cells; i++) {
            p->filled[i] = lane->rollout_memory && lane->computed_at[i] != 0;
        }
        fault = tsad_plan_resolve(plan->sources, K, B, types, p->filled, NULL);
        if (fault.reason != TSAD_PLAN_VALID) {
            return refuse(p, index, "plan", fault,
                          "call reset() first and then set the plan, or set this cell to compute "
                          "(0)");
        }
    }
    return TSAD_OK;
}

/* what check_plan has let through; the engine remembers rollouts where it needs them */
static void apply_plan(tsad_policy *p, int index, const tsad_lane_plan *plan)
{
    const tsad_model *m = p->model;
    tsad_lane *lane = &p->lanes[index];
    size_t cells = (size_t)p->own.n * (size_t)m->n_blocks;
    if (reads_rollouts(p, plan->sources)) {
        use_rollout_memory(p, lane);
    } else if (lane->chunk == 0) { /* in mid-episode what is kept stays kept */
        lane->rollout_memory = false;
        forget_rollouts(p, lane);
    }
    lane->planner = TSAD_FIXED_PLAN;
    memcpy(lane->plan_first, plan->first, cells);
    memcpy(lane->plan_steady, plan->sources, cells);
    tsad_program_compile(&lane->first, m, plan->first, false, p->last_of_block);
    tsad_program_compile(&lane->steady, m, plan->sources, true, p->last_of_block);
    if (p->warm_start) {
        tsad_program_compile(&lane->cold_program, m, plan->cold ? plan->cold : p->dense_plan, false,
                             p->last_of_block);
    }
    tsad_sums_begin(lane, m->backend->prepare(p->engine, index, &lane->steady));
}

tsad_status tsad_policy_set_plans(tsad_policy *p, int first, int n, const tsad_lane_plan *plans)
{
    bool rollouts = false;
    for (int i = 0; i < n; i++) {
        TSAD_TRY(check_plan(p, first + i, &plans[i]));
        rollouts |= reads_rollouts(p, plans[i].sources);
    }
    if (rollouts) {
        TSAD_TRY(remember_rollouts(p)); /* nothing after it can fail */
    }
    for (int i = 0; i < n; i++) {
        apply_plan(p, first + i, &plans[i]);
    }
    return TSAD_OK;
}

tsad_status tsad_policy_set_plan(tsad_policy *p, int lane, const uint8_t *sources,
                                 const uint8_t *first)
{
    return tsad_policy_set_plans(p, lane, 1, &(tsad_lane_plan){.sources = sources, .first = first});
}

tsad_status tsad_policy_set_pruner(tsad_policy *p, double sparsity)
{
    if (!tsad_has_pruner(p)) {
        return tsad_fail(TSAD_ARGUMENT, "planner: this policy has no pruner");
    }
    if (isnan(sparsity) || sparsity > 1) {
        return tsad_fail(TSAD_ARGUMENT, "sparsity: expected at most 1, got %g", sparsity);
    }
    TSAD_TRY(remember_rollouts(p));
    for (int i = 0; i < p->n_lanes; i++) {
        use_rollout_memory(p, &p->lanes[i]);
        p->lanes[i].planner = TSAD_PRUNER_PLAN;
    }
    p->sparsity = sparsity;
    return TSAD_OK;
}

/* whether branches are kept before a gate of their own */
static bool is_gated(const tsad_net *net)
{
    bool gated = false;
    for (int i = 0; i < net->n_nodes; i++) {
        gated |= net->nodes[i].cache_point == TSAD_BEFORE_GATE;
    }
    return gated;
}

tsad_status tsad_policy_set_rule(tsad_policy *p, const tsad_rule *rule)
{
    const tsad_model *m = p->model;
    const tsad_net *net = tsad_denoiser(m);
    int K = p->own.n, B = m->n_blocks;
    if (!m->backend->rules || net->wide || is_gated(net) || p->warm_start) {
        return tsad_fail(TSAD_ARGUMENT, "planner: expected a CPU, the transformer of Diffusion "
                                        "Policy and no warm start, for a rule that decides within "
                                        "a chunk; choose another planner");
    }
    if (rule->blocks < 0 || rule->blocks >= B || !(rule->threshold >= 0) || rule->most < 1) {
        return tsad_fail(TSAD_ARGUMENT,
                         "planner: expected 0 to %d blocks, a threshold and a bound "
                         "from 0 and 1, got %d, %g and %d",
                         B - 1, rule->blocks, rule->threshold, rule->most);
    }
    p->rule = *rule;
    for (int i = 0; i < p->n_lanes; i++) {
        tsad_lane *lane = &p->lanes[i];
        lane->planner = TSAD_ROW_RULE;
        lane->rollout_memory = false;
        forget_rollouts(p, lane);
        for (int cell = 0; cell < K * B; cell++) {
            lane->plan_steady[cell] =
                cell < B || cell % B < rule->blocks ? TSAD_COMPUTE : TSAD_REUSE_STEP;
        }
        tsad_program_compile(&lane->steady, m, lane->plan_steady, false, p->last_of_block);
        tsad_program_part_rows(&lane->steady);
        tsad_sums_begin(lane, false);
    }
    return TSAD_OK;
}

tsad_status tsad_policy_set_audit(tsad_policy *p, int on)
{
    const tsad_net *net = tsad_denoiser(p->model);
    if (on && (!p->model->backend->audits || net->wide || is_gated(net))) {
        return tsad_fail(TSAD_ARGUMENT, "audit: expected a CPU and the transformer of Diffusion "
                                        "Policy, for computed cells to be compared with what they "
                                        "replace; leave it out");
    }
    p->audits = on != 0;
    for (int i = 0; i < p->n_lanes; i++) {
        tsad_audit_forget(p, &p->lanes[i]);
    }
    return TSAD_OK;
}

/* ---- facts ------------------------------------------------------------------------------- */

void tsad_policy_get_audit(const tsad_policy *p, int lane, double *sums)
{
    const tsad_audit *audit = &p->lanes[lane].audit;
    for (int kind = 0; kind < TSAD_N_AUDITS; kind++) {
        sums[2 * kind] = ldexp((double)audit->apart[kind], -TSAD_AUDIT_BITS);
        sums[2 * kind + 1] = ldexp((double)audit->size[kind], -TSAD_AUDIT_BITS);
    }
}

void tsad_policy_get_plan(const tsad_policy *p, int lane, uint8_t *sources)
{
    memcpy(sources, p->lanes[lane].plan, (size_t)p->own.n * (size_t)p->model->n_blocks);
}

void tsad_policy_get_ages(const tsad_policy *p, int lane, uint32_t *ages)
{
    const tsad_lane *l = &p->lanes[lane];
    for (size_t i = 0; i < (size_t)p->own.n * (size_t)p->model->n_blocks; i++) {
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

int tsad_policy_noise_steps(const tsad_policy *p, int lane, int *first)
{
    const tsad_steps *steps = tsad_lane_steps(p, &p->lanes[lane]);
    *first = steps->first;
    return steps->adds_noise ? steps->n : 1;
}

tsad_model_info tsad_policy_get_info(const tsad_policy *p)
{
    tsad_model_info info = tsad_model_get_info(p->model);
    info.n_steps = p->own.n;
    info.adds_noise = p->own.adds_noise;
    info.has_pruner = tsad_has_pruner(p);
    return info;
}
