/* chunk.c: a call of a policy: encode, prune, plan, denoise, for gangs of lanes. */
#include "clock.h"
#include "stage/stage.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
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

/* memory of a lane -> scores that can be compared */
static tsad_status prune(const tsad_policy *p, tsad_queue *queue, int lane, float *scores)
{
    size_t n = (size_t)p->model->n_steps * (size_t)p->model->n_blocks * 4;
    TSAD_TRY(tsad_prune(p, queue, lane, scores));
    return tsad_first_beyond(scores, n, FLT_MAX) < n ? TSAD_NOT_FINITE : TSAD_OK;
}

static tsad_status encode(const tsad_gang *g)
{
    const tsad_model *m = g->policy->model;
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    int lanes[TSAD_GANG];
    const float *obs[TSAD_GANG];
    for (int i = 0; i < g->n; i++) {
        lanes[i] = tsad_gang_index(g, i);
        obs[i] = g->call->obs + (size_t)g->rows[i] * per_obs;
    }
    return tsad_encode(g->policy, g->queue, g->steps, g->n, lanes, obs,
                       g->call->obs_there ? g->call->obs : NULL);
}

static tsad_status run_stages(const tsad_gang *g)
{
    tsad_policy *p = g->policy;
    tsad_desk *desk = g->desk;
    int64_t t = tsad_now();
    TSAD_TRY(encode(g));
    t = lap(desk, TSAD_ENCODE, t);
    for (int i = 0; i < g->n; i++) {
        tsad_lane *lane = tsad_gang_lane(g, i);
        if (lane->planner == TSAD_PRUNER_PLAN && lane->chunk > 0) {
            tsad_status status = prune(p, g->queue, tsad_gang_index(g, i), desk->scores);
            lane->overflow = status == TSAD_NOT_FINITE ? "pruner's scores" : NULL;
            TSAD_TRY(status);
            t = lap(desk, TSAD_PRUNE, t);
        }
        tsad_plan(p, desk, lane);
        tsad_sums_choose(lane);
        t = lap(desk, TSAD_PLAN_STAGE, t);
    }
    tsad_status status = tsad_denoise(g);
    lap(desk, TSAD_DENOISE, t);
    return status;
}

static tsad_status run_gang(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const job *j = context;
    tsad_policy *p = j->policy;
    tsad_gang g = {.policy = p, .call = j->call, .queue = queue, .desk = &p->desks[rank]};
    for (int at = first; at < first + n; at += g.n) {
        g.rows = p->rows + at;
        g.steps = tsad_lane_steps(p, &p->lanes[j->call->lanes[g.rows[0]]]);
        g.n = 1;
        while (at + g.n < first + n && tsad_lane_steps(p, tsad_gang_lane(&g, g.n)) == g.steps) {
            g.n++;
        }
        g.deferred = j->call->deferred && at + g.n == j->call->n_lanes;
        TSAD_TRY(run_stages(&g));
        if (g.deferred) {
            p->n_deferred = g.n;
        }
    }
    return TSAD_OK;
}

/* ---- what is refused ------------------------------------------------------------------------- */

/* number i of observations as the network sees it */
static float normalised(const tsad_model *m, float raw, size_t i)
{
    size_t j = i % (size_t)m->obs_dim;
    float x = m->obs_shift ? raw - m->obs_shift[j] : raw;
    return x * m->obs_scale[j] + m->obs_offset[j];
}

static tsad_status refuse_obs(const tsad_model *m, float raw, size_t i)
{
    size_t O = (size_t)m->obs_dim, step = i / O;
    return tsad_fail(TSAD_ARGUMENT,
                     "obs: expected magnitudes up to %g after normalising, got %g (raw %g) "
                     "at row %zu, observation step %zu, element %zu; the network can't "
                     "represent that, check where it is from",
                     (double)TSAD_MAX_MAGNITUDE, (double)normalised(m, raw, i), (double)raw,
                     step / (size_t)m->n_obs_steps, step % (size_t)m->n_obs_steps, i % O);
}

