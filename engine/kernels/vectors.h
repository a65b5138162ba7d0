/* What differs between processors. A vector has LANES values of 32 bits; operators of C work on all of them.

   Processors multiply small integers and add the products four bytes at a time (QUADS), or two halves of 16 bits. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#define QUADS 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define QUADS 0
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define LANES 4
#if defined(__ARM_FEATURE_DOTPROD)
#define QUADS 1
#else
#define QUADS 0
#endif
#else
#error "no vectors for this target"
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(4 * LANES)));
typedef int16_t signed_halves __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef floats floats_anywhere __attribute__((aligned(4)));
typedef halves halves_anywhere __attribute__((aligned(4)));
typedef shorts shorts_anywhere __attribute__((aligned(2)));

INLINE floats all(float v) { return (floats){0} + v; }
INLINE floats loadf(const float *p) { return *(const floats_anywhere *)p; }
INLINE void store(float *p, floats v) { *(floats_anywhere *)p = v; }
INLINE halves load(const uint32_t *p) { return *(const halves_anywhere *)p; }
INLINE halves spread(const void *four_bytes) {
    int32_t value;
    __builtin_memcpy(&value, four_bytes, 4);
    return (halves)((whole){0} + value);
}

#if LANES == 16
typedef whole sums; /* of products, for each lane */
INLINE sums dot(sums a, halves codes, halves x) { return (sums)_mm512_dpbusd_epi32((__m512i)a, (__m512i)codes, (__m512i)x); }
INLINE whole total(sums a) { return a; }
INLINE floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE floats brain(const uint16_t *p) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE float across(floats v) { return _mm512_reduce_add_ps(v); }
#elif LANES == 8
typedef whole sums;
INLINE sums dot(sums a, halves codes, halves x) { return a + (sums)_mm256_madd_epi16((__m256i)codes, (__m256i)x); }
INLINE whole total(sums a) { return a; }
INLINE floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE floats brain(const uint16_t *p) {
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE float across(floats v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#else
#if QUADS
typedef whole sums;
INLINE sums dot(sums a, halves codes, halves x) { return vdotq_s32(a, (int8x16_t)codes, (int8x16_t)x); }
INLINE whole total(sums a) { return a; }
#else
typedef struct { int32x4_t low, high; } sums; /* of two lanes each, the pairs not added yet */
INLINE sums dot(sums a, halves codes, halves x) {
    a.low = vmlal_s16(a.low, vget_low_s16((int16x8_t)codes), vget_low_s16((int16x8_t)x));
    a.high = vmlal_s16(a.high, vget_high_s16((int16x8_t)codes), vget_high_s16((int16x8_t)x));
    return a;
}
INLINE whole total(sums a) {
#if defined(__aarch64__)
    return vpaddq_s32(a.low, a.high);
#else
    return vcombine_s32(vpadd_s32(vget_low_s32(a.low), vget_high_s32(a.low)),
                        vpadd_s32(vget_low_s32(a.high), vget_high_s32(a.high)));
#endif
}
#endif
#if defined(__aarch64__)
INLINE floats fma(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE float across(floats v) { return vaddvq_f32(v); }
#else
INLINE floats fma(floats a, floats b, floats c) { return vmlaq_f32(c, a, b); }
INLINE float across(floats v) {
    float32x2_t sum = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(vpadd_f32(sum, sum), 0);
}
#endif
INLINE floats half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE floats brain(const uint16_t *p) { return (floats)vshll_n_u16(vld1_u16(p), 16); }
INLINE floats larger(floats a, floats b) { return vmaxq_f32(a, b); }
INLINE floats smaller(floats a, floats b) { return vminq_f32(a, b); }
#endif

#if defined(__AVX2__)
INLINE float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }
INLINE void pause(void) { _mm_pause(); }
#else
INLINE float square_root(float v) { return __builtin_sqrtf(v); }
INLINE void pause(void) { __asm__ volatile("yield"); }
#endif
