/* encode.c: observation -> memory, once per chunk. The observation tokens do not depend on the
 * step (Diffusion Policy's encoder works token by token), the time tokens are tables: a first row
 * makes the memory, the others fold it for one layer each. Only an encoder with attention
 * (n_cond_layers > 0) runs for every step. Families without an encoder have nothing to do here. */
#include "../backend.h"

static void run_rows(tsad_worker *w, const tsad_member *members, int n, int begin, int end)
{
    const tsad_policy *p = w->policy;
    tsad_run runs[TSAD_GANG] = {0};
    for (int i = 0; i < n; i++) {
        runs[i] = (tsad_run){.net = &p->model->encoder,
                             .program = &p->encode,
                             .registers = members[i].encoder_registers,
                             .lane = members[i].lane};
    }
    p->model->backend->run(w, runs, n, begin, end);
}

/* reads the memory where rank 0 made it */
static void fold_row(tsad_worker *w, int row)
{
    run_rows(w, w->policy->workers[0].members, 1, row, row + 1);
}

void tsad_encode(tsad_worker *w, int n)
{
    const tsad_policy *p = w->policy;
    const tsad_model *m = p->model;
    if (m->encoder.n_nodes == 0) {
        return;
    }
    int ld = tsad_pad(m->obs_dim);
    for (int i = 0; i < n; i++) {
        const tsad_member *member = &w->members[i];
        float *x = member->encoder_registers[m->encoder.input]; /* (To, O padded) */
        for (int t = 0; t < m->n_obs_steps; t++) {
            for (int j = 0; j < m->obs_dim; j++) {
                float raw = member->obs[t * m->obs_dim + j];
                x[t * ld + j] = raw * m->obs_scale[j] + m->obs_offset[j];
            }
        }
    }
    if (w->shares && !m->encode_rows) {
        run_rows(w, w->members, 1, 0, 1);
        tsad_share_rows(w, fold_row, p->encode.n_rows - 1);
    } else {
        run_rows(w, w->members, n, 0, p->encode.n_rows);
    }
}
