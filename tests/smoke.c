/* smoke.c: the core without Python. Proves that it needs none, and gives leak, race and
 * instruction-counting tools a target without an interpreter's noise.
 *
 *   cc -std=gnu11 -O2 -Icsrc tests/smoke.c csrc/{,net/,stage/,cpu/}*.c -lm -lpthread -o smoke
 *   ./smoke            everything; prints one line per check
 *   ./smoke chunks N   N dense and N planned chunks of the tiny model, for callgrind
 */
#include "tsad.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { K = 6, LAYERS = 2, D = 16, HEADS = 4, T = 5, A = 2, O = 3, OBS = 2, B = 3 * LAYERS };
enum { MAX_TENSORS = 128, HIDDEN = 8, PRUNER_FF = 12 };

static int failures;

static void check(bool ok, const char *what)
{
    printf("%s %s\n", ok ? "ok  " : "FAIL", what);
    failures += !ok;
}

static void must(tsad_status status)
{
    if (status != TSAD_OK) {
        printf("FAIL %s: %s\n", tsad_status_text(status), tsad_error_detail());
        exit(1);
    }
}

/* ---- random weights ---------------------------------------------------------------------- */

static uint64_t state = 1;

static float uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) / 9007199254740992.0 * 2 - 1);
}

static float *draw(size_t n, float scale, float centre)
{
    float *x = malloc(sizeof(float) * n);
    for (size_t i = 0; i < n; i++) {
        x[i] = centre + scale * uniform();
    }
    return x;
}

typedef struct weights {
    tsad_tensor tensors[MAX_TENSORS];
    char names[MAX_TENSORS][80];
    int n;
} weights;

static void add(weights *w, const char *prefix, const char *name, int rows, int cols)
{
    snprintf(w->names[w->n], sizeof w->names[0], "%s%s", prefix, name);
    tsad_tensor *t = &w->tensors[w->n];
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    bool gain = strstr(name, "norm") && strstr(name, "weight");
    *t = (tsad_tensor){.name = w->names[w->n],
                       .data = draw(n, cols ? 1.0f / sqrtf((float)cols) : 0.1f, gain ? 1 : 0),
                       .n_dims = cols ? 2 : 1,
                       .shape = {rows, cols}};
    w->n++;
}

static void add_attention(weights *w, const char *prefix, const char *name, int d)
{
    char text[64];
    snprintf(text, sizeof text, "%s.in_proj_weight", name);
    add(w, prefix, text, 3 * d, d);
    snprintf(text, sizeof text, "%s.in_proj_bias", name);
    add(w, prefix, text, 3 * d, 0);
    snprintf(text, sizeof text, "%s.out_proj.weight", name);
    add(w, prefix, text, d, d);
    snprintf(text, sizeof text, "%s.out_proj.bias", name);
    add(w, prefix, text, d, 0);
}

static void add_linear(weights *w, const char *prefix, const char *name, int n_in, int n_out)
{
    char text[64];
    snprintf(text, sizeof text, "%s.weight", name);
    add(w, prefix, text, n_out, n_in);
    snprintf(text, sizeof text, "%s.bias", name);
    add(w, prefix, text, n_out, 0);
}

static void add_norm(weights *w, const char *prefix, const char *name, int d)
{
    char text[64];
    snprintf(text, sizeof text, "%s.weight", name);
    add(w, prefix, text, d, 0);
    snprintf(text, sizeof text, "%s.bias", name);
    add(w, prefix, text, d, 0);
}

static void add_decoder_layer(weights *w, const char *prefix, int d, int ff)
{
    add_attention(w, prefix, "self_attn", d);
    add_attention(w, prefix, "multihead_attn", d);
    add_linear(w, prefix, "linear1", d, ff);
    add_linear(w, prefix, "linear2", ff, d);
    add_norm(w, prefix, "norm1", d);
    add_norm(w, prefix, "norm2", d);
    add_norm(w, prefix, "norm3", d);
}

static void draw_policy(weights *w)
{
    add(w, "", "pos_emb", T, D);
    add(w, "", "cond_pos_emb", 1 + OBS, D);
    add_linear(w, "", "input_emb", A, D);
    add_linear(w, "", "cond_obs_emb", O, D);
    add_linear(w, "", "encoder.0", D, 4 * D);
    add_linear(w, "", "encoder.2", 4 * D, D);
    add_norm(w, "", "ln_f", D);
    add_linear(w, "", "head", D, A);
    for (int l = 0; l < LAYERS; l++) {
        char prefix[48];
        snprintf(prefix, sizeof prefix, "decoder.layers.%d.", l);
        add_decoder_layer(w, prefix, D, 4 * D);
    }
}

static void draw_pruner(weights *w)
{
    add_linear(w, "", "memory_proj", D, HIDDEN);
    add_linear(w, "", "head", HIDDEN, 4);
    add_decoder_layer(w, "transformer_decoder.layers.0.", HIDDEN, PRUNER_FF);
}

static void free_weights(weights *w)
{
    for (int i = 0; i < w->n; i++) {
        free((void *)w->tensors[i].data);
    }
}

