/* plugin.c: this library's door to the core that loads it (csrc/plugin.c), and the core's few
 * functions that the files here call. */
#include "cuda.h"
#include "clock.h"
#include "plugin.h"

#include <stdarg.h>
#include <stdio.h>

static tsad_core core;

tsad_status tsad_fail(tsad_status status, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return core.fail(status, "%s", text);
}

int64_t tsad_now(void) { return core.now(); }

extern const tsad_backend tsad_cuda_backend;

#define EXPORTED __attribute__((visibility("default")))

EXPORTED tsad_device_counts tsad_plugin_counts(void);
EXPORTED void tsad_plugin_time(int on);
EXPORTED const char *tsad_plugin_identity(void);
EXPORTED const char *tsad_plugin_blas(const char *path);
EXPORTED const char *tsad_plugin_blas_version(void);
EXPORTED int tsad_plugin_blas_major(void);

/* for tsad/device.py */
EXPORTED tsad_device_counts tsad_plugin_counts(void) { return tsad_device_get_counts(); }
EXPORTED void tsad_plugin_time(int on) { tsad_device_time(on != 0); }
EXPORTED const char *tsad_plugin_identity(void) { return tsad_device_identity(); }
EXPORTED const char *tsad_plugin_blas(const char *path) { return tsad_blas_load(path); }
EXPORTED const char *tsad_plugin_blas_version(void) { return tsad_blas_version(); }
EXPORTED int tsad_plugin_blas_major(void) { return tsad_blas_major(); }

/* ---- the backend, on our GPU ---------------------------------------------------------------
 * whichever the caller's thread works with, torch.cuda.set_device(1) say: it has that one again
 * after each call. What is called within `each` needs no more. */

static tsad_status pack(tsad_model *model)
{
    int before = tsad_device_enter();
    tsad_status status = tsad_cuda_backend.pack(model);
    tsad_device_leave(before);
    return status;
}

static void unpack(tsad_model *model)
{
    int before = tsad_device_enter();
    tsad_cuda_backend.unpack(model);
    tsad_device_leave(before);
}

static tsad_status open(const tsad_model *model, int lanes, int threads, tsad_engine **out)
{
    int before = tsad_device_enter();
    tsad_status status = tsad_cuda_backend.open(model, lanes, threads, out);
    tsad_device_leave(before);
    return status;
}

static void close(tsad_engine *engine)
{
    int before = tsad_device_enter();
    tsad_cuda_backend.close(engine);
    tsad_device_leave(before);
}

static tsad_status remember_rollouts(tsad_engine *engine, int rows)
{
    int before = tsad_device_enter();
    tsad_status status = tsad_cuda_backend.remember_rollouts(engine, rows);
    tsad_device_leave(before);
    return status;
}

static tsad_status each(tsad_engine *engine, int count, bool alone, tsad_each_fn fn, void *context,
                        const tsad_interrupt *interrupt, int *queues)
{
    int before = tsad_device_enter();
    tsad_status status =
        tsad_cuda_backend.each(engine, count, alone, fn, context, interrupt, queues);
    tsad_device_leave(before);
    return status;
}

static const char *unfit(uintptr_t stream)
{
    int before = tsad_device_enter();
    const char *why = tsad_cuda_backend.unfit(stream);
    tsad_device_leave(before);
    return why;
}

static tsad_status follow(tsad_engine *engine, uintptr_t stream)
{
    int before = tsad_device_enter();
    tsad_status status = tsad_cuda_backend.follow(engine, stream);
    tsad_device_leave(before);
    return status;
}

static tsad_status precede(tsad_engine *engine, uintptr_t stream)
{
    int before = tsad_device_enter();
    tsad_status status = tsad_cuda_backend.precede(engine, stream);
    tsad_device_leave(before);
    return status;
}

EXPORTED const tsad_backend *tsad_plugin(const tsad_core *host, const char **device,
                                         const char **absent)
{
    if (host->size != tsad_core_size()) {
        return NULL;
    }
    core = *host;
    *absent = tsad_device_absent();
    *device = tsad_device_name();
    static tsad_backend here;
    here = tsad_cuda_backend;
    here.pack = pack;
    here.unpack = unpack;
    here.open = open;
    here.close = close;
    here.remember_rollouts = remember_rollouts;
    here.each = each;
    here.unfit = unfit;
    here.follow = follow;
    here.precede = precede;
    return &here;
}
