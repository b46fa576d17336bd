// Linear layers whose weights stay quantised, with the operations before and after them.

#include <omp.h>

#include "many.h"
#include "matrix.h"

namespace {

constexpr long FEW = 8;                  // most tokens for which weights are not unpacked first
constexpr long CHUNK_BYTES = 384 << 10;  // of levels of tokens that share a panel: half a cache

enum After { NONE, SWISH, ADD, MUL };

template <typename Use>
inline void with_format(int64_t type, const Use& use) {
  switch (type) {
    case 2: return use(Q4_0());
    case 3: return use(Q4_1());
    case 6: return use(Q5_0());
    case 7: return use(Q5_1());
    case 8: return use(Q8_0());
    case 12: return use(Q4_K());
    case 13: return use(Q5_K());
    case 14: return use(Q6_K());
  }
}

template <class F>
inline long row_bytes(long inputs) { return inputs / GROUP / F::GROUPS * F::BYTES; }

struct Linear {
  const float* x;
  long tokens, inputs, outputs;
  const Matrix *parts, *gate;  // gate may be null
  long count;
  const float* bias;  // may be null
  int after;
  const float *other, *norm;  // may be null
  float epsilon;
  float* y;

  // Calls use(part, first output of the part, first in y, number) for each stretch of `size` outputs
  // with an index from `from` to `to`.
  template <typename Use>
  void stretches(long size, long from, long to, const Use& use) const {
    long index = 0, column = 0;
    for (long p = 0; p < count; column += parts[p++].outputs) {
      const long here = (parts[p].outputs + size - 1) / size;
      for (long i = std::max(0L, from - index); i < std::min(here, to - index); ++i)
        use(p, i * size, column + i * size, std::min(size, parts[p].outputs - i * size));
      index += here;
    }
  }
  long stretches(long size) const {
    long all = 0;
    for (long p = 0; p < count; ++p) all += (parts[p].outputs + size - 1) / size;
    return all;
  }
};

inline Floats finish(const Linear& job, Floats v, const float* bias, const float* gate,
                     const float* other) {
  if (bias) v = add(v, load(bias));
  if (gate) v = multiply(v, swish(load(gate)));
  if (job.after == SWISH) return swish(v);
  if (job.after == ADD) return add(v, load(other));
  if (job.after == MUL) return multiply(v, load(other));
  return v;
}

// Writes up to 16 outputs of a token from `column` on.
inline void write(const Linear& job, long token, long column, long count, const float* values,
                  const float* gate) {
  const long at = token * job.outputs + column;
  const float* bias = job.bias ? job.bias + column : nullptr;
  const float* other = job.other ? job.other + at : nullptr;
  if (count >= 16) return store(job.y + at, finish(job, load(values), bias, gate, other));
  float made[16], biases[16] = {}, others[16] = {};
  if (bias) std::copy_n(bias, count, biases);
  if (other) std::copy_n(other, count, others);
  store(made, finish(job, load(values), bias ? biases : nullptr, gate, others));
  std::copy_n(made, count, job.y + at);
}

void few(const Linear& job) {
  const long strips = job.stretches(STRIP);
#pragma omp parallel
  {
    // Each thread prepares the inputs for itself: that takes less time than waiting for another.
    const Inputs x = Inputs::in(buffer(0, Inputs::bytes(job.tokens, job.inputs)), job.tokens, job.inputs);
    for (long token = 0; token < job.tokens; ++token)
      quantise(job.x + token * job.inputs, job.norm, job.epsilon, x, token);
    const long threads = omp_get_num_threads(), own = omp_get_thread_num();
    alignas(64) float values[FEW * STRIP], gates[FEW * STRIP];
    const auto products = [&](const Matrix& w, long first, long count, float* out) {
      with_format(w.type, [&](auto format) {
        using F = decltype(format);
        const long stride = row_bytes<F>(job.inputs);
        few_products<F>(w.data + first * stride, stride, count, x, job.tokens, out, STRIP);
      });
    };
    job.stretches(STRIP, strips * own / threads, strips * (own + 1) / threads,
                  [&](long part, long first, long column, long count) {
      products(job.parts[part], first, count, values);
      if (job.gate) products(job.gate[part], first, count, gates);
      for (long token = 0; token < job.tokens; ++token)
        write(job, token, column, count, values + token * STRIP,
              job.gate ? gates + token * STRIP : nullptr);
    });
  }
}

// Products of a chunk of tokens with one panel and, if there is a gate, with that of the gate.
void panel_products(const Linear& job, const Inputs& x, long base, long tokens, long part,
                    long first, long column, long count) {
  const Panel panel = Panel::in(buffer(1, Panel::bytes(job.inputs)), job.inputs);
  const Panel other = Panel::in(buffer(2, job.gate ? Panel::bytes(job.inputs) : 64), job.inputs);
  const auto prepare = [&](const Matrix& w, const Panel& to) {
    with_format(w.type, [&](auto format) {
      using F = decltype(format);
      const long stride = row_bytes<F>(job.inputs);
      pack<F>(w.data + first * stride, stride, count, job.inputs, to);
    });
  };
  const auto multiply_by = [&](const Matrix& w, const Panel& from, long token, float* out) {
    with_format(w.type, [&](auto format) {
      using F = decltype(format);
      for (long vector = 0; vector < WIDE / 16; vector += TILE_VECTORS)
        tile<F::OFFSETS, F::HALVES>(x, base + token, from, vector, out);
    });
  };
  prepare(job.parts[part], panel);
  if (job.gate) prepare(job.gate[part], other);
  alignas(64) float values[TILE_ROWS * WIDE], gates[TILE_ROWS * WIDE];
  for (long token = 0; token < tokens; token += TILE_ROWS) {
    multiply_by(job.parts[part], panel, token, values);
    if (job.gate) multiply_by(job.gate[part], other, token, gates);
    for (long r = 0; r < std::min<long>(TILE_ROWS, tokens - token); ++r)
      for (long at = 0; at < count; at += 16)
        write(job, base + token + r, column + at, count - at, values + r * WIDE + at,
              job.gate ? gates + r * WIDE + at : nullptr);
  }
}

void many(const Linear& job) {
  const long padded = (job.tokens + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  const Inputs x = Inputs::in(buffer(0, Inputs::bytes(padded, job.inputs)), padded, job.inputs);
  const long panels = job.stretches(WIDE);
  const long fit = std::max<long>(8, CHUNK_BYTES / (2 * job.inputs) / TILE_ROWS);
  const long tiles = padded / TILE_ROWS, chunks = (tiles + fit - 1) / fit;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long token = 0; token < padded; ++token)
      quantise(job.x + std::min(token, job.tokens - 1) * job.inputs, job.norm, job.epsilon, x, token);
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < chunks * panels; ++item) {
      const long chunk = item / panels, index = item % panels;
      const long from = chunk * tiles / chunks * TILE_ROWS;
      const long to = std::min(job.tokens, (chunk + 1) * tiles / chunks * TILE_ROWS);
      job.stretches(WIDE, index, index + 1, [&](long part, long first, long column, long count) {
        panel_products(job, x, from, to - from, part, first, column, count);
      });
    }
  }
}

}  // namespace

