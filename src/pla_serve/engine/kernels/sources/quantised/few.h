#pragma once

// Products for few tokens: every weight is read once, as it lies in the file.

#include "inputs.h"

namespace {

constexpr long STRIP = 16;  // outputs that are finished together
constexpr long AHEAD = 16384;  // bytes of weights that are on their way from memory

// Products of R rows of weights, at distances of `stride` bytes, with inputs of M tokens.
template <class F, int R, int M>
inline void row_products(const uint8_t* rows, long stride, const Inputs& x, long token, float* out,
                         long out_row) {
  Floats sums[R][M];
  float offsets[R][M];
  #pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = no_floats(), offsets[r][m] = 0.f;
  const int16_t* levels = x.levels + token * x.inputs;
  const float *scales = x.scales + token * x.groups, *totals = x.sums + token * x.groups;
  for (long block = 0; block < x.groups / F::GROUPS; ++block) {
    float scale[R][F::GROUPS * (1 + F::HALVES)], offset[R][F::GROUPS];
    #pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      F::scales(rows + r * stride + block * F::BYTES, scale[r], offset[r]);
    for (int r = 0; r < R; ++r)
      for (long at = 0; at < F::BYTES; at += 64)
        _mm_prefetch((const char*)(rows + r * stride + block * F::BYTES + at + AHEAD), _MM_HINT_T0);
    for (long g = 0; g < F::GROUPS; ++g) {
      const long group = block * F::GROUPS + g;
      #pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Pairs w = widen(F::levels(rows + r * stride + block * F::BYTES, g));
        #pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Ints ints = dot(no_ints(), w, load_pairs(levels + m * x.inputs + group * GROUP));
          const float own = scales[m * x.groups + group];
          const Floats factor = F::HALVES ? splat(scale[r][2 * g] * own, scale[r][2 * g + 1] * own)
                                          : splat(scale[r][g] * own);
          sums[r][m] = multiply_add(number(ints), factor, sums[r][m]);
          if (F::OFFSETS) offsets[r][m] += offset[r][g] * totals[m * x.groups + group];
        }
      }
    }
  }
  #pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) out[m * out_row + r] = sum(sums[r][m]) + offsets[r][m];
}

// Products of `count` rows of weights with M tokens, as many rows at a time as registers allow.
template <class F, int M>
inline void strip_products(const uint8_t* rows, long stride, long count, const Inputs& x,
                           long token, float* out, long out_row) {
  constexpr int R = M == 1 ? 4 : M <= 4 ? 2 : 1;
  long r = 0;
  for (; r + R <= count; r += R)
    row_products<F, R, M>(rows + r * stride, stride, x, token, out + r, out_row);
  for (; r < count; ++r)
    row_products<F, 1, M>(rows + r * stride, stride, x, token, out + r, out_row);
}

// out[token][r], at distances of `out_row`, for up to STRIP rows of weights and any tokens.
template <class F>
inline void few_products(const uint8_t* rows, long stride, long count, const Inputs& x, long tokens,
                         float* out, long out_row) {
  long token = 0;
  for (; token + 8 <= tokens; token += 8)
    strip_products<F, 8>(rows, stride, count, x, token, out + token * out_row, out_row);
  for (; token + 4 <= tokens; token += 4)
    strip_products<F, 4>(rows, stride, count, x, token, out + token * out_row, out_row);
  for (; token + 2 <= tokens; token += 2)
    strip_products<F, 2>(rows, stride, count, x, token, out + token * out_row, out_row);
  if (token < tokens)
    strip_products<F, 1>(rows, stride, count, x, token, out + token * out_row, out_row);
}

}  // namespace
