/* ladder.c: what each part of the published pipeline is worth, measured in our engine. ladder.py
 * compiles and runs it; its head says what the rungs are.
 *
 *   ladder PLAN THREADS ROUNDS CHUNKS   ->   a line of JSON for each pruner, rung and round
 *
 * PLAN: the sources (K, B) that every rung executes, so that all of them denoise the same cells.
 * The backend's `run` is replaced by one that goes row by row and does what a rung does beside the
 * denoising: `plain_encode` and `plain_prune` are the network's conditioning and the pruner without
 * the engine's rewrites, for one step or for all at once, on the engine's kernels. Both are
 * compared with the engine's own tables and scores before anything is timed.
 */
#include "cpu/cpu.h"
#include "internal.h"
#include "random_model.h"

enum { S = 3, MOST_RUNGS = 5, MOST_CHUNKS = 1000, MLP_HIDDEN = 128 };

static const shape STANDARD = {.steps = 100,
                               .layers = 8,
                               .width = 256,
                               .heads = 4,
                               .horizon = 10,
                               .action_dim = 2,
                               .n_obs_steps = S - 1,
                               .obs_dim = 20,
                               .n_action_steps = 8};

typedef enum rung { IN_LOOP, ENCODE_ONCE, ALL_AT_ONCE, HOISTED, OVERLAPPED, N_RUNGS } rung;
static const char *const rung_names[] = {"in the loop", "encoder once", "all steps at once",
                                         "hoisted", "hoisted, beside step 0"};
typedef enum pruner_kind { PUBLISHED, SMALL, MLP } pruner_kind;
static const char *const pruner_names[] = {"published 512-8-1024", "published layout 128-4-256",
                                           "MLP 768-128-96"};

