// What this CPU and its operating system can run. Plain C++, no Python, no torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace prefkern {

struct CpuInfo {
  std::string architecture = "other", vendor, model;
  std::vector<std::string> isa;
  bool has(const char* name) const {
    for (const auto& x : isa) {
      if (x == name) return true;
    }
    return false;
  }
};

#if defined(__x86_64__)

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

inline CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros when not supported
  return r;
}

inline uint64_t xgetbv0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

inline CpuInfo detect_cpu() {
  CpuInfo info;
  info.architecture = "x86_64";
  const CpuidLeaf base = cpuid(0);
  char vendor[13] = {};
  std::memcpy(vendor, &base.ebx, 4);
  std::memcpy(vendor + 4, &base.edx, 4);
  std::memcpy(vendor + 8, &base.ecx, 4);
  info.vendor = vendor;
  if (cpuid(0x80000000u).eax >= 0x80000004u) {
    char brand[49] = {};
    for (uint32_t i = 0; i < 3; ++i) {
      const CpuidLeaf part = cpuid(0x80000002u + i);
      std::memcpy(brand + 16 * i, &part, 16);
    }
    info.model = brand;
    info.model.erase(0, info.model.find_first_not_of(' '));
    info.model.erase(info.model.find_last_not_of(' ') + 1);
  }
  const CpuidLeaf one = cpuid(1), seven = cpuid(7), seven1 = cpuid(7, 1);
  // A CPU feature counts only if the operating system saves its registers (XCR0): bits 1-2 xmm and
  // ymm, 5-7 opmask and zmm, 17-18 AMX tiles.
  const uint64_t xcr0 = (one.ecx >> 27 & 1) ? xgetbv0() : 0;
  const bool os_ymm = (xcr0 & 0x6) == 0x6;
  const bool os_zmm = (xcr0 & 0xe6) == 0xe6;
  const bool os_amx = (xcr0 & 0x60000) == 0x60000;
  const auto add = [&](bool os, uint32_t reg, int bit, const char* name) {
    if (os && (reg >> bit & 1)) info.isa.emplace_back(name);
  };
  add(true, one.ecx, 20, "sse4.2");
  add(os_ymm, one.ecx, 28, "avx");
  add(os_ymm, one.ecx, 29, "f16c");
  add(os_ymm, one.ecx, 12, "fma");
  add(os_ymm, seven.ebx, 5, "avx2");
  add(os_ymm, seven1.eax, 4, "avx_vnni");
  add(os_zmm, seven.ebx, 16, "avx512f");
  add(os_zmm, seven.ebx, 17, "avx512dq");
  add(os_zmm, seven.ebx, 30, "avx512bw");
  add(os_zmm, seven.ebx, 31, "avx512vl");
  add(os_zmm, seven.ecx, 11, "avx512vnni");
  add(os_zmm, seven1.eax, 5, "avx512bf16");
  add(os_zmm, seven.edx, 23, "avx512fp16");
  add(os_amx, seven.edx, 24, "amx_tile");
  add(os_amx, seven.edx, 22, "amx_bf16");
  return info;
}

#elif defined(__aarch64__)

inline CpuInfo detect_cpu() {
  CpuInfo info;
  info.architecture = "aarch64";
#if defined(__linux__)
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  const auto add = [&](unsigned long word, int bit, const char* name) {
    if (word >> bit & 1) info.isa.emplace_back(name);
  };
  add(hwcap, 1, "asimd");
  add(hwcap, 10, "asimdhp");
  add(hwcap, 22, "sve");
  add(hwcap2, 1, "sve2");
  add(hwcap2, 14, "bf16");
#endif
  return info;
}

#else

inline CpuInfo detect_cpu() {
  return {};
}

#endif

// The kernel variants (csrc/cpu/kernels_<name>.cpp) whose compiler flags this machine can run.
inline std::vector<std::string> runnable_variants(const CpuInfo& cpu) {
  std::vector<std::string> names = {"baseline"};
  const bool avx2 = cpu.has("avx2") && cpu.has("fma") && cpu.has("f16c");
  const bool avx512 = avx2 && cpu.has("avx512f") && cpu.has("avx512bw") && cpu.has("avx512vl") &&
                      cpu.has("avx512dq");
  if (avx2) names.emplace_back("avx2");
  if (avx512) names.emplace_back("avx512");
  if (avx512 && cpu.has("avx512bf16")) names.emplace_back("avx512bf16");
  return names;
}

}  // namespace prefkern
