/* emulate.cpp: see cuda_runtime.h. */
#include "cuda_runtime.h"

#include "../device.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LEAVE(fiber, to)                                                                           \
    __sanitizer_start_switch_fiber(&(fiber)->fake, (to)->stack, (to)->stack_bytes)
#define ARRIVE(fiber, from)                                                                        \
    __sanitizer_finish_switch_fiber((fiber)->fake, &(from)->stack, &(from)->stack_bytes)
#else
#define LEAVE(fiber, to) ((void)0)
#define ARRIVE(fiber, from) ((void)0)
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace
{

constexpr size_t PAGE = 4096, STACK = 64 * 1024, GUARD = 64;
constexpr int POISON = 0xff; /* four of these bytes are a NaN */

/* TSAD_EMULATE_COUNT: what is asked for is counted, and nothing of it done; all numbers are 0 */
bool only_counts()
{
    static const bool only = getenv("TSAD_EMULATE_COUNT") != nullptr;
    return only;
}

constexpr unsigned WARP = 32, BARRIERS = 16;

uint64_t next_random()
{
    static uint64_t state = 0;
    if (state == 0) { /* the first time: it never is again */
        const char *seed = getenv("TSAD_EMULATE_SEED");
        state = 0x9e3779b97f4a7c15u * (1 + strtoull(seed ? seed : "0", nullptr, 10));
    }
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

bool is_poisoned(const char *at, size_t bytes)
{
    static const std::vector<char> poison(PAGE, (char)POISON);
    for (; bytes > PAGE; at += PAGE, bytes -= PAGE) {
        if (memcmp(at, poison.data(), PAGE) != 0) {
            return false;
        }
    }
    return memcmp(at, poison.data(), bytes) == 0;
}

/* ---- a block ----------------------------------------------------------------------------- */

#ifdef __x86_64__
/* What a call keeps is on the fiber's stack, so where that ends is all there is to remember.
 * swapcontext asks the system for the signal mask twice: most of a test's time. */
struct Context {
    void *stack_end = nullptr;
};

extern "C" void tsad_emulate_switch(Context *from, Context *to);
asm(R"(
    .text
    .type tsad_emulate_switch, @function
tsad_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tsad_emulate_switch, .-tsad_emulate_switch
)");

void begin_context(Context *context, char *stack, size_t bytes, void (*entry)())
{
    uintptr_t end = ((uintptr_t)stack + bytes) / 16 * 16;
    void **top = (void **)end - 8; /* six registers, where to return to, and nowhere from there */
    memset(top, 0, 8 * sizeof *top);
    top[6] = (void *)entry;
    context->stack_end = top;
}
#else
struct Context {
    ucontext_t context;
};

void tsad_emulate_switch(Context *from, Context *to) { swapcontext(&from->context, &to->context); }

void begin_context(Context *context, char *stack, size_t bytes, void (*entry)())
{
    getcontext(&context->context);
    context->context.uc_stack.ss_sp = stack;
    context->context.uc_stack.ss_size = bytes;
    makecontext(&context->context, entry, 0);
}
#endif

struct Fiber {
    Context context;
    void *fake = nullptr; /* the address sanitizer's */
    const void *stack = nullptr;
    size_t stack_bytes = 0;
};

struct Barrier {
    unsigned expected = 0, come = 0;
    std::vector<unsigned> waiting; /* threads, where they are not all of some blocks */
};

/* warps of a cluster, by their rank */
struct Ranks {
    uint64_t bits[2] = {0, 0};
    void add(unsigned rank) { bits[rank / 64] |= 1ull << rank % 64; }
    void remove(unsigned rank) { bits[rank / 64] &= ~(1ull << rank % 64); }
    bool none() const { return !(bits[0] | bits[1]); }
    /* the first one from here on, else the first of all; there is one */
    unsigned next(unsigned from) const
    {
        for (unsigned i = from / 64; i < 2; i++) {
            uint64_t left = bits[i] & (i == from / 64 ? ~0ull << from % 64 : ~0ull);
            if (left) {
                return 64 * i + (unsigned)__builtin_ctzll(left);
            }
        }
        return next(0);
    }
};

struct Thread {
    Fiber *fiber = nullptr; /* none: it has not begun */
    unsigned shuffles = 0;
    unsigned lanes = 0; /* what it waits for in a shuffle: 0: nothing */
    float value = 0;    /* what it gives there, and then what it gets */
};

struct Warp {
    unsigned size = 0, rank = 0; /* where it is in the block's order */
    unsigned n_runnable = 0;
    unsigned shuffles = 0, most_shuffles = 0; /* of its threads together, of one */
    unsigned char runnable[WARP] = {};        /* threads of it, in any order */
};

struct Shared {
    unsigned block; /* of the cluster */
    int line;
    size_t bytes;
    std::unique_ptr<char[]> at;
};

/* All of a block, or of a cluster of blocks, while it runs; one at a time in the process. */
struct Block {
    const std::function<void()> *body;
    unsigned cluster = 1;     /* blocks, side by side in x */
    dim3 begins;              /* the first one */
    std::vector<dim3> places; /* of a block's threads */
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned> order; /* warps, the one that runs ahead first */
    Ranks active;                /* warps of this order that have a thread that can go on */
    bool runs_ahead;             /* the first of them goes on, else any */
    std::vector<Fiber *> idle;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<Shared> shared;
    std::vector<std::vector<char>> dynamic; /* of each of the cluster, and GUARD bytes */
    std::vector<Barrier> barriers;          /* BARRIERS of each block, then the cluster's */
    Fiber scheduler, *current_fiber = nullptr, *last_fiber = nullptr;
    unsigned current = 0, own = 0; /* thread, and its block of the cluster */
    unsigned left = 0;
    int first = -1; /* a thread that is to begin */
    const char *fault = nullptr;
};

Block block;

void switch_to(Fiber *to)
{
    Fiber *from = block.current_fiber;
    block.current_fiber = to;
    block.last_fiber = from;
    LEAVE(from, to);
    tsad_emulate_switch(&from->context, &to->context);
    ARRIVE(from, block.last_fiber);
}

void place_thread(unsigned i)
{
    block.current = i;
    block.own = block.cluster == 1 ? 0 : i / (unsigned)block.places.size();
    threadIdx = block.places[i - block.own * (unsigned)block.places.size()];
    blockIdx.x = block.begins.x + block.own;
}

void fiber_main();

void add_fiber()
{
    block.fibers.push_back(std::make_unique<Fiber>());
    block.stacks.push_back(std::make_unique<char[]>(STACK));
    Fiber &fiber = *block.fibers.back();
    fiber.stack = block.stacks.back().get();
    fiber.stack_bytes = STACK;
    begin_context(&fiber.context, block.stacks.back().get(), STACK, fiber_main);
    block.idle.push_back(&fiber);
}

Fiber *idle_fiber()
{
    if (block.idle.empty()) {
        add_fiber();
    }
    Fiber *fiber = block.idle.back();
    block.idle.pop_back();
    return fiber;
}

/* all of a warp can go on */
void release(Warp &warp)
{
    for (unsigned i = 0; i < warp.size; i++) {
        warp.runnable[i] = (unsigned char)i;
    }
    warp.n_runnable = warp.size;
    block.active.add(warp.rank);
}

/* one that waited */
void release(unsigned i)
{
    Warp &warp = block.warps[i / WARP];
    warp.runnable[warp.n_runnable++] = (unsigned char)(i % WARP);
    block.active.add(warp.rank);
}

constexpr const char *LEFT_OUT =
    "threads wait at a barrier or a shuffle that others of the block have left out";

/* A shuffle is of all of a warp, but nobody waits there for more than the one whose value it is. */
void check_shuffles(const Warp &warp)
{
    if (warp.shuffles != warp.size * warp.most_shuffles) {
        block.fault = LEFT_OUT;
    }
}

/* of 32 random bits */
unsigned below(unsigned n, uint64_t bits) { return (unsigned)((uint32_t)bits * (uint64_t)n >> 32); }

/* The next thread, any of any warp, or of the one that is to run ahead; -1: there is none. */
int choose()
{
    if (block.fault || block.active.none()) {
        return -1;
    }
    uint64_t bits = next_random();
    unsigned rank = block.runs_ahead ? 0 : below((unsigned)block.warps.size(), bits >> 32);
    rank = block.active.next(rank);
    unsigned number = block.order[rank];
    Warp &warp = block.warps[number];
    unsigned char &chosen = warp.runnable[below(warp.n_runnable, bits)];
    unsigned i = number * WARP + chosen;
    chosen = warp.runnable[--warp.n_runnable];
    if (warp.n_runnable == 0) {
        block.active.remove(rank);
    }
    return (int)i;
}

void run_fresh(unsigned i)
{
    place_thread(i);
    block.threads[i].fiber = block.current_fiber;
    (*block.body)();
    block.left--;
}

void fiber_main()
{
    ARRIVE(block.current_fiber, block.last_fiber);
    for (;;) { /* new threads one after the other, until one that waits is to go on */
        int i = block.first >= 0 ? block.first : choose();
        block.first = -1;
        if (i >= 0 && !block.threads[(unsigned)i].fiber) {
            run_fresh((unsigned)i);
            continue;
        }
        block.idle.push_back(block.current_fiber);
        switch_to(i < 0 ? &block.scheduler : block.threads[(unsigned)i].fiber);
    }
}

/* the current thread waits */
void pause()
{
    unsigned own = block.current;
    int i = choose();
    if (i == (int)own) {
        return;
    }
    if (i < 0) {
        switch_to(&block.scheduler);
    } else if (Fiber *fiber = block.threads[(unsigned)i].fiber) {
        switch_to(fiber);
    } else {
        block.first = i;
        switch_to(idle_fiber());
    }
    place_thread(own);
}

const char *check_shared()
{
    for (const Shared &array : block.shared) {
        if (!is_poisoned(array.at.get() + array.bytes, GUARD)) {
            return "a write past the end of shared memory";
        }
    }
    for (const std::vector<char> &own : block.dynamic) {
        if (!is_poisoned(own.data() + own.size() - GUARD, GUARD)) {
            return "a write past the end of dynamic shared memory";
        }
    }
    return nullptr;
}

/* what is the same for all blocks of a launch */
void begin_launch(const std::function<void()> &body, dim3 shape, size_t shared, unsigned cluster)
{
    unsigned n = shape.x * shape.y * shape.z;
    block.body = &body;
    block.places.resize(n);
    for (unsigned i = 0; i < n; i++) {
        block.places[i] = dim3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
    }
    block.cluster = cluster;
    block.dynamic.assign(cluster, std::vector<char>(shared + GUARD));
    block.shared.clear(); /* its lines are another kernel's */
}

/* In every other block warps run as far ahead as they can: threads that are all equally slow hide
 * barriers that are missing. */
void begin_warps(unsigned n)
{
    block.warps.assign((n + WARP - 1) / WARP, Warp());
    block.order.resize(block.warps.size());
    block.runs_ahead = next_random() % 2 != 0;
    for (unsigned i = 0; i < block.order.size(); i++) {
        block.order[i] = i;
        std::swap(block.order[i], block.order[next_random() % (i + 1)]);
    }
    for (unsigned i = 0; i < block.order.size(); i++) {
        Warp &warp = block.warps[block.order[i]];
        warp.rank = i;
        warp.size = std::min(WARP, n - block.order[i] * WARP);
        release(warp);
    }
}

/* why it failed; NULL: it did not */
const char *run_block()
{
    unsigned n = (unsigned)block.places.size() * block.cluster;
    block.threads.assign(n, Thread());
    block.active = Ranks();
    block.barriers.assign(BARRIERS * block.cluster + 1, Barrier());
    begin_warps(n);
    for (const Shared &array : block.shared) {
        memset(array.at.get(), POISON, array.bytes + GUARD);
    }
    for (std::vector<char> &own : block.dynamic) {
        memset(own.data(), POISON, own.size());
    }
    block.left = n;
    block.first = -1;
    block.fault = nullptr;
    block.current_fiber = &block.scheduler;
    switch_to(idle_fiber());
    if (block.fault || block.left > 0) {
        /* threads that wait keep their fibers: these are not used again */
        block.idle.clear();
        return block.fault ? block.fault : LEFT_OUT;
    }
    for (const Warp &warp : block.warps) {
        check_shuffles(warp);
    }
    return block.fault ? block.fault : check_shared();
}

/* ---- memory ------------------------------------------------------------------------------ */

/* mapped with a page before and after that nobody may touch; the rest is open while work is done */
struct Allocation {
    char *at;
    size_t bytes;
};

std::recursive_mutex everything;
std::vector<Allocation> allocations;
std::vector<Allocation> guards; /* of arrays within them */
std::vector<Allocation> pinned; /* of the host */
char message[256] = "no error";

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

void protect(int access)
{
    for (const Allocation &a : allocations) {
        mprotect(a.at, pages(a.bytes), access);
    }
}

/* an array that was written beyond its end; NULL: none */
const char *check_guards()
{
    for (const Allocation &g : guards) {
        if (!is_poisoned(g.at, g.bytes)) {
            memset(g.at, POISON, g.bytes);
            return "a write past the end of an array";
        }
    }
    return nullptr;
}

} // namespace

/* ---- streams ------------------------------------------------------------------------------ */

typedef std::deque<std::function<const char *()>> Work;

struct emulated_stream {
    uint64_t number; /* no other stream ever has it */
    Work queue;
    size_t done = 0; /* how much of all that was asked for */
    bool captures = false, spoiled = false;
    Work captured;
    const char *fault = nullptr; /* of what was done of it while others waited */
    emulated_stream();
    ~emulated_stream();
};

struct emulated_graph {
    std::shared_ptr<const Work> work;
};

struct emulated_exec {
    std::shared_ptr<const Work> work;
};

struct emulated_event {
    uint64_t stream = 0;
    size_t asked = 0; /* of that stream, when it was recorded */
};

static std::map<uint64_t, emulated_stream *> &live_streams()
{
    static std::map<uint64_t, emulated_stream *> live;
    return live;
}

emulated_stream::emulated_stream()
{
    static uint64_t made;
    std::lock_guard<std::recursive_mutex> lock(everything);
    live_streams()[number = ++made] = this;
}

emulated_stream::~emulated_stream()
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    live_streams().erase(number);
}

