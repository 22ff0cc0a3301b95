/* join.c: how threads come to share a lane's chunk.
 *
 * A sleeping core may need longer to wake than a chunk takes: tens of microseconds, on a virtual
 * machine that is called at a robot's pace milliseconds. So rank 0 begins alone and waits for
 * nobody. A thread that arrives takes rows of the encoder and the pruner, while there are any, and
 * joins at rank 0's next turn: after the preparations, or at the start of a row with work to share.
 * It copies what the chunk has come to and is one of the threads from then on. Which threads work
 * when decides nothing about the bits.
 *
 * A core can also be taken in mid-chunk. Rank 0 notices at a meeting (stall.c), releases the others
 * at its next turn, and lets nobody join again before the chunk's end. So it does when the call is
 * told to stop (run.c).
 */
#include "../clock.h"
#include "cpu.h"

#include <string.h>

void tsad_meeting_begin(tsad_meeting *m)
{
    atomic_store_explicit(&m->ticket, 0, memory_order_relaxed);
    atomic_store_explicit(&m->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&m->admitted, 0, memory_order_relaxed);
    atomic_store_explicit(&m->rows, 0, memory_order_relaxed);
}

void tsad_meeting_end(tsad_meeting *m)
{
    atomic_store_explicit(&m->admitted, -1, memory_order_release);
}

/* ---- rows that anybody may take ----------------------------------------------------------- */

enum { ROWS_LEFT = 0xffff };

/* takes and runs a row; false: none is left */
static bool run_row(tsad_worker *w)
{
    tsad_meeting *m = w->engine->meeting;
    unsigned rows = atomic_load_explicit(&m->rows, memory_order_acquire);
    do {
        if ((rows & ROWS_LEFT) == 0) {
            return false;
        }
    } while (!atomic_compare_exchange_weak_explicit(&m->rows, &rows, rows - 1, memory_order_acq_rel,
                                                    memory_order_acquire));
    int rank = w->rank, size = w->size, row = m->rows_before + (int)(rows & ROWS_LEFT) - 1;
    w->rank = 0, w->size = 1; /* a row is the thread's own: no meeting inside */
    tsad_cpu_rows(w, m->rows_of, 1, row, row + 1);
    w->rank = rank, w->size = size;
    atomic_fetch_add_explicit(&m->done, 1, memory_order_release);
    return true;
}

void tsad_share_rows(tsad_worker *w, const tsad_run *run, int begin, int end)
{
    int n = end - begin;
    if (!w->shares || n > ROWS_LEFT) {
        for (int row = end - 1; row >= begin; row--) {
            tsad_cpu_rows(w, run, 1, row, row + 1);
        }
        return;
    }
    tsad_meeting *m = w->engine->meeting;
    unsigned before = atomic_load_explicit(&m->rows, memory_order_relaxed);
    m->rows_of = run;
    m->rows_before = begin;
    atomic_store_explicit(&m->done, 0, memory_order_relaxed);
    atomic_store_explicit(&m->rows, ((before >> 16) + 1) << 16 | (unsigned)n, memory_order_release);
    while (run_row(w)) {
    }
    int64_t since = tsad_now();
    for (int spins = 0; atomic_load_explicit(&m->done, memory_order_acquire) < n; spins++) {
        tsad_spin(spins);
    }
    tsad_note_wait(w, since);
}

/* ---- turns --------------------------------------------------------------------------------- */

static void say(tsad_worker *w, int size, bool alone)
{
    unsigned said = w->turns << 8 | (unsigned)size << 1 | alone;
    atomic_store_explicit(&w->engine->meeting->ticket, said, memory_order_release);
}

/* from here to the end of the chunk rank 0 is alone */
static void part(tsad_worker *w)
{
    if (w->size > 1) {
        say(w, w->size, true);
        tsad_worker_meet(w); /* everyone's shares of the slots are written */
    }
    w->size = 1;
    w->shares = false;
    tsad_meeting_end(w->engine->meeting);
}

