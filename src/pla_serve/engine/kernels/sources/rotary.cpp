// Rotary embedding, and the write of keys and values to the KV cache, in one pass.

#include "tiles.h"

namespace {

constexpr long FEW = 8;  // most tokens that one thread rotates sooner than others would wake up

// Multiplies pairs of neighbours (a, b), as complex numbers, by those of `turn`.
inline void rotate(const float* from, const float* turn, long dim, float* to) {
  for (long at = 0; at < dim; at += 16) {
    const __m512 v = _mm512_loadu_ps(from + at), t = _mm512_loadu_ps(turn + at);
    const __m512 cosine = _mm512_moveldup_ps(t), sine = _mm512_movehdup_ps(t);
    const __m512 swapped = _mm512_permute_ps(v, 0xB1);
    _mm512_storeu_ps(to + at, _mm512_fmaddsub_ps(v, cosine, _mm512_mul_ps(swapped, sine)));
  }
}

}  // namespace

// heads (tokens, queries + 2 * kv_heads, dim): queries are turned in place, and keys, turned, and
// values go to rows `slots` of keys and values (slots, kv_heads, dim). turn: (tokens, dim / 2) pairs of
// cosine and sine. dim is a multiple of 16.
extern "C" void tiles_rotary(float* heads, long tokens, long queries, long kv_heads, long dim,
                             const float* turn, const int64_t* slots, float* keys, float* values) {
#pragma omp parallel for schedule(static) if (tokens > FEW)
  for (long token = 0; token < tokens; ++token) {
    float* own = heads + token * (queries + 2 * kv_heads) * dim;
    const float* angles = turn + token * dim;
    for (long head = 0; head < queries; ++head)
      rotate(own + head * dim, angles, dim, own + head * dim);
    const long place = slots[token] * kv_heads * dim;
    for (long head = 0; head < kv_heads; ++head)
      rotate(own + (queries + head) * dim, angles, dim, keys + place + head * dim);
    const float* from = own + (queries + kv_heads) * dim;
    std::copy_n(from, kv_heads * dim, values + place);
  }
}
