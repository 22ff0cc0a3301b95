/* avx512.c: 16 floats, 32 registers. TSAD_NO_AVX512 leaves it out: sanitizers take minutes over it,
 * which are lost on a CPU that can't run it. */
#if defined(__x86_64__) && !defined(TSAD_NO_AVX512)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#include <immintrin.h>

typedef float vf __attribute__((vector_size(64)));
typedef int vi __attribute__((vector_size(64)));
typedef short vs __attribute__((vector_size(32)));

/* The inner loop of 16-bit products over one panel, by hand: around this instruction gcc 12 moves
 * every sum to another register and back (dense chunk, one thread, Zen 4: 78 ms, 74 by hand). zmm0
 * to zmm23 hold the sums of up to 12 rows, zmm24 and zmm25 the weights, zmm26 a row's pair. */
#define VNNI_ROW(address, even, odd)                                                               \
    "vpbroadcastd " address ", %%zmm26\n\t"                                                        \
    "vpdpwssd %%zmm26, %%zmm24, %%zmm" even "\n\t"                                                 \
    "vpdpwssd %%zmm26, %%zmm25, %%zmm" odd "\n\t"
#define VNNI_1 VNNI_ROW("(%[x0])", "0", "1")
#define VNNI_2 VNNI_1 VNNI_ROW("(%[x0],%[ld])", "2", "3")
#define VNNI_3 VNNI_2 VNNI_ROW("(%[x0],%[ld],2)", "4", "5")
#define VNNI_4 VNNI_3 VNNI_ROW("(%[x3])", "6", "7")
#define VNNI_5 VNNI_4 VNNI_ROW("(%[x3],%[ld])", "8", "9")
#define VNNI_6 VNNI_5 VNNI_ROW("(%[x3],%[ld],2)", "10", "11")
#define VNNI_7 VNNI_6 VNNI_ROW("(%[x6])", "12", "13")
#define VNNI_8 VNNI_7 VNNI_ROW("(%[x6],%[ld])", "14", "15")
#define VNNI_9 VNNI_8 VNNI_ROW("(%[x6],%[ld],2)", "16", "17")
#define VNNI_10 VNNI_9 VNNI_ROW("(%[x9])", "18", "19")
#define VNNI_11 VNNI_10 VNNI_ROW("(%[x9],%[ld])", "20", "21")
#define VNNI_12 VNNI_11 VNNI_ROW("(%[x9],%[ld],2)", "22", "23")
#define ZERO(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define KEEP(n) "vmovdqu64 %%zmm" #n ", 64*" #n "(%[sum])\n\t"
#define EACH_24(f)                                                                                 \
    f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15) f(16)    \
        f(17) f(18) f(19) f(20) f(21) f(22) f(23)
#define VNNI_LOOP(M)                                                                               \
    case M:                                                                                        \
        __asm__ volatile(                                                                          \
            EACH_24(ZERO) "1:\n\t"                                                                 \
                          "vmovdqu64 (%[w]), %%zmm24\n\t"                                          \
                          "vmovdqu64 64(%[w]), %%zmm25\n\t"                                        \
                          "prefetcht1 16384(%[w])\n\t"                                             \
                          "prefetcht1 16448(%[w])\n\t"                                             \
                          "prefetcht0 1024(%[w])\n\t"                                              \
                          "prefetcht0 1088(%[w])\n\t" VNNI_##M "add $128, %[w]\n\t"                \
                                                               "add $4, %[x0]\n\t"                 \
                                                               "add $4, %[x3]\n\t"                 \
                                                               "add $4, %[x6]\n\t"                 \
                                                               "add $4, %[x9]\n\t"                 \
                                                               "dec %[n]\n\t"                      \
                                                               "jnz 1b\n\t" EACH_24(KEEP)          \
            : [w] "+r"(w), [x0] "+r"(x0), [x3] "+r"(x3), [x6] "+r"(x6), [x9] "+r"(x9), [n] "+r"(n) \
            : [ld] "r"(ld), [sum] "r"(sum)                                                         \
            : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7",      \
              "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16",       \
              "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25",     \
              "zmm26");                                                                            \
        break

/* sum: (12, 2) vectors, of which the first M rows are made */
static inline __attribute__((always_inline)) void vnni_dots(const int M, const int16_t *x, int ldx,
                                                            const int16_t *w, int pairs, vi sum[24])
{
    size_t ld = (size_t)ldx * sizeof *x, n = (size_t)pairs;
    const char *x0 = (const char *)x, *x3 = x0 + 3 * ld, *x6 = x0 + 6 * ld, *x9 = x0 + 9 * ld;
    switch (M) {
        VNNI_LOOP(1);
        VNNI_LOOP(2);
        VNNI_LOOP(3);
        VNNI_LOOP(4);
        VNNI_LOOP(5);
        VNNI_LOOP(6);
        VNNI_LOOP(7);
        VNNI_LOOP(8);
        VNNI_LOOP(9);
        VNNI_LOOP(10);
        VNNI_LOOP(11);
        VNNI_LOOP(12);
    default:
        break;
    }
}

/* sums of four vectors at once */
static inline __attribute__((always_inline)) void totals16(const vf v[4], float out[4])
{
    __m256 half[4];
    for (int j = 0; j < 4; j++) {
        half[j] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[j]),
                                _mm512_extractf32x8_ps((__m512)v[j], 1));
    }
    __m256 pairs =
        _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

#define W 16
#define PANEL 32
#define MAX_ROWS 12
#define MAX_PANELS 4
#define V_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V_SET1(x) ((vf)_mm512_set1_ps(x))
#define V_TOTAL(v) _mm512_reduce_add_ps((__m512)(v))
#define V_TOTALS(v, out) totals16(v, out)
/* gcc 12 copies sums around the intrinsic; the assembler knows the instruction without a flag */
#define DOT16(own, sum, w, x)                                                                      \
    if (own) {                                                                                     \
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));                               \
    } else {                                                                                       \
        (sum) += (vi)_mm512_madd_epi16((__m512i)(w), (__m512i)(x));                                \
    }
#define OWN_DOTS16(M, x, ldx, w, pairs, sum) vnni_dots(M, x, ldx, w, pairs, sum)
#define WIDEN(from) ((vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(from))))
#ifdef TSAD_NO_VNNI /* for tests: what a CPU without it would run */
#define HAS_DOT16 false
#else
#define HAS_DOT16 (__builtin_cpu_supports("avx512vnni"))
#endif
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
