/* list.h: many launches as one kernel. While a stream lists, what is launched on it is written
 * down, each lane's launches one after the other; then one kernel does them all: for each lane a
 * cluster of blocks that meet after every one of them (list.cu).
 */
#pragma once

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* TSAD_CUDA_ONE_KERNEL: how many blocks do a lane's list; 0: nothing is listed */
enum { TSAD_LIST_BLOCKS = 8 };
tsad_status tsad_list_blocks(int *blocks);

typedef struct tsad_list tsad_list;
tsad_status tsad_list_make(tsad_list **out);
void tsad_list_free(tsad_list *list); /* NULL is fine */

/* From here on what is launched is written down as this lane's, after what it has already. */
void tsad_list_begin(tsad_stream *stream, tsad_list *list);
void tsad_list_lane(tsad_list *list, int lane);
/* Whether one kernel can do it: a block can share as much as it takes, and memory did not run out.
 */
bool tsad_list_end(tsad_stream *stream);

/* So many bytes, which have to be copied to the device before it is launched from there. */
size_t tsad_list_bytes(const tsad_list *list);
const void *tsad_list_items(const tsad_list *list);
void tsad_list_launch(tsad_stream *stream, const tsad_list *list, const void *device, int blocks);

#ifdef __cplusplus
}
#endif
