/* simd16.h: the products of precision int16 and int8 over a vector of W pairs; part of simd.h,
 * which says what the macros are. Same tiles, same streaming of the weights; 8-bit ones are widened
 * as they come.
 */

typedef short vp __attribute__((vector_size(4 * W))); /* W pairs in 16 bits */

ALWAYS_INLINE vi load_pairs(const bool bytes, const void *from, size_t at)
{
    if (bytes) {
        return WIDEN((const int8_t *)from + at);
    }
    vi pairs;
    memcpy(&pairs, (const int16_t *)from + at, sizeof pairs);
    return pairs;
}

static void path(round)(const float *x, int ldx, int rows, int n, const tsad_rounded *out)
{
    const vf magic = V_SET1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    int whole = n / W * W;
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ldx;
        int16_t *to = out->q + (size_t)t * (size_t)out->ld;
        vf square[4] = {V_SET1(0.0f), V_SET1(0.0f), V_SET1(0.0f), V_SET1(0.0f)};
        int i = 0;
        for (; i + 4 * W <= whole; i += 4 * W) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vf v = load(from + i + j * W);
                square[j] = V_FMA(v, v, square[j]);
            }
        }
        for (; i < whole; i += W) {
            square[0] = V_FMA(load(from + i), load(from + i), square[0]);
        }
        float squares = V_TOTAL((square[0] + square[1]) + (square[2] + square[3]));
        for (; i < n; i++) {
            squares += from[i] * from[i];
        }
        float scale = tsad_row_scale(squares, &out->unit[t]);
        if (scale == 0) {
            memset(to, 0, sizeof(int16_t) * (size_t)(n + n % 2));
            continue;
        }
        for (i = 0; i < whole; i += W) {
            vi v = (vi)V_FMA(load(from + i), V_SET1(scale), magic) - (vi)magic;
            vs rounded = __builtin_convertvector(v, vs);
            memcpy(to + i, &rounded, sizeof rounded);
        }
        for (; i < n; i++) {
            to[i] = (int16_t)lrintf(from[i] * scale);
        }
        if (n % 2) {
            to[n] = 0;
        }
    }
}

/* Sums of M rows by P panels, `stride` apart; like tile, but a step is a pair of inputs. */
ALWAYS_INLINE void dots16(const bool own, const bool bytes, const int M, const int P,
                          const int16_t *x, int ldx, const void *w, size_t stride, int pairs,
                          vi *out)
{
    const size_t size = bytes ? 1 : sizeof(int16_t);
    (void)own; /* on a path without an instruction of its own */
    vi sum[MAX_ROWS][MAX_PANELS][2];
    const int16_t *row[MAX_ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
        row[t] = x + (size_t)t * (size_t)ldx;
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            sum[t][p][0] = (vi){0};
            sum[t][p][1] = (vi){0};
        }
    }
    for (int i = 0; i < pairs; i++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const char *at = (const char *)w + (size_t)p * stride * size;
            vi w0 = load_pairs(bytes, at, 0), w1 = load_pairs(bytes, at, 2 * W);
            for (size_t line = 0; line < 2 * PANEL * size; line += 64) {
                __builtin_prefetch(at + FAR_AHEAD + line, 0, 2);
                __builtin_prefetch(at + NEAR_AHEAD + line, 0, 3);
            }
#pragma GCC unroll 16
            for (int t = 0; t < M; t++) {
                int pair;
                memcpy(&pair, row[t] + 2 * i, sizeof pair);
                vi v = (vi){0} + pair;
                DOT16(own, sum[t][p][0], w0, v);
                DOT16(own, sum[t][p][1], w1, v);
            }
        }
        w = (const char *)w + 2 * PANEL * size;
    }
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            out[(t * P + p) * 2] = sum[t][p][0];
            out[(t * P + p) * 2 + 1] = sum[t][p][1];
        }
    }
}

