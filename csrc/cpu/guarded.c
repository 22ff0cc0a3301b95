/* guarded.c: a backend for tests: plain C on one thread, in memory that nobody may touch between
 * its entry points, as if it were a device's. A stage, or anything else above a backend, that reads
 * or writes there ends the process; so does one that looks into a queue.
 */
#include "cpu.h"

#include <sys/mman.h>

enum { PAGE = 4096 };

/* what this backend calls a queue */
typedef struct guard {
    tsad_engine *engine;
} guard;

static void protect(const tsad_arena *arena, int access)
{
    if (arena->base) {
        mprotect(arena->base, (arena->size + PAGE - 1) / PAGE * PAGE, access);
    }
}

static void unlock(const tsad_engine *e)
{
    protect(&e->arena, PROT_READ | PROT_WRITE);
    protect(&e->slot_arena, PROT_READ | PROT_WRITE);
    for (int i = 0; e->lanes && i <= e->n_lanes; i++) {
        protect(&e->lanes[i].sum_arena, PROT_READ | PROT_WRITE);
    }
}

static void lock(const tsad_engine *e)
{
    for (int i = 0; e->lanes && i <= e->n_lanes; i++) {
        protect(&e->lanes[i].sum_arena, PROT_NONE);
    }
    protect(&e->slot_arena, PROT_NONE);
    protect(&e->arena, PROT_NONE);
}

static tsad_status guarded_open(const tsad_model *model, int lanes, int threads, tsad_engine **out)
{
    (void)threads;
    tsad_status status = tsad_cpu_open(model, lanes, 1, out);
    if (status == TSAD_OK) {
        lock(*out);
    }
    return status;
}

static void guarded_close(tsad_engine *e)
{
    if (e) {
        unlock(e);
    }
    tsad_cpu_close(e);
}

static size_t guarded_bytes(const tsad_engine *e)
{
    unlock(e);
    size_t bytes = tsad_cpu_bytes(e);
    lock(e);
    return bytes;
}

static tsad_status guarded_remember_rollouts(tsad_engine *e, int rows)
{
    unlock(e);
    tsad_status status = tsad_cpu_remember_rollouts(e, rows);
    lock(e);
    return status;
}

static bool guarded_prepare(tsad_engine *e, int lane, const tsad_program *program)
{
    unlock(e);
    bool room = tsad_cpu_prepare(e, lane, program);
    lock(e);
    return room;
}

static tsad_status nothing(void *context, tsad_queue *queue, int rank, int first, int n)
{
    (void)context, (void)queue, (void)rank, (void)first, (void)n;
    return TSAD_OK;
}

static tsad_status guarded_each(tsad_engine *e, int count, bool alone, tsad_each_fn fn,
                                void *context, const tsad_interrupt *interrupt, int *queues)
{
    guard queue = {e};
    (void)alone;
    unlock(e);
    /* a worker at rest */
    tsad_status status = tsad_cpu_each(e, 1, true, nothing, NULL, interrupt, queues);
    lock(e);
    for (int row = 0; row < count && status == TSAD_OK; row++) {
        status = fn(context, (tsad_queue *)(void *)&queue, 0, row, 1);
    }
    return status;
}

static tsad_engine *enter(tsad_queue *queue)
{
    tsad_engine *e = ((guard *)(void *)queue)->engine;
    unlock(e);
    return e;
}

static tsad_status leave(const tsad_engine *e, tsad_status status)
{
    lock(e);
    return status;
}

static tsad_status guarded_run(tsad_queue *queue, const tsad_run *runs, int n, int begin, int end)
{
    tsad_engine *e = enter(queue);
    return leave(e, tsad_cpu_run(e->workers, runs, n, begin, end));
}

static tsad_status guarded_put(tsad_queue *queue, int place, tsad_part part, int reg,
                               tsad_rows from)
{
    tsad_engine *e = enter(queue);
    return leave(e, tsad_cpu_put(e->workers, place, part, reg, from));
}

static tsad_status guarded_get(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to)
{
    tsad_engine *e = enter(queue);
    return leave(e, tsad_cpu_get(e->workers, place, part, reg, to));
}

static tsad_status guarded_get_array(tsad_queue *queue, int lane, tsad_array which, float *to)
{
    tsad_engine *e = enter(queue);
    return leave(e, tsad_cpu_get_array(e->workers, lane, which, to));
}

static bool always(void) { return true; }

const tsad_cpu_backend tsad_cpu_guarded = {
    .base = {.name = "guarded",
             .usable = always,
             .for_tests = true,
             .rules = true,
             .audits = true,
             .pack = tsad_cpu_pack,
             .unpack = tsad_cpu_unpack,
             .open = guarded_open,
             .close = guarded_close,
             .bytes = guarded_bytes,
             .remember_rollouts = guarded_remember_rollouts,
             .prepare = guarded_prepare,
             .each = guarded_each,
             .run = guarded_run,
             .put = guarded_put,
             .get = guarded_get,
             .get_array = guarded_get_array},
    .kernels = &tsad_ref_kernels,
};
