/* Threads that share the rows of a product. Python makes them, and each of them calls `work` once: see native.py.

   Work comes in chunks, which whoever is free takes, the thread that computes too: if nobody helps, it does it all.
   A worker that finds nothing to do looks again for a fraction of a millisecond, as long as the interpreter takes
   between two products, and then sleeps in the kernel. */

typedef void part_of_job(const void *job, long from, long to);

typedef struct { /* zeros at first but for `looks`; mirrored in engine/kernels/native.py */
    uint32_t left; /* chunks that nobody has taken; more than 0 only while the rest of the job stands below */
    uint32_t epoch; /* changes when sleepers are to look */
    uint32_t asleep;
    uint32_t closing;
    uint32_t threads; /* the one that computes included */
    uint32_t looks; /* before a worker sleeps */
    uint64_t apart[5]; /* another line of the cache */
    uint32_t unfinished; /* chunks */
    long units, chunks;
    part_of_job *part;
    const void *job;
} pool;

/* What a C library would do: a system call with up to four arguments. */
#if defined(__x86_64__)
enum { FUTEX = 202, SCHED_YIELD = 24 };
INLINE long system_call(long number, const void *a, long b, long c) {
    long result;
    register long no_timeout __asm__("r10") = 0;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(no_timeout) : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
enum { FUTEX = 98, SCHED_YIELD = 124 };
INLINE long system_call(long number, const void *a, long b, long c) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = (long)a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = 0;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
}
#else
enum { FUTEX = 240, SCHED_YIELD = 158 };
INLINE long system_call(long number, const void *a, long b, long c) {
    register long r0 __asm__("r0") = (long)a, r1 __asm__("r1") = b, r2 __asm__("r2") = c, r3 __asm__("r3") = 0;
    /* r7, which takes the number, may be the frame pointer. */
    __asm__ volatile("push {r7}\n mov r7, %1\n svc 0\n pop {r7}" : "+r"(r0) : "r"(number), "r"(r1), "r"(r2), "r"(r3) : "memory");
    return r0;
}
#endif
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };

#define ORDERED __ATOMIC_SEQ_CST

/* Takes a chunk and does it; 0 if there was none. */
INLINE int do_chunk(pool *p) {
    uint32_t left = __atomic_load_n(&p->left, ORDERED);
    do
        if (!left) return 0;
    while (!__atomic_compare_exchange_n(&p->left, &left, left - 1, 1, ORDERED, ORDERED));
    long nth = p->chunks - (long)left;
    p->part(p->job, p->units * nth / p->chunks, p->units * (nth + 1) / p->chunks);
    __atomic_sub_fetch(&p->unfinished, 1, ORDERED);
    return 1;
}

/* Does all units of a job, of so many bytes together; a chunk that is too small costs more to hand over than to do. */
static __attribute__((noinline)) void share(pool *p, part_of_job *part, const void *job, long units, long bytes) {
    long chunks = bytes / (16 << 10);
    if (chunks > 4 * (long)p->threads) chunks = 4 * (long)p->threads;
    if (chunks > units) chunks = units;
    if (p->threads < 2 || chunks < 2) {
        part(job, 0, units);
        return;
    }
    p->part = part;
    p->job = job;
    p->units = units;
    p->chunks = chunks;
    p->unfinished = (uint32_t)chunks;
    __atomic_store_n(&p->left, (uint32_t)chunks, ORDERED);
    if (__atomic_load_n(&p->asleep, ORDERED)) {
        __atomic_add_fetch(&p->epoch, 1, ORDERED);
        system_call(FUTEX, &p->epoch, FUTEX_WAKE_PRIVATE, p->threads);
    }
    while (do_chunk(p)) {}
    for (uint32_t look = 0; __atomic_load_n(&p->unfinished, ORDERED); look++)
        if (look < p->looks)
            pause();
        else
            system_call(SCHED_YIELD, 0, 0, 0); /* a worker lost its processor in the middle of a chunk */
}

/* A worker's life: ends when `release` was called. */
EXPORT void work(pool *p) {
    for (uint32_t look = 0; !__atomic_load_n(&p->closing, ORDERED); look++) {
        if (do_chunk(p)) {
            look = 0;
        } else if (look < p->looks) {
            pause();
        } else {
            uint32_t epoch = __atomic_load_n(&p->epoch, ORDERED);
            __atomic_add_fetch(&p->asleep, 1, ORDERED);
            if (!__atomic_load_n(&p->left, ORDERED) && !__atomic_load_n(&p->closing, ORDERED))
                system_call(FUTEX, &p->epoch, FUTEX_WAIT_PRIVATE, epoch);
            __atomic_sub_fetch(&p->asleep, 1, ORDERED);
            look = 0;
        }
    }
}

EXPORT void release(pool *p) {
    __atomic_store_n(&p->closing, 1, ORDERED);
    __atomic_add_fetch(&p->epoch, 1, ORDERED);
    system_call(FUTEX, &p->epoch, FUTEX_WAKE_PRIVATE, p->threads);
}

/* Looks around so often: how long that takes says how many looks a worker shall have. */
EXPORT void look_around(int64_t times) {
    for (; times > 0; times--) pause();
}