namespace
{

/* the stream of all libraries that name none */
cudaStream_t stream_of(cudaStream_t handle)
{
    static emulated_stream standard;
    return (uintptr_t)handle == 1 ? &standard : handle;
}

/* until so much of it is done; the first fault */
const char *run_work(emulated_stream *stream, size_t asked)
{
    while (stream->done < asked && !stream->queue.empty()) {
        auto what = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        const char *fault = what();
        fault = fault ? fault : check_guards();
        if (fault) {
            stream->done += stream->queue.size();
            stream->queue.clear();
            return fault;
        }
    }
    return nullptr;
}

/* TSAD_EMULATE_QUEUE, or what tsad_emulate_queue said: so much of a stream waits at most, 0: all.
 * Drivers are said to hold 1024 launches; a graph is one. */
long longest = -1;

size_t longest_queue()
{
    if (longest < 0) {
        const char *set = getenv("TSAD_EMULATE_QUEUE");
        longest = set ? strtol(set, nullptr, 10) : 1024;
    }
    return (size_t)longest;
}

/* Some of a stream's work, any number of pieces, and what other streams come to meanwhile, in any
 * order that the events allow. */
void make_room(emulated_stream *stream)
{
    size_t until = stream->done + 1 + next_random() % stream->queue.size();
    protect(PROT_READ | PROT_WRITE);
    while (stream->done < until) {
        auto any = std::next(live_streams().begin(), (long)(next_random() % live_streams().size()));
        emulated_stream *next = next_random() % 2 ? stream : any->second;
        const char *fault = run_work(next, next->done + 1);
        next->fault = next->fault ? next->fault : fault;
    }
    protect(PROT_NONE);
}

/* A launch that finds the queue full blocks until there is room, and work may begin as soon as it
 * was asked for: what is too much has come before this returns. */
void ask(cudaStream_t handle, std::function<const char *()> what)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    cudaStream_t stream = stream_of(handle);
    if (stream->captures) {
        stream->captured.push_back(std::move(what));
        return;
    }
    stream->queue.push_back(std::move(what));
    if (longest_queue() && stream->queue.size() > longest_queue() && !only_counts()) {
        make_room(stream);
    }
}

