/* simd.h: the kernels over a vector of W floats. Included once by each instruction set's file,
 * which defines before: W, vf (vector of W floats), vi (of W int32), PANEL (two vectors),
 * MAX_ROWS and MAX_PANELS (of a tile, by the number of registers), V_FMA(a, b, c) = a * b + c in
 * one rounding, V_SET1, V_TOTAL (the sum of a vector, always in the same tree), V_TOTALS(v, out)
 * (of four vectors), vs (W int16), DOT16(own, sum, w, x): sum += the products of pairs of int16, W
 * pairs at once, HAS_DOT16 whether this CPU has an instruction of its own for that (own),
 * WIDEN(from): W pairs of int8 there as int16, and path(name), which prefixes symbols; OWN_DOTS16,
 * where defined, is dots16 for one panel with that instruction, OWN_CONV16 a convolution's sums by
 * hand (conv16.h).
 *
 * The matrix product is a tile of up to MAX_ROWS rows by one panel of two vectors: every weight
 * is loaded once for all rows, in the order in which it lies in memory. It is fetched 16 KB ahead
 * into the second-level cache and 1 KB ahead into the first (measured on Zen 4, dense chunk, one
 * thread: 4 KB ahead into the first alone 146 to 171 ms, both 129 to 131; distances of 8 to 64 KB
 * are alike). Blocks of 512 inputs (in_blocks): a UNet of 249 million weights at 64 tokens, one
 * thread of Zen 3, 135 to 150 ms without them, 111 to 115 with; 110 to 126 with 256, 103 to 136
 * with 1024.
 */
#include "cpu.h"

#include <math.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { NEAR_AHEAD = 1024, FAR_AHEAD = 16384, MAX_TOKENS = 4096 }; /* bytes, bytes, rows */
enum { BLOCK = 512, MANY_TILES = 3 }; /* inputs; tiles that one panel is for */

