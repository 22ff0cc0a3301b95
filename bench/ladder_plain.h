/* ladder_plain.h: the network's conditioning and the pruner as the published pipeline has them,
 * without the engine's rewrites, for one step or for all at once, on the engine's kernels. Part of
 * ladder.c, which compares both with the engine's tables and scores before it times anything.
 */
#pragma once

#include "cpu/cpu.h"
#include "internal.h"
#include "random_model.h"

enum { S = 3 };

typedef enum pruner_kind { PUBLISHED, SMALL, MLP } pruner_kind;

/* All that the plain forms need beside the model. */
typedef struct plain {
    const tsad_kernels *k;
    random_spec *r;
    shape s;
    pruner_kind kind;
    tsad_packed obs_emb, enc0, enc2, kv[8], key[8][4], value[8][4];
    const float *pos;
    tsad_packed qkv, out, query, proj, pkv, pout, ff1, ff2, head; /* the published pruner */
    tsad_packed mlp1, mlp2;                                       /* the MLP */
    float *tokens, *hidden, *memory, *kvs, *folds;                /* (K * S, ...) */
    float *x, *y, *wide, *middle, *source, *scores;               /* (K * B, ...) */
} plain;

static float *room(size_t floats)
{
    float *x = tsad_allocate(sizeof(float) * (floats + 4096)); /* kernels prefetch and pad */
    if (!x) {
        must(TSAD_MEMORY);
    }
    return x;
}

/* ---- packing -------------------------------------------------------------------------------- */

/* rows [r0, r1) of a matrix in panels, as cpu.h says */
static tsad_packed pack_rows(const plain *p, const tsad_matrix *m, int r0, int r1, bool bias)
{
    int panel = p->k->panel, n_in = r1 - r0, padded = (m->n_out + panel - 1) / panel * panel;
    float *w = room((size_t)padded * (size_t)n_in), *b = room((size_t)padded);
    for (int o = 0; o < m->n_out; o++) {
        for (int i = 0; i < n_in; i++) {
            w[((size_t)(o / panel) * (size_t)n_in + (size_t)i) * (size_t)panel +
              (size_t)(o % panel)] = m->data[(size_t)(r0 + i) * (size_t)m->n_out + (size_t)o];
        }
        b[o] = bias ? m->bias[o] : 0;
    }
    return (tsad_packed){.n_in = n_in, .n_out = m->n_out, .w = w, .bias = b};
}

static const float *find(const weights *w, const char *prefix, const char *name)
{
    char text[160];
    snprintf(text, sizeof text, "%.60s%.90s", prefix, name);
    const tsad_tensor *t = tsad_find(w->tensors, w->n, text);
    if (!t) {
        printf("FAIL no tensor %s\n", text);
        exit(1);
    }
    return t->data;
}

/* rows [o0, o0 + n_out) of the layer `name`, after `norm` where given, times `scale` */
static tsad_matrix take(const weights *w, const char *prefix, const char *name, const char *norm,
                        int n_in, int o0, int n_out, float scale)
{
    char weight[64], bias[64], gain[64], shift[64];
    bool joined = strstr(name, "in_proj") != NULL;
    snprintf(weight, sizeof weight, "%.40s%s", name, joined ? "_weight" : ".weight");
    snprintf(bias, sizeof bias, "%.40s%s", name, joined ? "_bias" : ".bias");
    snprintf(gain, sizeof gain, "%.40s.weight", norm ? norm : "");
    snprintf(shift, sizeof shift, "%.40s.bias", norm ? norm : "");
    tsad_matrix m;
    must(tsad_matrix_make(&m, n_in, n_out));
    tsad_matrix_fold(&m, find(w, prefix, weight) + (size_t)o0 * (size_t)n_in,
                     find(w, prefix, bias) + o0, norm ? find(w, prefix, gain) : NULL,
                     norm ? find(w, prefix, shift) : NULL, scale);
    return m;
}

