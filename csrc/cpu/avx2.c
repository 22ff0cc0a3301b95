/* avx2.c: 8 floats, 16 registers. */
#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#include <stdbool.h>

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

/* The inner loop of a convolution in 16 bits, by hand: gcc 12 puts a sum between the two products
 * of a pixel, and the processor's four integer pipes, two of which multiply, then go to the wrong
 * ones (Zen 3, multiply-adds from the first cache: 58 a ns by the compiler, 73 so). ymm0 to ymm11
 * hold the sums of up to 6 pixels, ymm12 and ymm13 the weights. */
#define MADD_PIXEL(x, even, odd)                                                                   \
    "vpbroadcastd (%[" x "],%[i],4), %%ymm14\n\t"                                                  \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                                       \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                                       \
    "vpaddd %%ymm15, %%ymm" even ", %%ymm" even "\n\t"                                             \
    "vpaddd %%ymm14, %%ymm" odd ", %%ymm" odd "\n\t"
#define MADD_1 MADD_PIXEL("x0", "0", "1")
#define MADD_2 MADD_1 MADD_PIXEL("x1", "2", "3")
#define MADD_3 MADD_2 MADD_PIXEL("x2", "4", "5")
#define MADD_4 MADD_3 MADD_PIXEL("x3", "6", "7")
#define MADD_5 MADD_4 MADD_PIXEL("x4", "8", "9")
#define MADD_6 MADD_5 MADD_PIXEL("x5", "10", "11")
#define ZERO_YMM(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define KEEP_YMM(n) "vmovdqa %%ymm" #n ", 32*" #n "(%[sum])\n\t"
#define EACH_12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define MADD_LOOP(M, load, half, both)                                                             \
    __asm__ volatile(                                                                              \
        EACH_12(ZERO_YMM) "1:\n\t"                                                                 \
                          "mov %[first], %[i]\n"                                                   \
                          "2:\n\t" load " (%[w]), %%ymm12\n\t" load " " half "(%[w]), %%ymm13\n\t" \
                          "prefetcht1 8192(%[w])\n\t"                                              \
                          "prefetcht0 1024(%[w])\n\t" MADD_##M "add $" both ", %[w]\n\t"           \
                                                               "inc %[i]\n\t"                      \
                                                               "jnz 2b\n\t"                        \
                                                               "add %[ld], %[x0]\n\t"              \
                                                               "add %[ld], %[x1]\n\t"              \
                                                               "add %[ld], %[x2]\n\t"              \
                                                               "add %[ld], %[x3]\n\t"              \
                                                               "add %[ld], %[x4]\n\t"              \
                                                               "add %[ld], %[x5]\n\t"              \
                                                               "dec %[rows]\n\t"                   \
                                                               "jnz 1b\n\t" EACH_12(KEEP_YMM)      \
        : [w] "+r"(w), [x0] "+r"(x0), [x1] "+r"(x1), [x2] "+r"(x2), [x3] "+r"(x3), [x4] "+r"(x4),  \
          [x5] "+r"(x5), [rows] "+r"(rows), [i] "=&r"(i)                                           \
        : [ld] "r"(ld), [first] "r"(first), [sum] "r"(sum)                                         \
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",  \
          "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

#define MADD_BOTH(M)                                                                               \
    case M:                                                                                        \
        MADD_LOOP(M, "vmovdqu", "32", "64");                                                       \
        break;                                                                                     \
    case 8 * M:                                                                                    \
        MADD_LOOP(M, "vpmovsxbw", "16", "32");                                                     \
        break

/* sum: (6, 2) vectors, of which the first M pixels' are made; x: of M pixels, M of them in bytes */
static inline __attribute__((always_inline)) void madd_dots(const bool bytes, const int M,
                                                            const short *const *x, size_t skip,
                                                            size_t row, size_t rows, int pairs,
                                                            const void *w, vi *sum)
{
    size_t ld = row * sizeof **x;
    ptrdiff_t first = -(ptrdiff_t)pairs, i;
    const short *x0 = x[0] + skip + 2 * pairs, *x1 = x[M > 1 ? 1 : 0] + skip + 2 * pairs;
    const short *x2 = x[M > 2 ? 2 : 0] + skip + 2 * pairs,
                *x3 = x[M > 3 ? 3 : 0] + skip + 2 * pairs;
    const short *x4 = x[M > 4 ? 4 : 0] + skip + 2 * pairs,
                *x5 = x[M > 5 ? 5 : 0] + skip + 2 * pairs;
    switch (bytes ? 8 * M : M) {
        MADD_BOTH(1);
        MADD_BOTH(2);
        MADD_BOTH(3);
        MADD_BOTH(4);
        MADD_BOTH(5);
        MADD_BOTH(6);
    default:
        break;
    }
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
/* gcc 12 widens halves and joins them: four instructions in place of one */
#define WIDEN(from) ((vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from))))
#define HAS_DOT16 false
#define OWN_CONV16(bytes, M, t, sum)                                                               \
    madd_dots(bytes, M, (t)->x, (t)->skip, (t)->ld, (size_t)(t)->rows, (t)->pairs,                 \
              (bytes) ? (const void *)(t)->w.q8 : (const void *)(t)->w.q, sum)
#define path(name) avx2_##name
#include "simd.h"
#pragma GCC pop_options

static bool usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

TSAD_CPU_BACKEND(tsad_cpu_avx2, "avx2", usable, &avx2_kernels);

#endif
