// Causal attention over paged KV, block by block with a running maximum and sum (flash attention).
//
// The rows of one task are the queries of some tokens, with all heads that share a KV head. Keys are
// transposed and values copied a block at a time, from wherever their slots lie, and used for all
// rows of the task while they are in the cache.
//
// With PAIRS, products are those of pairs of bfloat16 numbers, which stand in the place of one float32
// number each: two elements of a head that follow each other, or those of two keys.

#include <omp.h>

#include <vector>

#include "product.h"

namespace {

constexpr long KEYS = 96;        // in one block
constexpr long MOST_ROWS = 384;  // of one task
constexpr long FEW_ROWS = 4;     // in one product, for tasks of at most twice as many rows
constexpr long MOST_DIM = 256;
constexpr long LEAST_PART = 512;  // keys in one part of a context that several threads share
constexpr float NEVER = -1e30f;    // score of a key that is not seen, and maximum of no keys
constexpr float LOG2_E = 1.44269504088896341f;

struct Run {
  int64_t first, end;  // slots
};

// The new tokens of one sequence.
struct Span {
  int64_t start, length, history;  // start: position of the first new token in the batch
  int64_t first_run, runs;         // of history and new tokens
};

template <typename Number>
struct Batch {
  const Number *q, *k, *v;
  long q_token, q_head, kv_token;  // strides; a head of a slot follows the one before it
  const Run* runs;
  long heads, groups, dim;  // KV heads, and query heads for each of them
  float scale;
  Number* out;  // (tokens, heads * groups, dim)

  // Factor that turns products of queries and keys into exponents of two.
  float factor() const { return scale * LOG2_E; }
  // Numbers in a row of sums: dim, and zeros up to whole products.
  long wide() const { return (dim + WIDTH - 1) / WIDTH * WIDTH; }
};

// New tokens of one sequence that are attended together, for one KV head, over some of the keys.
struct Task {
  const Span* span;
  long head, token, tokens;  // token: the first, counted from the start of the span
  long first_key, end_key;
  float* part;  // result for these keys alone (see `keep`); null if there are no other keys

  long context() const { return span->history + token + tokens; }
  long pairs() const { return tokens * (end_key - first_key); }
};

// Goes through the slots of a sequence in order.
struct Slots {
  const Run* run;
  int64_t at;

  explicit Slots(const Run* runs) : run(runs), at(runs->first) {}
  void skip(long count) {
    while (count >= run->end - at && count > 0) {
      count -= run->end - at;
      at = (++run)->first;
    }
    at += count;
  }
  // Calls `use` with the number of a slot among those that are asked for, and the slot.
  template <typename Use>
  void take(long count, const Use& use) {
    for (long number = 0; number < count;) {
      const long many = std::min(count - number, (long)(run->end - at));
      for (long i = 0; i < many; ++i) use(number + i, at + i);
      number += many;
      at += many;
      if (at == run->end && number < count) at = (++run)->first;
    }
  }
};

// Rows of queries, and their sums so far.
struct State {
  long rows, padded;  // rows, and a multiple of those of a product that holds them
  float* queries;     // [group of rows of a product][dim][row]; without PAIRS times the factor
  float* sums;        // [row][wide]
  float *keys, *values, *scores, *weights;
  float most[MOST_ROWS + ROWS];
  alignas(64) float totals[(MOST_ROWS + ROWS) * LANES];  // a sum for each lane
  long seen[MOST_ROWS + ROWS];                           // number of keys that a row sees

