/* kernels.cu: the kernels, plain ones: right before fast. Every sum has an order that depends on
 * sizes only. The same text is compiled for GPUs by nvcc and for the host by a C++ compiler
 * (emulate/), where a block's threads are fibers that run in any order between two barriers.
 */
#include "kernels.h"
#include "activate.h"
#include "blas.h"
#include "shared.cuh"
#include "stream.cuh"

#include <float.h>
#include <math.h>
#include <string.h>

namespace
{

constexpr int WARP = 32, THREADS = 128;
/* __launch_bounds__(THREADS, 1): a block has the registers that it wants. Without the 1, ptxas of
 * CUDA 12 keeps two kernels to 32, so that more blocks go at once, and spills. */
constexpr unsigned ALL = 0xffffffffu;

/* ---- what kernels share ------------------------------------------------------------------ */

__device__ float term(const tsad_term &t, int i)
{
    return t.lane ? t.step[i] + t.lane[i] : t.step[i];
}

__device__ float modulated(float x, const tsad_term &scale, const tsad_term &move, int i)
{
    x = scale.step ? x * term(scale, i) : x;
    return move.step ? x + term(move, i) : x;
}

/* column o of row r; `at` is where that is */
__device__ void deliver(const tsad_delivery &to, size_t at, int o, float v)
{
    if (to.slot) {
        to.slot[at] = v;
    }
    if (to.adds) {
        to.y[at] += to.gate.step ? v * term(to.gate, o) : v;
    } else {
        to.y[at] = v;
    }
}

/* A track's part of a launch: the grid's z counts tracks, or all tracks' batches. */
template <typename Arguments> struct Tracks {
    Arguments track[TSAD_TOGETHER];
};

__device__ float warp_sum(float v)
{
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        v += __shfl_xor_sync(ALL, v, lanes);
    }
    return v;
}

/* The sum over all threads of a block, the same in all of them. What any of them wrote to shared
 * memory before is seen by all after. room: a float a warp. */
__device__ float block_sum(float v, float *room)
{
    v = warp_sum(v);
    __syncthreads(); /* of the sum before */
    if (threadIdx.x % WARP == 0) {
        room[threadIdx.x / WARP] = v;
    }
    __syncthreads();
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) {
        sum += room[w];
    }
    return sum;
}

/* NaN where the squares overflowed, so that it is seen */
__device__ float norm_scale(float variance, float eps)
{
    return 1 / sqrtf(variance + eps) + (variance - variance);
}

struct Moments {
    float mean, scale;
};

/* of a row of n, by a block: each thread reads its own columns, `threads` apart */
__device__ Moments block_moments(const float *x, int n, float eps, float *room)
{
    float sum = 0, square = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        sum += x[i];
    }
    float mean = block_sum(sum, room) / (float)n;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        square += (x[i] - mean) * (x[i] - mean);
    }
    return {mean, norm_scale(block_sum(square, room) / (float)n, eps)};
}

/* the same by a warp, thread `lane` of it */
__device__ Moments warp_moments(const float *x, int n, float eps, int lane)
{
    float sum = 0, square = 0;
    for (int i = lane; i < n; i += WARP) {
        sum += x[i];
    }
    float mean = warp_sum(sum) / (float)n;
    for (int i = lane; i < n; i += WARP) {
        square += (x[i] - mean) * (x[i] - mean);
    }
    return {mean, norm_scale(warp_sum(square) / (float)n, eps)};
}

__device__ float normalised(float x, const Moments &m, const tsad_normaliser &norm, int i)
{
    return modulated((x - m.mean) * m.scale, norm.scale, norm.move, i);
}