/* All that the plain forms need beside the model. */
typedef struct plain {
    const tsad_kernels *k;
    random_spec *r;
    shape s;
    pruner_kind kind;
    tsad_packed obs_emb, enc0, enc2, kv[8], key[8][4], value[8][4];
    const float *pos;
    tsad_packed qkv, out, query, proj, pkv, pout, ff1, ff2, head; /* the published pruner */
    tsad_packed mlp1, mlp2, time1, obs1;                          /* the MLP: parts of mlp1 */
    float *time_part;                                             /* (K, MLP_HIDDEN) */
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

/* scores of all blocks from the three memory tokens in a row */
static void make_mlp(plain *p)
{
    int d = p->s.width, B = blocks_of(&p->s);
    weights w = {.n = 0};
    add_linear(&w, "", "mlp1", S * d, MLP_HIDDEN);
    add_linear(&w, "", "mlp2", MLP_HIDDEN, 4 * B);
    tsad_matrix m = take(&w, "", "mlp1", NULL, S * d, 0, MLP_HIDDEN, 1);
    p->mlp1 = pack_rows(p, &m, 0, S * d, true);
    p->time1 = pack_rows(p, &m, 0, d, true); /* of the time token alone: a table, made here */
    p->obs1 = pack_rows(p, &m, d, S * d, false);
    tsad_matrix_free(&m);
    p->mlp2 = layer(p, &w, "", "mlp2", NULL, MLP_HIDDEN, 4 * B);
    p->time_part = room((size_t)(p->s.steps * MLP_HIDDEN));
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
    if (kind == MLP) {
        make_mlp(p);
        p->middle = room((size_t)(s->steps * MLP_HIDDEN));
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
        k->linear(&p->mlp1, memory, S * d, steps, TSAD_RELU, p->middle, MLP_HIDDEN);
        k->linear(&p->mlp2, p->middle, MLP_HIDDEN, steps, TSAD_LINEAR_ONLY,
                  p->scores + first * 4 * B, 4 * B);
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

/* the MLP with the time token's part from a table, the observations' once per chunk */
static void hoisted_mlp(const plain *p)
{
    int d = p->s.width, K = p->s.steps, B = blocks_of(&p->s);
    float once[MLP_HIDDEN + TSAD_LANE];
    p->k->linear(&p->obs1, p->memory + d, 2 * d, 1, TSAD_LINEAR_ONLY, once, MLP_HIDDEN);
    for (int k = 0; k < K; k++) {
        for (int i = 0; i < MLP_HIDDEN; i++) {
            p->middle[k * MLP_HIDDEN + i] = fmaxf(p->time_part[k * MLP_HIDDEN + i] + once[i], 0);
        }
    }
    p->k->linear(&p->mlp2, p->middle, MLP_HIDDEN, K, TSAD_LINEAR_ONLY, p->scores, 4 * B);
}

/* ---- a chunk with a rung's work beside it --------------------------------------------------- */

static struct {
    const tsad_backend *engine; /* the one replaced */
    tsad_cpu_backend backend;
    const plain *p;
    rung rung;
    const float *obs;
    int64_t encode, prune;
    float **rank1; /* its registers, after step 0 */
} now;

#ifdef TSAD_GANG /* lanes that share passes over the weights: here there is one */
#define RUN_PARAMETERS tsad_worker *w, const tsad_run *run, int n, int begin, int end
#define RUN_ROWS(from, to) now.engine->run(w, run, n, from, to)
#else
#define RUN_PARAMETERS tsad_worker *w, const tsad_run *run, int begin, int end
#define RUN_ROWS(from, to) now.engine->run(w, run, from, to)
#endif

static void encode_steps(const tsad_model *m, int first, int n)
{
    int64_t t = tsad_now();
    plain_encode(now.p, &m->fold, now.obs, first, n);
    now.encode += tsad_now() - t;
}

static void prune_steps(int first, int n)
{
    int64_t t = tsad_now();
    plain_prune(now.p, first, n);
    now.prune += tsad_now() - t;
}

static void prune_hoisted(tsad_worker *w, tsad_lane *lane)
{
    int64_t t = tsad_now();
    int rank = w->rank, size = w->size;
    w->rank = 0, w->size = 1;
    if (now.p->kind == MLP) {
        hoisted_mlp(now.p);
    } else {
        tsad_prune(w, lane);
    }
    w->rank = rank, w->size = size;
    now.prune += tsad_now() - t;
}

/* what rank 0 does before row k */
static void before_row(tsad_worker *w, const tsad_run *run, int k)
{
    const tsad_model *m = w->policy->model;
    int K = m->n_steps;
    if (now.rung == IN_LOOP) {
        encode_steps(m, k, 1);
    } else if (k == 0 && now.rung <= ALL_AT_ONCE) {
        encode_steps(m, 0, K);
    }
    if (now.rung <= ENCODE_ONCE) {
        prune_steps(k, 1);
    } else if (k == 0 && now.rung == ALL_AT_ONCE) {
        prune_steps(0, K);
    } else if (k == 0) {
        prune_hoisted(w, run->lane);
    }
}

static void meet(tsad_worker *w)
{
    tsad_worker_meet(w);
    w->epoch++;
}

/* rank 0 prunes while rank 1 runs step 0 alone, and then takes over what that left */
static void overlap(RUN_PARAMETERS)
{
    (void)end;
    if (w->rank == 0) {
        prune_hoisted(w, run->lane);
    } else {
        w->rank = 0, w->size = 1;
        RUN_ROWS(begin, begin + 1);
        w->rank = 1, w->size = 2;
        now.rank1 = run->registers;
    }
    bool stalled = w->stalled;
    meet(w);
    w->stalled = stalled; /* who prunes quickly waits for step 0, not for a core that is taken */
    if (w->rank == 0) {
        for (int i = 0; i < run->net->n_registers; i++) {
            memcpy(run->registers[i], now.rank1[i],
                   sizeof(float) * tsad_register_floats(&run->net->registers[i]));
        }
    }
    meet(w);
}

static void run_rows(RUN_PARAMETERS)
{
    if (!run->update || now.rung == N_RUNGS) { /* the encoder, the pruner, or nothing beside */
        RUN_ROWS(begin, end);
        return;
    }
    bool beside = now.rung == OVERLAPPED && w->size == 2;
    if (beside) {
#ifdef TSAD_GANG
        overlap(w, run, n, begin, end);
#else
        overlap(w, run, begin, end);
#endif
        begin++;
    }
    bool every = now.rung <= ENCODE_ONCE;
    for (int k = begin; k < end && w->size > 0; k = every ? k + 1 : end) {
        if (!beside) {
            if (w->rank == 0) {
                before_row(w, run, k);
            }
            meet(w);
        }
        RUN_ROWS(k, every ? k + 1 : end);
    }
}

/* ---- measuring ------------------------------------------------------------------------------ */

typedef struct times {
    double total, denoise, encode, prune, plan;
} times;

static tsad_policy *policy;
static float *noise, *actions;

static times chunk(rung which)
{
    tsad_call call = {.lanes = (int[]){0},
                      .n_lanes = 1,
                      .obs = now.obs,
                      .noise = noise,
                      .noise_step = (size_t)(STANDARD.horizon * STANDARD.action_dim),
                      .actions = actions,
                      .whole_horizon = 1};
    now.rung = which;
    now.encode = now.prune = 0;
    must(tsad_policy_step(policy, &call));
    int64_t ns[TSAD_N_TIMERS];
    tsad_policy_get_timings(policy, ns);
    /* the plain rungs do not need what the engine encodes; they pay for their own */
    int64_t spare = which <= ALL_AT_ONCE ? ns[TSAD_ENCODE] : 0;
    int64_t beside = now.encode + (which == OVERLAPPED ? 0 : now.prune);
    return (times){.total = 1e-6 * (double)(ns[TSAD_TOTAL] - spare),
                   .denoise = 1e-6 * (double)(ns[TSAD_DENOISE] - beside),
                   .encode = 1e-6 * (double)(now.encode + ns[TSAD_ENCODE] - spare),
                   .prune = 1e-6 * (double)(now.prune + ns[TSAD_PRUNE]),
                   .plan = 1e-6 * (double)ns[TSAD_PLAN_STAGE]};
}

static double worst(const float *a, const float *b, size_t n)
{
    double gap = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
        gap = fmax(gap, fabs((double)a[i] - (double)b[i]));
        most = fmax(most, fabs((double)b[i]));
    }
    return most > 0 ? gap / most : 0;
}

static void expect(double difference, const char *pruner, const char *what)
{
    if (!(difference < 1e-4)) {
        printf("FAIL %s: %s differ by %.1e\n", pruner, what, difference);
        exit(1);
    }
}

/* plain forms against the engine's tables and scores; every rung's actions against the engine's */
static void verify(plain *p, const tsad_model *m)
{
    const char *name = pruner_names[p->kind];
    size_t d = (size_t)m->width, K = (size_t)m->n_steps, B = (size_t)m->n_blocks;
    size_t n = (size_t)(STANDARD.horizon * STANDARD.action_dim), vectors = m->fold.shift;
    float *expected = room(n), *scores = room(K * B * 4), *got = room(K * B * 4);
    tsad_lane *lane = &policy->lanes[0];
    chunk(N_RUNGS);
    plain_encode(p, &m->fold, now.obs, 0, (int)K);
    for (size_t l = 0; l < (size_t)m->n_layers; l++) {
        for (size_t k = 0; k < K; k++) {
            const float *token = p->folds + (l * K + k) * S * m->fold.floats;
            for (int s = 0; s < S; s++) {
                expect(worst(token + (size_t)s * m->fold.floats,
                             tsad_folded(m, lane, (int)k, (int)l, s), vectors),
                       name, "folded memory tokens");
            }
        }
    }
    if (p->kind == MLP) {
        p->k->linear(&p->time1, p->memory, S * (int)d, (int)K, TSAD_LINEAR_ONLY, p->time_part,
                     MLP_HIDDEN);
        hoisted_mlp(p);
        memcpy(scores, p->scores, sizeof(float) * K * B * 4);
    } else {
        must(tsad_policy_pruner_scores(policy, now.obs, got));
        for (size_t k = 0; k < K; k++) { /* back to the order of the memory */
            memcpy(scores + k * B * 4, got + (K - 1 - k) * B * 4, sizeof(float) * B * 4);
        }
    }
    for (int at_once = 0; at_once < 2; at_once++) {
        for (int k = 0; k < (at_once ? 1 : (int)K); k++) {
            plain_prune(p, k, at_once ? (int)K : 1);
        }
        for (size_t i = 0; i < K * B * 4; i++) {
            got[i] = p->kind == MLP ? p->scores[i] : p->scores[i / 4 * TSAD_LANE + i % 4];
        }
        expect(worst(got, scores, K * B * 4), name, "scores");
    }
    tsad_policy_reset(policy, 0);
    chunk(N_RUNGS);
    chunk(N_RUNGS);
    memcpy(expected, actions, sizeof(float) * n);
    for (int r = 0; r < N_RUNGS; r++) {
        tsad_policy_reset(policy, 0);
        chunk(N_RUNGS);
        chunk((rung)r);
        expect(worst(actions, expected, n), name, "actions");
    }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const plain *p, rung which, int round, int chunks)
{
    static double column[5][MOST_CHUNKS];
    for (int i = 0; i < chunks; i++) {
        times t = chunk(which);
        double values[] = {t.total, t.denoise, t.encode, t.prune, t.plan};
        for (int j = 0; j < 5; j++) {
            column[j][i] = values[j];
        }
    }
    for (int j = 0; j < 5; j++) {
        qsort(column[j], (size_t)chunks, sizeof(double), ascending);
    }
    int mid = chunks / 2;
    printf("{\"pruner\": \"%s\", \"rung\": \"%s\", \"round\": %d, \"total\": %.4f, "
           "\"denoise\": %.4f, \"encode\": %.4f, \"prune\": %.4f, \"plan\": %.4f}\n",
           pruner_names[p->kind], rung_names[which], round, column[0][mid], column[1][mid],
           column[2][mid], column[3][mid], column[4][mid]);
    fflush(stdout);
}

static void climb(pruner_kind kind, const uint8_t *plan, int threads, int rounds, int chunks)
{
    static const int sizes[][3] = {{512, 8, 1024}, {128, 4, 256}, {0, 0, 0}};
    shape s = STANDARD;
    s.hidden = sizes[kind][0], s.pruner_heads = sizes[kind][1], s.pruner_ff = sizes[kind][2];
    random_spec *r = random_spec_make(&s, NULL);
    uint8_t *dense = calloc((size_t)(s.steps * blocks_of(&s)), 1);
    tsad_model *model;
    must(tsad_model_create(&r->spec, &model));
    plain *p = plain_make(&s, kind, model, r);
    now.engine = model->backend;
    now.backend = *(const tsad_cpu_backend *)model->backend;
    now.backend.base.run = run_rows;
    now.p = p;
    now.obs = draw((size_t)((S - 1) * s.obs_dim), 1, 0);
    noise = draw((size_t)(s.steps * s.horizon * s.action_dim), 1, 0);
    actions = room((size_t)(s.horizon * s.action_dim));
    model->backend = &now.backend.base;
    must(tsad_policy_create(model, 1, threads, &policy));
    must(tsad_policy_set_plan(policy, 0, plan, dense));
    verify(p, model);
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < N_RUNGS; i++) {
            rung which = (rung)(round % 2 ? N_RUNGS - 1 - i : i);
            if (which != OVERLAPPED || threads == 2) {
                chunk(which); /* warm */
                report(p, which, round, chunks);
            }
        }
    }
    model->backend = now.engine; /* who packed it also frees it */
    tsad_policy_destroy(policy);
    tsad_model_destroy(model);
}

int main(int argc, char **argv)
{
    int threads = argc == 5 ? atoi(argv[2]) : 0, rounds = argc == 5 ? atoi(argv[3]) : 0;
    int chunks = argc == 5 ? atoi(argv[4]) : 0, cells = STANDARD.steps * blocks_of(&STANDARD);
    FILE *file = argc == 5 ? fopen(argv[1], "rb") : NULL;
    uint8_t *plan = malloc((size_t)cells);
    if (!file || threads < 1 || rounds < 1 || chunks < 1 || chunks > MOST_CHUNKS || !plan ||
        fread(plan, 1, (size_t)cells, file) != (size_t)cells) {
        fprintf(stderr, "usage: ladder PLAN(%d bytes) THREADS ROUNDS CHUNKS(1-%d)\n", cells,
                MOST_CHUNKS);
        return 2;
    }
    for (int kind = PUBLISHED; kind <= MLP; kind++) {
        climb((pruner_kind)kind, plan, threads, rounds, chunks);
    }
    fclose(file);
    free(plan);
    return 0;
}
