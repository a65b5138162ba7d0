/* Arithmetic on a model's matrices. Freestanding: no C library, no allocation, no globals.

   A quantised matrix lies as engine/quantize.py packs it: blocks of 32 rows, in them groups of columns, in them words of
   32 bits, a word of each row side by side. The low half of a word holds even columns, the high half odd ones, in fields:
   so that a shift and a mask give what processors multiply and add at once, pairs of neighbouring columns in 16 bits, or
   four columns, which are not neighbours, in bytes.

   Activations are rounded to 16 bits, with a scale for each 32 of them: results are off by some 2e-5 of the largest, by
   1e-4 where one activation in 32 dwarfs the others. Where bytes are multiplied, they stand as two bytes, and each is
   multiplied. Products are exact in 32 bits within 32 columns, and float32 from there on. */

#include "vectors.h"

#define EXPORT __attribute__((visibility("default")))
#define BLOCK 32 /* rows of a block, and columns that share an activation's scale */
#define PARTS (BLOCK / LANES) /* vectors across a block */

#include "pool.h"

/* --- matrices ------------------------------------------------------------------------------------------------------ */

enum { INT8, INT4, INT3, INT2, FP32, FP16, BF16, ROWS_FP32, ROWS_FP16, ROWS_BF16 };

typedef struct { /* mirrored in engine/kernels/native.py */
    const void *codes; /* FP32 to BF16: (columns, rows); ROWS_...: (rows, columns) */
    const uint32_t *high;    /* INT3 only */
    const uint16_t *scales;  /* FP16 */
    const uint16_t *offsets; /* FP16, or 0 */
    int32_t precision;
    int32_t rows;
    int32_t columns;
    int32_t group; /* columns that share a scale, divided by BLOCK */
} matrix;

INLINE long blocks_of(long values) { return (values + BLOCK - 1) / BLOCK; }
INLINE long bytes_of(const matrix *m) {
    static const uint8_t bits[] = {8, 4, 3, 2, 32, 16, 16, 32, 16, 16};
    return (long)m->rows * m->columns / 8 * bits[m->precision];
}

/* Memory of the caller's, a line of the cache at least; `..._memory` says how much is taken. */
INLINE long lines(long bytes) { return (bytes + 63) / 64 * 64; }
INLINE void *take(char **memory, long bytes) {
    char *taken = *memory;
    *memory += lines(bytes);
    return taken;
}

/* --- activations in 16 bits ---------------------------------------------------------------------------------------- */

typedef struct {
    int8_t *codes; /* of each BLOCK columns 2 * BLOCK bytes: in 16 bits, or QUADS: all high bytes, then all low ones */
    float *scales; /* of each BLOCK columns */
    float *sums;   /* of each BLOCK columns: what an offset multiplies */
    int32_t *totals; /* of the codes of each BLOCK columns: what the centre of unsigned codes multiplies */
} rounded;

#define LARGEST_CODE 32639 /* 127 * 256 + 127: the largest of two signed bytes */


/* To the nearest whole number, for magnitudes under 4 million: adding 1.5 * 2 ** 23 leaves no place for a fraction. */
INLINE floats nearest_whole(floats v) { return v + all(12582912.0f) - all(12582912.0f); }

INLINE float largest(floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}

#if QUADS
typedef int16_t block_of_shorts __attribute__((vector_size(2 * BLOCK)));
typedef int8_t block_of_bytes __attribute__((vector_size(BLOCK), aligned(1)));

/* In the order in which a word's bytes, shifted down field by field, name the columns. */
INLINE block_of_bytes in_order(block_of_bytes v, int precision) {
    if (precision == INT8)
        return __builtin_shufflevector(v, v, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
                                       16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31);
    if (precision == INT4)
        return __builtin_shufflevector(v, v, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,
                                       16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31);
    return __builtin_shufflevector(v, v, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
                                   16, 24, 17, 25, 18, 26, 19, 27, 20, 28, 21, 29, 22, 30, 23, 31);
}

INLINE void put_in_order(int16_t *codes, int8_t *to, int precision) {
    block_of_shorts v;
    __builtin_memcpy(&v, codes, sizeof v);
    block_of_shorts low = v << 8 >> 8; /* with its sign */
    *(block_of_bytes *)to = in_order(__builtin_convertvector((v - low) >> 8, block_of_bytes), precision);
    *(block_of_bytes *)(to + BLOCK) = in_order(__builtin_convertvector(low, block_of_bytes), precision);
}
#else
INLINE void put_in_order(int16_t *codes, int8_t *to, int precision) {
    (void)precision;
    __builtin_memcpy(to, codes, 2 * BLOCK);
}
#endif

