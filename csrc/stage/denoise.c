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

/* the sample of pure noise */
static void begin(const tsad_model *m, const tsad_member *member, const tsad_call *call)
{
    int T = m->horizon, A = m->action_dim, ld = tsad_pad(A);
    size_t row = (size_t)member->row;
    const float *start = call->initial ? call->initial + row * (size_t)T * (size_t)A
                                       : call->noise + row * call->noise_lane;
    float *x = member->registers[m->net.input]; /* (T, A padded) */
    for (int t = 0; t < T; t++) {
        memcpy(x + (size_t)t * (size_t)ld, start + (size_t)t * (size_t)A,
               sizeof(float) * (size_t)A);
    }
    memset(member->previous_x0, 0, sizeof(float) * (size_t)T * (size_t)ld);
}

static tsad_run run_of(const tsad_model *m, const tsad_member *member, const tsad_call *call)
{
    const float *noise = call->noise ? call->noise + (size_t)member->row * call->noise_lane : NULL;
    return (tsad_run){.net = &m->net,
                      .program = member->lane->program,
                      .registers = member->registers,
                      .member = member,
                      .lane = member->lane,
                      .noise = noise,
                      .noise_step = call->noise_step,
                      .update = true};
}

void tsad_denoise(tsad_worker *w, int n, const tsad_call *call, int row)
{
    const tsad_model *m = w->policy->model;
    tsad_run runs[TSAD_GANG] = {0};
    for (int i = 0; i < n; i++) {
        runs[i] = run_of(m, &w->members[i], call);
        if (row == 0) {
            begin(m, &w->members[i], call);
        }
    }
    m->backend->run(w, runs, n, row, m->n_steps);
    for (int i = 0; i < n && w->rank == 0; i++) {
        const tsad_member *member = &w->members[i];
        emit_actions(m, member->registers[m->net.input], call, member->row);
        note_writes(m, member->lane);
    }
}
