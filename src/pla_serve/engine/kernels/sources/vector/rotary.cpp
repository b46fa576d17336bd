// Rotary embedding, and the write of keys and values to the KV cache, in one pass.

#include "vector.h"

namespace {

constexpr long FEW = 8;  // most tokens that one thread rotates sooner than others would wake up

// Multiplies pairs of neighbours (a, b), as complex numbers, by those of `turn`.
template <typename Number>
inline void rotate(const Number* from, const float* turn, long dim, Number* to) {
  for (long at = 0; at < dim; at += LANES) {
    const Floats v = load(from + at), t = load(turn + at);
    store(to + at, fmaddsub(v, evens(t), mul(swapped(v), odds(t))));
  }
}

template <typename Number>
void rotate_all(Number* heads, long tokens, long queries, long kv_heads, long dim,
                const float* turn, const int64_t* slots, Number* keys, Number* values) {
#pragma omp parallel for schedule(static) if (tokens > FEW)
  for (long token = 0; token < tokens; ++token) {
    Number* own = heads + token * (queries + 2 * kv_heads) * dim;
    const float* angles = turn + token * dim;
    for (long head = 0; head < queries; ++head)
      rotate(own + head * dim, angles, dim, own + head * dim);
    const long place = slots[token] * kv_heads * dim;
    for (long head = 0; head < kv_heads; ++head)
      rotate(own + (queries + head) * dim, angles, dim, keys + place + head * dim);
    std::memcpy(values + place, own + (queries + kv_heads) * dim, kv_heads * dim * sizeof(Number));
  }
}

}  // namespace

// heads (tokens, queries + 2 * kv_heads, dim): queries are turned in place, and keys, turned, and
// values go to rows `slots` of keys and values (slots, kv_heads, dim). turn: (tokens, dim / 2) pairs
// of cosine and sine. dim is a multiple of 16. Numbers are bfloat16 if `narrow`, or else float32.
extern "C" void vectors_rotary(void* heads, int narrow, long tokens, long queries, long kv_heads,
                               long dim, const float* turn, const int64_t* slots, void* keys,
                               void* values) {
  if (narrow)
    rotate_all((Half*)heads, tokens, queries, kv_heads, dim, turn, slots, (Half*)keys,
               (Half*)values);
  else
    rotate_all((float*)heads, tokens, queries, kv_heads, dim, turn, slots, (float*)keys,
               (float*)values);
}