ALWAYS_INLINE vf load(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

ALWAYS_INLINE vf select_vf(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
ALWAYS_INLINE vf lower(vf a, vf b) { return select_vf(a < b, a, b); }
ALWAYS_INLINE vf upper(vf a, vf b) { return select_vf(a > b, a, b); }

/* exp, 2 units in the last place; 0 below -87, NaN of NaN (which the bounds let through) */
ALWAYS_INLINE vf exponential(vf x)
{
    const vf magic = V_SET1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf clamped = upper(V_SET1(-87.0f), lower(V_SET1(88.0f), x));
    vf shifted = V_FMA(clamped, V_SET1(1.44269504f), magic);
    vf n = shifted - magic;
    vf r = V_FMA(n, V_SET1(-0.693145752f), clamped);
    r = V_FMA(n, V_SET1(-1.42860677e-6f), r);
    vf p = V_SET1(1.3981999e-3f);
    p = V_FMA(p, r, V_SET1(8.3334519e-3f));
    p = V_FMA(p, r, V_SET1(4.1665795e-2f));
    p = V_FMA(p, r, V_SET1(0.16666667f));
    p = V_FMA(p, r, V_SET1(0.5f));
    p = V_FMA(p, r, V_SET1(1.0f));
    p = V_FMA(p, r, V_SET1(1.0f));
    vi scale = ((vi)shifted - (vi)magic) << 23;
    return select_vf(x < V_SET1(-87.0f), V_SET1(0.0f), (vf)((vi)p + scale));
}

/* x * Phi(x): Phi - 1/2 is odd, x * R(x^2), R a degree-13 polynomial fitted on |x| <= 5.3 in the
 * variable x^2 mapped to [-1, 1], where nothing cancels; |error| of Phi 1.9e-7 in float32 */
ALWAYS_INLINE vf gelu(vf x)
{
    static const float R[] = {-6.519656132e-04f, 1.668331924e-03f,  -1.433658837e-03f,
                              1.925196975e-03f,  -5.462710269e-03f, 9.600075166e-03f,
                              -1.339639923e-02f, 1.867418539e-02f,  -2.524295801e-02f,
                              3.211837673e-02f,  -3.959507674e-02f, 4.926192739e-02f,
                              -6.651831391e-02f, 1.333925834e-01f};
    vf c = upper(lower(x, V_SET1(5.3f)), V_SET1(-5.3f));
    vf s = V_FMA(c * c, V_SET1(2.0f / (5.3f * 5.3f)), V_SET1(-1.0f));
    vf p = V_SET1(R[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof R / sizeof R[0]; i++) {
        p = V_FMA(p, s, V_SET1(R[i]));
    }
    return x * V_FMA(c, p, V_SET1(0.5f));
}

/* x * tanh(log(1 + e^x)) = x * (q - 1) / (q + 1) with q = (1 + e^x)^2; x itself above 20 */
ALWAYS_INLINE vf mish(vf x)
{
    vf e = exponential(lower(x, V_SET1(20.0f)));
    vf n = e * (e + V_SET1(2.0f));
    return select_vf(x > V_SET1(20.0f), x, x * n / (n + V_SET1(2.0f)));
}

/* x / (1 + e^-y); x = y: SiLU */
ALWAYS_INLINE vf times_sigmoid(vf x, vf y)
{
    return x / (V_SET1(1.0f) + exponential(V_SET1(0.0f) - y));
}

/* tanh(y) = 2 / (1 + e^-2y) - 1 */
ALWAYS_INLINE vf gelu_tanh(vf x)
{
    vf square = x * x;
    return times_sigmoid(x, x * V_FMA(square, V_SET1(0.0713548163f), V_SET1(1.59576912f)));
}

ALWAYS_INLINE vf activate(vf x, tsad_activation act)
{
    switch (act) {
    case TSAD_GELU:
        return gelu(x);
    case TSAD_RELU:
        return select_vf(x < V_SET1(0.0f), V_SET1(0.0f), x); /* NaN stays */
    case TSAD_MISH:
        return mish(x);
    case TSAD_GELU_TANH:
        return gelu_tanh(x);
    case TSAD_SILU:
        return times_sigmoid(x, x);
    default:
        return x;
    }
}

#define ACTIVATE_ALL(act)                                                                          \
    case act:                                                                                      \
        for (int t = 0; t < rows; t++, y += ldy) {                                                 \
            for (int i = 0; i < vectors; i++) {                                                    \
                store(y + i * W, activate(load(y + i * W), act));                                  \
            }                                                                                      \
        }                                                                                          \
        break

/* What a tile has just written, `vectors` of each row. Not within the tiles, every one of which
 * would hold all activations: a minute of gcc and a megabyte. A loop for each, or it would be
 * chosen anew for every vector. */
static void activate_tile(float *y, int ldy, int rows, int vectors, tsad_activation act)
{
    switch (act) {
        ACTIVATE_ALL(TSAD_GELU);
        ACTIVATE_ALL(TSAD_RELU);
        ACTIVATE_ALL(TSAD_MISH);
        ACTIVATE_ALL(TSAD_GELU_TANH);
        ACTIVATE_ALL(TSAD_SILU);
    default:
        break;
    }
}

/* ---- y = activation(x W + bias) ----------------------------------------------------------- */

/* Inputs that a tile meets of many: its sums go on from `begun`, rows ld_begun apart (the bias, 0;
 * or y), and with each step it fetches `pace` bytes from `next` on for the tiles to come. */
typedef struct part {
    const float *begun;
    int ld_begun;
    const char *next;
    size_t pace;
} part;

/* M rows by P panels, `stride` floats apart; M * P keeps the multipliers busy within the registers.
 * `parts`: of a block's inputs, see part; else of all. */
ALWAYS_INLINE void tile(const bool parts, const int M, const int P, const float *x, int ldx,
                        const float *w, size_t stride, part of, int n_in, tsad_activation act,
                        float *y, int ldy)
{
    const size_t lines = PANEL * sizeof(float) / 64;
    vf sum[MAX_ROWS][MAX_PANELS][2];
    const float *row[MAX_ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
        row[t] = x + (size_t)t * (size_t)ldx;
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const float *from =
                of.begun + (parts ? (size_t)t * (size_t)of.ld_begun : 0) + p * PANEL;
            sum[t][p][0] = load(from);
            sum[t][p][1] = load(from + W);
        }
    }
    for (int i = 0; i < n_in; i++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const float *at = w + (size_t)p * stride;
            vf w0 = load(at), w1 = load(at + W);
            for (size_t line = 0; line < lines; line++) {
                __builtin_prefetch((const char *)at + NEAR_AHEAD + line * 64, 0, 3);
                const char *far = parts ? of.next + line * (of.pace / (lines ? lines : 1))
                                        : (const char *)at + FAR_AHEAD + line * 64;
                __builtin_prefetch(far, 0, 2);
            }
#pragma GCC unroll 16
            for (int t = 0; t < M; t++) {
                vf v = V_SET1(row[t][i]);
                sum[t][p][0] = V_FMA(v, w0, sum[t][p][0]);
                sum[t][p][1] = V_FMA(v, w1, sum[t][p][1]);
            }
        }
        w += PANEL;
        of.next += of.pace;
    }
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            float *to = y + (size_t)t * (size_t)ldy + p * PANEL;
            store(to, sum[t][p][0]);
            store(to + W, sum[t][p][1]);
        }
    }
    activate_tile(y, ldy, M, 2 * P, act);
}

