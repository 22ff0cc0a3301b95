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

static void path(pool)(const float *const *x, int n, int channels, float *y)
{
    for (int c = 0; c < channels; c += W) {
        vf most = load(x[0] + c);
        for (int i = 1; i < n; i++) {
            vf v = load(x[i] + c);
            most = select_vf((v > most) | (v != v), v, most);
        }
        store(y + c, most);
    }
}

/* ---- Winograd, F(2x2, 3x3) ------------------------------------------------------------------ */

static void path(wino_in)(const float *x, size_t row, size_t ld, int channels, float *v,
                          size_t plane)
{
    for (int c = 0; c < channels; c += W) {
        vf t[4][4];
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const float *from = x + j * ld + (size_t)c;
            vf d0 = load(from), d1 = load(from + row), d2 = load(from + 2 * row);
            t[0][j] = d0 - d2;
            t[1][j] = d1 + d2;
            t[2][j] = d2 - d1;
            t[3][j] = d1 - load(from + 3 * row);
        }
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            float *to = v + 4 * i * plane + (size_t)c;
            store(to, t[i][0] - t[i][2]);
            store(to + plane, t[i][1] + t[i][2]);
            store(to + 2 * plane, t[i][2] - t[i][1]);
            store(to + 3 * plane, t[i][1] - t[i][3]);
        }
    }
}

static void path(wino_out)(const tsad_wino_out *t)
{
    for (int o = 0; o < PANEL; o += W) {
        vf s[2][4];
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const float *from = t->m + j * t->plane + (size_t)o;
            vf m1 = load(from + 4 * t->plane), m2 = load(from + 8 * t->plane);
            s[0][j] = load(from) + m1 + m2;
            s[1][j] = m1 - m2 - load(from + 12 * t->plane);
        }
        vf bias = load(t->bias + o);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            vf out[2] = {s[i][0] + s[i][1] + s[i][2], s[i][1] - s[i][2] - s[i][3]};
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                if (i < t->rows && j < t->columns) {
                    float *y = t->y + (size_t)i * t->row + (size_t)j * t->ld + (size_t)o;
                    vf sum = out[j] + bias;
                    sum = t->residual ? sum + load(y) : sum;
                    store(y, t->relu ? activate(sum, TSAD_RELU) : sum);
                }
            }
        }
    }
}
