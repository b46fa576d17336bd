// Linear layers, with what follows them done while the result is in the cache.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace {

constexpr long GROUP = 4;  // panels that pass over the weights together

enum After { NONE, SWISH, ADD, MUL };

__m512 finish(__m512 v, int after, const float* other) {
  if (after == SWISH) {
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), v));
    return _mm512_div_ps(v, _mm512_add_ps(one, e));
  }
  if (after == ADD) return _mm512_add_ps(v, _mm512_loadu_ps(other));
  if (after == MUL) return _mm512_mul_ps(v, _mm512_loadu_ps(other));
  return v;
}

}  // namespace

// Asks the system for the matrix unit; 0 if it may be used.
extern "C" int tiles_open() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (int)syscall(SYS_arch_prctl, request, tile_data);
}

// y (rows, outputs) = after(x (rows, inputs) w + bias, other); inputs and outputs are multiples of
// 32. w: [16 outputs][32 inputs][part][pair of inputs][output][2]. bias and other may be null.
extern "C" void tiles_linear(const float* x, long rows, long inputs, long outputs, const Half* w,
                             int weight_parts, const float* bias, int after, const float* other,
                             float* y) {
  const long panels = (rows + PANEL - 1) / PANEL, steps = inputs / STEP;
  const long columns = outputs / PANEL, threads = omp_get_max_threads();
  // As many groups for each thread, of nearly equal size; few rows are cut by columns as well.
  long groups = (panels + GROUP * threads - 1) / (GROUP * threads) * threads;
  if (groups > panels) groups = panels;
  const long cuts = groups % threads ? threads : 1;
#pragma omp parallel num_threads(threads)
  {
    const Config config;
    _tile_loadconfig(&config);
    alignas(64) float c[PANEL * PANEL];
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < groups * cuts; ++item) {
      const long group = item / cuts, cut = item % cuts;
      const long first = group * panels / groups, end = (group + 1) * panels / groups;
      Half* a = buffer((GROUP + 1) * PANEL * inputs * PARTS);
      split_rows(x + first * PANEL * inputs, inputs, rows - first * PANEL, inputs, end - first,
                 a);
      for (long j = cut * columns / cuts; j < (cut + 1) * columns / cuts; ++j)
        for (long panel = first; panel < end; ++panel) {
          block(a + (panel - first) * 2 * steps * PARTS * TILE, steps * PARTS * TILE,
                w + j * 2 * steps * weight_parts * TILE, steps * weight_parts * TILE, steps,
                weight_parts, c, PANEL);
          for (long row = 0; row < PANEL && panel * PANEL + row < rows; ++row)
            for (long at = 0; at < PANEL; at += 16) {
              const long to = (panel * PANEL + row) * outputs + j * PANEL + at;
              __m512 v = _mm512_load_ps(c + row * PANEL + at);
              if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias + j * PANEL + at));
              _mm512_storeu_ps(y + to, finish(v, after, other ? other + to : nullptr));
            }
        }
    }
    _tile_release();
  }
}
