/* instructions.c: chunks for an instruction counter. instructions.py compiles it, runs it under
 * callgrind, one thread, and compares the counts with those committed.
 *
 *   instructions PLANS
 *
 * PLANS: one case after the other, the sources of its lanes, (lanes, K, B) bytes each, in the
 * order of `cases` below. Each case is one chunk, in mid-episode; making models and policies is
 * not counted.
 */
#include "policy.h"
#include "random_model.h"

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else /* runs without counting */
#define CALLGRIND_START_INSTRUMENTATION
#define CALLGRIND_STOP_INSTRUMENTATION
#define CALLGRIND_ZERO_STATS
#define CALLGRIND_DUMP_STATS_AT(name)
#endif

enum { MAX_LANES = 8 };

/* The standard transformer with a quarter of its layers and half of its steps, as every fused
 * multiply-add costs the counter hundreds of instructions; and a pruner of a CPU's size. */
static const shape STANDARD = {.steps = 50,
                               .layers = 2,
                               .width = 256,
                               .heads = 4,
                               .horizon = 10,
                               .action_dim = 2,
                               .n_obs_steps = 2,
                               .obs_dim = 20,
                               .n_action_steps = 8,
                               .hidden = 128,
                               .pruner_heads = 4,
                               .pruner_ff = 256};

typedef struct bench_case {
    const char *name;
    int steps, lanes;
    bool pruner; /* its plans are the pruner's, at 95 % */
} bench_case;

static const bench_case cases[] = {
    {"dense", 4, 1, false},   {"uniform-90", 50, 1, false}, {"sparse95", 50, 1, false},
    {"lanes8", 50, 8, false}, {"pruner", 50, 1, true},
};

/* The next chunk is the second of an episode whose first was dense, without running that one: the
 * slots hold zeros, which cost as much as any other numbers. */
static void begin_in_mid_episode(tsad_policy *p, int lane)
{
    size_t cells = (size_t)p->model->n_steps * (size_t)p->model->n_blocks;
    p->lanes[lane].chunk = 1;
    for (size_t i = 0; i < cells; i++) {
        p->lanes[lane].computed_at[i] = 1;
    }
}

static void count(const bench_case *c, tsad_model *model, const uint8_t *plans)
{
    int K = STANDARD.steps, T = STANDARD.horizon, A = STANDARD.action_dim;
    int cells = c->steps * blocks_of(&STANDARD), lanes[MAX_LANES];
    float *obs = draw((size_t)(c->lanes * STANDARD.n_obs_steps * STANDARD.obs_dim), 1, 0);
    float *noise = draw((size_t)(K * c->lanes * T * A), 1, 0), *actions = fill(c->lanes * T * A, 0);
    uint8_t *dense = calloc((size_t)cells, 1);
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, c->lanes, 1, &p));
    for (int i = 0; i < c->lanes; i++) {
        lanes[i] = i;
        if (!c->pruner) {
            must(tsad_policy_set_plan(p, i, plans + i * cells, dense));
        }
    }
    if (c->pruner) {
        must(tsad_policy_set_pruner(p, 0.95));
    }
    for (int i = 0; i < c->lanes; i++) {
        begin_in_mid_episode(p, i);
    }
    tsad_call call = {.lanes = lanes,
                      .n_lanes = c->lanes,
                      .obs = obs,
                      .noise = noise,
                      .noise_step = (size_t)(c->lanes * T * A),
                      .noise_lane = (size_t)(T * A),
                      .actions = actions};
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
    must(tsad_policy_step(p, &call));
    CALLGRIND_DUMP_STATS_AT(c->name);
    CALLGRIND_STOP_INSTRUMENTATION;
    printf("%s: cost %.4f of dense, %s\n", c->name,
           (double)tsad_policy_get_stats(p, 0).cost / (double)model->dense_cost,
           tsad_model_get_info(model).backend);
    tsad_policy_destroy(p);
    free(obs);
    free(noise);
    free(actions);
    free(dense);
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file) {
        fprintf(stderr, "usage: instructions PLANS\n");
        return 2;
    }
    tsad_model *model = NULL;
    int steps = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = (size_t)(cases[i].steps * blocks_of(&STANDARD) * cases[i].lanes);
        uint8_t *plans = malloc(n);
        if (!plans || fread(plans, 1, n, file) != n) {
            fprintf(stderr, "instructions: %s is too short for the case %s\n", argv[1],
                    cases[i].name);
            return 2;
        }
        if (cases[i].steps != steps) {
            shape s = STANDARD;
            steps = s.steps = cases[i].steps;
            tsad_model_destroy(model);
            model = random_model(&s, NULL);
        }
        count(&cases[i], model, plans);
        free(plans);
    }
    tsad_model_destroy(model);
    fclose(file);
    return 0;
}
