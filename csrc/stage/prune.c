/* prune.c: memory -> scores (K, B, 4), row r from the memory of step r. Reading the rows in
 * reverse (the method's time flip) is plan.c's business. */
#include "stage.h"

tsad_status tsad_prune(const tsad_policy *p, tsad_queue *queue, int lane, float *scores)
{
    const tsad_backend *backend = p->model->backend;
    tsad_run run = {.lane = lane, .part = TSAD_PRUNER_NET, .program = &p->prune};
    /* and what all rows need of the observations */
    TSAD_TRY(backend->run(queue, &run, 1, 0, 1));
    run.rows_apart = true;
    TSAD_TRY(backend->run(queue, &run, 1, 1, p->prune.n_rows));
    return backend->get_array(queue, lane, TSAD_ARRAY_SCORES, scores);
}
