/* fixed.c: nodes outside the dial: embeddings, sampling, concatenation, the encoder's folding of
 * memory tokens, and the pruner's own. */
#include "cpu.h"

#include <math.h>
#include <string.h>

const float *tsad_cpu_taps(const tsad_node *node, const float *x, int tokens, int channels,
                           int tokens_out, int stride, float *taps)
{
    if (node->kernel == 1 && stride == 1) {
        return x;
    }
    int ld = tsad_pad(channels), ldt = tsad_pad(channels * node->kernel);
    for (int t = 0; t < tokens_out; t++) {
        for (int j = 0; j < node->kernel; j++) {
            int from = t * stride + j - node->kernel / 2;
            float *to = taps + (size_t)t * (size_t)ldt + (size_t)j * (size_t)channels;
            if (from < 0 || from >= tokens) {
                memset(to, 0, sizeof(float) * (size_t)channels);
            } else {
                memcpy(to, x + (size_t)from * (size_t)ld, sizeof(float) * (size_t)channels);
            }
        }
    }
    return taps;
}

/* ---- fixed nodes -------------------------------------------------------------------------- */

static void linear_node(const context *c, const tsad_node *node)
{
    const tsad_packed *packed = ((const tsad_cpu_node *)node->packed)->list;
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    const float *x = reg(c, node->in);
    float *y = reg(c, node->out), *work = c->w->scratch;
    int ld = tsad_pad(out->channels);
    if (node->normalise) {
        c->k->layernorm(x, tsad_pad(in->channels), in->tokens, in->channels, node->eps, work);
        x = work;
    }
    if (node->kind == TSAD_CONV) {
        x = tsad_cpu_taps(node, x, in->tokens, in->channels, out->tokens, node->stride, work);
    }
    c->k->linear(packed, x, tsad_pad(packed->n_in), out->tokens, node->activation, y, ld);
    if (node->table) {
        for (int t = 0; t < out->tokens; t++) {
            for (int i = 0; i < out->channels; i++) {
                y[t * ld + i] += node->table[(size_t)t * (size_t)out->channels + (size_t)i];
            }
        }
    }
}

/* copies: upsample, concat, copy, and the encoder's joining of tokens */
static void move_node(const context *c, const tsad_node *node)
{
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    const float *x = reg(c, node->in);
    float *y = reg(c, node->out);
    size_t ld = (size_t)tsad_pad(in->channels), ldy = (size_t)tsad_pad(out->channels);
    size_t row = sizeof(float) * (size_t)in->channels;
    if (node->kind == TSAD_TOKENS) {
        memcpy(y, node->table + (size_t)c->step * (size_t)in->channels, row);
        y += ldy;
    }
    int repeat = node->kind == TSAD_UPSAMPLE ? node->stride : 1;
    for (int t = 0; t < in->tokens * repeat && t < out->tokens; t++) {
        memcpy(y + (size_t)t * ldy, x + (size_t)(t / repeat) * ld, row);
    }
    if (node->kind == TSAD_CONCAT) {
        const tsad_register *in2 = &c->net->registers[node->in2];
        for (int t = 0; t < in2->tokens; t++) {
            memcpy(y + (size_t)t * ldy + in->channels,
                   reg(c, node->in2) + (size_t)t * (size_t)tsad_pad(in2->channels),
                   sizeof(float) * (size_t)in2->channels);
        }
    }
}

static void flatten(const context *c, const tsad_node *node)
{
    const tsad_register *in = &c->net->registers[node->in];
    float *y = reg(c, node->out);
    for (int t = 0; t < in->tokens; t++) {
        const float *x = reg(c, node->in) + t * tsad_pad(in->channels);
        for (int i = 0; i < in->channels; i++) {
            *y++ = tsad_activate(x[i], node->activation);
        }
    }
}

static void store(const context *c, const tsad_node *node)
{
    const tsad_register *in = &c->net->registers[node->in];
    size_t n = (size_t)in->channels, ld = (size_t)tsad_pad(in->channels);
    size_t ldy = node->padded ? ld : n, row = (size_t)c->row * (size_t)in->tokens * ldy;
    for (size_t t = 0; t < (size_t)in->tokens; t++) {
        memcpy(c->lane->array[node->array] + row + t * ldy, reg(c, node->in) + t * ld,
               sizeof(float) * n);
    }
}

/* the memory of this step */
static float *memory(const context *c, size_t tokens)
{
    size_t floats = tokens * (size_t)tsad_pad(c->m->width);
    return c->lane->array[TSAD_ARRAY_MEMORY] + (c->m->encode_rows ? (size_t)c->row * floats : 0);
}