static void lead(tsad_worker *w, int row)
{
    tsad_meeting *m = w->engine->meeting;
    if (w->stalled || (w->size > 1 && tsad_cpu_stops(w))) {
        part(w);
        return;
    }
    int size = 1 + atomic_load_explicit(&m->arrived, memory_order_acquire), before = w->size;
    if (size == 1) {
        return;
    }
    w->size = size;
    m->row = row;
    say(w, size, false);
    if (size > before) {
        atomic_store_explicit(&m->admitted, size - 1, memory_order_release);
    }
    if (size > before || row == TSAD_BEFORE_ROWS) {
        tsad_worker_meet(w); /* the others have copied what they need */
    }
}

/* what rank 0 has made of the chunk before this row, which it doesn't touch before they meet */
static void copy_member(tsad_worker *w)
{
    const tsad_engine *e = w->engine;
    const tsad_net *net = tsad_denoiser(e->model);
    const tsad_member *from = e->workers[0].members;
    tsad_member *to = w->members;
    int x = net->input;
    w->run = e->meeting->run; /* rank 0's may be the next lane's once they have met */
    w->row_end = e->meeting->row_end;
    if (net->wide) {
        return; /* it works on rank 0's */
    }
    memcpy(to->registers[TSAD_DENOISER][x], from->registers[TSAD_DENOISER][x],
           sizeof(float) * tsad_register_floats(&net->registers[x]));
    memcpy(to->x0, from->x0,
           sizeof(float) * 2 * (size_t)e->model->horizon * (size_t)tsad_pad(e->model->action_dim));
    if (w->run.rule) {
        memcpy(to->rule->then, from->rule->then, sizeof(float) * e->branch_floats);
        to->rule->total = from->rule->total;
        to->rule->computed = from->rule->computed;
    }
    for (int i = 0; i < TSAD_REMEMBERED; i++) {
        memcpy(to->sums[i], from->sums[i], sizeof(float) * e->branch_floats);
        to->table_ready[i] = false; /* made again when needed */
    }
}

/* begins: at this turn a program does, which all take from where rank 0 prepared it. False:
 * released. */
static bool follow(tsad_worker *w, bool begins)
{
    tsad_meeting *m = w->engine->meeting;
    unsigned number = w->turns, said;
    for (int spins = 0;
         (said = atomic_load_explicit(&m->ticket, memory_order_acquire)) >> 8 < number;) {
        if (!run_row(w)) {
            tsad_spin(spins++);
        }
    }
    if (said >> 8 != number) {
        return true; /* nothing was changed at that turn: rank 0 would still wait for us there */
    }
    int size = (int)(said >> 1 & 127);
    if (said & 1) {
        tsad_worker_meet(w);
        w->size = 0;
        return false;
    }
    if (begins || size > w->size) {
        w->size = size;
        if (begins) {
            copy_member(w);
        }
        tsad_worker_meet(w);
    }
    return true;
}

bool tsad_turn(tsad_worker *w, int row)
{
    if (!w->shares) {
        return true;
    }
    w->turns++;
    if (w->rank > 0) {
        return follow(w, false);
    }
    lead(w, row);
    return true;
}

void tsad_publish(tsad_worker *w, const tsad_run *run, int row_end)
{
    w->engine->meeting->run = *run;
    w->engine->meeting->row_end = row_end;
}

bool tsad_next(tsad_worker *w)
{
    w->turns++;
    return follow(w, true);
}

void tsad_dismiss(tsad_worker *w)
{
    if (w->shares) {
        w->turns++;
        part(w);
    }
}

/* ---- joining ------------------------------------------------------------------------------- */

int tsad_arrive(tsad_engine *e)
{
    return 1 + atomic_fetch_add_explicit(&e->meeting->arrived, 1, memory_order_relaxed);
}

bool tsad_join(tsad_worker *w, int *row)
{
    const tsad_engine *e = w->engine;
    const tsad_worker *first = &e->workers[0];
    int admitted, spins = 0;
    while ((admitted = atomic_load_explicit(&e->meeting->admitted, memory_order_acquire)) <
           w->rank) {
        if (admitted < 0) {
            return false;
        }
        if (!run_row(w)) {
            tsad_spin(spins++);
        }
    }
    *row = e->meeting->row;
    w->size = admitted + 1;
    w->turns = *row == TSAD_BEFORE_ROWS ? first->turns : first->turns - 1;
    w->parity = first->parity;
    copy_member(w);
    tsad_worker_meet(w); /* an epoch begins: no slot was read or written in it yet */
    return true;
}