/* weight[0 .. n) = softmax, in place, by one thread */
__device__ void softmax(float *weight, int n)
{
    float top = weight[0], sum = 0;
    for (int i = 1; i < n; i++) {
        top = fmaxf(top, weight[i]);
    }
    for (int i = 0; i < n; i++) {
        weight[i] = expf(weight[i] - top);
        sum += weight[i];
    }
    for (int i = 0; i < n; i++) {
        weight[i] /= sum;
    }
}

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
    stream->asked->launches++;
    tsad_stream_begin(stream);
    tsad_stream_note(stream,
                     cudaLaunchKernel(tsad_launched<Tracks<Arguments>>(held.kernel), grid,
                                      held.block, list, held.bytes, stream->cuda),
                     held.name);
}

template <typename Arguments>
void launch(tsad_stream *stream, void (*kernel)(tsad_given<Tracks<Arguments>>), const Arguments &p,
            dim3 grid, dim3 block, size_t floats, const char *name,
            tsad_issue_fn how = issue<Arguments>)
{
    static_assert(sizeof(Tracks<Arguments>) <= sizeof tsad_held::arguments, "room for them");
    hold(stream, how, reinterpret_cast<const void *>(kernel), &p, sizeof p, grid, block, floats,
         name);
    if (!stream->together) {
        tsad_launch_all(stream);
    }
}