/* a misshapen tensor is refused by name */
static void test_misshapen(const tsad_model_spec *spec, tsad_tensor *tensor)
{
    tsad_model *refused;
    tensor->shape[0]++;
    if (tsad_model_create(spec, &refused) != TSAD_SHAPE || refused ||
        !strstr(tsad_error_detail(), tensor->name)) {
        check(false, "a misshapen tensor is refused by name");
    }
    tensor->shape[0]--;
}

/* the same weights every time */
static tsad_model *make_model(const char *backend)
{
    static weights policy, pruner;
    static const float one[O] = {1, 1, 1}, zero[O];
    int64_t cost[B];
    float sampler[K * TSAD_SAMPLER_COLUMNS] = {0};
    policy.n = pruner.n = 0;
    state = 1;
    draw_policy(&policy);
    draw_pruner(&pruner);
    float *time_emb = draw(K * D, 1, 0), *block_emb = draw(B * HIDDEN, 1, 0);
    for (int k = 0; k < K; k++) {
        float *t = sampler + k * TSAD_SAMPLER_COLUMNS;
        t[0] = 1.1f, t[1] = -0.4f, t[2] = 1, t[3] = 0.3f, t[4] = 0.6f;
        t[7] = k + 1 < K ? 0.1f : 0;
    }
    for (int b = 0; b < B; b++) {
        cost[b] = 100 + b % 3;
    }
    tsad_model_spec spec = {.family = "diffusion_policy_transformer",
                            .horizon = T,
                            .n_obs_steps = OBS,
                            .n_action_steps = 3,
                            .obs_dim = O,
                            .action_dim = A,
                            .n_layers = LAYERS,
                            .n_heads = HEADS,
                            .n_emb = D,
                            .causal = 1,
                            .n_steps = K,
                            .sampler = sampler,
                            .time_emb = time_emb,
                            .obs_scale = one,
                            .obs_offset = zero,
                            .action_scale = one,
                            .action_offset = zero,
                            .n_blocks = B,
                            .block_cost = cost,
                            .tensors = policy.tensors,
                            .n_tensors = policy.n,
                            .pruner_tensors = pruner.tensors,
                            .n_pruner_tensors = pruner.n,
                            .pruner_hidden = HIDDEN,
                            .pruner_heads = 2,
                            .pruner_ff = PRUNER_FF,
                            .block_emb = block_emb,
                            .backend = backend};
    tsad_model *model;
    must(tsad_model_create(&spec, &model));

    test_misshapen(&spec, &policy.tensors[0]);
    free_weights(&policy);
    free_weights(&pruner);
    free(time_emb);
    free(block_emb);
    return model;
}

/* ---- chunks ------------------------------------------------------------------------------ */

enum { LANES = 3 };

static float observations[LANES * OBS * O], noise[K * LANES * T * A];

static void chunk(tsad_policy *p, int n, float *actions)
{
    static const int lanes[LANES] = {0, 1, 2};
    tsad_call call = {.lanes = lanes,
                      .n_lanes = n,
                      .obs = observations,
                      .noise = noise,
                      .noise_step = LANES * T * A,
                      .noise_lane = T * A,
                      .actions = actions,
                      .whole_horizon = 1};
    must(tsad_policy_acquire(p));
    must(tsad_policy_step(p, &call));
    tsad_policy_release(p);
}

static void random_plan(uint8_t *first, uint8_t *steady)
{
    for (int i = 0; i < K * B; i++) {
        first[i] = steady[i] = TSAD_COMPUTE;
        if (i >= B) {
            steady[i] = (uint8_t)((uniform() + 1) * 2.4999f);
            if (steady[i] != TSAD_REUSE_ROLLOUT && uniform() < 0) {
                first[i] = (uint8_t)((uniform() + 1) * 1.4999f);
            }
        }
    }
}

/* the same plans on 1, 2, 4 threads and lane by lane give the same bits */
static void test_threads(tsad_model *model)
{
    uint8_t first[K * B], steady[K * B];
    bool same = true;
    for (int trial = 0; trial < 50; trial++) {
        float actions[4][LANES * T * A];
        random_plan(first, steady);
        for (int i = 0; i < 4; i++) {
            tsad_policy *p;
            must(tsad_policy_create(model, LANES, i == 3 ? 1 : 1 << i, &p));
            for (int lane = 0; lane < LANES; lane++) {
                must(tsad_policy_set_plan(p, lane, steady, first));
            }
            for (int rollout = 0; rollout < 3; rollout++) {
                chunk(p, i == 2 ? 1 : LANES, actions[i]); /* one lane: four threads share it */
            }
            same &= memcmp(actions[i], actions[0], sizeof(float) * T * A) == 0;
            same &= i == 2 || memcmp(actions[i], actions[0], sizeof actions[0]) == 0;
            tsad_policy_destroy(p);
        }
    }
    check(same, "identical bits on 1, 2 and 4 threads, shared and spread");
}

