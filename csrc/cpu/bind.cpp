// The module r2vpo_kernels.backends._cpp.

#include "../bind.h"
#include "cpu.h"
#include "huge_pages.h"

namespace r2vpo {

inline void take(Arguments& a, CpuTarget& to) { to = {a}; }

}  // namespace r2vpo

namespace {

using namespace r2vpo;

// The kernels for each instruction set that this machine has, the best last.
py::dict instruction_sets() {
  py::dict found;
  const auto add = [&](const char* name, const CpuKernels& kernels) {
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

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  bind_kernels<CpuKernels>(m).def("exp2", [](const CpuKernels& kernels, std::uintptr_t in,
                                             std::uintptr_t out, std::int64_t count) {
    kernels.exp2(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), count);
  });
  m.def("instruction_sets", &instruction_sets);
  m.def("advise_huge_pages", &advise_huge_pages);
}
