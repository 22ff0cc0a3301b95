/* smoke.c: the core without Python. Proves that it needs none, and gives leak and race tools a
 * target without an interpreter's noise. (Instructions are counted by bench/instructions.c.)
 *
 *   cc -std=gnu11 -O2 -Icsrc tests/smoke.c csrc/{,net/,plan/,stage/,cpu/}*.c -lm -lpthread \
 *       -Wl,--wrap=tsad_now,--wrap=tsad_arrive,--wrap=tsad_turn,--wrap=tsad_share_rows,\
 *       --wrap=tsad_meeting_end,--wrap=aligned_alloc -o smoke
 *   ./smoke            everything; prints one line per check
 *   ./smoke chunks N   N dense and N planned chunks of the tiny model, for leak checkers
 * --wrap lets the test move the clock (a thread that waited long has another's core taken, and the
 * chunk goes on without it), hold threads back at a given point of a chunk, and be out of memory.
 */
#include "policy.h"
#include "random_model.h"
#include "smoke_vision.h"
#include "smoke_wraps.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static const shape TINY = {.steps = 6,
                           .layers = 2,
                           .width = 16,
                           .heads = 4,
                           .horizon = 5,
                           .action_dim = 2,
                           .n_obs_steps = 2,
                           .obs_dim = 3,
                           .n_action_steps = 3,
                           .hidden = 8,
                           .pruner_heads = 2,
                           .pruner_ff = 12};
enum { K = 6, T = 5, A = 2, O = 3, OBS = 2, B = 6 }; /* of TINY */

static int failures;

static void check(bool ok, const char *what)
{
    printf("%s %s\n", ok ? "ok  " : "FAIL", what);
    failures += !ok;
}

static void test_misshapen(void)
{
    random_spec *r = random_spec_make(&TINY, NULL);
    tsad_model *refused;
    r->policy.tensors[0].shape[0]++;
    tsad_status status = tsad_model_create(&r->spec, &refused);
    check(status == TSAD_SHAPE && !refused && strstr(tsad_error_detail(), r->policy.names[0]),
          "a misshapen tensor is refused by name");
    random_spec_free(r);
}

/* ---- chunks ------------------------------------------------------------------------------ */

enum { LANES = 64, FEW = 3, ROLLOUTS = 3 };

static float observations[LANES * OBS * O], noise[K * LANES * T * A];
static uint8_t first_plan[LANES][K * B], steady_plan[LANES][K * B];
static const int all_lanes[LANES] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

/* of lanes [from, from + n) */
static tsad_call call_of(int from, int n, float *actions)
{
    return (tsad_call){.lanes = all_lanes + from,
                       .n_lanes = n,
                       .obs = observations + from * OBS * O,
                       .noise = noise + from * T * A,
                       .noise_step = LANES * T * A,
                       .noise_lane = T * A,
                       .actions = actions + from * T * A,
                       .whole_horizon = 1};
}

static void chunk_of(tsad_policy *p, int from, int n, float *actions)
{
    tsad_call call = call_of(from, n, actions);
    must(tsad_policy_acquire(p));
    must(tsad_policy_step(p, &call));
    tsad_policy_release(p);
}

static void chunk(tsad_policy *p, int n, float *actions) { chunk_of(p, 0, n, actions); }

/* rows that add the same slots again, most of them computing a block or two: sums are remembered */
static void repeating_plan(uint8_t *first, uint8_t *steady)
{
    int computed = (int)((uniform() + 1) * 2.999f), other = (int)((uniform() + 1) * 2.999f);
    for (int i = 0; i < K * B; i++) {
        bool own = (i % B == computed || i % B == other) && i / B % 3 != 1;
        first[i] = TSAD_COMPUTE;
        steady[i] = i < B || own ? TSAD_COMPUTE : TSAD_REUSE_STEP;
    }
}

static void random_plan(uint8_t *first, uint8_t *steady)
{
    if (uniform() < 0) {
        repeating_plan(first, steady);
        return;
    }
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

static tsad_policy *planned(tsad_model *model, int n_lanes, int n_threads)
{
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, n_lanes, n_threads, &p));
    for (int lane = 0; lane < n_lanes; lane++) {
        must(tsad_policy_set_plan(p, lane, steady_plan[lane], first_plan[lane]));
    }
    return p;
}

