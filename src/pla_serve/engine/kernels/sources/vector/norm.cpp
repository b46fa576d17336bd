// Root-mean-square norm in one pass over memory.

#include "vector.h"

namespace {

constexpr long FEW = 16;  // most rows that one thread norms sooner than others would wake up

template <typename Number>
void norm_rows(const Number* x, long rows, long inputs, const float* weight, float epsilon,
               Number* y) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long row = 0; row < rows; ++row) {
    const Number* from = x + row * inputs;
    Floats squares = every(0.f);
    for (long i = 0; i < inputs; i += LANES) squares = fma(load(from + i), load(from + i), squares);
    const Floats scale = every(1.f / std::sqrt(sum(squares) / inputs + epsilon));
    for (long i = 0; i < inputs; i += LANES)
      store(y + row * inputs + i, mul(mul(load(from + i), scale), load(weight + i)));
  }
}

}  // namespace

// y (rows, inputs) = x, divided by the root of the mean square of its row, times weight. inputs are a
// multiple of 16. x and y are bfloat16 if `narrow`, or else float32.
extern "C" void vectors_norm(const void* x, int narrow, long rows, long inputs, const float* weight,
                             float epsilon, void* y) {
  if (narrow)
    norm_rows((const Half*)x, rows, inputs, weight, epsilon, (Half*)y);
  else
    norm_rows((const float*)x, rows, inputs, weight, epsilon, (float*)y);
}
