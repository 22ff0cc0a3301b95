/* cuda_fp16.h: of CUDA's, what the kernels use. */
#pragma once

#include "half.h"

struct __half {
    unsigned short bits;
};

static inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
static inline float __half2float(__half h) { return tsad_from_float16(h.bits); }