/* new plans for every lane, and what one thread makes of them lane by lane */
static void plan_lanes(tsad_model *model, int n, float *expected)
{
    for (int lane = 0; lane < n; lane++) {
        random_plan(first_plan[lane], steady_plan[lane]);
    }
    tsad_policy *p = planned(model, n, 1);
    for (int rollout = 0; rollout < ROLLOUTS; rollout++) {
        for (int lane = 0; lane < n; lane++) {
            chunk_of(p, lane, 1, expected);
        }
    }
    tsad_policy_destroy(p);
}

/* every lane with a plan of its own: together or lane by lane, on 1, 2 or 4 threads, shared (fewer
 * lanes than threads) or spread, the bits are the same */
static void test_threads(tsad_model *model)
{
    static float expected[LANES * T * A], actions[LANES * T * A];
    static const int sizes[] = {1, FEW, 8, LANES};
    for (int i = 0; i < 4; i++) {
        int n = sizes[i];
        bool same = true;
        for (int trial = 0; trial < (n < LANES ? 30 : 5); trial++) {
            plan_lanes(model, n, expected);
            for (int threads = 1; threads <= 4; threads *= 2) {
                tsad_policy *p = planned(model, n, threads);
                for (int rollout = 0; rollout < ROLLOUTS; rollout++) {
                    chunk(p, n, actions);
                }
                same &= memcmp(actions, expected, sizeof(float) * (size_t)(n * T * A)) == 0;
                tsad_policy_destroy(p);
            }
        }
        char text[80];
        snprintf(text, sizeof text, "identical bits on 1, 2 and 4 threads, lanes %d, own plans", n);
        check(same, text);
    }
}

/* Threads that come when the chunk is anywhere, one and then the others: the bits stay, in the
 * chunks after it too. */
static void test_late(tsad_model *model)
{
    static float expected[LANES * T * A], actions[LANES * T * A];
    if (!__real_tsad_arrive) {
        printf("skip threads that come late: link with the other -Wl,--wrap\n");
        return;
    }
    bool same = true;
    joined = joined_at_a_row = 0;
    for (int threads = 2; threads <= 4; threads += 2) {
        for (int n = 1; n < threads; n += 2) { /* more lanes are spread, and never meet */
            plan_lanes(model, n, expected);
            for (int first = ROWS; first < n * (K + 1); first++) {
                for (int others = first; others <= first + (threads > 2 ? 4 : 0); others += 2) {
                    tsad_policy *p = planned(model, n, threads);
                    for (int rollout = 0; rollout < ROLLOUTS; rollout++) {
                        hold(first, rollout > 0 ? others : ANYTIME);
                        p->engine->alone_for = 0; /* whatever the machine did to the chunk before */
                        chunk(p, n, actions);
                    }
                    same &= memcmp(actions, expected, sizeof(float) * (size_t)(n * T * A)) == 0;
                    tsad_policy_destroy(p);
                }
            }
        }
    }
    hold(0, ANYTIME);
    char text[80];
    snprintf(text, sizeof text, "identical bits with threads that come late (%d, %d at a row)",
             joined, joined_at_a_row);
    check(same && joined > 100 && joined_at_a_row > 80, text);
}

/* A core taken at any meeting of a chunk: the clock jumps between two readings, rank 0 takes that
 * for a stall, and goes on alone. The bits stay, in the chunks after it too. */
static void test_stalls(tsad_model *model)
{
    static float expected[LANES * T * A], actions[LANES * T * A];
    if (!__real_tsad_now) {
        printf("skip a core taken in mid-chunk: link with -Wl,--wrap=tsad_now\n");
        return;
    }
    bool same = true;
    int stalls = 0, whole = 0;
    for (int threads = 2; threads <= 4; threads += 2) {
        for (int n = 1; n < threads; n += 2) { /* more lanes are spread, and never meet */
            plan_lanes(model, n, expected);
            for (int at = 0; at < 90; at++) {
                tsad_policy *p = planned(model, n, threads);
                for (int rollout = 0; rollout < ROLLOUTS; rollout++) {
                    hold(at % 3 - 1,
                         at % 2 ? at % 3 : at % 3 - 1); /* early: there is a lot to meet */
                    readings_to_jump = rollout == 1 ? at : -1;
                    p->engine->alone_for = 0;
                    p->engine->stalled_at = INT64_MAX / 2; /* a stall is not the first */
                    chunk(p, n, actions);
                    stalls += rollout == 1 && p->engine->workers[0].stalled;
                    whole += rollout == 1 && !p->engine->workers[0].stalled;
                }
                same &= memcmp(actions, expected, sizeof(float) * (size_t)(n * T * A)) == 0;
                tsad_policy_destroy(p);
            }
        }
    }
    readings_to_jump = -1;
    hold(0, ANYTIME);
    char text[80];
    snprintf(text, sizeof text, "identical bits with a core taken in mid-chunk (%d of %d)", stalls,
             stalls + whole);
    check(same && stalls > 60, text);
}