unsigned blocks_of(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

/* ---- weights ------------------------------------------------------------------------------- */

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

__device__ float number(float w) { return w; }
__device__ float number(Float16 w) { return __half2float(__ushort_as_half(w.bits)); }
__device__ float number(BFloat16 w) { return __uint_as_float((unsigned)w.bits << 16); }

/* of a small matrix */
__device__ float weight_at(const void *w, tsad_precision precision, size_t i)
{
    return precision == TSAD_FLOAT16    ? number(static_cast<const Float16 *>(w)[i])
           : precision == TSAD_BFLOAT16 ? number(static_cast<const BFloat16 *>(w)[i])
                                        : static_cast<const float *>(w)[i];
}

/* ---- matrix product ---------------------------------------------------------------------- */

/* what becomes of a sum */
__device__ void finish(const tsad_product &p, unsigned batch, int row, int column, float v)
{
    v = tsad_activate(v, p.activation);
    if (p.table) {
        v += p.table[(size_t)row * (size_t)p.n_out + (size_t)column];
    }
    size_t at = batch * p.y_batch + (size_t)row * (size_t)p.to.ld;
    deliver(p.to, at + (size_t)(column * p.step), column, v);
}

/* A block makes WARP columns of ROWS rows. Its warps take slices of the inputs, each thread a
 * column; the slices' sums are added in order. */
constexpr int ROWS = 16, SLICES = 8, CHUNK = 128;
typedef float inputs_of_row[CHUNK];
typedef float columns_of_rows[ROWS][WARP];

/* inputs [from, from + CHUNK) of ROWS rows, zero where there are none */
__device__ void fetch_rows(const tsad_product &p, const float *from_x, int row, int from,
                           const Moments *moments, inputs_of_row *x)
{
    int n_in = p.taps * p.channels;
    for (int i = (int)(threadIdx.y * WARP + threadIdx.x); i < ROWS * CHUNK; i += SLICES * WARP) {
        int r = i / CHUNK, k = from + i % CHUNK, tap = k / p.channels;
        int token = (row + r) * p.stride + p.first + tap;
        bool there = row + r < p.rows && k < n_in && token >= 0 && token < p.tokens;
        float v =
            there ? from_x[(size_t)token * (size_t)p.ldx + (size_t)(k - tap * p.channels)] : 0;
        x[r][i % CHUNK] = there && p.norm.used ? normalised(v, moments[r], p.norm, k) : v;
    }
}

template <typename Weight>
__global__ void __launch_bounds__(WARP *SLICES)
    product_kernel(const __grid_constant__ tsad_given<Tracks<tsad_product>> tracks)
{
    unsigned batch = blockIdx.z % (unsigned)tracks.track[0].batches;
    const tsad_product &p = tracks.track[blockIdx.z / (unsigned)tracks.track[0].batches];
    TSAD_SHARED(inputs_of_row, x, ROWS);
    TSAD_SHARED(columns_of_rows, part, SLICES);
    TSAD_SHARED(Moments, moments, ROWS);
    int column = (int)(blockIdx.x * WARP + threadIdx.x), row = (int)blockIdx.y * ROWS;
    int slice = (int)threadIdx.y, n_in = p.taps * p.channels;
    const float *from = p.x + batch * p.x_batch;
    const Weight *w = static_cast<const Weight *>(p.w) + batch * p.w_batch;
    float sum[ROWS];
    for (int r = slice; p.norm.used && r < ROWS && row + r < p.rows; r += SLICES) {
        Moments m = warp_moments(from + (size_t)(row + r) * (size_t)p.ldx, p.channels, p.norm.eps,
                                 (int)threadIdx.x);
        if (threadIdx.x == 0) {
            moments[r] = m;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        sum[r] = 0;
    }
    for (int k0 = 0; k0 < n_in; k0 += CHUNK) {
        if (k0 > 0 || p.norm.used) {
            __syncthreads(); /* the inputs before are used up, the moments are there */
        }
        fetch_rows(p, from, row, k0, moments, x);
        __syncthreads();
        int k1 = k0 + (slice + 1) * (CHUNK / SLICES);
        for (int k = k0 + slice * (CHUNK / SLICES); k < k1 && k < n_in && column < p.n_out; k++) {
            float weight = number(w[(size_t)k * (size_t)p.n_out + (size_t)column]);
            for (int r = 0; r < ROWS; r++) {
                sum[r] += x[r][k - k0] * weight;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        part[slice][r][threadIdx.x] = sum[r];
    }
    __syncthreads();
    for (int r = slice; r < ROWS && row + r < p.rows && column < p.n_out; r += SLICES) {
        float v = p.bias ? p.bias[column] : 0;
        for (int s = 0; s < SLICES; s++) {
            v += part[s][r][threadIdx.x];
        }
        finish(p, batch, row + r, column, v);
    }
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
        m = block_moments(p.x + (size_t)row * (size_t)p.ldx, p.channels, p.norm.eps, room);
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

/* ---- norms ------------------------------------------------------------------------------- */

/* a block a row */
__global__ void __launch_bounds__(THREADS, 1)
    layernorm_kernel(const __grid_constant__ tsad_given<Tracks<tsad_layernorm>> tracks)
{
    const tsad_layernorm &p = tracks.track[blockIdx.z];
    TSAD_SHARED(float, room, THREADS / WARP);
    const float *x = p.x + blockIdx.x * (size_t)p.ldx;
    float *y = p.y + blockIdx.x * (size_t)p.ldy;
    Moments m = block_moments(x, p.channels, p.norm.eps, room);
    for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
        y[i] = normalised(x[i], m, p.norm, i);
    }
}

/* a block a group: some channels of all rows */
__global__ void __launch_bounds__(THREADS, 1)
    groupnorm_kernel(const __grid_constant__ tsad_given<Tracks<tsad_groupnorm>> tracks)
{
    const tsad_groupnorm &p = tracks.track[blockIdx.z];
    TSAD_SHARED(float, room, THREADS / WARP);
    int n = p.channels / p.groups, first = (int)blockIdx.x * n, all = p.rows * n;
    float sum = 0, square = 0;
    for (int i = (int)threadIdx.x; i < all; i += THREADS) {
        sum += p.x[(size_t)(i / n) * (size_t)p.ldx + (size_t)(first + i % n)];
    }
    float mean = block_sum(sum, room) / (float)all;
    for (int i = (int)threadIdx.x; i < all; i += THREADS) {
        float v = p.x[(size_t)(i / n) * (size_t)p.ldx + (size_t)(first + i % n)] - mean;
        square += v * v;
    }
    float scale = norm_scale(block_sum(square, room) / (float)all, 1e-5f);
    for (int i = (int)threadIdx.x; i < all; i += THREADS) {
        int c = first + i % n;
        float v = p.x[(size_t)(i / n) * (size_t)p.ldx + (size_t)c];
        v = tsad_activate((v - mean) * scale * p.gain[c] + p.shift[c], p.activation);
        v = modulated(v, p.scale, p.move, c);
        deliver(p.to, (size_t)(i / n) * (size_t)p.to.ld + (size_t)c, c, v);
    }
}

/* ---- attention --------------------------------------------------------------------------- */

/* Of two vectors of a head, at positions with these turns: the first half of each turns against its
 * second half. NULL: they are as they are. */
__device__ float dot(const float *a, const float *turn_a, const float *b, const float *turn_b,
                     int n)
{
    float sum = 0;
    if (!turn_a) {
        for (int i = 0; i < n; i++) {
            sum += a[i] * b[i];
        }
        return sum;
    }
    for (int i = 0, half = n / 2; i < half; i++) {
        float ca = turn_a[i], sa = turn_a[i + half], cb = turn_b[i], sb = turn_b[i + half];
        sum += (a[i] * ca - a[i + half] * sa) * (b[i] * cb - b[i + half] * sb);
        sum += (a[i + half] * ca + a[i] * sa) * (b[i + half] * cb + b[i] * sb);
    }
    return sum;
}

/* a block a token and head; shared: a weight a token */
__global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(const __grid_constant__ tsad_given<Tracks<tsad_attention>> tracks)
{
    const tsad_attention &p = tracks.track[blockIdx.z];
    TSAD_DYNAMIC(weight);
    TSAD_SHARED(float, room, THREADS / WARP);
    int t = (int)blockIdx.x, h = (int)blockIdx.y, width = p.heads * p.head_dim;
    int n = p.causal ? t + 1 : p.tokens;
    const float *q = p.qkv + (size_t)t * (size_t)p.ld + (size_t)(h * p.head_dim);
    const float *keys = p.qkv + (size_t)(width + h * p.head_dim), *values = keys + width;
    float sum = 0, top;
    for (int u = (int)threadIdx.x; u < n; u += THREADS) {
        const float *own = p.turns ? p.turns + (size_t)t * (size_t)p.head_dim : NULL;
        const float *other = p.turns ? p.turns + (size_t)u * (size_t)p.head_dim : NULL;
        weight[u] = dot(q, own, keys + (size_t)u * (size_t)p.ld, other, p.head_dim);
    }
    __syncthreads();
    top = weight[0];
    for (int u = 1; u < n; u++) {
        top = fmaxf(top, weight[u]);
    }
    __syncthreads(); /* before the weights are changed */
    for (int u = (int)threadIdx.x; u < n; u += THREADS) {
        weight[u] = expf(weight[u] - top);
        sum += weight[u];
    }
    sum = block_sum(sum, room); /* and all weights are there */
    for (int j = (int)threadIdx.x; j < p.head_dim; j += THREADS) {
        float v = 0;
        for (int u = 0; u < n; u++) {
            v += weight[u] * values[(size_t)u * (size_t)p.ld + (size_t)j];
        }
        p.y[(size_t)t * (size_t)p.ldy + (size_t)(h * p.head_dim + j)] = v / sum;
    }
}

__device__ const float *token_of(const tsad_cross_attention &p, int s)
{
    return s == 0 ? p.first : p.rest + (size_t)(s - 1) * p.floats;
}

/* a block a row; shared: a weight a head and token */
__global__ void __launch_bounds__(THREADS, 1)
    cross_attention_kernel(const __grid_constant__ tsad_given<Tracks<tsad_cross_attention>> tracks)
{
    const tsad_cross_attention &p = tracks.track[blockIdx.z];
    TSAD_DYNAMIC(weight);
    TSAD_SHARED(float, room, THREADS / WARP);
    int t = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    int n = p.causal && t + 2 < p.n_memory ? t + 2 : p.n_memory;
    const float *x = p.x + (size_t)t * (size_t)p.ldx;
    Moments m = {0, 1};
    if (p.norm.used) {
        m = block_moments(x, p.width, p.norm.eps, room);
    }
    for (int i = (int)threadIdx.x / WARP; i < p.heads * n; i += THREADS / WARP) {
        int h = i / n;
        const float *token = token_of(p, i % n), *key = token + (size_t)h * (size_t)p.width;
        float sum = 0;
        for (int j = lane; j < p.width; j += WARP) {
            sum += (p.norm.used ? normalised(x[j], m, p.norm, j) : x[j]) * key[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            weight[i] = sum + token[p.shift + (size_t)h];
        }
    }
    __syncthreads();
    for (int h = (int)threadIdx.x; h < p.heads; h += THREADS) {
        softmax(weight + h * n, n);
    }
    __syncthreads();
    for (int j = (int)threadIdx.x; j < p.width; j += THREADS) {
        float v = p.bias[j];
        for (int i = 0; i < p.heads * n; i++) {
            v += weight[i] *
                 token_of(p, i % n)[p.value + (size_t)(i / n) * (size_t)p.width + (size_t)j];
        }
        deliver(p.to, (size_t)t * (size_t)p.to.ld + (size_t)j, j, v);
    }
}

/* ---- a thread a number ------------------------------------------------------------------- */

/* column c of a row; `at` is where that is in each source */
__device__ float sum_of(const tsad_sum &p, size_t at, int c)
{
    float sum = p.source ? 0 : p.base[at];
    for (int s = 0; p.source && s < p.n; s++) {
        const tsad_reused source = p.source[s];
        float v = source.count * p.base[(size_t)source.offset + at];
        sum += source.gate < 0 ? v : v * term(p.terms, source.gate + c);
    }
    if (p.kept) {
        p.kept[at] = sum;
    }
    return sum;
}

__global__ void __launch_bounds__(THREADS, 1)
    addition_kernel(const __grid_constant__ tsad_given<Tracks<tsad_addition>> tracks)
{
    const tsad_addition &p = tracks.track[blockIdx.z];
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), c = i % p.channels;
    if (i >= p.rows * p.channels) {
        return;
    }
    size_t at = (size_t)(i / p.channels) * (size_t)p.to.ld + (size_t)c;
    deliver(p.to, at, c, sum_of(p.sum, at, c));
}

__global__ void __launch_bounds__(THREADS, 1)
    copy_kernel(const __grid_constant__ tsad_given<Tracks<tsad_copy>> tracks)
{
    const tsad_copy &p = tracks.track[blockIdx.z];
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), t = i / p.channels, c = i % p.channels;
    if (t >= p.rows) {
        return;
    }
    float v = p.x[(size_t)(t / p.repeat) * (size_t)p.ldx + (size_t)c];
    v = p.table ? v + p.table[i] : v;
    p.y[(size_t)t * (size_t)p.ldy + (size_t)c] = tsad_activate(v, p.activation);
}

/* the sampler's row of channel c of token t, whose output was e; the next sample */
__device__ float updated(const tsad_update &p, int t, int c, float e)
{
    const float *k = p.coefficient;
    size_t at = (size_t)t * (size_t)p.ld + (size_t)c;
    float x0 = k[0] * p.x[at] + k[1] * e;
    x0 = x0 > k[2] ? k[2] : x0 < -k[2] ? -k[2] : x0;
    /* the range hides nothing: where e is infinite f e is NaN, also if f is 0 */
    float next = k[3] * x0 + k[4] * p.x[at] + k[5] * e;
    next = p.last ? next + k[6] * p.last[at] : next;
    next = k[8] != 0 ? next + k[8] * p.older[at] : next;
    next = p.z ? next + k[7] * p.z[(size_t)(t * p.channels + c)] : next;
    p.x[at] = next;
    p.older[at] = x0;
    return next;
}

__global__ void __launch_bounds__(THREADS, 1)
    update_kernel(const __grid_constant__ tsad_given<Tracks<tsad_update>> tracks)
{
    const tsad_update &p = tracks.track[blockIdx.z];
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), t = i / p.channels, c = i % p.channels;
    if (t < p.rows) {
        updated(p, t, c, p.e[(size_t)t * (size_t)p.ld + (size_t)c]);
    }
}

/* a block a token; shared: its row, then its output, which becomes the next sample */
__global__ void __launch_bounds__(THREADS, 1)
    tail_kernel(const __grid_constant__ tsad_given<Tracks<tsad_tail>> tracks)
{
    const tsad_tail &p = tracks.track[blockIdx.z];
    TSAD_DYNAMIC(row);
    TSAD_SHARED(float, room, THREADS / WARP);
    int t = (int)blockIdx.x, lane = (int)threadIdx.x % WARP, actions = p.update.channels;
    float *sample = row + p.channels;
    for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
        float x = p.x[(size_t)t * (size_t)p.ldx + (size_t)i];
        size_t at = (size_t)t * (size_t)p.sum.ld + (size_t)i;
        row[i] = p.sum.n ? x + sum_of(p.sum, at, i) : x;
    }
    if (p.norm.used) { /* each thread reads and writes its own columns */
        Moments m = block_moments(row, p.channels, p.norm.eps, room);
        for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
            row[i] = normalised(row[i], m, p.norm, i);
        }
    }
    __syncthreads();
    for (int o = (int)threadIdx.x / WARP; o < actions; o += THREADS / WARP) {
        float sum = 0;
        for (int i = lane; i < p.channels; i += WARP) {
            sum += row[i] * weight_at(p.w, p.w_precision, (size_t)(i * actions + o));
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            sample[o] = sum + p.bias[o];
        }
    }
    __syncthreads();
    for (int o = (int)threadIdx.x; o < actions; o += THREADS) {
        sample[o] = updated(p.update, t, o, sample[o]);
    }
    __syncthreads();
    for (int j = (int)threadIdx.x; p.v && j < p.n_next; j += THREADS) {
        float v = p.v_bias[j] + (p.table ? p.table[(size_t)(t * p.n_next + j)] : 0);
        for (int o = 0; o < actions; o++) {
            v += sample[o] * weight_at(p.v, p.v_precision, (size_t)(o * p.n_next + j));
        }
        p.y[(size_t)t * (size_t)p.ldy + (size_t)j] = v;
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
    wrong = block_sum(wrong, room);
    for (int i = (int)threadIdx.x; i < p.n * p.channels; i += THREADS) {
        p.y[i] = wrong > 0 ? NAN : executed(p, p.first * p.channels + i);
    }
}

/* ---- the pruner -------------------------------------------------------------------------- */

/* a block a row of y; shared: a weight a head and token */
__global__ void __launch_bounds__(THREADS, 1)
    prune_query_kernel(const __grid_constant__ tsad_given<Tracks<tsad_prune_query>> tracks)
{
    const tsad_prune_query &p = tracks.track[blockIdx.z];
    TSAD_DYNAMIC(weight);
    int b = (int)blockIdx.x, n = p.n_memory;
    for (int h = (int)threadIdx.x; h < p.heads; h += THREADS) {
        for (int s = 0; s < n; s++) {
            const float *score =
                s == 0 ? p.score_first : p.score_rest + (size_t)(s - 1) * p.score_floats;
            weight[h * n + s] = score[b * p.heads + h];
        }
        softmax(weight + h * n, n);
    }
    __syncthreads();
    for (int j = (int)threadIdx.x; j < p.hidden; j += THREADS) {
        float v = p.token[(size_t)b * (size_t)p.hidden + (size_t)j];
        for (int i = 0; i < p.heads * n; i++) {
            int s = i % n;
            const float *value =
                s == 0 ? p.value_first : p.value_rest + (size_t)(s - 1) * p.value_floats;
            v += weight[i] * value[(size_t)(i / n) * (size_t)p.hidden + (size_t)j];
        }
        p.y[(size_t)b * (size_t)p.ldy + (size_t)j] = v;
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
    launch(stream, kernel, p, grid, dim3(WARP, SLICES), 0, "product", issue_product);
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