#define TILE(M, P)                                                                                 \
    case M:                                                                                        \
        tile(parts, M, P, x, ldx, w, stride, of, n_in, act, y, ldy);                               \
        break

/* one panel */
ALWAYS_INLINE void narrow(const bool parts, int rows, const float *x, int ldx, const float *w,
                          part of, int n_in, tsad_activation act, float *y, int ldy)
{
    const size_t stride = 0;
    switch (rows) {
        TILE(1, 1);
        TILE(2, 1);
        TILE(3, 1);
        TILE(4, 1);
        TILE(5, 1);
        TILE(6, 1);
#if MAX_ROWS > 6
        TILE(7, 1);
        TILE(8, 1);
        TILE(9, 1);
        TILE(10, 1);
#endif
#if MAX_ROWS > 10
        TILE(11, 1);
        TILE(12, 1);
#endif
    default:
        break;
    }
}

static void whole(int rows, const float *x, int ldx, const float *w, const float *bias, int n_in,
                  tsad_activation act, float *y, int ldy)
{
    narrow(false, rows, x, ldx, w, (part){.begun = bias}, n_in, act, y, ldy);
}

static void partial(int rows, const float *x, int ldx, const float *w, part of, int n_in,
                    tsad_activation act, float *y, int ldy)
{
    narrow(true, rows, x, ldx, w, of, n_in, act, y, ldy);
}

/* few rows: MAX_PANELS panels at once, or a row's sums would wait for each other */
static void wide(int rows, const float *x, int ldx, const float *w, size_t stride,
                 const float *bias, int n_in, tsad_activation act, float *y, int ldy)
{
    const bool parts = false;
    const part of = {.begun = bias};
    switch (rows) {
        TILE(1, MAX_PANELS);
        TILE(2, MAX_PANELS);
        TILE(3, MAX_PANELS);
    default:
        break;
    }
}

ALWAYS_INLINE float dot(const float *a, const float *b, int n)
{
    vf sum = V_SET1(0.0f);
    float rest = 0;
    int i = 0;
    for (; i + W <= n; i += W) {
        sum = V_FMA(load(a + i), load(b + i), sum);
    }
    for (; i < n; i++) {
        rest += a[i] * b[i];
    }
    return V_TOTAL(sum) + rest;
}

