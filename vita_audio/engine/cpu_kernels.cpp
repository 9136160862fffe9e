// Decoder layers and products on a CPU, for few rows and weights in bfloat16 or float32.
//
// A pass of decoding reads every weight once, so memory should be all it waits for. All layers of a pass therefore
// run in one parallel region: between two products its threads meet at a barrier, which takes less than a
// microsecond. What a row gives does not depend on the rows beside it: its sums are the same in the same order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using Bf16 = uint16_t;  // T below is this or float
using Address = uintptr_t;  // Python's view of a tensor's data
using Index = int64_t;

// Vectors of the CPU's own width, and rows whose sums fit its registers beside a block's weights.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 2;
#else
constexpr int kLanes = 4, kRows = 1;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

constexpr Index kOutputs = 32;  // outputs of a block of weights
constexpr int kVectors = kOutputs / kLanes;
constexpr Index kKeys = 64;  // keys that attention takes at a time
constexpr Index kAhead = 8192;  // bytes of weights that are fetched ahead

// Numbers that lie together in 32 bits.
template <class T>
constexpr Index kTogether = sizeof(uint32_t) / sizeof(T);

float widen(float value) { return value; }

float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T narrow(float value);

template <>
float narrow<float>(float value) {
  return value;
}

template <>
Bf16 narrow<Bf16>(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Index round_up(Index value, Index unit) { return (value + unit - 1) / unit * unit; }

// This thread's part of 0 … count - 1.
struct Part {
  Index first, last;

  explicit Part(Index count) {
    const Index thread = omp_get_thread_num(), threads = omp_get_num_threads();
    first = count * thread / threads;
    last = count * (thread + 1) / threads;
  }
};

// y = x W^T + b. The weight is (blocks, in / kTogether, kOutputs, kTogether): blocks of outputs.
template <class T>
struct Product {
  const T* weight;
  const T* bias;  // null: none
  Index in, out;
  bool alternate;  // blocks of the first and of the second half of the outputs take turns, as they are read

  Product(Address weight, Address bias, Index in, Index out, bool alternate = false)
      : weight(pointer<T>(weight)), bias(pointer<T>(bias)), in(in), out(out), alternate(alternate) {}

  Index half() const { return alternate ? out / 2 : out; }
  Index blocks() const { return (half() + kOutputs - 1) / kOutputs * (alternate ? 2 : 1); }
  Index first(Index block) const { return alternate ? block % 2 * half() + block / 2 * kOutputs : block * kOutputs; }
  Index width(Index block) const { return std::min(kOutputs, half() - (alternate ? block / 2 : block) * kOutputs); }
};

// sum + the products of kLanes outputs' weights with an input.
inline Floats add_products(Floats sum, const float* weights, const float* input) {
  Floats values;
  std::memcpy(&values, weights, sizeof values);
  return sum + values * *input;
}

// The same with two neighbouring inputs.
inline Floats add_products(Floats sum, const Bf16* weights, const Bf16* inputs) {
#ifdef __AVX512BF16__
  uint32_t pair;
  std::memcpy(&pair, inputs, sizeof pair);
  const __m512bh left = (__m512bh)_mm512_loadu_si512(weights), right = (__m512bh)_mm512_set1_epi32(pair);
  return (Floats)_mm512_dpbf16_ps((__m512)sum, left, right);
#else
  Words pairs;
  std::memcpy(&pairs, weights, sizeof pairs);
  const Words even = pairs << 16, odd = pairs & 0xffff0000u;
  return sum + (Floats)even * widen(inputs[0]) + (Floats)odd * widen(inputs[1]);
#endif
}

// x (rows, in) times one block: sums (rows, kOutputs).
template <int rows, class T>
void multiply_block(const Product<T>& product, const T* x, Index block, float* sums) {
  constexpr Index together = kTogether<T>;
  const T* weights = product.weight + block * kOutputs * product.in;
  Floats totals[rows][kVectors] = {};
  for (Index i = 0; i < product.in; i += together, weights += together * kOutputs) {
    // Without a place in the outer caches, which hold what runs between the passes.
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead, 0, 0);
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead + 64, 0, 0);
    for (int row = 0; row < rows; ++row)
      for (int j = 0; j < kVectors; ++j)
        totals[row][j] = add_products(totals[row][j], weights + together * kLanes * j, x + row * product.in + i);
  }
  std::memcpy(sums, totals, sizeof totals);
}

