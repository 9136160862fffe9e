// Python's view of the CPU kernels: passes, products, and whole rounds. The kernels are in cpu_kernels.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu_kernels.h"
#include "cpu_rounds.h"

namespace vita_audio {
namespace {

// The backbone over x (tokens, d): y (tokens, d), normed.
template <class T>
void run_backbone(const Stack<T>& stack, const std::vector<Address>& caches, Address x, Address y,
                  const Shape<T>& shape, const Window& window, int threads) {
  Buffers<T> buffers;
  buffers.fit(stack.layers[0], window.tokens());
  std::copy_n(pointer<T>(x), buffers.x.size(), buffers.x.data());
#pragma omp parallel num_threads(threads)
  run(stack, caches.data(), shape, window, buffers, pointer<T>(y));
}

// A head over the states y (tokens, d), which its normed output replaces; see `run`.
template <class T>
void run_head(const Head<T>& head, Address cache, Address embedding, Address ids, Index stride, Index ahead, Address y,
              const Shape<T>& shape, const Window& window, int threads) {
  Buffers<T> buffers;
  buffers.fit(head.stack.layers[0], window.tokens());
  std::vector<T> fused(window.tokens() * head.proj.in);
#pragma omp parallel num_threads(threads)
  run(head, cache, pointer<T>(embedding), pointer<Index>(ids), stride, ahead, shape, window, buffers, fused,
      pointer<T>(y));
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

Rows make_rows(const std::map<std::string, Address>& at, Index tokens_stride, Index report_stride, Index num_heads,
               Index places) {
  const auto numbers = [&](const char* name) { return pointer<Index>(at.at(name)); };
  const auto flags = [&](const char* name) { return pointer<const bool>(at.at(name)); };
  Rows rows{tokens_stride, report_stride, num_heads, places};
  rows.tokens = numbers("tokens"), rows.known = numbers("known"), rows.seen = numbers("seen");
  rows.seen_heads = numbers("seen_heads"), rows.drafts = numbers("drafts"), rows.starts = numbers("starts");
  rows.backbone_steps = numbers("backbone_steps"), rows.head_steps = numbers("head_steps");
  rows.report = numbers("report"), rows.hidden = at.at("hidden");
  rows.lossless = flags("lossless"), rows.between = flags("between");
  rows.heads_speak = flags("heads_speak"), rows.check = flags("check");
  return rows;
}

// The kernels for one type of weights, in a module of their own.
template <class T>
void define(pybind11::module_ module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> unlocked;
  const py::module_local local;  // other modules, compiled for other instructions, have the same names
  py::class_<Norm<T>>(module, "Norm", local).def(py::init<Address, float>());
  py::class_<Product<T>>(module, "Product", local).def(py::init<Address, Address, Index, Index, bool>());
  py::class_<Layer<T>>(module, "Layer", local)
      .def(py::init<Norm<T>, Product<T>, Product<T>, Norm<T>, Product<T>, Product<T>, Index>());
  py::class_<Stack<T>>(module, "Stack", local).def(py::init<std::vector<Layer<T>>, Norm<T>>());
  py::class_<Head<T>>(module, "Head", local).def(py::init<Norm<T>, Norm<T>, Product<T>, Stack<T>>());
  py::class_<Shape<T>>(module, "Shape", local)
      .def(py::init<Index, Index, Index, Index, Index, Address, Address>());
  py::class_<Model<T>>(module, "Model", local)
      .def(py::init<Address, Stack<T>, std::vector<Head<T>>, Product<T>, Product<T>, Index, Index, Shape<T>,
                    std::vector<Address>>());
  py::class_<Rounds<T>>(module, "Rounds", local)
      .def(py::init<Model<T>, Rows>())
      .def("run", &Rounds<T>::run, unlocked);
  module.def("multiply", &multiply_all<T>, unlocked);
  module.def("find_best", &find_best<T>, unlocked);
  module.def("run_backbone", &run_backbone<T>, unlocked);
  module.def("run_head", &run_head<T>, unlocked);
}

}  // namespace
}  // namespace vita_audio

PYBIND11_MODULE(MODULE, module) {
  namespace py = pybind11;
  using namespace vita_audio;
  py::class_<Window>(module, "Window", py::module_local())
      .def(py::init<Index, Index, Index, Index, Address, Address>());
  py::class_<Rows>(module, "Rows", py::module_local()).def(py::init(&make_rows));
  py::class_<Checks>(module, "Checks", py::module_local())
      .def(py::init([](Index steps, Index burst, Address hidden, Address tokens, Address disagreements) {
        return Checks{steps, burst, hidden, pointer<Index>(tokens), pointer<Index>(disagreements)};
      }));
  define<Bf16>(module.def_submodule("bfloat16"));
  define<float>(module.def_submodule("float32"));
}