static __attribute__((noinline)) void round_activations(const float *x, long columns, int precision, rounded to) {
    for (long start = 0, block = 0; start < columns; start += BLOCK, block++) {
        float padded[BLOCK];
        int16_t codes[BLOCK];
        const float *given = x + start;
        if (columns - start < BLOCK) {
            for (long i = 0; i < BLOCK; i++) padded[i] = start + i < columns ? x[start + i] : 0;
            given = padded;
        }
        floats most = all(0), sum = all(0);
        for (int s = 0; s < PARTS; s++) {
            floats v = loadf(given + s * LANES);
            most = larger(most, larger(v, -v));
            sum += v;
        }
        float peak = largest(most), inverse = peak > 0 ? LARGEST_CODE / peak : 0;
        whole total_codes = {0};
        for (int s = 0; s < PARTS; s++) {
            whole nearest = __builtin_convertvector(nearest_whole(loadf(given + s * LANES) * inverse), whole);
            total_codes += nearest;
            *(shorts_anywhere *)(codes + s * LANES) = __builtin_convertvector(nearest, shorts);
        }
        put_in_order(codes, to.codes + 2 * start, precision);
        float all_given = across(sum);
        to.scales[block] = all_given != all_given ? all_given : peak / LARGEST_CODE; /* what is not a number stays none */
        to.sums[block] = all_given;
        to.totals[block] = __builtin_reduce_add(total_codes);
    }
}

/* --- products with quantised matrices ------------------------------------------------------------------------------ */

/* The two lines that are needed 8 KiB from here: processors look less far ahead by themselves, and INT4 runs at 25 GB/s
   instead of 37 where memory delivers 40. What lies past the end is not read. */
#define PREFETCH(words) (__builtin_prefetch((words) + 2048), __builtin_prefetch((words) + 2048 + 16))

#if QUADS
#define EACH(bits) (0x0101 * ((1 << (bits)) - 1))
#define FIELDS(bits) (8 / (bits))
#define TAKE(nth, codes)                                                                                                \
    first[s] = dot(first[s], (codes), spread(x + 4 * (nth)));                                                            \
    second[s] = dot(second[s], (codes), spread(x + BLOCK + 4 * (nth)))
#define SUM(first, second) ((total(first) << 8) + total(second))
#else
#define EACH(bits) ((1 << (bits)) - 1)
#define FIELDS(bits) (16 / (bits))
#define TAKE(nth, codes)                                                                                                \
    if ((nth) % 2)                                                                                                       \
        second[s] = dot(second[s], (codes), spread(x + 4 * (nth)));                                                      \
    else                                                                                                                 \
        first[s] = dot(first[s], (codes), spread(x + 4 * (nth)))
#define SUM(first, second) (total(first) + total(second))
#endif

/* One block of rows, and all columns. WORDS of a row hold BLOCK columns; UNPACK multiplies those of word `v`. */
#define BLOCK_PRODUCT(NAME, WORDS, CENTRE, UNPACK)                                                                      \
    INLINE void NAME(const matrix *m, long block, rounded given, floats *sum) {                                          \
        long count = blocks_of(m->columns);                                                                              \
        long padded = (count + m->group - 1) / m->group * m->group, groups = padded / m->group;                          \
        const uint32_t *codes = (const uint32_t *)m->codes + block * padded * WORDS * BLOCK;                             \
        const uint32_t *high = m->high + block * padded * BLOCK;                                                         \
        const uint16_t *scales = m->scales + block * groups * BLOCK;                                                     \
        const uint16_t *offsets = m->offsets ? m->offsets + block * groups * BLOCK : 0;                                  \
        (void)high;                                                                                                      \
        for (long k = 0; k < count; k++) {                                                                               \
            sums first[PARTS], second[PARTS];                                                                            \
            const int8_t *x = given.codes + k * 2 * BLOCK;                                                               \
            for (int s = 0; s < PARTS; s++) first[s] = second[s] = (sums){0};                                            \
            for (int word = 0; word < WORDS; word++, x += (QUADS ? 1 : 2) * BLOCK / WORDS) {                             \
                PREFETCH(codes + word * BLOCK);                                                                          \
                for (int s = 0; s < PARTS; s++) {                                                                        \
                    halves v = load(codes + word * BLOCK + s * LANES);                                                   \
                    UNPACK                                                                                               \
                }                                                                                                        \
            }                                                                                                            \
            codes += WORDS * BLOCK;                                                                                      \
            high += BLOCK;                                                                                               \
            floats scale = all(given.scales[k]), given_sum = all(given.sums[k]);                                         \
            for (int s = 0; s < PARTS; s++) {                                                                            \
                whole exact = SUM(first[s], second[s]) - (CENTRE)*given.totals[k];                                       \
                sum[s] = fma(half(scales + s * LANES) * scale, __builtin_convertvector(exact, floats), sum[s]);          \
                if (offsets) sum[s] = fma(half(offsets + s * LANES), given_sum, sum[s]);                                 \
            }                                                                                                            \
            if ((k + 1) % m->group == 0) {                                                                               \
                scales += BLOCK;                                                                                         \
                if (offsets) offsets += BLOCK;                                                                           \
            }                                                                                                            \
        }                                                                                                                \
    }

