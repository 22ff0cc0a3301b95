/* list.cu: list.h, and the kernel. Each of its blocks is one team that multiplies, or two for all
 * else, which take the launch's blocks in turn, all teams of a lane side by side. What one launch
 * writes the next may read, so all threads of a lane's cluster meet between them: on one
 * multiprocessor that is a barrier of the block, on several the cluster's, which compute capability
 * 9.0 has. Nothing else is shared between blocks but the device's memory.
 */
#include "list.cuh"
#include "bodies.cuh"
#include "stream.cuh"

#include <stdlib.h>
#include <string.h>

#include <new>

namespace
{

constexpr int LIST_THREADS = 256, ITEM_WORDS = (int)(sizeof(tsad_item) / sizeof(unsigned));
constexpr size_t MOST_SHARED = 96 * 1024; /* a block of any GPU from 8.0 on can ask for that */
static_assert(ITEM_WORDS <= LIST_THREADS, "a thread brings a word");

/* N of a block's threads */
template <int N> struct Part {
    static constexpr int THREADS = N;
    int thread, number;
    __device__ void meet() const { tsad_meet_part(number + 1, N); }
};

/* What each team needs to itself, in floats. */
template <int N> __host__ __device__ constexpr int room_floats()
{
    return N == THREADS ? THREADS / WARP : (int)(sizeof(ProductRoom) / sizeof(float));
}

/* Where the threads of a block are among all that do a launch. */
struct Place {
    int rank, blocks; /* of the cluster */
    float *shared;
};

/* do_block(team, block, room, floats of the launch) for each of the launch's blocks */
template <int N, typename Do>
__device__ void each(const tsad_item &item, const Place &place, const Do &do_block)
{
    Part<N> team = {(int)threadIdx.x % N, (int)threadIdx.x / N};
    float *room = place.shared + team.number * (room_floats<N>() + item.floats);
    unsigned n = item.x * item.y * item.z;
    unsigned step = (unsigned)place.blocks * (LIST_THREADS / N);
    for (unsigned i = (unsigned)(place.rank + place.blocks * team.number); i < n; i += step) {
        dim3 block(i % item.x, i / item.x % item.y, i / (item.x * item.y));
        do_block(team, block, room, room + room_floats<N>());
        team.meet(); /* before the room is the next one's */
    }
}

__device__ void multiply(const tsad_item &item, const Place &place)
{
    const tsad_product &p = item.product;
    each<SLICES * WARP>(item, place, [&](auto team, dim3 block, float *own, float *) {
        ProductRoom &room = *reinterpret_cast<ProductRoom *>(own);
        if (p.precision == TSAD_FLOAT16) {
            product<Float16>(team, p, block, room);
        } else if (p.precision == TSAD_BFLOAT16) {
            product<BFloat16>(team, p, block, room);
        } else {
            product<float>(team, p, block, room);
        }
    });
}

__device__ void perform(const tsad_item &item, const Place &place)
{
    if (item.kind == TSAD_DO_PRODUCT) {
        multiply(item, place);
        return;
    }
    each<THREADS>(item, place, [&](auto team, dim3 block, float *room, float *row) {
        switch (item.kind) {
        case TSAD_DO_LAYERNORM:
            layernorm(team, item.layernorm, block, room);
            break;
        case TSAD_DO_GROUPNORM:
            groupnorm(team, item.groupnorm, block, room);
            break;
        case TSAD_DO_ATTENTION:
            attention(team, item.attention, block, row, room);
            break;
        case TSAD_DO_CROSS_ATTENTION:
            cross_attention(team, item.cross_attention, block, row, room);
            break;
        case TSAD_DO_ADDITION:
            addition(team, item.addition, block);
            break;
        case TSAD_DO_COPY:
            copy(team, item.copy, block);
            break;
        case TSAD_DO_UPDATE:
            update(team, item.update, block);
            break;
        case TSAD_DO_TAIL:
            tail(team, item.tail, block, row, room);
            break;
        default:
            prune_query(team, item.prune_query, block, row);
        }
    });
}

struct Listed {
    const tsad_item *items;
    int first[TSAD_TOGETHER]; /* of each lane */
    int blocks;
};

__device__ unsigned word_of(const tsad_item *item, int i)
{
    return reinterpret_cast<const unsigned *>(item)[i];
}

/* A lane's blocks lie side by side. Shared: two items, of which the next one is brought while the
 * other is done, then what the teams need. */
__global__ void __launch_bounds__(LIST_THREADS, 1)
    list_kernel(const __grid_constant__ tsad_given<Listed> p)
{
    TSAD_DYNAMIC(shared);
    unsigned *items = reinterpret_cast<unsigned *>(shared);
    int thread = (int)threadIdx.x, at = p.first[(int)blockIdx.x / p.blocks];
    Place place = {(int)blockIdx.x % p.blocks, p.blocks, shared + 2 * ITEM_WORDS};
    if (at >= 0 && thread < ITEM_WORDS) {
        items[thread] = word_of(&p.items[at], thread);
    }
    __syncthreads();
    for (int turn = 0; at >= 0; turn = 1 - turn) {
        const tsad_item &item = *reinterpret_cast<tsad_item *>(items + turn * ITEM_WORDS);
        at = item.next;
        bool brings = at >= 0 && thread < ITEM_WORDS;
        unsigned word = brings ? word_of(&p.items[at], thread) : 0;
        perform(item, place);
        if (brings) {
            items[(1 - turn) * ITEM_WORDS + thread] = word;
        }
        if (p.blocks == 1) {
            __syncthreads();
        } else {
            tsad_meet_cluster();
        }
    }
}

} // namespace

