/* denoise.c: noise -> actions along the lanes' programs. */
#include "stage.h"

#include <float.h>

/* remember when each slot was last written */
static void note_writes(const tsad_model *m, tsad_lane *lane)
{
    if (lane->rollout_memory) {
        uint32_t now = (uint32_t)lane->chunk + 1;
        for (size_t i = 0; i < (size_t)m->n_steps * (size_t)m->n_blocks; i++) {
            if (lane->plan[i] == TSAD_COMPUTE) {
                lane->computed_at[i] = now;
            }
        }
    }
    lane->chunk++;
    lane->stats.chunks = lane->chunk;
}

/* the sample of pure noise into the i-th lane's register */
static tsad_status begin(const tsad_gang *g, int i)
{
    const tsad_model *m = g->policy->model;
    size_t row = (size_t)(g->row + i), floats = (size_t)m->horizon * (size_t)m->action_dim;
    const float *start = g->call->initial ? g->call->initial + row * floats
                                          : g->call->noise + row * g->call->noise_lane;
    tsad_rows rows = {.data = (float *)start,
                      .rows = m->horizon,
                      .channels = m->action_dim,
                      .stride = m->action_dim};
    return m->backend->put(g->queue, i, TSAD_DENOISER, tsad_denoiser(m)->input, rows);
}

/* The i-th lane's normalised sample -> all actions in raw units. A slot that is not finite has made
 * the sample so, and that stays. */
static tsad_status emit_actions(const tsad_gang *g, int i)
{
    const tsad_model *m = g->policy->model;
    size_t floats = (size_t)m->horizon * (size_t)m->action_dim;
    tsad_rows rows = {.data = g->policy->actions + (size_t)(g->row + i) * floats,
                      .rows = m->horizon,
                      .channels = m->action_dim,
                      .stride = m->action_dim,
                      .scale = m->action_scale,
                      .offset = m->action_offset,
                      .shift = m->action_shift};
    TSAD_TRY(m->backend->get(g->queue, i, TSAD_DENOISER, tsad_denoiser(m)->input, rows));
    if (tsad_first_beyond(rows.data, floats, FLT_MAX) < floats) {
        tsad_gang_lane(g, i)->overflow = "actions";
        return TSAD_NOT_FINITE;
    }
    return TSAD_OK;
}

tsad_status tsad_denoise(const tsad_gang *g)
{
    const tsad_model *m = g->policy->model;
    const tsad_call *call = g->call;
    tsad_run runs[TSAD_GANG] = {0};
    for (int i = 0; i < g->n; i++) {
        const tsad_lane *lane = tsad_gang_lane(g, i);
        size_t row = (size_t)(g->row + i);
        runs[i] = (tsad_run){.lane = tsad_gang_index(g, i),
                             .part = TSAD_DENOISER,
                             .program = lane->program,
                             .rollout = lane->rollout_memory,
                             .sums = lane->sums_use,
                             .update = true,
                             .noise = call->noise ? call->noise + row * call->noise_lane : NULL,
                             .noise_step = call->noise_step};
        TSAD_TRY(begin(g, i));
    }
    TSAD_TRY(m->backend->run(g->queue, runs, g->n, 0, m->n_steps));
    for (int i = 0; i < g->n; i++) {
        TSAD_TRY(emit_actions(g, i));
        note_writes(m, tsad_gang_lane(g, i));
    }
    return TSAD_OK;
}