#if !QUADS
BLOCK_PRODUCT(product_int8, 8, 0,
    TAKE(0, (halves)((signed_halves)(v << 8) >> 8));
    TAKE(1, (halves)((signed_halves)v >> 8));)
#elif LANES == 16 /* which multiplies unsigned bytes by signed ones */
BLOCK_PRODUCT(product_int8, 8, 128, TAKE(0, v ^ 0x8080);)
#else
BLOCK_PRODUCT(product_int8, 8, 0, TAKE(0, v);)
#endif

BLOCK_PRODUCT(product_int4, 4, 8,
    for (int i = 0; i < FIELDS(4); i++) { TAKE(i, v >> (4 * i) & EACH(4)); })

BLOCK_PRODUCT(product_int2, 2, 2,
    for (int i = 0; i < FIELDS(2); i++) { TAKE(i, v >> (2 * i) & EACH(2)); })

/* The plane of high bits has 16 fields in a half, of which the first word's columns have the lower 8; as bytes, the
   second byte of a half has its four bits beside those of the first. Worth 4 each. */
BLOCK_PRODUCT(product_int3, 2, 4,
    if (s == 0 && word == 0) PREFETCH(high);
    halves h = load(high + s * LANES);
    if (word) h >>= 8;
    if (QUADS) h = (h & 0xff) | h << 4;
    for (int i = 0; i < FIELDS(2); i++) {
        halves worth_4 = i < 2 ? h << (2 - i) : h >> (i - 2);
        TAKE(i, (v >> (2 * i) & EACH(2)) | (worth_4 & (EACH(1) << 2)));
    })

/* Rows of blocks [from, to) of each of n vectors: a block's words are in the cache for all but the first. */
static void quantised(const matrix *m, const rounded *given, float *y, long n, long from, long to) {
    for (long block = from; block < to; block++)
        for (long i = 0; i < n; i++) {
            floats sum[PARTS];
            float out[BLOCK], *found = y + i * m->rows + block * BLOCK;
            for (int s = 0; s < PARTS; s++) sum[s] = all(0);
            switch (m->precision) {
            case INT8: product_int8(m, block, given[i], sum); break;
            case INT4: product_int4(m, block, given[i], sum); break;
            case INT3: product_int3(m, block, given[i], sum); break;
            default: product_int2(m, block, given[i], sum);
            }
            long left = m->rows - block * BLOCK;
            for (int s = 0; s < PARTS; s++) store((left < BLOCK ? out : found) + s * LANES, sum[s]);
            for (long r = 0; left < BLOCK && r < left; r++) found[r] = out[r];
        }
}

/* --- products with floats ------------------------------------------------------------------------------------------ */

INLINE float half_to_float(uint16_t h) {
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)(h & 0x8000) << 16 | (uint32_t)(h & 0x7fff) << 13;
    return u.value * 0x1p112f;
}

INLINE float brain_to_float(uint16_t b) {
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)b << 16;
    return u.value;
}

#define SAME(v) (v)

