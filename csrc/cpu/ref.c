/* ref.c: every kernel in plain C. It equals tsad/reference.py (up to the exact rewrites), and the
 * vector paths equal it. Compiled without contraction, so the bits are the same everywhere. */
#include "cpu.h"

#include <math.h>

enum { PANEL = 16, TILE = 4 };

static void thin(const tsad_packed *w, const float *x, int ldx, int rows, tsad_activation act,
                 float *y, int ldy)
{
    for (int t = 0; t < rows; t++) {
        for (int n = 0; n < w->n_out; n++) {
            const float *row = w->w + (size_t)n * (size_t)tsad_pad(w->n_in);
            float sum = w->bias[n];
            for (int i = 0; i < w->n_in; i++) {
                sum += x[(size_t)t * (size_t)ldx + (size_t)i] * row[i];
            }
            y[(size_t)t * (size_t)ldy + (size_t)n] = tsad_activate(sum, act);
        }
    }
}

static void ref_linear(const tsad_packed *w, const float *x, int ldx, int rows, tsad_activation act,
                       float *y, int ldy)
{
    if (w->thin) {
        thin(w, x, ldx, rows, act, y, ldy);
        return;
    }
    for (int n = 0; n < w->n_out; n += PANEL) {
        const float *panel = w->w + (size_t)n * (size_t)w->n_in;
        for (int t = 0; t < rows; t++) {
            float sum[PANEL];
            for (int j = 0; j < PANEL; j++) {
                sum[j] = w->bias[n + j];
            }
            for (int i = 0; i < w->n_in; i++) {
                float xi = x[(size_t)t * (size_t)ldx + (size_t)i];
                for (int j = 0; j < PANEL; j++) {
                    sum[j] += xi * panel[(size_t)i * PANEL + (size_t)j];
                }
            }
            for (int j = 0; j < PANEL; j++) {
                y[(size_t)t * (size_t)ldy + (size_t)(n + j)] = tsad_activate(sum[j], act);
            }
        }
    }
}

static void ref_round(const float *x, int ldx, int rows, int n, const tsad_rounded *out)
{
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ldx;
        int16_t *to = out->q + (size_t)t * (size_t)out->ld;
        float square = 0;
        for (int i = 0; i < n; i++) {
            square += from[i] * from[i];
        }
        float scale = tsad_row_scale(square, &out->unit[t]);
        for (int i = 0; i < n; i++) {
            to[i] = scale > 0 ? (int16_t)lrintf(from[i] * scale) : 0;
        }
        if (n % 2) {
            to[n] = 0;
        }
    }
}

static void ref_linear16(const tsad_packed *w, const tsad_rounded *x, int rows, tsad_activation act,
                         float *y, int ldy)
{
    int pairs = (w->n_in + 1) / 2;
    for (int n = 0; n < w->n_out; n += PANEL) {
        size_t panel = (size_t)n * (size_t)pairs * 2;
        for (int t = 0; t < rows; t++) {
            const int16_t *row = x->q + (size_t)t * (size_t)x->ld;
            int32_t sum[PANEL] = {0};
            for (int i = 0; i < 2 * pairs; i++) {
                for (int j = 0; j < PANEL; j++) {
                    size_t at = panel + (size_t)((i / 2 * PANEL + j) * 2 + i % 2);
                    sum[j] += row[i] * (w->q ? w->q[at] : w->q8[at]);
                }
            }
            for (int j = 0; j < PANEL; j++) {
                float v = (float)sum[j] * (x->unit[t] * w->unit[n + j]) + w->bias[n + j];
                y[(size_t)t * (size_t)ldy + (size_t)(n + j)] = tsad_activate(v, act);
            }
        }
    }
}

