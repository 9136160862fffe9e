// Decoder layers and products on a CPU, for few rows and weights in bfloat16.
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
#include <utility>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using Bf16 = uint16_t;
using Address = uintptr_t;  // Python's view of a tensor's data
using Index = int64_t;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr Index kOutputs = 32;  // outputs of a block of weights
#ifdef __AVX512F__
constexpr int kRows = 12;  // rows whose sums fit the registers beside a block's weights
#else
constexpr int kRows = 2;
#endif
constexpr Index kKeys = 64;  // keys that attention takes at a time
constexpr Index kAhead = 8192;  // bytes of weights that several rows fetch ahead; one row gains nothing by it

float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

Bf16 narrow(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

// y = x W^T + b. The weight is (blocks, in / 2, kOutputs, 2): blocks of outputs, and in each the inputs in pairs.
struct Product {
  const Bf16* weight;
  const Bf16* bias;  // null: none
  Index in, out;

  Product(Address weight, Address bias, Index in, Index out)
      : weight(reinterpret_cast<const Bf16*>(weight)), bias(reinterpret_cast<const Bf16*>(bias)), in(in), out(out) {}

  Index blocks() const { return (out + kOutputs - 1) / kOutputs; }
  Index width(Index block) const { return std::min(kOutputs, out - block * kOutputs); }
};

// sum + the products of two neighbouring inputs with 16 outputs' weights.
inline Floats add_pairs(Floats sum, const Bf16* weights, uint32_t inputs) {
#ifdef __AVX512BF16__
  const __m512bh left = (__m512bh)_mm512_loadu_si512(weights), right = (__m512bh)_mm512_set1_epi32(inputs);
  return (Floats)_mm512_dpbf16_ps((__m512)sum, left, right);
#else
  Words pairs;
  std::memcpy(&pairs, weights, sizeof pairs);
  const Words even = pairs << 16, odd = pairs & 0xffff0000u;
  return sum + (Floats)even * widen(static_cast<Bf16>(inputs)) + (Floats)odd * widen(static_cast<Bf16>(inputs >> 16));
#endif
}

// x (rows, in) times one block: sums (rows, kOutputs).
template <int rows>
void multiply_block(const Product& product, const Bf16* x, Index block, float* sums) {
  const Index pairs = product.in / 2;
  const Bf16* weights = product.weight + block * kOutputs * product.in;
  Floats left[rows] = {}, right[rows] = {};
  for (Index pair = 0; pair < pairs; ++pair, weights += 2 * kOutputs) {
    if constexpr (rows > 1) {
      __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead + 64);
    }
    for (int row = 0; row < rows; ++row) {
      uint32_t inputs;
      std::memcpy(&inputs, x + row * product.in + 2 * pair, sizeof inputs);
      left[row] = add_pairs(left[row], weights, inputs);
      right[row] = add_pairs(right[row], weights + kOutputs, inputs);
    }
  }
  for (int row = 0; row < rows; ++row) {
    std::memcpy(sums + row * kOutputs, &left[row], sizeof left[row]);
    std::memcpy(sums + row * kOutputs + kOutputs / 2, &right[row], sizeof right[row]);
  }
}

// The same for rows known at run time, 1 … most.
template <int most = kRows>
void multiply_block(const Product& product, const Bf16* x, Index rows, Index block, float* sums) {
  if constexpr (most > 1) {
    if (rows < most) return multiply_block<most - 1>(product, x, rows, block, sums);
  }
  multiply_block<most>(product, x, block, sums);
}

// This thread's share of x W^T + b; store(row, output, sum) takes each result.
template <class Store>
void multiply(const Product& product, const Bf16* x, Index rows, Store store) {
  alignas(64) float sums[kRows * kOutputs];
  const Part part(product.blocks());
  for (Index block = part.first; block < part.last; ++block) {
    const Index first = block * kOutputs, width = product.width(block);
    for (Index start = 0; start < rows; start += kRows) {
      const Index count = std::min<Index>(kRows, rows - start);
      multiply_block(product, x + start * product.in, count, block, sums);
      for (Index row = 0; row < count; ++row)
        for (Index i = 0; i < width; ++i) {
          const float bias = product.bias ? widen(product.bias[first + i]) : 0;
          store(start + row, first + i, sums[row * kOutputs + i] + bias);
        }
    }
  }
}

