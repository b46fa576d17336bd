#pragma once

// Formats of quantised weights as GGUF files have them (specified in ggml's documentation). A row
// is a series of blocks. A weight is scale * level + offset; its level is a small integer. Scale
// and offset are shared by 32 weights, or by 16 in formats with HALVES.

#include <cstring>

#include "lanes.h"

namespace {

constexpr long GROUP = 32;  // weights whose levels are unpacked together

struct Simple {  // a block is one group
  static constexpr long GROUPS = 1;
  static constexpr bool HALVES = false;
};

inline __m128i load_16(const uint8_t* from) { return _mm_loadu_si128((const __m128i*)from); }
inline __m256i load_32(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }

// 16 bytes as 32 levels of four bits: the low halves of all bytes, then the high halves.
inline __m256i nibbles(const uint8_t* from) {
  const __m128i bytes = load_16(from);
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// 32 bits as bytes that are 16 where a bit is set.
inline __m256i fifth_bits(const uint8_t* from) {
  int32_t bits;
  std::memcpy(&bits, from, 4);
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(bits), _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2,
                                                2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201ULL);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

struct Q4_0 : Simple {
  static constexpr long BYTES = 18;
  static constexpr bool OFFSETS = false;
  static void scales(const uint8_t* block, float* scale, float*) { *scale = half(block); }
  static __m256i levels(const uint8_t* block, long) {
    return _mm256_sub_epi8(nibbles(block + 2), _mm256_set1_epi8(8));
  }
};

struct Q4_1 : Simple {
  static constexpr long BYTES = 20;
  static constexpr bool OFFSETS = true;
  static void scales(const uint8_t* block, float* scale, float* offset) {
    *scale = half(block);
    *offset = half(block + 2);
  }
  static __m256i levels(const uint8_t* block, long) { return nibbles(block + 4); }
};

struct Q5_0 : Simple {
  static constexpr long BYTES = 22;
  static constexpr bool OFFSETS = false;
  static void scales(const uint8_t* block, float* scale, float*) { *scale = half(block); }
  static __m256i levels(const uint8_t* block, long) {
    const __m256i whole = _mm256_or_si256(nibbles(block + 6), fifth_bits(block + 2));
    return _mm256_sub_epi8(whole, _mm256_set1_epi8(16));
  }
};

struct Q5_1 : Simple {
  static constexpr long BYTES = 24;
  static constexpr bool OFFSETS = true;
  static void scales(const uint8_t* block, float* scale, float* offset) {
    *scale = half(block);
    *offset = half(block + 2);
  }
  static __m256i levels(const uint8_t* block, long) {
    return _mm256_or_si256(nibbles(block + 8), fifth_bits(block + 4));
  }
};

struct Q8_0 : Simple {
  static constexpr long BYTES = 34;
  static constexpr bool OFFSETS = false;
  static void scales(const uint8_t* block, float* scale, float*) { *scale = half(block); }
  static __m256i levels(const uint8_t* block, long) { return load_32(block + 2); }
};

// Eight groups with scales and offsets of six bits each, in 12 bytes: a, b and c of four bytes.
// Scales 0 to 3 are the low six bits of a, and offsets 0 to 3 those of b. Scales and offsets 4 to 7
// have their low four bits in c and their high two bits in the rest of a and b.
inline void six_bit_scales(const uint8_t* block, float* scale, float* offset) {
  uint32_t a, b, c;
  std::memcpy(&a, block + 4, 4);
  std::memcpy(&b, block + 8, 4);
  std::memcpy(&c, block + 12, 4);
  const uint32_t low = 0x3F3F3F3F, four = 0x0F0F0F0F, two = 0x30303030;
  const auto bytes = [](uint32_t first, uint32_t second) {
    const __m128i both = _mm_cvtsi64_si128((long long)((uint64_t)second << 32 | first));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both));
  };
  const __m256 scales = bytes(a & low, (c & four) | ((a >> 2) & two));
  const __m256 offsets = bytes(b & low, ((c >> 4) & four) | ((b >> 2) & two));
  _mm256_storeu_ps(scale, _mm256_mul_ps(scales, _mm256_set1_ps(half(block))));
  _mm256_storeu_ps(offset, _mm256_mul_ps(offsets, _mm256_set1_ps(-half(block + 2))));
}

// Groups 2j and 2j + 1 are the low and high halves of 32 bytes.
inline __m256i nibble_group(const uint8_t* from, long group) {
  const __m256i bytes = load_32(from + group / 2 * 32);
  const __m256i half = group & 1 ? _mm256_srli_epi16(bytes, 4) : bytes;
  return _mm256_and_si256(half, _mm256_set1_epi8(15));
}

struct Q4_K {
  static constexpr long BYTES = 144, GROUPS = 8;
  static constexpr bool OFFSETS = true, HALVES = false;
  static void scales(const uint8_t* block, float* scale, float* offset) {
    six_bit_scales(block, scale, offset);
  }
  static __m256i levels(const uint8_t* block, long group) {
    return nibble_group(block + 16, group);
  }
};

struct Q5_K {
  static constexpr long BYTES = 176, GROUPS = 8;
  static constexpr bool OFFSETS = true, HALVES = false;
  static void scales(const uint8_t* block, float* scale, float* offset) {
    six_bit_scales(block, scale, offset);
  }
  static __m256i levels(const uint8_t* block, long group) {
    const __m256i bits = _mm256_srli_epi16(load_32(block + 16), (int)group);
    const __m256i fifth = _mm256_and_si256(bits, _mm256_set1_epi8(1));
    return _mm256_or_si256(nibble_group(block + 48, group), _mm256_slli_epi16(fifth, 4));
  }
};

struct Q6_K {
  static constexpr long BYTES = 210, GROUPS = 8;
  static constexpr bool OFFSETS = false, HALVES = true;
  static void scales(const uint8_t* block, float* scale, float*) {
    const __m128i bytes = load_16(block + 192);
    const __m256 factor = _mm256_set1_ps(half(block + 208));
    const __m256i low = _mm256_cvtepi8_epi32(bytes);
    const __m256i high = _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8));
    _mm256_storeu_ps(scale, _mm256_mul_ps(_mm256_cvtepi32_ps(low), factor));
    _mm256_storeu_ps(scale + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(high), factor));
  }
  // Each 128 weights have 64 bytes of low four bits (groups 0 and 1, then 2 and 3 in their high
  // halves) and 32 bytes of high two bits (of groups 0 to 3).
  static __m256i levels(const uint8_t* block, long group) {
    const long side = group / 4, within = group & 3;
    const __m256i bytes = load_32(block + side * 64 + (within & 1) * 32);
    const __m256i low = within & 2 ? _mm256_srli_epi16(bytes, 4) : bytes;
    const __m256i bits = _mm256_srli_epi16(load_32(block + 128 + side * 32), (int)(2 * within));
    const __m256i high = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi8(3)), 4);
    const __m256i whole = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), high);
    return _mm256_sub_epi8(whole, _mm256_set1_epi8(32));
  }
};

}  // namespace