static void ref_layernorm(const float *x, int ld, int rows, int n, float eps, float *y)
{
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ld;
        float *to = y + (size_t)t * (size_t)ld;
        float mean = 0, variance = 0;
        for (int i = 0; i < n; i++) {
            mean += from[i];
        }
        mean /= (float)n;
        for (int i = 0; i < n; i++) {
            variance += (from[i] - mean) * (from[i] - mean);
        }
        float scale = tsad_norm_scale(variance / (float)n, eps);
        for (int i = 0; i < n; i++) {
            to[i] = (from[i] - mean) * scale;
        }
    }
}

/* weight[0 .. n) = softmax, in place */
static void ref_groupnorm(float *x, int ld, int rows, int n, const tsad_after *after)
{
    double sum = 0, square = 0;
    for (int t = 0; t < rows; t++) {
        for (int i = 0; i < n; i++) {
            sum += x[t * ld + i];
        }
    }
    float mean = (float)(sum / (rows * n));
    for (int t = 0; t < rows; t++) {
        for (int i = 0; i < n; i++) {
            float v = x[t * ld + i] - mean;
            square += (double)v * v;
        }
    }
    float scale = tsad_norm_scale((float)(square / (rows * n)), 1e-5f);
    for (int t = 0; t < rows; t++) {
        for (int i = 0; i < n; i++) {
            float v = (x[t * ld + i] - mean) * scale * after->gain[i] + after->shift[i];
            v = tsad_activate(v, after->activation);
            v = after->scale ? v * after->scale[i] : v;
            x[t * ld + i] = after->move ? v + after->move[i] : v;
        }
    }
}

static void softmax(float *weight, int n)
{
    float top = weight[0], sum = 0;
    for (int i = 1; i < n; i++) {
        top = weight[i] > top ? weight[i] : top;
    }
    for (int i = 0; i < n; i++) {
        weight[i] = expf(weight[i] - top);
        sum += weight[i];
    }
    for (int i = 0; i < n; i++) {
        weight[i] /= sum;
    }
}

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

static void ref_attention(const float *qkv, int ld, int rows, int heads, int head_dim, bool causal,
                          float *y, int ldy)
{
    enum { MAX_ROWS = 4096 };
    float weight[MAX_ROWS];
    int width = heads * head_dim;
    for (int t = 0; t < rows; t++) {
        int n = causal ? t + 1 : rows;
        for (int h = 0; h < heads; h++) {
            const float *q = qkv + (size_t)t * (size_t)ld + h * head_dim;
            for (int u = 0; u < n; u++) {
                weight[u] = dot(q, qkv + (size_t)u * (size_t)ld + width + h * head_dim, head_dim);
            }
            softmax(weight, n);
            float *out = y + (size_t)t * (size_t)ldy + h * head_dim;
            for (int j = 0; j < head_dim; j++) {
                out[j] = 0;
            }
            for (int u = 0; u < n; u++) {
                const float *v = qkv + (size_t)u * (size_t)ld + 2 * width + h * head_dim;
                for (int j = 0; j < head_dim; j++) {
                    out[j] += weight[u] * v[j];
                }
            }
        }
    }
}

static void ref_cross(const tsad_cross *c, const float *x, int ld, int rows, float *y)
{
    int d = c->fold->width, heads = c->fold->n_heads;
    for (int t = 0; t < rows; t++) {
        const float *from = x + (size_t)t * (size_t)ld;
        float *out = y + (size_t)t * (size_t)ld;
        int n = c->causal && t + 2 < c->n_tokens ? t + 2 : c->n_tokens;
        for (int i = 0; i < d; i++) {
            out[i] = c->bias[i];
        }
        for (int h = 0; h < heads; h++) {
            size_t head = (size_t)h * (size_t)d;
            for (int s = 0; s < n; s++) {
                const float *token = c->tokens[s];
                c->work[s] = dot(from, token + head, d) + token[c->fold->shift + (size_t)h];
            }
            softmax(c->work, n);
            for (int s = 0; s < n; s++) {
                const float *value = c->tokens[s] + c->fold->value + head;
                for (int i = 0; i < d; i++) {
                    out[i] += c->work[s] * value[i];
                }
            }
        }
    }
}

