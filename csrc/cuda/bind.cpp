// The module r2vpo_kernels.backends._cuda.

#include "../bind.h"
#include "cuda.h"

namespace r2vpo {

inline void take(Arguments& a, CudaTarget& to) {
  to = {a, reinterpret_cast<void*>(static_cast<std::uintptr_t>(a))};
}

}  // namespace r2vpo

PYBIND11_MODULE(_cuda, m) {
  using namespace r2vpo;
  bind_kernels<Kernels<CudaTarget>>(m);
  m.attr("kernels") = py::cast(&kernels_cuda, py::return_value_policy::reference);
  m.attr("EMULATED") = false;
}
