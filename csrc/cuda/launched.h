// How often this process has launched each kernel; those of a replayed CUDA graph are not counted.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace prefkern {

class Launched {
 public:
  static Launched& get() {
    static Launched all;
    return all;
  }
  void add(const char* name) {
    const std::lock_guard<std::mutex> guard(lock_);
    ++counts_[name];
  }
  int64_t of(const std::string& name) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = counts_.find(name);
    return found == counts_.end() ? 0 : found->second;
  }

 private:
  std::mutex lock_;
  std::map<std::string, int64_t> counts_;
};

inline int64_t launches_of(const std::string& name) {
  return Launched::get().of(name);
}

}  // namespace prefkern
