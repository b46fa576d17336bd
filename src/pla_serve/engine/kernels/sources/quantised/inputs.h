#pragma once

// Inputs of a linear as 16-bit integers: each 32 numbers of a row share a scale, the largest size
// among them divided by 32,767. Products with levels of weights and their sums are exact then.

#include <algorithm>
#include <cstdlib>

#include "formats.h"

namespace {

struct Inputs {
  int16_t* levels;  // [rows][inputs]
  float* scales;    // [rows][groups]
  float* sums;      // [rows][groups]: sum of the 32 numbers that the levels stand for
  long inputs, groups;

  static long bytes(long rows, long inputs) {
    return rows * (inputs * 2 + inputs / GROUP * 8) + 192;
  }
  static Inputs in(uint8_t* memory, long rows, long inputs) {
    const long groups = inputs / GROUP;
    float* scales = (float*)(memory + (rows * inputs * 2 + 63) / 64 * 64);
    return {(int16_t*)memory, scales, scales + rows * groups, inputs, groups};
  }
};

// The factor of a row that makes its root mean square 1.
inline float norm_scale(const float* x, long inputs, float epsilon) {
  Floats squares = no_floats();
  for (long at = 0; at < inputs; at += 16) {
    const Floats v = load(x + at);
    squares = multiply_add(v, v, squares);
  }
  return 1.f / std::sqrt(sum(squares) / (float)inputs + epsilon);
}

// Writes row `row` of `to`: x, or its root-mean-square norm if `norm` (one factor an input) is given.
// An input that is no number, or infinite, makes the scales of its group no numbers.
inline void quantise(const float* x, const float* norm, float epsilon, const Inputs& to, long row) {
  const Floats scale = splat(norm ? norm_scale(x, to.inputs, epsilon) : 1.f);
  int16_t* levels = to.levels + row * to.inputs;
  for (long group = 0; group < to.groups; ++group, x += GROUP, levels += GROUP) {
    Floats low = multiply(load(x), scale), high = multiply(load(x + 16), scale);
    if (norm) {
      low = multiply(low, load(norm + group * GROUP));
      high = multiply(high, load(norm + group * GROUP + 16));
    }
    const float odd = sum(multiply(add(low, high), splat(0.f)));  // 0, unless there is no number
    const float most = largest(larger(size(low), size(high))) + odd;
    const Floats factor = splat(most > 0.f ? 32767.f / most : 0.f);
    const Ints a = rounded(multiply(low, factor)), b = rounded(multiply(high, factor));
    store_narrow(levels, a);
    store_narrow(levels + 16, b);
    to.scales[row * to.groups + group] = most / 32767.f;
    to.sums[row * to.groups + group] = (float)sum(add(a, b)) * (most / 32767.f);
  }
}

// Memory of this thread that is kept between calls; each `use` has its own.
inline uint8_t* buffer(int use, long bytes) {
  static thread_local uint8_t* memory[3] = {};
  static thread_local long held[3] = {};
  if (held[use] < bytes) {
    std::free(memory[use]);
    held[use] = (bytes + 4095) / 4096 * 4096;
    memory[use] = (uint8_t*)std::aligned_alloc(64, held[use]);
  }
  return memory[use];
}

}  // namespace
