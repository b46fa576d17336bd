// Linears of few tokens, whose time is that of reading the weights: they are kept in as few bytes as
// hold them exactly, and widened in registers.

#include <omp.h>

#include "product.h"

namespace {

constexpr long MOST = LANES == 16 ? 12 : 6;  // tokens that pass over the weights together

struct Few {
  long rows, inputs, outputs;
  const float* bias;  // may be null
  int after;          // see `After`
  const float *norm;  // may be null
  float epsilon;
};

enum After { NONE, SWISH, ADD, MUL };

inline Floats swish(Floats v) {
  const Floats e = power_of_two(mul(v, every(-1.44269504088896341f)));
  return div(v, add(every(1.f), e));
}

// Writes the tokens as [input][R], after the norm if there is one. Missing tokens become zeros.
template <long R, typename Number>
void pack_tokens(const Few& job, const Number* x, float* to) {
  std::fill_n(to, job.inputs * R, 0.f);
  alignas(64) float row[LANES];
  for (long token = 0; token < job.rows; ++token) {
    const Number* from = x + token * job.inputs;
    float scale = 1.f;
    if (job.norm) {
      Floats squares = every(0.f);
      for (long i = 0; i < job.inputs; i += LANES) squares = fma(load(from + i), load(from + i), squares);
      scale = 1.f / std::sqrt(sum(squares) / job.inputs + job.epsilon);
    }
    for (long i = 0; i < job.inputs; i += LANES) {
      Floats v = load(from + i);
      if (job.norm) v = mul(mul(v, every(scale)), load(job.norm + i));
      store(row, v);
      for (long lane = 0; lane < LANES; ++lane) to[(i + lane) * R + token] = row[lane];
    }
  }
}

// sums = x w for one panel of WIDTH outputs. Steps of a single token are summed in four places,
// because each addition waits for the one before it in its place.
template <long R, typename Weight>
[[gnu::always_inline]] inline void multiply_panel(const float* x, const Weight* w, long inputs,
                                                  Floats sums[R][COLUMNS]) {
  constexpr long APART = R == 1 ? 4 : 1;
  Floats parts[APART][R][COLUMNS];
#pragma GCC unroll 4
  for (long part = 0; part < APART; ++part)
#pragma GCC unroll 12
    for (long row = 0; row < R; ++row)
#pragma GCC unroll 2
      for (long column = 0; column < COLUMNS; ++column) parts[part][row][column] = every(0.f);
  for (long i = 0; i < inputs; i += APART, x += APART * R, w += APART * WIDTH) {
#pragma GCC unroll 4
    for (long part = 0; part < APART; ++part) {
      Floats columns[COLUMNS];
#pragma GCC unroll 2
      for (long column = 0; column < COLUMNS; ++column)
        columns[column] = load(w + part * WIDTH + column * LANES);
#pragma GCC unroll 12
      for (long row = 0; row < R; ++row) {
        const Floats factor = every(x[part * R + row]);
#pragma GCC unroll 2
        for (long column = 0; column < COLUMNS; ++column)
          parts[part][row][column] = fma(factor, columns[column], parts[part][row][column]);
      }
    }
  }
#pragma GCC unroll 12
  for (long row = 0; row < R; ++row)
#pragma GCC unroll 2
    for (long column = 0; column < COLUMNS; ++column) {
      Floats total = parts[0][row][column];
      for (long part = 1; part < APART; ++part) total = add(total, parts[part][row][column]);
      sums[row][column] = total;
    }
}

template <long R, typename Number, typename Weight>
void multiply_few(const Few& job, const Number* x, const Weight* w, const Weight* gate,
                  const Number* other, Number* y) {
  const long panels = job.outputs / WIDTH, threads = std::min((long)omp_get_max_threads(), panels);
  const long share = std::max(1L, panels / (4 * threads));
#pragma omp parallel num_threads(threads)
  {
    float* tokens = buffer(job.inputs * R);
    pack_tokens<R>(job, x, tokens);
#pragma omp for schedule(dynamic, share)
    for (long panel = 0; panel < panels; ++panel) {
      Floats sums[R][COLUMNS], gates[R][COLUMNS];
      multiply_panel<R>(tokens, w + panel * job.inputs * WIDTH, job.inputs, sums);
      if (gate) multiply_panel<R>(tokens, gate + panel * job.inputs * WIDTH, job.inputs, gates);
      for (long row = 0; row < std::min(R, job.rows); ++row)
        for (long column = 0; column < COLUMNS; ++column) {
          const long at = panel * WIDTH + column * LANES, where = row * job.outputs + at;
          Floats v = sums[row][column];
          if (job.bias) v = add(v, load(job.bias + at));
          if (gate) v = mul(v, swish(gates[row][column]));
          if (job.after == SWISH) v = swish(v);
          if (job.after == ADD) v = add(v, load(other + where));
          if (job.after == MUL) v = mul(v, load(other + where));
          store(y + where, v);
        }
    }
  }
}

template <typename Number, typename Weight>
void dispatch(const Few& job, const Number* x, const Weight* w, const Weight* gate,
              const Number* other, Number* y) {
  if (job.rows == 1)
    multiply_few<1>(job, x, w, gate, other, y);
  else if (job.rows <= 4)
    multiply_few<4>(job, x, w, gate, other, y);
  else if (job.rows <= 8 && MOST > 8)
    multiply_few<8>(job, x, w, gate, other, y);
  else if (job.rows <= MOST)
    multiply_few<MOST>(job, x, w, gate, other, y);
  else
    for (long first = 0; first < job.rows; first += MOST) {
      Few part = job;
      part.rows = std::min(MOST, job.rows - first);
      dispatch(part, x + first * job.inputs, w, gate, other ? other + first * job.outputs : other,
               y + first * job.outputs);
    }
}

template <typename Number>
void for_weights(const Few& job, const void* x, const void* w, const void* gate, int kind,
                 const void* other, void* y) {
  const Number *from = (const Number*)x, *beside = (const Number*)other;
  if (kind == 0)
    dispatch(job, from, (const float*)w, (const float*)gate, beside, (Number*)y);
  else if (kind == 1)
    dispatch(job, from, (const Half*)w, (const Half*)gate, beside, (Number*)y);
  else
    dispatch(job, from, (const Half16*)w, (const Half16*)gate, beside, (Number*)y);
}

}  // namespace

// Outputs in one panel of packed weights.
extern "C" long vectors_width() { return WIDTH; }

// y (rows, outputs) = after(x' w + bias, other); with a gate it is times swish(x' gate). x' is
// x (rows, inputs), or its root-mean-square norm with the weight `norm`. // w, gate: [panel of WIDTH outputs][input][output], of a kind: 0 float32, 1 bfloat16, 2 float16.
// x, other and y are bfloat16 if `narrow`, or else float32. inputs are a multiple of 16, outputs of
// WIDTH. gate, bias, other and norm may be null.
extern "C" void vectors_few(const void* x, int narrow, long rows, long inputs, long outputs,
                            const void* w, const void* gate, int kind, const float* bias, int after,
                            const void* other, const float* norm, float epsilon, void* y) {
  const Few job{rows, inputs, outputs, bias, after, norm, epsilon};
  if (narrow)
    for_weights<Half>(job, x, w, gate, kind, other, y);
  else
    for_weights<float>(job, x, w, gate, kind, other, y);
}
