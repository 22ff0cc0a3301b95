/* conv16.h: a tile of a convolution in 16 bits, weights of 8 widened as they come; included by
 * simd.h. As conv.h's, by pairs of inputs; its sums are integers, and what is made of them is
 * rounded as plain C rounds it: no fused multiply-add.
 */

ALWAYS_INLINE void conv16_sums(const bool own, const bool bytes, const int M, const tsad_tile16 *t,
                               vi *out)
{
    (void)own; /* on a path without an instruction of its own */
    const size_t size = bytes ? 1 : 2;
    vi sum[MAX_ROWS][2];
    const int16_t *x[MAX_ROWS];
#pragma GCC unroll 16
    for (int p = 0; p < M; p++) {
        x[p] = t->x[p] + t->skip;
        sum[p][0] = sum[p][1] = (vi){0};
    }
    const char *w = bytes ? (const char *)t->w.q8 : (const char *)t->w.q;
    for (int r = 0; r < t->rows; r++) {
        for (int i = 0; i < t->pairs; i++, w += 2 * PANEL * size) {
            vi w0 = load_pairs(bytes, w, 0), w1 = load_pairs(bytes, w, 2 * W);
            __builtin_prefetch(w + NEAR_AHEAD, 0, 3);
#pragma GCC unroll 16
            for (int p = 0; p < M; p++) {
                int pair;
                memcpy(&pair, x[p] + 2 * i, sizeof pair);
                vi v = (vi){0} + pair;
                DOT16(own, sum[p][0], w0, v);
                DOT16(own, sum[p][1], w1, v);
            }
        }
#pragma GCC unroll 16
        for (int p = 0; p < M; p++) {
            x[p] += t->ld;
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < M; p++) {
        out[2 * p] = sum[p][0];
        out[2 * p + 1] = sum[p][1];
    }
}

/* what the sums are added to */
typedef enum begun { FROM_ZERO, FROM_BIAS, FROM_BOTH, FROM_Y } begun;

ALWAYS_INLINE void conv16_store(const int M, const begun from, const tsad_tile16 *t, const vi *sum)
{
    vf unit[2] = {load(t->unit), load(t->unit + W)};
#pragma GCC unroll 16
    for (int p = 0; p < M; p++) {
        float *y = t->y[p] + t->at;
        vf scale = V_SET1(t->units[p]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, y += W) {
            vf v = __builtin_convertvector(sum[2 * p + half], vf) * (scale * unit[half]);
            if (from == FROM_Y) {
                v = load(y) + v;
            } else if (from == FROM_BOTH) {
                v = (load(t->bias + half * W) + load(y)) + v;
            } else if (from == FROM_BIAS) {
                v = load(t->bias + half * W) + v;
            }
            store(y, t->relu ? activate(v, TSAD_RELU) : v);
        }
    }
}

ALWAYS_INLINE void conv16_pixels(const bool own, const bool bytes, const int M,
                                 const tsad_tile16 *t)
{
    vi sum[MAX_ROWS * 2];
#ifdef OWN_CONV16
    (void)own;
    OWN_CONV16(bytes, M, t, sum);
#else
    conv16_sums(own, bytes, M, t, sum);
#endif
    if (t->fresh) {
        conv16_store(M, FROM_ZERO, t, sum);
    } else if (!t->bias) {
        conv16_store(M, FROM_Y, t, sum);
    } else if (t->residual) {
        conv16_store(M, FROM_BOTH, t, sum);
    } else {
        conv16_store(M, FROM_BIAS, t, sum);
    }
}

#define CONV16(M)                                                                                  \
    case M:                                                                                        \
        conv16_pixels(own, bytes, M, t);                                                           \
        break

ALWAYS_INLINE void conv16_any(const bool own, const bool bytes, const tsad_tile16 *t)
{
    switch (t->pixels) {
        CONV16(1);
        CONV16(2);
        CONV16(3);
        CONV16(4);
        CONV16(5);
        CONV16(6);
#if MAX_ROWS > 6
        CONV16(7);
        CONV16(8);
        CONV16(9);
        CONV16(10);
        CONV16(11);
        CONV16(12);
#endif
    default:
        break;
    }
}

static void path(conv16)(const tsad_tile16 *t)
{
    bool own = HAS_DOT16;
    if (own && t->w.q8) {
        conv16_any(true, true, t);
    } else if (own) {
        conv16_any(true, false, t);
    } else if (t->w.q8) {
        conv16_any(false, true, t);
    } else {
        conv16_any(false, false, t);
    }
}

static void path(wino_in16)(const int16_t *x, size_t row, size_t ld, int channels, int16_t *v,
                            size_t plane)
{
    for (int c = 0; c < channels; c += 2 * W) {
        vp t[4][4];
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const int16_t *from = x + j * ld + (size_t)c;
            vp d[4];
#pragma GCC unroll 4
            for (size_t i = 0; i < 4; i++) {
                memcpy(&d[i], from + i * row, sizeof d[i]);
            }
            t[0][j] = d[0] - d[2];
            t[1][j] = d[1] + d[2];
            t[2][j] = d[2] - d[1];
            t[3][j] = d[1] - d[3];
        }
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            int16_t *to = v + 4 * i * plane + (size_t)c;
            vp out[4] = {t[i][0] - t[i][2], t[i][1] + t[i][2], t[i][2] - t[i][1],
                         t[i][1] - t[i][3]};
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++) {
                memcpy(to + j * plane, &out[j], sizeof out[j]);
            }
        }
    }
}