typedef struct listener {
    pthread_t caller;
    bool raises, strange;
    int asked;
} listener;

static int wanted(void *context)
{
    listener *l = context;
    l->asked++;
    l->strange |= !pthread_equal(l->caller, pthread_self());
    return l->raises;
}

/* A call that is asked anywhere to stop: on the calling thread, it returns nothing and its lanes
 * start anew, with the bits of a new policy; who is asked and doesn't stop has the bits too. */
static void test_interrupts(tsad_model *model)
{
    static float expected[LANES * T * A], actions[LANES * T * A], none[LANES * T * A];
    static const int sizes[] = {1, FEW, 8};
    if (!__real_tsad_now) {
        printf("skip calls that are told to stop: link with -Wl,--wrap=tsad_now\n");
        return;
    }
    bool right = true;
    int stopped = 0, went_on = 0;
    for (int threads = 1; threads <= 4; threads *= 2) {
        for (int i = 0; i < 3; i++) {
            int n = sizes[i];
            plan_lanes(model, n, expected);
            for (int at = 0; at < 60; at++) {
                tsad_policy *p = planned(model, n, threads);
                listener l = {.caller = pthread_self(), .raises = at % 3 > 0};
                tsad_interrupt interrupt = {wanted, &l};
                memset(actions, 0, sizeof actions);
                chunk(p, n, actions);
                memset(actions, 0, sizeof actions);
                tsad_call call = call_of(0, n, actions);
                call.interrupt = &interrupt;
                readings_to_jump = at;
                must(tsad_policy_acquire(p));
                tsad_status status = tsad_policy_step(p, &call);
                tsad_policy_release(p);
                readings_to_jump = -1;
                bool stops = l.raises && l.asked > 0;
                right &= !l.strange && status == (stops ? TSAD_INTERRUPTED : TSAD_OK);
                right &= !stops || (l.asked == 1 && !memcmp(actions, none, sizeof actions));
                stopped += stops;
                went_on += l.asked > 0 && !stops;
                for (int rollout = stops ? 0 : 2; rollout < ROLLOUTS; rollout++) {
                    chunk(p, n, actions);
                }
                right &= memcmp(actions, expected, sizeof(float) * (size_t)(n * T * A)) == 0;
                tsad_policy_destroy(p);
            }
        }
    }
    char text[80];
    snprintf(text, sizeof text, "calls that are told to stop (%d), or not after all (%d)", stopped,
             went_on);
    check(right && stopped > 60 && went_on > 30, text);
}

/* the threads of a lane share the pruner's steps: whoever makes them, the plan and the bits are the
 * same, also with a core taken at any meeting */
static void test_pruners(void)
{
    shape kinds[2] = {TINY, TINY};
    kinds[1].pruner_heads = 0; /* an MLP */
    bool same = true;
    int64_t costs[2];
    for (int kind = 0; kind < 2; kind++) {
        tsad_model *model = random_model(&kinds[kind], NULL);
        static float expected[T * A], actions[T * A];
        for (int trial = 0; trial < 60; trial++) {
            for (int threads = 1; threads <= 4; threads *= 2) {
                tsad_policy *p;
                must(tsad_policy_create(model, NULL, 1, threads, &p));
                must(tsad_policy_set_pruner(p, 0.5));
                for (int rollout = 0; rollout < ROLLOUTS; rollout++) {
                    hold(ROWS, trial % 2 ? trial % 5 : ROWS);
                    readings_to_jump = __real_tsad_now && rollout == 1 ? trial : -1;
                    p->engine->alone_for = 0;
                    p->engine->stalled_at = INT64_MAX / 2;
                    chunk(p, 1, threads == 1 ? expected : actions);
                }
                same &= threads == 1 || memcmp(actions, expected, sizeof actions) == 0;
                costs[kind] = tsad_policy_get_stats(p, 0).cost;
                tsad_policy_destroy(p);
            }
        }
        same &= costs[kind] <= model->dense_cost / 2;
        tsad_model_destroy(model);
    }
    readings_to_jump = -1;
    hold(0, ANYTIME);
    check(same, "identical bits on 1, 2 and 4 threads with a pruner, a transformer and an MLP");
}