cudaError_t drain(cudaStream_t stream)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (stream->captures) {
        snprintf(message, sizeof message, "emulated GPU: a wait within a capture");
        return cudaErrorStreamCaptureUnsupported;
    }
    if (only_counts()) {
        stream->done += stream->queue.size();
        stream->queue.clear();
        return cudaSuccess;
    }
    protect(PROT_READ | PROT_WRITE);
    const char *fault = run_work(stream, stream->done + stream->queue.size());
    protect(PROT_NONE);
    fault = stream->fault ? stream->fault : fault;
    stream->fault = nullptr;
    if (fault) {
        snprintf(message, sizeof message, "emulated GPU: %s", fault);
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

} // namespace

void tsad_device_guard(void *from, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    guards.push_back({static_cast<char *>(from), bytes});
}

/* ---- the runtime ------------------------------------------------------------------------- */

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

/* Of each thread. Another one than 0 makes nothing and launches nothing. */
static thread_local int current_device;

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    current_device = device;
    return cudaSuccess;
}

static int capability = 9; /* which has clusters */

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int)
{
    *properties = {};
    properties->major = capability;
    snprintf(properties->name, sizeof properties->name, "no GPU: emulated on the CPU, for tests");
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorInvalidDevice  ? "emulated GPU: the thread's own is another one"
                                              : message;
}