// The same for rows known at run time, 1 … most.
template <int most = kRows, class T>
void multiply_rows(const Product<T>& product, const T* x, Index rows, Index block, float* sums) {
  if constexpr (most > 1) {
    if (rows < most) return multiply_rows<most - 1>(product, x, rows, block, sums);
  }
  multiply_block<most>(product, x, block, sums);
}

// This thread's share of x W^T + b; store(row, output, sum) takes each result.
template <class T, class Store>
void multiply(const Product<T>& product, const T* x, Index rows, Store store) {
  alignas(64) float sums[kRows * kOutputs];
  const Part part(product.blocks());
  for (Index block = part.first; block < part.last; ++block) {
    const Index first = product.first(block), width = product.width(block);
    for (Index start = 0; start < rows; start += kRows) {
      const Index count = std::min<Index>(kRows, rows - start);
      multiply_rows(product, x + start * product.in, count, block, sums);
      for (Index row = 0; row < count; ++row)
        for (Index i = 0; i < width; ++i) {
          const float bias = product.bias ? widen(product.bias[first + i]) : 0;
          store(start + row, first + i, sums[row * kOutputs + i] + bias);
        }
    }
  }
}

// silu(gate) * up for this thread's share of an alternating product, whose outputs are all gates, then all ups.
template <class T>
void multiply_gated(const Product<T>& product, const T* x, Index rows, T* y) {
  alignas(64) float gates[kRows * kOutputs], ups[kRows * kOutputs];
  const Index size = product.half();
  const Part part(product.blocks() / 2);
  for (Index pair = part.first; pair < part.last; ++pair) {
    const Index first = pair * kOutputs, width = product.width(2 * pair);
    for (Index start = 0; start < rows; start += kRows) {
      const Index count = std::min<Index>(kRows, rows - start);
      multiply_rows(product, x + start * product.in, count, 2 * pair, gates);
      multiply_rows(product, x + start * product.in, count, 2 * pair + 1, ups);
      for (Index row = 0; row < count; ++row)
        for (Index i = 0; i < width; ++i) {
          const float gate = gates[row * kOutputs + i], up = ups[row * kOutputs + i];
          y[(start + row) * size + first + i] = narrow<T>(gate / (1 + std::exp(-gate)) * up);
        }
    }
  }
}

template <class T>
struct Norm {
  const T* weight;
  float eps;

  Norm(Address weight, float eps) : weight(pointer<T>(weight)), eps(eps) {}

  // RMSNorm of one row.
  void operator()(const T* x, Index size, T* y) const {
    float sum = 0;
    for (Index i = 0; i < size; ++i) sum += widen(x[i]) * widen(x[i]);
    const float scale = 1 / std::sqrt(sum / size + eps);
    for (Index i = 0; i < size; ++i) y[i] = narrow<T>(widen(x[i]) * scale * widen(weight[i]));
  }

  // Of this thread's share of the rows.
  void operator()(const T* x, Index rows, Index size, T* y) const {
    const Part part(rows);
    for (Index row = part.first; row < part.last; ++row) (*this)(x + row * size, size, y + row * size);
  }
};

template <class T>
struct Layer {
  Norm<T> input_norm;
  Product<T> qkv, out;
  Norm<T> mlp_norm;
  Product<T> gate_up, down;
  Index reach;  // positions that attention reaches back; 0: all
};

// The shapes of attention, and the positions that a pass computes.
template <class T>
struct Window {
  Index queries, kv, size;      // heads, and their dimensions
  Index all_rows, places;       // of a cache, (2, all_rows, kv, places, size)
  Index first_row, rows, width; // rows * width positions
  const Index* positions;       // (rows, width)
  const Index* cache_places;    // (rows * width, 2 kv), in units of size
  const T* cos;                 // (all positions, size); its sign is in sin
  const T* sin;