static tsad_packed layer(const plain *p, const weights *w, const char *prefix, const char *name,
                         const char *norm, int n_in, int n_out)
{
    tsad_matrix m = take(w, prefix, name, norm, n_in, 0, n_out, 1);
    tsad_packed packed = pack_rows(p, &m, 0, n_in, true);
    tsad_matrix_free(&m);
    return packed;
}

static void make_encoder(plain *p)
{
    const weights *w = &p->r->policy;
    int d = p->s.width, heads = p->s.heads, dh = d / heads;
    p->pos = find(w, "", "cond_pos_emb");
    p->obs_emb = layer(p, w, "", "cond_obs_emb", NULL, p->s.obs_dim, d);
    p->enc0 = layer(p, w, "", "encoder.0", NULL, d, 4 * d);
    p->enc2 = layer(p, w, "", "encoder.2", NULL, 4 * d, d);
    for (int l = 0; l < p->s.layers; l++) {
        char prefix[64];
        snprintf(prefix, sizeof prefix, "decoder.layers.%d.", l);
        tsad_matrix kv = take(w, prefix, "multihead_attn.in_proj", NULL, d, d, 2 * d, 1);
        p->kv[l] = pack_rows(p, &kv, 0, d, true);
        tsad_matrix_free(&kv);
        /* head h's score vector: its key times rows of the query's matrix, with norm2's gain */
        const float *q = find(w, prefix, "multihead_attn.in_proj_weight");
        const float *o = find(w, prefix, "multihead_attn.out_proj.weight");
        const float *gain = find(w, prefix, "norm2.weight");
        tsad_matrix key, value;
        must(tsad_matrix_make(&key, d, d));
        must(tsad_matrix_make(&value, d, d));
        for (int j = 0; j < d; j++) {
            for (int i = 0; i < d; i++) {
                key.data[j * d + i] = q[j * d + i] * gain[i] / sqrtf((float)dh);
                value.data[j * d + i] = o[i * d + j];
            }
        }
        for (int h = 0; h < heads; h++) {
            p->key[l][h] = pack_rows(p, &key, h * dh, (h + 1) * dh, false);
            p->value[l][h] = pack_rows(p, &value, h * dh, (h + 1) * dh, false);
        }
        tsad_matrix_free(&key);
        tsad_matrix_free(&value);
    }
}

static void make_pruner(plain *p)
{
    const char *prefix = "transformer_decoder.layers.0.";
    const weights *w = &p->r->pruner;
    int d = p->s.width, n = p->s.hidden, ff = p->s.pruner_ff;
    float scale = 1 / sqrtf((float)(n / p->s.pruner_heads));
    tsad_matrix qkv = take(w, prefix, "self_attn.in_proj", "norm1", n, 0, 3 * n, 1);
    for (int o = 0; o < n; o++) {
        qkv.bias[o] *= scale;
        for (int i = 0; i < n; i++) {
            qkv.data[(size_t)i * (size_t)qkv.n_out + (size_t)o] *= scale;
        }
    }
    p->qkv = pack_rows(p, &qkv, 0, n, true);
    tsad_matrix_free(&qkv);
    p->out = layer(p, w, prefix, "self_attn.out_proj", NULL, n, n);
    tsad_matrix query = take(w, prefix, "multihead_attn.in_proj", "norm2", n, 0, n, scale);
    p->query = pack_rows(p, &query, 0, n, true);
    tsad_matrix_free(&query);
    p->proj = layer(p, w, "", "memory_proj", NULL, d, n);
    tsad_matrix kv = take(w, prefix, "multihead_attn.in_proj", NULL, n, n, 2 * n, 1);
    p->pkv = pack_rows(p, &kv, 0, n, true);
    tsad_matrix_free(&kv);
    p->pout = layer(p, w, prefix, "multihead_attn.out_proj", NULL, n, n);
    p->ff1 = layer(p, w, prefix, "linear1", "norm3", n, ff);
    p->ff2 = layer(p, w, prefix, "linear2", NULL, ff, n);
    p->head = layer(p, w, "", "head", NULL, n, 4);
}