static void ref_add(float *x, const float *const *source, const float *weight, int n, size_t floats)
{
    for (size_t i = 0; i < floats; i++) {
        float sum = weight[0] * source[0][i];
        for (int s = 1; s < n; s++) {
            sum += weight[s] * source[s][i];
        }
        x[i] += sum;
    }
}

static void ref_finish(float *x, float *slot, const float *const *group, int n, size_t floats)
{
    for (size_t i = 0; i < floats; i++) {
        float sum = group[0][i];
        if (n == 4) {
            sum = (sum + group[1][i]) + (group[2][i] + group[3][i]);
        } else {
            for (int g = 1; g < n; g++) {
                sum += group[g][i];
            }
        }
        x[i] += sum;
        if (slot) {
            slot[i] = sum;
        }
    }
}

/* input by input, as the vectors do: the compiler sees a panel's sums beside each other */
static void ref_conv(const tsad_tile *t)
{
    for (int p = 0; p < t->pixels; p++) {
        float *y = t->y[p] + t->at, sum[PANEL];
        for (int o = 0; o < PANEL; o++) {
            sum[o] = t->bias ? t->bias[o] : y[o];
            sum[o] += t->bias && t->residual ? y[o] : 0;
        }
        const float *w = t->w;
        for (int r = 0; r < t->rows; r++) {
            const float *x = t->x[p] + t->skip + (size_t)r * t->ld;
            for (int i = 0; i < t->n; i++, w += PANEL) {
                for (int o = 0; o < PANEL; o++) {
                    sum[o] += x[i] * w[o];
                }
            }
        }
        for (int o = 0; o < PANEL; o++) {
            y[o] = t->relu && sum[o] < 0 ? 0 : sum[o]; /* NaN stays */
        }
    }
}

static void ref_pool(const float *const *x, int n, int channels, float *y)
{
    for (int c = 0; c < channels; c++) {
        float most = x[0][c];
        for (int i = 1; i < n; i++) {
            most = x[i][c] > most || x[i][c] != x[i][c] ? x[i][c] : most;
        }
        y[c] = most;
    }
}

static void ref_conv16(const tsad_tile16 *t)
{
    for (int p = 0; p < t->pixels; p++) {
        int32_t sum[PANEL] = {0};
        size_t at = 0;
        const int16_t *w = t->w.q;
        const int8_t *w8 = t->w.q8;
        for (int r = 0; r < t->rows; r++) {
            const int16_t *x = t->x[p] + t->skip + (size_t)r * t->ld;
            for (int i = 0; i < t->pairs; i++, x += 2) {
                for (int o = 0; o < PANEL; o++, at += 2) {
                    int w0 = w8 ? w8[at] : w[at], w1 = w8 ? w8[at + 1] : w[at + 1];
                    sum[o] += x[0] * w0 + x[1] * w1;
                }
            }
        }
        float *y = t->y[p] + t->at;
        for (int o = 0; o < PANEL; o++) {
            float v = t->fresh ? 0 : t->bias ? t->bias[o] : y[o];
            v = t->bias && t->residual ? v + y[o] : v;
            v += (float)sum[o] * (t->units[p] * t->unit[o]);
            y[o] = t->relu && v < 0 ? 0 : v; /* NaN stays */
        }
    }
}

static void ref_wino_in16(const int16_t *x, size_t row, size_t ld, int channels, int16_t *v,
                          size_t plane)
{
    for (int c = 0; c < channels; c++) {
        int t[4][4];
        for (size_t j = 0; j < 4; j++) {
            const int16_t *d = x + j * ld + (size_t)c;
            t[0][j] = d[0] - d[2 * row];
            t[1][j] = d[row] + d[2 * row];
            t[2][j] = d[2 * row] - d[row];
            t[3][j] = d[row] - d[3 * row];
        }
        for (size_t i = 0; i < 4; i++) {
            int16_t *to = v + 4 * i * plane + (size_t)c;
            to[0] = (int16_t)(t[i][0] - t[i][2]);
            to[plane] = (int16_t)(t[i][1] + t[i][2]);
            to[2 * plane] = (int16_t)(t[i][2] - t[i][1]);
            to[3 * plane] = (int16_t)(t[i][1] - t[i][3]);
        }
    }
}