/* (columns, rows): y gathers column after column, four at a time, and stays in the cache. */
#define BY_COLUMNS(NAME, TYPE, LOAD, ONE)                                                                               \
    static void NAME(const matrix *m, const float *x, float *y, long from, long to) {                                    \
        const TYPE *weights = (const TYPE *)m->codes;                                                                    \
        for (long r = from; r < to; r++) y[r] = 0;                                                                       \
        for (long c = 0; c < m->columns; c += 4) {                                                                       \
            long n = m->columns - c < 4 ? m->columns - c : 4, r = from;                                                  \
            const TYPE *w[4];                                                                                            \
            float f[4];                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                               \
                w[i] = weights + (c + (i < n ? i : 0)) * m->rows;                                                        \
                f[i] = i < n ? x[c + i] : 0;                                                                             \
            }                                                                                                            \
            for (; r + LANES <= to; r += LANES)                                                                          \
                store(y + r, fma(LOAD(w[3] + r), all(f[3]), fma(LOAD(w[2] + r), all(f[2]),                               \
                      fma(LOAD(w[1] + r), all(f[1]), fma(LOAD(w[0] + r), all(f[0]), loadf(y + r))))));                   \
            for (; r < to; r++)                                                                                          \
                for (long i = 0; i < 4; i++) y[r] += ONE(w[i][r]) * f[i];                                                \
        }                                                                                                                \
    }
BY_COLUMNS(by_columns_fp32, float, loadf, SAME)
BY_COLUMNS(by_columns_fp16, uint16_t, half, half_to_float)
BY_COLUMNS(by_columns_bf16, uint16_t, brain, brain_to_float)

/* (rows, columns): four rows at a time: four streams of memory, and x is loaded once for them. Halves are consumed twice
   as fast, so that the next four rows have to be asked for now. */
#define BY_ROWS(NAME, TYPE, LOAD, ONE)                                                                                  \
    static void NAME(const matrix *m, const float *x, float *y, long from, long to) {                                    \
        long columns = m->columns, ahead = sizeof(TYPE) == 4 ? 1024 : columns < 1024 ? 4096 : 4 * columns;               \
        for (long r = from; r < to; r += 4) {                                                                            \
            const TYPE *w[4];                                                                                            \
            floats sum[4], more[4];                                                                                      \
            long c = 0;                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                               \
                w[i] = (const TYPE *)m->codes + (r + i < to ? r + i : to - 1) * columns;                                 \
                sum[i] = more[i] = all(0);                                                                               \
            }                                                                                                            \
            for (; c + 2 * LANES <= columns; c += 2 * LANES) {                                                           \
                floats one = loadf(x + c), other = loadf(x + c + LANES);                                                 \
                for (int i = 0; i < 4; i++) {                                                                            \
                    __builtin_prefetch(w[i] + c + ahead);                                                                \
                    sum[i] = fma(LOAD(w[i] + c), one, sum[i]);                                                           \
                    more[i] = fma(LOAD(w[i] + c + LANES), other, more[i]);                                               \
                }                                                                                                        \
            }                                                                                                            \
            for (int i = 0; i < 4 && r + i < to; i++) {                                                                  \
                float rest = across(sum[i] + more[i]);                                                                   \
                for (long j = c; j < columns; j++) rest += ONE(w[i][j]) * x[j];                                          \
                y[r + i] = rest;                                                                                         \
            }                                                                                                            \
        }                                                                                                                \
    }
BY_ROWS(by_rows_fp32, float, loadf, SAME)
BY_ROWS(by_rows_fp16, uint16_t, half, half_to_float)
BY_ROWS(by_rows_bf16, uint16_t, brain, brain_to_float)

/* --- products of any matrix ---------------------------------------------------------------------------------------- */

typedef struct { /* n vectors for a matrix */
    const float *x; /* (n, columns) */
    rounded *given; /* of each, where the matrix is quantised */
    long n;
} vectors;

INLINE long vectors_memory(long columns, long n) {
    return lines(n * (long)sizeof(rounded)) + n * (lines(2 * BLOCK * blocks_of(columns)) + 3 * lines(4 * blocks_of(columns)));
}

/* Rounds them, where the matrix is quantised. */
static __attribute__((noinline)) vectors vectors_for(const matrix *m, const float *x, long n, char **memory) {
    vectors v = {x, 0, n};
    if (m->precision > INT2) return v;
    long blocks = blocks_of(m->columns);
    v.given = take(memory, n * (long)sizeof(rounded));
    for (long i = 0; i < n; i++) {
        v.given[i] = (rounded){take(memory, 2 * BLOCK * blocks), take(memory, 4 * blocks), take(memory, 4 * blocks),
                               take(memory, 4 * blocks)};
        round_activations(x + i * m->columns, m->columns, m->precision, v.given[i]);
    }
    return v;
}