  float total(long row) const { return sum(load(totals + row * LANES)); }
};

template <long R, bool PAIRS, typename Number>
void pack_queries(const Batch<Number>& batch, const Task& task, State& state) {
  const Span& span = *task.span;
  const Floats factor = every(batch.factor());
  const long words = PAIRS ? batch.dim / 2 : batch.dim;
  alignas(64) float row[MOST_DIM];
  for (long number = 0; number < state.padded; ++number) {
    // Rows beyond the last repeat it; what becomes of them is not written.
    const long real = std::min(number, state.rows - 1);
    const long at = task.token + real / batch.groups, group = real % batch.groups;
    const Number* from = batch.q + (span.start + at) * batch.q_token +
                         (task.head * batch.groups + group) * batch.q_head;
    if constexpr (PAIRS)
      std::memcpy(row, from, words * sizeof(float));
    else
      for (long i = 0; i < words; i += LANES) store(row + i, mul(load(from + i), factor));
    float* to = state.queries + number / R * R * words + number % R;
    for (long i = 0; i < words; ++i) std::memcpy(to + i * R, row + i, sizeof(float));
    state.seen[number] = span.history + at + 1;
    state.most[number] = NEVER;
  }
  std::fill_n(state.totals, state.padded * LANES, 0.f);
  std::fill_n(state.sums, state.padded * batch.wide(), 0.f);
}

// Writes values of one key, and with PAIRS those of the key before it, to their panels. `before` may
// be null: a last key without a partner.
template <bool PAIRS, typename Number>
inline void pack_values(const Number* before, const Number* value, long number, long dim, float* to) {
  for (long i = 0; i < dim; i += LANES) {
    float* panel = to + i / WIDTH * (PAIRS ? KEYS / 2 : KEYS) * WIDTH + i % WIDTH;
    if constexpr (PAIRS)
      store_pairs(panel + number / 2 * WIDTH, before ? before + i : value + i, before ? value + i : nullptr);
    else
      store(panel + number * WIDTH, load(value + i));
  }
}

// Writes a block of keys as [panel of WIDTH keys][dim][WIDTH], and values as
// [panel of WIDTH elements][KEYS][WIDTH]. Missing keys become zeros.
template <bool PAIRS, typename Number>
void pack_block(const Batch<Number>& batch, Slots& slots, long head, long count, State& s) {
  const long dim = batch.dim, offset = head * dim, words = PAIRS ? dim / 2 : dim;
  if (count < KEYS) {
    std::fill_n(s.keys, KEYS * words, 0.f);
    std::fill_n(s.values, KEYS * batch.wide() / (PAIRS ? 2 : 1), 0.f);
  }
  const float* rows[LANES];
  const Number* before = nullptr;
  alignas(64) float widened[LANES * MOST_DIM];
  slots.take(count, [&](long number, int64_t slot) {
    const Number* key = batch.k + slot * batch.kv_token + offset;
    const Number* value = batch.v + slot * batch.kv_token + offset;
    if (!PAIRS || number % 2 || number == count - 1)
      pack_values<PAIRS>(number % 2 ? before : nullptr, value, number, dim, s.values);
    before = value;
    const long lane = number % LANES;
    if constexpr (PAIRS)
      rows[lane] = (const float*)key;
    else
      rows[lane] = as_floats(key, dim, widened + lane * MOST_DIM);
    if (lane != LANES - 1 && number != count - 1) return;
    const long first = number - lane;
    for (long missing = lane + 1; missing < LANES; ++missing) {
      std::fill_n(widened + missing * MOST_DIM, words, 0.f);
      rows[missing] = widened + missing * MOST_DIM;
    }
    float* to = s.keys + first / WIDTH * words * WIDTH + first % WIDTH;
    for (long i = 0; i < words; i += LANES) transpose(rows, i, to + i * WIDTH, WIDTH);
  });
}

// Turns R rows of scores into weights, and scales their sums down where the maximum has grown.
// `factor` turns scores into exponents, with PAIRS; otherwise they are exponents already.
template <long R, bool PAIRS>
void soften(State& state, long first_row, long first_key, long keys, long wide, float factor) {
  if (!PAIRS) factor = 1.f;
  for (long i = 0; i < R; ++i) {
    const long row = first_row + i, seen = state.seen[row] - first_key;
    float* own = state.scores + i * KEYS;
    if (seen < keys)
      for (long key = 0; key < keys; key += LANES)
        store(own + key, first(seen - key, load(own + key), every(NEVER)));
    Floats top = load(own);
    for (long key = LANES; key < keys; key += LANES) top = larger(top, load(own + key));
    float* totals = state.totals + row * LANES;
    if (any_above(top, every(state.most[row]))) {
      const float most = std::max(state.most[row], largest(top));
      const Floats kept = power_of_two(every((state.most[row] - most) * factor));
      state.most[row] = most;
      store(totals, mul(load(totals), kept));
      float* sums = state.sums + row * wide;
      for (long at = 0; at < wide; at += LANES) store(sums + at, mul(load(sums + at), kept));
    }
    const Floats base = every(state.most[row] * factor);
    Floats total = load(totals);
    for (long key = 0; key < keys; key += LANES) {
      const Floats score = PAIRS ? mul(load(own + key), every(factor)) : load(own + key);
      const Floats weight = power_of_two(sub(score, base));
      total = add(total, weight);
      if (PAIRS)
        store((Half*)(state.weights + i * (KEYS / 2)) + key, weight);
      else
        store(own + key, weight);
    }
    store(totals, total);
  }
}

// Writes the results of a task's rows to the output.
template <typename Number>
void write(const Batch<Number>& batch, const Task& task, long row, const float* sums, float total) {
  const long at = task.span->start + task.token + row / batch.groups;
  const long head = task.head * batch.groups + row % batch.groups;
  Number* to = batch.out + (at * batch.heads * batch.groups + head) * batch.dim;
  for (long i = 0; i < batch.dim; i += LANES) store(to + i, mul(load(sums + i), every(1.f / total)));
}

// Keeps the results of a task that has seen some of the keys: the maximum as an
// exponent, total and sums of each row.
inline void keep(const Task& task, const State& state, long wide, float factor) {
  for (long row = 0; row < state.rows; ++row) {
    float* to = task.part + row * (wide + 2);
    to[0] = state.most[row] * factor;
    to[1] = state.total(row);
    std::copy_n(state.sums + row * wide, wide, to + 2);
  }
}

template <long R, bool PAIRS, typename Number>
void attend(const Batch<Number>& batch, const Task& task) {
  constexpr long IN_WORD = PAIRS ? 2 : 1;  // numbers that stand in the place of one float32
  const long dim = batch.dim, wide = batch.wide(), words = dim / IN_WORD;
  State state;
  state.rows = task.tokens * batch.groups;
  state.padded = (state.rows + R - 1) / R * R;
  state.queries = buffer(state.padded * (words + wide) + KEYS * (words + wide + 2 * R));
  state.sums = state.queries + state.padded * words;
  state.keys = state.sums + state.padded * wide;
  state.values = state.keys + KEYS * words;
  state.scores = state.values + KEYS * wide / IN_WORD;
  state.weights = PAIRS ? state.scores + KEYS * R : state.scores;
  pack_queries<R, PAIRS>(batch, task, state);
  if (wide > dim) std::fill_n(state.values, KEYS * wide / IN_WORD, 0.f);
  Slots slots(batch.runs + task.span->first_run);
  slots.skip(task.first_key);
  for (long first_key = task.first_key; first_key < task.end_key; first_key += KEYS) {
    const long count = std::min(KEYS, task.end_key - first_key);
    pack_block<PAIRS>(batch, slots, task.head, count, state);
    const long keys = (count + WIDTH - 1) / WIDTH * WIDTH;
    Slots next = slots;
    const long rest = std::min(KEYS, task.end_key - first_key - count);
    // Keys between `count` and `keys` are zeros, and must be seen by nobody.
    for (long row = 0; row < state.padded; row += R) {
      const long share = rest * (row + R) / state.padded - rest * row / state.padded;
      next.take(share, [&](long, int64_t slot) {
        prefetch(batch.k + slot * batch.kv_token + task.head * dim, dim);
        prefetch(batch.v + slot * batch.kv_token + task.head * dim, dim);
      });
      if (state.seen[row + R - 1] <= first_key) continue;
      const long seen = (state.seen[row + R - 1] - first_key + WIDTH - 1) / WIDTH * WIDTH;
      const long own = std::min(keys, seen);
      const float* queries = state.queries + row * words;
      for (long key = 0; key < own; key += WIDTH)
        multiply<R, false, PAIRS>(queries, R, 1, state.keys + key * words, words,
                                  state.scores + key, KEYS);
      soften<R, PAIRS>(state, row, first_key, own, wide, batch.factor());
      for (long at = 0; at < wide; at += WIDTH)
        multiply<R, true, PAIRS>(state.weights, 1, KEYS / IN_WORD,
                                 state.values + at * KEYS / IN_WORD, own / IN_WORD,
                                 state.sums + row * wide + at, wide);
    }
  }
  if (task.part) return keep(task, state, wide, PAIRS ? batch.factor() : 1.f);
  for (long row = 0; row < state.rows; ++row)
    write(batch, task, row, state.sums + row * wide, state.total(row));
}

// Joins the results of all parts of a context, which are those of `count` tasks in a row.
template <typename Number>
void join(const Batch<Number>& batch, const Task* tasks, long count) {
  const long wide = batch.wide();
  alignas(64) float sums[MOST_DIM + WIDTH];
  for (long row = 0; row < tasks->tokens * batch.groups; ++row) {
    float most = NEVER, total = 0.f;
    for (long i = 0; i < count; ++i) most = std::max(most, tasks[i].part[row * (wide + 2)]);
    std::fill_n(sums, wide, 0.f);
    for (long i = 0; i < count; ++i) {
      const float* part = tasks[i].part + row * (wide + 2);
      const float kept = std::exp2(part[0] - most);
      total += kept * part[1];
      for (long at = 0; at < wide; at += LANES)
        store(sums + at, fma(every(kept), load(part + 2 + at), load(sums + at)));
    }
    write(batch, *tasks, row, sums, total);
  }
}

// Tasks of a batch, and the memory of parts. Contexts are cut into parts where there would be too
// few tasks for all threads.
struct Plan {
  std::vector<Task> tasks;   // parts of one context follow each other
  std::vector<long> order;   // of tasks, those with most work first
  std::vector<long> joined;  // the first task of each context that was cut into parts
  std::vector<float> memory;

