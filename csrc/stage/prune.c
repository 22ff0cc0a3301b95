/* prune.c: memory -> scores (K, B, 4), row r from the memory of step r. Reading the rows in
 * reverse (the method's time flip) is plan.c's business. */
#include "../backend.h"

/* All threads of a lane call this; they share the rows. The scores are there when they have met. */
void tsad_prune(tsad_worker *w, tsad_lane *lane)
{
    tsad_policy *p = w->policy;
    int rank = w->rank, size = w->size, n_rows = p->prune.n_rows;
    tsad_run run = {.net = &p->model->pruner_net,
                    .program = &p->prune,
                    .registers = w->pruner_registers,
                    .lane = lane};
    w->size = 1; /* rows are each thread's own: no meeting inside */
    if (rank == 0) {
        atomic_store(&p->next_row, 1);
        p->model->backend->run(w, &run, 1, 0, 1); /* and what all rows need of the observations */
    }
    w->size = size;
    if (n_rows == 1) {
        return;
    }
    tsad_worker_meet(w);
    w->rank = 0, w->size = 1;
    for (int row; (row = atomic_fetch_add(&p->next_row, 1)) < n_rows;) {
        p->model->backend->run(w, &run, 1, row, row + 1);
    }
    w->rank = rank, w->size = size;
}