/* Rows of blocks [from, to) of v (n, columns) -> y (n, rows). */
static __attribute__((noinline)) void product_of(const matrix *m, vectors v, float *y, long from, long to) {
    if (m->precision <= INT2) {
        quantised(m, v.given, y, v.n, from, to);
        return;
    }
    from *= BLOCK;
    to = to * BLOCK < m->rows ? to * BLOCK : m->rows;
    const float *x = v.x;
    for (long i = 0; i < v.n; i++, x += m->columns, y += m->rows) switch (m->precision) {
        case FP32: by_columns_fp32(m, x, y, from, to); break;
        case FP16: by_columns_fp16(m, x, y, from, to); break;
        case BF16: by_columns_bf16(m, x, y, from, to); break;
        case ROWS_FP32: by_rows_fp32(m, x, y, from, to); break;
        case ROWS_FP16: by_rows_fp16(m, x, y, from, to); break;
        default: by_rows_bf16(m, x, y, from, to);
        }
}

typedef struct { /* a product, and what becomes of it */
    const matrix *m;
    vectors v;
    float *y;
    enum { AS_IT_IS, SILU_TIMES, RELU, WEIGHED } then;
    const matrix *up; /* SILU_TIMES: y becomes silu(y) times this matrix's product, which goes through `aside` */
    float *aside;
    const float *shares; /* WEIGHED: a factor for each of the n vectors */
} task;

typedef struct {
    const task *tasks;
    long count;
} task_list;

/* e to the power of v, for v <= 0 and within 2e-7 of it: 2 ** whole * 2 ** rest, the latter by its Taylor series. */
INLINE floats exponential(floats v) {
    floats scaled = larger(v * all(1.44269504f), all(-126));
    floats nearest = nearest_whole(scaled), rest = (scaled - nearest) * all(0.693147181f);
    whole bits = (__builtin_convertvector(nearest, whole) + 127) << 23;
    floats series = all(1.0f / 5040);
    series = fma(series, rest, all(1.0f / 720));
    series = fma(series, rest, all(1.0f / 120));
    series = fma(series, rest, all(1.0f / 24));
    series = fma(series, rest, all(1.0f / 6));
    series = fma(series, rest, all(1.0f / 2));
    series = fma(series, rest, all(1));
    series = fma(series, rest, all(1));
    return series * (floats)bits;
}

static void do_task(const task *t, long from, long to) {
    long rows = t->m->rows, first = from * BLOCK, end = to * BLOCK < rows ? to * BLOCK : rows;
    product_of(t->m, t->v, t->y, from, to);
    if (t->then == SILU_TIMES) product_of(t->up, t->v, t->aside, from, to);
    for (long i = 0; t->then != AS_IT_IS && i < t->v.n; i++) {
        float *y = t->y + i * rows, *up = t->aside + i * rows;
        switch (t->then) {
        case SILU_TIMES:
            for (long r = first; r < end; r += LANES) {
                float tail[2][LANES];
                long left = end - r < LANES ? end - r : LANES;
                for (long j = 0; left < LANES && j < left; j++) tail[0][j] = y[r + j], tail[1][j] = up[r + j];
                floats v = loadf(left < LANES ? tail[0] : y + r), power = exponential(-larger(v, -v));
                /* 1 / (1 + e^-v), and e^v / (1 + e^v) below 0 */
                floats above = larger(v, all(0)), below = smaller(v, all(0));
                floats gated = (above + below * power) / (1 + power) * loadf(left < LANES ? tail[1] : up + r);
                store(left < LANES ? tail[0] : y + r, gated);
                for (long j = 0; left < LANES && j < left; j++) y[r + j] = tail[0][j];
            }
            break;
        case RELU:
            for (long r = first; r < end; r++) y[r] = y[r] < 0 ? 0 : y[r];
            break;
        default:
            for (long r = first; r < end; r++) y[r] *= t->shares[i];
        }
    }
}

