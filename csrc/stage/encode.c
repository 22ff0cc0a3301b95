/* encode.c: observation -> memory, once per chunk. The observation tokens do not depend on the
 * step (Diffusion Policy's encoder works token by token), the time tokens are tables; only an
 * encoder with attention (n_cond_layers > 0) runs for every step. Families without an encoder
 * have nothing to do here. */
#include "../backend.h"

void tsad_encode(tsad_worker *w, tsad_lane *lane, const float *obs)
{
    tsad_policy *p = w->policy;
    const tsad_model *m = p->model;
    if (m->encoder.n_nodes == 0) {
        return;
    }
    int ld = tsad_pad(m->obs_dim);
    float *x = w->encoder_registers[m->encoder.input]; /* (To, O padded) */
    for (int t = 0; t < m->n_obs_steps; t++) {
        for (int i = 0; i < m->obs_dim; i++) {
            x[t * ld + i] = obs[t * m->obs_dim + i] * m->obs_scale[i] + m->obs_offset[i];
        }
    }
    tsad_run run = {
        .net = &m->encoder, .program = &p->encode, .registers = w->encoder_registers, .lane = lane};
    m->backend->run(w, &run, 0, p->encode.n_rows);
}
