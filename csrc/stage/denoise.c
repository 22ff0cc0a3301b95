/* denoise.c: noise -> actions along the lanes' programs. */
#include "stage.h"

#include <float.h>
#include <string.h>

/* remember when each slot was last written */
static void note_writes(const tsad_policy *p, tsad_lane *lane)
{
    if (lane->cold) {
        return;
    }
    if (lane->rollout_memory) {
        uint32_t now = (uint32_t)lane->chunk + 1;
        for (size_t i = 0; i < (size_t)p->own.n * (size_t)p->model->n_blocks; i++) {
            if (lane->plan[i] == TSAD_COMPUTE) {
                lane->computed_at[i] = now;
            }
        }
    }
    if (lane->planner == TSAD_ROW_RULE) {
        tsad_plan_by_rule(p, lane);
    }
    tsad_audit_end(p, lane);
    lane->chunk++;
    lane->stats.chunks = lane->chunk;
    lane->stats.spent += lane->stats.cost;
}

/* the previous chunk as it looks after the actions executed since, its share of a warm sample, with
 * noise or, where that is NULL, without: (T, A) */
static float *warm_sample(const tsad_gang *g, int i, const float *noise)
{
    const tsad_policy *p = g->policy;
    const tsad_model *m = p->model;
    int T = m->horizon, A = m->action_dim;
    for (int t = 0; t < T; t++) {
        const float *raw = tsad_expected(p, g->call, g->rows[i], t);
        for (int a = 0; a < A; a++) {
            float x = m->action_shift ? raw[a] - m->action_shift[a] : raw[a];
            x = x * m->action_scale[a] + m->action_offset[a];
            x *= p->signal;
            g->desk->sample[t * A + a] = noise ? x + p->noise_share * noise[t * A + a] : x;
        }
    }
    return g->desk->sample;
}

/* the sample that the i-th lane starts from into its register */
static tsad_status begin(const tsad_gang *g, int i)
{
    const tsad_model *m = g->policy->model;
    const tsad_call *call = g->call;
    size_t row = (size_t)g->rows[i], floats = (size_t)m->horizon * (size_t)m->action_dim;
    const float *start = call->initial ? call->initial + row * floats
                                       : call->noise + row * call->noise_lane +
                                             (size_t)g->steps->first * call->noise_step;
    bool warm = g->policy->warm_start && !tsad_gang_lane(g, i)->cold;
    if (warm && !call->noise_there) {
        start = warm_sample(g, i, start);
    }
    const float *all = call->initial ? call->initial : call->noise;
    tsad_rows rows = {.data = (float *)start,
                      .rows = m->horizon,
                      .channels = m->action_dim,
                      .stride = m->action_dim,
                      .there = call->noise_there,
                      .given = TSAD_GIVEN_NOISE,
                      .index = call->noise_there ? (size_t)(start - all) : 0};
    if (warm && call->noise_there) {
        rows.base = warm_sample(g, i, NULL);
        rows.share = g->policy->noise_share;
    }
    return m->backend->put(g->queue, i, TSAD_DENOISER, tsad_denoiser(m)->input, rows);
}

/* how actions are made of a sample: rows to be completed */
static tsad_rows raw_actions(const tsad_model *m)
{
    return (tsad_rows){.channels = m->action_dim,
                       .stride = m->action_dim,
                       .scale = m->action_scale,
                       .offset = m->action_offset,
                       .shift = m->action_shift};
}

/* what the host makes of a chunk's actions when all lanes are done (chunk.c): false, nothing */
static bool finish_of(const tsad_gang *g, int i, tsad_finish *finish)
{
    const tsad_policy *p = g->policy;
    const tsad_lane *lane = tsad_gang_lane(g, i);
    int T = p->model->horizon, A = p->model->action_dim;
    bool corrects = p->corrected && !lane->cold, led = p->lead != 0 && lane->has_previous;
    *finish = (tsad_finish){
        .clip = p->own.sampler[(size_t)(p->own.n - 1) * TSAD_SAMPLER_COLUMNS + TSAD_SAMPLER_CLIP],
        .gain = corrects && p->warm_start ? p->gain : NULL,
        .shift = corrects ? p->shift : NULL,
        .lead = led && !g->call->whole_horizon ? p->lead : 0,
        .smoothing = p->smoothing && !g->call->whole_horizon};
    if (finish->lead != 0 || (corrects && p->warm_start)) {
        for (int t = 0; t < T; t++) {
            memcpy(g->desk->sample + t * A, tsad_expected(p, g->call, g->rows[i], t),
                   sizeof(float) * (size_t)A);
        }
        finish->expected = g->desk->sample;
    }
    return corrects || finish->lead != 0 || finish->smoothing;
}

