/* Products with quantised experts, for one thread at a time. Freestanding: no C library, no allocation, no globals.

   A matrix lies as engine/quantize.py packs it: blocks of 32 rows, in them groups of columns, in them words of 32 bits, a
   word of each row side by side. The low half of a word holds even columns, the high half odd ones, in fields: so that one
   shift and one mask give pairs of neighbouring columns for a multiply-add of 16-bit pairs.

   Activations are rounded to 16 bits, with a scale for each 32 of them: results are off by some 2e-5 of the largest, by
   1e-4 where one activation in 32 dwarfs the others. Products are exact in 32 bits within 32 columns, and float32 from
   there on. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define BLOCK 32 /* rows of a block, and columns that share an activation's scale */

/* --- vectors: LANES values of 32 bits ------------------------------------------------------------------------------ */

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define LANES 16
typedef __m512i ints;
typedef __m512 floats;
typedef __m512i sums; /* of products of pairs */
INLINE ints load(const void *p) { return _mm512_loadu_si512(p); }
INLINE ints pair(const int16_t *x) { return _mm512_set1_epi32(*(const int32_t *)x); }
INLINE sums none(void) { return _mm512_setzero_si512(); }
INLINE sums dot(sums a, ints w, ints x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(a, w, x);
#else
    return _mm512_add_epi32(a, _mm512_madd_epi16(w, x));
#endif
}
INLINE floats total(sums a, sums b, int32_t c) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_set1_epi32(c)));
}
INLINE ints mask(ints a, int m) { return _mm512_and_si512(a, _mm512_set1_epi16((short)m)); }
#define DOWN(a, n) _mm512_srli_epi16(a, n)
#define DOWN_SIGNED(a, n) _mm512_srai_epi16(a, n)
#define UP(a, n) _mm512_slli_epi16(a, n)
INLINE floats all(float v) { return _mm512_set1_ps(v); }
INLINE floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats loadf(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, floats v) { _mm512_storeu_ps(p, v); }
INLINE floats half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE floats brain(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE float across(floats v) { return _mm512_reduce_add_ps(v); }
#elif defined(__AVX2__)
#define LANES 8
typedef __m256i ints;
typedef __m256 floats;
typedef __m256i sums;
INLINE ints load(const void *p) { return _mm256_loadu_si256(p); }
INLINE ints pair(const int16_t *x) { return _mm256_set1_epi32(*(const int32_t *)x); }
INLINE sums none(void) { return _mm256_setzero_si256(); }
INLINE sums dot(sums a, ints w, ints x) { return _mm256_add_epi32(a, _mm256_madd_epi16(w, x)); }
INLINE floats total(sums a, sums b, int32_t c) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_set1_epi32(c)));
}
INLINE ints mask(ints a, int m) { return _mm256_and_si256(a, _mm256_set1_epi16((short)m)); }
#define DOWN(a, n) _mm256_srli_epi16(a, n)
#define DOWN_SIGNED(a, n) _mm256_srai_epi16(a, n)
#define UP(a, n) _mm256_slli_epi16(a, n)
INLINE floats all(float v) { return _mm256_set1_ps(v); }
INLINE floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats loadf(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, floats v) { _mm256_storeu_ps(p, v); }
INLINE floats half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE floats brain(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE float across(floats v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define LANES 4
typedef int16x8_t ints;
typedef float32x4_t floats;
typedef struct { int32x4_t low, high; } sums; /* of two rows each, the pairs not added yet */
INLINE ints load(const void *p) { return vreinterpretq_s16_u8(vld1q_u8((const uint8_t *)p)); }
INLINE ints pair(const int16_t *x) { return vreinterpretq_s16_s32(vdupq_n_s32(*(const int32_t *)x)); }
INLINE sums none(void) { return (sums){vdupq_n_s32(0), vdupq_n_s32(0)}; }
INLINE sums dot(sums a, ints w, ints x) {
    a.low = vmlal_s16(a.low, vget_low_s16(w), vget_low_s16(x));
    a.high = vmlal_s16(a.high, vget_high_s16(w), vget_high_s16(x));
    return a;
}
INLINE floats total(sums a, sums b, int32_t c) {
    int32x4_t low = vaddq_s32(a.low, b.low), high = vaddq_s32(a.high, b.high);
#if defined(__aarch64__)
    int32x4_t rows = vpaddq_s32(low, high);
#else
    int32x4_t rows = vcombine_s32(vpadd_s32(vget_low_s32(low), vget_high_s32(low)),
                                  vpadd_s32(vget_low_s32(high), vget_high_s32(high)));
#endif
    return vcvtq_f32_s32(vaddq_s32(rows, vdupq_n_s32(c)));
}
INLINE ints mask(ints a, int m) { return vandq_s16(a, vdupq_n_s16((int16_t)m)); }
#define DOWN(a, n) vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(a), n))
#define DOWN_SIGNED(a, n) vshrq_n_s16(a, n)
#define UP(a, n) vshlq_n_s16(a, n)
INLINE floats all(float v) { return vdupq_n_f32(v); }
#if defined(__aarch64__)
INLINE floats fma(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
#else
INLINE floats fma(floats a, floats b, floats c) { return vmlaq_f32(c, a, b); }
#endif
INLINE floats loadf(const float *p) { return vld1q_f32(p); }
INLINE void store(float *p, floats v) { vst1q_f32(p, v); }
INLINE floats half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE floats brain(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE floats larger(floats a, floats b) { return vmaxq_f32(a, b); }
INLINE floats smaller(floats a, floats b) { return vminq_f32(a, b); }
#if defined(__aarch64__)
INLINE float across(floats v) { return vaddvq_f32(v); }
#else
INLINE float across(floats v) {
    float32x2_t sum = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(vpadd_f32(sum, sum), 0);
}
#endif
#else
#error "no vectors for this target"
#endif

#define PARTS (BLOCK / LANES) /* vectors across a block */

/* --- activations in 16 bits ---------------------------------------------------------------------------------------- */

typedef struct {
    int16_t *codes; /* (columns padded to BLOCK) */
    float *scales;  /* of each BLOCK columns */
    float *sums;    /* of each BLOCK columns: what an offset multiplies */
    int32_t *totals; /* of the codes of each BLOCK columns: what the centre of unsigned codes multiplies */
} rounded;

/* To the nearest whole number, for magnitudes under 4 million: adding 1.5 * 2 ** 23 leaves no place for a fraction. */
INLINE floats nearest_whole(floats v) { return v + all(12582912.0f) - all(12582912.0f); }

typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef shorts shorts_anywhere __attribute__((aligned(2)));

INLINE float largest(floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}

static void round_activations(const float *x, long columns, rounded to) {
    for (long start = 0, block = 0; start < columns; start += BLOCK, block++) {
        float padded[BLOCK];
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
        float peak = largest(most), inverse = peak > 0 ? 32767 / peak : 0;
        whole total_codes = {0};
        for (int s = 0; s < PARTS; s++) {
            whole codes = __builtin_convertvector(nearest_whole(loadf(given + s * LANES) * all(inverse)), whole);
            total_codes += codes;
            *(shorts_anywhere *)(to.codes + start + s * LANES) = __builtin_convertvector(codes, shorts);
        }
        float all_given = across(sum);
        to.scales[block] = all_given != all_given ? all_given : peak / 32767; /* what is not a number stays none */
        to.sums[block] = all_given;
        to.totals[block] = __builtin_reduce_add(total_codes);
    }
}

/* --- products ------------------------------------------------------------------------------------------------------ */

enum { INT8, INT4, INT3, INT2, FP32, FP16, BF16 };

typedef struct { /* mirrored in engine/kernels/native.py */
    const uint32_t *codes;
    const uint32_t *high;    /* int3 only */
    const uint16_t *scales;  /* FP16 */
    const uint16_t *offsets; /* FP16, or 0 */
    int32_t precision;
    int32_t rows;
    int32_t columns;
    int32_t group; /* columns that share a scale, divided by BLOCK */
} matrix;

/* The two lines that are needed 8 KiB from here: processors look less far ahead by themselves, and INT4 runs at 25 GB/s
   instead of 37 where memory delivers 40. What lies past the end is not read. */
#define PREFETCH(words) (__builtin_prefetch((words) + 2048), __builtin_prefetch((words) + 2048 + 16))

#define PAIR(field) pair(x + 2 * (field))

/* One block of rows, and all columns. WORDS of a row hold BLOCK columns; UNPACK multiplies those of word `v`. */
#define BLOCK_PRODUCT(NAME, WORDS, CENTRE, UNPACK)                                                                      \
    INLINE void NAME(const matrix *m, long block, rounded given, floats *sum) {                                          \
        long count = (m->columns + BLOCK - 1) / BLOCK;                                                                   \
        long padded = (count + m->group - 1) / m->group * m->group, groups = padded / m->group;                          \
        const uint32_t *codes = m->codes + block * padded * WORDS * BLOCK;                                               \
        const uint32_t *high = m->high + block * padded * BLOCK;                                                         \
        const uint16_t *scales = m->scales + block * groups * BLOCK;                                                     \
        const uint16_t *offsets = m->offsets ? m->offsets + block * groups * BLOCK : 0;                                  \
        (void)high;                                                                                                      \
        for (long k = 0; k < count; k++) {                                                                               \
            sums even[PARTS], odd[PARTS];                                                                                \
            const int16_t *x = given.codes + k * BLOCK;                                                                  \
            for (int s = 0; s < PARTS; s++) even[s] = odd[s] = none();                                                   \
            for (int word = 0; word < WORDS; word++, x += BLOCK / WORDS) {                                               \
                PREFETCH(codes + word * BLOCK);                                                                          \
                for (int s = 0; s < PARTS; s++) {                                                                        \
                    ints v = load(codes + word * BLOCK + s * LANES);                                                     \
                    UNPACK                                                                                               \
                }                                                                                                        \
            }                                                                                                            \
            codes += WORDS * BLOCK;                                                                                      \
            high += BLOCK;                                                                                               \
            floats scale = all(given.scales[k]), given_sum = all(given.sums[k]);                                         \
            for (int s = 0; s < PARTS; s++) {                                                                            \
                floats found = total(even[s], odd[s], -(CENTRE)*given.totals[k]);                                        \
                sum[s] = fma(half(scales + s * LANES) * scale, found, sum[s]);                                           \
                if (offsets) sum[s] = fma(half(offsets + s * LANES), given_sum, sum[s]);                                 \
            }                                                                                                            \
            if ((k + 1) % m->group == 0) {                                                                               \
                scales += BLOCK;                                                                                         \
                if (offsets) offsets += BLOCK;                                                                           \
            }                                                                                                            \
        }                                                                                                                \
    }

BLOCK_PRODUCT(product_int8, 8, 0,
    even[s] = dot(even[s], DOWN_SIGNED(UP(v, 8), 8), PAIR(0));
    odd[s] = dot(odd[s], DOWN_SIGNED(v, 8), PAIR(1));)

BLOCK_PRODUCT(product_int4, 4, 8,
    even[s] = dot(even[s], mask(v, 15), PAIR(0));
    odd[s] = dot(odd[s], mask(DOWN(v, 4), 15), PAIR(1));
    even[s] = dot(even[s], mask(DOWN(v, 8), 15), PAIR(2));
    odd[s] = dot(odd[s], DOWN(v, 12), PAIR(3));)

#define LOW_TWO_BITS                                                                                                    \
    even[s] = dot(even[s], mask(v, 3), PAIR(0));                                                                         \
    odd[s] = dot(odd[s], mask(DOWN(v, 2), 3), PAIR(1));                                                                  \
    even[s] = dot(even[s], mask(DOWN(v, 4), 3), PAIR(2));                                                                \
    odd[s] = dot(odd[s], mask(DOWN(v, 6), 3), PAIR(3));                                                                  \
    even[s] = dot(even[s], mask(DOWN(v, 8), 3), PAIR(4));                                                                \
    odd[s] = dot(odd[s], mask(DOWN(v, 10), 3), PAIR(5));                                                                 \
    even[s] = dot(even[s], mask(DOWN(v, 12), 3), PAIR(6));                                                               \
    odd[s] = dot(odd[s], DOWN(v, 14), PAIR(7));

BLOCK_PRODUCT(product_int2, 2, 2, LOW_TWO_BITS)

/* The plane of high bits: 16 fields in a half, of which the first word's columns have the lower 8. Worth 4 each. */
#define HIGH_BIT(field, shifted) mask(shifted, 4)
BLOCK_PRODUCT(product_int3, 2, 4,
    LOW_TWO_BITS
    if (s == 0 && word == 0) PREFETCH(high);
    ints h = load(high + s * LANES);
    if (word) h = DOWN(h, 8);
    even[s] = dot(even[s], mask(UP(h, 2), 4), PAIR(0));
    odd[s] = dot(odd[s], mask(UP(h, 1), 4), PAIR(1));
    even[s] = dot(even[s], mask(h, 4), PAIR(2));
    odd[s] = dot(odd[s], mask(DOWN(h, 1), 4), PAIR(3));
    even[s] = dot(even[s], mask(DOWN(h, 2), 4), PAIR(4));
    odd[s] = dot(odd[s], mask(DOWN(h, 3), 4), PAIR(5));
    even[s] = dot(even[s], mask(DOWN(h, 4), 4), PAIR(6));
    odd[s] = dot(odd[s], mask(DOWN(h, 5), 4), PAIR(7));)

static void quantised(const matrix *m, rounded given, float *y) {
    long blocks = (m->rows + BLOCK - 1) / BLOCK;
    for (long block = 0; block < blocks; block++) {
        floats sum[PARTS];
        float out[BLOCK];
        for (int s = 0; s < PARTS; s++) sum[s] = all(0);
        switch (m->precision) {
        case INT8: product_int8(m, block, given, sum); break;
        case INT4: product_int4(m, block, given, sum); break;
        case INT3: product_int3(m, block, given, sum); break;
        default: product_int2(m, block, given, sum);
        }
        long left = m->rows - block * BLOCK;
        if (left >= BLOCK) {
            for (int s = 0; s < PARTS; s++) store(y + block * BLOCK + s * LANES, sum[s]);
        } else {
            for (int s = 0; s < PARTS; s++) store(out + s * LANES, sum[s]);
            for (long i = 0; i < left; i++) y[block * BLOCK + i] = out[i];
        }
    }
}

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

/* Floats stand as (columns, rows): y gathers column after column, four at a time, and stays in the cache. */
#define DENSE(NAME, TYPE, LOAD, ONE)                                                                                    \
    static void NAME(const matrix *m, const float *x, float *y) {                                                        \
        const TYPE *weights = (const TYPE *)m->codes;                                                                    \
        long rows = m->rows, c = 0;                                                                                      \
        for (long r = 0; r < rows; r++) y[r] = 0;                                                                        \
        for (; c < m->columns; c += 4) {                                                                                 \
            long n = m->columns - c < 4 ? m->columns - c : 4, r = 0;                                                     \
            const TYPE *w[4];                                                                                            \
            float f[4];                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                               \
                w[i] = weights + (c + (i < n ? i : 0)) * rows;                                                           \
                f[i] = i < n ? x[c + i] : 0;                                                                             \
            }                                                                                                            \
            for (; r + LANES <= rows; r += LANES)                                                                        \
                store(y + r, fma(LOAD(w[3] + r), all(f[3]), fma(LOAD(w[2] + r), all(f[2]),                               \
                      fma(LOAD(w[1] + r), all(f[1]), fma(LOAD(w[0] + r), all(f[0]), loadf(y + r))))));                   \
            for (; r < rows; r++)                                                                                        \
                for (long i = 0; i < 4; i++) y[r] += ONE(w[i][r]) * f[i];                                                \
        }                                                                                                                \
    }
#define SAME(v) (v)
DENSE(dense_fp32, float, loadf, SAME)
DENSE(dense_fp16, uint16_t, half, half_to_float)
DENSE(dense_bf16, uint16_t, brain, brain_to_float)

/* --- what Python calls --------------------------------------------------------------------------------------------- */

INLINE rounded within(void *scratch, long columns) {
    long blocks = (columns + BLOCK - 1) / BLOCK;
    rounded r;
    r.scales = (float *)scratch;
    r.sums = r.scales + blocks;
    r.totals = (int32_t *)(r.sums + blocks);
    r.codes = (int16_t *)(r.totals + blocks);
    return r;
}

static __attribute__((noinline)) void times(const matrix *m, const float *x, rounded given, float *y) {
    switch (m->precision) {
    case FP32: dense_fp32(m, x, y); break;
    case FP16: dense_fp16(m, x, y); break;
    case BF16: dense_bf16(m, x, y); break;
    default: quantised(m, given, y);
    }
}

static __attribute__((noinline)) void prepare(const matrix *m, const float *x, rounded given) {
    if (m->precision <= INT2) round_activations(x, m->columns, given);
}

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

/* x (n, columns) -> y (n, rows). Scratch: see scratch_bytes in engine/kernels/native.py. */
EXPORT void product(const matrix *m, const float *x, float *y, int64_t n, void *scratch) {
    rounded given = within(scratch, m->columns);
    for (int64_t i = 0; i < n; i++, x += m->columns, y += m->rows) {
        prepare(m, x, given);
        times(m, x, given, y);
    }
}

/* down(silu(gate(x)) * up(x)): gate, up and down are m[0], m[1], m[2]. */
EXPORT void swiglu(const matrix *m, const float *x, float *y, int64_t n, void *scratch) {
    long width = m[0].rows, padded = (width + BLOCK - 1) / BLOCK * BLOCK;
    float *gated = (float *)scratch, *up = gated + padded;
    rounded given = within(up + padded, m[0].columns > width ? m[0].columns : width);
    for (int64_t i = 0; i < n; i++, x += m[0].columns, y += m[2].rows) {
        prepare(m, x, given);
        times(m, x, given, gated);
        times(m + 1, x, given, up);
        for (long j = 0; j < width; j += LANES) { /* past the width, into what is padding of both */
            floats v = loadf(gated + j), power = exponential(-larger(v, -v));
            /* 1 / (1 + e^-v), and e^v / (1 + e^v) below 0 */
            floats above = larger(v, all(0)), below = smaller(v, all(0));
            store(gated + j, (above + below * power) / (all(1) + power) * loadf(up + j));
        }
        prepare(m + 2, gated, given);
        times(m + 2, gated, given, y);
    }
}

/* wo(relu(wi(x))): wi and wo are m[0] and m[1]. */
EXPORT void relu_ffn(const matrix *m, const float *x, float *y, int64_t n, void *scratch) {
    long width = m[0].rows;
    float *inner = (float *)scratch;
    rounded given = within(inner + width, m[0].columns > width ? m[0].columns : width);
    for (int64_t i = 0; i < n; i++, x += m[0].columns, y += m[1].rows) {
        prepare(m, x, given);
        times(m, x, given, inner);
        for (long j = 0; j < width; j++) inner[j] = inner[j] < 0 ? 0 : inner[j];
        prepare(m + 1, inner, given);
        times(m + 1, inner, given, y);
    }
}

/* --- non-experts: (rows, columns), a row's columns side by side ------------------------------------------------------ */

/* Four rows at a time: four streams of memory, and x is loaded once for them. Halves are consumed twice as fast, so that
   the next four rows have to be asked for now. */
#define ROWS(NAME, TYPE, LOAD, ONE)                                                                                     \
    static void NAME(const TYPE *weights, const float *x, float *y, long rows, long columns) {                           \
        long ahead = sizeof(TYPE) == 4 ? 1024 : columns < 1024 ? 4096 : 4 * columns;                                     \
        for (long r = 0; r < rows; r += 4) {                                                                             \
            const TYPE *w[4];                                                                                            \
            floats sum[4], more[4];                                                                                      \
            long c = 0;                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                               \
                w[i] = weights + (r + i < rows ? r + i : rows - 1) * columns;                                            \
                sum[i] = more[i] = all(0);                                                                               \
            }                                                                                                            \
            for (; c + 2 * LANES <= columns; c += 2 * LANES) {                                                           \
                floats first = loadf(x + c), second = loadf(x + c + LANES);                                              \
                for (int i = 0; i < 4; i++) {                                                                            \
                    __builtin_prefetch(w[i] + c + ahead);                                                                \
                    sum[i] = fma(LOAD(w[i] + c), first, sum[i]);                                                         \
                    more[i] = fma(LOAD(w[i] + c + LANES), second, more[i]);                                              \
                }                                                                                                        \
            }                                                                                                            \
            for (int i = 0; i < 4 && r + i < rows; i++) {                                                                \
                float rest = across(sum[i] + more[i]);                                                                   \
                for (long j = c; j < columns; j++) rest += ONE(w[i][j]) * x[j];                                          \
                y[r + i] = rest;                                                                                         \
            }                                                                                                            \
        }                                                                                                                \
    }
ROWS(rows_fp32, float, loadf, SAME)
ROWS(rows_fp16, uint16_t, half, half_to_float)
ROWS(rows_bf16, uint16_t, brain, brain_to_float)

static __attribute__((noinline)) void by_rows(
    int32_t precision, const void *weights, const float *x, float *y, long rows, long columns) {
    switch (precision) {
    case FP16: rows_fp16(weights, x, y, rows, columns); break;
    case BF16: rows_bf16(weights, x, y, rows, columns); break;
    default: rows_fp32(weights, x, y, rows, columns);
    }
}

/* x (n, columns) -> y (n, rows), by weights (rows, columns) in a float format. */
EXPORT void linear(const void *weights, const float *x, float *y, int64_t n, int64_t rows, int64_t columns, int64_t precision) {
    for (int64_t i = 0; i < n; i++) by_rows((int32_t)precision, weights, x + i * columns, y + i * rows, rows, columns);
}

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

INLINE float square_root(float v) {
#if defined(__AVX2__)
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v)));
#else
    return __builtin_sqrtf(v);