static void test_plans(tsad_model *model)
{
    uint8_t dense[K * B] = {0}, plan[K * B] = {0};
    float a[LANES * T * A], b[LANES * T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, LANES, 1, &p));
    chunk(p, LANES, a);
    must(tsad_policy_set_plan(p, 0, dense, dense));
    chunk(p, LANES, b);
    check(memcmp(a, b, sizeof a) == 0, "a plan of all compute is the dense policy");
    plan[0] = TSAD_REUSE_STEP;
    check(tsad_policy_set_plan(p, 0, plan, dense) == TSAD_PLAN &&
              strstr(tsad_error_detail(), "step 0, block 0"),
          "row 0 reading an empty slot is refused, with its place");
    plan[0] = TSAD_COMPUTE;
    plan[B] = TSAD_REUSE_ROLLOUT;
    check(tsad_policy_set_plan(p, 0, plan, dense) == TSAD_PLAN, "a rollout plan in mid-episode");
    tsad_policy_reset(p, 0);
    check(tsad_policy_set_plan(p, 0, plan, dense) == TSAD_OK, "the same plan after a reset");
    chunk(p, LANES, a);
    chunk(p, LANES, a);
    check(tsad_policy_get_stats(p, 0).max_age == 1, "the rollout slot's age is known");
    must(tsad_policy_set_pruner(p, 0.5));
    for (int i = 0; i < 3; i++) {
        chunk(p, LANES, a);
    }
    check(tsad_policy_get_stats(p, 0).cost <= (int64_t)(0.5 * 101 * K * B) + 1,
          "the pruner meets its budget");
    must(tsad_policy_acquire(p));
    check(tsad_policy_acquire(p) == TSAD_BUSY, "a second caller is refused");
    tsad_policy_release(p);
    observations[1] = NAN;
    tsad_call call = {
        .lanes = (int[]){0}, .n_lanes = 1, .obs = observations, .noise = noise, .actions = a};
    check(tsad_policy_step(p, &call) == TSAD_ARGUMENT, "NaN in the observation is refused");
    observations[1] = 0;
    tsad_policy_destroy(p);
}

/* every instruction set of this machine equals plain C */
static void test_paths(void)
{
    const char *names[8];
    int n = tsad_backend_names(names, 8);
    float actions[8][LANES * T * A];
    uint8_t first[K * B], steady[K * B];
    random_plan(first, steady);
    for (int i = 0; i < n; i++) {
        tsad_model *model = make_model(names[i]);
        tsad_policy *p;
        must(tsad_policy_create(model, LANES, 1, &p));
        must(tsad_policy_set_plan(p, 0, steady, first));
        for (int rollout = 0; rollout < 3; rollout++) {
            chunk(p, LANES, actions[i]);
        }
        tsad_policy_destroy(p);
        tsad_model_destroy(model);
    }
    for (int i = 0; i < n; i++) { /* plain C is the last */
        float worst = 0;
        for (int j = 0; j < LANES * T * A; j++) {
            worst = fmaxf(worst, fabsf(actions[i][j] - actions[n - 1][j]));
        }
        char text[64];
        snprintf(text, sizeof text, "%s equals ref (largest difference %.1e)", names[i], worst);
        check(worst <= 1e-5f, text);
    }
}

/* two policies on one model, each with its own thread, both wanting the team */
static void *hammer(void *model)
{
    float actions[LANES * T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, LANES, 2, &p));
    for (int i = 0; i < 200; i++) {
        chunk(p, i % 2 ? LANES : 1, actions);
    }
    tsad_policy_destroy(p);
    return NULL;
}

static void count_chunks(tsad_model *model, int n)
{
    uint8_t first[K * B] = {0}, steady[K * B];
    float actions[LANES * T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, LANES, 1, &p));
    for (int i = 0; i < n; i++) {
        chunk(p, 1, actions);
    }
    memset(steady, TSAD_REUSE_STEP, sizeof steady);
    memset(steady, TSAD_COMPUTE, B);
    must(tsad_policy_set_plan(p, 0, steady, first));
    for (int i = 0; i < n; i++) {
        chunk(p, 1, actions);
    }
    tsad_policy_destroy(p);
}

int main(int argc, char **argv)
{
    tsad_model *model = make_model(NULL);
    for (int i = 0; i < LANES * OBS * O; i++) {
        observations[i] = uniform();
    }
    for (int i = 0; i < K * LANES * T * A; i++) {
        noise[i] = uniform();
    }
    if (argc == 3 && strcmp(argv[1], "chunks") == 0) {
        count_chunks(model, atoi(argv[2]));
    } else {
        test_threads(model);
        test_plans(model);
        test_paths();
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) {
            pthread_create(&threads[i], NULL, hammer, model);
        }
        for (int i = 0; i < 2; i++) {
            pthread_join(threads[i], NULL);
        }
        check(true, "two policies on one model, two threads each");
    }
    tsad_model_destroy(model);
    tsad_model_destroy(NULL);
    tsad_policy_destroy(NULL);
    printf("%d failed\n", failures);
    return failures != 0;
}