static void thin(const tsad_packed *w, const float *x, int ldx, int rows, tsad_activation act,
                 float *y, int ldy)
{
    size_t ld = (size_t)tsad_pad(w->n_in);
    for (int t = 0; t < rows; t++) {
        for (int n = 0; n < w->n_out; n++) {
            float sum = dot(x + (size_t)t * (size_t)ldx, w->w + (size_t)n * ld, w->n_in);
            y[(size_t)t * (size_t)ldy + (size_t)n] = activate(V_SET1(sum + w->bias[n]), act)[0];
        }
    }
}

/* A panel for many tiles: block by block, which they share and which stays near. Meanwhile they
 * fetch the next block, each a part of it, or memory would rest while all but the first of them
 * multiply. */
static void in_blocks(const float *w, const float *bias, const float *x, int ldx, int rows,
                      int n_in, tsad_activation act, float *y, int ldy)
{
    const size_t line = PANEL * sizeof(float);
    int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    part of = {.begun = bias, .pace = line / (size_t)tiles};
    for (int k = 0, n; k < n_in; k += n) {
        n = n_in - k < BLOCK ? n_in - k : BLOCK;
        size_t bytes = line * (size_t)n, share = bytes / (size_t)tiles;
        for (int i = 0; i < tiles; i++) {
            int from = rows * i / tiles, to = rows * (i + 1) / tiles;
            float *out = y + (size_t)from * (size_t)ldy;
            of.begun = k ? out : bias;
            of.ld_begun = k ? ldy : 0;
            of.next = (const char *)w + bytes + (size_t)i * share;
            partial(to - from, x + (size_t)from * (size_t)ldx + k, ldx, w, of, n,
                    k + n < n_in ? TSAD_LINEAR_ONLY : act, out, ldy);
        }
        w += (size_t)n * PANEL;
    }
}

static void path(linear)(const tsad_packed *packed, const float *x, int ldx, int rows,
                         tsad_activation act, float *y, int ldy)
{
    if (packed->thin) {
        thin(packed, x, ldx, rows, act, y, ldy);
        return;
    }
    int n = 0, tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    size_t stride = (size_t)PANEL * (size_t)packed->n_in;
    if (rows <= 3) {
        for (; n + MAX_PANELS * PANEL <= packed->n_out; n += MAX_PANELS * PANEL) {
            wide(rows, x, ldx, packed->w + (size_t)n * (size_t)packed->n_in, stride,
                 packed->bias + n, packed->n_in, act, y + n, ldy);
        }
    }
    for (; n < packed->n_out; n += PANEL) {
        const float *w = packed->w + (size_t)n * (size_t)packed->n_in;
        if (tiles >= MANY_TILES) {
            in_blocks(w, packed->bias + n, x, ldx, rows, packed->n_in, act, y + n, ldy);
            continue;
        }
        for (int i = 0; i < tiles; i++) { /* as equal as can be; the panel is in L1 by then */
            int from = rows * i / tiles, to = rows * (i + 1) / tiles;
            whole(to - from, x + (size_t)from * (size_t)ldx, ldx, w, packed->bias + n, packed->n_in,
                  act, y + (size_t)from * (size_t)ldy + n, ldy);
        }
    }
}

#include "simd16.h"

/* ---- LayerNorm ----------------------------------------------------------------------------- */

static void path(layernorm)(const float *x, int ld, int rows, int n, float eps, float *y)
{
    int whole = n / W * W;
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ld;
        float *to = y + (size_t)t * (size_t)ld;
        vf sum = V_SET1(0.0f);
        float rest = 0;
        for (int i = 0; i < whole; i += W) {
            sum += load(from + i);
        }
        for (int i = whole; i < n; i++) {
            rest += from[i];
        }
        float mean = (V_TOTAL(sum) + rest) / (float)n;
        vf centre = V_SET1(mean), square = V_SET1(0.0f);
        rest = 0;
        for (int i = 0; i < whole; i += W) {
            vf v = load(from + i) - centre;
            square = V_FMA(v, v, square);
        }
        for (int i = whole; i < n; i++) {
            rest += (from[i] - mean) * (from[i] - mean);
        }
        float scale = tsad_norm_scale((V_TOTAL(square) + rest) / (float)n, eps);
        for (int i = 0; i < whole; i += W) {
            store(to + i, (load(from + i) - centre) * V_SET1(scale));
        }
        for (int i = whole; i < n; i++) {
            to[i] = (from[i] - mean) * scale;
        }
    }
}

