/* bodies.cuh: what a kernel does for one of its blocks, plain: right before fast. A team of threads
 * does it, which is a block of a launch (kernels.cu) or a part of one of those that do a whole
 * chunk (list.cu); `block` says which of the launch's it is. Every sum has an order that depends
 * on sizes only. The same text is compiled for GPUs by nvcc and for the host by a C++ compiler
 * (emulate/), where threads are fibers that run in any order between two barriers.
 */
#pragma once

#include "activate.h"
#include "kernels.h"
#include "shared.cuh"

#include <float.h>
#include <math.h>

namespace
{

constexpr int WARP = 32, THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;

/* N threads that are all of a block */
template <int N> struct Alone {
    static constexpr int THREADS = N;
    int thread = (int)threadIdx.x;
    __device__ void meet() const { __syncthreads(); }
};

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

/* The sum over all threads of a team, the same in all of them. What any of them wrote to shared
 * memory before is seen by all after. room: a float a warp. */
template <typename Team> __device__ float team_sum(const Team &team, float v, float *room)
{
    v = warp_sum(v);
    team.meet(); /* of the sum before */
    if (team.thread % WARP == 0) {
        room[team.thread / WARP] = v;
    }
    team.meet();
    float sum = 0;
    for (int w = 0; w < Team::THREADS / WARP; w++) {
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

/* of a row of n, by a team: each thread reads its own columns, as many apart as there are threads
 */
template <typename Team>
__device__ Moments team_moments(const Team &team, const float *x, int n, float eps, float *room)
{
    float sum = 0, square = 0;
    TSAD_UNROLL(4)
    for (int i = team.thread; i < n; i += Team::THREADS) {
        sum += x[i];
    }
    float mean = team_sum(team, sum, room) / (float)n;
    TSAD_UNROLL(4)
    for (int i = team.thread; i < n; i += Team::THREADS) {
        square += (x[i] - mean) * (x[i] - mean);
    }
    return {mean, norm_scale(team_sum(team, square, room) / (float)n, eps)};
}

/* the same by a warp, thread `lane` of it */
__device__ Moments warp_moments(const float *x, int n, float eps, int lane)
{
    float sum = 0, square = 0;
    TSAD_UNROLL(8)
    for (int i = lane; i < n; i += WARP) {
        sum += x[i];
    }
    float mean = warp_sum(sum) / (float)n;
    TSAD_UNROLL(8)
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

/* A team of SLICES warps makes WARP columns of ROWS rows. They take slices of the inputs, each
 * thread a column; the slices' sums are added in order. A GPU waits long for what it reads and
 * little for how much that is: each thread reads all of its next inputs and weights before it
 * computes with those that it has, and what is shared it reads four numbers at a time. */
constexpr int ROWS = 16, SLICES = 8, CHUNK = 128, EACH = CHUNK / SLICES;
struct alignas(16) ProductRoom {
    float x[ROWS][CHUNK];
    float part[SLICES][ROWS][WARP];
    Moments moments[ROWS];
};

/* What a thread reads of a chunk of inputs: one of them of every second row, or more; and the
 * weights of its column and its slice. */
template <typename Team> struct Fetched {
    static constexpr int APART = Team::THREADS / CHUNK, N = ROWS / APART;
    float x[N];
    unsigned there; /* a bit each */
    float w[EACH];
};

__device__ int within(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

/* the inputs from k0 on, zero where there are none, another one read in their place; x: the batch's
 */
template <typename Team>
__device__ void fetch_inputs(const Team &team, const tsad_product &p, const float *x, int row,
                             int k0, Fetched<Team> &to)
{
    int n_in = p.taps * p.channels, k = k0 + team.thread % CHUNK, tap = k / p.channels;
    x += within(k - tap * p.channels, p.channels);
    to.there = 0;
    TSAD_UNROLL(16)
    for (int i = 0; i < Fetched<Team>::N; i++) {
        int r = row + team.thread / CHUNK + i * Fetched<Team>::APART;
        int token = r * p.stride + p.first + tap;
        bool there = r < p.rows && k < n_in && token >= 0 && token < p.tokens;
        float v = x[within(token, p.tokens) * p.ldx];
        to.there |= (unsigned)there << i;
        to.x[i] = there ? v : 0;
    }
}

/* four weights of a column from the k-th on, zero where there are none; w: the column's */
template <typename Weight>
__device__ void fetch_four(const tsad_product &p, const Weight *w, int k, float *to)
{
    int n_in = p.taps * p.channels;
    TSAD_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        float v = number(w[within(k + i, n_in) * p.n_out]);
        to[i] = k + i < n_in ? v : 0;
    }
}

/* the inputs to where all of the team read them, normalised */
template <typename Team>
__device__ void share(const Team &team, const tsad_product &p, int k0, const Fetched<Team> &from,
                      ProductRoom &room)
{
    int k = k0 + team.thread % CHUNK;
    bool inside = p.norm.used && k < p.taps * p.channels;
    float scale = inside && p.norm.scale.step ? term(p.norm.scale, k) : 1;
    float move = inside && p.norm.move.step ? term(p.norm.move, k) : 0;
    TSAD_UNROLL(16)
    for (int i = 0; i < Fetched<Team>::N; i++) {
        int r = team.thread / CHUNK + i * Fetched<Team>::APART;
        float v = from.x[i];
        if (p.norm.used && (from.there >> i & 1)) {
            Moments m = room.moments[r];
            v = (v - m.mean) * m.scale * scale + move;
        }
        room.x[r][k - k0] = v;
    }
}

/* sum += four inputs from here on times their weights, of so many rows */
__device__ void multiply_add(const float *w, const float *x, int rows, float (&sum)[ROWS])
{
    constexpr int FEW = 8; /* rows that are left out together */
    TSAD_UNROLL(16)
    for (int first = 0; first < ROWS; first += FEW) {
        if (first < rows) {
            TSAD_UNROLL(16)
            for (int r = first; r < first + FEW; r++) {
                float4 four = *reinterpret_cast<const float4 *>(x + r * CHUNK);
                sum[r] += four.x * w[0];
                sum[r] += four.y * w[1];
                sum[r] += four.z * w[2];
                sum[r] += four.w * w[3];
            }
        }
    }
}

/* z of `block` is the batch */
template <typename Weight, typename Team>
__device__ void product(const Team &team, const tsad_product &p, dim3 block, ProductRoom &room)
{
    unsigned batch = block.z;
    int lane = team.thread % WARP, slice = team.thread / WARP;
    int column = (int)(block.x * WARP) + lane, row = (int)block.y * ROWS;
    int n_in = p.taps * p.channels;
    const float *x = p.x + batch * p.x_batch;
    const Weight *w = static_cast<const Weight *>(p.w) + batch * p.w_batch;
    w += within(column, p.n_out);
    TSAD_GLOBAL(x); /* of a list the compiler can't tell */
    TSAD_GLOBAL(w);
    float sum[ROWS];
    Fetched<Team> next;
    fetch_inputs(team, p, x, row, 0, next);
    TSAD_UNROLL(4)
    for (int j = 0; j < EACH; j += 4) {
        fetch_four(p, w, slice * EACH + j, next.w + j);
    }
    for (int r = slice; p.norm.used && r < ROWS && row + r < p.rows; r += SLICES) {
        const float *own = x + (size_t)(row + r) * (size_t)p.ldx;
        Moments m = warp_moments(own, p.channels, p.norm.eps, lane);
        if (lane == 0) {
            room.moments[r] = m;
        }
    }
    TSAD_UNROLL(16)
    for (int r = 0; r < ROWS; r++) {
        sum[r] = 0;
    }
    for (int k0 = 0; k0 < n_in; k0 += CHUNK) {
        if (k0 > 0 || p.norm.used) {
            team.meet(); /* the inputs before are used up, the moments are there */
        }
        share(team, p, k0, next, room);
        team.meet();
        if (k0 + CHUNK < n_in) {
            fetch_inputs(team, p, x, row, k0 + CHUNK, next);
        }
        TSAD_UNROLL(4)
        for (int j = 0; j < EACH; j += 4) {
            int at = slice * EACH + j;
            if (k0 + at < n_in) {
                multiply_add(next.w + j, room.x[0] + at, p.rows - row, sum);
            }
            if (k0 + at + CHUNK < n_in) {
                fetch_four(p, w, k0 + at + CHUNK, next.w + j);
            }
        }
    }
    TSAD_UNROLL(16)
    for (int r = 0; r < ROWS; r++) {
        room.part[slice][r][lane] = sum[r];
    }
    team.meet();
    for (int r = slice; r < ROWS && row + r < p.rows && column < p.n_out; r += SLICES) {
        float v = p.bias ? p.bias[column] : 0;
        for (int s = 0; s < SLICES; s++) {
            v += room.part[s][r][lane];
        }
        finish(p, batch, row + r, column, v);
    }
}

/* ---- norms ------------------------------------------------------------------------------- */

/* a block a row */
template <typename Team>
__device__ void layernorm(const Team &team, const tsad_layernorm &p, dim3 block, float *room)
{
    const float *x = p.x + block.x * (size_t)p.ldx;
    float *y = p.y + block.x * (size_t)p.ldy;
    Moments m = team_moments(team, x, p.channels, p.norm.eps, room);
    for (int i = team.thread; i < p.channels; i += Team::THREADS) {
        y[i] = normalised(x[i], m, p.norm, i);
    }
}

/* a block a group: some channels of all rows */
template <typename Team>
__device__ void groupnorm(const Team &team, const tsad_groupnorm &p, dim3 block, float *room)
{
    int n = p.channels / p.groups, first = (int)block.x * n, all = p.rows * n;
    float sum = 0, square = 0;
    TSAD_UNROLL(8)
    for (int i = team.thread; i < all; i += Team::THREADS) {
        sum += p.x[(size_t)(i / n) * (size_t)p.ldx + (size_t)(first + i % n)];
    }
    float mean = team_sum(team, sum, room) / (float)all;
    TSAD_UNROLL(8)
    for (int i = team.thread; i < all; i += Team::THREADS) {
        float v = p.x[(size_t)(i / n) * (size_t)p.ldx + (size_t)(first + i % n)] - mean;
        square += v * v;
    }
    float scale = norm_scale(team_sum(team, square, room) / (float)all, 1e-5f);
    TSAD_UNROLL(8)
    for (int i = team.thread; i < all; i += Team::THREADS) {
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
        TSAD_UNROLL(16)
        for (int i = 0; i < n; i++) {
            sum += a[i] * b[i];
        }
        return sum;
    }
    TSAD_UNROLL(8)
    for (int i = 0, half = n / 2; i < half; i++) {
        float ca = turn_a[i], sa = turn_a[i + half], cb = turn_b[i], sb = turn_b[i + half];
        sum += (a[i] * ca - a[i + half] * sa) * (b[i] * cb - b[i + half] * sb);
        sum += (a[i + half] * ca + a[i] * sa) * (b[i + half] * cb + b[i] * sb);
    }
    return sum;
}

/* a block a token and head; shared: a weight a token */
template <typename Team>
__device__ void attention(const Team &team, const tsad_attention &p, dim3 block, float *weight,
                          float *room)
{
    int t = (int)block.x, h = (int)block.y, width = p.heads * p.head_dim;
    int n = p.causal ? t + 1 : p.tokens;
    const float *q = p.qkv + (size_t)t * (size_t)p.ld + (size_t)(h * p.head_dim);
    const float *keys = p.qkv + (size_t)(width + h * p.head_dim), *values = keys + width;
    float sum = 0, top;
    for (int u = team.thread; u < n; u += Team::THREADS) {
        const float *own = p.turns ? p.turns + (size_t)t * (size_t)p.head_dim : NULL;
        const float *other = p.turns ? p.turns + (size_t)u * (size_t)p.head_dim : NULL;
        weight[u] = dot(q, own, keys + (size_t)u * (size_t)p.ld, other, p.head_dim);
    }
    team.meet();
    top = weight[0];
    for (int u = 1; u < n; u++) {
        top = fmaxf(top, weight[u]);
    }
    team.meet(); /* before the weights are changed */
    for (int u = team.thread; u < n; u += Team::THREADS) {
        weight[u] = expf(weight[u] - top);
        sum += weight[u];
    }
    sum = team_sum(team, sum, room); /* and all weights are there */
    for (int j = team.thread; j < p.head_dim; j += Team::THREADS) {
        float v = 0;
        TSAD_UNROLL(8)
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
template <typename Team>
__device__ void cross_attention(const Team &team, const tsad_cross_attention &p, dim3 block,
                                float *weight, float *room)
{
    int t = (int)block.x, lane = team.thread % WARP;
    int n = p.causal && t + 2 < p.n_memory ? t + 2 : p.n_memory;
    const float *x = p.x + (size_t)t * (size_t)p.ldx;
    Moments m = {0, 1};
    if (p.norm.used) {
        m = team_moments(team, x, p.width, p.norm.eps, room);
    }
    for (int i = team.thread / WARP; i < p.heads * n; i += Team::THREADS / WARP) {
        int h = i / n;
        const float *token = token_of(p, i % n), *key = token + (size_t)h * (size_t)p.width;
        float sum = 0;
        TSAD_UNROLL(8)
        for (int j = lane; j < p.width; j += WARP) {
            sum += (p.norm.used ? normalised(x[j], m, p.norm, j) : x[j]) * key[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            weight[i] = sum + token[p.shift + (size_t)h];
        }
    }
    team.meet();
    for (int h = team.thread; h < p.heads; h += Team::THREADS) {
        softmax(weight + h * n, n);
    }
    team.meet();
    for (int j = team.thread; j < p.width; j += Team::THREADS) {
        float v = p.bias[j];
        for (int h = 0; h < p.heads; h++) {
            size_t at = p.value + (size_t)h * (size_t)p.width + (size_t)j;
            TSAD_UNROLL(8)
            for (int s = 0; s < n; s++) {
                v += weight[h * n + s] * token_of(p, s)[at];
            }
        }
        deliver(p.to, (size_t)t * (size_t)p.to.ld + (size_t)j, j, v);
    }
}

/* ---- a thread a number ------------------------------------------------------------------- */

/* Column c of a row; `at` is where that is in each source. Where they are is read of several before
 * any of them is, and all of these before they are added, in order. */
__device__ float sum_of(const tsad_sum &p, size_t at, int c)
{
    constexpr int SEVERAL = 8;
    TSAD_GLOBAL(p.base);
    float sum = p.source ? 0 : p.base[at];
    for (int first = 0; p.source && first < p.n; first += SEVERAL) {
        tsad_reused source[SEVERAL];
        float v[SEVERAL];
        TSAD_UNROLL(8)
        for (int i = 0; i < SEVERAL; i++) {
            source[i] = p.source[first + i < p.n ? first + i : first];
        }
        TSAD_UNROLL(8)
        for (int i = 0; i < SEVERAL; i++) {
            v[i] = source[i].count * p.base[(size_t)source[i].offset + at];
            v[i] = source[i].gate < 0 ? v[i] : v[i] * term(p.terms, source[i].gate + c);
        }
        TSAD_UNROLL(8)
        for (int i = 0; i < SEVERAL; i++) {
            sum = first + i < p.n ? sum + v[i] : sum;
        }
    }
    if (p.kept) {
        p.kept[at] = sum;
    }
    return sum;
}

template <typename Team>
__device__ void addition(const Team &team, const tsad_addition &p, dim3 block)
{
    int i = (int)(block.x * Team::THREADS) + team.thread, c = i % p.channels;
    if (i >= p.rows * p.channels) {
        return;
    }
    size_t at = (size_t)(i / p.channels) * (size_t)p.to.ld + (size_t)c;
    deliver(p.to, at, c, sum_of(p.sum, at, c));
}

template <typename Team> __device__ void copy(const Team &team, const tsad_copy &p, dim3 block)
{
    int i = (int)(block.x * Team::THREADS) + team.thread, t = i / p.channels, c = i % p.channels;
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

template <typename Team> __device__ void update(const Team &team, const tsad_update &p, dim3 block)
{
    int i = (int)(block.x * Team::THREADS) + team.thread, t = i / p.channels, c = i % p.channels;
    if (t < p.rows) {
        updated(p, t, c, p.e[(size_t)t * (size_t)p.ld + (size_t)c]);
    }
}

/* a block a token; shared: its row, then its output, which becomes the next sample */
template <typename Team>
__device__ void tail(const Team &team, const tsad_tail &p, dim3 block, float *row, float *room)
{
    int t = (int)block.x, lane = team.thread % WARP, actions = p.update.channels;
    float *sample = row + p.channels;
    for (int i = team.thread; i < p.channels; i += Team::THREADS) {
        float x = p.x[(size_t)t * (size_t)p.ldx + (size_t)i];
        size_t at = (size_t)t * (size_t)p.sum.ld + (size_t)i;
        row[i] = p.sum.n ? x + sum_of(p.sum, at, i) : x;
    }
    if (p.norm.used) { /* each thread reads and writes its own columns */
        Moments m = team_moments(team, row, p.channels, p.norm.eps, room);
        for (int i = team.thread; i < p.channels; i += Team::THREADS) {
            row[i] = normalised(row[i], m, p.norm, i);
        }
    }
    team.meet();
    for (int o = team.thread / WARP; o < actions; o += Team::THREADS / WARP) {
        float sum = 0;
        TSAD_UNROLL(8)
        for (int i = lane; i < p.channels; i += WARP) {
            sum += row[i] * weight_at(p.w, p.w_precision, (size_t)(i * actions + o));
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            sample[o] = sum + p.bias[o];
        }
    }
    team.meet();
    for (int o = team.thread; o < actions; o += Team::THREADS) {
        sample[o] = updated(p.update, t, o, sample[o]);
    }
    team.meet();
    for (int j = team.thread; p.v && j < p.n_next; j += Team::THREADS) {
        float v = p.v_bias[j] + (p.table ? p.table[(size_t)(t * p.n_next + j)] : 0);
        TSAD_UNROLL(8)
        for (int o = 0; o < actions; o++) {
            v += sample[o] * weight_at(p.v, p.v_precision, (size_t)(o * p.n_next + j));
        }
        p.y[(size_t)t * (size_t)p.ldy + (size_t)j] = v;
    }
}

/* ---- the pruner -------------------------------------------------------------------------- */

/* a block a row of y; shared: a weight a head and token */
template <typename Team>
__device__ void prune_query(const Team &team, const tsad_prune_query &p, dim3 block, float *weight)
{
    int b = (int)block.x, n = p.n_memory;
    for (int h = team.thread; h < p.heads; h += Team::THREADS) {
        for (int s = 0; s < n; s++) {
            const float *score =
                s == 0 ? p.score_first : p.score_rest + (size_t)(s - 1) * p.score_floats;
            weight[h * n + s] = score[b * p.heads + h];
        }
        softmax(weight + h * n, n);
    }
    team.meet();
    for (int j = team.thread; j < p.hidden; j += Team::THREADS) {
        float v = p.token[(size_t)b * (size_t)p.hidden + (size_t)j];
        for (int h = 0; h < p.heads; h++) {
            size_t at = (size_t)h * (size_t)p.hidden + (size_t)j;
            TSAD_UNROLL(8)
            for (int s = 0; s < n; s++) {
                const float *value =
                    s == 0 ? p.value_first : p.value_rest + (size_t)(s - 1) * p.value_floats;
                v += weight[h * n + s] * value[at];
            }
        }
        p.y[(size_t)b * (size_t)p.ldy + (size_t)j] = v;
    }
}

} // namespace
