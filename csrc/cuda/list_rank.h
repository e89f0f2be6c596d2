// Arguments of list_rank's CUDA kernels and the function that launches them: raw pointers and
// numbers, no torch and no CUDA types, so that the emulation on a CPU has the very same interface.
#pragma once

#include "cuda/sweep.h"
#include "list_options.h"

namespace prefkern {

constexpr int kListThreads = 256;
constexpr int kListGroups = 256;  // groups of a block, at most

struct ListArgs {
  const int32_t* cu = nullptr;     // [G+1]
  const int64_t* topk = nullptr;   // [G] or null
  const void* scores = nullptr;    // [S] double or float, as are labels, loss and slope
  const void* labels = nullptr;    // [S], NaN where masked
  void* loss = nullptr;            // [G]
  void* slope = nullptr;           // [S]
  unsigned char* spill = nullptr;  // list_spill(args) bytes
  int64_t groups = 0, items = 0;   // G, S
  int groups_per_block = 1;        // set by list_rank
  bool doubles = false;
  ListFamily family = ListFamily::pair;
  ListOptions options;
};

// Bytes of device memory that groups too large for shared memory work in: about 50 per item of the
// batch, since the host does not know the sizes of groups; 0 where no group can be too large.
int64_t list_spill(const ListArgs& args);

// Throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
void list_rank(ListArgs args, const Stream& stream);

}  // namespace prefkern
