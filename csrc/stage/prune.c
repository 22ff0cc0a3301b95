/* prune.c: memory -> scores (K, B, 4), row r from the memory of step r. Reading the rows in
 * reverse (the method's time flip) is plan.c's business. */
#include "../backend.h"

void tsad_prune(tsad_worker *w, tsad_lane *lane)
{
    tsad_policy *p = w->policy;
    tsad_run run = {.net = &p->model->pruner_net,
                    .program = &p->prune,
                    .registers = w->pruner_registers,
                    .lane = lane};
    p->model->backend->run(w, &run, 1, 0, p->prune.n_rows);
}
