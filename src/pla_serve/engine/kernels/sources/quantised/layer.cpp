// A decoder layer for few tokens in one call: the time of so small a step would otherwise be that of
// its calls.

#include <cstdint>

#include "matrix.h"

extern "C" void vectors_rotary(void* heads, int narrow, long tokens, long queries, long kv_heads,
                               long dim, const float* turn, const int64_t* slots, void* keys,
                               void* values);
extern "C" void vectors_attention(const void* q, long q_token, long q_head, const void* k,
                                  const void* v, int narrow, const int64_t* spans, long count,
                                  const int64_t* runs, long heads, long groups, long dim,
                                  float scale, void* out);

namespace {

constexpr int NONE = 0, ADD = 2;  // after a product

struct Product {  // the same as in Python
  const Matrix* parts;
  int64_t count, inputs, outputs;
  const float* bias;  // may be null
};

struct Norm {
  const float* weight;
  double epsilon;
};

struct Layer {
  Product qkv, out, gate, up, down;
  Norm before_attention, before_mlp;
  int64_t query_heads, kv_heads, dim;
  double scale;
};

}  // namespace

// y (tokens, width): the layer's output for x (tokens, width), the hidden states of all tokens. KV of
// the tokens is written to `slots` of keys and values (slots, kv_heads, dim). spans and runs are those
// of `vectors_attention`, turn and slots those of `vectors_rotary`. scratch has room for
// tokens * (all heads * dim + query heads * dim + width + outputs of `up`) numbers.
extern "C" void quantised_layer(const Layer* layer, const float* x, long tokens, const float* turn,
                                const int64_t* slots, float* keys, float* values,
                                const int64_t* spans, long count, const int64_t* runs,
                                float* scratch, float* y) {
  const Layer& l = *layer;
  float* heads = scratch;
  float* attended = heads + tokens * l.qkv.outputs;
  float* middle = attended + tokens * l.query_heads * l.dim;
  float* inner = middle + tokens * l.out.outputs;
  const auto product = [&](const Product& p, const float* from, const Norm* norm,
                           const Product* gate, const float* residual, float* to) {
    quantised_linear(from, tokens, p.inputs, p.parts, gate ? gate->parts : nullptr, p.count, p.bias,
                     residual ? ADD : NONE, residual, norm ? norm->weight : nullptr,
                     norm ? (float)norm->epsilon : 0.f, to);
  };
  product(l.qkv, x, &l.before_attention, nullptr, nullptr, heads);
  vectors_rotary(heads, 0, tokens, l.query_heads, l.kv_heads, l.dim, turn, slots, keys, values);
  vectors_attention(heads, l.qkv.outputs, l.dim, keys, values, 0, spans, count, runs, l.kv_heads,
                    l.query_heads / l.kv_heads, l.dim, (float)l.scale, attended);
  product(l.out, attended, nullptr, nullptr, x, middle);
  product(l.up, middle, &l.before_mlp, &l.gate, nullptr, inner);
  product(l.down, inner, nullptr, nullptr, middle, y);
}