/* The tasks' blocks of rows are counted through. */
static void some_blocks(const void *job, long from, long to) {
    const task_list *list = (const task_list *)job;
    const task *t = list->tasks;
    for (long before = 0; before < to; t++) {
        long blocks = blocks_of(t->m->rows), start = from - before, end = to - before;
        if (end > 0 && start < blocks) do_task(t, start > 0 ? start : 0, end < blocks ? end : blocks);
        before += blocks;
    }
}

static void do_tasks(pool *p, const task *tasks, long count) {
    task_list list = {tasks, count};
    long units = 0, bytes = 0;
    for (const task *t = tasks; t < tasks + count; t++) {
        units += blocks_of(t->m->rows);
        bytes += (bytes_of(t->m) + (t->up ? bytes_of(t->up) : 0)) * t->v.n;
    }
    share(p, some_blocks, &list, units, bytes);
}

/* --- what Python calls: `memory` is for intermediate results --------------------------------------------------------- */

EXPORT int64_t product_memory(const matrix *m, int64_t n) { return vectors_memory(m->columns, (long)n); }

/* x (n, columns) -> y (n, rows). */
EXPORT void product(pool *p, const matrix *m, const float *x, float *y, int64_t n, char *memory) {
    task t = {.m = m, .v = vectors_for(m, x, (long)n, &memory), .y = y};
    do_tasks(p, &t, 1);
}

typedef struct { /* n vectors for an expert; mirrored in engine/kernels/native.py */
    const matrix *m;     /* gate, up and down, or wi and wo */
    const float *x;      /* (n, hidden) */
    const float *shares; /* (n), by which y is multiplied, or 0 */
    float *y;            /* (n, hidden) */
    int64_t n;
} expert_call;

enum { MOST_EXPERTS = 16 }; /* in a call */

EXPORT int64_t experts_memory(const expert_call *calls, int64_t count) {
    long bytes = 0;
    for (const expert_call *c = calls; c < calls + count; c++) {
        long n = (long)c->n, hidden = c->m->columns, width = c->m->rows;
        bytes += 2 * lines(4 * n * width) + vectors_memory(hidden, n) + vectors_memory(width, n);
    }
    return bytes;
}

/* Experts of a layer, down(silu(gate(x)) * up(x)) of three matrices each, or wo(relu(wi(x))) of two. */
EXPORT void experts(pool *p, const expert_call *calls, int64_t count, int64_t matrices, char *memory) {
    task tasks[MOST_EXPERTS];
    for (long e = 0; e < count; e++) {
        const expert_call *c = calls + e, *last = c - 1;
        long n = (long)c->n, bytes = 4 * n * c->m->rows;
        int alike = e && c->x == last->x && n == last->n && c->m->precision == last->m->precision;
        tasks[e] = (task){.m = c->m, .v = alike ? tasks[e - 1].v : vectors_for(c->m, c->x, n, &memory),
                          .y = take(&memory, bytes), .then = RELU};
        if (matrices == 3) {
            tasks[e].then = SILU_TIMES;
            tasks[e].up = c->m + 1;
            tasks[e].aside = take(&memory, bytes);
        }
    }
    do_tasks(p, tasks, count);
    for (long e = 0; e < count; e++) {
        const expert_call *c = calls + e;
        const matrix *last = c->m + matrices - 1;
        tasks[e] = (task){.m = last, .v = vectors_for(last, tasks[e].y, (long)c->n, &memory), .y = c->y,
                          .then = c->shares ? WEIGHED : AS_IT_IS, .shares = c->shares};
    }
    do_tasks(p, tasks, count);
}

/* --- the rest of a decoder layer, for one token ------------------------------------------------------------------------ */

static float dot_product(const float *a, const float *b, long n) {
    floats sum = all(0);
    long i = 0;
    for (; i + LANES <= n; i += LANES) sum = fma(loadf(a + i), loadf(b + i), sum);
    float total_sum = across(sum);
    for (; i < n; i++) total_sum += a[i] * b[i];
    return total_sum;
}

static void add_scaled(float *to, const float *v, float factor, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, fma(loadf(v + i), all(factor), loadf(to + i)));
    for (; i < n; i++) to[i] += v[i] * factor;
}

static void rms_norm(const float *x, const float *weight, float eps, float *to, long n) {
    float scale = 1 / square_root(dot_product(x, x, n) / (float)n + eps);
    for (long i = 0; i < n; i++) to[i] = x[i] * scale * weight[i];
}

