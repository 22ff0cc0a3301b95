/* audit.c: what a computed branch differs by from the value that it replaces in its slot. */
#include "cpu.h"

enum { PIECE = TSAD_LANE }; /* as threads share a branch: each piece is summed by one of them */

/* in units of 2^-BITS; what a chunk adds up stays within 64 bits */
static int64_t units(float x)
{
    const float most = 65536;
    return (int64_t)((x < most ? x : most) * (float)(1 << TSAD_AUDIT_BITS) + 0.5F);
}

static void add(int64_t *to, int64_t sum) { __atomic_fetch_add(to, sum, __ATOMIC_RELAXED); }

/* in the order of the kernels' `finish`, whatever the number of threads made of the parts */
static inline float sum_of(const float *const *group, int n, size_t i)
{
    float sum = group[0][i];
    if (n == 4) {
        return (sum + group[1][i]) + (group[2][i] + group[3][i]);
    }
    for (int g = 1; g < n; g++) {
        sum += group[g][i];
    }
    return sum;
}

void tsad_cpu_audit(const context *c, const tsad_op *op, const float *slot,
                    const float *const *group, int n, size_t from, size_t floats)
{
    tsad_audit *audit = c->run->audit;
    const tsad_node *node = &c->net->nodes[op->node];
    size_t channels = (size_t)c->net->registers[node->out].channels;
    size_t ld = (size_t)tsad_pad((int)channels);
    if (!op->again && audit->known[node->block] != c->row + 1) {
        return; /* there is nothing, or what no cell would take */
    }
    int64_t apart = 0, size = 0;
    for (size_t at = 0; at < floats; at += PIECE) {
        size_t column = (from + at) % ld; /* beside the channels may be anything */
        size_t end = column + PIECE < channels ? PIECE : channels - column;
        float a = 0, s = 0;
        for (size_t i = at; i < at + end; i++) {
            float x = sum_of(group, n, i);
            float d = x - slot[i];
            a += d * d;
            s += x * x;
        }
        apart += units(a);
        size += units(s);
    }
    int kind = op->again ? TSAD_AUDIT_STEP : TSAD_AUDIT_ROLLOUT;
    add(&audit->apart[kind], apart);
    add(&audit->size[kind], size);
}
