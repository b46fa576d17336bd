// Linear layers in float32 on processors whose matrix unit (AMX) multiplies bfloat16.
//
// A float32 number is the sum of three bfloat16 ones, exactly: 24 bits are three times 8. The unit
// multiplies those and adds up in float32. Of the products of parts, those below 2^-24 of the whole
// are left out, so that the result is as good as that of float32 arithmetic; five or six products
// in the matrix unit still take less time than one in the vector unit.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr long TILE = 512;   // halves: 16 rows of 32
constexpr long PANEL = 32;   // rows, and columns, of one block of results: 2 x 2 tiles
constexpr long STEP = 32;    // inputs in one tile
constexpr long PARTS = 3;    // of an activation
constexpr long GROUP = 4;    // panels that pass over the weights together

enum After { NONE, SWISH, ADD, MUL };

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__m512 widen(__m256bh part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)part), 16));
}

// 16 numbers to their parts; `out` is a row of the first part's tile, the others follow by TILE.
void split(__m512 x, Half* out) {
  for (long part = 0; part < PARTS; ++part) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    _mm256_storeu_si256((__m256i*)(out + part * TILE), (__m256i)rounded);
    x = _mm512_sub_ps(x, widen(rounded));
  }
}

// Rows of x to tiles: [16 rows][step][part][row][input]; rows that are missing become zeros.
void split_rows(const float* x, long rows, long inputs, long panels, Half* out) {
  const long steps = inputs / STEP;
  for (long row = 0; row < panels * PANEL; ++row) {
    Half* tiles = out + (row / 16) * steps * PARTS * TILE + (row % 16) * STEP;
    for (long step = 0; step < steps; ++step, tiles += PARTS * TILE)
      for (long at = 0; at < STEP; at += 16) {
        const bool there = row < rows;
        const float* from = x + row * inputs + step * STEP + at;
        split(there ? _mm512_loadu_ps(from) : _mm512_setzero_ps(), tiles + at);
      }
  }
}

template <int WITH>  // that many parts of the activations, the largest ones
inline void multiply(const Half* a0, const Half* a1, const Half* b0, const Half* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(7, b1, 64);
  for (int part = 0; part < WITH; ++part) {
    _tile_loadd(4, a0 + part * TILE, 64);
    _tile_loadd(5, a1 + part * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// 32 x 32 results.
void block(const Half* a, const Half* b, long steps, int weight_parts, float* c) {
  const Half *a0 = a, *a1 = a + steps * PARTS * TILE;
  const Half *b0 = b, *b1 = b + steps * weight_parts * TILE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long step = 0; step < steps; ++step) {
    multiply<3>(a0, a1, b0, b1);
    multiply<2>(a0, a1, b0 + TILE, b1 + TILE);
    if (weight_parts == 3) multiply<1>(a0, a1, b0 + 2 * TILE, b1 + 2 * TILE);
    a0 += PARTS * TILE;
    a1 += PARTS * TILE;
    b0 += weight_parts * TILE;
    b1 += weight_parts * TILE;
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}

// e^x to about 1 unit in the last place: 2^n by the exponent, the rest by a polynomial (Cephes).
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(next));
  p = _mm512_fmadd_ps(_mm512_mul_ps(x, x), p, _mm512_add_ps(x, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

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

Half* buffer(long halves) {
  static thread_local Half* memory = nullptr;
  static thread_local long held = 0;
  if (held < halves) {
    std::free(memory);
    memory = (Half*)std::aligned_alloc(64, halves * sizeof(Half));
    held = halves;
  }
  return memory;
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
      split_rows(x + first * PANEL * inputs, rows - first * PANEL, inputs, end - first, a);
      for (long j = cut * columns / cuts; j < (cut + 1) * columns / cuts; ++j)
        for (long panel = first; panel < end; ++panel) {
          block(a + (panel - first) * 2 * steps * PARTS * TILE,
                w + j * 2 * steps * weight_parts * TILE, steps, weight_parts, c);
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