static void ref_wino_out(const tsad_wino_out *t)
{
    for (int o = 0; o < PANEL; o++) {
        float s[2][4];
        for (size_t j = 0; j < 4; j++) {
            const float *m = t->m + j * t->plane + (size_t)o;
            s[0][j] = m[0] + m[4 * t->plane] + m[8 * t->plane];
            s[1][j] = m[4 * t->plane] - m[8 * t->plane] - m[12 * t->plane];
        }
        for (int i = 0; i < t->rows; i++) {
            float out[2] = {s[i][0] + s[i][1] + s[i][2], s[i][1] - s[i][2] - s[i][3]};
            for (int j = 0; j < t->columns; j++) {
                float *y = t->y + (size_t)i * t->row + (size_t)j * t->ld + (size_t)o;
                float v = out[j] + t->bias[o];
                v = t->residual ? v + *y : v;
                *y = t->relu && v < 0 ? 0 : v; /* NaN stays */
            }
        }
    }
}

static void ref_group_sums(const float *x, int width, size_t ld, float mean, bool squares,
                           float *sum)
{
    for (int c = 0; c < TSAD_NORM_GROUP; c++) {
        sum[c] = 0;
        for (int i = 0; i < width; i++) {
            float v = x[(size_t)i * ld + (size_t)c] - mean;
            sum[c] += squares ? v * v : v;
        }
    }
}

static uint32_t ref_group_row(const tsad_norm_row *r)
{
    uint32_t most = 0;
    for (int i = 0; i < r->width; i++) {
        const float *x = r->x + (size_t)i * r->ldx;
        float *y = r->y + (size_t)i * r->ldy;
        for (int c = 0; c < TSAD_NORM_GROUP; c++) {
            float v = (x[c] - r->mean) * r->gain[c] + r->shift[c];
            v = r->residual ? v + y[c] : v;
            y[c] = r->relu && v < 0 ? 0 : v; /* NaN stays */
            uint32_t bits = tsad_magnitude(y[c]);
            most = bits > most ? bits : most;
        }
    }
    return most;
}

static void ref_to16(const float *x, size_t n, float scale, int16_t *to)
{
    for (size_t i = 0; i < n; i++) {
        to[i] = (int16_t)lrintf(x[i] * scale);
    }
}

static uint32_t ref_most(float *const *row, size_t at, int rows, int n)
{
    uint32_t most = 0;
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < n; i++) {
            uint32_t bits = tsad_magnitude(row[r][at + (size_t)i]);
            most = bits > most ? bits : most;
        }
    }
    return most;
}

static bool always(void) { return true; }

const tsad_kernels tsad_ref_kernels = {.panel = PANEL,
                                       .tile = TILE,
                                       .linear = ref_linear,
                                       .round = ref_round,
                                       .linear16 = ref_linear16,
                                       .layernorm = ref_layernorm,
                                       .groupnorm = ref_groupnorm,
                                       .attention = ref_attention,
                                       .cross = ref_cross,
                                       .add = ref_add,
                                       .finish = ref_finish,
                                       .conv = ref_conv,
                                       .conv16 = ref_conv16,
                                       .wino_in16 = ref_wino_in16,
                                       .wino_out = ref_wino_out,
                                       .pool = ref_pool,
                                       .group_sums = ref_group_sums,
                                       .group_row = ref_group_row,
                                       .to16 = ref_to16,
                                       .most = ref_most};

TSAD_CPU_BACKEND(tsad_cpu_ref, "ref", always, &tsad_ref_kernels);
