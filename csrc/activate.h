/* activate.h: the activations, one text for every backend. */
#pragma once

#include "net/net.h"

#include <math.h>

#ifdef __CUDACC__
#define TSAD_EVERYWHERE __host__ __device__
#else
#define TSAD_EVERYWHERE
#endif

static inline TSAD_EVERYWHERE float tsad_activate(float x, tsad_activation act)
{
    switch (act) {
    case TSAD_GELU:
        return 0.5f * x * (1 + erff(x * 0.70710678f));
    case TSAD_RELU:
        return x < 0 ? 0 : x; /* NaN stays */
    case TSAD_MISH:
        return x > 20 ? x : x * tanhf(log1pf(expf(x)));
    case TSAD_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case TSAD_SILU:
        return x / (1 + expf(-x));
    default:
        return x;
    }
}