/* ---- GroupNorm and what follows it --------------------------------------------------------- */

/* sum of the group; with `centre`, of squared distances from it */
ALWAYS_INLINE float group_sum(const bool squares, float centre, const float *x, int ld, int rows,
                              int n)
{
    vf sum = V_SET1(0.0f);
    float rest = 0;
    for (int t = 0; t < rows; t++) {
        const float *row = x + (size_t)t * (size_t)ld;
        int i = 0;
        for (; i + W <= n; i += W) {
            vf v = load(row + i) - V_SET1(centre);
            sum = squares ? V_FMA(v, v, sum) : sum + v;
        }
        for (; i < n; i++) {
            float v = row[i] - centre;
            rest += squares ? v * v : v;
        }
    }
    return V_TOTAL(sum) + rest;
}

static void path(groupnorm)(float *x, int ld, int rows, int n, const tsad_after *after)
{
    float count = (float)rows * (float)n;
    float mean = group_sum(false, 0, x, ld, rows, n) / count;
    float unit = tsad_norm_scale(group_sum(true, mean, x, ld, rows, n) / count, 1e-5f);
    const float *scale = after->scale, *move = after->move;
    for (int t = 0; t < rows; t++) {
        float *row = x + (size_t)t * (size_t)ld;
        int i = 0;
        for (; i + W <= n; i += W) {
            vf v = (load(row + i) - V_SET1(mean)) * V_SET1(unit);
            v = activate(V_FMA(v, load(after->gain + i), load(after->shift + i)),
                         after->activation);
            v = scale ? V_FMA(v, load(scale + i), load(move + i)) : move ? v + load(move + i) : v;
            store(row + i, v);
        }
        for (; i < n; i++) {
            float v = (row[i] - mean) * unit * after->gain[i] + after->shift[i];
            v = activate(V_SET1(v), after->activation)[0];
            v = scale ? v * scale[i] : v;
            row[i] = move ? v + move[i] : v;
        }
    }
}

/* ---- attention ----------------------------------------------------------------------------- */

/* weight[0 .. n) = softmax; room for n rounded up to W */
ALWAYS_INLINE void softmax(float *weight, int n)
{
    float top = weight[0];
    for (int i = 1; i < n; i++) {
        top = weight[i] > top ? weight[i] : top;
    }
    for (int i = n; i % W; i++) {
        weight[i] = -INFINITY;
    }
    vf sum = V_SET1(0.0f);
    for (int i = 0; i < n; i += W) {
        vf e = exponential(load(weight + i) - V_SET1(top));
        store(weight + i, e);
        sum += e;
    }
    float scale = 1 / V_TOTAL(sum);
    for (int i = 0; i < n; i += W) {
        store(weight + i, load(weight + i) * V_SET1(scale));
    }
}

