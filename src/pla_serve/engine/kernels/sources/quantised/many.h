#pragma once

// Products for many tokens: levels of 32 rows of weights are unpacked into a panel, in the order in
// which they are multiplied, and used for a chunk of tokens.

#include "few.h"

namespace {

constexpr long WIDE = 32;  // outputs of a panel
#if defined(__AVX512BW__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 1;
#endif

struct Panel {
  int32_t* pairs;  // [pair of inputs][32 outputs]
  float* scales;   // [group, or half of one][32 outputs]
  float* offsets;  // [group][32 outputs]

  static long bytes(long inputs) { return inputs * WIDE * 2 + inputs / GROUP * WIDE * 12 + 64; }
  static Panel in(uint8_t* memory, long inputs) {
    float* scales = (float*)(memory + inputs * WIDE * 2);
    return {(int32_t*)memory, scales, scales + inputs / GROUP * WIDE * 2};
  }
};

// Writes the transpose of 8 x 8 numbers.
inline void transpose(const int32_t* from, long from_row, int32_t* to, long to_row) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256((const __m256i*)(from + i * from_row));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    _mm256_storeu_si256((__m256i*)(to + i * to_row), low);
    _mm256_storeu_si256((__m256i*)(to + (i + 4) * to_row), high);
  }
}

// Unpacks 32 rows of weights. Where there are fewer than 32 the last one fills up the panel.
template <class F>
inline void pack(const uint8_t* rows, long stride, long count, long inputs, const Panel& to) {
  alignas(64) int32_t square[16 * 16];
  constexpr long PARTS = 1 + F::HALVES;
  for (long first = 0; first < WIDE; first += 16)
    for (long block = 0; block < inputs / GROUP / F::GROUPS; ++block) {
      const uint8_t* blocks[16];
      for (long r = 0; r < 16; ++r) {
        blocks[r] = rows + std::min(first + r, count - 1) * stride + block * F::BYTES;
        float scale[F::GROUPS * PARTS], offset[F::GROUPS] = {};
        F::scales(blocks[r], scale, offset);
        for (long g = 0; g < F::GROUPS * PARTS; ++g)
          to.scales[(block * F::GROUPS * PARTS + g) * WIDE + first + r] = scale[g];
        for (long g = 0; F::OFFSETS && g < F::GROUPS; ++g)
          to.offsets[(block * F::GROUPS + g) * WIDE + first + r] = offset[g];
      }
      for (long g = 0; g < F::GROUPS; ++g) {
        for (long r = 0; r < 16; ++r) {
          const __m256i levels = F::levels(blocks[r], g);
          __m256i* row = (__m256i*)(square + r * 16);
          row[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(levels));
          row[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(levels, 1));
        }
        int32_t* out = to.pairs + (block * F::GROUPS + g) * GROUP / 2 * WIDE + first;
        for (long i = 0; i < 2; ++i)
          for (long j = 0; j < 2; ++j)
            transpose(square + i * 8 * 16 + j * 8, 16, out + j * 8 * WIDE + i * 8, WIDE);
      }
    }
}

// Products of TILE_ROWS tokens with outputs [vector * 16, ...) of a panel, as out[token][output].
template <bool OFFSETS, bool HALVES>
inline void tile(const Inputs& x, long token, const Panel& w, long vector, float* out) {
  constexpr int R = TILE_ROWS, C = TILE_VECTORS;
  constexpr long PARTS = 1 + HALVES, STEPS = GROUP / 2 / PARTS;
  Floats sums[R][C];
  #pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = no_floats();
  const int16_t* levels = x.levels + token * x.inputs;
  const float *scales = x.scales + token * x.groups, *totals = x.sums + token * x.groups;
  const int32_t* pairs = w.pairs + vector * 16;
  for (long part = 0; part < x.groups * PARTS; ++part) {
    Ints ints[R][C];
    #pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      #pragma GCC unroll 8
      for (int c = 0; c < C; ++c) ints[r][c] = no_ints();
#pragma GCC unroll 4
    for (long step = 0; step < STEPS; ++step, pairs += WIDE, levels += 2) {
      Pairs weights[C];
      #pragma GCC unroll 8
      for (int c = 0; c < C; ++c) weights[c] = load_pairs((const int16_t*)(pairs + c * 16));
      #pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Pairs own = same_pair(levels + r * x.inputs);
        #pragma GCC unroll 8
        for (int c = 0; c < C; ++c) ints[r][c] = dot(ints[r][c], own, weights[c]);
      }
    }
    const long group = part / PARTS;
    #pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Floats scale = load(w.scales + part * WIDE + (vector + c) * 16);
      #pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats factor = multiply(scale, splat(scales[r * x.groups + group]));
        sums[r][c] = multiply_add(number(ints[r][c]), factor, sums[r][c]);
      }
      if (!OFFSETS) continue;
      const Floats offset = load(w.offsets + group * WIDE + (vector + c) * 16);
      #pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sums[r][c] = multiply_add(offset, splat(totals[r * x.groups + group]), sums[r][c]);
    }
  }
  #pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + r * WIDE + (vector + c) * 16, sums[r][c]);
}

}  // namespace
