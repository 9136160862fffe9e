// Decoder layers and products on a CPU, for few rows and weights in bfloat16 or float32.
//
// A pass of decoding reads every weight once, so memory should be all it waits for. All layers of a pass therefore
// run in one parallel region: between two products its threads meet at a barrier, which takes less than a
// microsecond. What a row gives does not depend on the rows beside it: its sums are the same in the same order.
#pragma once

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

namespace vita_audio {

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
constexpr Index kAlone = 2048;  // numbers up to which each thread computes a whole norm itself, which is quicker than waiting

// Numbers that lie together in 32 bits.
template <class T>
constexpr Index kTogether = sizeof(uint32_t) / sizeof(T);

inline float widen(float value) { return value; }

inline float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline Bf16 narrow<Bf16>(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
Address address(const T* pointer) {
  return reinterpret_cast<Address>(pointer);
}

inline Index round_up(Index value, Index unit) { return (value + unit - 1) / unit * unit; }

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
  Index used;      // inputs; the others count as zero

  Product(Address weight, Address bias, Index in, Index out, bool alternate = false)
      : weight(pointer<T>(weight)), bias(pointer<T>(bias)), in(in), out(out), alternate(alternate), used(in) {}

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
  for (Index i = 0; i < product.used; i += together, weights += together * kOutputs) {
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

// This thread's share of x W^T + b, a block of outputs of a row at a time: take(row, first output, width, sums).
template <class T, class Take>
void multiply_blocks(const Product<T>& product, const T* x, Index rows, Take take) {
  alignas(64) float sums[kRows * kOutputs];
  const Part part(product.blocks());
  for (Index block = part.first; block < part.last; ++block) {
    const Index first = product.first(block), width = product.width(block);
    for (Index start = 0; start < rows; start += kRows) {
      const Index count = std::min<Index>(kRows, rows - start);
      multiply_rows(product, x + start * product.in, count, block, sums);
      for (Index row = 0; row < count; ++row) {
        float* of_row = sums + row * kOutputs;
        if (product.bias)
          for (Index i = 0; i < width; ++i) of_row[i] += widen(product.bias[first + i]);
        take(start + row, first, width, of_row);
      }
    }
  }
}

// The same, one result at a time: store(row, output, sum).
template <class T, class Store>
void multiply(const Product<T>& product, const T* x, Index rows, Store store) {
  multiply_blocks(product, x, rows, [&](Index row, Index first, Index width, const float* sums) {
    for (Index i = 0; i < width; ++i) store(row, first + i, sums[i]);
  });
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

  void rows(const T* x, Index first, Index last, Index size, T* y) const {
    for (Index row = first; row < last; ++row) (*this)(x + row * size, size, y + row * size);
  }

  // Of this thread's share of the rows.
  void operator()(const T* x, Index count, Index size, T* y) const {
    const Part part(count);
    rows(x, part.first, part.last, size, y);
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

// Heads of attention and their dimension. A cache is (2, rows, kv, places, padded size): keys and then values, in blocks
// of kKeys places. A block is the weight of the product that reads it, of kKeys scores or of a sum of kKeys values.
template <class T>
struct Shape {
  Index queries, kv, size;
  Index rows, places;
  const T* cos;  // (places, size)
  const T* sin;  // with the sign of the rotation

  Shape(Index queries, Index kv, Index size, Index rows, Index places, Address cos, Address sin)
      : queries(queries), kv(kv), size(size), rows(rows), places(places), cos(pointer<T>(cos)), sin(pointer<T>(sin)) {}

  Index heads() const { return queries + 2 * kv; }
  Index padded() const { return round_up(size, kOutputs); }
  Index start(Index row, Index head) const { return (row * kv + head) * places * padded(); }  // of keys in a cache
  Index values() const { return start(rows, 0); }  // from there to the values

  Index key_at(Index place, Index j) const {
    const Index key = place % kKeys, word = j / kTogether<T>;
    return (place - key) * padded() + key / kOutputs * kOutputs * size + word * kOutputs * kTogether<T> +
           key % kOutputs * kTogether<T> + j % kTogether<T>;
  }

  Index value_at(Index place, Index j) const {
    const Index key = place % kKeys, word = key / kTogether<T>;
    return (place - key) * padded() + j / kOutputs * kOutputs * kKeys + word * kOutputs * kTogether<T> +
           j % kOutputs * kTogether<T> + key % kTogether<T>;
  }
};

// Tokens of a window that belong to one row of the state.
struct Span {
  Index row, begin, count;

  Index last() const { return begin + count - 1; }
};

// The positions that a pass computes. Keys and values go to the token's place: its position, or, if they must not be
// kept, a place that is never read.
struct Window {
  std::vector<Span> spans;
  std::vector<Index> rows, positions, places;  // of each token

  Window() = default;

  // `width` tokens in each row: positions and places (rows, width). Places count through all rows, `stride` to a row.
  Window(Index first_row, Index rows, Index width, Index stride, Address positions, Address places) {
    for (Index i = 0; i < rows; ++i) {
      start(first_row + i);
      for (Index j = i * width; j < (i + 1) * width; ++j) add(pointer<Index>(positions)[j], pointer<Index>(places)[j] - (first_row + i) * stride);
    }
  }

  Index tokens() const { return positions.size(); }
  bool ends_row(Index token) const { return token + 1 == tokens() || rows[token + 1] != rows[token]; }

  void clear() {
    spans.clear(), rows.clear(), positions.clear(), places.clear();
  }

  void start(Index row) { spans.push_back({row, tokens(), 0}); }

  // One token more of the row that was started last.
  void add(Index position, Index place) {
    rows.push_back(spans.back().row), positions.push_back(position), places.push_back(place);
    ++spans.back().count;
  }

  void add_row(Index row, Index first, Index end) {
    start(row);
    for (Index position = first; position < end; ++position) add(position, position);
  }
};

// Rotary embedding of this thread's share of the heads in qkv (tokens, heads, size): queries stay there, keys and
// values go to the cache, the values as they are.
template <class T>
void rotate(const Shape<T>& shape, const Window& window, float* qkv, T* cache) {
  const Index size = shape.size, half = size / 2, heads = shape.heads();
  const Part part(window.tokens() * heads);
  for (Index i = part.first; i < part.last; ++i) {
    const Index token = i / heads, head = i % heads;
    float* values = qkv + i * size;
    if (head < shape.queries + shape.kv) {
      const T *cos = shape.cos + window.positions[token] * size, *sin = shape.sin + window.positions[token] * size;
      for (Index j = 0; j < half; ++j) {
        const float left = values[j], right = values[half + j];
        values[j] = left * widen(cos[j]) + right * widen(sin[j]);
        values[half + j] = right * widen(cos[half + j]) + left * widen(sin[half + j]);
      }
    }
    if (head < shape.queries) continue;
    T* target = cache + shape.start(window.rows[token], (head - shape.queries) % shape.kv);
    const Index place = window.places[token];
    if (head < shape.queries + shape.kv) {
      for (Index j = 0; j < size; ++j) target[shape.key_at(place, j)] = narrow<T>(values[j]);
      continue;
    }
    target += shape.values();
    for (Index j = 0; j < size; ++j) target[shape.value_at(place, j)] = narrow<T>(values[j]);
    // Values are read in pairs, so the place after the last one must hold a number.
    if (window.ends_row(token) && (place + 1) % kTogether<T>)
      for (Index j = 0; j < size; ++j) target[shape.value_at(place + 1, j)] = 0;
  }
}

// The running softmax of queries over the keys so far.
template <class T>
struct Heard {
  std::vector<T> queries;            // (count, size)
  std::vector<float> best, total;    // (count,) the highest score, and the sum of all shares relative to it
  std::vector<float> sums;           // (count, size) of values times shares

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
// up to its own: y (tokens, queries, size). Keys are taken a block at a time, so a query's sums do not depend on the
// others.
template <class T>
void attend(const Shape<T>& shape, const Window& window, const float* qkv, const T* cache, Index reach, T* y) {
  static thread_local Heard<T> heard;  // keeps its memory
  alignas(64) float sums[kRows * kOutputs], scores[kRows * kKeys];
  alignas(64) T shares[kRows * kKeys];
  const Index size = shape.size, groups = shape.queries / shape.kv;
  const Index pairs = window.spans.size() * shape.kv, threads = omp_get_num_threads();
  const Index tiles = (threads + pairs - 1) / pairs;
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  const Part part(pairs * tiles);
  for (Index task = part.first; task < part.last; ++task) {
    const Span& span = window.spans[task / tiles / shape.kv];
    const Index head = task / tiles % shape.kv, tile = task % tiles, all = span.count * groups;
    const Index begin = all * tile / tiles, count = all * (tile + 1) / tiles - begin;
    if (!count) continue;
    const auto token = [&](Index query) { return span.begin + (begin + query) / groups; };
    const auto query_head = [&](Index query) { return head * groups + (begin + query) % groups; };
    const T* keys = cache + shape.start(span.row, head);
    const T* values = keys + shape.values();
    heard.clear(count, size);
    for (Index query = 0; query < count; ++query) {
      const float* from = qkv + (token(query) * shape.heads() + query_head(query)) * size;
      for (Index j = 0; j < size; ++j) heard.queries[query * size + j] = narrow<T>(from[j]);
    }
    const Index lowest = window.positions[token(0)], length = window.positions[token(count - 1)] + 1;
    for (Index start = reach ? std::max<Index>(0, lowest - reach + 1) / kKeys * kKeys : 0; start < length; start += kKeys) {
      const Product<T> scoring(address(keys + start * shape.padded()), 0, size, kKeys);
      Product<T> summing(address(values + start * shape.padded()), 0, kKeys, size);
      summing.used = std::min(kKeys, round_up(length - start, kTogether<T>));
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
      T* target = y + (token(query) * shape.queries + query_head(query)) * size;
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

  void fit(const Layer<T>& layer, Index tokens) {
    qkv.resize(tokens * layer.qkv.out);
    x.resize(tokens * layer.qkv.in), normed.resize(x.size());
    heard.resize(tokens * layer.out.in), gated.resize(tokens * layer.down.in);
  }
};

// This thread's part of a pass over buffers.x (tokens, d); keys and values go to the caches. y (tokens, d).
template <class T>
void run(const Stack<T>& stack, const Address* caches, const Shape<T>& shape, const Window& window, Buffers<T>& buffers,
         T* y) {
  const Index tokens = window.tokens(), d = stack.layers[0].qkv.in;
  static thread_local std::vector<T> own;  // keeps its memory
  const bool alone = tokens * d <= kAlone;
  if (alone) own.resize(tokens * d);
  T *x = buffers.x.data(), *normed = alone ? own.data() : buffers.normed.data();
  const auto norm = [&](const Norm<T>& by) {
    if (alone) return by.rows(x, 0, tokens, d, normed);
    by(x, tokens, d, normed);
#pragma omp barrier
  };
  const auto add = [&](Index row, Index j, float sum) { x[row * d + j] = narrow<T>(widen(x[row * d + j]) + sum); };
  for (size_t i = 0; i < stack.layers.size(); ++i) {
    const Layer<T>& layer = stack.layers[i];
    T* cache = pointer<T>(caches[i]);
    const auto keep = [&](Index row, Index j, float sum) { buffers.qkv[row * layer.qkv.out + j] = sum; };
    norm(layer.input_norm);
    multiply(layer.qkv, normed, tokens, keep);
#pragma omp barrier
    rotate(shape, window, buffers.qkv.data(), cache);
#pragma omp barrier
    attend(shape, window, buffers.qkv.data(), cache, layer.reach, buffers.heard.data());
#pragma omp barrier
    multiply(layer.out, buffers.heard.data(), tokens, add);
#pragma omp barrier
    norm(layer.mlp_norm);
    multiply_gated(layer.gate_up, normed, tokens, buffers.gated.data());
#pragma omp barrier
    multiply(layer.down, buffers.gated.data(), tokens, add);
#pragma omp barrier
  }
  stack.norm(x, tokens, d, y);
#pragma omp barrier
}

// An MCTP head: it joins the norms of an embedding and of a state.
template <class T>
struct Head {
  Norm<T> embed_norm, hidden_norm;
  Product<T> proj;
  Stack<T> stack;
};

// This thread's part of a head's pass over the states y (tokens, d), which its output replaces. The head also reads the
// embeddings, (vocabulary, d), of the tokens `ahead` of the window's positions in ids (all rows, stride). fused:
// (tokens, 2 d).
template <class T>
void run(const Head<T>& head, Address cache, const T* embedding, const Index* ids, Index stride, Index ahead,
         const Shape<T>& shape, const Window& window, Buffers<T>& buffers, std::vector<T>& fused, T* y) {
  const Index d = head.proj.out;
  const Part part(window.tokens());
  for (Index i = part.first; i < part.last; ++i) {
    const Index id = ids[window.rows[i] * stride + window.positions[i] + ahead];
    head.embed_norm(embedding + id * d, d, fused.data() + i * 2 * d);
    head.hidden_norm(y + i * d, d, fused.data() + i * 2 * d + d);
  }
#pragma omp barrier
  multiply(head.proj, fused.data(), window.tokens(),
           [&](Index row, Index j, float sum) { buffers.x[row * d + j] = narrow<T>(sum); });
#pragma omp barrier
  run(head.stack, &cache, shape, window, buffers, y);
}

}  // namespace vita_audio