/* Plans of all lanes are set or refused as a whole, whatever the first ones were like. */
static void test_plans_of_all_lanes(tsad_model *model)
{
    uint8_t dense[K * B] = {0}, fine[K * B] = {0}, bad[K * B] = {0}, rollout[K * B] = {0};
    static float a[FEW * T * A], b[FEW * T * A];
    fine[B] = TSAD_REUSE_STEP;
    bad[0] = TSAD_SKIP + 1;
    rollout[B] = TSAD_REUSE_ROLLOUT;
    const struct {
        const uint8_t *last;
        bool no_memory, mid_episode;
        tsad_status expected;
    } cases[] = {{bad, false, false, TSAD_PLAN},
                 {rollout, false, true, TSAD_PLAN},
                 {rollout, true, false, TSAD_MEMORY},
                 {rollout, false, false, TSAD_OK}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tsad_policy *p, *twin;
        must(tsad_policy_create(model, NULL, FEW, 1, &p));
        must(tsad_policy_create(model, NULL, FEW, 1, &twin));
        if (cases[i].mid_episode) {
            chunk(p, FEW, a);
            chunk(twin, FEW, b);
        }
        tsad_lane_plan plans[FEW];
        for (int lane = 0; lane < FEW; lane++) {
            const uint8_t *sources = lane < FEW - 1 ? fine : cases[i].last;
            plans[lane] = (tsad_lane_plan){.sources = sources, .first = dense};
        }
        size_t bytes = tsad_policy_bytes(p);
        no_memory = cases[i].no_memory;
        tsad_status status = tsad_policy_set_plans(p, 0, FEW, plans);
        no_memory = false;
        bool changed = tsad_policy_bytes(p) != bytes;
        for (int rollouts = 0; rollouts < ROLLOUTS; rollouts++) {
            chunk(p, FEW, a);
            chunk(twin, FEW, b);
            changed |= memcmp(a, b, sizeof a) != 0;
        }
        check(status == cases[i].expected && changed == (status == TSAD_OK),
              status == TSAD_OK ? "plans of all lanes are set" : tsad_error_detail());
        tsad_policy_destroy(twin);
        tsad_policy_destroy(p);
    }
}

/* lanes that are cold and lanes that are not, in one call: bits of each alone, on any threads */
static void test_warm(tsad_model *model)
{
    enum { N = 4, WARM = 3 };
    static float expected[LANES * T * A], actions[LANES * T * A];
    float sampler[WARM * TSAD_SAMPLER_COLUMNS];
    memcpy(sampler, model->sampler + (K - WARM) * TSAD_SAMPLER_COLUMNS, sizeof sampler);
    tsad_warm_start warm = {WARM, sampler, 0.75f, 0.5f};
    bool same = true;
    for (int threads = 1; threads <= 4; threads *= 2) {
        tsad_policy *alone, *p;
        must(tsad_policy_create(model, &warm, N, 1, &alone));
        must(tsad_policy_create(model, &warm, N, threads, &p));
        for (int call = 0; call < 12; call++) {
            int n = call % N + 1;
            for (int lane = 0; lane < n; lane++) {
                if ((call + lane) % 3 == 0) {
                    tsad_policy_reset(alone, lane);
                    tsad_policy_reset(p, lane);
                }
                chunk_of(alone, lane, 1, expected);
            }
            chunk(p, n, actions);
            same &= memcmp(expected, actions, sizeof(float) * (size_t)(n * T * A)) == 0;
        }
        check(tsad_policy_set_pruner(p, 0.5) == TSAD_ARGUMENT, "no pruner with a warm start");
        tsad_policy_destroy(alone);
        tsad_policy_destroy(p);
    }
    check(same, "identical bits on 1, 2 and 4 threads with cold and warm lanes in one call");
    tsad_policy *p;
    warm.n_steps = K + 1;
    check(tsad_policy_create(model, &warm, N, 1, &p) == TSAD_ARGUMENT, "more steps than there are");
}