// silu(gate) * up for this thread's share of a product whose outputs are all gates, then all ups.
void multiply_gated(const Product& product, const Bf16* x, Index rows, Bf16* y) {
  alignas(64) float gates[kRows * kOutputs], ups[kRows * kOutputs];
  const Index size = product.out / 2, half = size / kOutputs;
  const Part part(half);
  for (Index block = part.first; block < part.last; ++block)
    for (Index start = 0; start < rows; start += kRows) {
      const Index count = std::min<Index>(kRows, rows - start);
      multiply_block(product, x + start * product.in, count, block, gates);
      multiply_block(product, x + start * product.in, count, half + block, ups);
      for (Index row = 0; row < count; ++row)
        for (Index i = 0; i < kOutputs; ++i) {
          const float gate = gates[row * kOutputs + i], up = ups[row * kOutputs + i];
          y[(start + row) * size + block * kOutputs + i] = narrow(gate / (1 + std::exp(-gate)) * up);
        }
    }
}

// RMSNorm of this thread's share of the rows.
void norm(const Bf16* x, const Bf16* weight, float eps, Index rows, Index size, Bf16* y) {
  const Part part(rows);
  for (Index row = part.first; row < part.last; ++row) {
    const Bf16* values = x + row * size;
    float sum = 0;
    for (Index i = 0; i < size; ++i) sum += widen(values[i]) * widen(values[i]);
    const float scale = 1 / std::sqrt(sum / size + eps);
    for (Index i = 0; i < size; ++i) y[row * size + i] = narrow(widen(values[i]) * scale * widen(weight[i]));
  }
}

struct Layer {
  const Bf16* input_norm;
  const Bf16* mlp_norm;
  float input_eps, mlp_eps;
  Product qkv, out, gate_up, down;
  Index reach;  // positions that attention reaches back; 0: all

  Layer(Address input_norm, float input_eps, Product qkv, Product out, Address mlp_norm, float mlp_eps,
        Product gate_up, Product down, Index reach)
      : input_norm(reinterpret_cast<const Bf16*>(input_norm)),
        mlp_norm(reinterpret_cast<const Bf16*>(mlp_norm)),
        input_eps(input_eps), mlp_eps(mlp_eps), qkv(qkv), out(out), gate_up(gate_up), down(down), reach(reach) {}
};

// The shapes of attention, and the positions that a pass computes.
struct Window {
  Index queries, kv, size;      // heads, and their dimensions
  Index all_rows, places;       // of a cache, (2, all_rows, kv, places, size)
  Index first_row, rows, width; // rows * width positions
  const Index* positions;       // (rows, width)
  const Index* cache_places;    // (rows * width, 2 kv), in units of size
  const Bf16* cos;              // (all positions, size); its sign is in sin
  const Bf16* sin;

  Window(Index queries, Index kv, Index size, Index all_rows, Index places, Index first_row, Index rows, Index width,
         Address positions, Address cache_places, Address cos, Address sin)
      : queries(queries), kv(kv), size(size), all_rows(all_rows), places(places), first_row(first_row), rows(rows),
        width(width), positions(reinterpret_cast<const Index*>(positions)),
        cache_places(reinterpret_cast<const Index*>(cache_places)), cos(reinterpret_cast<const Bf16*>(cos)),
        sin(reinterpret_cast<const Bf16*>(sin)) {}

  Index tokens() const { return rows * width; }
  Index heads() const { return queries + 2 * kv; }
};

// Rotary embedding of this thread's share of the heads in qkv (tokens, heads, size): queries stay there, keys and
// values go to the cache, the values as they are.
void rotate(const Window& window, float* qkv, Bf16* cache) {
  const Index size = window.size, half = size / 2, heads = window.heads();
  const Part part(window.tokens() * heads);
  for (Index i = part.first; i < part.last; ++i) {
    const Index token = i / heads, head = i % heads;
    float* values = qkv + i * size;
    if (head < window.queries + window.kv) {
      const Bf16 *cos = window.cos + window.positions[token] * size, *sin = window.sin + window.positions[token] * size;
      for (Index j = 0; j < half; ++j) {
        const float left = values[j], right = values[half + j];
        values[j] = left * widen(cos[j]) + right * widen(sin[j]);
        values[half + j] = right * widen(cos[half + j]) + left * widen(sin[half + j]);
      }
    }
    if (head >= window.queries) {
      const Index place = window.cache_places[token * 2 * window.kv + head - window.queries];
      for (Index j = 0; j < size; ++j) cache[place * size + j] = narrow(values[j]);
    }
  }
}

// Exchanges rows and columns: of halves of `step` rows, then within these of half as many.
template <int step = 8>
void transpose(Words (&rows)[16]) {
  Words upper, lower;  // lanes 16 … 31 are the second vector's
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) {
    upper[lane] = lane & step ? 16 + lane - step : lane;
    lower[lane] = lane & step ? 16 + lane : lane + step;
  }
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    if (row & step) continue;
    const Words above = rows[row], below = rows[row + step];
    rows[row] = __builtin_shuffle(above, below, upper);
    rows[row + step] = __builtin_shuffle(above, below, lower);
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