/* n rows of observations */
static tsad_status check_obs(const tsad_model *m, const float *obs, int n)
{
    size_t numbers = (size_t)n * (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    for (size_t i = 0; i < numbers; i++) {
        if (!(fabsf(normalised(m, obs[i], i)) <= TSAD_MAX_MAGNITUDE)) {
            return refuse_obs(m, obs[i], i);
        }
    }
    return TSAD_OK;
}

/* number `at` of a sample (T, A) of denoising step k and row i */
static tsad_status refuse_sample(const tsad_model *m, const char *name, float x, int k, int i,
                                 size_t at)
{
    size_t A = (size_t)m->action_dim;
    return tsad_fail(TSAD_ARGUMENT,
                     "%s: expected magnitudes up to %g, got %g at denoising step %d, row %d, "
                     "action %zu, element %zu; the network can't represent that, check where it "
                     "is from",
                     name, (double)TSAD_MAX_MAGNITUDE, (double)x, k, i, at / A, at % A);
}

static tsad_status check_sample(const tsad_model *m, const char *name, const float *x, int k, int i)
{
    size_t n = (size_t)m->horizon * (size_t)m->action_dim;
    size_t at = tsad_first_beyond(x, n, TSAD_MAX_MAGNITUDE);
    return at == n ? TSAD_OK : refuse_sample(m, name, x[at], k, i, at);
}

/* what row i of a call reads of its noise */
static tsad_status check_noise(const tsad_policy *p, const tsad_call *call, int i)
{
    const tsad_model *m = p->model;
    size_t row = (size_t)m->horizon * (size_t)m->action_dim;
    int first, n = tsad_policy_noise_steps(p, call->lanes[i], &first);
    const float *noise = call->noise ? call->noise + (size_t)i * call->noise_lane : NULL;
    const float *initial = call->initial ? call->initial + (size_t)i * row
                           : noise       ? noise + (size_t)first * call->noise_step
                                         : NULL;
    if (initial && !call->noise_there) {
        TSAD_TRY(check_sample(m, "noise", initial, first, i));
    }
    bool here = noise && (call->initial || !call->noise_there);
    for (int k = first + 1; here && k < first + n; k++) {
        TSAD_TRY(check_sample(m, "noise", noise + (size_t)k * call->noise_step, k, i));
    }
    return TSAD_OK;
}

static tsad_status check_streams(const tsad_policy *p, const tsad_call *call)
{
    for (int i = 0; i < call->n_streams; i++) {
        const char *unfit = p->model->backend->unfit(call->streams[i]);
        if (unfit) {
            return tsad_fail(TSAD_BACKEND,
                             "the caller's stream: expected one that takes work now, "
                             "got one that does not: %s; call the policy outside of "
                             "the capture",
                             unfit);
        }
    }
    return TSAD_OK;
}

static tsad_status follow_streams(const tsad_policy *p, const tsad_call *call)
{
    for (int i = 0; i < call->n_streams; i++) {
        TSAD_TRY(p->model->backend->follow(p->engine, call->streams[i]));
    }
    return TSAD_OK;
}

tsad_status tsad_policy_check(const tsad_policy *p, const tsad_call *call)
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
    TSAD_TRY(check_streams(p, call));
    TSAD_TRY(call->obs_there ? TSAD_OK : check_obs(m, call->obs, call->n_lanes));
    for (int i = 0; i < call->n_lanes; i++) {
        if (call->executed && (call->executed[i] < 0 || call->executed[i] > m->horizon)) {
            return tsad_fail(TSAD_ARGUMENT, "executed[%d]: expected 0 to %d (horizon), got %d", i,
                             m->horizon, call->executed[i]);
        }
        TSAD_TRY(check_noise(p, call, i));
    }
    return TSAD_OK;
}

/* ---- a call ---------------------------------------------------------------------------------- */

