/* encode.c: observation -> memory, once per chunk. The observation tokens do not depend on the
 * step (Diffusion Policy's encoder works token by token), the time tokens are tables; only an
 * encoder with attention (n_cond_layers > 0) runs for every step. Families without an encoder
 * have nothing to do here. */
#include "../backend.h"

void tsad_encode(tsad_worker *w, int n)
{
    tsad_policy *p = w->policy;
    const tsad_model *m = p->model;
    if (m->encoder.n_nodes == 0) {
        return;
    }
    int ld = tsad_pad(m->obs_dim);
    tsad_run runs[TSAD_GANG] = {0};
    for (int g = 0; g < n; g++) {
        const tsad_member *member = &w->members[g];
        float *x = member->encoder_registers[m->encoder.input]; /* (To, O padded) */
        for (int t = 0; t < m->n_obs_steps; t++) {
            for (int i = 0; i < m->obs_dim; i++) {
                float raw = member->obs[t * m->obs_dim + i];
                x[t * ld + i] = raw * m->obs_scale[i] + m->obs_offset[i];
            }
        }
        runs[g] = (tsad_run){.net = &m->encoder,
                             .program = &p->encode,
                             .registers = member->encoder_registers,
                             .lane = member->lane};
    }
    m->backend->run(w, runs, n, 0, p->encode.n_rows);
}
