/* kernels.cu: the kernels, plain ones: right before fast. Every sum has an order that depends on
 * sizes only. The same text is compiled for GPUs by nvcc and for the host by a C++ compiler
 * (emulate/), where a block's threads are fibers that run in any order between two barriers.
 */
#include "kernels.h"
#include "activate.h"
#include "shared.cuh"
#include "stream.cuh"

#include <math.h>

namespace
{

constexpr int WARP = 32, THREADS = 128;
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

template <typename Arguments>
void launch(tsad_stream *stream, void (*kernel)(Arguments), Arguments p, dim3 grid, dim3 block,
            size_t floats, const char *name)
{
    void *list[] = {&p};
    tsad_counts.launches++;
    tsad_stream_note(
        stream, cudaLaunchKernel(kernel, grid, block, list, floats * sizeof(float), stream->cuda),
        name);
}

unsigned blocks_of(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

/* ---- matrix product ---------------------------------------------------------------------- */

/* A block makes WARP columns of ROWS rows. Its warps take slices of the inputs, each thread a
 * column; the slices' sums are added in order. */
constexpr int ROWS = 16, SLICES = 8, CHUNK = 128;
typedef float inputs_of_row[CHUNK];
typedef float columns_of_rows[ROWS][WARP];

/* inputs [from, from + CHUNK) of ROWS rows, zero where there are none */
__device__ void fetch_rows(const tsad_product &p, const float *from_x, int row, int from,
                           inputs_of_row *x)
{
    int n_in = p.taps * p.channels;
    for (int i = (int)(threadIdx.y * WARP + threadIdx.x); i < ROWS * CHUNK; i += SLICES * WARP) {
        int r = i / CHUNK, k = from + i % CHUNK, tap = k / p.channels;
        int token = (row + r) * p.stride + p.first + tap;
        bool there = row + r < p.rows && k < n_in && token >= 0 && token < p.tokens;
        x[r][i % CHUNK] =
            there ? from_x[(size_t)token * (size_t)p.ldx + (size_t)(k - tap * p.channels)] : 0;
    }
}

__global__ void __launch_bounds__(WARP *SLICES) product_kernel(tsad_product p)
{
    TSAD_SHARED(inputs_of_row, x, ROWS);
    TSAD_SHARED(columns_of_rows, part, SLICES);
    int column = (int)(blockIdx.x * WARP + threadIdx.x), row = (int)blockIdx.y * ROWS;
    int slice = (int)threadIdx.y, n_in = p.taps * p.channels;
    const float *from = p.x + blockIdx.z * p.x_batch, *w = p.w + blockIdx.z * p.w_batch;
    float sum[ROWS];
    for (int r = 0; r < ROWS; r++) {
        sum[r] = 0;
    }
    for (int k0 = 0; k0 < n_in; k0 += CHUNK) {
        if (k0 > 0) {
            __syncthreads(); /* the inputs before are used up */
        }
        fetch_rows(p, from, row, k0, x);
        __syncthreads();
        int k1 = k0 + (slice + 1) * (CHUNK / SLICES);
        for (int k = k0 + slice * (CHUNK / SLICES); k < k1 && k < n_in && column < p.n_out; k++) {
            float weight = w[(size_t)k * (size_t)p.n_out + (size_t)column];
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
        v = tsad_activate(v, p.activation);
        if (p.table) {
            v += p.table[(size_t)(row + r) * (size_t)p.n_out + (size_t)column];
        }
        size_t at = blockIdx.z * p.y_batch + (size_t)(row + r) * (size_t)p.to.ld;
        deliver(p.to, at + (size_t)(column * p.step), column, v);
    }
}

/* ---- norms ------------------------------------------------------------------------------- */

/* a block a row */
__global__ void __launch_bounds__(THREADS) layernorm_kernel(tsad_layernorm p)
{
    TSAD_SHARED(float, room, THREADS / WARP);
    const float *x = p.x + blockIdx.x * (size_t)p.ldx;
    float *y = p.y + blockIdx.x * (size_t)p.ldy;
    float sum = 0, square = 0;
    for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
        sum += x[i];
    }
    float mean = block_sum(sum, room) / (float)p.channels;
    for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
        square += (x[i] - mean) * (x[i] - mean);
    }
    float scale = norm_scale(block_sum(square, room) / (float)p.channels, p.eps);
    for (int i = (int)threadIdx.x; i < p.channels; i += THREADS) {
        y[i] = modulated((x[i] - mean) * scale, p.scale, p.move, i);
    }
}

/* a block a group: some channels of all rows */
__global__ void __launch_bounds__(THREADS) groupnorm_kernel(tsad_groupnorm p)
{
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

__global__ void __launch_bounds__(THREADS) rotate_kernel(tsad_rotate p)
{
    int half = p.head_dim / 2, pairs = 2 * p.heads * half; /* keys follow queries */
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), t = i / pairs, h = i % pairs / half;
    if (t >= p.tokens) {
        return;
    }
    const float *cosine = p.turns + (size_t)t * (size_t)p.head_dim + (size_t)(i % half);
    float *x = p.qkv + (size_t)t * (size_t)p.ld + (size_t)(h * p.head_dim + i % half);
    float a = x[0], b = x[half], c = cosine[0], s = cosine[half];
    x[0] = a * c - b * s;
    x[half] = b * c + a * s;
}

__device__ float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* a block a token and head; shared: a weight a token */
__global__ void __launch_bounds__(THREADS) attention_kernel(tsad_attention p)
{
    TSAD_DYNAMIC(weight);
    TSAD_SHARED(float, room, THREADS / WARP);
    int t = (int)blockIdx.x, h = (int)blockIdx.y, width = p.heads * p.head_dim;
    int n = p.causal ? t + 1 : p.tokens;
    const float *q = p.qkv + (size_t)t * (size_t)p.ld + (size_t)(h * p.head_dim);
    const float *keys = p.qkv + (size_t)(width + h * p.head_dim), *values = keys + width;
    float sum = 0, top;
    for (int u = (int)threadIdx.x; u < n; u += THREADS) {
        weight[u] = dot(q, keys + (size_t)u * (size_t)p.ld, p.head_dim);
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
__global__ void __launch_bounds__(THREADS) cross_attention_kernel(tsad_cross_attention p)
{
    TSAD_DYNAMIC(weight);
    int t = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    int n = p.causal && t + 2 < p.n_memory ? t + 2 : p.n_memory;
    const float *x = p.x + (size_t)t * (size_t)p.ldx;
    for (int i = (int)threadIdx.x / WARP; i < p.heads * n; i += THREADS / WARP) {
        int h = i / n;
        const float *token = token_of(p, i % n), *key = token + (size_t)h * (size_t)p.width;
        float sum = 0;
        for (int j = lane; j < p.width; j += WARP) {
            sum += x[j] * key[j];
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

__global__ void __launch_bounds__(THREADS) addition_kernel(tsad_addition p)
{
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), c = i % p.channels;
    if (i >= p.rows * p.channels) {
        return;
    }
    size_t at = (size_t)(i / p.channels) * (size_t)p.to.ld + (size_t)c;
    float sum = 0;
    for (int s = 0; s < p.n; s++) {
        sum += p.offset ? p.count[s] * p.base[(size_t)p.offset[s] + at] : p.base[at];
    }
    if (p.kept) {
        p.kept[at] = sum;
    }
    deliver(p.to, at, c, sum);
}

__global__ void __launch_bounds__(THREADS) copy_kernel(tsad_copy p)
{
    int i = (int)(blockIdx.x * THREADS + threadIdx.x), t = i / p.channels, c = i % p.channels;
    if (t >= p.rows) {
        return;
    }
    float v = p.x[(size_t)(t / p.repeat) * (size_t)p.ldx + (size_t)c];
    v = p.table ? v + p.table[i] : v;
    p.y[(size_t)t * (size_t)p.ldy + (size_t)c] = tsad_activate(v, p.activation);
}

__global__ void __launch_bounds__(THREADS) update_kernel(tsad_update p)
{
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= p.rows * p.channels) {
        return;
    }
    const float *t = p.coefficient;
    size_t at = (size_t)(i / p.channels) * (size_t)p.ld + (size_t)(i % p.channels);
    float x0 = t[0] * p.x[at] + t[1] * p.e[at];
    x0 = x0 > t[2] ? t[2] : x0 < -t[2] ? -t[2] : x0;
    /* the range hides nothing: where e is infinite f e is NaN, also if f is 0 */
    float next = t[3] * x0 + t[4] * p.x[at] + t[5] * p.e[at];
    next = p.first ? next : next + t[6] * p.previous[at];
    p.x[at] = p.z ? next + t[7] * p.z[i] : next;
    p.previous[at] = x0;
}

/* ---- the pruner -------------------------------------------------------------------------- */

/* a block a row of y; shared: a weight a head and token */
__global__ void __launch_bounds__(THREADS) prune_query_kernel(tsad_prune_query p)
{
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

void tsad_launch_product(tsad_stream *stream, tsad_product p)
{
    dim3 grid(blocks_of((size_t)p.n_out, WARP), blocks_of((size_t)p.rows, ROWS),
              (unsigned)p.batches);
    launch(stream, product_kernel, p, grid, dim3(WARP, SLICES), 0, "product");
}

void tsad_launch_layernorm(tsad_stream *stream, tsad_layernorm p)
{
    launch(stream, layernorm_kernel, p, (unsigned)p.rows, THREADS, 0, "layernorm");
}

void tsad_launch_groupnorm(tsad_stream *stream, tsad_groupnorm p)
{
    launch(stream, groupnorm_kernel, p, (unsigned)p.groups, THREADS, 0, "groupnorm");
}

void tsad_launch_rotate(tsad_stream *stream, tsad_rotate p)
{
    size_t n = (size_t)p.tokens * (size_t)(p.heads * p.head_dim);
    launch(stream, rotate_kernel, p, blocks_of(n, THREADS), THREADS, 0, "rotate");
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
