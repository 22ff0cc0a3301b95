/* caller.c: arrays of a caller in memory of the device, read and written there: what they hold is
 * ready on a stream of the caller's, which the engine's own follows, and goes on after it.
 */
#include "cuda.h"

#include <string.h>

const char *tsad_cuda_unfit(uintptr_t stream) { return tsad_stream_unfit(stream); }

tsad_status tsad_cuda_follow(tsad_engine *e, uintptr_t stream)
{
    e->waits = true;
    return tsad_stream_follow(e->stream, stream);
}

tsad_status tsad_cuda_precede(tsad_engine *e, uintptr_t stream)
{
    return tsad_stream_precede(e->stream, stream);
}

/* n floats of the host there, with what goes next */
static const float *stage(tsad_engine *e, float *there, const float *from, size_t n)
{
    memcpy(tsad_cuda_stage(e, there, sizeof(float) * n), from, sizeof(float) * n);
    return there;
}

/* What was staged goes first: its one piece may have these bytes in its middle. */
void tsad_cuda_take(tsad_engine *e, int place, float *to, int ld, const tsad_rows *from)
{
    const float *const *affine = tsad_cuda_of(e->model)->obs;
    tsad_taking p = {.x = from->data,
                     .ldx = (size_t)from->stride,
                     .rows = from->rows,
                     .channels = from->channels,
                     .limit = TSAD_MAX_MAGNITUDE,
                     .y = to,
                     .ldy = ld,
                     .index = from->index,
                     .fault = &e->fault[from->given]};
    if (from->scale) {
        p.scale = affine[0];
        p.offset = affine[1];
        p.shift = from->shift ? affine[2] : NULL;
    }
    if (from->base) {
        size_t floats = (size_t)from->rows * (size_t)from->channels;
        p.base = stage(e, e->place[place].begins, from->base, floats);
        p.share = from->share;
    }
    tsad_cuda_upload(e);
    tsad_launch_take(e->stream, p);
    e->waits = true;
}

static void finish(tsad_engine *e, int place, const tsad_finish *from, tsad_hand_over *p)
{
    float *there = e->place[place].finish;
    size_t n = (size_t)p->rows * (size_t)p->channels;
    p->clip = from->clip;
    p->lead = from->lead;
    p->smooths = from->smoothing;
    if (from->expected) {
        p->expected = stage(e, there, from->expected, n);
        p->gain = from->gain ? stage(e, there + n, from->gain, n) : NULL;
    }
    if (from->shift) {
        p->move = stage(e, there + 2 * n, from->shift, n);
    }
    tsad_cuda_upload(e);
}

tsad_status tsad_cuda_hand_over(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to,
                                const tsad_finish *how)
{
    tsad_engine *e = queue->engine;
    const tsad_register *r = &e->model->nets[part].registers[reg];
    const float *const *affine = tsad_cuda_of(e->model)->action;
    tsad_hand_over p = {.x = e->place[place].registers[part][reg],
                        .ldx = tsad_pad(r->channels),
                        .rows = r->tokens,
                        .channels = r->channels,
                        .first = to.first,
                        .n = to.rows,
                        .y = to.data};
    if (to.scale) {
        p.scale = affine[0];
        p.offset = affine[1];
        p.shift = to.shift ? affine[2] : NULL;
    }
    if (how) {
        finish(e, place, how, &p);
    }
    tsad_launch_hand_over(e->stream, p);
    e->waits = true;
    return TSAD_OK;
}

bool tsad_cuda_fault(tsad_engine *e, tsad_given given, size_t *index, float *raw)
{
    unsigned long long found = e->fault[given];
    uint32_t bits = (uint32_t)found;
    e->fault[given] = ~0ull;
    *index = (size_t)(found >> 32);
    memcpy(raw, &bits, sizeof *raw);
    return found != ~0ull;
}
