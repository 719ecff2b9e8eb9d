// What Python sees of the kernels: functions of tensors and numbers, which it has checked. No torch
// header is used, so that one build serves every release of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace r2vpo {

namespace py = pybind11;

// Names by which attributes are found, and what enumerators are called in Python; all made once.
struct Interned {
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const dtypes = PyDict_New();  // torch's
  PyObject* const policy_losses = PyDict_New();
  PyObject* const kl_estimators = PyDict_New();

  Interned() {
    const py::module_ torch = py::module_::import("torch");
    int value = 0;
    for (const char* name : {"float32", "bfloat16", "float16", "float64", "int64", "int32", "int16",
                             "int8", "uint8", "bool"}) {
      PyDict_SetItem(dtypes, torch.attr(name).ptr(), py::int_(value++).ptr());
    }
    value = 0;
    for (const char* name : {"ratio", "clip", "cispo"}) {
      PyDict_SetItem(policy_losses, py::str(name).ptr(), py::int_(value++).ptr());
    }
    value = 0;
    PyDict_SetItem(kl_estimators, Py_None, py::int_(value++).ptr());
    for (const char* name : {"k1", "k2", "k3"}) {
      PyDict_SetItem(kl_estimators, py::str(name).ptr(), py::int_(value++).ptr());
    }
  }

  static const Interned& all() {
    static const Interned found;
    return found;
  }
};

// A new reference, or an exception.
inline py::object checked(PyObject* found) {
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

template <typename E>
E enumerator(PyObject* dict, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dict, name);
  if (!value) throw std::invalid_argument("a name that the kernel does not know");
  return static_cast<E>(PyLong_AsLong(value));
}

// A torch.Tensor, or None, which has no data.
class Tensor {
 public:
  explicit Tensor(PyObject* x) : x_(x) {}

  void* data() const {
    if (x_ == Py_None) return nullptr;
    return PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(x_, Interned::all().data_ptr)).ptr());
  }
  Dtype dtype() const {
    if (x_ == Py_None) return {};
    const py::object name = checked(PyObject_GetAttr(x_, Interned::all().dtype));
    return enumerator<Dtype>(Interned::all().dtypes, name.ptr());
  }
  py::object shape() const { return checked(PyObject_GetAttr(x_, Interned::all().shape)); }
  py::object strides() const {
    return checked(PyObject_CallMethodNoArgs(x_, Interned::all().stride));
  }
  explicit operator bool() const { return x_ != Py_None; }

 private:
  PyObject* x_;
};

// The arguments of a call, a tuple of numbers, tensors and None, taken one after another.
class Arguments {
 public:
  explicit Arguments(const py::handle& given) : given_(given.ptr()), left_(Py_SIZE(given_)) {}

  PyObject* next() {
    if (left_ == 0) throw std::invalid_argument("fewer arguments than the kernel takes");
    return PyTuple_GET_ITEM(given_, Py_SIZE(given_) - left_--);
  }

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() {
    PyObject* const x = next();
    if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(x));
    } else if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(Tensor(x).data());
    } else if constexpr (std::is_same_v<T, PolicyLoss>) {
      return enumerator<PolicyLoss>(Interned::all().policy_losses, x);
    } else if constexpr (std::is_same_v<T, KL>) {
      return enumerator<KL>(Interned::all().kl_estimators, x);
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

// Of calls.Column.
inline Column column(Arguments& a) {
  Arguments given(a.next());
  const Tensor x(given.next());
  return {x.data(), x.dtype(), given, given};
}

// Of a tensor with one number for each unit, or with one number.
inline Column vector(Arguments& a) {
  const Tensor x(a.next());
  if (!x) return {};
  const py::object strides = x.strides();
  const bool many = Py_SIZE(strides.ptr()) > 0;
  return {x.data(), x.dtype(), many ? std::int64_t(Arguments(strides)) : 0, 0};
}

inline Tokens tokens(Arguments& a) { return {a, a, a, a, a, a, a, a, a, a, a}; }

// Of a tuple, or None.
inline SamplingMask sampling_mask(Arguments& a) {
  PyObject* const x = a.next();
  if (x == Py_None) return {};
  Arguments given(x);
  return {given, given, given, given, given, given};
}

inline Support support(Arguments& a) {
  PyObject* const x = a.next();
  if (x == Py_None) return {};
  Arguments given(x);
  return {given, given, given, given};
}

inline RowTokens row_tokens(Arguments& a) { return {tokens(a), support(a), a, a}; }

// Of logits (B, T, V) and their gradient, or None.
inline void take(Arguments& a, Rows& to) {
  const Tensor logits(a.next()), dlogits(a.next());
  const py::object shape = logits.shape(), strides = logits.strides();
  Arguments size(shape), stride(strides);
  to = {logits.dtype(), size, size, size, logits.data(), stride, stride, nullptr, 0, 0};
  if (!dlogits) return;
  const py::object grad_strides = dlogits.strides();
  Arguments grad_stride(grad_strides);
  to.dlogits = dlogits.data();
  to.grad_stride_batch = grad_stride;
  to.grad_stride_token = grad_stride;
}

inline void take(Arguments& a, Prepare& to) {
  to = {tokens(a), column(a), column(a), column(a), column(a), column(a), column(a), column(a),
        column(a), column(a), column(a), vector(a), vector(a), vector(a), vector(a), a, a, a, a, a,
        a, a, a, {}, nullptr, a, a, a, a, {}};
  PyObject* const numbers = a.next();
  if (PyTuple_Check(numbers)) {
    Arguments number(numbers);
    to.numbers = {number, number, number, number, number, number, number, number, number};
  } else {
    to.numbers_tensor = static_cast<const float*>(Tensor(numbers).data());
  }
  to.sampling_mask = sampling_mask(a);
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

// Of hidden states (N, H) and a head (V, H).
inline Head head(Arguments& a) {
  Head to = {};
  static_cast<RowTokens&>(to) = row_tokens(a);
  const Tensor hidden(a.next()), weight(a.next());
  const py::object shape = weight.shape();
  const py::object of_hidden = hidden.strides(), of_weight = weight.strides();
  Arguments size(shape), hidden_stride(of_hidden), weight_stride(of_weight);
  to.dtype = weight.dtype();
  to.words = size;
  to.width = size;
  to.hidden = hidden.data();
  to.hidden_stride = hidden_stride;
  to.weight = weight.data();
  to.weight_stride = weight_stride;
  to.scale = a;
  to.slopes = a;
  return to;
}
inline void take(Arguments& a, HeadLogits& to) { to = {head(a), a, a}; }
inline void take(Arguments& a, HeadDhidden& to) { to = {head(a), a, a}; }
inline void take(Arguments& a, HeadDweight& to) { to = {head(a), a, a, a, a, a, a, a}; }

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
  bind(kernels, "head_logits", &K::head_logits);
  bind(kernels, "head_dhidden", &K::head_dhidden);
  bind(kernels, "head_dweight", &K::head_dweight);
  return kernels;
}

}  // namespace r2vpo