/* Of each thread. Who asks for memory, a stream or an event meanwhile spoils the capture, which is
 * more than CUDA refuses. */
static thread_local cudaStream_t capturing;

/* tsad_emulate_fail: so many more of what takes memory, then one that there is none for */
static std::atomic<long> until_full{-1}, until_copy_fails{-1}, live_events;

/* why there is none of what takes memory */
static cudaError_t refusal()
{
    bool full = until_full >= 0 && until_full-- == 0;
    if (capturing) {
        capturing->spoiled = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    return current_device != 0 ? cudaErrorInvalidDevice
           : full              ? cudaErrorMemoryAllocation
                               : cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    size_t size = pages(bytes) + 2 * PAGE;
    void *base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        return cudaErrorMemoryAllocation;
    }
    char *at = static_cast<char *>(base) + PAGE;
    memset(at, POISON, pages(bytes));
    mprotect(base, size, PROT_NONE);
    allocations.push_back({at, bytes});
    *out = at;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    char *at = static_cast<char *>(memory);
    for (size_t i = 0; at && i < allocations.size(); i++) {
        if (allocations[i].at == at) {
            size_t size = pages(allocations[i].bytes);
            guards.erase(
                std::remove_if(guards.begin(), guards.end(),
                               [&](const Allocation &g) { return g.at >= at && g.at < at + size; }),
                guards.end());
            munmap(at - PAGE, size + 2 * PAGE);
            allocations.erase(allocations.begin() + (long)i);
            return cudaSuccess;
        }
    }
    return at ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    *out = malloc(bytes);
    if (!*out) {
        return cudaErrorMemoryAllocation;
    }
    memset(*out, only_counts() ? 0 : POISON, bytes);
    std::lock_guard<std::recursive_mutex> lock(everything);
    pinned.push_back({static_cast<char *>(*out), bytes});
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *memory)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    pinned.erase(std::remove_if(pinned.begin(), pinned.end(),
                                [&](const Allocation &a) { return a.at == memory; }),
                 pinned.end());
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    *out = new emulated_stream();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return drain(stream_of(stream)); }