ALWAYS_INLINE void tile16(const bool own, const bool bytes, const int M, const int P,
                          const int16_t *x, int ldx, const float *unit, const tsad_packed *packed,
                          int column, tsad_activation act, float *y, int ldy)
{
    int pairs = (packed->n_in + 1) / 2;
    const size_t stride = (size_t)PANEL * (size_t)pairs * 2;
    size_t begin = (size_t)column * (size_t)pairs * 2;
    const void *w = bytes ? (const void *)(packed->q8 + begin) : (const void *)(packed->q + begin);
    vi sum[MAX_ROWS * MAX_PANELS * 2]; /* (M, P, 2) */
#ifdef OWN_DOTS16
    if (own && !bytes && P == 1) {
        OWN_DOTS16(M, x, ldx, (const int16_t *)w, pairs, sum);
    } else
#endif
        dots16(own, bytes, M, P, x, ldx, w, stride, pairs, sum);
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                int at = p * PANEL + half * W;
                vf scale = V_SET1(unit[t]) * load(packed->unit + column + at);
                vf v = V_FMA(__builtin_convertvector(sum[(t * P + p) * 2 + half], vf), scale,
                             load(packed->bias + column + at));
                store(y + (size_t)t * (size_t)ldy + column + at, v);
            }
        }
    }
    activate_tile(y + column, ldy, M, 2 * P, act);
}

#define TILE16(M, P)                                                                               \
    case M:                                                                                        \
        tile16(own, bytes, M, P, x, ldx, unit, packed, column, act, y, ldy);                       \
        break

ALWAYS_INLINE void narrow16(const bool own, const bool bytes, int rows, const int16_t *x, int ldx,
                            const float *unit, const tsad_packed *packed, int column,
                            tsad_activation act, float *y, int ldy)
{
    switch (rows) {
        TILE16(1, 1);
        TILE16(2, 1);
        TILE16(3, 1);
        TILE16(4, 1);
        TILE16(5, 1);
        TILE16(6, 1);
#if MAX_ROWS > 6
        TILE16(7, 1);
        TILE16(8, 1);
        TILE16(9, 1);
        TILE16(10, 1);
#endif
#if MAX_ROWS > 10
        TILE16(11, 1);
        TILE16(12, 1);
#endif
    default:
        break;
    }
}

ALWAYS_INLINE void wide16(const bool own, const bool bytes, int rows, const int16_t *x, int ldx,
                          const float *unit, const tsad_packed *packed, int column,
                          tsad_activation act, float *y, int ldy)
{
    switch (rows) {
        TILE16(1, MAX_PANELS);
        TILE16(2, MAX_PANELS);
        TILE16(3, MAX_PANELS);
    default:
        break;
    }
}

ALWAYS_INLINE void all16(const bool own, const bool bytes, const tsad_packed *packed,
                         const tsad_rounded *x, int rows, tsad_activation act, float *y, int ldy)
{
    int n = 0, tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if (rows <= 3) {
        for (; n + MAX_PANELS * PANEL <= packed->n_out; n += MAX_PANELS * PANEL) {
            wide16(own, bytes, rows, x->q, x->ld, x->unit, packed, n, act, y, ldy);
        }
    }
    for (; n < packed->n_out; n += PANEL) {
        for (int i = 0; i < tiles; i++) { /* as in linear */
            int from = rows * i / tiles, to = rows * (i + 1) / tiles;
            narrow16(own, bytes, to - from, x->q + (size_t)from * (size_t)x->ld, x->ld,
                     x->unit + from, packed, n, act, y + (size_t)from * (size_t)ldy, ldy);
        }
    }
}

static void path(linear16)(const tsad_packed *packed, const tsad_rounded *x, int rows,
                           tsad_activation act, float *y, int ldy)
{
    bool own = HAS_DOT16;
    if (own && packed->q8) {
        all16(true, true, packed, x, rows, act, y, ldy);
    } else if (own) {
        all16(true, false, packed, x, rows, act, y, ldy);
    } else if (packed->q8) {
        all16(false, true, packed, x, rows, act, y, ldy);
    } else {
        all16(false, false, packed, x, rows, act, y, ldy);
    }
}