  Window(Index queries, Index kv, Index size, Index all_rows, Index places, Index first_row, Index rows, Index width,
         Address positions, Address cache_places, Address cos, Address sin)
      : queries(queries), kv(kv), size(size), all_rows(all_rows), places(places), first_row(first_row), rows(rows),
        width(width), positions(pointer<Index>(positions)), cache_places(pointer<Index>(cache_places)),
        cos(pointer<T>(cos)), sin(pointer<T>(sin)) {}

  Index tokens() const { return rows * width; }
  Index heads() const { return queries + 2 * kv; }
};

// Rotary embedding of this thread's share of the heads in qkv (tokens, heads, size): queries stay there, keys and
// values go to the cache, the values as they are.
template <class T>
void rotate(const Window<T>& window, float* qkv, T* cache) {
  const Index size = window.size, half = size / 2, heads = window.heads();
  const Part part(window.tokens() * heads);
  for (Index i = part.first; i < part.last; ++i) {
    const Index token = i / heads, head = i % heads;
    float* values = qkv + i * size;
    if (head < window.queries + window.kv) {
      const T *cos = window.cos + window.positions[token] * size, *sin = window.sin + window.positions[token] * size;
      for (Index j = 0; j < half; ++j) {
        const float left = values[j], right = values[half + j];
        values[j] = left * widen(cos[j]) + right * widen(sin[j]);
        values[half + j] = right * widen(cos[half + j]) + left * widen(sin[half + j]);
      }
    }
    if (head >= window.queries) {
      const Index place = window.cache_places[token * 2 * window.kv + head - window.queries];
      for (Index j = 0; j < size; ++j) cache[place * size + j] = narrow<T>(values[j]);
    }
  }
}

