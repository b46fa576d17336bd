// Causal attention, block by block with a running maximum and sum (flash attention).

#include "tiles.h"

namespace {

constexpr long KEYS = 256;
constexpr long MOST_GROUPS = 32;
constexpr long QUERIES = 64;  // tokens that pass over the keys together, with all heads of a group

struct Attention {
  const float *q, *k, *v;
  long q_token, q_head, kv_token, kv_head;  // strides
  long tokens, history, heads, groups, dim;
  float scale;
  Half *keys, *values;  // [head][KEYS] blocks
  float* out;           // [token][head][dim]

  long context() const { return history + tokens; }
  long blocks() const { return (context() + KEYS - 1) / KEYS; }
  long block_size() const { return KEYS * dim * PARTS; }
};

// Writes the keys of one block as [16 keys][step][part][pair of inputs][key][2], and the values as
// [16 inputs][32 keys][part][pair of keys][input][2]. Missing keys become zeros.
void split_context(const Attention& job, long head, long number) {
  const long steps = job.dim / STEP, first = number * KEYS;
  Half* keys = job.keys + (head * job.blocks() + number) * job.block_size();
  Half* values = job.values + (head * job.blocks() + number) * job.block_size();
  const __m512i column = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(16));
  // Alternates between numbers of the first half and of the second half.
  const __m512i lanes = _mm512_srli_epi32(column, 4);
  const __m512i pairs = _mm512_or_si512(
      lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  alignas(64) Half parts[PARTS * TILE];
  for (long key = 0; key < KEYS; ++key) {
    const bool there = first + key < job.context();
    const long from = (first + key) * job.kv_token + head * job.kv_head;
    for (long step = 0; step < steps; ++step) {
      Half* tile = keys + (key / 16 * steps + step) * PARTS * TILE + key % 16 * 2;
      const float* k = job.k + from + step * STEP;
      split(there ? _mm512_loadu_ps(k) : _mm512_setzero_ps(),
            there ? _mm512_loadu_ps(k + 16) : _mm512_setzero_ps(), parts);
      for (long part = 0; part < PARTS; ++part)
        _mm512_i32scatter_epi32(tile + part * TILE, column,
                                _mm512_load_si512(parts + part * TILE), 4);
    }
    if (key % 2) continue;
    const bool next = first + key + 1 < job.context();
    for (long at = 0; at < job.dim; at += 16) {
      const float* value = job.v + from + at;
      split(there ? _mm512_loadu_ps(value) : _mm512_setzero_ps(),
            next ? _mm512_loadu_ps(value + job.kv_token) : _mm512_setzero_ps(), parts);
      Half* tile = values + (at / 16 * (KEYS / 32) + key / 32) * PARTS * TILE + key % 32 / 2 * 32;
      for (long part = 0; part < PARTS; ++part)
        _mm512_store_si512(tile + part * TILE, _mm512_permutexvar_epi16(
                               pairs, _mm512_load_si512(parts + part * TILE)));
    }
  }
}

// 32 queries, their sums so far, and the keys of the current block that they see.
struct Panel {
  Half *queries, *weights;
  float* sums;  // PANEL x dim
  float most[PANEL], total[PANEL];
  long position, rows;  // of the first query in the sequence; how many there are
  long first, wide;     // the first key of the block, and how many are looked at
};

inline void score(const Attention& job, Panel& p, const Half* keys, long first, float* scores) {
  const long steps = job.dim / STEP, tile_row = steps * PARTS * TILE;
  const long last = p.position + p.rows - 1;  // the last key that any row of the panel may see
  p.first = first;
  p.wide = (std::min(last - first + 1, KEYS) + PANEL - 1) / PANEL * PANEL;
  for (long key = 0; key < p.wide; key += PANEL)
    block(p.queries, tile_row, keys + key / 16 * tile_row, tile_row, steps, PARTS, scores + key,
          KEYS, [](long) {});
}

// Weight of a key with this score. Scores of keys that are not seen are far below all others. NaN
// stays NaN, so that it is noticed.
inline __m512 weight_of(__m512 score, __m512 base) {
  const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-1e30f), _CMP_GT_OQ);
  const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, base)));
  return _mm512_mask_mov_ps(weight, _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q), score);
}

// Turns one row of scores into weights, and scales the sums so far down if the maximum has grown.
inline void soften(const Attention& job, Panel& p, float* scores, long row) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 never = _mm512_set1_ps(-1e30f), scale = _mm512_set1_ps(job.scale);
  const long seen = p.position + std::min(row, p.rows - 1) - p.first + 1;  // may be 0
  scores += row * KEYS;
  __m512 top = never;
  for (long key = 0; key < p.wide; key += 16) {
    const __mmask16 sees = _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32((int)(seen - key)));
    const __m512 s = _mm512_mask_mul_ps(never, sees, _mm512_load_ps(scores + key), scale);
    _mm512_store_ps(scores + key, s);
    top = _mm512_max_ps(top, s);
  }
  const float before = p.most[row], most = std::max(before, _mm512_reduce_max_ps(top));
  const __m512 base = _mm512_set1_ps(most);
  __m512 sum = _mm512_setzero_ps();
  Half* tiles = p.weights + row / 16 * (p.wide / STEP) * PARTS * TILE + row % 16 * STEP;
  for (long key = 0; key < p.wide; key += STEP) {
    const __m512 low = weight_of(_mm512_load_ps(scores + key), base);
    const __m512 high = weight_of(_mm512_load_ps(scores + key + 16), base);
    sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
    split(low, high, tiles + key / STEP * PARTS * TILE);
  }
  p.most[row] = most;
  if (most == before) {
    p.total[row] += _mm512_reduce_add_ps(sum);
    return;
  }
  const __m512 kept = exponential(_mm512_set1_ps(before - most));
  p.total[row] = p.total[row] * _mm512_cvtss_f32(kept) + _mm512_reduce_add_ps(sum);
  for (long at = 0; at < job.dim; at += 16) {
    float* sums = p.sums + row * job.dim + at;
    _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), kept));
  }
}