/* the i-th lane's actions into the caller's memory of the device */
static tsad_status hand_over(const tsad_gang *g, int i)
{
    const tsad_model *m = g->policy->model;
    bool whole = g->call->whole_horizon;
    tsad_finish finish;
    bool finishes = finish_of(g, i, &finish);
    tsad_rows rows = raw_actions(m);
    rows.first = whole ? 0 : m->n_obs_steps - 1;
    rows.rows = whole ? m->horizon : m->n_action_steps;
    rows.data = g->call->actions + (size_t)(g->rows[i] * rows.rows) * (size_t)m->action_dim;
    return m->backend->hand_over(g->queue, i, TSAD_DENOISER, tsad_denoiser(m)->input, rows,
                                 finishes ? &finish : NULL);
}

/* The i-th lane's normalised sample -> all actions in raw units. A slot that is not finite has made
 * the sample so, and that stays. */
static tsad_status emit_actions(const tsad_gang *g, int i)
{
    const tsad_model *m = g->policy->model;
    size_t floats = (size_t)m->horizon * (size_t)m->action_dim;
    tsad_rows rows = raw_actions(m);
    rows.data = g->policy->actions + (size_t)g->rows[i] * floats;
    rows.rows = m->horizon;
    TSAD_TRY(m->backend->get(g->queue, i, TSAD_DENOISER, tsad_denoiser(m)->input, rows));
    if (tsad_first_beyond(rows.data, floats, FLT_MAX) < floats) {
        tsad_gang_lane(g, i)->overflow = "actions";
        return TSAD_NOT_FINITE;
    }
    return TSAD_OK;
}

tsad_status tsad_emit(const tsad_gang *g)
{
    for (int i = 0; i < g->n; i++) {
        TSAD_TRY(emit_actions(g, i));
        note_writes(g->policy, tsad_gang_lane(g, i));
    }
    return TSAD_OK;
}

tsad_status tsad_denoise(const tsad_gang *g)
{
    const tsad_model *m = g->policy->model;
    const tsad_call *call = g->call;
    tsad_run runs[TSAD_GANG] = {0};
    for (int i = 0; i < g->n; i++) {
        tsad_lane *lane = tsad_gang_lane(g, i);
        const float *noise = call->noise ? call->noise + (size_t)g->rows[i] * call->noise_lane +
                                               (size_t)g->steps->first * call->noise_step
                                         : NULL;
        runs[i] = (tsad_run){.lane = tsad_gang_index(g, i),
                             .part = TSAD_DENOISER,
                             .program = lane->program,
                             .first_step = g->steps->first,
                             .rollout = lane->rollout_memory && !lane->cold,
                             .fixed = tsad_is_fixed(g->policy, tsad_gang_index(g, i)),
                             .sums = lane->sums_use,
                             .sampler = g->steps->sampler,
                             .noise = noise,
                             .noise_step = call->noise_step,
                             .noise_there = noise && call->noise_there && !call->initial,
                             .noise_index = noise ? (size_t)(noise - call->noise) : 0};
        runs[i].audit = tsad_audit_begin(g->policy, lane);
        if (lane->planner == TSAD_ROW_RULE) {
            runs[i].rule = &g->policy->rule;
            runs[i].rest = &lane->steady;
            runs[i].looked = lane->looked;
        }
        TSAD_TRY(begin(g, i));
    }
    TSAD_TRY(m->backend->run(g->queue, runs, g->n, 0, g->steps->n));
    for (int i = 0; i < g->n && call->actions_there; i++) {
        TSAD_TRY(hand_over(g, i));
    }
    return g->deferred ? TSAD_OK : tsad_emit(g);
}
