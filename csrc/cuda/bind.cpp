// The module r2vpo_kernels.backends._cuda.

#include "../bind.h"
#include "cuda.h"

PYBIND11_MODULE(_cuda, m) {
  using namespace r2vpo;
  bind_kernels<CudaRows, Kernels<CudaRows>, int, Address>(m);
  m.attr("kernels") = py::cast(&kernels_cuda, py::return_value_policy::reference);
  m.attr("EMULATED") = false;
}