static void test_plans(tsad_model *model)
{
    uint8_t dense[K * B] = {0}, plan[K * B] = {0};
    static float a[LANES * T * A], b[LANES * T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, LANES, 1, &p));
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
    check(tsad_policy_get_stats(p, 0).cost <= model->dense_cost / 2, "the pruner meets its budget");
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
static void test_paths(tsad_precision precision, float bound)
{
    const char *names[8];
    int n = tsad_backend_names(names, 8);
    static float actions[8][LANES * T * A];
    uint8_t first[K * B], steady[K * B];
    random_plan(first, steady);
    for (int i = 0; i < n; i++) {
        random_spec *spec = random_spec_make(&TINY, names[i]);
        spec->spec.precision = precision;
        tsad_model *model;
        must(tsad_model_create(&spec->spec, &model));
        random_spec_free(spec);
        tsad_policy *p;
        must(tsad_policy_create(model, NULL, LANES, 1, &p));
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
        char text[80];
        snprintf(text, sizeof text, "%s equals ref in %s (largest difference %.1e)", names[i],
                 precision == TSAD_FLOAT32 ? "float32"
                 : precision == TSAD_INT16 ? "16 bits"
                                           : "8 bits",
                 worst);
        check(worst <= bound, text);
    }
}

/* the guarded backend's memory is nobody's between its entry points: a stage that read it would end
 * the process */
static void test_guarded(void)
{
    tsad_model *model = random_model(&TINY, "guarded");
    static float expected[T * A], actions[T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, FEW, 4, &p));
    chunk(p, 1, actions);
    fflush(stdout);
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        close(STDERR_FILENO); /* an emulator's last words */
        volatile float first = *(volatile float *)(volatile void *)p->engine->arena.base;
        _exit(first == 0 ? 0 : 1);
    }
    waitpid(child, &status, 0);
    check(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV,
          "reading the guarded backend's memory ends the process");
    tsad_policy_destroy(p);
    tsad_model_destroy(model);
    model = random_model(&TINY, "ref");
    must(tsad_policy_create(model, NULL, FEW, 4, &p));
    chunk(p, 1, expected);
    check(memcmp(expected, actions, sizeof actions) == 0, "the guarded backend has ref's bits");
    tsad_policy_destroy(p);
    tsad_model_destroy(model);
}

/* two policies on one model, each with its own thread, both wanting the team */
static void *hammer(void *model)
{
    float actions[FEW * T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, FEW, 2, &p));
    for (int i = 0; i < 200; i++) {
        chunk(p, i % 2 ? FEW : 1, actions);
    }
    tsad_policy_destroy(p);
    return NULL;
}

static void count_chunks(tsad_model *model, int n)
{
    uint8_t first[K * B] = {0}, steady[K * B];
    float actions[T * A];
    tsad_policy *p;
    must(tsad_policy_create(model, NULL, 1, 1, &p));
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
    tsad_model *model = random_model(&TINY, NULL);
    for (int i = 0; i < LANES * OBS * O; i++) {
        observations[i] = uniform();
    }
    for (int i = 0; i < K * LANES * T * A; i++) {
        noise[i] = uniform();
    }
    if (argc == 3 && strcmp(argv[1], "chunks") == 0) {
        count_chunks(model, atoi(argv[2]));
    } else {
        test_misshapen();
        test_threads(model);
        test_late(model);
        test_stalls(model);
        test_interrupts(model);
        test_pruners();
        test_plans(model);
        test_plans_of_all_lanes(model);
        test_warm(model);
        test_guarded();
        test_paths(TSAD_FLOAT32, 1e-5f);
        test_paths(TSAD_INT16, 1e-4f);
        test_paths(TSAD_INT8, 1e-4f);
        check(encoders_are_near_ref(), "image encoders equal ref in float32, in 16 and in 8 bits");
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
