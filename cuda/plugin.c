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

EXPORTED const tsad_backend *tsad_plugin(const tsad_core *host, const char **device,
                                         const char **absent)
{
    if (host->size != tsad_core_size()) {
        return NULL;
    }
    core = *host;
    *absent = tsad_device_absent();
    *device = tsad_device_name();
    return &tsad_cuda_backend;
}
