/* numbers.c: numbers that a network can't represent. */
#include "base.h"

#include <math.h>

size_t tsad_first_beyond(const float *x, size_t n, float limit)
{
    int beyond = 0;
    for (size_t i = 0; i < n; i++) { /* to the end, as a vector */
        beyond |= !(fabsf(x[i]) <= limit);
    }
    size_t at = beyond ? 0 : n;
    while (at < n && fabsf(x[at]) <= limit) {
        at++;
    }
    return at;
}

tsad_status tsad_check_numbers(const char *name, const float *x, size_t n)
{
    size_t at = x ? tsad_first_beyond(x, n, TSAD_MAX_MAGNITUDE) : n;
    return at == n ? TSAD_OK
                   : tsad_fail(TSAD_ARGUMENT,
                               "%s: expected numbers of magnitude up to %g, got %g at flat index "
                               "%zu; a network can't represent that",
                               name, (double)TSAD_MAX_MAGNITUDE, (double)x[at], at);
}

tsad_status tsad_check_tensors(const tsad_tensor *tensors, int n)
{
    for (int i = 0; i < n; i++) {
        size_t size = 1;
        for (int d = 0; d < tensors[i].n_dims; d++) {
            size *= (size_t)tensors[i].shape[d];
        }
        TSAD_TRY(tsad_check_numbers(tensors[i].name, tensors[i].data, size));
    }
    return TSAD_OK;
}
