#pragma once

// Sixteen numbers at once, in one register of AVX-512 or in two of AVX2. The code that uses these
// types is the same on both, and so are its integers; only the order of float sums is fixed here.

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

#if defined(__AVX512BW__)

using Floats = __m512;  // 16 float32
using Ints = __m512i;   // 16 int32
using Pairs = __m512i;  // 16 pairs of int16

inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats splat(float low, float high) {
  return _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1);
}
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats size(Floats a) { return _mm512_abs_ps(a); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline Floats number(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
inline Floats power_of_two(Ints a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
}
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int sum(Ints a) { return _mm512_reduce_add_epi32(a); }
inline void store_narrow(int16_t* to, Ints v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(v));
}
inline Pairs load_pairs(const int16_t* from) { return _mm512_loadu_si512(from); }
inline Pairs same_pair(const int16_t* from) { return _mm512_set1_epi32(*(const int32_t*)from); }
inline Pairs widen(__m256i bytes) { return _mm512_cvtepi8_epi16(bytes); }
inline Ints dot(Ints sums, Pairs a, Pairs b) {
#if defined(__AVX512VNNI__)
  // As the intrinsic, for which GCC 12 copies the sums in every step of a loop.
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
#else
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}

#else

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
using Pairs = Ints;

inline Floats splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats splat(float low, float high) { return {_mm256_set1_ps(low), _mm256_set1_ps(high)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats v) {
  _mm256_storeu_ps(to, v.a);
  _mm256_storeu_ps(to + 8, v.b);
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)};
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
inline Floats divide(Floats a, Floats b) {
  return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)};
}
inline Floats smaller(Floats a, Floats b) {
  return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)};
}
inline Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)};
}
inline Floats size(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
inline float sum(Floats v) {
  const __m256 a = _mm256_add_ps(v.a, v.b);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
inline float largest(Floats v) {
  const __m256 a = _mm256_max_ps(v.a, v.b);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}
inline Floats number(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline Ints rounded(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline Floats power_of_two(Ints v) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(v.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(v.b, bias), 23))};
}
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)};
}
inline int sum(Ints v) {
  const __m256i a = _mm256_add_epi32(v.a, v.b);
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xB1)));
}
inline void store_narrow(int16_t* to, Ints v) {
  const __m256i packed = _mm256_packs_epi32(v.a, v.b);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xD8));
}
inline Pairs load_pairs(const int16_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 16))};
}
inline Pairs same_pair(const int16_t* from) {
  const __m256i pair = _mm256_set1_epi32(*(const int32_t*)from);
  return {pair, pair};
}
inline Pairs widen(__m256i bytes) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
          _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
}
inline Ints dot(Ints sums, Pairs a, Pairs b) {
  return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(a.a, b.a)),
          _mm256_add_epi32(sums.b, _mm256_madd_epi16(a.b, b.b))};
}

#endif

inline Floats no_floats() { return splat(0.f); }

// e^x to about 1 unit in the last place: 2^n by the exponent, the rest by a polynomial (Cephes).
inline Floats exponential(Floats x) {
  x = larger(smaller(x, splat(88.f)), splat(-87.f));
  const Ints whole = rounded(multiply(x, splat(1.44269504088896341f)));
  const Floats n = number(whole);
  x = multiply_add(n, splat(-0.693359375f), x);
  x = multiply_add(n, splat(2.12194440e-4f), x);
  Floats p = splat(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    p = multiply_add(p, x, splat(next));
  p = multiply_add(multiply(x, x), p, add(x, splat(1.f)));
  return multiply(p, power_of_two(whole));
}

inline Floats swish(Floats v) {
  return divide(v, add(splat(1.f), exponential(multiply(v, splat(-1.f)))));
}

inline float half(const uint8_t* from) { return _cvtsh_ss(*(const uint16_t*)from); }

}  // namespace
