/* avx512.c: 16 floats, 32 registers. */
#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#include <immintrin.h>

typedef float vf __attribute__((vector_size(64)));
typedef int vi __attribute__((vector_size(64)));

#define W 16
#define PANEL 32
#define MAX_ROWS 12
#define MAX_PANELS 4
#define V_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V_SET1(x) ((vf)_mm512_set1_ps(x))
#define V_TOTAL(v) _mm512_reduce_add_ps((__m512)(v))
#define path(name) avx512_##name
#include "simd.h"
#pragma GCC pop_options

static bool usable(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

TSAD_CPU_BACKEND(tsad_cpu_avx512, "avx512", usable, &avx512_kernels);

#endif
