/* denoise.c: noise -> actions along the lane's program. */
#include "../backend.h"

#include <string.h>

/* normalised sample (T, A padded) -> executed or all actions in raw units */
static void emit_actions(const tsad_model *m, const float *x, const tsad_call *call, int row)
{
    int from = call->whole_horizon ? 0 : m->n_obs_steps - 1;
    int n = call->whole_horizon ? m->horizon : m->n_action_steps;
    int ld = tsad_pad(m->action_dim);
    float *out = call->actions + (size_t)row * (size_t)n * (size_t)m->action_dim;
    for (int t = 0; t < n; t++) {
        for (int a = 0; a < m->action_dim; a++) {
            out[t * m->action_dim + a] =
                (x[(from + t) * ld + a] - m->action_offset[a]) / m->action_scale[a];
        }
    }
}

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

void tsad_denoise(tsad_worker *w, tsad_lane *lane, const tsad_call *call, int row)
{
    const tsad_model *m = w->policy->model;
    int T = m->horizon, A = m->action_dim, ld = tsad_pad(A);
    const float *noise = call->noise ? call->noise + (size_t)row * call->noise_lane : NULL;
    const float *start =
        call->initial ? call->initial + (size_t)row * (size_t)T * (size_t)A : noise;
    float *x = w->registers[m->net.input]; /* (T, A padded) */
    for (int t = 0; t < T; t++) {
        memcpy(x + (size_t)t * (size_t)ld, start + (size_t)t * (size_t)A,
               sizeof(float) * (size_t)A);
    }
    memset(w->previous_x0, 0, sizeof(float) * (size_t)T * (size_t)ld);
    tsad_run run = {.net = &m->net,
                    .program = lane->program,
                    .registers = w->registers,
                    .lane = lane,
                    .noise = noise,
                    .noise_step = call->noise_step,
                    .update = true};
    m->backend->run(w, &run, 0, m->n_steps);
    if (w->rank == 0) {
        emit_actions(m, x, call, row);
        note_writes(m, lane);
    }
}
