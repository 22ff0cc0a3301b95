/* resolve.c: a plan to slots on integers (plan_core.h), and why a plan is refused. */
#include "../base.h"
#include "../net/net.h"
#include "plan_core.h"

const char *tsad_plan_reason_text(tsad_plan_reason reason)
{
    switch (reason) {
    case TSAD_PLAN_VALID:
        return "valid";
    case TSAD_PLAN_UNKNOWN_SOURCE:
        return "the source is not 0 (compute) to 4 (skip)";
    case TSAD_PLAN_EMPTY_TYPE:
        return "reuse_type, but no block of this type has been computed before it in this chunk";
    case TSAD_PLAN_EMPTY_STEP:
        return "reuse_step, but this block has not been computed at an earlier step of this chunk";
    case TSAD_PLAN_FIRST_ROLLOUT:
        return "reuse_rollout, but there is no earlier chunk right after a reset";
    case TSAD_PLAN_EMPTY_ROLLOUT:
        return "reuse_rollout, but this cell has not been computed in an earlier chunk of this "
               "episode";
    }
    return "unknown";
}

tsad_plan_fault tsad_plan_resolve(const uint8_t *sources, int n_steps, int n_blocks,
                                  const uint8_t *block_type, const uint8_t *filled, int32_t *slot)
{
    int32_t last[TSAD_MAX_BLOCKS];
    tsad_resolver resolver;
    tsad_resolver_begin(&resolver, n_blocks, last);
    for (int k = 0; k < n_steps; k++) {
        for (int b = 0; b < n_blocks; b++) {
            size_t i = (size_t)k * (size_t)n_blocks + (size_t)b;
            tsad_plan_reason reason;
            int32_t s =
                tsad_resolver_next(&resolver, sources[i], k, b, block_type[b], filled, &reason);
            if (reason != TSAD_PLAN_VALID) {
                return (tsad_plan_fault){reason, k, b};
            }
            if (slot) {
                slot[i] = s;
            }
        }
    }
    return (tsad_plan_fault){TSAD_PLAN_VALID, -1, -1};
}