#endif
}

static void rms_norm(const float *x, const float *weight, float eps, float *to, long n) {
    float scale = 1 / square_root(dot_product(x, x, n) / (float)n + eps);
    for (long i = 0; i < n; i++) to[i] = x[i] * scale * weight[i];
}

typedef struct { /* mirrored in engine/kernels/native.py */
    const float *norm; /* (hidden) */
    const void *q, *k, *v, *o;
    int32_t precisions[4]; /* of q, k, v, o */
    int32_t hidden, heads, kv_heads, head_dim;
    int32_t window; /* positions that one sees, itself included; 0: all */
    float eps;
} attention_layer;

INLINE void rotate(float *head, const float *cosine, const float *sine, long half_dim) {
    for (long i = 0; i < half_dim; i++) {
        float first = head[i], second = head[i + half_dim];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half_dim] = second * cosine[i] + first * sine[i];
    }
}

/* One token's attention block: x (hidden) -> y = x + o(attention(norm(x))), at `position`; keys and values
   (kv_heads, positions, head_dim) gain a row. cosine, sine (positions, head_dim / 2). */
EXPORT void attend(
    const attention_layer *a, float *keys, float *values, const float *cosine, const float *sine, int64_t positions,
    int64_t position, const float *x, float *y, void *scratch) {
    long dim = a->head_dim, queries = (long)a->heads * dim, shared = a->heads / a->kv_heads, seen = position + 1;
    float *normed = (float *)scratch, *q = normed + a->hidden, *mixed = q + queries, *scores = mixed + queries;
    long from = a->window && seen > a->window ? seen - a->window : 0;
    float scale = 1 / square_root((float)dim);

    rms_norm(x, a->norm, a->eps, normed, a->hidden);
    by_rows(a->precisions[0], a->q, normed, q, queries, a->hidden);
    float *k = mixed, *v = scores; /* until they are in the cache */
    by_rows(a->precisions[1], a->k, normed, k, a->kv_heads * dim, a->hidden);
    by_rows(a->precisions[2], a->v, normed, v, a->kv_heads * dim, a->hidden);
    cosine += position * (dim / 2);
    sine += position * (dim / 2);
    for (long h = 0; h < a->heads; h++) rotate(q + h * dim, cosine, sine, dim / 2);
    for (long h = 0; h < a->kv_heads; h++) {
        rotate(k + h * dim, cosine, sine, dim / 2);
        float *key = keys + (h * positions + position) * dim, *value = values + (h * positions + position) * dim;
        for (long i = 0; i < dim; i++) {
            key[i] = k[h * dim + i];
            value[i] = v[h * dim + i];
        }
    }
    for (long h = 0; h < a->heads; h++) {
        const float *head_keys = keys + h / shared * positions * dim, *head_values = values + h / shared * positions * dim;
        float *out = mixed + h * dim, most = -3e38f, sum = 0;
        for (long p = from; p < seen; p++) {
            scores[p] = dot_product(q + h * dim, head_keys + p * dim, dim) * scale;
            most = scores[p] > most ? scores[p] : most;
        }
        for (long p = from; p < seen; p += LANES) { /* past the end, into padding: which is not added */
            store(scores + p, exponential(smaller(loadf(scores + p) - all(most), all(0))));
        }
        for (long p = from; p < seen; p++) sum += scores[p];
        for (long i = 0; i < dim; i++) out[i] = 0;
        for (long p = from; p < seen; p++) add_scaled(out, head_values + p * dim, scores[p] / sum, dim);
    }
    by_rows(a->precisions[3], a->o, mixed, y, a->hidden, queries);
    for (long i = 0; i < a->hidden; i++) y[i] += x[i];
}

/* x (hidden) -> normed (hidden), and logits (rows) = weights (rows, hidden) of it: a router, or the head. */
EXPORT void normed_linear(
    const float *norm, const void *weights, const float *x, float *normed, float *logits, int64_t rows, int64_t hidden,
    int64_t precision, float eps) {
    rms_norm(x, norm, eps, normed, hidden);
    by_rows((int32_t)precision, weights, normed, logits, rows, hidden);
}

/* Reads memory and does nothing else worth mentioning: what products are measured against. */
EXPORT float read_memory(const float *values, int64_t n) {
    floats sum[8];
    for (int s = 0; s < 8; s++) sum[s] = all(0);
    for (int64_t i = 0; i + 8 * LANES <= n; i += 8 * LANES)
        for (int s = 0; s < 8; s++) {
            __builtin_prefetch(values + i + s * LANES + 2048);
            sum[s] += loadf(values + i + s * LANES);
        }
    for (int s = 1; s < 8; s++) sum[0] += sum[s];
    return across(sum[0]);
}
