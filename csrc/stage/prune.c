/* prune.c: memory -> scores (K, B, 4), row r from the memory of step r. Reading the rows in
 * reverse (the method's time flip) is plan.c's business. */
#include "../backend.h"

static void run_row(tsad_worker *w, int row)
{
    const tsad_policy *p = w->policy;
    tsad_run run = {.net = &p->model->pruner_net,
                    .program = &p->prune,
                    .registers = w->pruner_registers,
                    .lane = w->prepared};
    p->model->backend->run(w, &run, 1, row, row + 1);
}

void tsad_prune(tsad_worker *w, tsad_lane *lane)
{
    w->prepared = lane;
    run_row(w, 0); /* and what all rows need of the observations */
    tsad_share_rows(w, run_row, w->policy->prune.n_rows - 1);
}
