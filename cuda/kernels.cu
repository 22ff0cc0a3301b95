/* kernels.cu: the kernels, each around its body (bodies.cuh), and their launches.
 */
#include "kernels.h"
#include "blas.h"
#include "bodies.cuh"
#include "list.cuh"
#include "stream.cuh"

#include <string.h>

namespace
{

/* __launch_bounds__(THREADS, 1): a block has the registers that it wants. Without the 1, ptxas of
 * CUDA 12 keeps two kernels to 32, so that more blocks go at once, and spills. */

/* A track's part of a launch: the grid's z counts tracks, or all tracks' batches. */
template <typename Arguments> struct Tracks {
    Arguments track[TSAD_TOGETHER];
};

/* A launch that is held back, with the arguments of each track. */
void hold(tsad_stream *stream, tsad_issue_fn issue, const void *kernel, const void *arguments,
          size_t bytes, dim3 grid, dim3 block, size_t floats, const char *name)
{
    tsad_held *held = &stream->held[stream->next++];
    if (stream->next > stream->n_held) {
        *held = {issue, kernel, grid, block, floats * sizeof(float), name, 0, {}};
        stream->n_held++;
    }
    memcpy(held->arguments + bytes * (size_t)held->n++, arguments, bytes);
}

template <typename Arguments> void issue(tsad_stream *stream, const tsad_held &held)
{
    void *list[] = {const_cast<char *>(held.arguments)};
    dim3 grid = held.grid;
    grid.z *= (unsigned)held.n;
    if (!tsad_stream_begin(stream)) {
        return;
    }
    stream->asked->launches++;
    tsad_stream_note(stream,
                     cudaLaunchKernel(tsad_launched<Tracks<Arguments>>(held.kernel), grid,
                                      held.block, list, held.bytes, stream->cuda),
                     held.name);
}

template <typename Arguments> tsad_kind kind_of(const Arguments &) { return TSAD_DO_ALONE; }
tsad_kind kind_of(const tsad_product &) { return TSAD_DO_PRODUCT; }
tsad_kind kind_of(const tsad_layernorm &) { return TSAD_DO_LAYERNORM; }
tsad_kind kind_of(const tsad_groupnorm &) { return TSAD_DO_GROUPNORM; }
tsad_kind kind_of(const tsad_attention &) { return TSAD_DO_ATTENTION; }
tsad_kind kind_of(const tsad_cross_attention &) { return TSAD_DO_CROSS_ATTENTION; }
tsad_kind kind_of(const tsad_addition &) { return TSAD_DO_ADDITION; }
tsad_kind kind_of(const tsad_copy &) { return TSAD_DO_COPY; }
tsad_kind kind_of(const tsad_update &) { return TSAD_DO_UPDATE; }
tsad_kind kind_of(const tsad_tail &) { return TSAD_DO_TAIL; }
tsad_kind kind_of(const tsad_prune_query &) { return TSAD_DO_PRUNE_QUERY; }

template <typename Arguments>
void launch(tsad_stream *stream, void (*kernel)(tsad_given<Tracks<Arguments>>), const Arguments &p,
            dim3 grid, dim3 block, size_t floats, const char *name,
            tsad_issue_fn how = issue<Arguments>)
{
    static_assert(sizeof(Tracks<Arguments>) <= sizeof tsad_held::arguments, "room for them");
    if (stream->list) {
        tsad_list_add(stream->list, kind_of(p), &p, sizeof p, grid, floats);
        return;
    }
    hold(stream, how, reinterpret_cast<const void *>(kernel), &p, sizeof p, grid, block, floats,
         name);
    if (!stream->together) {
        tsad_launch_all(stream);
    }
}

unsigned blocks_of(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

/* ---- kernels ------------------------------------------------------------------------------- */

template <typename Weight>
__global__ void __launch_bounds__(WARP *SLICES, 1)
    product_kernel(const __grid_constant__ tsad_given<Tracks<tsad_product>> tracks)
{
    unsigned batches = (unsigned)tracks.track[0].batches;
    TSAD_SHARED(ProductRoom, room, 1);
    product<Weight>(Alone<WARP * SLICES>(), tracks.track[blockIdx.z / batches],
                    dim3(blockIdx.x, blockIdx.y, blockIdx.z % batches), *room);
}

__global__ void __launch_bounds__(THREADS, 1)
    layernorm_kernel(const __grid_constant__ tsad_given<Tracks<tsad_layernorm>> tracks)
{
    TSAD_SHARED(float, room, THREADS / WARP);
    layernorm(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, room);
}

__global__ void __launch_bounds__(THREADS, 1)
    groupnorm_kernel(const __grid_constant__ tsad_given<Tracks<tsad_groupnorm>> tracks)
{
    TSAD_SHARED(float, room, THREADS / WARP);
    groupnorm(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, room);
}

__global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(const __grid_constant__ tsad_given<Tracks<tsad_attention>> tracks)
{
    TSAD_DYNAMIC(weight);
    TSAD_SHARED(float, room, THREADS / WARP);
    attention(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, weight, room);
}

__global__ void __launch_bounds__(THREADS, 1)
    cross_attention_kernel(const __grid_constant__ tsad_given<Tracks<tsad_cross_attention>> tracks)
{
    TSAD_DYNAMIC(weight);
    TSAD_SHARED(float, room, THREADS / WARP);
    cross_attention(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, weight, room);
}

__global__ void __launch_bounds__(THREADS, 1)
    addition_kernel(const __grid_constant__ tsad_given<Tracks<tsad_addition>> tracks)
{
    addition(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx);
}

__global__ void __launch_bounds__(THREADS, 1)
    copy_kernel(const __grid_constant__ tsad_given<Tracks<tsad_copy>> tracks)
{
    copy(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx);
}

__global__ void __launch_bounds__(THREADS, 1)
    update_kernel(const __grid_constant__ tsad_given<Tracks<tsad_update>> tracks)
{
    update(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx);
}

__global__ void __launch_bounds__(THREADS, 1)
    tail_kernel(const __grid_constant__ tsad_given<Tracks<tsad_tail>> tracks)
{
    TSAD_DYNAMIC(row);
    TSAD_SHARED(float, room, THREADS / WARP);
    tail(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, row, room);
}

__global__ void __launch_bounds__(THREADS, 1)
    prune_query_kernel(const __grid_constant__ tsad_given<Tracks<tsad_prune_query>> tracks)
{
    TSAD_DYNAMIC(weight);
    prune_query(Alone<THREADS>(), tracks.track[blockIdx.z], blockIdx, weight);
}

/* ---- the same through cuBLAS ------------------------------------------------------------- */

/* A product whose sums are made by another: all tracks' rows are below each other there. */
struct Joined {
    tsad_product p;
    float *columns; /* (rows of all, taps * channels): what each row is made of */
    float *sums;    /* (rows of all, n_out) */
};

/* a block a row */
__global__ void __launch_bounds__(THREADS, 1)
    gather_kernel(const __grid_constant__ tsad_given<Tracks<Joined>> tracks)
{
    const Joined &joined = tracks.track[blockIdx.z];
    const tsad_product &p = joined.p;
    TSAD_SHARED(float, room, THREADS / WARP);
    int row = (int)blockIdx.x, n_in = p.taps * p.channels;
    float *to = joined.columns + (size_t)(blockIdx.z * gridDim.x + blockIdx.x) * (size_t)n_in;
    Moments m = {0, 1};
    if (p.norm.used) {
        m = team_moments(Alone<THREADS>(), p.x + (size_t)row * (size_t)p.ldx, p.channels,
                         p.norm.eps, room);
    }
    for (int k = (int)threadIdx.x; k < n_in; k += THREADS) {
        int tap = k / p.channels, token = row * p.stride + p.first + tap;
        bool there = token >= 0 && token < p.tokens;
        float v = there ? p.x[(size_t)token * (size_t)p.ldx + (size_t)(k - tap * p.channels)] : 0;
        to[k] = p.norm.used ? normalised(v, m, p.norm, k) : v;
    }
}

/* a thread a number */
__global__ void __launch_bounds__(THREADS, 1)
    finish_kernel(const __grid_constant__ tsad_given<Tracks<Joined>> tracks)
{
    const Joined &joined = tracks.track[blockIdx.z];
    const tsad_product &p = joined.p;
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), n = p.rows * p.n_out, o = i % p.n_out;
    if (i < n) {
        float sum = joined.sums[blockIdx.z * (size_t)n + (size_t)i];
        finish(p, 0, i / p.n_out, o, p.bias ? p.bias[o] + sum : sum);
    }
}

/* ---- callers' arrays --------------------------------------------------------------------- */

__global__ void __launch_bounds__(THREADS, 1)
    take_kernel(const __grid_constant__ tsad_given<Tracks<tsad_taking>> tracks)
{
    const tsad_taking &p = tracks.track[blockIdx.z];
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), t = i / p.channels, c = i % p.channels;
    if (t >= p.rows) {
        return;
    }
    size_t at = (size_t)t * p.ldx + (size_t)c;
    float raw = p.x[at], x = p.shift ? raw - p.shift[c] : raw;
    x = p.scale ? __fadd_rn(__fmul_rn(x, p.scale[c]), p.offset[c]) : x;
    if (!(fabsf(x) <= p.limit)) {
        atomicMin(p.fault, (unsigned long long)(p.index + at) << 32 | __float_as_uint(raw));
        x = NAN;
    }
    x = p.base ? __fadd_rn(p.base[i], __fmul_rn(p.share, x)) : x;
    p.y[(size_t)t * (size_t)p.ldy + (size_t)c] = x;
}

