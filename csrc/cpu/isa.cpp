// Which kernels run here: the best this CPU and its operating system can run, or PREFKERN_CPU_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu_info.h"

namespace prefkern {

#define PK_DECLARE(isa)       \
  namespace isa {             \
  extern const Kernels table; \
  }
PK_DECLARE(baseline)
#if defined(PREFKERN_ISA_AVX2)
PK_DECLARE(avx2)
#endif
#if defined(PREFKERN_ISA_AVX512)
PK_DECLARE(avx512)
#endif
#if defined(PREFKERN_ISA_AVX512BF16)
PK_DECLARE(avx512bf16)
#endif
#undef PK_DECLARE

namespace {

// Best first; null where the build left it out.
const Kernels* const kBuilt[] = {
#if defined(PREFKERN_ISA_AVX512BF16)
    &avx512bf16::table,
#endif
#if defined(PREFKERN_ISA_AVX512)
    &avx512::table,
#endif
#if defined(PREFKERN_ISA_AVX2)
    &avx2::table,
#endif
    &baseline::table,
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const Kernels& kernels() {
  static const std::vector<std::string> runnable = runnable_variants(detect_cpu());
  const auto runs = [&](const char* name) {
    for (const std::string& r : runnable) {
      if (r == name) return true;
    }
    return false;
  };
  const char* asked = std::getenv("PREFKERN_CPU_ISA");
  const bool named = asked != nullptr && *asked != '\0';
  std::vector<std::string> choices;
  for (const Kernels* k : kBuilt) {
    if (!runs(k->name)) continue;
    if (!named || std::strcmp(asked, k->name) == 0) return *k;
    choices.emplace_back(k->name);
  }
  throw std::runtime_error(
      "PREFKERN_CPU_ISA must name kernels that this CPU and this build have (" + join(choices) +
      "), got '" + (named ? asked : "") + "'; unset it to take the best.");
}

}  // namespace prefkern
