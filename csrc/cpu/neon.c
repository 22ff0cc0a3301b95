/* neon.c: 4 floats, 32 registers. */
#if defined(__aarch64__)

#include <arm_neon.h>

typedef float vf __attribute__((vector_size(16)));
typedef int vi __attribute__((vector_size(16)));
typedef short vs __attribute__((vector_size(8)));

static inline __attribute__((always_inline)) vi dot16(int16x8_t w, int16x8_t x)
{
    int32x4_t low = vmull_s16(vget_low_s16(w), vget_low_s16(x));
    return (vi)vpaddq_s32(low, vmull_high_s16(w, x));
}

/* sums of four vectors at once */
static inline __attribute__((always_inline)) void totals4(const vf v[4], float out[4])
{
    float32x4_t low = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
    float32x4_t high = vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
    vst1q_f32(out, vpaddq_f32(low, high));
}

#define W 4
#define PANEL 8
#define MAX_ROWS 12
#define MAX_PANELS 4
#define V_FMA(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define V_SET1(x) ((vf)vdupq_n_f32(x))
#define V_TOTAL(v) vaddvq_f32((float32x4_t)(v))
#define V_TOTALS(v, out) totals4(v, out)
#define DOT16(own, sum, w, x) (sum) += dot16((int16x8_t)(w), (int16x8_t)(x))
#define WIDEN(from) ((vi)vmovl_s8(vld1_s8((const int8_t *)(from))))
#define HAS_DOT16 false
#define path(name) neon_##name
#include "simd.h"

static bool usable(void) { return true; } /* part of the architecture */

TSAD_CPU_BACKEND(tsad_cpu_neon, "neon", usable, &neon_kernels);

#endif
