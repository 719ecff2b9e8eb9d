// What Python sees of the kernels: addresses and sizes, which it has checked. No torch header is
// used, so that one build serves every release of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace r2vpo {

namespace py = pybind11;

// The arguments of a call, one flat tuple of numbers, taken one after another: an address is an
// int, 0 for none. A tuple is read in some nanoseconds a number, objects for it are not built.
class Arguments {
 public:
  explicit Arguments(const py::tuple& given) : given_(given.ptr()), left_(Py_SIZE(given_)) {}

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() {
    if (left_ == 0) throw std::invalid_argument("fewer arguments than the kernel takes");
    PyObject* const x = PyTuple_GET_ITEM(given_, Py_SIZE(given_) - left_--);
    if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(x));
    } else if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(PyLong_AsSize_t(x));
    } else {
      return static_cast<T>(PyLong_AsLongLong(x));
    }
  }

  // After the last.
  void done() const {
    if (PyErr_Occurred()) throw py::error_already_set();
    if (left_ != 0) throw std::invalid_argument("more arguments than the kernel takes");
  }

 private:
  PyObject* given_;
  Py_ssize_t left_;
};

// The members of each struct in their order, for braces evaluate from left to right.

inline Column column(Arguments& a) { return {a, a, a, a}; }

inline Tokens tokens(Arguments& a) { return {a, a, a, a, a, a, a, a}; }

inline RowTokens row_tokens(Arguments& a) { return {tokens(a), a, a}; }

inline void take(Arguments& a, Rows& to) { to = {a, a, a, a, a, a, a, a, a, a}; }

inline Numbers numbers(Arguments& a) { return {a, a, a, a, a, a}; }

inline void take(Arguments& a, Prepare& to) {
  to = {tokens(a), column(a), column(a), column(a), column(a), column(a), column(a), column(a),
        column(a), column(a), column(a), column(a), column(a), column(a), column(a), a, a, a, a, a,
        a, a, a, numbers(a), a, a, a, a};
}
inline void take(Arguments& a, Means& to) { to = {tokens(a), a, column(a), a, a}; }
inline void take(Arguments& a, Finish& to) {
  to = {tokens(a), a, a, column(a), a, a, a, a, a, a, a, a, a, a};
}
inline void take(Arguments& a, ShardParts& to) { to = {tokens(a), a, a, a, a, a, a, a}; }
inline void take(Arguments& a, ShardCombine& to) { to = {tokens(a), a, a, a, a, a}; }
inline void take(Arguments& a, DualStep& to) { to = {a, a, a, a, a, a, a, a, a, a}; }
inline void take(Arguments& a, LogpsForward& to) { to = {row_tokens(a), a, a, a, a}; }
inline void take(Arguments& a, LogpsBackward& to) { to = {row_tokens(a), a, a, a, a, a, a, a}; }
inline void take(Arguments& a, OnePass& to) { to = {row_tokens(a), a, a}; }
inline void take(Arguments& a, Scale& to) { to = {a}; }

// A method of K that launches a kernel, with the arguments target, rows if it has them, the rest.
template <typename K, typename Of, typename Target, typename... A>
void bind(py::class_<K>& kernels, const char* name,
          void (*Of::*kernel)(const Target&, const A&...)) {
  kernels.def(name, [kernel](const K& k, const py::tuple& given) {
    Arguments from(given);
    Target target;
    take(from, target);
    std::tuple<A...> a;
    std::apply([&](A&... each) { (take(from, each), ...); }, a);
    from.done();
    const py::gil_scoped_release unlocked;
    std::apply([&](const A&... each) { (k.*kernel)(target, each...); }, a);
  });
}

// What both modules have. K is Kernels<Target>, or derived from it. A module has its own
// take(Arguments&, Target&).
template <typename K>
py::class_<K> bind_kernels(py::module_& m) {
  // Local, because a process may load several of these modules.
  py::class_<K> kernels(m, "Kernels", py::module_local());
  bind(kernels, "logps_forward", &K::logps_forward);
  bind(kernels, "logps_backward", &K::logps_backward);
  bind(kernels, "one_pass", &K::one_pass);
  bind(kernels, "scale", &K::scale);
  bind(kernels, "prepare", &K::prepare);
  bind(kernels, "means", &K::means);
  bind(kernels, "finish", &K::finish);
  bind(kernels, "shard_parts", &K::shard_parts);
  bind(kernels, "shard_combine", &K::shard_combine);
  bind(kernels, "dual_step", &K::dual_step);
  // What enumerators stand for, by torch's names.
  py::dict dtypes;
  const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int64",
                               "int32",   "int16",    "int8",    "uint8",   "bool"};
  for (const char* name : names) dtypes[name] = dtypes.size();
  m.attr("DTYPES") = dtypes;
  m.attr("KL") = py::dict(py::arg("k1") = int(KL::k1), py::arg("k2") = int(KL::k2),
                          py::arg("k3") = int(KL::k3));
  return kernels;
}

}  // namespace r2vpo