/* where a lane keeps the folded tokens of this step and layer */
static float *folded(const context *c, const tsad_node *node)
{
    size_t tokens = (size_t)c->net->registers[node->in].tokens;
    size_t step = c->m->encode_rows ? (size_t)c->row : 0;
    size_t at = step * (size_t)c->m->n_layers + (size_t)node->layer;
    return c->lane->array[TSAD_ARRAY_FOLDED] + at * tokens * c->m->fold.floats;
}

/* constants of the scores */
static void fold_shifts(const context *c, const tsad_node *node, const float *kv, int ld)
{
    const tsad_fold *fold = &c->m->fold;
    int heads = fold->n_heads, dh = fold->width / heads;
    float *out = folded(c, node);
    for (int s = 0; s < c->net->registers[node->in].tokens; s++) {
        const float *key = kv + (size_t)s * (size_t)ld;
        for (int h = 0; h < heads; h++) {
            float shift = 0;
            for (int j = h * dh; j < (h + 1) * dh; j++) {
                shift += key[j] * node->table[j];
            }
            out[(size_t)s * fold->floats + fold->shift + (size_t)h] = shift;
        }
    }
}

/* Keys and values of all lanes' tokens, then per head the score and value vectors. A panel may run
 * past the end of a vector: keys come before values, each ascending, then the constants. */
void tsad_cpu_fold(const context *members, int n, const tsad_node *node)
{
    const context *c = members;
    const tsad_fold *fold = &c->m->fold;
    const tsad_packed *list = ((const tsad_cpu_node *)node->packed)->list;
    int tokens = c->net->registers[node->in].tokens, d = fold->width, heads = fold->n_heads;
    int ld = tsad_pad(2 * d), dh = d / heads, ldx = tsad_pad(d);
    float *kv = c->w->scratch, *x = kv + (size_t)(n * tokens) * (size_t)ld;
    float *room = x + (size_t)(n * tokens) * (size_t)ldx;
    for (int i = 0; i < n; i++) {
        memcpy(x + (size_t)(i * tokens) * (size_t)ldx, memory(&members[i], (size_t)tokens),
               sizeof(float) * (size_t)tokens * (size_t)ldx);
    }
    tsad_cpu_linear(c->k, &list[0], x, ldx, n * tokens, TSAD_LINEAR_ONLY, kv, ld, room);
    int rows = d % TSAD_LANE ? 1 : tokens; /* at once: as many as do not overlap */
    for (int j = 0; j < 2 * heads; j++) {
        size_t at = (j < heads ? 0 : fold->value) + (size_t)(j % heads) * (size_t)d;
        const float *from = kv + (j < heads ? 0 : d) + j % heads * dh;
        for (int t = 0; t < n * tokens; t += rows) {
            float *out = folded(&members[t / tokens], node) + (size_t)(t % tokens) * fold->floats;
            tsad_cpu_linear(c->k, &list[1 + j], from + (size_t)t * (size_t)ld, ld, rows,
                            TSAD_LINEAR_ONLY, out + at, (int)fold->floats, room);
        }
    }
    for (int i = 0; i < n; i++) {
        fold_shifts(&members[i], node, kv + (size_t)(i * tokens) * (size_t)ld, ld);
    }
}

/* ---- the pruner's nodes ------------------------------------------------------------------- */

static void prune_keys(const context *c)
{
    const tsad_pruner *p = &c->m->pruner;
    const tsad_cpu_pruner *packed = p->packed;
    if (c->row > 0 && !c->m->encode_rows) {
        return; /* observation tokens are the same at every step */
    }
    int n = p->hidden, heads = p->n_heads, dh = n / heads, S = p->query_tokens, ld = tsad_pad(n);
    const float *tokens = memory(c, (size_t)S);
    float *key = c->w->scratch, *value = key + (size_t)S * (size_t)ld;
    float *vector = value + (size_t)S * (size_t)ld; /* whole panels; the next row is not ours */
    c->k->linear(&packed->keys, tokens, tsad_pad(c->m->width), S, TSAD_LINEAR_ONLY, key, ld);
    c->k->linear(&packed->values, tokens, tsad_pad(c->m->width), S, TSAD_LINEAR_ONLY, value, ld);
    for (int s = 0; s < S; s++) {
        size_t at = (size_t)c->row * (size_t)S + (size_t)s;
        float *score =
            c->lane->array[TSAD_ARRAY_PRUNE_SCORE] + at * (size_t)p->n_blocks * (size_t)heads;
        float *out = c->lane->array[TSAD_ARRAY_PRUNE_VALUE] + at * (size_t)heads * (size_t)n;
        for (int b = 0; b < p->n_blocks; b++) {
            for (int h = 0; h < heads; h++) {
                const float *q = p->query + (size_t)b * (size_t)n + h * dh;
                float dot = 0;
                for (int j = 0; j < dh; j++) {
                    dot += q[j] * key[s * ld + h * dh + j];
                }
                score[b * heads + h] = dot;
            }
        }
        for (int h = 0; h < heads; h++) {
            c->k->linear(&packed->out[h], value + s * ld + h * dh, ld, 1, TSAD_LINEAR_ONLY, vector,
                         ld);
            memcpy(out + (size_t)h * (size_t)n, vector, sizeof(float) * (size_t)n);
        }
    }
}

