/* chunk.c: a call of a policy: encode, prune, plan, denoise, on one thread or several. Lanes are
 * spread over threads where there are enough of them; otherwise threads share each lane in turn.
 */
#include "backend.h"

#include <math.h>
#include <string.h>

/* ---- the stages of a lane -------------------------------------------------------------------- */

typedef struct job {
    tsad_policy *policy;
    const tsad_call *call;
    atomic_int next; /* call row to take, where lanes are spread over threads */
} job;

static int64_t lap(tsad_worker *w, int timer, int64_t since)
{
    int64_t now = tsad_now();
    w->ns[timer] += now - since;
    return now;
}

/* Everything before the loop: rank 0's, with help for the rows of encoder and pruner. */
static void prepare(tsad_worker *w, int n)
{
    int size = w->size;
    w->size = 1;
    int64_t t = tsad_now();
    tsad_encode(w, n);
    t = lap(w, TSAD_ENCODE, t);
    for (int i = 0; i < n; i++) {
        tsad_lane *lane = w->members[i].lane;
        if (lane->planner == TSAD_PRUNER_PLAN && lane->chunk > 0) {
            tsad_prune(w, lane);
        }
    }
    t = lap(w, TSAD_PRUNE, t);
    for (int i = 0; i < n; i++) {
        tsad_plan(w, w->members[i].lane);
        tsad_sums_choose(w->members[i].lane);
    }
    lap(w, TSAD_PLAN_STAGE, t);
    w->size = size;
}

/* n lanes of the call from `call_row` on; a thread that joined at a step begins with `row` */
static void run_lanes(tsad_worker *w, const tsad_call *call, int call_row, int n, int row)
{
    tsad_policy *p = w->policy;
    const tsad_model *m = p->model;
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    for (int i = 0; i < n; i++) {
        tsad_member *member = &w->members[i];
        member->row = call_row + i;
        member->lane = &p->lanes[call->lanes[call_row + i]];
        member->obs = call->obs + (size_t)(call_row + i) * per_obs;
    }
    if (row == TSAD_BEFORE_ROWS) {
        if (w->rank == 0) {
            prepare(w, n);
        }
        int64_t t = tsad_now();
        if (!tsad_turn(w, row)) {
            return;
        }
        for (int i = 0; i < n; i++) {
            if (w->members[i].lane->sums_use == TSAD_MAKE_SUMS) {
                m->backend->keep(w, w->members[i].lane);
                tsad_worker_meet(w);
            }
        }
        row = 0;
        lap(w, TSAD_DENOISE, t);
    }
    int64_t t = tsad_now();
    tsad_denoise(w, n, call, row);
    lap(w, TSAD_DENOISE, t);
}

static void begin_worker(tsad_worker *w, int rank, int size)
{
    w->rank = rank;
    w->size = size;
    w->epoch = 1;
    w->parity = 0;
    w->turns = 0;
    w->shares = false;
    w->stalled = false;
    w->met_at = 0;
    memset(w->ns, 0, sizeof w->ns);
    memset(w->read_epoch, 0, sizeof(uint32_t) * (size_t)w->policy->model->n_blocks);
    memset(w->write_epoch, 0, sizeof(uint32_t) * (size_t)w->policy->model->n_blocks);
}

/* Lanes to take at once when `left` are left: few at the end of a long call, so that no thread
 * waits long for the last. */
static int gang_size(int left, int size, int most)
{
    int n = left > size * most ? most : (left + 2 * size - 1) / (2 * size);
    n = n > 2 ? n : 2;
    n = n < most ? n : most;
    return n < left ? n : left;
}

/* lanes are spread: gangs, as equal as can be, to whoever is free */
static void work_apart(const job *j, tsad_worker *w, atomic_int *next, int size)
{
    const tsad_call *call = j->call;
    int fair = (call->n_lanes + size - 1) / size, gangs = (fair + TSAD_GANG - 1) / TSAD_GANG;
    int most = (fair + gangs - 1) / gangs;
    for (int row = atomic_load(next), n; row < call->n_lanes;) {
        n = gang_size(call->n_lanes - row, size, most);
        if (atomic_compare_exchange_strong(next, &row, row + n)) {
            run_lanes(w, call, row, n, TSAD_BEFORE_ROWS);
            row = atomic_load(next);
        }
    }
}

/* lanes are shared: one after the other, by all who are there */
static void work_together(const job *j, tsad_worker *w)
{
    int call_row = 0, row = TSAD_BEFORE_ROWS;
    w->shares = true;
    if (w->rank > 0 && !tsad_join(w, &call_row, &row)) {
        return;
    }
    for (; call_row < j->call->n_lanes && w->size > 0; call_row++) {
        run_lanes(w, j->call, call_row, 1, row);
        row = TSAD_BEFORE_ROWS;
    }
    if (w->rank == 0) {
        tsad_meeting_end(j->policy->meeting);
    }
}

static void work(void *context, int rank, int size)
{
    job *j = context;
    tsad_policy *p = j->policy;
    if (size == 1 || j->call->n_lanes >= size) {
        begin_worker(&p->workers[rank], 0, 1);
        work_apart(j, &p->workers[rank], &j->next, size);
        return;
    }
    int place = rank == 0 ? 0 : tsad_arrive(p);
    begin_worker(&p->workers[place], place, place == 0);
    work_together(j, &p->workers[place]);
}