/* a normalised number in raw units */
__device__ float raw(const tsad_hand_over &p, float x, int c)
{
    x = p.scale ? (x - p.offset[c]) / p.scale[c] : x;
    return p.shift ? x + p.shift[c] : x;
}

__device__ float handed_over(const tsad_hand_over &p, int i)
{
    int c = i % p.channels;
    return raw(p, p.x[(size_t)(i / p.channels) * (size_t)p.ldx + (size_t)c], c);
}

__device__ float within_clip(const tsad_hand_over &p, float x, int c)
{
    float one = raw(p, -p.clip, c), other = raw(p, p.clip, c);
    x = fminf(fmaxf(x, fminf(one, other)), fmaxf(one, other));
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

__device__ float corrected(const tsad_hand_over &p, int i)
{
    float x = handed_over(p, i);
    if (!p.move) {
        return x;
    }
    float moved = p.gain ? x - p.expected[i] : 0;
    x = __fadd_rn(x, __fmul_rn(p.gain ? p.gain[i] : 0, moved));
    return within_clip(p, __fadd_rn(x, p.move[i]), i % p.channels);
}

__device__ float executed(const tsad_hand_over &p, int i)
{
    int t = i / p.channels;
    float x = corrected(p, i);
    if (p.smooths && t > 0 && t + 1 < p.rows) {
        float before = corrected(p, i - p.channels), after = corrected(p, i + p.channels);
        x = __fadd_rn(__fadd_rn(__fmul_rn(0.25f, before), __fmul_rn(0.5f, x)),
                      __fmul_rn(0.25f, after));
    }
    if (p.lead == 0) {
        return x;
    }
    x = __fadd_rn(x, __fmul_rn(p.lead, x - p.expected[i]));
    return within_clip(p, x, i % p.channels);
}

/* one block */
__global__ void __launch_bounds__(THREADS, 1)
    hand_over_kernel(const __grid_constant__ tsad_given<Tracks<tsad_hand_over>> tracks)
{
    const tsad_hand_over &p = tracks.track[blockIdx.z];
    TSAD_SHARED(float, room, THREADS / WARP);
    float wrong = 0;
    for (int i = (int)threadIdx.x; i < p.rows * p.channels; i += THREADS) {
        wrong += fabsf(handed_over(p, i)) <= FLT_MAX ? 0 : 1;
    }
    wrong = team_sum(Alone<THREADS>(), wrong, room);
    for (int i = (int)threadIdx.x; i < p.n * p.channels; i += THREADS) {
        p.y[i] = wrong > 0 ? NAN : executed(p, p.first * p.channels + i);
    }
}

} // namespace