extern "C" void quantised_linear(const float* x, long tokens, long inputs, const Matrix* w,
                                 const Matrix* gate, long count, const float* bias, int after,
                                 const float* other, const float* norm, float epsilon, float* y) {
  long outputs = 0;
  for (long p = 0; p < count; ++p) outputs += w[p].outputs;
  const Linear job{x, tokens, inputs, outputs, w, gate, count, bias, after, other, norm, epsilon, y};
  if (tokens <= FEW) few(job);
  else many(job);
}

// Writes rows `ids` of a matrix as float32 (count, inputs).
extern "C" void quantised_rows(const Matrix* w, long inputs, const int64_t* ids, long count, float* y) {
  with_format(w->type, [&](auto format) {
    using F = decltype(format);
    constexpr long PARTS = 1 + F::HALVES;
    for (long i = 0; i < count; ++i) {
      const uint8_t* block = w->data + ids[i] * row_bytes<F>(inputs);
      float* to = y + i * inputs;
      for (long b = 0; b < inputs / GROUP / F::GROUPS; ++b, block += F::BYTES) {
        float scale[F::GROUPS * PARTS], offset[F::GROUPS] = {};
        F::scales(block, scale, offset);
        for (long g = 0; g < F::GROUPS; ++g, to += GROUP) {
          alignas(32) int8_t levels[GROUP];
          _mm256_store_si256((__m256i*)levels, F::levels(block, g));
          for (long j = 0; j < GROUP; ++j)
            to[j] = scale[F::HALVES ? 2 * g + j / 16 : g] * levels[j] + offset[g];
        }
      }
    }
  });
}
