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
#include "ladder_plain.h"
#include "random_model.h"

enum { MOST_CHUNKS = 1000 };

static const shape STANDARD = {.steps = 100,
                               .layers = 8,
                               .width = 256,
                               .heads = 4,
                               .horizon = 10,
                               .action_dim = 2,
                               .n_obs_steps = S - 1,
                               .obs_dim = 20,
                               .n_action_steps = 8};

typedef enum rung { IN_LOOP, ENCODE_ONCE, ALL_AT_ONCE, HOISTED, SHARED, OVERLAPPED, N_RUNGS } rung;
static const char *const rung_names[] = {"in the loop",       "encoder once",
                                         "all steps at once", "hoisted, one thread",
                                         "hoisted, shared",   "hoisted, beside step 0"};
static const char *const pruner_names[] = {"published 512-8-1024", "published layout 128-4-256",
                                           "MLP 768-128-96"};

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

#define RUN_PARAMETERS tsad_worker *w, const tsad_run *run, int n, int begin, int end
#define RUN_ROWS(from, to) now.engine->run(w, run, n, from, to)
#define RUN(what, from, to) now.engine->run(w, what, 1, from, to)

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

static void prune_alone(tsad_worker *w, tsad_lane *lane)
{
    int64_t t = tsad_now();
    int size = w->size;
    w->size = 1;
    tsad_prune(w, lane);
    w->size = size;
    now.prune += tsad_now() - t;
}

static atomic_int next_row; /* of the pruner, 0: what all rows need is not there yet */

static void take_rows(tsad_worker *w, const tsad_run *rows)
{
    while (!atomic_load(&next_row)) {
        tsad_spin(0);
    }
    for (int row; (row = atomic_fetch_add(&next_row, 1)) < w->policy->prune.n_rows;) {
        RUN(rows, row, row + 1);
    }
}

static tsad_run pruner_rows(const tsad_worker *w, tsad_lane *lane)
{
    return (tsad_run){.net = &w->policy->model->pruner_net,
                      .program = &w->policy->prune,
                      .registers = w->pruner_registers,
                      .lane = lane};
}

/* all threads of the lane */
static void prune_shared(tsad_worker *w, tsad_lane *lane)
{
    int64_t t = tsad_now();
    int rank = w->rank, size = w->size;
    tsad_run rows = pruner_rows(w, lane);
    w->rank = 0, w->size = 1; /* rows are each thread's own: no meeting inside */
    if (rank == 0) {
        RUN(&rows, 0, 1);
        atomic_store(&next_row, 1);
    }
    take_rows(w, &rows);
    w->rank = rank, w->size = size;
    if (rank == 0) {
        now.prune += tsad_now() - t;
    }
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
    } else if (k == 0 && now.rung != SHARED) { /* beside step 0 only where there are two threads */
        prune_alone(w, run->lane);
    }
}

/* Rank 0 prunes while rank 1 runs step 0 alone; then both prune what is left, and rank 0 takes over
 * what step 0 left. */
static void overlap(RUN_PARAMETERS)
{
    (void)end;
    int rank = w->rank, size = w->size;
    tsad_run rows = pruner_rows(w, run->lane);
    int64_t t = tsad_now();
    w->rank = 0, w->size = 1;
    if (rank == 0) {
        RUN(&rows, 0, 1);
        atomic_store(&next_row, 1);
    } else {
        w->shares = false; /* no turn is taken */
        RUN_ROWS(begin, begin + 1);
        w->shares = true;
        now.rank1 = run->registers;
    }
    take_rows(w, &rows);
    w->rank = rank, w->size = size;
    if (rank == 0) {
        now.prune += tsad_now() - t;
    }
    bool stalled = w->stalled;
    tsad_worker_meet(w);
    w->stalled = stalled; /* who prunes quickly waits for step 0, not for a core that is taken */
    if (w->rank == 0) {
        for (int i = 0; i < run->net->n_registers; i++) {
            memcpy(run->registers[i], now.rank1[i],
                   sizeof(float) * tsad_register_floats(&run->net->registers[i]));
        }
    }
    tsad_worker_meet(w);
}

static void run_rows(RUN_PARAMETERS)
{
    tsad_meeting *meeting = w->policy->meeting;
    if (w->shares && w->rank == 0 && !run->update) { /* the rungs count on all from the first row */
        for (int spins = 0; atomic_load(&meeting->arrived) < w->policy->n_threads - 1; spins++) {
            tsad_spin(spins);
        }
    }
    if (!run->update || now.rung == N_RUNGS) { /* the encoder, the pruner, or nothing beside */
        RUN_ROWS(begin, end);
        return;
    }
    bool beside = now.rung == OVERLAPPED && w->size == 2;
    if (w->rank == 0) {
        atomic_store(&next_row, 0);
    }
    if (beside || now.rung == SHARED) {
        tsad_worker_meet(w);
    }
    if (beside) {
        overlap(w, run, n, begin, end);
        begin++;
    }
    bool every = now.rung <= ENCODE_ONCE;
    for (int k = begin; k < end && w->size > 0; k = every ? k + 1 : end) {
        if (!beside) {
            if (w->rank == 0) {
                before_row(w, run, k);
            }
            tsad_worker_meet(w);
        }
        if (now.rung == SHARED && k == 0) {
            prune_shared(w, run->lane);
            tsad_worker_meet(w);
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
    int64_t beside = now.encode + now.prune;
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
    must(tsad_policy_pruner_scores(policy, now.obs, got));
    for (size_t k = 0; k < K; k++) { /* back to the order of the memory */
        memcpy(scores + k * B * 4, got + (K - 1 - k) * B * 4, sizeof(float) * B * 4);
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
    static const int sizes[][3] = {{512, 8, 1024}, {128, 4, 256}, {128, 0, 0}};
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
