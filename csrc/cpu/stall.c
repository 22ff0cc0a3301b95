/* stall.c: a core that another process has taken. The threads of a lane notice at a meeting that
 * one keeps the others waiting; they part for the rest of the chunk at the next turn (join.c).
 * When the next chunk stalls too, the chunks after it run on one thread, for longer each time.
 */
#include "worker.h"
#include "../clock.h"

/* Waiting longer than this, and longer than one's own work took, means a core is taken: a process
 * that shares one keeps it for milliseconds, a virtual machine's hiccups are shorter. And a longer
 * hiccup stays alone: a process that shares a core takes it again and again. */
enum { STALL_NS = 1000000, AGAIN_NS = 150000000, MAX_PATIENCE = 64 };

/* rank 0, after it waited for another thread */
static void note_stall(tsad_worker *w, int64_t now)
{
    w->stalled |= now - w->engine->stalled_at < AGAIN_NS;
    w->engine->stalled_at = now;
}

void tsad_worker_meet(tsad_worker *w)
{
    w->epoch++;
    if (w->size == 1 || w->rank > 0) {
        tsad_barrier_wait(w->engine->barrier, w->size);
        return;
    }
    int64_t arrived = tsad_now();
    tsad_barrier_wait(w->engine->barrier, w->size);
    int64_t left = tsad_now();
    int64_t own = w->met_at ? arrived - w->met_at : 0;
    if (left - arrived > STALL_NS && left - arrived > own) {
        note_stall(w, left);
    }
    w->met_at = left;
}

void tsad_note_wait(tsad_worker *w, int64_t since)
{
    int64_t now = tsad_now();
    if (now - since > STALL_NS) {
        note_stall(w, now);
    }
}

/* How many threads to ask for: alone for a while after stalls in a row. */
int tsad_stall_size(tsad_engine *e, int n_lanes)
{
    if (n_lanes < e->n_threads && e->alone_for > 0) {
        e->alone_for--;
        return 1;
    }
    return e->n_threads;
}

void tsad_stall_note(tsad_engine *e)
{
    bool again = e->stalled_before;
    e->stalled_before = e->workers[0].stalled;
    if (!e->stalled_before) {
        e->patience /= 2;
    } else if (again) { /* once can be chance: going on alone would cost more than it saves */
        e->patience = e->patience * 2 < MAX_PATIENCE ? e->patience * 2 + 1 : MAX_PATIENCE;
        e->alone_for = e->patience;
    }
}
