/* random_model.h: a Diffusion Policy transformer of random weights, the same every time, for C
 * programs that use the core without Python: smoke.c, bench/instructions.c. */
#pragma once

#include "tsad.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TENSORS = 320 };

typedef struct shape {
    int steps, layers, width, heads, horizon, action_dim, n_obs_steps, obs_dim, n_action_steps;
    int hidden, pruner_heads, pruner_ff; /* of the pruner; hidden 0: none, heads 0: an MLP */
} shape;

static inline int blocks_of(const shape *s) { return 3 * s->layers; }

static inline void must(tsad_status status)
{
    if (status != TSAD_OK) {
        printf("FAIL %s: %s\n", tsad_status_text(status), tsad_error_detail());
        exit(1);
    }
}

/* ---- numbers ----------------------------------------------------------------------------- */

static uint64_t random_state = 1;

/* in [-1, 1) */
static inline float uniform(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(random_state >> 11) / 9007199254740992.0 * 2 - 1);
}

static inline float *draw(size_t n, float scale, float centre)
{
    float *x = malloc(sizeof(float) * (n ? n : 1));
    if (!x) {
        printf("FAIL out of memory\n");
        exit(1);
    }
    for (size_t i = 0; i < n; i++) {
        x[i] = centre + scale * uniform();
    }
    return x;
}

/* ---- tensors ----------------------------------------------------------------------------- */

typedef struct weights {
    tsad_tensor tensors[MAX_TENSORS];
    char names[MAX_TENSORS][160];
    int n;
} weights;

static inline void add(weights *w, const char *prefix, const char *name, int rows, int cols)
{
    snprintf(w->names[w->n], sizeof w->names[0], "%.60s%.96s", prefix, name);
    tsad_tensor *t = &w->tensors[w->n];
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    bool gain = strstr(name, "norm") && strstr(name, "weight");
    *t = (tsad_tensor){.name = w->names[w->n],
                       .data = draw(n, cols ? 1.0f / sqrtf((float)cols) : 0.1f, gain ? 1 : 0),
                       .n_dims = cols ? 2 : 1,
                       .shape = {rows, cols}};
    w->n++;
}

static inline void add_linear(weights *w, const char *prefix, const char *name, int n_in, int n_out)
{
    char text[96];
    snprintf(text, sizeof text, "%.60s.weight", name);
    add(w, prefix, text, n_out, n_in);
    snprintf(text, sizeof text, "%.60s.bias", name);
    add(w, prefix, text, n_out, 0);
}

static inline void add_attention(weights *w, const char *prefix, const char *name, int d)
{
    char text[96];
    snprintf(text, sizeof text, "%.60s.in_proj_weight", name);
    add(w, prefix, text, 3 * d, d);
    snprintf(text, sizeof text, "%.60s.in_proj_bias", name);
    add(w, prefix, text, 3 * d, 0);
    snprintf(text, sizeof text, "%.60s.out_proj", name);
    add_linear(w, prefix, text, d, d);
}

static inline void add_norm(weights *w, const char *prefix, const char *name, int d)
{
    char text[96];
    snprintf(text, sizeof text, "%.60s.weight", name);
    add(w, prefix, text, d, 0);
    snprintf(text, sizeof text, "%.60s.bias", name);
    add(w, prefix, text, d, 0);
}

static inline void add_decoder_layer(weights *w, const char *prefix, int d, int ff)
{
    add_attention(w, prefix, "self_attn", d);
    add_attention(w, prefix, "multihead_attn", d);
    add_linear(w, prefix, "linear1", d, ff);
    add_linear(w, prefix, "linear2", ff, d);
    add_norm(w, prefix, "norm1", d);
    add_norm(w, prefix, "norm2", d);
    add_norm(w, prefix, "norm3", d);
}

static inline void draw_policy(weights *w, const shape *s)
{
    int d = s->width;
    add(w, "", "pos_emb", s->horizon, d);
    add(w, "", "cond_pos_emb", 1 + s->n_obs_steps, d);
    for (int i = 0; i < 2; i++) { /* a batch of one */
        tsad_tensor *t = &w->tensors[i];
        *t = (tsad_tensor){t->name, t->data, 3, {1, t->shape[0], d}};
    }
    add_linear(w, "", "input_emb", s->action_dim, d);
    add_linear(w, "", "cond_obs_emb", s->obs_dim, d);
    add_linear(w, "", "encoder.0", d, 4 * d);
    add_linear(w, "", "encoder.2", 4 * d, d);
    add_norm(w, "", "ln_f", d);
    add_linear(w, "", "head", d, s->action_dim);
    for (int l = 0; l < s->layers; l++) {
        char prefix[48];
        snprintf(prefix, sizeof prefix, "decoder.layers.%d.", l);
        add_decoder_layer(w, prefix, d, 4 * d);
    }
}

