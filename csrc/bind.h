// What Python sees of the kernels: addresses and sizes, which it has checked. No torch header is
// used, so that one build serves every release of torch.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace r2vpo {

// An address as Python has it: an int, 0 for none.
struct Address {
  std::uintptr_t value;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace r2vpo

namespace pybind11 {
namespace detail {
template <>
struct type_caster<r2vpo::Address> {
  PYBIND11_TYPE_CASTER(r2vpo::Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = PyLong_Check(source.ptr()) ? PyLong_AsSize_t(source.ptr()) : 0;
    if (!PyErr_Occurred()) return PyLong_Check(source.ptr());
    PyErr_Clear();
    return false;
  }
};
}  // namespace detail
}  // namespace pybind11

namespace r2vpo {

namespace py = pybind11;

// The types Dtype, KL, Rows and Kernels of a module. R is an aggregate: Rows, then `Where`s. K is
// Kernels<R>, or derived from it.
template <typename R, typename K, typename... Where>
py::class_<K> bind_kernels(py::module_& m) {
  using std::int64_t;
  // Local, because a process may load several of these modules.
  const py::module_local local;
  py::enum_<Dtype>(m, "Dtype", local)
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::enum_<KL>(m, "KL", local)
      .value("none", KL::none)
      .value("k1", KL::k1)
      .value("k2", KL::k2)
      .value("k3", KL::k3);
  py::class_<R>(m, "Rows", local)
      .def(py::init([](Dtype dtype, int64_t batch, int64_t length, int64_t vocabulary,
                       Address logits, int64_t stride_batch, int64_t stride_token, Address dlogits,
                       int64_t grad_stride_batch, int64_t grad_stride_token, Where... where) {
        return R{{dtype, batch, length, vocabulary, logits, stride_batch, stride_token, dlogits,
                  grad_stride_batch, grad_stride_token},
                 where...};
      }));
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  return py::class_<K>(m, "Kernels", local)
      .def(
          "logps_forward",
          [](const K& kernels, const R& rows, Address labels, Address temperature, Address logps,
             Address top, Address log_total, Address entropy) {
            kernels.logps_forward(rows, {labels, temperature, logps, top, log_total, entropy});
          },
          unlocked)
      .def(
          "logps_backward",
          [](const K& kernels, const R& rows, Address labels, Address temperature, Address logps,
             Address top, Address log_total, Address entropy, Address grad_logps,
             Address grad_entropy) {
            kernels.logps_backward(rows, {labels, temperature, logps, top, log_total, entropy,
                                          grad_logps, grad_entropy});
          },
          unlocked)
      .def(
          "one_pass",
          [](const K& kernels, const R& rows, Address labels, Address temperature, Address weight,
             Address old_logps, Address advantages, Address variance_coef, Address center,
             Address ref_logps, Address kl_coef, Address entropy_coef, Address log_ratio_clamp,
             KL kl, Address logps, Address entropy) {
            kernels.one_pass(rows, {labels, temperature, weight, old_logps, advantages,
                                    variance_coef, center, ref_logps, kl_coef, entropy_coef,
                                    log_ratio_clamp, kl, logps, entropy});
          },
          unlocked)
      .def(
          "scale",
          [](const K& kernels, const R& rows, Address upstream) {
            kernels.scale(rows, {upstream});
          },
          unlocked);
}

}  // namespace r2vpo