/* ---- launches ---------------------------------------------------------------------------- */

/* Many rows of one matrix in float32: ours reads it once for each ROWS of them. */
static bool is_for_blas(const tsad_blas_room *room, const Tracks<tsad_product> &tracks, int n)
{
    const tsad_product &p = tracks.track[0];
    size_t rows = (size_t)n * (size_t)p.rows, n_in = (size_t)p.taps * (size_t)p.channels;
    bool fits = room && rows >= (size_t)room->rows &&
                (p.precision == TSAD_FLOAT32 || p.precision == TSAD_TF32) && p.batches == 1 &&
                rows * n_in <= room->columns_floats && rows * (size_t)p.n_out <= room->sums_floats;
    for (int i = 1; i < n; i++) { /* folds of several layers go together */
        fits = fits && tracks.track[i].w == p.w;
    }
    return fits;
}

/* Its inputs side by side, the product, and what becomes of it; a lone plain one's inputs are so
 * already. */
static void issue_product(tsad_stream *stream, const tsad_held &held)
{
    const tsad_blas_room *room = tsad_blas_room_of(stream);
    Tracks<tsad_product> tracks;
    memcpy(&tracks, held.arguments, sizeof tracks);
    if (!is_for_blas(room, tracks, held.n)) {
        issue<tsad_product>(stream, held);
        return;
    }
    const tsad_product &p = tracks.track[0];
    tsad_held own = held;
    Tracks<Joined> joined;
    static_assert(sizeof joined <= sizeof own.arguments, "room for them");
    for (int i = 0; i < held.n; i++) {
        joined.track[i] = {tracks.track[i], room->columns, room->sums};
    }
    memcpy(own.arguments, &joined, sizeof joined);
    bool plain = held.n == 1 && p.taps == 1 && p.stride == 1 && p.first == 0 && !p.norm.used;
    own.block = THREADS;
    if (!plain) {
        own.kernel = reinterpret_cast<const void *>(gather_kernel);
        own.grid = (unsigned)p.rows;
        own.name = "gather";
        issue<Joined>(stream, own);
    }
    tsad_blas_multiply(stream, plain ? p.x : room->columns, plain ? p.ldx : p.taps * p.channels,
                       static_cast<const float *>(p.w), held.n * p.rows, p.taps * p.channels,
                       p.n_out, room->sums, p.precision == TSAD_TF32);
    own.kernel = reinterpret_cast<const void *>(finish_kernel);
    own.grid = blocks_of((size_t)p.rows * (size_t)p.n_out, THREADS);
    own.name = "finish";
    issue<Joined>(stream, own);
}