/* ---- writing it down ----------------------------------------------------------------------- */

struct tsad_list {
    tsad_item *items;
    int n, room;
    int lane, first[TSAD_TOGETHER], last[TSAD_TOGETHER];
    size_t shared; /* bytes of a block */
    bool failed;   /* memory ran out */
};

tsad_status tsad_list_blocks(int *blocks)
{
    const char *given = getenv("TSAD_CUDA_ONE_KERNEL");
    char *end = nullptr;
    long n = given && *given ? strtol(given, &end, 10) : 0;
    if (n < 0 || n > TSAD_LIST_BLOCKS || (end && (*end || end == given))) {
        return tsad_fail(TSAD_ARGUMENT,
                         "TSAD_CUDA_ONE_KERNEL: expected 0 (a chunk is many kernels), or on how "
                         "many multiprocessors one kernel does a lane's chunk, 1 to %d, got '%s'; "
                         "leave the variable out",
                         TSAD_LIST_BLOCKS, given);
    }
    cudaDeviceProp properties = {};
    if (n > 1 && cudaGetDeviceProperties(&properties, 0) == cudaSuccess && properties.major < 9) {
        return tsad_fail(TSAD_ARGUMENT,
                         "TSAD_CUDA_ONE_KERNEL: more than one multiprocessor needs compute "
                         "capability 9.0, got '%s' on %d.%d; set it to 1, or leave it out",
                         given, properties.major, properties.minor);
    }
    *blocks = (int)n;
    return TSAD_OK;
}

tsad_status tsad_list_make(tsad_list **out)
{
    *out = new (std::nothrow) tsad_list();
    if (!*out) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a list of launches");
    }
    /* The kernel's, not a launch's: another thread may be between asking and launching, so all ask
     * for the same; and not while a graph is captured, as it may load the kernel. */
    const auto kernel = tsad_launched<Listed>(reinterpret_cast<const void *>(list_kernel));
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)MOST_SHARED);
    return error == cudaSuccess
               ? TSAD_OK
               : tsad_fail(TSAD_BACKEND, "cuda: a list of launches: %s", cudaGetErrorString(error));
}

void tsad_list_free(tsad_list *list)
{
    if (list) {
        free(list->items);
        delete list;
    }
}

void tsad_list_begin(tsad_stream *stream, tsad_list *list)
{
    stream->list = list;
    list->n = 0;
    list->shared = 0;
    list->failed = false;
    tsad_list_lane(list, 0);
    for (int i = 0; i < TSAD_TOGETHER; i++) {
        list->first[i] = list->last[i] = -1;
    }
}

void tsad_list_lane(tsad_list *list, int lane) { list->lane = lane; }

bool tsad_list_end(tsad_stream *stream)
{
    const tsad_list *list = stream->list;
    stream->list = nullptr;
    return !list->failed && list->shared <= MOST_SHARED;
}

static bool grow(tsad_list *list)
{
    int room = list->room ? 2 * list->room : 1024;
    void *more = realloc(list->items, sizeof *list->items * (size_t)room);
    if (!more) {
        return false;
    }
    list->items = static_cast<tsad_item *>(more);
    list->room = room;
    return true;
}

void tsad_list_add(tsad_list *list, tsad_kind kind, const void *arguments, size_t bytes, dim3 grid,
                   size_t floats)
{
    if (kind == TSAD_DO_ALONE || list->failed || (list->n == list->room && !grow(list))) {
        list->failed = true;
        return;
    }
    bool multiplies = kind == TSAD_DO_PRODUCT;
    size_t teams = LIST_THREADS / (multiplies ? SLICES * WARP : THREADS);
    size_t own = (size_t)(multiplies ? room_floats<SLICES * WARP>() : room_floats<THREADS>());
    size_t shared = sizeof(float) * (2 * ITEM_WORDS + teams * (own + floats));
    list->shared = shared > list->shared ? shared : list->shared;
    tsad_item *item = &list->items[list->n];
    memset(item, 0, sizeof *item);
    item->kind = kind;
    item->next = -1;
    item->x = grid.x;
    item->y = grid.y;
    item->z = grid.z;
    item->floats = (int)floats;
    memcpy(&item->product, arguments, bytes);
    int *last = &list->last[list->lane];
    *(*last < 0 ? &list->first[list->lane] : &list->items[*last].next) = list->n;
    *last = list->n++;
}

size_t tsad_list_bytes(const tsad_list *list) { return sizeof *list->items * (size_t)list->n; }

const void *tsad_list_items(const tsad_list *list) { return list->items; }

void tsad_list_launch(tsad_stream *stream, const tsad_list *list, const void *device, int blocks)
{
    Listed p = {static_cast<const tsad_item *>(device), {}, blocks};
    int lanes = 0;
    for (; lanes < TSAD_TOGETHER && list->first[lanes] >= 0; lanes++) {
        p.first[lanes] = list->first[lanes];
    }
    if (lanes == 0 || !tsad_stream_begin(stream)) {
        return;
    }
    void *arguments[] = {&p};
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)(lanes * blocks));
    how.blockDim = dim3(LIST_THREADS);
    how.dynamicSmemBytes = list->shared;
    how.stream = stream->cuda;
    how.attrs = &cluster;
    how.numAttrs = blocks > 1 ? 1 : 0;
    const auto kernel = tsad_launched<Listed>(reinterpret_cast<const void *>(list_kernel));
    stream->asked->launches++;
    stream->asked->listed += list->n;
    tsad_stream_note(stream, cudaLaunchKernelExC(&how, kernel, arguments), "a list of launches");
}