typedef struct { /* mirrored in engine/kernels/native.py */
    const float *norm, *moe_norm; /* (hidden) */
    const matrix *m;              /* q, k, v, o and the router */
    int32_t heads, kv_heads, head_dim;
    int32_t window; /* positions that one sees, itself included; 0: all */
    int32_t top_k;
    float eps;
} decoder_layer;

typedef struct { /* a token in a layer; mirrored in engine/kernels/native.py */
    float *x;        /* (hidden): the residual stream, into the layer and out of it */
    float *normed;   /* (hidden): what the experts are given */
    float *logits;   /* (experts): of the router */
    int64_t *chosen; /* (top_k) */
    float *shares;   /* (top_k) */
    float *outputs;  /* (top_k, hidden): of the experts, weighed */
} token;

INLINE void rotate(float *head, const float *cosine, const float *sine, long half_dim) {
    for (long i = 0; i < half_dim; i++) {
        float first = head[i], second = head[i + half_dim];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half_dim] = second * cosine[i] + first * sine[i];
    }
}

typedef struct {
    const decoder_layer *a;
    const float *q, *keys, *values;
    float *mixed, *scores; /* (heads, head_dim), and what `score_floats` says for each head */
    long positions, from, seen;
} mixing;

INLINE long score_floats(long positions) { return positions + LANES; } /* whole vectors, past the end too */

/* Heads [from, to): q . keys, softmax, and the mean of the values by that. */
static void mix_heads(const void *job, long from, long to) {
    const mixing *j = (const mixing *)job;
    long dim = j->a->head_dim, shared = j->a->heads / j->a->kv_heads;
    float scale = 1 / square_root((float)dim);
    for (long h = from; h < to; h++) {
        const float *keys = j->keys + h / shared * j->positions * dim, *values = j->values + h / shared * j->positions * dim;
        float *out = j->mixed + h * dim, *scores = j->scores + h * score_floats(j->positions), most = -3e38f, sum = 0;
        for (long p = j->from; p < j->seen; p++) {
            scores[p] = dot_product(j->q + h * dim, keys + p * dim, dim) * scale;
            most = scores[p] > most ? scores[p] : most;
        }
        for (long p = j->from; p < j->seen; p += LANES)
            store(scores + p, exponential(smaller(loadf(scores + p) - all(most), all(0))));
        for (long p = j->from; p < j->seen; p++) sum += scores[p];
        for (long i = 0; i < dim; i++) out[i] = 0;
        for (long p = j->from; p < j->seen; p++) add_scaled(out, values + p * dim, scores[p] / sum, dim);
    }
}

EXPORT int64_t layer_memory(const decoder_layer *a, int64_t positions) {
    long hidden = a->m[0].columns, queries = (long)a->heads * a->head_dim, keys = (long)a->kv_heads * a->head_dim;
    return lines(4 * hidden) + 2 * lines(4 * queries) + 2 * lines(4 * keys)
         + lines(4 * a->heads * score_floats((long)positions)) + 3 * vectors_memory(hidden, 1) + vectors_memory(queries, 1);
}

/* x + o(attention(norm(x))), at `position`; keys and values (kv_heads, positions, head_dim) gain a row. */
static void attend(
    pool *p, const decoder_layer *a, float *x, float *keys, float *values, const float *cosine, const float *sine,
    long positions, long position, char *memory) {
    long dim = a->head_dim, hidden = a->m[0].columns, queries = a->heads * dim, seen = position + 1;
    float *normed = take(&memory, 4 * hidden), *mixed = take(&memory, 4 * queries), *projected[3];
    task tasks[3];

    rms_norm(x, a->norm, a->eps, normed, hidden);
    for (int i = 0; i < 3; i++) {
        projected[i] = take(&memory, 4 * a->m[i].rows);
        int alike = i && a->m[i].precision == a->m[i - 1].precision;
        tasks[i] = (task){.m = a->m + i, .v = alike ? tasks[i - 1].v : vectors_for(a->m + i, normed, 1, &memory),
                          .y = projected[i]};
    }
    do_tasks(p, tasks, 3);
    float *q = projected[0], *k = projected[1], *v = projected[2];
    cosine += position * (dim / 2);
    sine += position * (dim / 2);
    for (long h = 0; h < a->heads; h++) rotate(q + h * dim, cosine, sine, dim / 2);
    for (long h = 0; h < a->kv_heads; h++) {
        rotate(k + h * dim, cosine, sine, dim / 2);
        long row = (h * positions + position) * dim;
        for (long i = 0; i < dim; i++) {
            keys[row + i] = k[h * dim + i];
            values[row + i] = v[h * dim + i];
        }
    }
    mixing job = {a, q, keys, values, mixed, take(&memory, 4 * a->heads * score_floats(positions)), positions,
                  a->window && seen > a->window ? seen - a->window : 0, seen};
    share(p, mix_heads, &job, a->heads, 2 * 4 * queries * (seen - job.from));
    tasks[0] = (task){.m = a->m + 3, .v = vectors_for(a->m + 3, mixed, 1, &memory), .y = normed};
    do_tasks(p, tasks, 1);
    for (long i = 0; i < hidden; i++) x[i] += normed[i];
}

