/* Products with quantised experts, for one thread at a time. Freestanding: no C library, no allocation, no globals.

   A matrix lies as engine/quantize.py packs it: blocks of 32 rows, in them groups of columns, in them words of 32 bits, a
   word of each row side by side. The low half of a word holds even columns, the high half odd ones, in fields: so that one
   shift and one mask give pairs of neighbouring columns for a multiply-add of 16-bit pairs.

   Activations are rounded to 16 bits, with a scale for each 32 of them: an error of 1e-5, under float32's own in a sum of
   thousands. Products are exact in 32 bits within 32 columns, and float32 from there on. */

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

INLINE float absolute(float v) { return v < 0 ? -v : v; }

static void round_activations(const float *x, long columns, rounded to) {
    for (long start = 0, block = 0; start < columns; start += BLOCK, block++) {
        long n = columns - start < BLOCK ? columns - start : BLOCK;
        float most = 0, sum = 0;
        for (long i = 0; i < n; i++) {
            float v = absolute(x[start + i]);
            most = v > most ? v : most;
            sum += x[start + i];
        }
        float scale = most / 32767, inverse = most > 0 ? 32767 / most : 0;
        int32_t all_codes = 0;
        for (long i = 0; i < BLOCK; i++) {
            float v = i < n ? x[start + i] * inverse : 0;
            int32_t code = (int32_t)(v < 0 ? v - 0.5f : v + 0.5f);
            to.codes[start + i] = (int16_t)code;
            all_codes += code;
        }
        to.scales[block] = scale;
        to.sums[block] = sum;
        to.totals[block] = all_codes;
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
            for (int word = 0; word < WORDS; word++, x += BLOCK / WORDS)                                                 \
                for (int s = 0; s < PARTS; s++) {                                                                        \
                    ints v = load(codes + word * BLOCK + s * LANES);                                                     \
                    UNPACK                                                                                               \
                }                                                                                                        \
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
INLINE float exponential(float v) {
    union { int32_t bits; float value; } power;
    float scaled = v * 1.44269504f;
    scaled = scaled < -126 ? -126 : scaled;
    int32_t whole = (int32_t)(scaled - 0.5f);
    float rest = (scaled - (float)whole) * 0.693147181f;
    power.bits = (whole + 127) << 23;
    float series = 1 + rest * (1.0f / 7);
    series = 1 + rest * series * (1.0f / 6);
    series = 1 + rest * series * (1.0f / 5);
    series = 1 + rest * series * (1.0f / 4);
    series = 1 + rest * series * (1.0f / 3);
    series = 1 + rest * series * (1.0f / 2);
    return power.value * (1 + rest * series);
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
    long width = m[0].rows;
    float *gated = (float *)scratch, *up = gated + width;
    rounded given = within(up + width, m[0].columns > width ? m[0].columns : width);
    for (int64_t i = 0; i < n; i++, x += m[0].columns, y += m[2].rows) {
        prepare(m, x, given);
        times(m, x, given, gated);
        times(m + 1, x, given, up);
        for (long j = 0; j < width; j++) {
            float power = exponential(-absolute(gated[j]));
            gated[j] *= (gated[j] < 0 ? power : 1) / (1 + power) * up[j];
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