static tsad_status check_finite(const char *name, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return tsad_fail(TSAD_ARGUMENT, "%s: expected finite numbers, got %g at flat index %zu",
                             name, (double)x[i], i);
        }
    }
    return TSAD_OK;
}

static tsad_status check_call(const tsad_policy *p, const tsad_call *call)
{
    const tsad_model *m = p->model;
    if (call->n_lanes < 1 || call->n_lanes > p->n_lanes) {
        return tsad_fail(TSAD_ARGUMENT, "lanes: expected 1 to %d distinct lanes, got %d",
                         p->n_lanes, call->n_lanes);
    }
    for (int i = 0; i < call->n_lanes; i++) {
        if (call->lanes[i] < 0 || call->lanes[i] >= p->n_lanes) {
            return tsad_fail(TSAD_ARGUMENT, "lanes[%d]: expected 0 to %d, got %d", i,
                             p->n_lanes - 1, call->lanes[i]);
        }
    }
    if (!call->noise && (m->adds_noise || !call->initial)) {
        return tsad_fail(TSAD_ARGUMENT, "noise: this sampler needs it");
    }
    size_t n = (size_t)call->n_lanes * (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    return check_finite("obs", call->obs, n);
}

tsad_status tsad_policy_step(tsad_policy *p, const tsad_call *call)
{
    TSAD_TRY(check_call(p, call));
    int64_t start = tsad_now();
    job j = {.policy = p, .call = call};
    for (int i = 0; i < p->n_threads; i++) { /* not every thread need come */
        memset(p->workers[i].ns, 0, sizeof p->workers[i].ns);
    }
    tsad_meeting_begin(p->meeting);
    int size = tsad_team_run(work, &j, tsad_stall_size(p, call->n_lanes));
    bool spread = size > 1 && call->n_lanes >= size;
    if (size > 1 && !spread) {
        tsad_stall_note(p);
    }
    int came = 1;
    for (int i = 1; i < size && spread; i++) {
        came += p->workers[i].ns[TSAD_DENOISE] > 0;
    }
    for (int timer = 0; timer < TSAD_TOTAL; timer++) {
        int64_t sum = 0;
        for (int i = 0; i < (spread ? size : 1); i++) {
            sum += p->workers[i].ns[timer];
        }
        p->ns[timer] = sum / came;
    }
    p->ns[TSAD_TOTAL] = tsad_now() - start;
    return TSAD_OK;
}

/* ---- parts of a chunk ----------------------------------------------------------------------- */

tsad_status tsad_policy_predict_noise(tsad_policy *p, int n, const float *sample, int step,
                                      const float *obs, float *out)
{
    const tsad_model *m = p->model;
    if (step < 0 || step >= m->n_steps) {
        return tsad_fail(TSAD_ARGUMENT, "step: expected 0 to %d, got %d", m->n_steps - 1, step);
    }
    size_t T = (size_t)m->horizon, A = (size_t)m->action_dim, ld = (size_t)tsad_pad(m->action_dim);
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    TSAD_TRY(check_finite("obs", obs, (size_t)n * per_obs));
    tsad_worker *w = &p->workers[0];
    float **registers = w->members->registers;
    begin_worker(w, 0, 1);
    w->members->lane = &p->lanes[p->n_lanes];
    tsad_run run = {
        .net = &m->net, .program = &p->dense, .registers = registers, .lane = w->members->lane};
    for (int i = 0; i < n; i++) {
        w->members->obs = obs + (size_t)i * per_obs;
        tsad_encode(w, 1);
        const float *x = sample + (size_t)i * T * A;
        for (size_t t = 0; t < T; t++) {
            memcpy(registers[m->net.input] + t * ld, x + t * A, sizeof(float) * A);
        }
        m->backend->run(w, &run, 1, step, step + 1);
        for (size_t t = 0; t < T; t++) {
            memcpy(out + ((size_t)i * T + t) * A, registers[m->net.output] + t * ld,
                   sizeof(float) * A);
        }
    }
    return TSAD_OK;
}

tsad_status tsad_policy_pruner_scores(tsad_policy *p, const float *obs, float *out)
{
    const tsad_model *m = p->model;
    if (!m->has_pruner) {
        return tsad_fail(TSAD_ARGUMENT, "this policy has no pruner");
    }
    TSAD_TRY(check_finite("obs", obs, (size_t)m->n_obs_steps * (size_t)m->obs_dim));
    tsad_worker *w = &p->workers[0];
    tsad_lane *lane = &p->lanes[p->n_lanes];
    begin_worker(w, 0, 1);
    w->members->lane = lane;
    w->members->obs = obs;
    tsad_encode(w, 1);
    tsad_prune(w, lane);
    size_t row = (size_t)m->n_blocks * 4;
    for (int k = 0; k < m->n_steps; k++) {
        memcpy(out + (size_t)k * row, lane->scores + (size_t)(m->n_steps - 1 - k) * row,
               sizeof(float) * row);
    }
    return TSAD_OK;
}
