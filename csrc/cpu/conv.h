/* conv.h: a tile of a convolution over a vector of W floats; included by simd.h.
 *
 * Up to MAX_ROWS pixels by one panel of two vectors: every weight is loaded once for all pixels,
 * every input once for the panel, and the sums stay in registers.
 */

ALWAYS_INLINE void conv_pixels(const int M, const tsad_tile *t)
{
    vf sum[MAX_ROWS][2];
    const float *x[MAX_ROWS];
#pragma GCC unroll 16
    for (int p = 0; p < M; p++) {
        const float *y = t->y[p] + t->at;
        x[p] = t->x[p] + t->skip;
        if (!t->bias) {
            sum[p][0] = load(y);
            sum[p][1] = load(y + W);
        } else {
            sum[p][0] = load(t->bias);
            sum[p][1] = load(t->bias + W);
            if (t->residual) {
                sum[p][0] += load(y);
                sum[p][1] += load(y + W);
            }
        }
    }
    const float *w = t->w;
    for (int r = 0; r < t->rows; r++) {
        for (int i = 0; i < t->n; i++, w += PANEL) {
            vf w0 = load(w), w1 = load(w + W);
            __builtin_prefetch((const char *)w + NEAR_AHEAD, 0, 3);
#pragma GCC unroll 16
            for (int p = 0; p < M; p++) {
                vf v = V_SET1(x[p][i]);
                sum[p][0] = V_FMA(v, w0, sum[p][0]);
                sum[p][1] = V_FMA(v, w1, sum[p][1]);
            }
        }
#pragma GCC unroll 16
        for (int p = 0; p < M; p++) {
            x[p] += t->ld;
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < M; p++) {
        float *y = t->y[p] + t->at;
        store(y, t->relu ? activate(sum[p][0], TSAD_RELU) : sum[p][0]);
        store(y + W, t->relu ? activate(sum[p][1], TSAD_RELU) : sum[p][1]);
    }
}

#define CONV(M)                                                                                    \
    case M:                                                                                        \
        conv_pixels(M, t);                                                                         \
        break

static void path(conv)(const tsad_tile *t)
{
    switch (t->pixels) {
        CONV(1);
        CONV(2);
        CONV(3);
        CONV(4);
        CONV(5);
        CONV(6);
#if MAX_ROWS > 6
        CONV(7);
        CONV(8);
        CONV(9);
        CONV(10);
        CONV(11);
        CONV(12);
#endif
    default:
        break;
    }
}