/* The farthest that the sampler lets an action be, where it clips. */
static float within_clip(const tsad_policy *p, int a, float raw)
{
    const tsad_model *m = p->model;
    const float *last = p->own.sampler + (size_t)(p->own.n - 1) * TSAD_SAMPLER_COLUMNS;
    float r = last[TSAD_SAMPLER_CLIP], shift = m->action_shift ? m->action_shift[a] : 0;
    float one = (-r - m->action_offset[a]) / m->action_scale[a] + shift;
    float other = (r - m->action_offset[a]) / m->action_scale[a] + shift;
    float x = fminf(fmaxf(raw, fminf(one, other)), fmaxf(one, other));
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

/* Action t of a row's chunk as it is to be executed, its element a: see tsad_policy_set_lead. */
static float executed_action(const tsad_policy *p, const tsad_call *call, int row, int t, int a)
{
    int T = p->model->horizon, A = p->model->action_dim;
    const float *chunk = p->actions + ((size_t)row * (size_t)T + (size_t)t) * (size_t)A;
    float x = chunk[a];
    if (p->smoothing && t > 0 && t + 1 < T) {
        x = 0.25f * chunk[a - A] + 0.5f * x + 0.25f * chunk[a + A];
    }
    if (p->lead == 0 || !p->lanes[call->lanes[row]].has_previous) {
        return x;
    }
    return within_clip(p, a, x + p->lead * (x - tsad_expected(p, call, row, t)[a]));
}

static void deliver(const tsad_policy *p, const tsad_call *call)
{
    const tsad_model *m = p->model;
    int A = m->action_dim, first = call->whole_horizon ? 0 : m->n_obs_steps - 1;
    int rows = call->whole_horizon ? m->horizon : m->n_action_steps;
    bool moved = !call->whole_horizon && (p->smoothing || p->lead != 0);
    size_t all = (size_t)m->horizon * (size_t)A, n = (size_t)rows * (size_t)A;
    for (int i = 0; i < call->n_lanes && !call->actions_there; i++) {
        float *actions = call->actions + (size_t)i * n;
        memcpy(actions, p->actions + (size_t)i * all + first * A, sizeof(float) * n);
        for (int j = 0; moved && j < rows * A; j++) {
            actions[j] = executed_action(p, call, i, first + j / A, j % A);
        }
    }
}

/* see tsad_policy_set_correction */
static void correct_chunks(tsad_policy *p, const tsad_call *call)
{
    int T = p->model->horizon, A = p->model->action_dim;
    for (int row = 0; row < call->n_lanes && p->corrected; row++) {
        float *chunk = p->actions + (size_t)row * (size_t)T * (size_t)A;
        if (p->lanes[call->lanes[row]].cold) {
            continue;
        }
        for (int i = 0; i < T * A; i++) {
            int t = i / A, a = i % A;
            float move = p->warm_start ? chunk[i] - tsad_expected(p, call, row, t)[a] : 0;
            chunk[i] = within_clip(p, a, chunk[i] + p->gain[i] * move + p->shift[i]);
        }
    }
}

/* what the lanes' next chunks start from, or are compared with */
static void keep_chunks(tsad_policy *p, const tsad_call *call)
{
    size_t all = (size_t)p->model->horizon * (size_t)p->model->action_dim;
    for (int row = 0; row < call->n_lanes && (p->warm_start || p->lead != 0); row++) {
        tsad_lane *lane = &p->lanes[call->lanes[row]];
        lane->cold = false;
        lane->has_previous = true;
        memcpy(lane->previous, p->actions + (size_t)row * all, sizeof(float) * all);
    }
}

/* rows of a call, those of cold lanes first, so that gangs are of one kind */
static void order_rows(tsad_policy *p, const tsad_call *call)
{
    int n = 0;
    for (int kind = 1; kind >= 0; kind--) {
        for (int i = 0; i < call->n_lanes; i++) {
            if (p->lanes[call->lanes[i]].cold == kind) {
                p->rows[n++] = i;
            }
        }
    }
}

/* Which of a call's numbers the device has refused, in the words of those on the host. A chunk's
 * noise, or, from `step` on, samples for the network alone (-1: there are none). */
static tsad_status refuse_given(const tsad_policy *p, const tsad_call *call, tsad_given given,
                                size_t index, float raw, int step)
{
    const tsad_model *m = p->model;
    size_t L = (size_t)call->n_lanes, T = (size_t)m->horizon, A = (size_t)m->action_dim;
    size_t To = (size_t)m->n_obs_steps, O = (size_t)m->obs_dim, k = index / (L * T * A);
    const char *got = isnan(raw) ? "nan" : raw < 0 ? "-inf" : "inf";
    const char *noise = step < 0 ? "noise" : "sample";
    const char *name = given == TSAD_GIVEN_OBS ? "obs" : noise;
    char at[96];
    int row = (int)(index / (T * A) % L), first = step, n = 0;
    if (isfinite(raw)) {
        if (given == TSAD_GIVEN_OBS) {
            return refuse_obs(m, raw, index);
        }
        if (step < 0 && call->initial) {
            tsad_policy_noise_steps(p, call->lanes[row], &first);
        }
        return refuse_sample(m, name, raw, call->initial ? first : (int)k, row, index % (T * A));
    }
    if (given == TSAD_GIVEN_OBS && !call->bare) {
        n = snprintf(at, sizeof at, "%zu, ", index / (To * O));
    } else if (given != TSAD_GIVEN_OBS && !call->initial) {
        n = snprintf(at, sizeof at, "%zu, ", k);
    }
    if (given == TSAD_GIVEN_OBS) {
        snprintf(at + n, sizeof at - (size_t)n, "%zu, %zu", index / O % To, index % O);
    } else {
        snprintf(at + n, sizeof at - (size_t)n, "%d, %zu, %zu", row, index / A % T, index % A);
    }
    return tsad_fail(TSAD_ARGUMENT,
                     "%s: expected finite numbers, got %s at %s[%s]; check where it comes from",
                     name, got, name, at);
}

static tsad_status check_there(const tsad_policy *p, const tsad_call *call, int step)
{
    const bool there[TSAD_N_GIVEN] = {call->obs_there, call->noise_there};
    tsad_status status = TSAD_OK;
    for (int i = 0; i < TSAD_N_GIVEN; i++) {
        size_t index;
        float raw;
        if (there[i] && p->model->backend->fault(p->engine, i, &index, &raw) && status == TSAD_OK) {
            status = refuse_given(p, call, i, index, raw, step);
        }
    }
    return status;
}

/* Nobody has seen the actions that any of its lanes would go on from, so all of them are reset. */
static tsad_status abandon(tsad_policy *p, const tsad_call *call, tsad_status status)
{
    const char *then = call == &p->deferred
                           ? "this is of the call before, whose `out` is not to be used "
                             "and whose lanes start anew, as after reset()"
                           : "nothing is returned, and the lanes of this call start "
                             "anew, as after reset()";
    int failed = -1;
    for (int i = 0; i < call->n_lanes; i++) {
        int lane = call->lanes[i];
        failed = failed < 0 && p->lanes[lane].overflow ? lane : failed;
        tsad_policy_reset(p, lane);
    }
    if (status == TSAD_INTERRUPTED) {
        return tsad_fail(status, "the call was interrupted: nothing is returned, and its lanes "
                                 "start anew, as after reset()");
    }
    if (status == TSAD_BACKEND || status == TSAD_ARGUMENT) {
        char why[384];
        snprintf(why, sizeof why, "%s", tsad_error_detail());
        return tsad_fail(status, "%s; %s", why, then);
    }
    return status != TSAD_NOT_FINITE
               ? status
               : tsad_fail(status,
                           "lane %d: the %s are not finite: the network overflowed on this "
                           "observation and noise, check them and the weights; %s",
                           failed, p->lanes[failed].overflow, then);
}

/* What is left to do when all of a call's lanes are done. */
static tsad_status end(tsad_policy *p, const tsad_call *call, tsad_status status)
{
    tsad_status given = check_there(p, call, -1);
    if (status == TSAD_OK || status == TSAD_NOT_FINITE) { /* of numbers that were refused */
        status = given != TSAD_OK ? given : status;
    }
    if (status != TSAD_OK) {
        return abandon(p, call, status);
    }
    correct_chunks(p, call);
    deliver(p, call);
    keep_chunks(p, call);
    return TSAD_OK;
}

static tsad_status emit_deferred(void *context, tsad_queue *queue, int rank, int first, int n)
{
    tsad_policy *p = context;
    tsad_gang g = {.policy = p, .call = &p->deferred, .queue = queue, .desk = &p->desks[rank]};
    g.rows = p->rows + p->deferred.n_lanes - n;
    g.n = n;
    (void)first;
    return tsad_emit(&g);
}

tsad_status tsad_policy_settle(tsad_policy *p)
{
    int queues, n = p->n_deferred;
    if (n == 0) {
        return TSAD_OK;
    }
    p->n_deferred = 0;
    return end(p, &p->deferred,
               p->model->backend->each(p->engine, n, true, emit_deferred, p, NULL, &queues));
}

/* The call's memory is the caller's: what ends it has its own. Where a stream can't be told to come
 * after the chunk, the host waits for it. */
static tsad_status defer(tsad_policy *p, const tsad_call *call)
{
    memcpy(p->deferred_lanes, call->lanes, sizeof(int) * (size_t)call->n_lanes);
    p->deferred = *call;
    p->deferred.lanes = p->deferred_lanes;
    if (call->executed) {
        memcpy(p->deferred_executed, call->executed, sizeof(int) * (size_t)call->n_lanes);
        p->deferred.executed = p->deferred_executed;
    }
    for (int i = 0; i < call->n_streams; i++) {
        if (p->model->backend->precede(p->engine, call->streams[i]) != TSAD_OK) {
            return tsad_policy_settle(p);
        }
    }
    return TSAD_OK;
}

tsad_status tsad_policy_step(tsad_policy *p, const tsad_call *call)
{
    TSAD_TRY(tsad_policy_check(p, call));
    for (int i = 0, first; i < call->n_lanes; i++) {
        if (!call->noise &&
            (!call->initial || tsad_policy_noise_steps(p, call->lanes[i], &first) > 1)) {
            return tsad_fail(TSAD_ARGUMENT, "noise: this sampler needs it");
        }
    }
    int64_t start = tsad_now();
    job j = {.policy = p, .call = call};
    for (int i = 0; i < p->n_threads; i++) { /* not every thread need come */
        memset(p->desks[i].ns, 0, sizeof p->desks[i].ns);
    }
    for (int i = 0; i < call->n_lanes; i++) {
        p->lanes[call->lanes[i]].overflow = NULL;
    }
    TSAD_TRY(follow_streams(p, call));
    order_rows(p, call);
    int queues = 1, came = 0;
    tsad_status status = p->model->backend->each(p->engine, call->n_lanes, false, run_gang, &j,
                                                 call->interrupt, &queues);
    status = call->deferred && status == TSAD_OK ? defer(p, call) : end(p, call, status);
    TSAD_TRY(status);
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
    const tsad_call *call;
    int step;
} alone;

static tsad_status predict_one(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const alone *a = context;
    const tsad_policy *p = a->policy;
    const tsad_call *call = a->call;
    const tsad_model *m = p->model;
    const tsad_net *net = tsad_denoiser(m);
    size_t floats = (size_t)m->horizon * (size_t)m->action_dim;
    size_t per_obs = (size_t)m->n_obs_steps * (size_t)m->obs_dim;
    int lane = p->n_lanes;
    (void)rank;
    for (int i = first; i < first + n; i++) {
        tsad_run run = {.lane = lane, .part = TSAD_DENOISER, .program = &p->dense};
        tsad_rows sample = {.data = (float *)call->initial + (size_t)i * floats,
                            .rows = m->horizon,
                            .channels = m->action_dim,
                            .stride = m->action_dim,
                            .there = call->noise_there,
                            .given = TSAD_GIVEN_NOISE,
                            .index = (size_t)i * floats};
        tsad_rows out = {.data = call->actions + (size_t)i * floats,
                         .rows = m->horizon,
                         .channels = m->action_dim,
                         .stride = m->action_dim};
        const float *obs = call->obs + (size_t)i * per_obs;
        TSAD_TRY(
            tsad_encode(p, queue, &p->all, 1, &lane, &obs, call->obs_there ? call->obs : NULL));
        TSAD_TRY(m->backend->put(queue, 0, TSAD_DENOISER, net->input, sample));
        TSAD_TRY(m->backend->run(queue, &run, 1, a->step, a->step + 1));
        TSAD_TRY(m->backend->get(queue, 0, TSAD_DENOISER, net->output, out));
        if (tsad_first_beyond(out.data, floats, FLT_MAX) < floats) {
            return tsad_fail(TSAD_NOT_FINITE,
                             "row %d: the network overflowed on this sample and observation; "
                             "check them and the weights",
                             i);
        }
    }
    return TSAD_OK;
}

tsad_status tsad_policy_predict_noise(tsad_policy *p, const tsad_call *call, int step)
{
    const tsad_model *m = p->model;
    int queues, n = call->n_lanes;
    if (step < 0 || step >= p->own.n) {
        return tsad_fail(TSAD_ARGUMENT, "step: expected 0 to %d, got %d", p->own.n - 1, step);
    }
    TSAD_TRY(check_streams(p, call));
    TSAD_TRY(call->obs_there ? TSAD_OK : check_obs(m, call->obs, n));
    for (int i = 0; i < n && !call->noise_there; i++) {
        const float *x = call->initial + (size_t)i * (size_t)m->horizon * (size_t)m->action_dim;
        TSAD_TRY(check_sample(m, "sample", x, step, i));
    }
    alone a = {.policy = p, .call = call, .step = step + p->own.first};
    if (!n) {
        return TSAD_OK;
    }
    TSAD_TRY(follow_streams(p, call));
    tsad_status status =
        m->backend->each(p->engine, n, true, predict_one, &a, call->interrupt, &queues);
    tsad_status given = check_there(p, call, step); /* of numbers that were refused */
    if (status == TSAD_INTERRUPTED) {
        return tsad_fail(status, "the call was interrupted: nothing is returned");
    }
    return given != TSAD_OK ? given : status;
}

static tsad_status score_one(void *context, tsad_queue *queue, int rank, int first, int n)
{
    const alone *a = context;
    const tsad_policy *p = a->policy;
    int lane = p->n_lanes;
    (void)first, (void)n;
    TSAD_TRY(tsad_encode(p, queue, &p->all, 1, &lane, &a->call->obs, NULL));
    tsad_status status = prune(p, queue, lane, p->desks[rank].scores);
    return status != TSAD_NOT_FINITE
               ? status
               : tsad_fail(status, "the pruner overflowed on this observation; check it and the "
                                   "weights");
}

tsad_status tsad_policy_pruner_scores(tsad_policy *p, const float *obs, float *out)
{
    const tsad_model *m = p->model;
    if (!tsad_has_pruner(p)) {
        return tsad_fail(TSAD_ARGUMENT, "this policy has no pruner");
    }
    TSAD_TRY(check_obs(m, obs, 1));
    const tsad_call call = {.obs = obs};
    alone a = {.policy = p, .call = &call};
    int queues;
    TSAD_TRY(m->backend->each(p->engine, 1, true, score_one, &a, NULL, &queues));
    size_t row = (size_t)m->n_blocks * 4;
    for (int k = 0; k < m->n_steps; k++) {
        memcpy(out + (size_t)k * row, p->desks[0].scores + (size_t)(m->n_steps - 1 - k) * row,
               sizeof(float) * row);
    }
    return TSAD_OK;
}
