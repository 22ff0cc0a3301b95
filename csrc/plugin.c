/* plugin.c: takes in a backend that a library offers. */
#include "clock.h"
#include "plugin.h"

static _Atomic(const tsad_backend *) plugged;

tsad_status tsad_backend_attach(void *plugin, const char **device, const char **absent)
{
    const tsad_core core = {.size = tsad_core_size(), .fail = tsad_fail, .now = tsad_now};
    union {
        void *data;
        tsad_plugin_fn call;
    } symbol = {.data = plugin};
    const tsad_backend *backend = symbol.call(&core, device, absent);
    if (!backend) {
        return tsad_fail(TSAD_ARGUMENT, "it was built for another version of the core");
    }
    atomic_store(&plugged, backend);
    return TSAD_OK;
}

const tsad_backend *tsad_backend_plugged(void) { return atomic_load(&plugged); }
