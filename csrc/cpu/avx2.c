/* avx2.c: 8 floats, 16 registers. */
#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>

typedef float vf __attribute__((vector_size(32)));
typedef int vi __attribute__((vector_size(32)));
typedef short vs __attribute__((vector_size(16)));

static inline __attribute__((always_inline)) float total8(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* sums of four vectors at once */
static inline __attribute__((always_inline)) void totals8(const vf v[4], float out[4])
{
    __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
    __m256 pairs = _mm256_hadd_ps(low, _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

#define W 8
#define PANEL 16
#define MAX_ROWS 6
#define MAX_PANELS 2
#define V_FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define V_SET1(x) ((vf)_mm256_set1_ps(x))
#define V_TOTAL(v) total8((__m256)(v))
#define V_TOTALS(v, out) totals8(v, out)
#define DOT16(own, sum, w, x) (sum) += (vi)_mm256_madd_epi16((__m256i)(w), (__m256i)(x))
#define HAS_DOT16 false
#define path(name) avx2_##name
#include "simd.h"
#pragma GCC pop_options

static bool usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

TSAD_CPU_BACKEND(tsad_cpu_avx2, "avx2", usable, &avx2_kernels);

#endif
