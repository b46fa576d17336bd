#pragma once

// The innermost product: R x WIDTH results that stay in registers.

#include "vector.h"

namespace {

#if defined(__AVX512F__)
constexpr long ROWS = 12, COLUMNS = 2;  // 24 of 32 registers hold results
#else
constexpr long ROWS = 4, COLUMNS = 2;  // 8 of 16; of more, compilers keep some in memory
#endif
constexpr long WIDTH = COLUMNS * LANES;

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
inline Floats dot_pairs(Floats a, Floats b, Floats c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
// Writes numbers of two rows as pairs; those of `high` are zeros if it is null.
inline void store_pairs(float* to, const Half* low, const Half* high) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  if (!high) return _mm512_storeu_si512(to, first);
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
  _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
#else
constexpr bool HAS_PAIRS = false;
inline Floats dot_pairs(Floats, Floats, Floats c) { return c; }  // never called
inline void store_pairs(float*, const Half*, const Half*) {}
#endif

// c (R, WIDTH), with c_row numbers from row to row, becomes a b, or c + a b if ADDS. The element
// of row r and step i of a is a[i * a_step + r * a_row]; b is (steps, WIDTH), dense.
// With PAIRS each number of a and b is two bfloat16 ones, whose products are added.
template <long R, bool ADDS, bool PAIRS = false>
[[gnu::always_inline]] inline void multiply(const float* a, long a_step, long a_row, const float* b, long steps, float* c,
                     long c_row) {
  Floats sums[R][COLUMNS];
#pragma GCC unroll 12
  for (long row = 0; row < R; ++row)
#pragma GCC unroll 2
    for (long column = 0; column < COLUMNS; ++column)
      sums[row][column] = ADDS ? load(c + row * c_row + column * LANES) : every(0.f);
  for (long step = 0; step < steps; ++step, a += a_step, b += WIDTH) {
    Floats columns[COLUMNS];
#pragma GCC unroll 2
    for (long column = 0; column < COLUMNS; ++column) columns[column] = load(b + column * LANES);
#pragma GCC unroll 12
    for (long row = 0; row < R; ++row) {
      const Floats factor = every(a[row * a_row]);
#pragma GCC unroll 2
      for (long column = 0; column < COLUMNS; ++column)
        sums[row][column] = PAIRS ? dot_pairs(factor, columns[column], sums[row][column])
                                  : fma(factor, columns[column], sums[row][column]);
    }
  }
#pragma GCC unroll 12
  for (long row = 0; row < R; ++row)
#pragma GCC unroll 2
    for (long column = 0; column < COLUMNS; ++column)
      store(c + row * c_row + column * LANES, sums[row][column]);
}

// The row itself if it is float32; or its numbers, widened to `to`.
inline const float* as_floats(const float* row, long, float*) { return row; }
inline const float* as_floats(const Half* row, long count, float* to) {
  for (long i = 0; i < count; i += LANES) store(to + i, load(row + i));
  return to;
}

// Writes columns [first, first + LANES) of LANES rows as rows, `stride` numbers apart.
inline void transpose(const float* const* rows, long first, float* to, long stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load(rows[i] + first);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  // a[4g + j] holds columns j, 4 + j, 8 + j and 12 + j of rows 4g to 4g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xDD);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xDD);
    store(to + j * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    store(to + (8 + j) * stride, _mm512_shuffle_f32x4(low, low2, 0xDD));
    store(to + (4 + j) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    store(to + (12 + j) * stride, _mm512_shuffle_f32x4(high, high2, 0xDD));
  }
#else
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load(rows[i] + first);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(to + j * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    store(to + (4 + j) * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
#endif
}

}  // namespace
