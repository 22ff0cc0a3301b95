/* clock.h: the time, for timers and for noticing that a core was taken. */
#pragma once

#include <stdint.h>

int64_t tsad_now(void); /* nanoseconds, monotonic; status.c */
