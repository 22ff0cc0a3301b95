/* sums.c: when the sums of rollout slots that a fixed plan reads are made. Which sums there are is
 * plan.c's business, how they are added a backend's. */
#include "../internal.h"

/* Room for what the lane's plan keeps. Without it the plan runs all the same, a little slower. */
void tsad_sums_place(tsad_lane *lane)
{
    size_t floats = lane->steady.kept_floats;
    lane->plan_is_new = true;
    lane->sums_ready = false;
    lane->sums = NULL;
    if (floats * sizeof(float) > lane->sum_arena.size) {
        tsad_arena arena = {0};
        TSAD_CARVE(&arena, float, floats);
        tsad_arena_free(&lane->sum_arena);
        if (tsad_arena_allocate(&arena) == TSAD_OK) {
            TSAD_CARVE(&arena, float, floats);
            lane->sum_arena = arena;
        }
    }
    if (floats > 0) {
        lane->sums = (float *)(void *)lane->sum_arena.base; /* NULL if there was no memory */
    }
}

/* Before a chunk. A plan that is set anew for every chunk never gets to use its sums, and makes
 * none. */
void tsad_sums_choose(tsad_lane *lane)
{
    lane->sums_use = TSAD_NO_SUMS;
    if (!lane->sums || lane->program != &lane->steady) {
        return;
    }
    if (!lane->plan_is_new) {
        lane->sums_use = lane->sums_ready ? TSAD_HAVE_SUMS : TSAD_MAKE_SUMS;
        lane->sums_ready = true;
    }
    lane->plan_is_new = false;
}