// Keys (count, size) as the weight of a product that gives kKeys scores; those missing are zero.
Product pack_keys(const Bf16* keys, Index count, Index size, std::vector<uint32_t>& packed) {
  const Index pairs = size / 2;
  packed.resize(kKeys * pairs);
  for (Index start = 0; start < kKeys; start += 16)
    for (Index first = 0; first < pairs; first += 16) {
      const Index width = std::min<Index>(16, pairs - first);
      Words tile[16] = {};
      for (Index i = 0; i < 16 && start + i < count; ++i) {
        __builtin_prefetch(keys + (kKeys + start + i) * size + 2 * first);
        std::memcpy(&tile[i], keys + (start + i) * size + 2 * first, 4 * width);
      }
      transpose(tile);
      uint32_t* target = packed.data() + start / kOutputs * kOutputs * pairs + start % kOutputs;
      for (Index i = 0; i < width; ++i) std::memcpy(target + (first + i) * kOutputs, &tile[i], sizeof tile[i]);
    }
  return {reinterpret_cast<Address>(packed.data()), 0, size, kKeys};
}

// Values (count, size) as the weight of a product that sums kKeys of them; those missing are zero.
Product pack_values(const Bf16* values, Index count, Index size, std::vector<uint32_t>& packed) {
  static const Bf16 none[kOutputs] = {};
  packed.resize(kKeys / 2 * round_up(size, kOutputs));
  uint32_t* target = packed.data();
  for (Index first = 0; first < size; first += kOutputs) {
    const Index width = std::min(kOutputs, size - first);
    for (Index key = 0; key < kKeys; key += 2, target += kOutputs) {
      const Bf16* even = key < count ? values + key * size + first : none;
      const Bf16* odd = key + 1 < count ? values + (key + 1) * size + first : none;
      __builtin_prefetch(even + kKeys * size);
      __builtin_prefetch(odd + kKeys * size);
      for (Index i = 0; i < width; ++i) target[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    }
  }
  return {reinterpret_cast<Address>(packed.data()), 0, kKeys, size};
}

// What queries have heard so far: a softmax over the keys up to now.
struct Heard {
  std::vector<Bf16> queries;         // (count, size)
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
void add_scores(Heard& heard, Index query, Index size, const float* scores, Index first, Index last, float scale,
                Bf16* shares) {
  float best = heard.best[query], sum = 0;
  for (Index key = first; key <= last; ++key) best = std::max(best, scores[key]);
  for (Index key = 0; key < kKeys; ++key) {
    const float share = key >= first && key <= last ? std::exp((scores[key] - best) * scale) : 0;
    sum += share;
    shares[key] = narrow(share);
  }
  const float factor = std::exp((heard.best[query] - best) * scale);
  heard.best[query] = best;
  heard.total[query] = heard.total[query] * factor + sum;
  for (Index j = 0; j < size; ++j) heard.sums[query * size + j] *= factor;
}

// Attention over a cache of this thread's share of the queries in qkv (tokens, heads, size), each over the positions
// up to its own: y (tokens, queries, size). Queries of one key head share its packing. Keys are taken kKeys at a time
// from multiples of kKeys on, so a query's sums do not depend on the others.
void attend(const Window& window, const float* qkv, const Bf16* cache, Index reach, Bf16* y) {
  static thread_local Heard heard;  // keeps its memory
  alignas(64) float sums[kRows * kOutputs], scores[kRows * kKeys];
  alignas(64) Bf16 shares[kRows * kKeys];
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
    const Bf16* keys = cache + ((window.first_row + row) * window.kv + head) * window.places * size;
    const Bf16* values = keys + window.all_rows * window.kv * window.places * size;
    heard.clear(count, size);
    for (Index query = 0; query < count; ++query) {
      const float* from = qkv + (token(query) * window.heads() + query_head(query)) * size;
      for (Index j = 0; j < size; ++j) heard.queries[query * size + j] = narrow(from[j]);
    }
    const Index lowest = window.positions[token(0)], length = window.positions[token(count - 1)] + 1;
    for (Index start = reach ? std::max<Index>(0, lowest - reach + 1) / kKeys * kKeys : 0; start < length; start += kKeys) {
      const Product scoring = pack_keys(keys + start * size, std::min(kKeys, length - start), size, heard.keys);
      const Product summing = pack_values(values + start * size, std::min(kKeys, length - start), size, heard.values);
      for (Index query = 0; query < count; query += kRows) {
        const Index rows = std::min<Index>(kRows, count - query);
        for (Index block = 0; block < kKeys / kOutputs; ++block) {
          multiply_block(scoring, heard.queries.data() + query * size, rows, block, sums);
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
          multiply_block(summing, shares, rows, block, sums);
          for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < summing.width(block); ++j)
              heard.sums[(query + i) * size + block * kOutputs + j] += sums[i * kOutputs + j];
        }
      }
    }
    for (Index query = 0; query < count; ++query) {
      Bf16* target = y + (token(query) * window.queries + query_head(query)) * size;
      for (Index j = 0; j < size; ++j) target[j] = narrow(heard.sums[query * size + j] / heard.total[query]);
    }
  }
}