/* memory token s of this step: its scores (B, H) and values (H, hidden) */
static void prune_token(const context *c, int s, const float **score, const float **value)
{
    const tsad_pruner *p = &c->m->pruner;
    size_t scores = (size_t)p->n_blocks * (size_t)p->n_heads;
    size_t values = (size_t)p->n_heads * (size_t)p->hidden;
    if (p->time_score && s == 0) {
        *score = p->time_score + (size_t)c->row * scores;
        *value = p->time_value + (size_t)c->row * values;
        return;
    }
    size_t at =
        p->time_score ? (size_t)(s - 1) : (size_t)c->row * (size_t)p->query_tokens + (size_t)s;
    *score = c->lane->array[TSAD_ARRAY_PRUNE_SCORE] + at * scores;
    *value = c->lane->array[TSAD_ARRAY_PRUNE_VALUE] + at * values;
}

static void prune_query(const context *c, const tsad_node *node)
{
    const tsad_pruner *p = &c->m->pruner;
    int n = p->hidden, heads = p->n_heads, S = c->m->n_memory, ld = tsad_pad(n);
    const float *score[TSAD_MAX_MEMORY], *value[TSAD_MAX_MEMORY];
    float weight[TSAD_MAX_MEMORY];
    for (int s = 0; s < S; s++) {
        prune_token(c, s, &score[s], &value[s]);
    }
    for (int b = 0; b < p->n_blocks; b++) {
        float *x = reg(c, node->out) + (size_t)b * (size_t)ld;
        memcpy(x, p->token + (size_t)b * (size_t)n, sizeof(float) * (size_t)n);
        for (int h = 0; h < heads; h++) {
            float top = -INFINITY, sum = 0;
            for (int s = 0; s < S; s++) {
                top = fmaxf(top, score[s][b * heads + h]);
            }
            for (int s = 0; s < S; s++) {
                weight[s] = expf(score[s][b * heads + h] - top);
                sum += weight[s];
            }
            for (int s = 0; s < S; s++) {
                float share_of_s = weight[s] / sum;
                const float *v = value[s] + (size_t)h * (size_t)n;
                for (int i = 0; i < n; i++) {
                    x[i] += share_of_s * v[i];
                }
            }
        }
    }
}

static void prune_tokens(const context *c, const tsad_node *node)
{
    size_t S = (size_t)c->m->pruner.query_tokens, d = (size_t)c->m->width;
    size_t ld = (size_t)tsad_pad(c->m->width);
    const float *tokens = memory(c, S);
    for (size_t s = 0; s < S; s++) {
        memcpy(reg(c, node->out) + s * d, tokens + s * ld, sizeof(float) * d);
    }
}

static void prune_spread(const context *c, const tsad_node *node)
{
    const tsad_register *out = &c->net->registers[node->out];
    size_t n = (size_t)out->channels, ld = (size_t)tsad_pad(out->channels);
    const float *x = reg(c, node->in);
    for (size_t k = 0; k < (size_t)out->tokens; k++) {
        const float *table = node->table + k * n;
        float *y = reg(c, node->out) + k * ld;
        for (size_t i = 0; i < n; i++) {
            float sum = x[i] + table[i];
            y[i] = sum < 0 ? 0 : sum; /* NaN stays */
        }
    }
}

void tsad_cpu_fixed(const context *c, const tsad_node *node)
{
    switch (node->kind) {
    case TSAD_LINEAR:
    case TSAD_CONV:
        linear_node(c, node);
        break;
    case TSAD_FLATTEN:
        flatten(c, node);
        break;
    case TSAD_STORE:
        store(c, node);
        break;
    case TSAD_FOLD:
        tsad_cpu_fold(c, 1, node);
        break;
    case TSAD_PRUNE_KEYS:
        prune_keys(c);
        break;
    case TSAD_PRUNE_QUERY:
        prune_query(c, node);
        break;
    case TSAD_PRUNE_TOKENS:
        prune_tokens(c, node);
        break;
    case TSAD_PRUNE_SPREAD:
        prune_spread(c, node);
        break;
    default:
        move_node(c, node);
    }
}
