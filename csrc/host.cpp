// prefkern._C: what this build and this CPU can do, for `prefkern env`. No torch here: the op
// libraries are separate, and this module answers where they do not load.
#include <algorithm>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_info.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split_commas(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PREFKERN_CXX;
  info["compiler_version"] = __VERSION__;
  info["flags"] = PREFKERN_CXX_FLAGS;
  info["isa_variants"] = split_commas(PREFKERN_ISA_VARIANTS);
  info["isa_flags"] = PREFKERN_ISA_FLAGS;
  info["torch"] = PREFKERN_BUILD_TORCH;
  info["torch_target"] = PREFKERN_TORCH_TARGET;
  return info;
}

py::dict cpu_capabilities() {
  const prefkern::CpuInfo cpu = prefkern::detect_cpu();
  py::dict info;
  info["architecture"] = cpu.architecture;
  info["vendor"] = cpu.vendor;
  info["model"] = cpu.model;
  info["isa"] = cpu.isa;
  info["variants"] = prefkern::runnable_variants(cpu);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host side of prefkern: what was built and what this CPU can run.";
  m.def("build_info", &build_info,
        "How the native part was built: compiler, flags, instruction-set variants, torch.");
  m.def("cpu_capabilities", &cpu_capabilities,
        "This CPU: architecture, vendor, model, isa, and the kernel variants it can run.");
}
