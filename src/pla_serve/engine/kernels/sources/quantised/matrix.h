#pragma once

// What callers and kernels of quantised linears share.

#include <cstdint>

struct Matrix {  // the same as in Python
  const uint8_t* data;
  int64_t type;  // the number of the format in GGUF files
  int64_t outputs;
};

// y (tokens, outputs) = after(x' w + bias, other), and with a gate times swish(x' gate). x' is
// x (tokens, inputs), or its root-mean-square norm with the weight `norm`. w are `count` matrices
// whose outputs follow each other. gate: as many matrices of the same sizes, or null. after: nothing,
// swish, add or multiply.
extern "C" void quantised_linear(const float* x, long tokens, long inputs, const Matrix* w,
                                 const Matrix* gate, long count, const float* bias, int after,
                                 const float* other, const float* norm, float epsilon, float* y);