static void path(attention)(const float *qkv, int ld, int rows, int heads, int head_dim,
                            bool causal, float *y, int ldy)
{
    float weight[MAX_TOKENS + W];
    int width = heads * head_dim, whole = head_dim / W * W;
    for (int t = 0; t < rows; t++) {
        int n = causal ? t + 1 : rows;
        for (int h = 0; h < heads; h++) {
            const float *q = qkv + (size_t)t * (size_t)ld + h * head_dim;
            const float *k = qkv + width + h * head_dim, *v = k + width;
            float *out = y + (size_t)t * (size_t)ldy + h * head_dim;
            for (int u = 0; u < n; u++) {
                weight[u] = dot(q, k + (size_t)u * (size_t)ld, head_dim);
            }
            softmax(weight, n);
            for (int i = 0; i < whole; i += W) {
                vf sum = V_SET1(0.0f);
                for (int u = 0; u < n; u++) {
                    sum = V_FMA(V_SET1(weight[u]), load(v + (size_t)u * (size_t)ld + i), sum);
                }
                store(out + i, sum);
            }
            for (int i = whole; i < head_dim; i++) {
                float sum = 0;
                for (int u = 0; u < n; u++) {
                    sum += weight[u] * v[(size_t)u * (size_t)ld + (size_t)i];
                }
                out[i] = sum;
            }
        }
    }
}

/* Scores of one row against the folded tokens, HEADS heads of a token at once. plane[s * stride +
 * h] is the score of head h. */
ALWAYS_INLINE void cross_scores(const int HEADS, const tsad_cross *c, const float *x, int h, int n,
                                int stride, float *plane)
{
    int d = c->fold->width, whole = d / W * W;
    for (int s = 0; s < n; s++) {
        const float *key = c->tokens[s] + (size_t)h * (size_t)d;
        vf sum[4];
#pragma GCC unroll 4
        for (int j = 0; j < HEADS; j++) {
            sum[j] = V_SET1(0.0f);
        }
        for (int i = 0; i < whole; i += W) {
            vf v = load(x + i);
#pragma GCC unroll 4
            for (int j = 0; j < HEADS; j++) {
                sum[j] = V_FMA(v, load(key + (size_t)j * (size_t)d + i), sum[j]);
            }
        }
        float total[4];
        if (HEADS == 4) {
            V_TOTALS(sum, total);
        } else {
            total[0] = V_TOTAL(sum[0]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < HEADS; j++) {
            float rest = 0;
            for (int i = whole; i < d; i++) {
                rest += x[i] * key[(size_t)j * (size_t)d + (size_t)i];
            }
            plane[s * stride + h + j] =
                total[j] + rest + c->tokens[s][c->fold->shift + (size_t)(h + j)];
        }
    }
}

/* Scores of all rows and heads, then their softmax over the tokens, W rows and heads at once:
 * weight (S, stride), stride >= rows * heads rounded up to W. Tokens that a row does not see get
 * no weight. */
ALWAYS_INLINE void cross_weights(const tsad_cross *c, const float *x, int ld, int rows, int stride,
                                 float *weight)
{
    int heads = c->fold->n_heads, S = c->n_tokens;
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ld;
        float *plane = weight + t * heads;
        int n = c->causal && t + 2 < S ? t + 2 : S, h = 0;
        for (; h + 4 <= heads; h += 4) {
            cross_scores(4, c, from, h, n, stride, plane);
        }
        for (; h < heads; h++) {
            cross_scores(1, c, from, h, n, stride, plane);
        }
        for (int s = n; s < S; s++) {
            for (h = 0; h < heads; h++) {
                plane[s * stride + h] = -INFINITY;
            }
        }
    }
    for (int s = 0; s < S; s++) {
        for (int i = rows * heads; i % W; i++) {
            weight[s * stride + i] = 0;
        }
    }
    for (int i = 0; i < rows * heads; i += W) {
        vf top = load(weight + i), sum = V_SET1(0.0f);
        for (int s = 1; s < S; s++) {
            top = upper(load(weight + s * stride + i), top);
        }
        for (int s = 0; s < S; s++) {
            vf e = exponential(load(weight + s * stride + i) - top);
            store(weight + s * stride + i, e);
            sum += e;
        }
        vf scale = V_SET1(1.0f) / sum;
        for (int s = 0; s < S; s++) {
            store(weight + s * stride + i, load(weight + s * stride + i) * scale);
        }
    }
}