// Adds weights times values; calls `meanwhile` once in each step.
template <typename Meanwhile>
inline void gather(const Attention& job, const Panel& p, const Half* values, float* added,
                   const Meanwhile& meanwhile) {
  const long steps = p.wide / STEP, value_row = KEYS / STEP * PARTS * TILE;
  for (long at = 0; at < job.dim; at += PANEL)
    block(p.weights, steps * PARTS * TILE, values + at / 16 * value_row, value_row, steps, PARTS,
          added + at, job.dim, [&](long step) { meanwhile(at / PANEL * steps + step); });
  for (long at = 0; at < PANEL * job.dim; at += 16)
    _mm512_store_ps(p.sums + at,
                    _mm512_add_ps(_mm512_load_ps(p.sums + at), _mm512_load_ps(added + at)));
}

// Attends queries [first, first + QUERIES) of all heads that share this KV head.
void attend_group(const Attention& job, long head, long first) {
  const long panels = job.groups * (QUERIES / PANEL), steps = job.dim / STEP;
  const long floats = PANEL * (KEYS + job.dim) + panels * PANEL * job.dim;
  const long weights = 2 * KEYS / STEP * PARTS * TILE, queries = 2 * steps * PARTS * TILE;
  Half* memory = buffer(2 * floats + 2 * weights + panels * queries);
  float *scores = (float*)memory, *added = scores + PANEL * KEYS, *sums = added + PANEL * job.dim;
  Half* halves = memory + 2 * floats;
  const long end = std::min(first + QUERIES, job.tokens);
  Panel state[2 * MOST_GROUPS];
  for (long panel = 0; panel < panels; ++panel) {
    Panel& p = state[panel];
    const long at = first + panel % (QUERIES / PANEL) * PANEL;
    const long query_head = head * job.groups + panel / (QUERIES / PANEL);
    p = {halves + 2 * weights + panel * queries, nullptr, sums + panel * PANEL * job.dim, {}, {},
         job.history + at, std::min(end - at, PANEL), 0, 0};
    std::fill_n(p.most, PANEL, -1e30f);
    std::fill_n(p.sums, PANEL * job.dim, 0.f);
    split_rows(job.q + at * job.q_token + query_head * job.q_head, job.q_token, p.rows, job.dim, 1,
               p.queries);
  }
  for (long number = 0; number * KEYS < job.history + end; ++number) {
    const long offset = (head * job.blocks() + number) * job.block_size();
    const Half *keys = job.keys + offset, *values = job.values + offset;
    Panel* before = nullptr;  // its weights are computed and not yet multiplied with values
    for (Panel* p = state; p != state + panels; ++p) {
      if (p->rows <= 0 || number * KEYS >= p->position + p->rows) continue;
      score(job, *p, keys, number * KEYS, scores);
      p->weights = before && before->weights == halves ? halves + weights : halves;
      long row = 0;
      if (before) {
        const long share = (PANEL * PANEL + before->wide / STEP * job.dim - 1) /
                           (before->wide / STEP * job.dim);
        gather(job, *before, values, added, [&](long step) {
          for (; row < std::min((step + 1) * share, PANEL); ++row) soften(job, *p, scores, row);
        });
      }
      for (; row < PANEL; ++row) soften(job, *p, scores, row);
      before = p;
    }
    if (before) gather(job, *before, values, added, [](long) {});
  }
  for (long panel = 0; panel < panels; ++panel) {
    const Panel& p = state[panel];
    const long at = p.position - job.history;
    const long query_head = head * job.groups + panel / (QUERIES / PANEL);
    for (long row = 0; row < p.rows; ++row) {
      float* out = job.out + ((at + row) * job.heads * job.groups + query_head) * job.dim;
      const __m512 share = _mm512_set1_ps(1.f / p.total[row]);
      for (long to = 0; to < job.dim; to += 16)
        _mm512_storeu_ps(out + to,
                         _mm512_mul_ps(_mm512_load_ps(p.sums + row * job.dim + to), share));
    }
  }
}

}  // namespace

// Number of keys in a block of scratch memory; the caller allocates that memory.
extern "C" long tiles_keys() { return KEYS; }

// out (tokens, heads * groups, dim): query t sees the first history + t + 1 keys. q, k and v have
// these strides for a token and a head; dim is a multiple of 32, groups at most 32. `scratch` holds
// 2 * heads * (context rounded up to 256) * dim * 3 halves.
extern "C" void tiles_attention(const float* q, long q_token, long q_head, const float* k,
                                const float* v, long kv_token, long kv_head, long tokens,
                                long history, long heads, long groups, long dim, float scale,
                                Half* scratch, float* out) {
  Attention job{q,       k,     v,      q_token, q_head, kv_token, kv_head, tokens,
                history, heads, groups, dim,     scale,  scratch,  nullptr, out};
  job.values = scratch + heads * job.blocks() * job.block_size();
  const long rounds = (tokens + QUERIES - 1) / QUERIES;
#pragma omp parallel
  {
    const Config config;
    _tile_loadconfig(&config);
#pragma omp for schedule(static)
    for (long item = 0; item < heads * job.blocks(); ++item)
      split_context(job, item / job.blocks(), item % job.blocks());
    // The last queries have the most keys, so they go first.
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < heads * rounds; ++item)
      attend_group(job, item % heads, (rounds - 1 - item / heads) * QUERIES);
    _tile_release();
  }
}
