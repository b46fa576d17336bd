// Linear layers, fused with the operations before and after them while numbers are in the cache.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace {

// Panels that pass over the weights together: as many as leave half of a 2 MiB cache free.
constexpr long GROUP_BYTES = 1 << 20, MOST_PANELS = 8;

enum After { NONE, SWISH, ADD, MUL };

struct Linear {
  const float* x;
  long rows, inputs, outputs;
  const Half *w, *gate;  // gate may be null
  int weight_parts;
  const float* bias;  // may be null
  int after;
  const float *other, *norm;  // may be null
  float epsilon;
  float* y;

  long steps() const { return inputs / STEP; }
  long column() const { return 2 * steps() * weight_parts * TILE; }  // halves of 32 outputs
};

// A block of results that is computed and still has to be written to the output.
struct Block {
  float* results = nullptr;  // followed by those of the gate
  long row = 0, column = 0, rows = 0;
};

inline __m512 swish(__m512 v) {
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), v));
  return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

inline __m512 finish(__m512 v, int after, const float* other) {
  if (after == SWISH) return swish(v);
  if (after == ADD) return _mm512_add_ps(v, _mm512_loadu_ps(other));
  if (after == MUL) return _mm512_mul_ps(v, _mm512_loadu_ps(other));
  return v;
}

// Writes rows [from, to) of a block to the output.
void write(const Linear& job, const Block& block, long from, long to) {
  for (long row = from; row < std::min(to, block.rows); ++row)
    for (long at = 0; at < PANEL; at += 16) {
      const float* result = block.results + row * PANEL + at;
      const long where = (block.row + row) * job.outputs + block.column + at;
      __m512 v = _mm512_load_ps(result);
      if (job.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(job.bias + block.column + at));
      if (job.gate) v = _mm512_mul_ps(v, swish(_mm512_load_ps(result + PANEL * PANEL)));
      v = finish(v, job.after, job.other ? job.other + where : nullptr);
      _mm512_storeu_ps(job.y + where, v);
    }
}

// Computes the factor of each row that makes its root mean square 1.
void norm_scales(const float* x, long rows, long inputs, float epsilon, float* scales) {
  for (long row = 0; row < rows; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (long at = 0; at < inputs; at += 16) {
      const __m512 v = _mm512_loadu_ps(x + row * inputs + at);
      sum = _mm512_fmadd_ps(v, v, sum);
    }
    scales[row] = 1.f / std::sqrt(_mm512_reduce_add_ps(sum) / inputs + epsilon);
  }
}

// Multiplies panels [first, end) of rows with columns [from, to) of weights.
void multiply_group(const Linear& job, long first, long end, long from, long to) {
  const long steps = job.steps(), panel_size = 2 * steps * PARTS * TILE;
  const long row = first * PANEL, rows = std::min(job.rows - row, (end - first) * PANEL);
  const float* x = job.x + row * job.inputs;
  Half* a = buffer(MOST_PANELS * PANEL * job.inputs * PARTS);
  alignas(64) float scales[MOST_PANELS * PANEL];
  if (job.norm) norm_scales(x, rows, job.inputs, job.epsilon, scales);
  split_rows(x, job.inputs, rows, job.inputs, end - first, a, scales, job.norm);
  alignas(64) float results[2][2 * PANEL * PANEL];
  Block before;
  long turn = 0;
  const long share = (PANEL + steps - 1) / steps;
  const auto write_before = [&](long step) {
    write(job, before, step * share, (step + 1) * share);
  };
  for (long j = from; j < to; ++j)
    for (long panel = first; panel < end; ++panel) {
      const Half* rows_of_panel = a + (panel - first) * panel_size;
      const auto multiply_by = [&](const Half* w, float* c, const auto& meanwhile) {
        block(rows_of_panel, panel_size / 2, w + j * job.column(), job.column() / 2, steps,
              job.weight_parts, c, PANEL, meanwhile);
      };
      float* c = results[turn++ & 1];
      multiply_by(job.w, c, write_before);
      if (job.gate) multiply_by(job.gate, c + PANEL * PANEL, [](long) {});
      before = {c, panel * PANEL, j * PANEL, std::min(PANEL, job.rows - panel * PANEL)};
    }
  write(job, before, 0, PANEL);
}

}  // namespace

// Asks the system for the matrix unit; 0 if it may be used.
extern "C" int tiles_open() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (int)syscall(SYS_arch_prctl, request, tile_data);
}

// y (rows, outputs) = after(x' w + bias, other); with a gate it is times swish(x' gate). x' is
// x (rows, inputs), or its root-mean-square norm with the weight `norm`. Inputs and outputs are
// multiples of 32. w, gate: [16 outputs][32 inputs][part][pair of inputs][output][2]. gate, bias,
// other and norm may be null.
extern "C" void tiles_linear(const float* x, long rows, long inputs, long outputs, const Half* w,
                             const Half* gate, int weight_parts, const float* bias, int after,
                             const float* other, const float* norm, float epsilon, float* y) {
  const Linear job{x, rows, inputs, outputs, w, gate, weight_parts, bias, after, other, norm,
                   epsilon, y};
  const long panels = (rows + PANEL - 1) / PANEL, columns = outputs / PANEL;
  const long threads = omp_get_max_threads(), bytes = PANEL * inputs * PARTS * sizeof(Half);
  const long most = std::max(1L, std::min(MOST_PANELS, GROUP_BYTES / bytes));
  // As many groups for each thread, of nearly equal size; few rows are cut by columns as well.
  long groups = (panels + most * threads - 1) / (most * threads) * threads;
  if (groups > panels) groups = panels;
  const long cuts = groups % threads ? std::min(threads, columns) : 1;
#pragma omp parallel num_threads(threads)
  {
    const Config config;
    _tile_loadconfig(&config);
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < groups * cuts; ++item) {
      const long group = item / cuts, cut = item % cuts;
      multiply_group(job, group * panels / groups, (group + 1) * panels / groups,
                     cut * columns / cuts, (cut + 1) * columns / cuts);
    }
    _tile_release();
  }
}
