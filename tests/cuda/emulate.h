// What the emulation programs share: standard input holds calls, a line of words and then arrays as
// bytes; results come back as bytes, call by call.
#pragma once

#include <sys/mman.h>

#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/block.h"

using namespace prefkern;
using Bytes = std::vector<unsigned char>;

inline Bytes read_bytes(size_t n) {
  Bytes bytes(n);
  std::cin.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(n));
  if (!std::cin) throw std::runtime_error("short input");
  return bytes;
}
inline void write_bytes(const Bytes& bytes) {
  std::cout.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
}
// An entry that a kernel forgets stays NaN.
inline Bytes unwritten(size_t n) {
  return Bytes(n, 0xff);
}

// Address space that costs only what is touched.
template <class T>
inline T* far_array(int64_t n) {
  void* p = mmap(nullptr, size_t(n) * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no address space");
  return static_cast<T*>(p);
}
inline void want(bool good, const char* what) {
  if (!good) throw std::runtime_error(what);
}

// Runs `call` for every line that starts with "call", `far` for one that says "far".
template <class Call, class Far>
int serve(const Call& call, const Far& far) {
  std::string what;
  while (std::cin >> what) {
    if (what == "far") {
      far();
      std::cout << "ok";
    } else if (what == "call") {
      call();
    } else {
      return 1;
    }
  }
  return 0;
}