/* out[i .. i + V * W) = bias + sum of weighted values */
ALWAYS_INLINE void cross_values(const int V, const tsad_cross *c, const float *weight, int n,
                                int stride, int i, float *out)
{
    vf sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
        sum[j] = load(c->bias + i + j * W);
    }
    for (int h = 0; h < c->fold->n_heads; h++) {
        size_t at = c->fold->value + (size_t)h * (size_t)c->fold->width + (size_t)i;
        for (int s = 0; s < n; s++) {
            vf p = V_SET1(weight[s * stride + h]);
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) {
                sum[j] = V_FMA(p, load(c->tokens[s] + at + j * W), sum[j]);
            }
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
        store(out + i + j * W, sum[j]);
    }
}

static void path(cross)(const tsad_cross *c, const float *x, int ld, int rows, float *y)
{
    int d = c->fold->width, heads = c->fold->n_heads, whole = d / W * W;
    int stride = (rows * heads + W - 1) / W * W;
    cross_weights(c, x, ld, rows, stride, c->work);
    for (int t = 0; t < rows; t++) {
        const float *weight = c->work + t * heads;
        float *out = y + (size_t)t * (size_t)ld;
        int n = c->causal && t + 2 < c->n_tokens ? t + 2 : c->n_tokens, i = 0;
        for (; i + 4 * W <= whole; i += 4 * W) {
            cross_values(4, c, weight, n, stride, i, out);
        }
        for (; i < whole; i += W) {
            cross_values(1, c, weight, n, stride, i, out);
        }
        for (; i < d; i++) {
            float sum = c->bias[i];
            for (int h = 0; h < heads; h++) {
                size_t at = c->fold->value + (size_t)h * (size_t)d + (size_t)i;
                for (int s = 0; s < n; s++) {
                    sum += weight[s * stride + h] * c->tokens[s][at];
                }
            }
            out[i] = sum;
        }
    }
}

/* ---- sums ---------------------------------------------------------------------------------- */

static void path(add)(float *x, const float *const *source, const float *weight, int n,
                      size_t floats)
{
    for (size_t i = 0; i < floats; i += 2 * W) { /* rows are whole panels */
        vf w = V_SET1(weight[0]), a = w * load(source[0] + i), b = w * load(source[0] + i + W);
        for (int s = 1; s < n; s++) {
            w = V_SET1(weight[s]);
            a = V_FMA(w, load(source[s] + i), a);
            b = V_FMA(w, load(source[s] + i + W), b);
        }
        store(x + i, load(x + i) + a);
        store(x + i + W, load(x + i + W) + b);
    }
}

static void path(finish)(float *x, float *slot, const float *const *group, int n, size_t floats)
{
    for (size_t i = 0; i < floats; i += W) {
        vf sum = load(group[0] + i);
        if (n == 4) {
            sum = (sum + load(group[1] + i)) + (load(group[2] + i) + load(group[3] + i));
        } else {
            for (int g = 1; g < n; g++) {
                sum += load(group[g] + i);
            }
        }
        store(x + i, load(x + i) + sum);
        if (slot) {
            store(slot + i, sum);
        }
    }
}

#include "conv.h"
#include "conv16.h"

static const tsad_kernels path(kernels) = {.panel = PANEL,
                                           .tile = MAX_ROWS,
                                           .linear = path(linear),
                                           .round = path(round),
                                           .linear16 = path(linear16),
                                           .layernorm = path(layernorm),
                                           .groupnorm = path(groupnorm),
                                           .attention = path(attention),
                                           .cross = path(cross),
                                           .add = path(add),
                                           .finish = path(finish),
                                           .conv = path(conv),
                                           .conv16 = path(conv16),
                                           .wino_in16 = path(wino_in16),
                                           .group_sums = path(group_sums),
                                           .group_row = path(group_row),
                                           .to16 = path(to16),
                                           .most = path(most),
                                           .pool = path(pool),
                                           .wino_in = path(wino_in),
                                           .wino_out = path(wino_out)};