static plain *plain_make(const shape *s, pruner_kind kind, const tsad_model *model, random_spec *r)
{
    plain *p = calloc(1, sizeof *p);
    *p = (plain){.k = tsad_cpu_kernels(model), .r = r, .s = *s, .kind = kind};
    size_t d = (size_t)s->width, n = (size_t)(s->hidden ? s->hidden : 32);
    size_t tokens = (size_t)(s->steps * S), rows = (size_t)(s->steps * blocks_of(s));
    make_encoder(p);
    p->tokens = room(tokens * d);
    p->hidden = room(tokens * 4 * d);
    p->memory = room(tokens * d);
    p->kvs = room(tokens * 2 * d);
    p->folds = room(tokens * (size_t)s->layers * model->fold.floats);
    p->scores = room(rows * TSAD_LANE);
    if (kind == MLP) { /* scores of all blocks from the memory tokens in a row */
        p->mlp1 = layer(p, &r->pruner, "", "0", NULL, S * s->width, s->hidden);
        p->mlp2 = layer(p, &r->pruner, "", "2", NULL, s->hidden, 4 * blocks_of(s));
        p->middle = room((size_t)(s->steps * s->hidden));
        return p;
    }
    make_pruner(p);
    p->x = room(rows * n);
    p->y = room(rows * n);
    p->wide = room(rows * 3 * n);
    p->middle = room(rows * (size_t)s->pruner_ff);
    p->source = room(tokens * 3 * n);
    return p;
}

/* ---- the plain forms ------------------------------------------------------------------------ */

/* `n` steps from `first` on: embed, encode, keys and values of every layer, folded */
static void plain_encode(const plain *p, const tsad_fold *fold, const float *obs, int first, int n)
{
    int d = p->s.width, heads = p->s.heads, dh = d / heads, rows = n * S;
    float emb[(S - 1) * 4096], padded[(S - 1) * TSAD_LANE] = {0};
    for (int i = 0; i < (S - 1) * p->s.obs_dim; i++) {
        padded[i / p->s.obs_dim * TSAD_LANE + i % p->s.obs_dim] = obs[i];
    }
    p->k->linear(&p->obs_emb, padded, TSAD_LANE, S - 1, TSAD_LINEAR_ONLY, emb, d);
    for (int t = 0; t < rows; t++) {
        const float *token = t % S ? emb + (t % S - 1) * d : p->r->time_emb + (first + t / S) * d;
        for (int i = 0; i < d; i++) {
            p->tokens[t * d + i] = token[i] + p->pos[t % S * d + i];
        }
    }
    float *memory = p->memory + (size_t)(first * S * d);
    p->k->linear(&p->enc0, p->tokens, d, rows, TSAD_MISH, p->hidden, 4 * d);
    p->k->linear(&p->enc2, p->hidden, 4 * d, rows, TSAD_LINEAR_ONLY, memory, d);
    for (int l = 0; l < p->s.layers; l++) {
        int ld = (int)fold->floats;
        float *out = p->folds + ((size_t)l * (size_t)p->s.steps + (size_t)first) * S * fold->floats;
        p->k->linear(&p->kv[l], memory, d, rows, TSAD_LINEAR_ONLY, p->kvs, 2 * d);
        for (int h = 0; h < heads; h++) {
            p->k->linear(&p->key[l][h], p->kvs + h * dh, 2 * d, rows, TSAD_LINEAR_ONLY, out + h * d,
                         ld);
        }
        for (int h = 0; h < heads; h++) {
            p->k->linear(&p->value[l][h], p->kvs + d + h * dh, 2 * d, rows, TSAD_LINEAR_ONLY,
                         out + fold->value + (size_t)(h * d), ld);
        }
    }
}