// Exchanges rows and columns: of halves of `step` rows, then within these of half as many.
template <int step = kLanes / 2>
void transpose(Words (&rows)[kLanes]) {
  Words upper, lower;  // lanes from kLanes on are the second vector's
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    upper[lane] = lane & step ? kLanes + lane - step : lane;
    lower[lane] = lane & step ? kLanes + lane : lane + step;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    if (row & step) continue;
    const Words above = rows[row], below = rows[row + step];
    rows[row] = __builtin_shuffle(above, below, upper);
    rows[row + step] = __builtin_shuffle(above, below, lower);
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

// Keys (count, size) as the weight of a product that gives kKeys scores; those missing are zero.
template <class T>
Product<T> pack_keys(const T* keys, Index count, Index size, std::vector<uint32_t>& packed) {
  constexpr Index together = kTogether<T>;
  const Index words = size / together;
  packed.resize(kKeys * words);
  for (Index start = 0; start < kKeys; start += kLanes)
    for (Index first = 0; first < words; first += kLanes) {
      const Index width = std::min<Index>(kLanes, words - first);
      Words tile[kLanes] = {};
      for (Index i = 0; i < kLanes && start + i < count; ++i) {
        __builtin_prefetch(keys + (kKeys + start + i) * size + together * first);
        std::memcpy(&tile[i], keys + (start + i) * size + together * first, sizeof(uint32_t) * width);
      }
      transpose(tile);
      uint32_t* target = packed.data() + start / kOutputs * kOutputs * words + start % kOutputs;
      for (Index i = 0; i < width; ++i) std::memcpy(target + (first + i) * kOutputs, &tile[i], sizeof tile[i]);
    }
  return {reinterpret_cast<Address>(packed.data()), 0, size, kKeys};
}

// Values (count, size) as the weight of a product that sums kKeys of them; those missing are zero.
template <class T>
Product<T> pack_values(const T* values, Index count, Index size, std::vector<uint32_t>& packed) {
  constexpr Index together = kTogether<T>;
  static const T none[kOutputs] = {};
  packed.resize(kKeys / together * round_up(size, kOutputs));
  uint32_t* target = packed.data();
  for (Index first = 0; first < size; first += kOutputs) {
    const Index width = std::min(kOutputs, size - first);
    for (Index key = 0; key < kKeys; key += together, target += kOutputs) {
      const auto at = [&](Index i) { return key + i < count ? values + (key + i) * size + first : none; };
      const T *even = at(0), *odd = at(together - 1);
      __builtin_prefetch(even + kKeys * size);
      __builtin_prefetch(odd + kKeys * size);
      if constexpr (together == 1) {
        std::memcpy(target, even, width * sizeof(T));
      } else {
        for (Index i = 0; i < width; ++i) target[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
      }
    }
  }
  return {reinterpret_cast<Address>(packed.data()), 0, kKeys, size};
}

// What queries have heard so far: a softmax over the keys up to now.
template <class T>
struct Heard {
  std::vector<T> queries;            // (count, size)
  std::vector<float> best, total;    // (count,) the highest score, and the sum of all shares relative to it
  std::vector<float> sums;           // (count, size) of values times shares
  std::vector<uint32_t> keys, values;

  void clear(Index count, Index size) {
    queries.resize(count * size);
    best.assign(count, std::numeric_limits<float>::lowest());
    total.assign(count, 0);
    sums.assign(count * size, 0);
  }
};

// Adds keys first … last of kKeys scores to the softmax of one query; shares (kKeys) are relative to the new best.
template <class T>
void add_scores(Heard<T>& heard, Index query, Index size, const float* scores, Index first, Index last, float scale,
                T* shares) {
  float best = heard.best[query], sum = 0;
  for (Index key = first; key <= last; ++key) best = std::max(best, scores[key]);
  for (Index key = 0; key < kKeys; ++key) {
    const float share = key >= first && key <= last ? std::exp((scores[key] - best) * scale) : 0;
    sum += share;
    shares[key] = narrow<T>(share);
  }
  const float factor = std::exp((heard.best[query] - best) * scale);
  heard.best[query] = best;
  heard.total[query] = heard.total[query] * factor + sum;
  for (Index j = 0; j < size; ++j) heard.sums[query * size + j] *= factor;
}

// Attention over a cache of this thread's share of the queries in qkv (tokens, heads, size), each over the positions
// up to its own: y (tokens, queries, size). Queries of one key head share its packing. Keys are taken kKeys at a time
// from multiples of kKeys on, so a query's sums do not depend on the others.
template <class T>
void attend(const Window<T>& window, const float* qkv, const T* cache, Index reach, T* y) {
  static thread_local Heard<T> heard;  // keeps its memory
  alignas(64) float sums[kRows * kOutputs], scores[kRows * kKeys];
  alignas(64) T shares[kRows * kKeys];
  const Index size = window.size, groups = window.queries / window.kv, all = window.width * groups;
  const Index pairs = window.rows * window.kv, threads = omp_get_num_threads();
  const Index tiles = std::min((threads + pairs - 1) / pairs, all);
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  const Part part(pairs * tiles);
  for (Index task = part.first; task < part.last; ++task) {
    const Index row = task / tiles / window.kv, head = task / tiles % window.kv, tile = task % tiles;
    const Index begin = all * tile / tiles, count = all * (tile + 1) / tiles - begin;
    const auto token = [&](Index query) { return row * window.width + (begin + query) / groups; };
    const auto query_head = [&](Index query) { return head * groups + (begin + query) % groups; };
    const T* keys = cache + ((window.first_row + row) * window.kv + head) * window.places * size;
    const T* values = keys + window.all_rows * window.kv * window.places * size;
    heard.clear(count, size);
    for (Index query = 0; query < count; ++query) {
      const float* from = qkv + (token(query) * window.heads() + query_head(query)) * size;
      for (Index j = 0; j < size; ++j) heard.queries[query * size + j] = narrow<T>(from[j]);
    }
    const Index lowest = window.positions[token(0)], length = window.positions[token(count - 1)] + 1;
    for (Index start = reach ? std::max<Index>(0, lowest - reach + 1) / kKeys * kKeys : 0; start < length; start += kKeys) {
      const Product<T> scoring = pack_keys(keys + start * size, std::min(kKeys, length - start), size, heard.keys);
      const Product<T> summing = pack_values(values + start * size, std::min(kKeys, length - start), size, heard.values);
      for (Index query = 0; query < count; query += kRows) {
        const Index rows = std::min<Index>(kRows, count - query);
        for (Index block = 0; block < kKeys / kOutputs; ++block) {
          multiply_rows(scoring, heard.queries.data() + query * size, rows, block, sums);
          for (Index i = 0; i < rows; ++i)
            std::copy_n(sums + i * kOutputs, kOutputs, scores + i * kKeys + block * kOutputs);
        }
        for (Index i = 0; i < rows; ++i) {
          const Index last = window.positions[token(query + i)];
          const Index first = reach ? std::max<Index>(0, last - reach + 1) : 0;
          add_scores(heard, query + i, size, scores + i * kKeys, std::max<Index>(first - start, 0),
                     std::min(last - start, kKeys - 1), scale, shares + i * kKeys);
        }
        for (Index block = 0; block < summing.blocks(); ++block) {
          multiply_rows(summing, shares, rows, block, sums);
          for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < summing.width(block); ++j)
              heard.sums[(query + i) * size + block * kOutputs + j] += sums[i * kOutputs + j];
        }
      }
    }
    for (Index query = 0; query < count; ++query) {
      T* target = y + (token(query) * window.queries + query_head(query)) * size;
      for (Index j = 0; j < size; ++j) target[j] = narrow<T>(heard.sums[query * size + j] / heard.total[query]);
    }
  }
}

// Layers and the norm of their output.
template <class T>
struct Stack {
  std::vector<Layer<T>> layers;
  Norm<T> norm;
};

// What the threads of a pass share.
template <class T>
struct Buffers {
  std::vector<float> qkv;
  std::vector<T> x, normed, heard, gated;

  Buffers(const Layer<T>& layer, const Window<T>& window)
      : qkv(window.tokens() * layer.qkv.out), x(window.tokens() * layer.qkv.in), normed(x.size()),
        heard(window.tokens() * layer.out.in), gated(window.tokens() * layer.down.in) {}
};

// This thread's part of a pass over buffers.x (tokens, d); keys and values go to the caches. y (tokens, d).
template <class T>
void run(const Stack<T>& stack, const std::vector<Address>& caches, const Window<T>& window, Buffers<T>& buffers, T* y) {
  const Index tokens = window.tokens(), d = buffers.x.size() / tokens;
  T *x = buffers.x.data(), *normed = buffers.normed.data();
  const auto add = [&](Index row, Index j, float sum) { x[row * d + j] = narrow<T>(widen(x[row * d + j]) + sum); };
  for (size_t i = 0; i < stack.layers.size(); ++i) {
    const Layer<T>& layer = stack.layers[i];
    T* cache = pointer<T>(caches[i]);
    const auto keep = [&](Index row, Index j, float sum) { buffers.qkv[row * layer.qkv.out + j] = sum; };
    layer.input_norm(x, tokens, d, normed);
#pragma omp barrier
    multiply(layer.qkv, normed, tokens, keep);
#pragma omp barrier
    rotate(window, buffers.qkv.data(), cache);
#pragma omp barrier
    attend(window, buffers.qkv.data(), cache, layer.reach, buffers.heard.data());
#pragma omp barrier
    multiply(layer.out, buffers.heard.data(), tokens, add);
#pragma omp barrier
    layer.mlp_norm(x, tokens, d, normed);
#pragma omp barrier
    multiply_gated(layer.gate_up, normed, tokens, buffers.gated.data());
#pragma omp barrier
    multiply(layer.down, buffers.gated.data(), tokens, add);
#pragma omp barrier
  }
  stack.norm(x, tokens, d, y);
}

// The backbone over x (tokens, d): y (tokens, d), normed.
template <class T>
void run_backbone(const Stack<T>& stack, const std::vector<Address>& caches, Address x, Address y,
                  const Window<T>& window, int threads) {
  Buffers<T> buffers(stack.layers[0], window);
  std::memcpy(buffers.x.data(), pointer<T>(x), buffers.x.size() * sizeof(T));
#pragma omp parallel num_threads(threads)
  run(stack, caches, window, buffers, pointer<T>(y));
}

// An MCTP head: it joins the norms of an embedding and of a state.
template <class T>
struct Head {
  Address embedding;  // (vocabulary, d)
  Norm<T> embed_norm, hidden_norm;
  Product<T> proj;
  Stack<T> stack;
};

// A head over the states hidden (tokens, d) and the tokens `ahead` of their positions in ids (all rows, stride):
// y (tokens, d), normed.
template <class T>
void run_head(const Head<T>& head, Address cache, Address ids, Index stride, Index ahead, Address hidden, Address y,
              const Window<T>& window, int threads) {
  const Index d = head.proj.out, tokens = window.tokens();
  Buffers<T> buffers(head.stack.layers[0], window);
  std::vector<T> fused(tokens * 2 * d);
#pragma omp parallel num_threads(threads)
  {
    const Part part(tokens);
    for (Index i = part.first; i < part.last; ++i) {
      const Index row = window.first_row + i / window.width;
      const Index id = pointer<Index>(ids)[row * stride + window.positions[i] + ahead];
      head.embed_norm(pointer<T>(head.embedding) + id * d, d, fused.data() + i * 2 * d);
      head.hidden_norm(pointer<T>(hidden) + i * d, d, fused.data() + i * 2 * d + d);
    }
#pragma omp barrier
    multiply(head.proj, fused.data(), tokens, [&](Index row, Index j, float sum) { buffers.x[row * d + j] = narrow<T>(sum); });
#pragma omp barrier
    run(head.stack, {cache}, window, buffers, pointer<T>(y));
  }
}

// y (rows, out) = x (rows, in) W^T + b, plus add (rows, out) unless it is null.
template <class T>
void multiply_all(const Product<T>& product, Address input, Address add, Address output, Index rows, int threads) {
  const T *x = pointer<T>(input), *added = pointer<T>(add);
  T* y = pointer<T>(output);
  const Index out = product.out;
#pragma omp parallel num_threads(threads)
  multiply(product, x, rows, [&](Index row, Index j, float sum) {
    y[row * out + j] = narrow<T>(added ? widen(added[row * out + j]) + sum : sum);
  });
}

// The place of the first of the largest values in each row of x (rows, size).
template <class T>
void find_best(Address input, Address output, Index rows, Index size) {
  constexpr Index kChunk = 1024;
  for (Index row = 0; row < rows; ++row) {
    const T* x = pointer<T>(input) + row * size;
    float best = widen(x[0]);
    Index found = 0;
    for (Index start = 0; start < size; start += kChunk) {
      const Index end = std::min(start + kChunk, size);
      float largest = widen(x[start]);
      for (Index i = start; i < end; ++i) largest = std::max(largest, widen(x[i]));
      if (largest > best) best = largest, found = start;
    }
    while (found + 1 < size && widen(x[found]) < best) ++found;
    pointer<Index>(output)[row] = found;
  }
}

// The kernels for one type of weights, in a module of their own.
template <class T>
void define(pybind11::module_ module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Norm<T>>(module, "Norm").def(py::init<Address, float>());
  py::class_<Product<T>>(module, "Product").def(py::init<Address, Address, Index, Index, bool>());
  py::class_<Layer<T>>(module, "Layer")
      .def(py::init<Norm<T>, Product<T>, Product<T>, Norm<T>, Product<T>, Product<T>, Index>());
  py::class_<Stack<T>>(module, "Stack").def(py::init<std::vector<Layer<T>>, Norm<T>>());
  py::class_<Head<T>>(module, "Head").def(py::init<Address, Norm<T>, Norm<T>, Product<T>, Stack<T>>());
  py::class_<Window<T>>(module, "Window")
      .def(py::init<Index, Index, Index, Index, Index, Index, Index, Index, Address, Address, Address, Address>());
  module.def("multiply", &multiply_all<T>, unlocked);
  module.def("find_best", &find_best<T>, unlocked);
  module.def("run_backbone", &run_backbone<T>, unlocked);
  module.def("run_head", &run_head<T>, unlocked);
}

}  // namespace

PYBIND11_MODULE(MODULE, module) {
  define<Bf16>(module.def_submodule("bfloat16"));
  define<float>(module.def_submodule("float32"));
}