static bool is_pinned(const void *memory)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    for (const Allocation &a : pinned) {
        if (memory >= a.at && memory < a.at + a.bytes) {
            return true;
        }
    }
    return false;
}

/* Pinned memory is read when the copy's turn comes, other memory now. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    if (kind == cudaMemcpyHostToDevice && until_copy_fails >= 0 && until_copy_fails-- == 0) {
        snprintf(message, sizeof message, "emulated GPU: a copy that fails");
        return cudaErrorUnknown;
    }
    if (kind == cudaMemcpyHostToDevice && !is_pinned(from)) {
        const char *begin = static_cast<const char *>(from);
        std::vector<char> copy(begin, begin + bytes);
        ask(stream, [to, copy]() -> const char * {
            memcpy(to, copy.data(), copy.size());
            return nullptr;
        });
        return cudaSuccess;
    }
    ask(stream, [=]() -> const char * {
        memcpy(to, from, bytes);
        return nullptr;
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream)
{
    ask(stream, [=]() -> const char * {
        memset(at, value, bytes);
        return nullptr;
    });
    return cudaSuccess;
}

/* ---- for tests: memory and streams of a caller, who is another library ------------------------
 */

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void *tsad_emulate_memory(size_t bytes);
EXPORTED int tsad_emulate_free(void *memory);
EXPORTED void *tsad_emulate_stream();
EXPORTED void tsad_emulate_write(void *stream, void *device, const void *host, size_t bytes);
EXPORTED int tsad_emulate_read(void *stream, void *host, const void *device, size_t bytes);
EXPORTED size_t tsad_emulate_waiting(void *stream);
EXPORTED size_t tsad_emulate_pending();      /* of all streams */
EXPORTED long tsad_emulate_queue(long most); /* TSAD_EMULATE_QUEUE from now on; what it was */
EXPORTED void tsad_emulate_capture(void *stream, int captures);
EXPORTED int tsad_emulate_device(int device);     /* of this thread; which it was */
EXPORTED long tsad_emulate_fail(long after);      /* so many; -1: nothing fails; what was left */
EXPORTED long tsad_emulate_fail_copy(long after); /* of copies from the host, the same */
EXPORTED long tsad_emulate_living();              /* arrays, streams and events */
EXPORTED int tsad_emulate_major(int major);       /* compute capability from now on; what it was */