/* attention of every block's query to the S tokens of its step; too small for a kernel */
static void mix(const plain *p, const float *query, const float *kv, float *y)
{
    int n = p->s.hidden, heads = p->s.pruner_heads, dh = n / heads;
    for (int h = 0; h < heads; h++) {
        float weight[S], sum = 0, top = -INFINITY;
        for (int s = 0; s < S; s++) {
            weight[s] = 0;
            for (int j = h * dh; j < (h + 1) * dh; j++) {
                weight[s] += query[j] * kv[s * 2 * n + j];
            }
            top = fmaxf(top, weight[s]);
        }
        for (int s = 0; s < S; s++) {
            weight[s] = expf(weight[s] - top);
            sum += weight[s];
        }
        for (int j = h * dh; j < (h + 1) * dh; j++) {
            y[j] = 0;
            for (int s = 0; s < S; s++) {
                y[j] += weight[s] / sum * kv[s * 2 * n + n + j];
            }
        }
    }
}

static void plain_prune(const plain *p, int first, int steps)
{
    int n = p->s.hidden, B = blocks_of(&p->s), rows = steps * B, d = p->s.width;
    int ff = p->s.pruner_ff, heads = p->s.pruner_heads;
    const tsad_kernels *k = p->k;
    const float *memory = p->memory + (size_t)(first * S * d);
    float *scores = p->scores + (size_t)(first * B * TSAD_LANE);
    if (p->kind == MLP) { /* three memory tokens in a row are one row of 768 */
        k->linear(&p->mlp1, memory, S * d, steps, TSAD_RELU, p->middle, n);
        k->linear(&p->mlp2, p->middle, n, steps, TSAD_LINEAR_ONLY, p->scores + first * 4 * B,
                  4 * B);
        return;
    }
    for (int t = 0; t < rows; t++) {
        memcpy(p->x + (size_t)(t * n), p->r->block_emb + t % B * n, sizeof(float) * (size_t)n);
    }
    k->layernorm(p->x, n, rows, n, p->y);
    k->linear(&p->qkv, p->y, n, rows, TSAD_LINEAR_ONLY, p->wide, 3 * n);
    for (int i = 0; i < steps; i++) {
        k->attention(p->wide + (size_t)(i * B * 3 * n), 3 * n, B, heads, n / heads, false,
                     p->middle + (size_t)(i * B * n), n);
    }
    k->linear(&p->out, p->middle, n, rows, TSAD_LINEAR_ONLY, p->y, n);
    for (size_t i = 0; i < (size_t)(rows * n); i++) {
        p->x[i] += p->y[i];
    }
    k->layernorm(p->x, n, rows, n, p->y);
    k->linear(&p->query, p->y, n, rows, TSAD_LINEAR_ONLY, p->wide, n);
    float *kv = p->source + (size_t)(steps * S * n);
    k->linear(&p->proj, memory, d, steps * S, TSAD_LINEAR_ONLY, p->source, n);
    k->linear(&p->pkv, p->source, n, steps * S, TSAD_LINEAR_ONLY, kv, 2 * n);
    for (int t = 0; t < rows; t++) {
        mix(p, p->wide + (size_t)(t * n), kv + (size_t)(t / B * S * 2 * n), p->y + (size_t)(t * n));
    }
    k->linear(&p->pout, p->y, n, rows, TSAD_LINEAR_ONLY, p->wide, n);
    for (size_t i = 0; i < (size_t)(rows * n); i++) {
        p->x[i] += p->wide[i];
    }
    k->layernorm(p->x, n, rows, n, p->y);
    k->linear(&p->ff1, p->y, n, rows, TSAD_RELU, p->middle, ff);
    k->linear(&p->ff2, p->middle, ff, rows, TSAD_LINEAR_ONLY, p->y, n);
    for (size_t i = 0; i < (size_t)(rows * n); i++) {
        p->x[i] += p->y[i];
    }
    k->linear(&p->head, p->x, n, rows, TSAD_LINEAR_ONLY, scores, TSAD_LANE);
}
