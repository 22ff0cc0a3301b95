/* sums.c: when the sums of rollout slots that a fixed plan reads are made. Which sums there are is
 * plan/program.c's business, how they are added a backend's. */
#include "stage.h"

void tsad_sums_begin(tsad_lane *lane, bool room)
{
    lane->plan_is_new = true;
    lane->sums_ready = false;
    lane->keeps_sums = room && lane->steady.kept_floats > 0;
}

/* Before a chunk. A plan that is set anew for every chunk never gets to use its sums, and makes
 * none. */
void tsad_sums_choose(tsad_lane *lane)
{
    lane->sums_use = TSAD_NO_SUMS;
    if (!lane->keeps_sums || lane->program != &lane->steady) {
        return;
    }
    if (!lane->plan_is_new) {
        lane->sums_use = lane->sums_ready ? TSAD_HAVE_SUMS : TSAD_MAKE_SUMS;
        lane->sums_ready = true;
    }
    lane->plan_is_new = false;
}
