/* audit.c: which values a lane's slots hold, for computed cells to be compared with. */
#include "stage.h"

#include <string.h>

void tsad_audit_forget(const tsad_policy *p, tsad_lane *lane)
{
    size_t bytes = sizeof(int32_t) * (size_t)p->model->n_blocks;
    memset(lane->audit.known, 0, bytes);
    memset(lane->audit.wrote, 0, bytes);
    memset(lane->audit.apart, 0, sizeof lane->audit.apart);
    memset(lane->audit.size, 0, sizeof lane->audit.size);
}

/* Threads that share a chunk may still read `known` when the first of them is done with it: what
 * the chunk wrote counts from the next one on. */
tsad_audit *tsad_audit_begin(const tsad_policy *p, tsad_lane *lane)
{
    tsad_audit *audit = &lane->audit;
    if (!p->audits || lane->rollout_memory) {
        return NULL;
    }
    memcpy(audit->known, audit->wrote, sizeof(int32_t) * (size_t)p->model->n_blocks);
    memset(audit->apart, 0, sizeof audit->apart);
    memset(audit->size, 0, sizeof audit->size);
    return audit;
}

void tsad_audit_end(const tsad_policy *p, tsad_lane *lane)
{
    if (!p->audits) {
        return;
    }
    int B = p->model->n_blocks;
    for (int k = 0; k < p->own.n; k++) {
        for (int b = 0; b < B; b++) {
            if (lane->plan[k * B + b] == TSAD_COMPUTE) {
                lane->audit.wrote[b] = k + 1;
            }
        }
    }
}
