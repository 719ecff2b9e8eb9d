// The module r2vpo_kernels.backends._cpp: addresses and sizes from Python, which has checked them.
// No torch header is used, so that one build serves every release of torch.

#include <pybind11/pybind11.h>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace {

// An address as Python has it: an int, 0 for none.
struct Address {
  std::uintptr_t value;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace

namespace pybind11 {
namespace detail {
template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = PyLong_Check(source.ptr()) ? PyLong_AsSize_t(source.ptr()) : 0;
    if (!PyErr_Occurred()) return PyLong_Check(source.ptr());
    PyErr_Clear();
    return false;
  }
};
}  // namespace detail
}  // namespace pybind11

namespace {

namespace py = pybind11;
using namespace r2vpo;
using std::int64_t;

// The kernels for each instruction set that this machine has, the best last.
py::dict instruction_sets() {
  py::dict found;
  const auto add = [&](const char* name, const Kernels& kernels) {
    found[name] = py::cast(&kernels, py::return_value_policy::reference);
  };
  add("baseline", kernels_baseline);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("avx2", kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    add("avx512", kernels_avx512);
  }
#endif
  return found;
}

Rows make_rows(Dtype dtype, int64_t batch, int64_t length, int64_t vocabulary, Address logits,
               int64_t stride_batch, int64_t stride_token, Address dlogits,
               int64_t grad_stride_batch, int64_t grad_stride_token, int threads) {
  return {dtype,        batch,   length,            vocabulary,        logits, stride_batch,
          stride_token, dlogits, grad_stride_batch, grad_stride_token, threads};
}

void logps_forward(const Kernels& kernels, const Rows& rows, Address labels, Address temperature,
                   Address logps, Address top, Address log_total, Address entropy) {
  kernels.logps_forward(rows, {labels, temperature, logps, top, log_total, entropy});
}

void logps_backward(const Kernels& kernels, const Rows& rows, Address labels, Address temperature,
                    Address logps, Address top, Address log_total, Address entropy,
                    Address grad_logps, Address grad_entropy) {
  kernels.logps_backward(rows, {labels, temperature, logps, top, log_total, entropy, grad_logps,
                                grad_entropy});
}

void one_pass(const Kernels& kernels, const Rows& rows, Address labels, Address temperature,
              Address weight, Address old_logps, Address advantages, Address variance_coef,
              Address center, Address ref_logps, float kl_coef, float entropy_coef,
              float log_ratio_clamp, KL kl, Address logps, Address entropy) {
  kernels.one_pass(rows, {labels, temperature, weight, old_logps, advantages, variance_coef, center,
                          ref_logps, kl_coef, entropy_coef, log_ratio_clamp, kl, logps, entropy});
}

void scale(const Kernels& kernels, const Rows& rows, float factor) { kernels.scale(rows, factor); }

void exp2_of(const Kernels& kernels, Address in, Address out, int64_t count) {
  kernels.exp2(in, out, count);
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::enum_<KL>(m, "KL")
      .value("none", KL::none)
      .value("k1", KL::k1)
      .value("k2", KL::k2)
      .value("k3", KL::k3);
  py::class_<Rows>(m, "Rows").def(py::init(&make_rows));
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Kernels>(m, "Kernels")
      .def("logps_forward", &logps_forward, unlocked)
      .def("logps_backward", &logps_backward, unlocked)
      .def("one_pass", &one_pass, unlocked)
      .def("scale", &scale, unlocked)
      .def("exp2", &exp2_of, unlocked);
  m.def("instruction_sets", &instruction_sets);
  m.def("advise_huge_pages", &advise_huge_pages);
}
