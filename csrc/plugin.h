/* plugin.h: a backend in a library of its own, loaded at run time, so that the core needs nothing
 * of the hardware that it is for. The library exports one function, `tsad_plugin`. */
#pragma once

#include "backend.h"

/* What a library may call of the core. */
typedef struct tsad_core {
    size_t size; /* tsad_core_size: a library of another version has another */
    tsad_status (*fail)(tsad_status status, const char *format, ...);
    int64_t (*now)(void);
} tsad_core;

static inline size_t tsad_core_size(void)
{
    return sizeof(tsad_core) << 48 ^ sizeof(tsad_backend) << 36 ^ sizeof(struct tsad_model) << 20 ^
           sizeof(tsad_node) << 8 ^ sizeof(tsad_program) << 4 ^ sizeof(tsad_run);
}

/* The backend, the device's name, and why it can't be used here (NULL: it can); NULL: this is not
 * the core that the library was built for. */
typedef const tsad_backend *(*tsad_plugin_fn)(const tsad_core *core, const char **device,
                                              const char **absent);
