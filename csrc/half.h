/* half.h: floats in 16 bits, or of TF32's 19, rounded to the nearest, ties to even. */
#pragma once

#include "base.h"

#include <math.h>
#include <string.h>

static inline uint16_t tsad_to_float16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000) { /* 2^16: infinite, or NaN */
        return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
    }
    if (size < 0x38800000) { /* 2^-14: multiples of 2^-24 */
        return (uint16_t)(sign | (uint32_t)lrintf(fabsf(x) * 0x1p24f));
    }
    size += 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | (size - 0x38000000) >> 13);
}

static inline float tsad_from_float16(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x = (half & 0x7c00) == 0x7c00 ? (half & 0x3ff ? NAN : INFINITY) : x * 0x1p112f;
    return half & 0x8000 ? -x : x;
}

static inline uint16_t tsad_to_bfloat16(float x) /* which is finite */
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float tsad_from_bfloat16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float tsad_to_tf32(float x) /* which is finite */
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~UINT32_C(0x1fff);
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* as it would be read from there */
static inline float tsad_through_half(float x, tsad_precision to)
{
    return to == TSAD_FLOAT16    ? tsad_from_float16(tsad_to_float16(x))
           : to == TSAD_BFLOAT16 ? tsad_from_bfloat16(tsad_to_bfloat16(x))
           : to == TSAD_TF32     ? tsad_to_tf32(x)
                                 : x;
}
