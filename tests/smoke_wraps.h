/* smoke_wraps.h: what smoke.c puts in the place of the core's clock, memory and meetings of
 * threads, by the linker's --wrap (.ci/run has the list).
 */
#pragma once

#include "cpu/worker.h"

/* ---- a clock that jumps ------------------------------------------------------------------- */

int64_t __real_tsad_now(void) __attribute__((weak)); /* with -Wl,--wrap=tsad_now */
int64_t __wrap_tsad_now(void);

static _Thread_local int readings_to_jump = -1;
static _Thread_local int64_t jumped;

int64_t __wrap_tsad_now(void)
{
    if (readings_to_jump >= 0 && readings_to_jump-- == 0) {
        jumped += 1000000000;
    }
    return __real_tsad_now() + jumped;
}

/* ---- memory that runs out ------------------------------------------------------------------ */

void *__real_aligned_alloc(size_t, size_t)
    __attribute__((weak)); /* with -Wl,--wrap=aligned_alloc */
void *__wrap_aligned_alloc(size_t unit, size_t bytes);

static bool no_memory;

void *__wrap_aligned_alloc(size_t unit, size_t bytes)
{
    return no_memory ? NULL : __real_aligned_alloc(unit, bytes);
}

/* ---- threads that come when the test wants ------------------------------------------------- */

int __real_tsad_arrive(tsad_engine *e) __attribute__((weak)); /* with the other -Wl,--wrap */
int __wrap_tsad_arrive(tsad_engine *e);
bool __real_tsad_turn(tsad_worker *w, int row) __attribute__((weak));
bool __wrap_tsad_turn(tsad_worker *w, int row);
void __real_tsad_share_rows(tsad_worker *w, const tsad_run *run, int begin, int end)
    __attribute__((weak));
void __wrap_tsad_share_rows(tsad_worker *w, const tsad_run *run, int begin, int end);
void __real_tsad_meeting_end(tsad_meeting *m) __attribute__((weak));
void __wrap_tsad_meeting_end(tsad_meeting *m);

enum { ANYTIME = -2, ROWS = -1 }; /* not held back; at the first rows offered; else at a turn */

static int first_comes, others_come = ANYTIME; /* when in the chunk */
static int turns_taken, joined, joined_at_a_row;
static atomic_int may_come, came;

/* the threads that wait may come to the chunk; rank 0 goes on when they are there */
static void let_come(const tsad_engine *e, int n)
{
    if (n > atomic_load(&may_come)) {
        atomic_store(&may_come, n);
        for (int spins = 0; atomic_load(&e->meeting->arrived) < n; spins++) {
            tsad_spin(spins);
        }
    }
}

static bool held_back(void) { return others_come != ANYTIME; }

int __wrap_tsad_arrive(tsad_engine *e)
{
    int place = atomic_fetch_add(&came, 1);
    for (int spins = 0; held_back() && atomic_load(&may_come) <= place; spins++) {
        tsad_spin(spins);
    }
    return __real_tsad_arrive(e);
}

void __wrap_tsad_share_rows(tsad_worker *w, const tsad_run *run, int begin, int end)
{
    if (held_back() && w->shares && first_comes == ROWS) {
        let_come(w->engine, others_come == ROWS ? w->engine->n_threads - 1 : 1);
    }
    __real_tsad_share_rows(w, run, begin, end);
}

bool __wrap_tsad_turn(tsad_worker *w, int row)
{
    if (!held_back() || w->rank > 0 || !w->shares) {
        return __real_tsad_turn(w, row);
    }
    int turn = turns_taken++, before = w->size;
    if (turn == others_come) {
        let_come(w->engine, w->engine->n_threads - 1);
    } else if (turn == first_comes) {
        let_come(w->engine, 1);
    }
    bool stays = __real_tsad_turn(w, row);
    joined += w->size > before;
    joined_at_a_row += w->size > before && row >= 0;
    return stays;
}

void __wrap_tsad_meeting_end(tsad_meeting *m)
{
    atomic_store(&may_come, 1000); /* they must not be held for ever */
    __real_tsad_meeting_end(m);
}

static void hold(int first, int others)
{
    first_comes = first;
    others_come = __real_tsad_arrive ? others : ANYTIME;
    turns_taken = 0;
    atomic_store(&may_come, 0);
    atomic_store(&came, 0);
}