static inline void draw_pruner(weights *w, const shape *s)
{
    if (!s->pruner_heads) {
        add_linear(w, "", "0", (1 + s->n_obs_steps) * s->width, s->hidden);
        add_linear(w, "", "2", s->hidden, 4 * blocks_of(s));
        return;
    }
    add_linear(w, "", "memory_proj", s->width, s->hidden);
    add_linear(w, "", "head", s->hidden, 4);
    add_decoder_layer(w, "transformer_decoder.layers.0.", s->hidden, s->pruner_ff);
}

/* ---- models ------------------------------------------------------------------------------ */

/* A specification and all that it borrows. */
typedef struct random_spec {
    tsad_model_spec spec;
    weights policy, pruner;
    float *sampler, *time_emb, *block_emb, *one, *zero;
    int64_t *cost;
} random_spec;

/* multiply-adds as executed, by type of block (method: folded cross-attention) */
static inline int64_t cost_of(const shape *s, int block)
{
    int64_t T = s->horizon, d = s->width;
    switch (block % 3) {
    case 0:
        return 4 * T * d * d + 2 * T * T * d;
    case 1:
        return 2 * T * (1 + s->n_obs_steps) * s->heads * d;
    default:
        return 8 * T * d * d;
    }
}

static inline float *fill(int n, float value) { return draw((size_t)n, 0, value); }

/* The same numbers every time: weights first, so they do not depend on `steps`. */
static inline random_spec *random_spec_make(const shape *s, const char *backend)
{
    random_spec *r = calloc(1, sizeof *r);
    int B = blocks_of(s), most = s->obs_dim > s->action_dim ? s->obs_dim : s->action_dim;
    random_state = 1;
    draw_policy(&r->policy, s);
    if (s->hidden) {
        draw_pruner(&r->pruner, s);
    }
    r->time_emb = draw((size_t)(s->steps * s->width), 1, 0);
    r->block_emb = draw((size_t)(B * s->hidden), 1, 0);
    r->sampler = fill(s->steps * TSAD_SAMPLER_COLUMNS, 0);
    for (int k = 0; k < s->steps; k++) {
        float *t = r->sampler + k * TSAD_SAMPLER_COLUMNS;
        t[0] = 1.1f, t[1] = -0.4f, t[2] = 1, t[3] = 0.3f, t[4] = 0.6f, t[6] = -0.1f;
        t[7] = k + 1 < s->steps ? 0.1f : 0;
    }
    r->cost = malloc(sizeof(int64_t) * (size_t)B);
    for (int b = 0; b < B; b++) {
        r->cost[b] = cost_of(s, b);
    }
    r->one = fill(most, 1);
    r->zero = fill(most, 0);
    r->spec = (tsad_model_spec){.family = "diffusion_policy_transformer",
                                .horizon = s->horizon,
                                .n_obs_steps = s->n_obs_steps,
                                .n_action_steps = s->n_action_steps,
                                .obs_dim = s->obs_dim,
                                .action_dim = s->action_dim,
                                .n_layers = s->layers,
                                .n_heads = s->heads,
                                .n_emb = s->width,
                                .causal = 1,
                                .n_steps = s->steps,
                                .sampler = r->sampler,
                                .time_emb = r->time_emb,
                                .obs_scale = r->one,
                                .obs_offset = r->zero,
                                .action_scale = r->one,
                                .action_offset = r->zero,
                                .n_blocks = B,
                                .block_cost = r->cost,
                                .tensors = r->policy.tensors,
                                .n_tensors = r->policy.n,
                                .pruner_tensors = r->pruner.tensors,
                                .n_pruner_tensors = r->pruner.n,
                                .pruner_hidden = s->hidden,
                                .pruner_heads = s->pruner_heads,
                                .pruner_ff = s->pruner_ff,
                                .block_emb = r->block_emb,
                                .backend = backend};
    return r;
}

static inline void random_spec_free(random_spec *r)
{
    weights *lists[] = {&r->policy, &r->pruner};
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < lists[i]->n; j++) {
            free((void *)lists[i]->tensors[j].data);
        }
    }
    free(r->sampler);
    free(r->time_emb);
    free(r->block_emb);
    free(r->one);
    free(r->zero);
    free(r->cost);
    free(r);
}

static inline tsad_model *random_model(const shape *s, const char *backend)
{
    random_spec *r = random_spec_make(s, backend);
    tsad_model *model;
    must(tsad_model_create(&r->spec, &model));
    random_spec_free(r);
    return model;
}
