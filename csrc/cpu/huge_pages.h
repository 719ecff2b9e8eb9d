#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r2vpo {

// Ask for pages of 2 MiB in memory that is about to be written for the first time: a large fresh
// buffer otherwise costs as much in page faults as the kernel that fills it. Advice only: where the
// system declines, nothing changes.
static inline void advise_huge_pages(std::uintptr_t begin, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace r2vpo