int tsad_emulate_device(int device)
{
    std::swap(device, current_device);
    return device;
}

int tsad_emulate_major(int major)
{
    std::swap(major, capability);
    return major;
}

void *tsad_emulate_memory(size_t bytes)
{
    void *memory = nullptr;
    int before = tsad_emulate_device(0);
    cudaMalloc(&memory, bytes);
    current_device = before;
    return memory;
}

int tsad_emulate_free(void *memory) { return cudaFree(memory); }

void *tsad_emulate_stream() { return new emulated_stream(); } /* for good */

void tsad_emulate_write(void *stream, void *device, const void *host, size_t bytes)
{
    cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream);
}

int tsad_emulate_read(void *stream, void *host, const void *device, size_t bytes)
{
    cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream);
    return cudaStreamSynchronize((cudaStream_t)stream);
}

size_t tsad_emulate_waiting(void *stream)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    return stream_of((cudaStream_t)stream)->queue.size();
}

size_t tsad_emulate_pending()
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    size_t pending = 0;
    for (const auto &[number, stream] : live_streams()) {
        pending += stream->queue.size();
    }
    return pending;
}

long tsad_emulate_queue(long most)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    long before = (long)longest_queue();
    longest = most;
    return before;
}

void tsad_emulate_capture(void *stream, int captures)
{
    stream_of((cudaStream_t)stream)->captures = captures != 0;
}

long tsad_emulate_fail(long after) { return until_full.exchange(after); }

long tsad_emulate_fail_copy(long after) { return until_copy_fails.exchange(after); }

long tsad_emulate_living()
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    return (long)(allocations.size() + pinned.size() + live_streams().size()) + live_events;
}

/* time does not pass */
cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    *out = new emulated_event();
    live_events++;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    live_events--;
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return cudaEventCreate(out); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle)
{
    const emulated_stream *stream = stream_of(handle);
    if (current_device != 0) { /* whose the standard stream is */
        return cudaErrorInvalidDevice;
    }
    std::lock_guard<std::recursive_mutex> lock(everything);
    event->stream = stream->number;
    event->asked = stream->done + stream->queue.size();
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    emulated_event recorded = *event;
    ask(stream, [recorded]() -> const char * {
        auto found = live_streams().find(recorded.stream);
        if (found == live_streams().end()) {
            return nullptr;
        }
        const char *fault = run_work(found->second, recorded.asked);
        return fault ? fault : found->second->fault;
    });
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    if (current_device != 0) {
        return cudaErrorInvalidDevice;
    }
    *status =
        stream_of(stream)->captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t)
{
    *milliseconds = 0;
    return cudaSuccess;
}