enum { GROUP = TSAD_NORM_GROUP };

static void path(group_sums)(const float *x, int width, size_t ld, float mean, bool squares,
                             float *sum)
{
    vf s[GROUP / W], centre = V_SET1(mean);
#pragma GCC unroll 4
    for (int j = 0; j < GROUP / W; j++) {
        s[j] = V_SET1(0.0f);
    }
    for (int i = 0; i < width; i++, x += ld) {
#pragma GCC unroll 4
        for (int j = 0; j < GROUP / W; j++) {
            vf v = load(x + j * W) - centre;
            s[j] += squares ? v * v : v;
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < GROUP / W; j++) {
        store(sum + j * W, s[j]);
    }
}

ALWAYS_INLINE uint32_t highest(vi bits)
{
    int found = 0;
    for (int i = 0; i < W; i++) {
        found = bits[i] > found ? bits[i] : found;
    }
    return (uint32_t)found;
}

static uint32_t path(group_row)(const tsad_norm_row *r)
{
    vi most = {0};
    const float *x = r->x;
    float *y = r->y;
    for (int i = 0; i < r->width; i++, x += r->ldx, y += r->ldy) {
#pragma GCC unroll 4
        for (int j = 0; j < GROUP; j += W) {
            vf v = (load(x + j) - V_SET1(r->mean)) * load(r->gain + j) + load(r->shift + j);
            v = r->residual ? v + load(y + j) : v;
            v = r->relu ? activate(v, TSAD_RELU) : v;
            store(y + j, v);
            vi bits = (vi)v & ((vi){0} + INT32_MAX);
            most = (vi)select_vf(bits > most, (vf)bits, (vf)most);
        }
    }
    return highest(most);
}

/* two roundings, as plain C's: the product's, and the sum's to an integer */
static void path(to16)(const float *x, size_t n, float scale, int16_t *to)
{
    const vf magic = V_SET1(12582912.0f); /* 1.5 * 2^23 */
    for (size_t i = 0; i < n; i += W) {
        vf scaled = load(x + i) * V_SET1(scale);
        vs rounded = __builtin_convertvector((vi)(scaled + magic) - (vi)magic, vs);
        memcpy(to + i, &rounded, sizeof rounded);
    }
}

static uint32_t path(most)(float *const *row, size_t at, int rows, int n)
{
    vi most = {0};
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < n; i += W) {
            vi bits = (vi)load(row[r] + at + i) & ((vi){0} + INT32_MAX);
            most = (vi)select_vf(bits > most, (vf)bits, (vf)most);
        }
    }
    return highest(most);
}