  Plan(const Span* spans, long count, long heads, long groups, long wide, long threads) {
    long tokens = 0;
    for (long i = 0; i < count; ++i) tokens += spans[i].length;
    const long enough = 4 * threads, most = std::max(1L, MOST_ROWS / groups);
    const long least = std::max(1L, std::min(most, 4 * ROWS / groups));
    const long tile = std::min(most, std::max(least, tokens * heads / enough));
    for (const Span* span = spans; span != spans + count; ++span)
      for (long head = 0; head < heads; ++head)
        for (long token = 0; token < span->length; token += tile) {
          const long own = std::min(tile, (long)span->length - token);
          tasks.push_back({span, head, token, own, 0, span->history + token + own, nullptr});
        }
    if ((long)tasks.size() < enough) cut((enough + tasks.size() - 1) / tasks.size(), groups, wide);
    for (long i = 0; i < (long)tasks.size(); ++i) order.push_back(i);
    std::sort(order.begin(), order.end(),
              [&](long a, long b) { return tasks[a].pairs() > tasks[b].pairs(); });
  }

  // Cuts contexts of few rows into as many parts, if each then has enough keys.
  void cut(long wanted, long groups, long wide) {
    std::vector<Task> whole;
    whole.swap(tasks);
    long floats = 0;
    for (const Task& task : whole) {
      const long parts = task.tokens * groups > 4 * ROWS
                             ? 1 : std::max(1L, std::min(wanted, task.context() / LEAST_PART));
      if (parts > 1) joined.push_back(tasks.size());
      const long blocks = (task.context() + KEYS - 1) / KEYS;
      const long keys = (blocks + parts - 1) / parts * KEYS;
      for (long key = 0; key < task.context(); key += keys) {
        tasks.push_back(task);
        tasks.back().first_key = key;
        tasks.back().end_key = std::min(task.context(), key + keys);
      }
      if (parts > 1) floats += parts * task.tokens * groups * (wide + 2);
    }
    memory.resize(floats);
    float* next = memory.data();
    for (long number : joined)
      for (long i = number; i < number + parts_from(number); ++i) {
        tasks[i].part = next;
        next += tasks[i].tokens * groups * (wide + 2);
      }
  }