struct Layers {
  std::vector<Layer> layers;

  explicit Layers(std::vector<Layer> layers) : layers(std::move(layers)) {}
};

// Runs layers over x (tokens, d), in place; keys and values go to the caches.
void run(const Layers& stack, const std::vector<Address>& caches, Address input, const Window& window,
         int threads) {
  const std::vector<Layer>& layers = stack.layers;
  Bf16* x = reinterpret_cast<Bf16*>(input);
  const Index tokens = window.tokens(), d = layers[0].qkv.in, gated_size = layers[0].down.in;
  const Index qkv_size = window.heads() * window.size, heard_size = window.queries * window.size;
  std::vector<float> qkv(tokens * qkv_size);
  std::vector<Bf16> normed(tokens * d), heard(tokens * heard_size), gated(tokens * gated_size);
#pragma omp parallel num_threads(threads)
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    Bf16* cache = reinterpret_cast<Bf16*>(caches[i]);
    const auto add = [&](Index row, Index j, float sum) { x[row * d + j] = narrow(widen(x[row * d + j]) + sum); };
    norm(x, layer.input_norm, layer.input_eps, tokens, d, normed.data());
#pragma omp barrier
    multiply(layer.qkv, normed.data(), tokens, [&](Index row, Index j, float sum) { qkv[row * qkv_size + j] = sum; });
#pragma omp barrier
    rotate(window, qkv.data(), cache);
#pragma omp barrier
    attend(window, qkv.data(), cache, layer.reach, heard.data());
#pragma omp barrier
    multiply(layer.out, heard.data(), tokens, add);
#pragma omp barrier
    norm(x, layer.mlp_norm, layer.mlp_eps, tokens, d, normed.data());
#pragma omp barrier
    multiply_gated(layer.gate_up, normed.data(), tokens, gated.data());
#pragma omp barrier
    multiply(layer.down, gated.data(), tokens, add);
#pragma omp barrier
  }
}

// y (rows, out) = x (rows, in) W^T + b, plus add (rows, out) unless it is null.
void multiply_all(const Product& product, Address input, Address add, Address output, Index rows, int threads) {
  const Bf16 *x = reinterpret_cast<const Bf16*>(input), *added = reinterpret_cast<const Bf16*>(add);
  Bf16* y = reinterpret_cast<Bf16*>(output);
  const Index out = product.out;
#pragma omp parallel num_threads(threads)
  multiply(product, x, rows, [&](Index row, Index j, float sum) {
    y[row * out + j] = narrow(added ? widen(added[row * out + j]) + sum : sum);
  });
}

// y (rows, size) = RMSNorm of x (rows, size).
void norm_all(Address x, Address weight, float eps, Address y, Index rows, Index size) {
  norm(reinterpret_cast<const Bf16*>(x), reinterpret_cast<const Bf16*>(weight), eps, rows, size,
       reinterpret_cast<Bf16*>(y));
}

// The place of the first of the largest values in each row of x (rows, size).
void find_best(Address input, Address output, Index rows, Index size) {
  constexpr Index kChunk = 1024;
  for (Index row = 0; row < rows; ++row) {
    const Bf16* x = reinterpret_cast<const Bf16*>(input) + row * size;
    float best = std::numeric_limits<float>::lowest();
    Index found = 0;
    for (Index start = 0; start < size; start += kChunk) {
      const Index end = std::min(start + kChunk, size);
      float largest = std::numeric_limits<float>::lowest();
      for (Index i = start; i < end; ++i) largest = std::max(largest, widen(x[i]));
      if (largest > best) best = largest, found = start;
    }
    while (found + 1 < size && widen(x[found]) < best) ++found;
    reinterpret_cast<Index*>(output)[row] = found;
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  py::class_<Product>(module, "Product").def(py::init<Address, Address, Index, Index>());
  py::class_<Layer>(module, "Layer")
      .def(py::init<Address, float, Product, Product, Address, float, Product, Product, Index>());
  py::class_<Layers>(module, "Layers").def(py::init<std::vector<Layer>>());
  py::class_<Window>(module, "Window")
      .def(py::init<Index, Index, Index, Index, Index, Index, Index, Index, Address, Address, Address, Address>());
  module.def("multiply", &multiply_all, py::call_guard<py::gil_scoped_release>());
  module.def("norm", &norm_all);
  module.def("find_best", &find_best);
  module.def("run", &run, py::call_guard<py::gil_scoped_release>());
}