void tsad_launch_product(tsad_stream *stream, tsad_product p)
{
    dim3 grid(blocks_of((size_t)p.n_out, WARP), blocks_of((size_t)p.rows, ROWS),
              (unsigned)p.batches);
    void (*kernel)(tsad_given<Tracks<tsad_product>>) = product_kernel<float>;
    kernel = p.precision == TSAD_FLOAT16 ? product_kernel<Float16> : kernel;
    kernel = p.precision == TSAD_BFLOAT16 ? product_kernel<BFloat16> : kernel;
    launch(stream, kernel, p, grid, WARP * SLICES, 0, "product", issue_product);
}

void tsad_launch_layernorm(tsad_stream *stream, tsad_layernorm p)
{
    launch(stream, layernorm_kernel, p, (unsigned)p.rows, THREADS, 0, "layernorm");
}

void tsad_launch_groupnorm(tsad_stream *stream, tsad_groupnorm p)
{
    launch(stream, groupnorm_kernel, p, (unsigned)p.groups, THREADS, 0, "groupnorm");
}

void tsad_launch_attention(tsad_stream *stream, tsad_attention p)
{
    dim3 grid((unsigned)p.tokens, (unsigned)p.heads);
    launch(stream, attention_kernel, p, grid, THREADS, (size_t)p.tokens, "attention");
}

void tsad_launch_cross_attention(tsad_stream *stream, tsad_cross_attention p)
{
    size_t weights = (size_t)p.heads * (size_t)p.n_memory;
    launch(stream, cross_attention_kernel, p, (unsigned)p.rows, THREADS, weights,
           "cross-attention");
}

void tsad_launch_addition(tsad_stream *stream, tsad_addition p)
{
    size_t n = (size_t)p.rows * (size_t)p.channels;
    launch(stream, addition_kernel, p, blocks_of(n, THREADS), THREADS, 0, "addition");
}

void tsad_launch_copy(tsad_stream *stream, tsad_copy p)
{
    size_t n = (size_t)p.rows * (size_t)p.channels;
    launch(stream, copy_kernel, p, blocks_of(n, THREADS), THREADS, 0, "copy");
}

void tsad_launch_take(tsad_stream *stream, tsad_taking p)
{
    size_t n = (size_t)p.rows * (size_t)p.channels;
    launch(stream, take_kernel, p, blocks_of(n, THREADS), THREADS, 0, "take");
}

void tsad_launch_hand_over(tsad_stream *stream, tsad_hand_over p)
{
    launch(stream, hand_over_kernel, p, 1, THREADS, 0, "hand over");
}

void tsad_launch_update(tsad_stream *stream, tsad_update p)
{
    size_t n = (size_t)p.rows * (size_t)p.channels;
    launch(stream, update_kernel, p, blocks_of(n, THREADS), THREADS, 0, "update");
}

void tsad_launch_prune_query(tsad_stream *stream, tsad_prune_query p)
{
    size_t weights = (size_t)p.heads * (size_t)p.n_memory;
    launch(stream, prune_query_kernel, p, (unsigned)p.blocks, THREADS, weights, "prune query");
}

void tsad_launch_tail(tsad_stream *stream, tsad_tail p)
{
    launch(stream, tail_kernel, p, (unsigned)p.update.rows, THREADS,
           (size_t)(p.channels + p.update.channels), "tail");
}

void tsad_together(tsad_stream *stream)
{
    stream->together = true;
    stream->next = 0;
}

void tsad_launch_all(tsad_stream *stream)
{
    for (int i = 0; i < stream->n_held; i++) {
        stream->held[i].issue(stream, stream->held[i]);
    }
    stream->together = false;
    stream->n_held = stream->next = 0;
}