/* ---- graphs ------------------------------------------------------------------------------ */

static std::atomic<long> live_graphs;

extern "C" __attribute__((visibility("default"))) long tsad_emulate_graphs();
long tsad_emulate_graphs() { return live_graphs; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    if (stream->captures) {
        return cudaErrorStreamCaptureUnsupported;
    }
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    capturing = stream;
    stream->captures = true;
    stream->spoiled = false;
    stream->captured.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    if (!stream->captures) {
        return cudaErrorInvalidValue;
    }
    capturing = nullptr;
    stream->captures = false;
    if (stream->spoiled) {
        stream->captured.clear();
        snprintf(message, sizeof message, "emulated GPU: a capture that was spoiled");
        return cudaErrorStreamCaptureInvalidated;
    }
    *out = new emulated_graph{std::make_shared<Work>(std::move(stream->captured))};
    stream->captured.clear();
    live_graphs++;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                          unsigned long long)
{
    if (cudaError_t why = refusal(); why != cudaSuccess) {
        return why;
    }
    *out = new emulated_exec{std::make_shared<const Work>(*graph->work)};
    live_graphs++;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    ask(stream, [kept = std::weak_ptr<const Work>(exec->work)]() -> const char * {
        const auto work = kept.lock();
        const char *fault = nullptr;
        if (!work) {
            return "a graph that was freed before it was done";
        }
        for (size_t i = 0; i < work->size() && !fault; i++) {
            fault = (*work)[i]();
            fault = fault ? fault : check_guards();
        }
        return fault;
    });
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    live_graphs--;
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    live_graphs--;
    delete exec;
    return cudaSuccess;
}

/* ---- what the stand-in for cuBLAS calls ----------------------------------------------------- */

void emulate::ask(cudaStream_t stream, std::function<const char *()> what)
{
    ::ask(stream, std::move(what));
}

bool emulate::holds(const void *at, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    const char *from = static_cast<const char *>(at), *to = from + bytes;
    bool inside = false;
    for (const Allocation &a : allocations) {
        inside |= from >= a.at && to <= a.at + a.bytes;
    }
    for (const Allocation &g : guards) {
        inside &= to <= g.at || from >= g.at + g.bytes;
    }
    return inside;
}

bool emulate::spoil_capture(cudaStream_t stream)
{
    stream_of(stream)->spoiled = true;
    return stream_of(stream)->captures;
}

/* ---- what kernels call -------------------------------------------------------------------- */

/* What a block may share when its kernel has asked for it; bytes, of each kernel that has. Who asks
 * for less than before takes it from a thread that may be about to launch; within a capture, which
 * may load the kernel, it spoils that. */
static constexpr size_t ASKED_SHARED = 99 * 1024;
static std::map<const void *, size_t> &shared_limits()
{
    static std::map<const void *, size_t> limits;
    return limits;
}

