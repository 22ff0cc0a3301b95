/* encode.c: observation -> memory, once per chunk. The observation tokens do not depend on the
 * step (Diffusion Policy's encoder works token by token), the time tokens are tables: a first row
 * makes the memory, the others fold it for one layer each. Only an encoder with attention
 * (n_cond_layers > 0) runs for every step. Families without an encoder have nothing to do here. */
#include "stage.h"

tsad_status tsad_encode(const tsad_policy *p, tsad_queue *queue, const tsad_steps *steps, int n,
                        const int *lanes, const float *const *obs, const float *there)
{
    const tsad_model *m = p->model;
    const tsad_net *net = &m->nets[TSAD_ENCODER];
    tsad_run runs[TSAD_GANG];
    if (net->n_nodes == 0) {
        return TSAD_OK;
    }
    for (int i = 0; i < n; i++) {
        tsad_rows rows = {.data = (float *)obs[i],
                          .rows = m->n_obs_steps,
                          .channels = m->obs_dim,
                          .stride = m->obs_dim,
                          .scale = m->obs_scale,
                          .offset = m->obs_offset,
                          .shift = m->obs_shift,
                          .there = there != NULL,
                          .given = TSAD_GIVEN_OBS,
                          .index = there ? (size_t)(obs[i] - there) : 0};
        TSAD_TRY(m->backend->put(queue, i, TSAD_ENCODER, net->input, rows));
        runs[i] = (tsad_run){.lane = lanes[i],
                             .part = TSAD_ENCODER,
                             .program = &p->encode,
                             .fixed = tsad_is_fixed(p, lanes[i]),
                             .first_step = steps->first};
    }
    if (m->encode_rows) {
        return m->backend->run(queue, runs, n, 0, steps->n);
    }
    TSAD_TRY(m->backend->run(queue, runs, n, 0, 1));
    for (int i = 0; i < n; i++) {
        runs[i].rows_apart = true;
    }
    return m->backend->run(queue, runs, n, 1, p->encode.n_rows);
}
