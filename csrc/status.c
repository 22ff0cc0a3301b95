/* status.c: codes, their texts, and the detail of a thread's last failure. */
#include "base.h"
#include "clock.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

static _Thread_local char detail[512];

const char *tsad_status_text(tsad_status status)
{
    static const char *const texts[] = {
#define X(code, text) [TSAD_##code] = text,
        TSAD_STATUS_LIST(X)
#undef X
    };
    size_t n = sizeof texts / sizeof texts[0];
    return (size_t)status < n ? texts[status] : "unknown status";
}

const char *tsad_error_detail(void) { return detail; }

tsad_status tsad_fail(tsad_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(detail, sizeof detail, format, args);
    va_end(args);
    return status;
}

int64_t tsad_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
