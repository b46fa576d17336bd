#pragma once

// Products in float32 on processors whose matrix unit (AMX) multiplies bfloat16.
//
// A float32 number is the sum of three bfloat16 ones, exactly: 24 bits are three times 8. The unit
// multiplies those and adds up in float32. Of the products of parts, those below 2^-24 of the whole
// are left out, so that the result is as good as that of float32 arithmetic; five or six products
// in the matrix unit still take less time than one in the vector unit.

#include <immintrin.h>

#include <cstdint>
#include <cmath>
#include <cstdlib>
#include <algorithm>
#include <initializer_list>

namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr long TILE = 512;   // halves: 16 rows of 32
constexpr long PANEL = 32;   // rows, and columns, of one block of results: 2 x 2 tiles
constexpr long STEP = 32;    // inputs in one tile
constexpr long PARTS = 3;    // of an activation

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __m512 widen(__m256i part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
}

// Splits 32 numbers into parts; `out` is a row in the tile of the first part, and the tiles of the
// other parts follow at distances of TILE.
inline void split(__m512 low, __m512 high, Half* out) {
  for (long part = 0; part < PARTS; ++part) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_store_si512(out + part * TILE, both);
    low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(both)));
    high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64(both, 1)));
  }
}

// Writes rows of x as tiles [16 rows][step][part][row][input]. Missing rows become zeros. If
// `scales` (one for each row) and `weight` (one for each input) are given, x is multiplied by both.
inline void split_rows(const float* x, long x_row, long rows, long inputs, long panels, Half* out,
                       const float* scales = nullptr, const float* weight = nullptr) {
  const long steps = inputs / STEP;
  for (long tile = 0; tile < 2 * panels; ++tile)
    for (long step = 0; step < steps; ++step, out += PARTS * TILE)
      for (long row = 0; row < 16; ++row) {
        __m512 low = _mm512_setzero_ps(), high = low;
        if (tile * 16 + row < rows) {
          const float* from = x + (tile * 16 + row) * x_row + step * STEP;
          low = _mm512_loadu_ps(from);
          high = _mm512_loadu_ps(from + 16);
          if (weight) {
            const __m512 scale = _mm512_set1_ps(scales[tile * 16 + row]);
            low = _mm512_mul_ps(_mm512_mul_ps(low, scale), _mm512_loadu_ps(weight + step * STEP));
            high = _mm512_mul_ps(_mm512_mul_ps(high, scale),
                                 _mm512_loadu_ps(weight + step * STEP + 16));
          }
        }
        split(low, high, out + row * STEP);
      }
}

template <int WITH>  // number of parts of the activations, the largest first
inline void multiply(const Half* a0, const Half* a1, const Half* b0, const Half* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(7, b1, 64);
  for (int part = 0; part < WITH; ++part) {
    _tile_loadd(4, a0 + part * TILE, 64);
    _tile_loadd(5, a1 + part * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Computes 32 x 32 results; the strides lead to the second rows and columns of tiles. `meanwhile`
// is called in each step: other units of the processor are idle while this one multiplies.
template <typename Meanwhile>
inline void block(const Half* a, long a_stride, const Half* b, long b_stride, long steps,
                  int weight_parts, float* c, long c_row, const Meanwhile& meanwhile) {
  const Half *a0 = a, *a1 = a + a_stride;
  const Half *b0 = b, *b1 = b + b_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long step = 0; step < steps; ++step) {
    multiply<3>(a0, a1, b0, b1);
    multiply<2>(a0, a1, b0 + TILE, b1 + TILE);
    if (weight_parts == 3) multiply<1>(a0, a1, b0 + 2 * TILE, b1 + 2 * TILE);
    meanwhile(step);
    a0 += PARTS * TILE;
    a1 += PARTS * TILE;
    b0 += weight_parts * TILE;
    b1 += weight_parts * TILE;
  }
  _tile_stored(0, c, c_row * sizeof(float));
  _tile_stored(1, c + 16, c_row * sizeof(float));
  _tile_stored(2, c + 16 * c_row, c_row * sizeof(float));
  _tile_stored(3, c + 16 * c_row + 16, c_row * sizeof(float));
}

// e^x to about 1 unit in the last place: 2^n by the exponent, the rest by a polynomial (Cephes).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(next));
  p = _mm512_fmadd_ps(_mm512_mul_ps(x, x), p, _mm512_add_ps(x, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

// Memory of this thread that is kept between calls.
inline Half* buffer(long halves) {
  static thread_local Half* memory = nullptr;
  static thread_local long held = 0;
  if (held < halves) {
    std::free(memory);
    memory = (Half*)std::aligned_alloc(64, halves * sizeof(Half));
    held = halves;
  }
  return memory;
}

}  // namespace
