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
