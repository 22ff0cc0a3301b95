/* chunk.c: a call of a policy: encode, prune, plan, denoise, for gangs of lanes. */
#include "clock.h"
#include "stage/stage.h"

#include <math.h>
#include <string.h>

/* ---- the stages of a gang ------------------------------------------------------------------- */

typedef struct job {
    tsad_policy *policy;
    const tsad_call *call;
} job;

static int64_t lap(tsad_desk *desk, int timer, int64_t since)
{
    int64_t now = tsad_now();
    desk->ns[timer] += now - since;
    return now;
}

static tsad_status run_gang(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const job *j = context;
    tsad_policy *p = j->policy;
    const tsad_model *m = p->model;
    tsad_desk *desk = &p->desks[rank];
    tsad_gang g = {
        .policy = p, .call = j->call, .queue = queue, .desk = desk, .row = first, .n = n};
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    int64_t t = tsad_now();
    TSAD_TRY(
        tsad_encode(p, queue, n, j->call->lanes + first, j->call->obs + (size_t)first * per_obs));
    t = lap(desk, TSAD_ENCODE, t);
    for (int i = 0; i < n; i++) {
        tsad_lane *lane = tsad_gang_lane(&g, i);
        if (lane->planner == TSAD_PRUNER_PLAN && lane->chunk > 0) {
            TSAD_TRY(tsad_prune(p, queue, tsad_gang_index(&g, i), desk->scores));
            t = lap(desk, TSAD_PRUNE, t);
        }
        tsad_plan(p, desk, lane);
        tsad_sums_choose(lane);
        t = lap(desk, TSAD_PLAN_STAGE, t);
    }
    tsad_status status = tsad_denoise(&g);
    lap(desk, TSAD_DENOISE, t);
    return status;
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
        memset(p->desks[i].ns, 0, sizeof p->desks[i].ns);
    }
    int queues = 1, came = 0;
    TSAD_TRY(p->model->backend->each(p->engine, call->n_lanes, false, run_gang, &j, &queues));
    for (int i = 0; i < queues; i++) {
        came += p->desks[i].ns[TSAD_DENOISE] > 0;
    }
    for (int timer = 0; timer < TSAD_TOTAL; timer++) {
        int64_t sum = 0;
        for (int i = 0; i < queues; i++) {
            sum += p->desks[i].ns[timer];
        }
        p->ns[timer] = sum / (came ? came : 1);
    }
    p->ns[TSAD_TOTAL] = tsad_now() - start;
    return TSAD_OK;
}

/* ---- parts of a chunk ----------------------------------------------------------------------- */

/* the network alone, on the lane that no caller has */
typedef struct alone {
    const tsad_policy *policy;
    const float *sample, *obs;
    int step;
    float *out;
} alone;

static tsad_status predict_one(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const alone *a = context;
    const tsad_policy *p = a->policy;
    const tsad_model *m = p->model;
    const tsad_net *net = tsad_denoiser(m);
    size_t floats = (size_t)m->horizon * (size_t)m->action_dim;
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    int lane = p->n_lanes;
    (void)rank;
    for (int i = first; i < first + n; i++) {
        tsad_run run = {.lane = lane, .part = TSAD_DENOISER, .program = &p->dense};
        tsad_rows rows = {.data = (float *)a->sample + (size_t)i * floats,
                          .rows = m->horizon,
                          .channels = m->action_dim,
                          .stride = m->action_dim};
        TSAD_TRY(tsad_encode(p, queue, 1, &lane, a->obs + (size_t)i * per_obs));
        TSAD_TRY(m->backend->put(queue, 0, TSAD_DENOISER, net->input, rows));
        TSAD_TRY(m->backend->run(queue, &run, 1, a->step, a->step + 1));
        rows.data = a->out + (size_t)i * floats;
        TSAD_TRY(m->backend->get(queue, 0, TSAD_DENOISER, net->output, rows));
    }
    return TSAD_OK;
}

tsad_status tsad_policy_predict_noise(tsad_policy *p, int n, const float *sample, int step,
                                      const float *obs, float *out)
{
    const tsad_model *m = p->model;
    if (step < 0 || step >= m->n_steps) {
        return tsad_fail(TSAD_ARGUMENT, "step: expected 0 to %d, got %d", m->n_steps - 1, step);
    }
    TSAD_TRY(check_finite("obs", obs, (size_t)n * (size_t)m->n_obs_steps * (size_t)m->obs_dim));
    alone a = {.policy = p, .sample = sample, .obs = obs, .step = step, .out = out};
    int queues;
    return n ? m->backend->each(p->engine, n, true, predict_one, &a, &queues) : TSAD_OK;
}

static tsad_status score_one(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const alone *a = context;
    const tsad_policy *p = a->policy;
    int lane = p->n_lanes;
    (void)first, (void)n;
    TSAD_TRY(tsad_encode(p, queue, 1, &lane, a->obs));
    return tsad_prune(p, queue, lane, p->desks[rank].scores);
}

tsad_status tsad_policy_pruner_scores(tsad_policy *p, const float *obs, float *out)
{
    const tsad_model *m = p->model;
    if (!m->has_pruner) {
        return tsad_fail(TSAD_ARGUMENT, "this policy has no pruner");
    }
    TSAD_TRY(check_finite("obs", obs, (size_t)m->n_obs_steps * (size_t)m->obs_dim));
    alone a = {.policy = p, .obs = obs};
    int queues;
    TSAD_TRY(m->backend->each(p->engine, 1, true, score_one, &a, &queues));
    size_t row = (size_t)m->n_blocks * 4;
    for (int k = 0; k < m->n_steps; k++) {
        memcpy(out + (size_t)k * row, p->desks[0].scores + (size_t)(m->n_steps - 1 - k) * row,
               sizeof(float) * row);
    }
    return TSAD_OK;
}