cudaError_t emulate::allow_shared(const void *kernel, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (capturing) {
        capturing->spoiled = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    if (bytes > ASKED_SHARED || bytes < shared_limits()[kernel]) {
        snprintf(message, sizeof message, "emulated GPU: shared memory that is not to be had");
        return cudaErrorInvalidValue;
    }
    shared_limits()[kernel] = bytes;
    return cudaSuccess;
}

static bool takes(const void *kernel, dim3 grid, unsigned threads, size_t shared, unsigned cluster)
{
    std::lock_guard<std::recursive_mutex> lock(everything);
    size_t most = std::max((size_t)48 * 1024, shared_limits()[kernel]);
    return threads > 0 && threads <= 1024 && grid.x * grid.y * grid.z > 0 && grid.y <= 65535 &&
           grid.z <= 65535 && shared <= most && cluster >= 1 && cluster <= 8 &&
           grid.x % cluster == 0 && (cluster == 1 || capability >= 9) &&
           (cluster == 1 || threads % WARP == 0) &&
           (threads + WARP - 1) / WARP * cluster <= 128; /* of Ranks */
}

cudaError_t emulate::launch(const void *kernel, std::function<void()> thread, dim3 grid, dim3 shape,
                            size_t shared, cudaStream_t stream, unsigned cluster)
{
    if (current_device != 0) {
        return cudaErrorInvalidDevice;
    }
    if (!takes(kernel, grid, shape.x * shape.y * shape.z, shared, cluster)) {
        snprintf(message, sizeof message, "emulated GPU: a launch that no GPU takes");
        return cudaErrorInvalidValue;
    }
    unsigned clusters = grid.x * grid.y * grid.z / cluster;
    ask(stream, [=]() -> const char * {
        std::vector<unsigned> order(clusters);
        for (unsigned i = 0; i < clusters; i++) {
            order[i] = i;
            std::swap(order[i], order[next_random() % (i + 1)]);
        }
        begin_launch(thread, shape, shared, cluster);
        gridDim = grid;
        blockDim = shape;
        for (unsigned c : order) {
            unsigned i = c * cluster;
            block.begins = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
            blockIdx = block.begins;
            const char *fault = run_block();
            if (fault) {
                return fault;
            }
        }
        return nullptr;
    });
    return cudaSuccess;
}

/* Whether the current thread is the last of so many that come there; if not, it is to wait. */
static bool is_last(Barrier &barrier, unsigned expected)
{
    if (barrier.come == 0) {
        barrier.expected = expected;
    }
    if (barrier.expected != expected) {
        block.fault = "threads at a barrier that expect different numbers of them";
    }
    bool last = ++barrier.come == expected;
    barrier.come = last ? 0 : barrier.come;
    return last;
}

/* all warps from here on, of threads that are all at a barrier */
static void go_on(size_t first, size_t n)
{
    for (size_t i = first; i < first + n; i++) {
        check_shuffles(block.warps[i]);
        release(block.warps[i]);
    }
}

void __syncthreads()
{
    size_t warps = block.warps.size() / block.cluster;
    if (is_last(block.barriers[BARRIERS * block.own], (unsigned)block.places.size())) {
        go_on(warps * block.own, warps);
    }
    pause();
}

void emulate::sync_part(int number, int threads)
{
    if (number < 1 || number >= (int)BARRIERS || threads % (int)WARP != 0) {
        block.fault = "a barrier that no GPU has";
        return;
    }
    Barrier &barrier = block.barriers[BARRIERS * block.own + (unsigned)number];
    barrier.waiting.push_back(block.current);
    if (is_last(barrier, (unsigned)threads)) {
        for (unsigned i : barrier.waiting) {
            if (i % WARP == 0) {
                check_shuffles(block.warps[i / WARP]);
            }
            release(i);
        }
        barrier.waiting.clear();
    }
    pause();
}

void emulate::sync_cluster()
{
    if (is_last(block.barriers[BARRIERS * block.cluster], (unsigned)block.threads.size())) {
        go_on(0, block.warps.size());
    }
    pause();
}

float emulate::warp_exchange(float value, unsigned lanes)
{
    unsigned own = block.current, other = own ^ lanes;
    Warp &warp = block.warps[own / WARP];
    Thread &thread = block.threads[own];
    if (lanes == 0 || lanes >= WARP || other >= block.threads.size()) {
        block.fault = "a shuffle from a thread that is not there";
        return NAN;
    }
    warp.shuffles++;
    warp.most_shuffles = std::max(warp.most_shuffles, ++thread.shuffles);
    Thread &partner = block.threads[other];
    if (partner.lanes == lanes && partner.shuffles == thread.shuffles) {
        std::swap(value, partner.value);
        partner.lanes = 0;
        release(other);
        return value;
    }
    thread.value = value;
    thread.lanes = lanes;
    pause();
    return thread.value;
}

void *emulate::shared(int line, size_t bytes)
{
    for (const Shared &array : block.shared) {
        if (array.line == line && array.block == block.own) {
            return array.at.get();
        }
    }
    block.shared.push_back(
        {block.own, line, bytes, std::unique_ptr<char[]>(new char[bytes + GUARD])});
    char *at = block.shared.back().at.get();
    memset(at, POISON, bytes + GUARD);
    return at;
}

float *emulate::dynamic() { return reinterpret_cast<float *>(block.dynamic[block.own].data()); }
