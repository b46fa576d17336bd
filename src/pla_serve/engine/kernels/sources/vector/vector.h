#pragma once

// Vectors of float32 numbers, as wide as the level that is compiled: 16 with AVX-512, 8 with AVX2.
// All other files of this folder are written in these terms, so that each level is a set of flags.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

using Half = uint16_t;  // the bits of a bfloat16
struct Half16 {         // those of a float16
  uint16_t bits;
};

#if defined(__AVX512F__)

constexpr long LANES = 16;
using Floats = __m512;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline Floats every(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The larger of both; b if one of them is no number.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline float largest(Floats v) { return _mm512_reduce_max_ps(v); }
// Whether any lane of a is larger than that of b, or no number.
inline bool any_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0; }
// v in the first `count` lanes, `other` in the rest.
inline Floats first(long count, Floats v, Floats other) {
  const __mmask16 mask = count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
  return _mm512_mask_mov_ps(other, mask, v);
}
inline Floats nearest(Floats v) { return _mm512_roundscale_ps(v, 0); }
// v times 2^n, for whole n.
inline Floats scale_by_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
// x within the exponents that `scale_by_power` can make.
inline Floats representable(Floats x) { return x; }
inline Floats evens(Floats v) { return _mm512_moveldup_ps(v); }
inline Floats odds(Floats v) { return _mm512_movehdup_ps(v); }
inline Floats swapped(Floats v) { return _mm512_permute_ps(v, 0xB1); }
// a * b - c in even lanes, a * b + c in odd lanes.
inline Floats fmaddsub(Floats a, Floats b, Floats c) { return _mm512_fmaddsub_ps(a, b, c); }
inline Floats load(const Half* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load(const Half16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline __m512i bits(Floats v) { return _mm512_castps_si512(v); }
inline void store(Half* to, Floats v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(v));
#else
  const __m512i one = _mm512_and_si512(_mm512_srli_epi32(bits(v), 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits(v), _mm512_set1_epi32(0x7FFF)), one);
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7FC00000), number, rounded);
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
#endif
}

#else

constexpr long LANES = 8;
using Floats = __m256;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
inline Floats every(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline float sum(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Floats v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline bool any_above(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
}
inline Floats first(long count, Floats v, Floats other) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const int most = (int)std::max(0L, std::min(count, LANES));
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(most), lanes);
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(mask));
}
inline Floats nearest(Floats v) { return _mm256_round_ps(v, 8); }
inline Floats scale_by_power(Floats v, Floats n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), shifted));
}
inline Floats representable(Floats x) {
  return larger(every(-126.f), smaller(every(127.f), x));
}
inline Floats evens(Floats v) { return _mm256_moveldup_ps(v); }
inline Floats odds(Floats v) { return _mm256_movehdup_ps(v); }
inline Floats swapped(Floats v) { return _mm256_permute_ps(v, 0xB1); }
inline Floats fmaddsub(Floats a, Floats b, Floats c) { return _mm256_fmaddsub_ps(a, b, c); }
inline Floats load(const Half* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats load(const Half16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline void store(Half* to, Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i one = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i kept = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), one);
  const __m256 number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
  kept = _mm256_blendv_epi8(_mm256_set1_epi32(0x7FC00000), kept, _mm256_castps_si256(number));
  kept = _mm256_srli_epi32(kept, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
}

#endif

// 2^x to about 1 unit in the last place: 2^n by the exponent, the rest by a polynomial fitted on
// [-1/2, 1/2] to a relative error of 7.5e-8. NaN stays NaN.
inline Floats power_of_two(Floats x) {
  x = representable(x);
  const Floats n = nearest(x), rest = sub(x, n);
  Floats p = every(1.327646730e-3f);
  p = fma(p, rest, every(9.675541681e-3f));
  p = fma(p, rest, every(5.550713291e-2f));
  p = fma(p, rest, every(2.402211972e-1f));
  p = fma(p, rest, every(6.931469671e-1f));
  p = fma(p, rest, every(1.000000072f));
  return scale_by_power(p, n);
}

// Asks for memory to be brought into the second level of the cache.
template <typename Number>
inline void prefetch(const Number* from, long count) {
  for (const char* at = (const char*)from; at < (const char*)(from + count); at += 64)
    _mm_prefetch(at, _MM_HINT_T1);
}

// Memory of this thread that is kept between calls.
inline float* buffer(long floats) {
  static thread_local float* memory = nullptr;
  static thread_local long held = 0;
  if (held < floats) {
    std::free(memory);
    held = (floats + 15) / 16 * 16;
    memory = (float*)std::aligned_alloc(64, held * sizeof(float));
  }
  return memory;
}

}  // namespace
