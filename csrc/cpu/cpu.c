/* cpu.c: the paths compiled in, best first. A path that this CPU lacks is never chosen. */
#include "cpu.h"

const tsad_backend *const tsad_backends[] = {
#if defined(__x86_64__)
#if !defined(TSAD_NO_AVX512)
    &tsad_cpu_avx512.base,
#endif
    &tsad_cpu_avx2.base,
#elif defined(__aarch64__)
    &tsad_cpu_neon.base,
#endif
    &tsad_cpu_ref.base,
    &tsad_cpu_guarded.base, /* never by itself: the one before is always usable */
    NULL,
};
