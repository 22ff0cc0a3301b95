/* cpu.c: the paths compiled in, best first. A path that this CPU lacks is never chosen. */
#include "cpu.h"

const tsad_backend *const tsad_backends[] = {
    &tsad_cpu_ref.base,
    NULL,
};