/* x (hidden) -> its RMS norm (hidden), and logits (rows) = m times that. Memory as for a product. */
EXPORT void normed_product(
    pool *p, const float *norm, float eps, const matrix *m, const float *x, float *normed, float *logits, char *memory) {
    rms_norm(x, norm, eps, normed, m->columns);
    product(p, m, normed, logits, 1, memory);
}

/* The k experts of the largest of n logits, ties by their number, and the softmax among them. */
EXPORT void route(const float *logits, int64_t n, int64_t k, int64_t *chosen, float *shares) {
    float sum = 0;
    for (long i = 0; i < k; i++) {
        long best = -1;
        for (long e = 0; e < n; e++) {
            int taken = 0;
            for (long j = 0; j < i; j++) taken |= chosen[j] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[i] = best;
    }
    for (long i = 0; i < k; i += LANES) {
        float part[LANES];
        for (long j = 0; j < LANES; j++) part[j] = i + j < k ? logits[chosen[i + j]] - logits[chosen[0]] : 0;
        store(part, exponential(loadf(part)));
        for (long j = 0; j < LANES && i + j < k; j++) sum += shares[i + j] = part[j];
    }
    for (long i = 0; i < k; i++) shares[i] /= sum;
}

/* A token's layer as far as its experts: the attention block, and what the router makes of it.
   cosine, sine (positions, head_dim / 2); keys, values (kv_heads, positions, head_dim). */
EXPORT void begin_layer(
    pool *p, const decoder_layer *a, const token *t, float *keys, float *values, const float *cosine, const float *sine,
    int64_t positions, int64_t position, char *memory) {
    attend(p, a, t->x, keys, values, cosine, sine, (long)positions, (long)position, memory);
    normed_product(p, a->moe_norm, a->eps, a->m + 4, t->x, t->normed, t->logits, memory);
    route(t->logits, a->m[4].rows, a->top_k, t->chosen, t->shares);
}

/* Experts of a token, to their places in its outputs; after the last of the layer's, all are added to x. */
EXPORT void experts_of_token(
    pool *p, const decoder_layer *a, const token *t, const expert_call *calls, int64_t count, int64_t last, char *memory) {
    experts(p, calls, count, 3, memory);
    long hidden = a->m[0].columns;
    for (long i = 0; last && i < hidden; i++) {
        float sum = t->outputs[i];
        for (long j = 1; j < a->top_k; j++) sum += t->outputs[j * hidden + i];
        t->x[i] += sum;
    }
}

/* --- what products are measured against ------------------------------------------------------------------------------ */

typedef struct {
    const float *values;
    float *sums; /* of each block of 1024 values */
} reading;

static void read_blocks(const void *job, long from, long to) {
    const reading *r = (const reading *)job;
    for (long block = from; block < to; block++) {
        floats sum[8] = {0};
        const float *at = r->values + block * 1024;
        for (long i = 0; i < 1024; i += 8 * LANES)
            for (int s = 0; s < 8; s++) {
                __builtin_prefetch(at + i + s * LANES + 2048);
                sum[s] += loadf(at + i + s * LANES);
            }
        for (int s = 1; s < 8; s++) sum[0] += sum[s];
        r->sums[block] = across(sum[0]);
    }
}

/* Reads memory and does nothing else worth mentioning. sums (blocks); values (blocks, 1024). */
EXPORT void read_memory(pool *p, const float *values, int64_t blocks, float *sums) {
    reading job = {values, sums};
    share(p, read_blocks, &job, (long)blocks, 4096 * (long)blocks);
}