  // Number of tasks that are parts of the context of this one, which is the first of them.
  long parts_from(long number) const {
    long end = number + 1;
    while (end < (long)tasks.size() && tasks[end].first_key > 0) ++end;
    return end - number;
  }
};

template <bool PAIRS, typename Number>
void attend_batch(const Batch<Number>& batch, const Span* spans, long count) {
  const Plan plan(spans, count, batch.heads, batch.groups, batch.wide(), omp_get_max_threads());
  const long tasks = plan.tasks.size(), joined = plan.joined.size();
#pragma omp parallel if (tasks > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < tasks; ++i) {
      const Task& task = plan.tasks[plan.order[i]];
      if (task.tokens * batch.groups <= 2 * FEW_ROWS)
        attend<FEW_ROWS, PAIRS>(batch, task);
      else
        attend<ROWS, PAIRS>(batch, task);
    }
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < joined; ++i)
      join(batch, &plan.tasks[plan.joined[i]], plan.parts_from(plan.joined[i]));
  }
}

}  // namespace

// Most query heads that may share a KV head, and most elements of a head.
extern "C" long vectors_most_groups() { return MOST_ROWS; }
extern "C" long vectors_most_dim() { return MOST_DIM; }

// out (tokens, heads * groups, dim): causal attention of the new tokens of each span over the slots
// of its runs. q has these strides for a token and a head; k and v are (slots, heads, dim). dim is a
// multiple of 16. Numbers are bfloat16 if `narrow`, or else float32.
extern "C" void vectors_attention(const void* q, long q_token, long q_head, const void* k,
                                  const void* v, int narrow, const int64_t* spans, long count,
                                  const int64_t* runs, long heads, long groups, long dim,
                                  float scale, void* out) {
  const Run* slots = (const Run*)runs;
  const Span* sequences = (const Span*)spans;
  if (!narrow)
    return attend_batch<false>(
        Batch<float>{(const float*)q, (const float*)k, (const float*)v, q_token, q_head,
                     heads * dim, slots, heads, groups, dim, scale, (float*)out},
        sequences, count);
  const Batch<Half> batch{(const Half*)q, (const Half*)k, (const Half*)v, q_token, q_head,
                          heads * dim, slots, heads, groups, dim, scale, (Half*)out};
  if (HAS_PAIRS && dim % (2 * LANES) == 0 && scale > 0)
    attend_batch<HAS_PAIRS>(batch, sequences, count);
  else
    attend_batch<false>(batch, sequences, count);
}
