/* closed.c: rows that compute nothing, in closed form (net/closed.c has the formula). */
#include "cpu.h"

/* always in the same order, in eight parts that a compiler can make a vector of */
static float dot(const float *a, const float *b, int n)
{
    enum { PARTS = 8 };
    float part[PARTS] = {0}, rest = 0;
    int i = 0;
    for (; i + PARTS <= n; i += PARTS) {
        for (int j = 0; j < PARTS; j++) {
            part[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < n; i++) {
        rest += a[i] * b[i];
    }
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7])) + rest;
}

/* table (T, 1 + 2 A): of each token c'.c' / D, E' c' / D, c' H. `centred`: room for D floats */
static void refresh(const tsad_closed *f, const float *sum, float *table, float *centred)
{
    int D = f->width, A = f->actions, ld = tsad_pad(D);
    for (int t = 0; t < f->tokens; t++) {
        const float *base = f->base + (size_t)t * (size_t)D, *own = sum + (size_t)t * (size_t)ld;
        float *row = table + (size_t)t * (size_t)(1 + 2 * A);
        float mean = 0;
        for (int i = 0; i < D; i++) {
            centred[i] = base[i] + own[i];
            mean += centred[i];
        }
        mean /= (float)D;
        for (int i = 0; i < D; i++) {
            centred[i] -= mean;
        }
        row[0] = dot(centred, centred, D) / (float)D;
        for (int a = 0; a < A; a++) {
            row[1 + a] = dot(f->embed + (size_t)a * (size_t)D, centred, D) / (float)D;
            row[1 + A + a] = dot(f->head + (size_t)a * (size_t)D, centred, D);
        }
    }
}

void tsad_cpu_closed(const context *c, int remembered)
{
    const tsad_closed *f = &c->m->closed;
    const tsad_member *member = c->member;
    int A = f->actions, ld = tsad_pad(A);
    const float *x = c->registers[c->net->input];
    float *out = c->registers[c->net->output], *table = member->tables[remembered];
    if (!member->table_ready[remembered]) {
        refresh(f, member->sums[remembered], table, c->w->scratch);
        member->table_ready[remembered] = true;
    }
    for (int t = 0; t < f->tokens; t++) {
        const float *s = x + t * ld, *row = table + t * (1 + 2 * A);
        float variance = row[0];
        for (int a = 0; a < A; a++) {
            float with = 2 * row[1 + a];
            for (int b = 0; b < A; b++) {
                with += f->square[a * A + b] * s[b];
            }
            variance += s[a] * with;
        }
        float scale = tsad_norm_scale(variance, 1e-5f);
        for (int o = 0; o < A; o++) {
            float sum = row[1 + A + o];
            for (int a = 0; a < A; a++) {
                sum += s[a] * f->through[a * A + o];
            }
            out[t * ld + o] = sum * scale + f->head_bias[o];
        }
    }
}
